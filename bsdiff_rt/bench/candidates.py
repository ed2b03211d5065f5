"""The runners and peers that a benchmark measures, and the reasons why others cannot be measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bsdiff_rt.bench.memory import Memory, measure_memory, start_memory_watch
from bsdiff_rt.bench.networks import BASELINE, BenchModel
from bsdiff_rt.errors import BsdiffError, EngineError, SettingsError, describe_error, one_line
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.eager import EagerRunner
from bsdiff_rt.runners.registry import RUNNERS, find_entry
from bsdiff_rt.sampling.sampler import Draw
from bsdiff_rt.sampling.schedule import Table

logger = logging.getLogger(__name__)

PRECISIONS = ("fp32", "bf16", "fp16")

Loop = Callable[[Runner, Tensor, Table, Draw], Tensor]


@dataclass(frozen=True)
class Candidate:
    """Something to measure.

    Attributes:
        name: unique among those measured together.
        runner: runs the model.
        loading: memory that loading took; None if it cannot be measured.
        loop: makes whole images in place of this package's loop, for peers with a loop of their own.
    """

    name: str
    runner: Runner
    loading: Memory | None = None
    loop: Loop | None = None


@dataclass(frozen=True)
class Missing:
    """Something that was not measured, and why.

    Attributes:
        name: as in a row.
        runner: as in a row.
        precision: as in a row.
        batch: batch size; None for all batch sizes.
        reason: one line.
        exit_code: exit code of the command because of it; 0 if nobody asked for it by name.
    """

    name: str
    runner: str
    precision: str
    batch: int | None
    reason: str
    exit_code: int


@dataclass(frozen=True)
class Wanted:
    """Which runners to load.

    Attributes:
        runners: names; empty for every runner that can be used here.
        precisions: names; empty for the precisions that a runner has.
        engines: folders of built engines, besides those in the cache.
    """

    runners: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    engines: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        """Raise SettingsError for an unknown name."""
        for setting, names, known in (("runner", self.runners, RUNNERS), ("precision", self.precisions, PRECISIONS)):
            for name in names:
                if name not in known:
                    raise SettingsError(f"{name} is not known; choose from {', '.join(known)}", setting=setting)


def parse_wanted(runners: Sequence[str], precisions: Sequence[str] = ()) -> Wanted:
    """Return which runners and precisions are asked for.

    Args:
        runners: names of runners and folders of engines.
        precisions: names of precisions.

    Raises:
        SettingsError: an unknown name that is not a folder, either.
    """
    engines = tuple(Path(name) for name in runners if name not in RUNNERS and Path(name).is_dir())
    names = tuple(name for name in runners if Path(name) not in engines)
    if engines and not names:
        names = (BASELINE,)  # the baseline and the engines, nothing else
    return Wanted(names, tuple(precisions), engines)


def describe_missing(
    name: str, runner: str, precision: str, batch: int | None, error: Exception, asked: bool = True
) -> Missing:
    """Return the entry for something that failed with `error`.

    Args:
        name: as in a row.
        runner: as in a row.
        precision: as in a row.
        batch: batch size; None for all batch sizes.
        error: an error of this package brings its message and exit code; any other has exit code 1.
        asked: whether the user asked for it by name. If not, the exit code is 0.
    """
    if isinstance(error, BsdiffError):
        return Missing(name, runner, precision, batch, describe_error(error), error.exit_code if asked else 0)
    return Missing(name, runner, precision, batch, one_line(error), 1 if asked else 0)


def load_baseline(model: BenchModel, device: torch.device) -> Candidate:
    """Load the model in eager fp32, the baseline of every comparison.

    Raises:
        BundleError: the weights do not fit the model.
    """
    return load_candidate(BASELINE, lambda: EagerRunner(*model.load_networks(), model.size, device), device)


def load_candidates(model: BenchModel, wanted: Wanted, device: torch.device) -> tuple[list[Candidate], list[Missing]]:
    """Load the baseline, then every runner and precision that was asked for or is available.

    Returns: what was loaded, the baseline first; and what could not be loaded.

    Raises:
        BundleError: the weights do not fit the model.
    """
    outcomes: list[Candidate | Missing] = [load_baseline(model, device)]
    for runner in wanted.runners or tuple(reversed(RUNNERS)):
        outcomes += _try_runner(model, runner, wanted, device)
    for folder in wanted.engines:
        outcomes.append(_try(f"engine {folder.name}", model, ("auto", "auto"), device, asked=True, folder=folder))
    absent = [outcome for outcome in outcomes if isinstance(outcome, Missing)]
    for each in absent:
        if each.exit_code:  # the user asked for it: say so before the others are measured, which may take long
            logger.warning("%s cannot be measured: %s", each.name, each.reason)
    return [outcome for outcome in outcomes if isinstance(outcome, Candidate)], absent


def _try_runner(model: BenchModel, runner: str, wanted: Wanted, device: torch.device) -> list[Candidate | Missing]:
    asked = bool(wanted.runners)
    if runner == BASELINE and not asked:
        return []  # loaded already
    if not find_entry(runner).needs_engine:
        precisions = [p for p in wanted.precisions or ("fp32",) if (runner, p) != (BASELINE, "fp32")]
        names = {p: runner if len(precisions) == 1 else f"{runner} {p}" for p in precisions}
        return [
            _try(names[p], model, (runner, p), device, asked=_is_asked(wanted, runner, p, device)) for p in precisions
        ]
    if wanted.precisions:
        return [
            _try(f"{runner} {p}", model, (runner, p), device, asked=_is_asked(wanted, runner, p, device))
            for p in wanted.precisions
        ]
    tried = [_try(f"{runner} {p}", model, (runner, p), device, asked=asked) for p in PRECISIONS]
    found: list[Candidate | Missing] = [outcome for outcome in tried if isinstance(outcome, Candidate)]
    reasons = [outcome for outcome in tried if isinstance(outcome, Missing)]
    # No precision was asked for: any one will do, and of several reasons one is enough.
    return found or [replace(reasons[0], name=runner, precision="auto")]


def _is_asked(wanted: Wanted, runner: str, precision: str, device: torch.device) -> bool:
    """Return whether a runner and a precision were asked for together.

    Every runner is tried in every precision. A precision that one does not have, and another one has, was not meant for
    it.
    """
    own = find_entry(runner).list_precisions(device)
    able = [name for name in wanted.runners if precision in find_entry(name).list_precisions(device)]
    return bool(wanted.runners) and (not own or precision in own or not able)


def _try(
    name: str,
    model: BenchModel,
    which: tuple[str, str],
    device: torch.device,
    *,
    asked: bool,
    folder: Path | None = None,
) -> Candidate | Missing:
    """Load a (runner, precision), or return the reason why not."""
    try:
        return load_candidate(name, lambda: _load(model, *which, device, folder), device)
    except Exception as error:  # backends raise any type; the others are still measured
        logger.debug("%s cannot be loaded", name, exc_info=True)
        return describe_missing(name, *which, None, error, asked)


def _load(model: BenchModel, runner: str, precision: str, device: torch.device, folder: Path | None) -> Runner:
    if runner == BASELINE:
        raise EngineError(f"runner eager computes in fp32 alone, not in {precision}: it is the baseline")
    if model.bundle is None:
        raise EngineError(f"it needs a bundle on disk; ask for runner {runner} by name to make one with random weights")
    from bsdiff_rt.engines.select import load  # here: eager networks can be measured without what engines need

    return load(model.bundle, runner if folder is None else str(folder), device, precision)


def load_candidate(name: str, load: Callable[[], Runner], device: torch.device) -> Candidate:
    """Load a runner and measure the memory that loading takes.

    Args:
        name: of the candidate.
        load: loads the runner.
        device: where its memory is measured.
    """
    start = start_memory_watch(device)
    runner = load()
    return Candidate(name, runner, measure_memory(device, start))
