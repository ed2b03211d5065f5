"""Engines: building them past the parity gate, finding them, and choosing what runs. Their identity is identity.py."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import torch

from bsdiff_rt import __version__
from bsdiff_rt.bundle import BUNDLES, Bundle
from bsdiff_rt.config import EngineOptions, EngineRunnerName, Precision, RunnerName
from bsdiff_rt.errors import EngineError, SettingsError, one_line, out_of_memory
from bsdiff_rt.files import file_sha256, put_in_place, write_atomically
from bsdiff_rt.identity import FORMAT, MANIFEST, Engine, EngineManifest, backend, identify, open_engine, read_engine
from bsdiff_rt.parity import compare
from bsdiff_rt.runners import computes_bf16, load_runner, resolve_precision, unavailable
from bsdiff_rt.runners.base import Progress, Runner

logger = logging.getLogger(__name__)

REJECTED = ".rejected.json"  # beside the place the engine would have had
ENGINE_RUNNERS: tuple[EngineRunnerName, ...] = ("tensorrt", "aoti")
FASTEST_FIRST: tuple[RunnerName, ...] = (*ENGINE_RUNNERS, "onnxruntime", "eager")


@dataclass(frozen=True)
class Choice:
    """Which runner is used, and why.

    Attributes:
        runner: its name.
        precision: what it computes in.
        why: in words, for the log: also why not each faster one.
        engine: the engine it runs, if it runs one.
    """

    runner: RunnerName
    precision: Precision
    why: str
    engine: Engine | None = None


def cache_folder() -> Path:
    """Where engines are kept and looked for: below the user's cache directory. `build_engine` makes it, mode 0700."""
    return platformdirs.user_cache_path("bsdiff-rt", appauthor=False) / "engines"


def engines_in_cache() -> list[Path]:
    """Folders of the engines in the cache, usable or not, newest first."""
    found: dict[Path, float] = {}
    for path in cache_folder().glob(f"[!.]*/{MANIFEST}"):
        with suppress(OSError):  # it has just been removed, or replaced by a build
            found[path.parent] = path.stat().st_mtime
    return sorted(found, key=found.__getitem__, reverse=True)


def find_engine(
    bundle: Bundle, device: torch.device, precision: str, runner: EngineRunnerName, batch: int | None = None
) -> Engine:
    """The newest engine in the cache that fits.

    Args:
        bundle: what it must have been built from.
        device: what it must have been built for.
        precision: fp32, bf16 or fp16; "auto" takes any.
        runner: what it must be for.
        batch: images that it must take at once; None: any.

    Raises:
        EngineError: none fits; says why not, and the command that builds one.
    """
    reasons: list[str] = []
    for folder in engines_in_cache():
        try:
            manifest = read_engine(folder).manifest
            if manifest.runner != runner or manifest.bundle.get("sha256") != bundle.sha256:
                continue
            if precision not in ("auto", manifest.precision):
                reasons.append(f"{folder.name} is in {manifest.precision}, not {precision}")
                continue
            if batch is not None and batch > manifest.batch_max:
                reasons.append(f"{folder.name} takes at most {manifest.batch_max} at once, not {batch}")
                continue
            return open_engine(folder, bundle, device)
        except EngineError as error:
            logger.debug("not used: %s", error)
            reasons.append(str(error))
    wanted = "" if precision == "auto" else f" --precision {precision}"
    name = bundle.folder.name if bundle.folder.parent == BUNDLES else str(bundle.folder)
    size = "" if batch in (None, 1) else f" --batch 1:{batch}"
    place = "" if device.type == "cpu" or device.index in (None, 0) else f" --device {device}"
    raise EngineError(
        f"no engine built for this bundle and device{' in ' + precision if wanted else ''}"
        f"{' (' + '; '.join(reasons) + ')' if reasons else ''}: "
        f"bsdiff-rt build-engine {name} --runner {runner}{wanted}{size}{place}"
    )


def choose(
    bundle: Bundle,
    runner: str,
    device: torch.device,
    precision: str = "auto",
    engine: Path | None = None,
    batch: int | None = None,
    not_loaded: Mapping[RunnerName, str] | None = None,
) -> Choice:
    """What `--runner`, `--precision` and `--engine` mean here. What was asked for by name is used, or the run stops.

    Args:
        bundle: the model.
        runner: a runner's name, or "auto": tensorrt, aoti, onnxruntime, eager, the first that is there and fits.
        device: where to run.
        precision: fp32, bf16 or fp16, or "auto": what the runner or the newest engine has.
        engine: an engine's folder; default: those in the cache.
        batch: images that an engine from the cache must take at once; None: any.
        not_loaded: runners that "auto" passes over, and why.

    Raises:
        EngineError: what was asked for cannot be used here, or no runner is left that has the precision.
        SettingsError: the engine is of another runner or precision than asked for.
    """
    if engine is not None:
        opened = open_engine(engine, bundle, device)
        for option, asked, has in (
            ("--runner", runner, opened.manifest.runner),
            ("--precision", precision, opened.manifest.precision),
        ):
            if asked not in ("auto", has):
                raise SettingsError(f"{option} {asked}: the engine {engine} is {has}; leave one of the two out")
        return Choice(opened.manifest.runner, opened.manifest.precision, f"--engine {engine}", opened)
    if runner != "auto":
        try:
            return _candidate(bundle, runner, device, precision, batch, "asked for")  # type: ignore[arg-type]  # checked names
        except EngineError as error:
            raise EngineError(f"--runner {runner} cannot be used on {device}: {error}") from error
    reasons: list[str] = []
    for name in FASTEST_FIRST:
        try:
            if reason := (not_loaded or {}).get(name):
                raise EngineError(reason)
            found = _candidate(bundle, name, device, precision, batch, "; ".join(reasons) or "fastest available")
            if precision == "auto" and found.precision == "bf16" and not computes_bf16(device):
                raise EngineError(f"its newest engine is in bf16, which {device} emulates; --runner {name} takes it")
            return found
        except EngineError as error:
            reasons.append(f"not {name}: {error}")
    raise EngineError(f"--precision {precision}: no runner has it here: {'; '.join(reasons)}")


def _candidate(
    bundle: Bundle, runner: RunnerName, device: torch.device, precision: str, batch: int | None, why: str
) -> Choice:
    """One runner by name.

    Raises:
        EngineError: it cannot be used here.
    """
    if reason := unavailable(runner, device):
        raise EngineError(reason)
    if runner == "aoti" or runner == "tensorrt":
        found = find_engine(bundle, device, precision, runner, batch)
        return Choice(runner, found.manifest.precision, why, found)
    return Choice(runner, resolve_precision(runner, precision, device), why)


def load_first(
    bundle: Bundle,
    runner: str,
    device: torch.device,
    precision: str = "auto",
    engine: Path | None = None,
    batch: int | None = None,
) -> tuple[Choice, Runner]:
    """`choose` a runner and load it; where "auto" chose one that does not load, say so and take the next.

    Raises:
        EngineError: what was asked for does not load, or nothing does.
        BundleError: weights that do not fit the bundle's networks.
        SettingsError: as `choose`.
    """
    not_loaded: dict[RunnerName, str] = {}
    while True:
        choice = choose(bundle, runner, device, precision, engine, batch, not_loaded)
        try:
            return choice, _load(bundle, choice, device)
        except EngineError as error:
            if runner != "auto" or engine is not None:
                raise
            logger.warning("runner %s passed over: it does not load (%s)", choice.runner, error)
            not_loaded[choice.runner] = f"it does not load ({error})"


def load(
    bundle: Bundle, runner: str, device: torch.device, precision: str = "auto", engine: Path | None = None
) -> Runner:
    """The runner of `load_first`."""
    return load_first(bundle, runner, device, precision, engine)[1]


def _load(bundle: Bundle, choice: Choice, device: torch.device) -> Runner:
    """Load what was chosen, and log which and why.

    Raises:
        EngineError: the back end cannot load it, or the device has not the memory.
        BundleError: weights that do not fit the bundle's networks.
    """
    where = f", engine {choice.engine.folder}" if choice.engine else ""
    logger.info("runner %s in %s on %s%s (%s)", choice.runner, choice.precision, device, where, choice.why)
    try:
        if choice.engine:
            return choice.engine.load(device)
        return load_runner(bundle, choice.runner, device, choice.precision)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise EngineError(
            f"{device} has not the memory to load runner {choice.runner} ({one_line(error)}); free some, or choose "
            "another --device"
        ) from error


def build_engine(
    bundle: Bundle, options: EngineOptions, device: torch.device, output: Path | None, progress: Progress
) -> Path:
    """Build an engine, compare it with eager in fp32, and publish it with one rename if they agree.

    An interrupted or failed build leaves nothing, a rejected one its report (`REJECTED`).

    Args:
        bundle: an opened bundle.
        options: runner, precision, batch range.
        device: what to build for.
        output: the engine's folder, new or an engine's to be replaced; default: a place in the cache.
        progress: told each phase.

    Returns:
        The engine's folder.

    Raises:
        EngineError: it cannot be built here, or it was rejected.
        SettingsError: `output` is or holds something that is no engine, or cannot be written.
    """
    if reason := unavailable(options.runner, device):
        raise EngineError(f"--runner {options.runner} cannot be used on {device}: {reason}")
    target = output or cache_folder() / folder_name(bundle, options, device)
    _check_place(target)
    try:
        for parent in reversed(target.parents):  # `parents=True` would not give those in between this mode
            parent.mkdir(mode=0o700, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-")
    except OSError as error:
        raise _not_writable(target, error) from error
    with temporary as work:
        made = Path(work) / "engine"
        made.mkdir(mode=0o700)
        manifest = _build(bundle, options, device, made, progress)
        report = target.with_name(target.name + REJECTED)
        if failed := manifest.parity.failed:
            content = dataclasses.asdict(manifest) | {"parity": manifest.parity.to_dict()}
            write_atomically(report, (json.dumps(content, indent=1) + "\n").encode())
            raise EngineError(
                f"the {options.runner} engine in {options.precision} does not agree with eager: {failed[0]} "
                f"({len(failed)} of {len(manifest.parity.checks)} checks failed); it was not written, see {report}"
            )
        (made / MANIFEST).write_text(manifest.to_json())
        for file in made.iterdir():
            file.chmod(0o600)
        try:
            put_in_place(made, target, Path(work) / "previous")
        except OSError as error:
            raise _not_writable(target, error) from error
        report.unlink(missing_ok=True)
    return target


def folder_name(bundle: Bundle, options: EngineOptions, device: torch.device) -> str:
    """An engine's place in the cache: the same for the same request, so that a rebuilt engine replaces the old one."""
    low, high = options.batch
    parts = (
        bundle.manifest.name,
        bundle.sha256[:8],
        options.runner,
        options.precision,
        f"b{low}" if low == high else f"b{low}-{high}",
        identify(device)["device"],
    )
    return "-".join(re.sub(r"[^A-Za-z0-9.-]+", "_", part).strip("_.") for part in parts)


def _build(
    bundle: Bundle, options: EngineOptions, device: torch.device, folder: Path, progress: Progress
) -> EngineManifest:
    """Build into `folder` and run the gate; the manifest of the engine, published or not."""
    module = backend(options.runner)
    started = time.monotonic()
    build_options = module.build(bundle, options, device, folder, progress)
    seconds = time.monotonic() - started
    size, (low, high) = bundle.manifest.preprocessing.size, options.batch
    reference = load_runner(bundle, "eager", device)
    loaded = module.load(folder, device=device, precision=options.precision, batch_range=options.batch, image_size=size)
    with reference, loaded:
        parity = compare(reference, loaded, bundle.manifest, progress)
    return EngineManifest(
        format=FORMAT,
        bundle=bundle.identity,
        runner=options.runner,
        image_size=size,
        **identify(device),
        versions=module.versions(),
        precision=options.precision,
        batch_min=low,
        batch_max=high,
        build_options=build_options,
        build_seconds=round(seconds, 1),
        built=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        bsdiff_rt=__version__,
        parity=parity,
        files={path.name: file_sha256(path) for path in sorted(folder.iterdir())},
    )


def _check_place(target: Path) -> None:
    """Refuse, before anything is built, a folder that the finished engine cannot take the place of.

    Raises:
        SettingsError: it is or holds something that is no engine, is where this runs, or a disk is mounted there.
    """
    if target.is_file() or (target.exists() and any(target.iterdir()) and not (target / MANIFEST).is_file()):
        raise SettingsError(f"{target}: not empty and not an engine; choose another folder")
    if target.resolve() == Path.cwd():
        raise SettingsError(f"{target}: the folder this runs in cannot be replaced; choose another --output")
    if target.is_mount():
        raise SettingsError(f"{target}: a mounted disk cannot be replaced; choose a folder on it")


def _not_writable(target: Path, error: OSError) -> SettingsError:
    reason = error.strerror or type(error).__name__
    return SettingsError(f"{target}: cannot be written ({reason}); choose another --output")
