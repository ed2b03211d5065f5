"""Build an engine: compile it, compare it with eager, time it, and publish it with one rename."""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bsdiff_rt import __version__
from bsdiff_rt.bundle import Bundle
from bsdiff_rt.config import EngineOptions, Precision
from bsdiff_rt.engines.cache import locate_cache, name_engine
from bsdiff_rt.engines.manifest import FORMAT, MANIFEST, Engine, EngineManifest, Speed, identify, read_engine
from bsdiff_rt.engines.parity import Parity, compare
from bsdiff_rt.errors import EngineError, SettingsError, one_line
from bsdiff_rt.files import file_sha256, put_in_place, write_atomically
from bsdiff_rt.runners.base import Progress, Runner
from bsdiff_rt.runners.devices import FULL_BATCH
from bsdiff_rt.runners.registry import (
    RUNNERS,
    find_batch_limit,
    find_entry,
    list_bundle_runners,
    list_engine_runners,
    load_runner,
    resolve_precision,
)
from bsdiff_rt.runners.timing import time_call, time_in_turn

logger = logging.getLogger(__name__)

AUTO = "auto"
REJECTED = ".rejected.json"  # appended to the name that the engine would have had
TIMED_S = 10.0  # about so many seconds a finished engine is timed
LEAST_ROUNDS, MOST_ROUNDS = 3, 25


def resolve_options(
    bundle: Bundle,
    device: torch.device,
    runner: str = AUTO,
    precision: Precision | str = AUTO,
    batch: tuple[int, int] | None = None,
    capabilities: tuple[str, ...] = (),
    *,
    max_autotune: bool = False,
) -> EngineOptions:
    """Return the options of an engine, with defaults where "auto" or None is given.

    Args:
        bundle: the model.
        device: what to build for.
        runner: "auto" takes the fastest runner that can be built for here.
        precision: "auto" takes fp32 on a CPU and fp16 on a GPU.
        batch: smallest and largest batch; None takes `find_default_batch`.
        capabilities: compute capabilities of other machines' GPUs to build for; ("all",) for all that the runner has.
        max_autotune: let the compiler try more kernels. Only for runners whose builder can.

    Raises:
        SettingsError: the runner is unknown, it needs no engine, it does not build for these GPUs, or it cannot try
            more kernels.
        EngineError: no runner with engines can be used here.
    """
    if capabilities:
        runner, capabilities = _resolve_capabilities(runner, capabilities)
        device = torch.device("cuda")
    elif runner == AUTO:
        runner = _find_builder(device)
    elif find_entry(runner).builder is None:
        known = ", ".join(list_engine_runners())
        raise SettingsError(f"{runner} needs no engine. Use one of {known}.", setting="runner")
    if precision == AUTO:
        precision = "fp32" if device.type == "cpu" else "fp16"
    if max_autotune and runner not in (able := [name for name, entry in RUNNERS.items() if entry.max_autotune]):
        raise SettingsError(
            f"{runner} has no choice of kernels to widen. Leave --max-autotune out, or use runner {', '.join(able)}.",
            setting="max_autotune",
        )
    batch = batch or find_default_batch(bundle, runner, device)
    return EngineOptions(runner, precision, batch, capabilities, max_autotune)  # type: ignore[arg-type]


def _resolve_capabilities(runner: str, wanted: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Return a runner that builds for GPUs of other machines, and their compute capabilities.

    Raises:
        SettingsError: the runner does not build for them.
    """
    able = {name: entry.capabilities for name, entry in RUNNERS.items() if entry.capabilities}
    if runner == AUTO:
        runner = next(iter(able))
    if runner not in able:
        raise SettingsError(f"{runner} builds for this machine alone. Use runner {', '.join(able)}.", setting="for")
    for capability in wanted:
        if capability not in ("all", *able[runner]):
            raise SettingsError(
                f"{runner} does not build for compute capability {capability}. Use all, or some of "
                f"{', '.join(able[runner])}.",
                setting="for",
            )
    return runner, able[runner] if "all" in wanted else wanted


def _find_builder(device: torch.device) -> str:
    """Return the fastest runner that needs an engine and can be used on a device."""
    problems = []
    for name in (name for name, entry in RUNNERS.items() if entry.needs_engine):
        problem = RUNNERS[name].find_problem(device)
        if problem is None:
            return name
        problems.append(f"{name}: {problem}")
    raise EngineError(f"no engine can be built for {device}: {'; '.join(problems)}")


def find_default_batch(bundle: Bundle, runner: str, device: torch.device) -> tuple[int, int]:
    """Return smallest and largest batch of an engine for which none was requested.

    On a CPU both are 1, because a range costs speed there. On a GPU 1 to `FULL_BATCH`, or to the largest power of two
    within the runner's limit.
    """
    if device.type == "cpu":
        return 1, 1
    limit = min(find_batch_limit(runner, bundle.manifest) or FULL_BATCH, FULL_BATCH)
    return 1, 1 << (limit.bit_length() - 1)


def locate_engine(bundle: Bundle, options: EngineOptions, device: torch.device) -> Path:
    """Return the folder of an engine in the cache."""
    return locate_cache() / name_engine(bundle, options, device)


def check_options(options: EngineOptions, device: torch.device) -> None:
    """Check that an engine can be built here, as far as that is known before it is tried.

    Raises:
        EngineError: a package is missing, or the runner does not run on the device or not in the precision.
    """
    entry = find_entry(options.runner)
    if options.capabilities:
        if problem := entry.find_missing_package():
            raise EngineError(f"no engine of runner {options.runner} can be built here: {problem}.")
        return
    if problem := entry.find_problem(device):
        raise EngineError(f"runner {options.runner} cannot be used on {device}: {problem}. Use runner auto.")
    try:
        resolve_precision(options.runner, options.precision, device)
    except EngineError as error:
        raise EngineError(f"no engine of runner {options.runner} can be built here: {error}.") from error


def build_engine(
    bundle: Bundle, options: EngineOptions, device: torch.device, output: Path | None, progress: Progress
) -> Path:
    """Build an engine, compare it with eager in fp32, and publish it if both agree.

    An engine for the GPUs of other machines (`options.capabilities`) is published without a comparison. It is compared
    on its first use there (`gate_engine`).

    An interrupted or failed build leaves nothing behind. A rejected engine leaves its report (`REJECTED`).

    Args:
        bundle: the model.
        options: runner, precision and batch range.
        device: what to build for.
        output: the engine's folder: a new one, or an engine to replace. None takes a folder in the cache.
        progress: called with each phase.

    Returns:
        The engine's folder.

    Raises:
        EngineError: the engine cannot be built here, or it was rejected.
        SettingsError: `output` cannot be written, or holds something that is not an engine.
    """
    check_options(options, device)
    limit = find_batch_limit(options.runner, bundle.manifest)
    if limit is not None and options.batch[1] > limit:
        logger.warning(
            "A batch of %d makes tensors of 2^31 elements or more, which %s may refuse. Batches up to %d are safe.",
            options.batch[1],
            options.runner,
            limit,
        )
    target = output or locate_engine(bundle, options, device)
    _check_place(target)
    try:
        for parent in reversed(target.parents):  # `parents=True` would not give this mode to those in between
            parent.mkdir(mode=0o700, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-")
    except OSError as error:
        raise _describe_write_error(target, error) from error
    with temporary as work:
        folder = Path(work) / "engine"
        folder.mkdir(mode=0o700)
        report = target.with_name(target.name + REJECTED)
        manifest = _build_and_check(bundle, options, device, folder, report, progress)
        (folder / MANIFEST).write_text(manifest.to_json())
        for file in folder.iterdir():
            file.chmod(0o600)
        try:
            put_in_place(folder, target, Path(work) / "previous")
        except OSError as error:
            raise _describe_write_error(target, error) from error
        report.unlink(missing_ok=True)
    return target


def _build_and_check(
    bundle: Bundle, options: EngineOptions, device: torch.device, folder: Path, report: Path, progress: Progress
) -> EngineManifest:
    """Build an engine into `folder`, compare it with eager, and time it if both agree.

    Raises:
        EngineError: it cannot be built, it does not run, or it was rejected. Only then `report` is written.
    """
    started = time.monotonic()
    build_options = RUNNERS[options.runner].build(bundle, options, device, folder, progress)
    fields: dict[str, Any] = _list_identity(bundle, options, device, folder) | {
        "build_options": build_options,
        "build_seconds": round(time.monotonic() - started, 1),
    }
    if options.capabilities:
        return EngineManifest(**fields, parity=None, speed=None)
    parity, speed = _compare_and_time(bundle, options, device, folder, fields, report, progress)
    return EngineManifest(**fields, parity=parity, speed=speed)


def gate_engine(engine: Engine, bundle: Bundle, device: torch.device, progress: Progress) -> Engine:
    """Compare an engine that was built elsewhere with eager here, and mark it as this machine's.

    Args:
        engine: its files, and the kind of this GPU, were checked.
        bundle: the engine's model.
        device: the GPU.
        progress: called with each phase.

    Returns:
        The engine with its new manifest.

    Raises:
        EngineError: it does not run here, it does not agree with eager, or its folder cannot be written.
    """
    manifest = engine.manifest
    options = EngineOptions(manifest.runner, manifest.precision, (manifest.batch_min, manifest.batch_max))
    fields = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest)}
    fields |= identify(device) | {"versions": RUNNERS[manifest.runner].list_versions()}
    del fields["parity"], fields["speed"]
    report = engine.folder.with_name(engine.folder.name + REJECTED)
    parity, speed = _compare_and_time(bundle, options, device, engine.folder, fields, report, progress)
    try:
        write_atomically(
            engine.folder / MANIFEST, EngineManifest(**fields, parity=parity, speed=speed).to_json().encode()
        )
        (engine.folder / MANIFEST).chmod(0o600)  # whatever the umask: an engine others may write to is refused
    except OSError as error:
        raise EngineError(f"{engine.folder / MANIFEST}: cannot be written ({error.strerror})") from error
    return read_engine(engine.folder)


def _compare_and_time(
    bundle: Bundle,
    options: EngineOptions,
    device: torch.device,
    folder: Path,
    fields: dict[str, Any],
    report: Path,
    progress: Progress,
) -> tuple[Parity, Speed]:
    """Compare an engine with eager, and time it if both agree.

    Raises:
        EngineError: it does not run, or it was rejected. Only then `report` is written.
    """
    entry, size = RUNNERS[options.runner], bundle.manifest.preprocessing.size
    reference = load_runner(bundle, "eager", device)
    engine = entry.load_engine(
        folder, device=device, precision=options.precision, batch_range=options.batch, image_size=size
    )
    with engine:
        try:
            with reference:
                parity = compare(reference, engine, bundle.manifest, progress)
            if parity.failed:
                raise _reject(bundle, options, parity, fields, report)
            speed = _time(bundle, engine, progress)
        except RuntimeError as error:
            raise EngineError(
                f"the {options.runner} engine in {options.precision} was built and does not run ({one_line(error)}). "
                "It was not kept."
            ) from error
    return parity, speed


def _list_identity(bundle: Bundle, options: EngineOptions, device: torch.device, folder: Path) -> dict[str, Any]:
    """Return the fields of the engine's manifest that say what it is and what it was built for."""
    return {
        "format": FORMAT,
        "bundle": bundle.identity,
        "runner": options.runner,
        "image_size": bundle.manifest.preprocessing.size,
        **_identify_target(options, device),
        "versions": RUNNERS[options.runner].list_versions(),
        "precision": options.precision,
        "batch_min": options.batch[0],
        "batch_max": options.batch[1],
        "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "bsdiff_rt": __version__,
        "files": {path.name: file_sha256(path) for path in sorted(folder.iterdir())},
    }


def _identify_target(options: EngineOptions, device: torch.device) -> dict[str, Any]:
    """Return the machine's part of an engine's identity."""
    if not options.capabilities:
        return identify(device)
    return {
        "platform": identify(torch.device("cpu"))["platform"],
        "device": "any",
        "compute_capability": ", ".join(options.capabilities),
        "multiprocessors": 0,
        "driver": "any",
    }


def _reject(
    bundle: Bundle, options: EngineOptions, parity: Parity, fields: dict[str, Any], report: Path
) -> EngineError:
    """Write the report of an engine that differs from eager, and return the error."""
    write_atomically(report, (json.dumps(fields | {"parity": parity.to_dict()}, indent=1) + "\n").encode())
    # Predicting eps takes more digits than bf16 has (docs/experiments.md).
    eps = options.precision == "bf16" and bundle.manifest.schedule.objective == "eps"
    hint = " This model predicts eps, which needs more digits than bf16 has: use fp16 on a GPU, fp32 on a CPU."
    return EngineError(
        f"the {options.runner} engine in {options.precision} does not agree with eager: {parity.failed[0]} "
        f"({len(parity.failed)} of {len(parity.checks)} checks failed). It was not written; see {report}."
        f"{hint if eps else ''}"
    )


def _time(bundle: Bundle, engine: Runner, progress: Progress) -> Speed:
    """Time a denoiser call of an engine, in turn with one of the fastest runner without an engine.

    A runner that does not load or run here is left out with a warning, and the next one is taken.

    Raises:
        EngineError: no runner without an engine runs here.
    """
    progress("timing it beside the fastest runner without an engine", None)
    for name in list_bundle_runners():
        if RUNNERS[name].find_problem(engine.device):
            continue
        try:
            other = load_runner(bundle, name, engine.device)
        except (EngineError, RuntimeError, MemoryError) as error:
            logger.warning("Not timed beside %s: it does not load (%s).", name, one_line(error))
            continue
        with other:
            speed = _time_beside(engine, other)
        if speed is not None:
            return speed
    raise EngineError("no runner without an engine runs here, so the engine's speed cannot be compared")


def _time_beside(engine: Runner, other: Runner) -> Speed | None:
    """Time a denoiser call of an engine and of another runner in turn. None, with a warning, if the other fails.

    Raises:
        Exception: what the engine raised.
    """
    device, batch = engine.device, engine.batch_range[0]
    generator = torch.Generator(device).manual_seed(0)  # zeros are faster to multiply than an image
    image = torch.randn(batch, 1, engine.image_size, engine.image_size, generator=generator, device=device)
    t, out = torch.zeros(batch, device=device), torch.empty_like(image)
    calls = {runner: partial(runner.denoise, image, image, t, out) for runner in (engine, other)}
    _, failed = time_in_turn(calls, 0, device)  # warms up
    if not failed:
        seconds = sum(time_call(call, device) for call in calls.values())
        rounds = min(max(round(TIMED_S / seconds), LEAST_ROUNDS), MOST_ROUNDS)
        times, failed = time_in_turn(calls, rounds, device, warm_up=0)
    if not failed:
        ours, theirs = (min(times[runner]) for runner in (engine, other))
        return Speed(batch, round(ours * 1e3, 3), other.name, round(theirs * 1e3, 3), round(theirs / ours, 3))
    if error := failed.get(engine):
        raise error
    logger.warning("Not timed beside %s: it does not run (%s).", other.name, one_line(failed[other]))
    return None


def _check_place(target: Path) -> None:
    """Raise SettingsError, before anything is built, if the engine cannot be put at `target`.

    `target` must not hold anything but an engine, be the current folder, or be a mount point.
    """
    if target.is_file() or (target.exists() and any(target.iterdir()) and not (target / MANIFEST).is_file()):
        raise SettingsError(f"{target} is not empty and not an engine. Choose another folder.", setting="output")
    if target.resolve() == Path.cwd():
        raise SettingsError(
            f"{target} is the current folder, which cannot be replaced. Choose another.", setting="output"
        )
    if target.is_mount():
        raise SettingsError(
            f"{target} is a mounted disk, which cannot be replaced. Use a folder on it.", setting="output"
        )


def _describe_write_error(target: Path, error: OSError) -> SettingsError:
    reason = error.strerror or type(error).__name__
    return SettingsError(f"{target} cannot be written ({reason}). Choose another folder.", setting="output")
