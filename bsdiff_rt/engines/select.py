"""What runs a bundle: the engines there are, which of them fit, and which runner is used."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import torch

from bsdiff_rt.bundle import BUNDLES, Bundle
from bsdiff_rt.config import EngineRunnerName, Precision, RunnerName
from bsdiff_rt.engines.manifest import MANIFEST, Engine, open_engine, read_engine
from bsdiff_rt.errors import EngineError, SettingsError, one_line, out_of_memory
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.registry import load_runner, resolve_precision, unavailable

logger = logging.getLogger(__name__)

ENGINE_RUNNERS: tuple[EngineRunnerName, ...] = ("tensorrt", "aoti")
ENGINELESS: tuple[RunnerName, ...] = ("onnxruntime", "eager")
FASTEST_FIRST: tuple[RunnerName, ...] = (*ENGINE_RUNNERS, *ENGINELESS)


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
    bundle: Bundle,
    device: torch.device,
    precision: str,
    runner: EngineRunnerName,
    batch: int | None = None,
    at_least: float = 0.0,
) -> Engine:
    """The newest engine in the cache that fits.

    Args:
        bundle: what it must have been built from.
        device: what it must have been built for.
        precision: fp32, bf16 or fp16; "auto" takes any.
        runner: what it must be for.
        batch: images that it must take at once; None: any.
        at_least: how many times as fast as what runs without an engine it must have been when it was built.

    Raises:
        EngineError: none fits; says why not, and the command that builds one.
    """
    reasons: list[str] = []
    faster = ""
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
            engine = open_engine(folder, bundle, device)
            if manifest.speed.ratio < at_least:
                faster = " faster"
                reasons.append(
                    f"{folder.name} took {manifest.speed} when it was built; --runner {runner} uses it all the same"
                )
                continue
            return engine
        except EngineError as error:
            logger.debug("not used: %s", error)
            reasons.append(str(error))
    wanted = "" if precision == "auto" else f" --precision {precision}"
    name = bundle.folder.name if bundle.folder.parent == BUNDLES else str(bundle.folder)
    size = "" if batch in (None, 1) else f" --batch 1:{batch}"
    place = "" if device.type == "cpu" or device.index in (None, 0) else f" --device {device}"
    raise EngineError(
        f"no{faster} engine built for this bundle and device{' in ' + precision if wanted else ''}"
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
        runner: a runner's name, or "auto": tensorrt, aoti, onnxruntime, eager, the first that is there and fits; an
            engine that was slower than what runs without one when it was built comes last.
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
    for at_least in (1.0, 0.0):
        reasons: list[str] = []
        for name in FASTEST_FIRST:
            try:
                if reason := (not_loaded or {}).get(name):
                    raise EngineError(reason)
                why = "; ".join(reasons) or "fastest available"
                return _candidate(bundle, name, device, precision, batch, why, at_least)
            except EngineError as error:
                reasons.append(f"not {name}: {error}")
    raise EngineError(f"--precision {precision}: no runner has it here: {'; '.join(reasons)}")


def _candidate(
    bundle: Bundle,
    runner: RunnerName,
    device: torch.device,
    precision: str,
    batch: int | None,
    why: str,
    at_least: float = 0.0,
) -> Choice:
    """One runner by name.

    Raises:
        EngineError: it cannot be used here.
    """
    if reason := unavailable(runner, device):
        raise EngineError(reason)
    if runner == "aoti" or runner == "tensorrt":
        found = find_engine(bundle, device, precision, runner, batch, at_least)
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
