"""Make a pool of DRR pairs from CTs: worker processes, resumable, with a record and a contact sheet.

    POOL/NAME_0000_cxr.png, NAME_0000_soft_tissue.png   16 bit, air dark
    POOL/pool.json                                      settings, and each CT's state or the reason why it has no pairs
    POOL/contact_sheet.png
    POOL/.work/                                         materials of the CT at hand, removed at the end

A pair depends on the seed, the CT's name and its number only. So an interrupted pool can be continued, and a larger
count adds pairs.
"""

from __future__ import annotations

import copy
import json
import logging
import multiprocessing
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from bsdiff_rt import __version__
from bsdiff_rt.errors import InputFailed, InputRefused, SettingsError
from bsdiff_rt.files import write_atomically
from bsdiff_rt.formats.raster import write_png
from train.drr.cartilage import calcify
from train.drr.framing import Anatomy, BeamKind, View, draw_framing
from train.drr.materials import SCALE, Materials
from train.drr.prepare import prepare_ct
from train.drr.processing import display, draw_display, draw_exposure, expose
from train.drr.projection import Array, project
from train.drr.sheet import contact_sheet
from train.drr.volume import Source

logger = logging.getLogger(__name__)

RECORD, SHEET, WORK = "pool.json", "contact_sheet.png", ".work"
KIND = "pool of DRR pairs"
BITS = 16
LARGEST_SHEET = 48  # pairs
CALCIFIED = 1  # seed of the calcifications
LUNG_SHARE = 0.35  # of the long paths through the lungs: what is longer is lung field
ROLES = ("cxr", "soft_tissue")
PARTS = tuple(field.name for field in fields(Materials))


@dataclass(frozen=True)
class DrrOptions:
    """How pairs are made; what changes a pair, and so must stay the same when a pool is continued.

    Attributes:
        size: side of the images, px, 256 to 1024.
        seed: seed of everything random.
        view: "PA", "AP" or "mixed".
        beam: "cone", "parallel" or "mixed".
        pose: multiplies the random rotations; 0 is straight.
        lungs: also write NAME_lungs.png, the lung fields.
        calcified: share of pairs with calcifications drawn into the rib cartilage. They also have NAME_plain.png, the
            X-ray without them.
    """

    size: int = 512
    seed: int = 0
    view: View = "mixed"
    beam: BeamKind = "mixed"
    pose: float = 1.0
    lungs: bool = False
    calcified: float = 0.0

    @property
    def voxel_mm(self) -> float:
        """Return the size of voxels that serves this size of images, mm."""
        return 1.0 if self.size <= 512 else 0.7


@dataclass(frozen=True)
class Labels:
    """Where bones are labelled: one file, or a folder of files named as the CTs. `values` None: all but 0."""

    path: Path | None = None
    values: frozenset[int] | None = None


@dataclass
class Entry:
    """One CT in the record. Status: "ok", "refused" or "failed", with the reason."""

    name: str
    status: str = "ok"
    reason: str = ""
    pairs: int = 0
    spacing_mm: list[float] = field(default_factory=list)
    bone_ml: float = 0.0
    contrast_ml: float = 0.0
    prepare_seconds: float = 0.0
    seconds_per_pair: float = 0.0


def make_pool(
    sources: list[Source], output: Path, count: int, options: DrrOptions, labels: Labels, workers: int
) -> list[Entry]:
    """Write `count` pairs of each CT; those that are there already are kept.

    Args:
        sources: the CTs.
        output: folder of the pool; new, empty, or begun by the same command.
        count: pairs per CT.
        options: how they are made.
        labels: bone labels.
        workers: worker processes.

    Returns:
        One entry per CT of `sources`. The record also keeps those of earlier calls.

    Raises:
        SettingsError: the folder holds something else, or a pool with other settings; or a worker was killed.
    """
    _check_labels(labels, len(sources))
    start_pool(output, options)
    work = output / WORK
    _load.cache_clear()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    entries = _read_entries(output)
    for source in sources:
        entries.setdefault(source.name, Entry(source.name))
    try:
        with _start_workers(workers) as executor:
            _project_all(executor, sources, output, count, options, labels, entries)
    except BrokenProcessPool:
        raise SettingsError(
            "a worker process was killed, perhaps for want of memory; use fewer and run the command again",
            setting="workers",
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
        _write_record(output, options, entries.values())
    if names := sorted(path.name[: -len("_cxr.png")] for path in output.glob("*_cxr.png")):
        write_atomically(output / SHEET, contact_sheet(output, names, LARGEST_SHEET))
    return [entries[source.name] for source in sources]


class _SameProcess(Executor):
    """Runs each task at once, in this process."""

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Return a future that is done."""
        future: Future[Any] = Future()
        try:
            future.set_result(task(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _start_workers(count: int) -> Executor:
    """Return worker processes, or this process for one.

    Spawned, although that imports the training again: a forked worker hangs if OpenCV's threads ran in this process.
    """
    if count == 1:
        return _SameProcess()
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker)


def _check_labels(labels: Labels, count: int) -> None:
    if labels.path is None:
        return
    if not labels.path.exists():
        raise SettingsError(f"{labels.path}: no such file or folder", setting="labels")
    if labels.path.is_file() and count > 1:
        raise SettingsError("one file for several CTs; give a folder of files named as the CTs", setting="labels")


def start_pool(output: Path, options: DrrOptions) -> None:
    """Make the folder, or check that it is an earlier pool with the same settings.

    Raises:
        SettingsError: it is not.
    """
    if output.exists() and not output.is_dir():
        raise SettingsError(f"{output}: not a folder")
    output.mkdir(parents=True, exist_ok=True)
    record = output / RECORD
    if not record.exists():
        if any(output.iterdir()):
            raise SettingsError(f"{output}: not empty and not a pool of this command; give a new folder")
        _write_record(output, options, [])
        return
    try:
        content = json.loads(record.read_text())
        kind, settings = content["kind"], content["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        kind, settings = None, None
    if kind != KIND:
        raise SettingsError(f"{record}: not the record of a pool; give a new folder")
    if settings != asdict(options):
        raise SettingsError(f"{output}: made with other settings ({settings}); give the same, or a new folder")


def _read_entries(output: Path) -> dict[str, Entry]:
    """Return what the record says of the CTs of earlier calls, by name."""
    return {row["name"]: Entry(**row) for row in json.loads((output / RECORD).read_text())["volumes"]}


def _write_record(output: Path, options: DrrOptions, entries: Iterable[Entry]) -> None:
    content = {"kind": KIND, "bsdiff_rt": __version__, "settings": asdict(options)}
    rows = [
        {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(entry).items()}
        for entry in entries
    ]
    write_atomically(output / RECORD, (json.dumps(content | {"volumes": rows}, indent=1) + "\n").encode())


def _missing(output: Path, name: str, count: int, options: DrrOptions) -> list[int]:
    """Return the numbers of the pairs that are not there."""
    roles = (*ROLES, "lungs") if options.lungs else ROLES
    return [i for i in range(count) if not all(_file(output, name, i, role).exists() for role in roles)]


def _file(output: Path, name: str, number: int, role: str) -> Path:
    return output / f"{name}_{number:04d}_{role}.png"


def _project_all(
    executor: Executor,
    sources: list[Source],
    output: Path,
    count: int,
    options: DrrOptions,
    labels: Labels,
    entries: dict[str, Entry],
) -> None:
    """Prepare one CT after the other, and project each while the next one is prepared."""
    waiting = [source for source in sources if _missing(output, source.name, count, options)]
    for source in sources:
        entries[source.name].pairs = count - len(_missing(output, source.name, count, options))
        if source not in waiting:
            logger.info("%s: all %d pairs are there", source.name, count)
    prepared: Future[dict[str, Any]] | None = None
    for place, source in enumerate(waiting):
        now = prepared or executor.submit(_prepare, source, output / WORK, options, labels)
        following = waiting[place + 1] if place + 1 < len(waiting) else None
        result = now.result()
        if following is not None:
            prepared = executor.submit(_prepare, following, output / WORK, options, labels)
        entry = entries[source.name]
        entry.status, entry.reason = "ok", ""  # whatever an earlier call found
        for name, value in result.items():
            setattr(entry, name, value)
        if entry.status != "ok":
            logger.warning("%s: %s", source.name, entry.reason)
            continue
        missing = _missing(output, source.name, count, options)
        started = time.monotonic()
        tasks = (executor.submit(_make_pair, output, source.name, i, options) for i in missing)
        futures = tasks if isinstance(executor, _SameProcess) else as_completed(list(tasks))
        for done, future in enumerate(futures, 1):
            future.result()
            entry.pairs += 1
            if done == len(missing) or done % 10 == 0:
                logger.info("%s: %d of %d pairs", source.name, entry.pairs, count)
        entry.seconds_per_pair = (time.monotonic() - started) / len(missing)
        for path in _work_files(output / WORK, source.name):
            path.unlink(missing_ok=True)  # cartilage was not looked for, perhaps


def _start_worker() -> None:
    cv2.setNumThreads(1)


def _work_files(work: Path, name: str) -> Iterator[Path]:
    for part in PARTS:
        yield work / f"{name}_{part}.npy"
    yield work / f"{name}.json"


def _prepare(source: Source, work: Path, options: DrrOptions, labels: Labels) -> dict[str, Any]:
    """Prepare one CT, in a worker; write its materials and return what goes into its entry."""
    started = time.monotonic()
    path = labels.path
    if path is not None and path.is_dir():
        path = _label_file(path, source.name)
    try:
        prepared = prepare_ct(source, options.voxel_mm, path, labels.values, cartilage=options.calcified > 0)
    except (InputRefused, InputFailed) as error:
        status = "refused" if isinstance(error, InputRefused) else "failed"
        return {"status": status, "reason": str(error), "prepare_seconds": time.monotonic() - started}
    *volumes, text = _work_files(work, source.name)
    for file, part in zip(volumes, PARTS, strict=True):
        if (volume := getattr(prepared.materials, part)) is not None:
            np.save(file, volume)
    text.write_text(json.dumps(asdict(prepared.anatomy)))
    return {
        "spacing_mm": [round(step, 4) for step in prepared.anatomy.spacing],
        "bone_ml": prepared.bone_ml,
        "contrast_ml": prepared.contrast_ml,
        "prepare_seconds": time.monotonic() - started,
    }


def _label_file(folder: Path, name: str) -> Path | None:
    """Return the label file of a CT in a folder; None where it has none."""
    found = [path for path in sorted(folder.iterdir()) if path.name.split(".")[0] == name.split(".")[0]]
    return found[0] if found else None


@lru_cache(maxsize=1)
def _load(work: Path, name: str) -> tuple[Materials, Anatomy]:
    """Return a CT's materials, mapped from the file so that all workers share the memory, and its anatomy."""
    *volumes, text = _work_files(work, name)
    a = json.loads(text.read_text())
    z, y, x = (tuple(pair) for pair in a["lungs"])
    anatomy = Anatomy(tuple(a["spacing"]), tuple(a["size"]), (z, y, x), a["cut"])
    there = {part: path for part, path in zip(PARTS, volumes, strict=True) if path.exists()}
    return Materials(**{part: np.load(path, mmap_mode="r") for part, path in there.items()}), anatomy


def _make_pair(output: Path, name: str, number: int, options: DrrOptions) -> None:
    """Write one pair, in a worker; the X-ray last, so that a pair with an X-ray is whole."""
    materials, anatomy = _load(output / WORK, name)
    made = draw_pair(materials, anatomy, name, number, options)
    for role in ("lungs", "plain", "soft_tissue", "cxr"):
        if role in made:
            write_png(_file(output, name, number, role), made[role], BITS)


def draw_pair(materials: Materials, anatomy: Anatomy, name: str, number: int, options: DrrOptions) -> dict[str, Array]:
    """Return one pair, [S, S] float32 in [0, 1].

    "cxr" and "soft_tissue"; "lungs" where the options say so; and "plain" where calcifications were drawn: the X-ray
    without them.
    """
    seed = [options.seed, zlib.crc32(os.fsencode(name)), number]
    rng = np.random.default_rng(seed)
    framing = draw_framing(rng, anatomy, options.size, options.view, options.beam, options.pose)
    drawn = np.random.default_rng([*seed, CALCIFIED])  # its own, so that the share changes nothing else
    cartilage = materials.cartilage if drawn.random() < options.calcified else None
    maps = [materials.soft, materials.excess] + ([materials.lungs] if options.lungs else [])
    if cartilage is not None:
        y_z_x = (anatomy.spacing[1], anatomy.spacing[0], anatomy.spacing[2])
        maps.append(calcify(drawn, cartilage, y_z_x))
    paths = project(maps, framing.spacing, framing.pose, framing.beam, framing.heights)
    pixel_mm = framing.beam.side_mm / options.size
    exposure = draw_exposure(rng)
    same_noise = copy.deepcopy(rng)
    bone = paths[1] if cartilage is None else paths[1] + paths[-1]
    logs = expose(paths[0], bone, exposure, pixel_mm, rng)
    shown = draw_display(rng)
    cxr, soft_tissue = display(*logs, shown, pixel_mm)
    made = {"cxr": cxr, "soft_tissue": soft_tissue}
    if cartilage is not None:
        plain, its_soft_tissue = display(*expose(paths[0], paths[1], exposure, pixel_mm, same_noise), shown, pixel_mm)
        # The display follows the X-ray, so both soft-tissue images differ a little. The bone without calcifications, on
        # this pair's soft tissue, is what a network should tell from `cxr`.
        made["plain"] = np.clip(soft_tissue + plain - its_soft_tissue, 0, 1)
    if options.lungs:
        path = paths[2] / np.float32(SCALE)
        long = np.percentile(path[path > 0], 95) if (path > 0).any() else 1.0
        made["lungs"] = (path > LUNG_SHARE * long).astype(np.float32)
    return made
