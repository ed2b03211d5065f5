"""Which runner runs a bundle: the one that was requested, or the fastest that can be used here."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bsdiff_rt.bundle import BUNDLES, Bundle
from bsdiff_rt.config import Precision
from bsdiff_rt.engines.build import gate_engine
from bsdiff_rt.engines.cache import list_engines
from bsdiff_rt.engines.manifest import MANIFEST, Engine, open_engine, read_engine
from bsdiff_rt.errors import EngineError, SettingsError, one_line, out_of_memory
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.registry import RUNNERS, load_runner, resolve_precision
from bsdiff_rt.runners.timing import synchronise

logger = logging.getLogger(__name__)

AUTO = "auto"


@dataclass(frozen=True)
class RunnerRequest:
    """Which runner is requested for which bundle. What is requested by name is used, or it is an error.

    Attributes:
        bundle: the model.
        runner: "auto", a runner's name, or the folder of a built engine. A folder with a runner's name is written with
            its path, such as `./eager`.
        device: where to run.
        precision: fp32, bf16 or fp16; "auto" takes what the runner or the newest engine has.
        batch: images that the runner must take at once; None for any number.
    """

    bundle: Bundle
    runner: str
    device: torch.device
    precision: str = AUTO
    batch: int | None = None

    @property
    def engine_folder(self) -> Path | None:
        """Return the engine's folder, or None if `runner` names no folder."""
        return None if self.runner == AUTO or self.runner in RUNNERS else Path(self.runner)


@dataclass(frozen=True)
class Choice:
    """Which runner is used, and why.

    Attributes:
        runner: its name.
        precision: what it computes in.
        why: the reason in words, for the log. It also says why each faster runner is not used.
        engine: the engine that it runs, if any.
    """

    runner: str
    precision: Precision
    why: str
    engine: Engine | None = None


def find_engine(request: RunnerRequest, runner: str, at_least: float = 0.0) -> Engine:
    """Return the newest engine in the cache that fits a request.

    Args:
        request: its bundle, device, precision and batch must fit.
        runner: the runner of the engine.
        at_least: the least ratio of its speed to that of the fastest runner without an engine, as measured when it was
            built.

    Raises:
        EngineError: no engine fits. The message has the reason for each engine. `build` has the settings of one that
            would fit.
    """
    reasons: list[str] = []
    faster = ""
    for folder in list_engines():
        try:
            manifest = read_engine(folder).manifest
            if manifest.runner != runner or manifest.bundle.get("sha256") != request.bundle.sha256:
                continue
            if request.precision not in (AUTO, manifest.precision):
                reasons.append(f"{folder.name} is in {manifest.precision}, not {request.precision}")
                continue
            if request.batch is not None and request.batch > manifest.batch_max:
                reasons.append(f"{folder.name} takes at most {manifest.batch_max} images at once, not {request.batch}")
                continue
            engine = open_engine(folder, request.bundle, request.device)
            if manifest.speed is not None and manifest.speed.ratio < at_least:
                faster = " faster"
                reasons.append(f"{folder.name} took {manifest.speed} when it was built; runner {runner} still uses it")
                continue
            return engine
        except EngineError as error:
            logger.debug("not used: %s", error)
            reasons.append(str(error))
    wanted = "" if request.precision == AUTO else f" in {request.precision}"
    raise EngineError(
        f"no{faster} engine for this bundle and device{wanted}{' (' + '; '.join(reasons) + ')' if reasons else ''}. "
        "Build one.",
        build=_list_build(request, runner),
    )


def _list_build(request: RunnerRequest, runner: str) -> dict[str, str]:
    """Return the settings of an engine for a request; those that have their default are left out."""
    bundle, device = request.bundle, request.device
    found = {"bundle": bundle.folder.name if bundle.folder.parent == BUNDLES else str(bundle.folder), "runner": runner}
    if request.precision != AUTO:
        found["precision"] = request.precision
    if request.batch not in (None, 1):
        found["batch"] = f"1:{request.batch}"
    if device.type != "cpu" and device.index not in (None, 0):
        found["device"] = str(device)
    return found


def choose(request: RunnerRequest, not_loaded: Mapping[str, str] | None = None) -> Choice:
    """Choose the runner for a request. Nothing is loaded.

    "auto" takes the first runner of the registry that can be used. An engine that was slower than a runner
    without an engine, when it was built, is used only if nothing else can be.

    Args:
        request: what is requested.
        not_loaded: runners that "auto" skips, each with the reason.

    Raises:
        EngineError: the requested runner cannot be used here, or no runner has the precision.
        SettingsError: the runner is unknown, or the engine is of another precision.
    """
    if request.engine_folder is not None:
        return _choose_engine(request, request.engine_folder)
    if request.runner != AUTO:
        try:
            return _choose_by_name(request, request.runner, "requested")
        except EngineError as error:
            instead = "" if error.build else ". Use runner auto."
            raise EngineError(
                f"runner {request.runner} cannot be used on {request.device}: {error}{instead}", build=error.build
            ) from error
    for at_least in (1.0, 0.0):
        reasons: list[str] = []
        builds: list[Mapping[str, str]] = []
        for name in RUNNERS:
            try:
                if reason := (not_loaded or {}).get(name):
                    raise EngineError(reason)
                return _choose_by_name(request, name, "; ".join(reasons) or "fastest available", at_least)
            except EngineError as error:
                reasons.append(f"not {name}: {error}")
                builds += [error.build] if error.build else []
    raise EngineError(
        f"no runner can be used in precision {request.precision} here: {'; '.join(reasons)}. Use precision auto.",
        build=builds[0] if builds else None,
    )


def _choose_by_name(request: RunnerRequest, name: str, why: str, at_least: float = 0.0) -> Choice:
    """Return the choice of one runner.

    Raises:
        EngineError: it cannot be used here.
    """
    entry = RUNNERS[name]
    if problem := entry.find_problem(request.device):
        raise EngineError(problem)
    precision = resolve_precision(name, request.precision, request.device)
    if entry.builder is None:
        return Choice(name, precision, why)
    try:
        engine = find_engine(request, name, at_least)
    except EngineError:
        if request.runner == name and entry.optional_engine:
            return Choice(name, precision, f"{why}; it has no engine that fits")
        raise
    return Choice(name, engine.manifest.precision, why, engine)


def _choose_engine(request: RunnerRequest, folder: Path) -> Choice:
    """Return the choice of one engine.

    Raises:
        SettingsError: the folder is not an engine, or the engine is of another precision.
        EngineError: the engine does not fit this bundle or machine.
    """
    if not (folder / MANIFEST).is_file():
        raise SettingsError(
            f"{request.runner!r} is neither a runner ({', '.join((AUTO, *RUNNERS))}) nor the folder of an engine "
            f"(no {MANIFEST} in it). Build an engine with bsdiff-rt build-engine.",
            setting="runner",
        )
    engine = open_engine(folder, request.bundle, request.device)
    precision = engine.manifest.precision
    if request.precision not in (AUTO, precision):
        raise SettingsError(
            f"{request.precision} was requested, but the engine {folder} is in {precision}. Use auto or {precision}.",
            setting="precision",
        )
    return Choice(engine.manifest.runner, precision, f"engine {folder} requested", engine)


def load_first(request: RunnerRequest) -> tuple[Choice, Runner]:
    """Choose a runner and load it. If "auto" chose one that does not load or run, warn and try the next.

    Raises:
        EngineError: the requested runner does not load, or none does.
        BundleError: the weights do not fit the bundle's model.
        SettingsError: the runner is unknown, or the engine is of another precision.
    """
    not_loaded: dict[str, str] = {}
    while True:
        choice = choose(request, not_loaded)
        try:
            if choice.engine and choice.engine.manifest.parity is None:
                choice = replace(choice, engine=_gate(request, choice.engine))
            runner = _load(request, choice)
            if request.runner == AUTO and request.device.type == "cuda":
                _rehearse(runner)
            return choice, runner
        except EngineError as error:
            if request.runner != AUTO:
                raise
            logger.warning("Runner %s does not load (%s). Trying the next.", choice.runner, error)
            not_loaded[choice.runner] = f"it does not load ({error})"


def _gate(request: RunnerRequest, engine: Engine) -> Engine:
    """Compare an engine that was built elsewhere with eager here, before its first use."""
    logger.info("The engine %s was built elsewhere. It is compared with eager before its first use.", engine.folder)
    return gate_engine(engine, request.bundle, request.device, lambda *_: None)


def _rehearse(runner: Runner) -> None:
    """Run the denoiser once. Some backends find out only then that they lack a kernel or a library.

    Raises:
        EngineError: the runner failed, but not for lack of memory. It was closed.
    """
    batch = max(1, runner.batch_range[0])
    image = torch.zeros(batch, 1, runner.image_size, runner.image_size, device=runner.device)
    t, out = torch.zeros(batch, device=runner.device), torch.empty_like(image)
    try:
        runner.denoise(image, image, t, out)
        synchronise(runner.device)
    except (EngineError, RuntimeError) as error:
        runner.close()
        if out_of_memory(error):
            raise
        raise EngineError(f"it does not run: {one_line(error)}") from error


def load(bundle: Bundle, runner: str, device: torch.device, precision: str = AUTO) -> Runner:
    """Return a loaded runner for a bundle; see `RunnerRequest` and `load_first`."""
    return load_first(RunnerRequest(bundle, runner, device, precision))[1]


def _load(request: RunnerRequest, choice: Choice) -> Runner:
    """Load what was chosen, and log which runner it is and why.

    Raises:
        EngineError: the backend cannot load it, or the device lacks the memory.
        BundleError: the weights do not fit the bundle's model.
    """
    device = request.device
    where = f", engine {choice.engine.folder}" if choice.engine else ""
    logger.info("runner %s in %s on %s%s", choice.runner, choice.precision, device, where)
    logger.debug("reason for runner %s: %s", choice.runner, choice.why)
    try:
        if choice.engine:
            return choice.engine.load(device)
        return load_runner(request.bundle, choice.runner, device, choice.precision)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise EngineError(
            f"{device} has too little memory to load runner {choice.runner} ({one_line(error)}). "
            "Free some, or use another device."
        ) from error
