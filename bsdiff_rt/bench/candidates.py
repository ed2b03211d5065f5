"""What a benchmark runs: the model, with weights from a bundle or from a random generator, and its runners."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bsdiff_rt.bundle import Bundle, list_bundles, open_bundle
from bsdiff_rt.config import PRESETS, DenoiserConfig, EnhancerConfig, SamplerSettings, Schedule
from bsdiff_rt.errors import BsdiffError, EngineError, SettingsError, one_line
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.eager import EagerRunner, load_networks
from bsdiff_rt.runners.registry import RUNNERS, list_engine_runners
from bsdiff_rt.sampling.sampler import Draw
from bsdiff_rt.sampling.schedule import Table

logger = logging.getLogger(__name__)

BASELINE = "eager"
PAPER_SIZE_PX = 256
PRECISIONS = ("fp32", "bf16", "fp16")

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")

Loop = Callable[[Runner, Tensor, Table, Draw], Tensor]


@dataclass(frozen=True)
class Model:
    """A pair of networks and how they are used.

    Attributes:
        name: for the report.
        denoiser, enhancer: shapes.
        schedule: the diffusion.
        sampler: the model's own sampler and number of steps.
        size: side of its images, px.
        enhance: whether stage 2 is part of an image.
        mirror: whether `infer` gives an image to the networks twice; what is timed is once.
        bundle: where the weights are; None for random ones, made in memory.
    """

    name: str
    denoiser: DenoiserConfig
    enhancer: EnhancerConfig
    schedule: Schedule
    sampler: SamplerSettings
    size: int
    enhance: bool
    mirror: bool = False
    bundle: Bundle | None = None

    def networks(self) -> tuple[Denoiser, Enhancer]:
        """Both networks with their weights, fp32, on the CPU, in evaluation mode.

        Raises:
            BundleError: weights that do not fit.
        """
        if self.bundle is not None:
            return load_networks(self.bundle)
        denoiser, enhancer = Denoiser(self.denoiser), Enhancer(self.enhancer)
        generator = torch.Generator().manual_seed(0)
        randomise(denoiser, generator)
        randomise(enhancer, generator)
        return denoiser.eval(), enhancer.eval()


def open_model(name_or_folder: str) -> Model:
    """A bundle, by name or folder, or the name of a preset (`paper`), which needs no weights: its are random.

    Raises:
        BundleError: none of these, or a bundle that is refused.
    """
    if name_or_folder in PRESETS and name_or_folder not in list_bundles():
        return random_model(name_or_folder)
    bundle = open_bundle(name_or_folder)
    manifest = bundle.manifest
    return Model(
        manifest.name,
        manifest.denoiser,
        manifest.enhancer,
        manifest.schedule,
        manifest.sampler,
        manifest.preprocessing.size,
        manifest.enhance,
        manifest.mirror,
        bundle,
    )


def random_model(preset: str, size: int = PAPER_SIZE_PX) -> Model:
    """The networks of a preset with random weights, the paper's schedule and sampler (1000 steps of ddpm)."""
    shape = PRESETS[preset]
    return Model(f"{preset}, random weights", shape.denoiser, shape.enhancer, Schedule(), SamplerSettings(), size, True)


def randomise(network: nn.Module, generator: torch.Generator) -> None:
    """Fill every parameter, the zero-initialised too, with noise that keeps activations near 1."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
            elif "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.1, generator=generator)
            else:
                parameter.normal_(0.0, 0.1, generator=generator)


@dataclass(frozen=True)
class Memory:
    """What something took, in bytes: `most` at any moment, loading's copies among it, and what it `held` after."""

    most: int
    held: int


@dataclass(frozen=True)
class Candidate:
    """Something to measure.

    Attributes:
        name: unique among those measured together.
        runner: its networks.
        loading: memory its loading took; None where that cannot be told.
        loop: makes whole images in place of our loop, for peers that bring their own.
    """

    name: str
    runner: Runner
    loading: Memory | None = None
    loop: Loop | None = None


@dataclass(frozen=True)
class Missing:
    """Something that was not measured, and why.

    Attributes:
        name, runner, precision: as in a row.
        batch: batch size; None for all of them.
        reason: one line.
        exit_code: what the command ends with because of it; 0 for what nobody asked for and is not here.
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
        runners: by name; empty for every one that can be used here.
        precisions: by name; empty for those a runner has.
        engines: folders of built engines, besides those in the cache.
    """

    runners: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    engines: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        """Raises SettingsError for a name that is none."""
        for option, names, known in (("runner", self.runners, RUNNERS), ("precision", self.precisions, PRECISIONS)):
            for name in names:
                if name not in known:
                    raise SettingsError(f"--{option} {name}: not known; choose from {', '.join(known)}")


def missing(name: str, runner: str, precision: str, batch: int | None, error: Exception, asked: bool = True) -> Missing:
    """The entry for an error; one of ours brings its exit code, any other is 1."""
    ours = isinstance(error, BsdiffError)
    code = error.exit_code if isinstance(error, BsdiffError) else 1
    return Missing(name, runner, precision, batch, str(error) if ours else one_line(error), code if asked else 0)


def baseline(model: Model, device: torch.device) -> Candidate:
    """The eager networks in fp32, which everything is compared with.

    Raises:
        BundleError: weights that do not fit.
    """
    return loaded(BASELINE, lambda: EagerRunner(*model.networks(), model.size, device), device)


def load_candidates(model: Model, wanted: Wanted, device: torch.device) -> tuple[list[Candidate], list[Missing]]:
    """The baseline first, then every runner and precision that was asked for or is available; and what is not.

    Raises:
        BundleError: weights that do not fit.
    """
    outcomes: list[Candidate | Missing] = [baseline(model, device)]
    for runner in wanted.runners or tuple(reversed(RUNNERS)):
        outcomes += _try_runner(model, runner, wanted, device)
    for folder in wanted.engines:
        outcomes.append(_try(f"engine {folder.name}", model, ("auto", "auto"), device, asked=True, folder=folder))
    absent = [outcome for outcome in outcomes if isinstance(outcome, Missing)]
    for each in absent:
        if each.exit_code:  # asked for; said before the others are measured, which may take long
            logger.warning("%s will not be measured: %s", each.name, each.reason)
    return [outcome for outcome in outcomes if isinstance(outcome, Candidate)], absent


def _try_runner(model: Model, runner: str, wanted: Wanted, device: torch.device) -> list[Candidate | Missing]:
    asked = bool(wanted.runners)
    if runner == BASELINE and not asked:
        return []  # it is there
    if runner not in list_engine_runners():
        precisions = [p for p in wanted.precisions or ("fp32",) if (runner, p) != (BASELINE, "fp32")]
        return [_try(runner, model, (runner, precision), device, asked=asked) for precision in precisions]
    if wanted.precisions:
        return [_try(f"{runner} {p}", model, (runner, p), device, asked=asked) for p in wanted.precisions]
    tried = [_try(f"{runner} {p}", model, (runner, p), device, asked=asked) for p in PRECISIONS]
    found: list[Candidate | Missing] = [outcome for outcome in tried if isinstance(outcome, Candidate)]
    reasons = [outcome for outcome in tried if isinstance(outcome, Missing)]
    # No precision was asked for: one that is there will do, and of several reasons one is enough.
    return found or [replace(reasons[0], name=runner, precision="auto")]


def _try(
    name: str,
    model: Model,
    which: tuple[str, str],
    device: torch.device,
    *,
    asked: bool,
    folder: Path | None = None,
) -> Candidate | Missing:
    """Load (runner, precision), or say why not."""
    try:
        return loaded(name, lambda: _load(model, *which, device, folder), device)
    except Exception as error:  # backends raise what they like; the others are still measured
        logger.debug("%s cannot be loaded", name, exc_info=True)
        return missing(name, *which, None, error, asked)


def _load(model: Model, runner: str, precision: str, device: torch.device, folder: Path | None) -> Runner:
    if runner == BASELINE:
        raise EngineError(f"--precision {precision}: runner eager computes in fp32, the baseline of all others")
    if model.bundle is None:
        raise EngineError(
            "needs a bundle on disk: `python -m export random paper -o DIR` (from a clone) makes one; then --bundle DIR"
        )
    from bsdiff_rt.engines.select import load  # here: the eager networks can be measured without what engines need

    return load(model.bundle, runner if folder is None else str(folder), device, precision)


def loaded(name: str, load: Callable[[], Runner], device: torch.device) -> Candidate:
    """A runner with the memory that loading it took."""
    mark = memory_mark(device)
    runner = load()
    return Candidate(name, runner, memory_since(device, mark))


def memory_mark(device: torch.device) -> int | None:
    """Memory in use now, in bytes, where `memory_since` begins to watch; None where it cannot be told.

    On CUDA that of the whole device, after what torch holds in reserve was given back, because engines allocate past
    torch; on Linux's CPU the resident memory of this process, whose high-water mark starts anew here.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    try:
        _CLEAR_REFS.write_text("5")  # proc(5): resets VmHWM
    except OSError:  # not Linux, or not allowed
        return None
    return _status_bytes("VmRSS")


def memory_since(device: torch.device, mark: int | None) -> Memory | None:
    """Memory taken since the mark; on CUDA what torch keeps in reserve counts as held, so both are the same there."""
    if mark is None:
        return None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        taken = max(0, total - free - mark)
        return Memory(taken, taken)
    return Memory(*(max(0, _status_bytes(field) - mark) for field in ("VmHWM", "VmRSS")))


def _status_bytes(field: str) -> int:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
