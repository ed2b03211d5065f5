"""Folder to folder: read, sample, enhance, write. One bad file never stops the run.

Reading and writing run in worker threads around the networks, which work on one batch at a time; a few files are held
in memory at once, however many there are.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from bsdiff_rt import __version__
from bsdiff_rt.bundle import file_sha256, open_bundle
from bsdiff_rt.config import InferSettings
from bsdiff_rt.derived import Derivation, write_derived
from bsdiff_rt.dicom import is_dicom, read_dicom
from bsdiff_rt.discover import DICOM_SUFFIXES, Task, find_tasks
from bsdiff_rt.errors import BsdiffError, InputFailed, InputRefused, SettingsError, one_line
from bsdiff_rt.evaluate import read_result
from bsdiff_rt.intensity import Placement, from_network, subtract_local_bone, to_network
from bsdiff_rt.noise import ImageNoise, batch_noise
from bsdiff_rt.preview import FILE_NAME as PREVIEW
from bsdiff_rt.preview import ROWS, Preview
from bsdiff_rt.radiograph import Radiograph
from bsdiff_rt.raster import read_raster, write_png
from bsdiff_rt.report import FileEntry, Ledger, Report, environment, finished_before
from bsdiff_rt.runners import choose, load_runner, resolve_device, resolve_precision
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.sampler import sample
from bsdiff_rt.schedule import Table, sampler_table

logger = logging.getLogger(__name__)

READERS, WRITERS = 2, 2
CONSTANT = 1e-4  # a result whose grey levels, in [0, 1], span less than this shows nothing
CPU_BATCH, CUDA_BATCH = 1, 8  # a CPU gains nothing from a batch; a GPU's arithmetic is filled by about eight


@dataclass(frozen=True)
class Ready:
    """A file that was read and is ready for the networks; `cxr_net` is [S, S] float32 in [-1, 1]."""

    task: Task
    output: Path
    radiograph: Radiograph
    cxr_net: NDArray[np.float32]
    placement: Placement
    input_sha256: str
    seconds: float


class Inference:
    """One run of `infer`: the settings resolved against bundle and machine, and the run itself.

    Args:
        settings: what the user asked for.

    Raises:
        SettingsError: settings that cannot be used.
        BundleError: the bundle is refused.
        EngineError: the runner cannot be used here.
    """

    def __init__(self, settings: InferSettings) -> None:
        self.bundle = open_bundle(settings.bundle)
        manifest = self.bundle.manifest
        sampler = settings.sampler or manifest.sampler.name
        # The bundle's number of steps was chosen for its own sampler; another one runs in full.
        own_steps = manifest.sampler.steps if sampler == manifest.sampler.name else manifest.schedule.train_steps
        self.settings = replace(
            settings,
            sampler=sampler,
            steps=own_steps if settings.steps is None else settings.steps,
            enhance=manifest.enhance if settings.enhance is None else settings.enhance,
            detail=settings.detail or manifest.detail,
        )
        self.table: Table = sampler_table(manifest.schedule, sampler, self.settings.steps or 0)
        ImageNoise(settings.seed, b"")  # refuses a seed out of range before any work is done
        self.device = resolve_device(settings.device)
        self.batch = settings.batch or (CPU_BATCH if self.device.type == "cpu" else CUDA_BATCH)
        runner, _ = choose(settings.runner, self.device)
        # What decides the pixels. Batch and device do not: noise belongs to the image.
        names = ("sampler", "steps", "seed", "enhance", "size", "detail", "format", "sop")
        decisive = {name: getattr(self.settings, name) for name in names}
        decisive |= {"runner": runner, "precision": resolve_precision(runner, settings.precision)}
        self.report = Report(self.bundle.identity, decisive, environment(str(self.device)))
        self._digest = self.report.settings_digest()

    def tasks(self, inputs: Iterable[Path]) -> list[Task]:
        """Every file to do (`discover.find_tasks`)."""
        reserved = (PREVIEW,) if self.settings.preview else ()
        return find_tasks(inputs, self.settings.output, self.settings.format, reserved)

    def plan(self, inputs: Iterable[Path]) -> Iterator[FileEntry]:
        """What `run` would do, without doing it: `ok` would be written, `skipped` and `refused` as they would be."""
        before = self._finished_before()
        for task in self.tasks(inputs):
            outcome = self._read(task, before)
            yield (
                outcome
                if isinstance(outcome, FileEntry)
                else FileEntry(str(task.input), str(task.output), "ok", input_sha256=outcome.input_sha256)
            )

    def run(self, tasks: list[Task], on_file: Callable[[FileEntry], None] = lambda _: None) -> Report:
        """Do every file; the report, also written to the output folder, tells each one's fate.

        Args:
            tasks: from `tasks`.
            on_file: told each file's entry when it is done.

        Raises:
            SettingsError: the output folder cannot be written.
            BaseException: an interruption is passed on, after what was being written is finished and reported.
        """
        folder = self.settings.output
        _make_output_folder(folder)
        before = self._finished_before()
        ledger = Ledger(self.report, folder, (str(task.input) for task in tasks), before, on_file)
        runner = load_runner(self.bundle, self.settings.runner, self.device, self.settings.precision)
        try:
            with runner, ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(WRITERS) as writers:
                writing: deque[Future[None]] = deque()
                for outcome in _batched(self._read_ahead(tasks, before, readers), self.batch):
                    if isinstance(outcome, FileEntry):
                        ledger.add(outcome)
                        continue
                    writing += self._do(outcome, runner, writers, ledger)
                    while len(writing) > 2 * self.batch:
                        writing.popleft().result()
                for write in writing:
                    write.result()
        finally:  # after the writers: leaving their `with` waits for what they were given
            ledger.save()
        if self.settings.preview:
            self._write_preview()
        return self.report

    def _finished_before(self) -> dict[str, FileEntry]:
        return {} if self.settings.overwrite else finished_before(self.settings.output, self.report)

    def _read_ahead(
        self, tasks: list[Task], before: dict[str, FileEntry], readers: ThreadPoolExecutor
    ) -> Iterator[Ready | FileEntry]:
        """Outcomes of reading, in the order of the tasks, read up to two batches ahead."""
        pending: deque[Future[Ready | FileEntry]] = deque()
        try:
            for task in tasks:
                pending.append(readers.submit(self._read, task, before))
                if len(pending) > 2 * self.batch:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def _read(self, task: Task, before: dict[str, FileEntry]) -> Ready | FileEntry:
        """Read one file for the networks, or say why not; never raises for what is wrong with a file."""
        started = time.monotonic()
        try:
            if task.refusal or task.output is None:
                raise InputRefused(task.refusal or "no output")
            digest = file_sha256(task.input)
            if self._is_finished(task.output, digest, before):
                return replace(before[str(task.output)], input=str(task.input), status="skipped", seconds=0.0)
            radiograph = read_radiograph(task.input, force_view=self.settings.force_view)
            if self.settings.format == "dicom" and radiograph.dataset is None:
                raise InputRefused("--format dicom needs DICOM input: an image file has no study to belong to")
            cxr_net, placement = to_network(radiograph.cxr, self.bundle.manifest.preprocessing)
            return Ready(task, task.output, radiograph, cxr_net, placement, digest, time.monotonic() - started)
        except Exception as error:
            status: Literal["refused", "failed"] = "refused" if isinstance(error, InputRefused) else "failed"
            return _not_done(task, status, _reason(error, "read"), started)

    def _is_finished(self, output: Path, input_sha256: str, before: dict[str, FileEntry]) -> bool:
        """Whether an earlier run made this output from the same input and it is still what was written."""
        entry = before.get(str(output))
        path = self.settings.output / output
        return (
            entry is not None
            and entry.input_sha256 == input_sha256
            and path.is_file()
            and file_sha256(path) == entry.sha256
        )

    def _do(
        self, batch: list[Ready], runner: Runner, writers: ThreadPoolExecutor, ledger: Ledger
    ) -> Iterator[Future[None]]:
        """Both networks on one batch, then hand each result to a writer, which enters it into the ledger.

        A backend that fails (RuntimeError: out of memory, say) fails the files of this batch; the next one may fit.
        """
        started = time.monotonic()
        try:
            soft_tissue = suppress(
                runner,
                np.stack([ready.cxr_net for ready in batch])[:, None],
                self.table,
                [ImageNoise(self.settings.seed, ready.radiograph.pixel_digest) for ready in batch],
                enhance=bool(self.settings.enhance),
            )
        except (RuntimeError, MemoryError) as error:
            logger.debug("a batch failed", exc_info=True)
            smaller = ", a smaller --batch may help" if len(batch) > 1 else ""
            reason = f"the networks failed ({one_line(error)}); nothing was written{smaller}"
            for ready in batch:
                ledger.add(_not_done(ready.task, "failed", reason, started - ready.seconds))
            return
        share = (time.monotonic() - started) / len(batch)

        def finish(ready: Ready, soft_tissue_net: NDArray[np.float32]) -> None:
            ledger.add(self._write(ready, soft_tissue_net))

        for ready, image in zip(batch, soft_tissue, strict=True):
            yield writers.submit(finish, replace(ready, seconds=ready.seconds + share), image[0])

    def _write(self, ready: Ready, soft_tissue_net: NDArray[np.float32]) -> FileEntry:
        """Bring one result to its output matrix and write it; a result that is no image fails its file."""
        started = time.monotonic()
        path = self.settings.output / ready.output
        try:
            _check_result(soft_tissue_net)
            soft_tissue = self._to_output(ready, soft_tissue_net)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".dcm":
                write_derived(path, ready.radiograph, soft_tissue, self._derivation(), self.settings.sop)
            else:
                write_png(path, soft_tissue, ready.radiograph.bits_stored)
            digest = file_sha256(path)
        except Exception as error:
            return _not_done(ready.task, "failed", _reason(error, "written"), started - ready.seconds)
        seconds = round(ready.seconds + time.monotonic() - started, 4)
        return FileEntry(str(ready.task.input), str(ready.output), "ok", None, seconds, digest, ready.input_sha256)

    def _write_preview(self) -> None:
        """preview.png from the files as they lie there, so that those of an earlier run are in it, too."""
        shown = [entry for entry in self.report.files if entry.output is not None]
        preview = Preview()
        for entry in shown[:ROWS]:
            try:
                radiograph = read_radiograph(Path(entry.input), force_view=True)
                result = read_result(self.settings.output / str(entry.output), radiograph.bits_stored)
            except BsdiffError as error:  # changed since it was done
                logger.warning("%s is not in the preview: %s", entry.input, error)
                continue
            preview.add(radiograph.cxr, result)
        path = preview.write(self.settings.output)
        logger.info("preview: %s; %d left out", path or "nothing was written", max(0, len(shown) - ROWS))

    def _to_output(self, ready: Ready, soft_tissue_net: NDArray[np.float32]) -> NDArray[np.float32]:
        """[H, W] in [0, 1] at the output matrix, with the detail asked for."""
        cxr, placement = ready.radiograph.cxr, ready.placement
        if self.settings.size == "model":  # the picture without its padding, at the network's resolution
            placement = replace(placement, rows=placement.height, columns=placement.width)
            own_tone = replace(self.bundle.manifest.preprocessing, clahe_clip_limit=0.0)
            cxr = from_network(to_network(cxr, own_tone)[0], placement)
        if self.settings.detail == "source":
            return subtract_local_bone(cxr, ready.cxr_net, soft_tissue_net, placement)
        return from_network(soft_tissue_net, placement)

    def _derivation(self) -> Derivation:
        settings, report = self.settings, self.report
        size = self.bundle.manifest.preprocessing.size
        return Derivation(
            description=(
                f"Bone suppression by conditional diffusion (BS-Diff): sampler {settings.sampler}, "
                f"{settings.steps} steps, seed {settings.seed}, stage 2 {'on' if settings.enhance else 'off'}, "
                f"network matrix {size} x {size}, detail from {settings.detail}, "
                f"runner {report.settings['runner']} {report.settings['precision']}. Not for diagnostic use."
            ),
            bundle_name=self.bundle.manifest.name,
            bundle_sha256=self.bundle.sha256,
            settings_digest=self._digest,
            software_version=__version__,
        )


def suppress(
    runner: Runner, cxr: NDArray[np.float32], table: Table, noise: list[ImageNoise], *, enhance: bool
) -> NDArray[np.float32]:
    """Both stages on one batch; they chain in device memory, in float32.

    Args:
        runner: both networks.
        cxr: [B, 1, S, S] float32 in [-1, 1].
        table: the sampler.
        noise: one stream per image.
        enhance: whether stage 2 runs.

    Returns:
        [B, 1, S, S] float32, in [-1, 1] unless the networks failed (NaN), on the host.
    """
    size = (cxr.shape[-2], cxr.shape[-1])
    x_0 = sample(
        runner,
        torch.from_numpy(cxr).to(runner.device),
        table,
        lambda number: torch.from_numpy(batch_noise(noise, number, size)),
    )
    if enhance:
        enhanced = torch.empty_like(x_0)
        runner.enhance(x_0, enhanced)
        x_0 = enhanced.clamp_(-1.0, 1.0)
    return np.asarray(x_0.cpu().numpy(), dtype=np.float32)


def read_radiograph(path: Path, *, force_view: bool = False) -> Radiograph:
    """Read a DICOM or raster file, told apart by content, not by name.

    Raises:
        InputRefused, InputFailed: see `dicom.read_dicom` and `raster.read_raster`.
    """
    if is_dicom(path) or path.suffix.lower() in DICOM_SUFFIXES:
        return read_dicom(path, force_view=force_view)
    return read_raster(path)


def _batched(outcomes: Iterator[Ready | FileEntry], size: int) -> Iterator[list[Ready] | FileEntry]:
    """Group what is ready into batches; what is decided already passes through at once."""
    batch: list[Ready] = []
    for outcome in outcomes:
        if isinstance(outcome, FileEntry):
            yield outcome
            continue
        batch.append(outcome)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _not_done(task: Task, status: Literal["refused", "failed"], reason: str, started: float) -> FileEntry:
    return FileEntry(str(task.input), None, status, reason, round(time.monotonic() - started, 4))


def _reason(error: Exception, doing: Literal["read", "written"]) -> str:
    """One line on what happened to a file.

    Of exceptions that are not ours the text is left out: an OSError's repeats the path, others may quote the file. What
    nobody expected is a bug, which is told by its place, and still costs only the file that triggers it.
    """
    if isinstance(error, BsdiffError):
        return str(error)
    if isinstance(error, MemoryError):
        return "too large for this machine's memory"
    if isinstance(error, OSError):
        return f"cannot be {doing}: {error.strerror or type(error).__name__}"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"a bug ({type(error).__name__} in {Path(place.filename).name}, line {place.lineno}); please report it"


def _check_result(soft_tissue_net: NDArray[np.float32]) -> None:
    """Refuse to write a result that is no image.

    Raises:
        InputFailed: NaN, infinity, or (nearly) one grey level everywhere.
    """
    if not np.isfinite(soft_tissue_net).all():
        raise InputFailed("the networks returned NaN or infinity for this image; nothing was written")
    if float(np.ptp(soft_tissue_net)) / 2 < CONSTANT:
        raise InputFailed("the networks returned one grey level for the whole image; nothing was written")


def _make_output_folder(folder: Path) -> None:
    """Raises SettingsError if results could not be written there; better now than after the first image."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".bsdiff-rt-probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SettingsError(f"--output {folder}: cannot be written ({reason}); choose another folder") from error
