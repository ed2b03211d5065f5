"""Building an engine: compiled, past the parity gate, timed, published with one rename. Its identity is identity.py."""

from __future__ import annotations

import json
import logging
import re
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bsdiff_rt import __version__
from bsdiff_rt.bundle import Bundle
from bsdiff_rt.config import EngineOptions, EngineRunnerName
from bsdiff_rt.engines.manifest import FORMAT, MANIFEST, EngineManifest, Speed, backend, identify
from bsdiff_rt.engines.parity import Parity, compare
from bsdiff_rt.engines.select import ENGINELESS, cache_folder
from bsdiff_rt.errors import EngineError, SettingsError, one_line
from bsdiff_rt.files import file_sha256, put_in_place, write_atomically
from bsdiff_rt.runners.base import Progress, Runner
from bsdiff_rt.runners.registry import FULL_BATCH, batch_limit, load_runner, unavailable
from bsdiff_rt.runners.timing import interleaved, seconds_of

logger = logging.getLogger(__name__)

REJECTED = ".rejected.json"  # beside the place the engine would have had
TIMED_S = 10.0  # seconds of calls that a finished engine is timed for, about
LEAST_ROUNDS, MOST_ROUNDS = 3, 25


def default_batch(bundle: Bundle, runner: EngineRunnerName, device: torch.device) -> tuple[int, int]:
    """Smallest and largest batch of an engine that none was asked for.

    On a CPU 1, since a range costs speed there. On a GPU 1 to `FULL_BATCH`, or to the largest power of two that the
    runner's limit allows (`runners.batch_limit`).
    """
    if device.type == "cpu":
        return 1, 1
    limit = min(batch_limit(runner, bundle.manifest) or FULL_BATCH, FULL_BATCH)
    return 1, 1 << (limit.bit_length() - 1)


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
    limit = batch_limit(options.runner, bundle.manifest)
    if limit is not None and options.batch[1] > limit:
        logger.warning(
            "a batch of %d makes tensors of 2^31 elements or more, which TensorRT may refuse; --batch 1:%d stays below",
            options.batch[1],
            limit,
        )
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
        report = target.with_name(target.name + REJECTED)
        manifest = _build(bundle, options, device, made, report, progress)
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
    bundle: Bundle, options: EngineOptions, device: torch.device, folder: Path, report: Path, progress: Progress
) -> EngineManifest:
    """Build into `folder`, run the gate and time what passes it.

    Raises:
        EngineError: it cannot be built, it does not run, or it was rejected, which `report` then says why.
    """
    module = backend(options.runner)
    started = time.monotonic()
    build_options = module.build(bundle, options, device, folder, progress)
    seconds = time.monotonic() - started
    size, (low, high) = bundle.manifest.preprocessing.size, options.batch
    made: dict[str, Any] = {
        "format": FORMAT,
        "bundle": bundle.identity,
        "runner": options.runner,
        "image_size": size,
        **identify(device),
        "versions": module.versions(),
        "precision": options.precision,
        "batch_min": low,
        "batch_max": high,
        "build_options": build_options,
        "build_seconds": round(seconds, 1),
        "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "bsdiff_rt": __version__,
        "files": {path.name: file_sha256(path) for path in sorted(folder.iterdir())},
    }
    reference = load_runner(bundle, "eager", device)
    loaded = module.load(folder, device=device, precision=options.precision, batch_range=options.batch, image_size=size)
    with loaded:
        try:
            with reference:
                parity = compare(reference, loaded, bundle.manifest, progress)
            if parity.failed:
                raise _rejected(bundle, options, parity, made, report)
            speed = _time(bundle, loaded, progress)
        except RuntimeError as error:
            raise EngineError(
                f"the {options.runner} engine in {options.precision} was built and does not run ({one_line(error)}); "
                "it was not kept"
            ) from error
    return EngineManifest(**made, parity=parity, speed=speed)


def _rejected(
    bundle: Bundle, options: EngineOptions, parity: Parity, made: dict[str, Any], report: Path
) -> EngineError:
    """The error of an engine that failed the gate, whose report is written."""
    write_atomically(report, (json.dumps(made | {"parity": parity.to_dict()}, indent=1) + "\n").encode())
    # Measured with a trained network, 1000 steps: 38 dB in bf16, 67 in fp16 (docs/experiments.md).
    eps = options.precision == "bf16" and bundle.manifest.schedule.objective == "eps"
    hint = "; predicting eps takes more digits than bf16 has: --precision fp16 on a GPU, fp32 on a CPU"
    return EngineError(
        f"the {options.runner} engine in {options.precision} does not agree with eager: {parity.failed[0]} "
        f"({len(parity.failed)} of {len(parity.checks)} checks failed); it was not written, see {report}"
        f"{hint if eps else ''}"
    )


def _time(bundle: Bundle, engine: Runner, progress: Progress) -> Speed:
    """A denoiser call of the engine, in turn with the same of what runs here without an engine; the fastest of each.

    What does not load or run says nothing against the engine: it is left out with a warning, and the next one taken.

    Raises:
        EngineError: nothing else runs.
    """
    progress("timing it beside what runs without an engine", None)
    device, batch = engine.device, engine.batch_range[0]
    image = torch.zeros(batch, 1, engine.image_size, engine.image_size, device=device)
    t, out = torch.zeros(batch, device=device), torch.empty_like(image)
    for name in ENGINELESS:
        if unavailable(name, device):
            continue
        try:
            other = load_runner(bundle, name, device)
        except (EngineError, RuntimeError, MemoryError) as error:
            logger.warning("not timed beside %s: it does not load (%s)", name, one_line(error))
            continue
        with other:
            calls = {runner: partial(runner.denoise, image, image, t, out) for runner in (engine, other)}
            _, failed = interleaved(calls, 0, device)  # warms up
            if not failed:
                took = sum(seconds_of(call, device) for call in calls.values())
                rounds = min(max(round(TIMED_S / took), LEAST_ROUNDS), MOST_ROUNDS)
                times, failed = interleaved(calls, rounds, device, warm_up=0)
        if not failed:
            ours, theirs = (min(times[runner]) for runner in (engine, other))
            return Speed(batch, round(ours * 1e3, 3), name, round(theirs * 1e3, 3), round(theirs / ours, 3))
        if broken := failed.get(engine):
            raise broken
        logger.warning("not timed beside %s: it does not run (%s)", name, one_line(failed[other]))
    raise EngineError("nothing else runs here that the engine could be timed beside")


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
