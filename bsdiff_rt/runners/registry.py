"""The registry of runners. A new runner is one module and one entry in `RUNNERS`.

The module of a runner without engines defines

    load_bundle(bundle, device, precision) -> Runner
    find_problem(device) -> str | None          optional: why the installed package cannot be used on this device

The module of a runner with engines defines

    load_engine(folder, *, device, precision, batch_range, image_size) -> Runner
    list_versions() -> dict[str, str]           the libraries that an engine is tied to

and its builder module

    build(bundle, options, device, folder, progress) -> dict[str, Any]

Modules are imported where a runner is used: their packages are optional, and some take seconds to load.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bsdiff_rt.bundle import Bundle, Manifest
from bsdiff_rt.config import DenoiserConfig, EngineOptions, EnhancerConfig, Precision
from bsdiff_rt.errors import EngineError, SettingsError, one_line
from bsdiff_rt.runners.base import Progress, Runner
from bsdiff_rt.runners.devices import RTX_CAPABILITIES, describe_capability

ALL_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
LARGEST_TENSOR = 2**31 - 1  # elements


@dataclass(frozen=True)
class RunnerEntry:
    """What is known of a runner before its packages are imported.

    Attributes:
        name: the runner's name in settings and reports.
        module: the module that loads it; what it defines is in this module's docstring.
        cpu: the precisions it has on a CPU, its default first; () if it does not run there.
        cuda: the same on CUDA devices.
        builder: the module that builds its engines; None if it loads a bundle directly.
        package: the optional package it needs; "" for none.
        install: the command that installs the package.
        largest_tensor: the most elements a tensor may have on a GPU; None for any number.
        capabilities: the compute capabilities of the GPUs that it runs on; () for all.
        optional_engine: whether it also runs without an engine when it is named. `auto` takes it with an engine only,
            because an engine was compared with eager and timed.
        max_autotune: whether its builder can try more kernels on request.
    """

    name: str
    module: str
    cpu: tuple[Precision, ...] = ("fp32",)
    cuda: tuple[Precision, ...] = ("fp32",)
    builder: str | None = None
    package: str = ""
    install: str = ""
    largest_tensor: int | None = None
    capabilities: tuple[str, ...] = ()
    optional_engine: bool = False
    max_autotune: bool = False

    @property
    def needs_engine(self) -> bool:
        """Return whether the runner runs engines only."""
        return self.builder is not None and not self.optional_engine

    def list_precisions(self, device: torch.device) -> tuple[Precision, ...]:
        """Return the precisions on a device, the default first."""
        return self.cuda if device.type == "cuda" else self.cpu

    def load_bundle(self, bundle: Bundle, device: torch.device, precision: Precision) -> Runner:
        """Load a bundle. Only for runners without engines."""
        runner: Runner = import_module(self.module).load_bundle(bundle, device, precision)
        return runner

    def load_engine(
        self,
        folder: Path,
        *,
        device: torch.device,
        precision: Precision,
        batch_range: tuple[int, int],
        image_size: int,
    ) -> Runner:
        """Load an engine whose identity and files were checked. Only for runners with engines.

        Raises:
            EngineError: the backend cannot load it.
        """
        runner: Runner = import_module(self.module).load_engine(
            folder, device=device, precision=precision, batch_range=batch_range, image_size=image_size
        )
        return runner

    def list_versions(self) -> dict[str, str]:
        """Return the versions of the libraries that an engine is tied to.

        Raises:
            EngineError: a library cannot be imported.
        """
        versions: dict[str, str] = import_module(self.module).list_versions()
        return versions

    def build(
        self, bundle: Bundle, options: EngineOptions, device: torch.device, folder: Path, progress: Progress
    ) -> dict[str, Any]:
        """Build an engine into an existing, empty folder, and return the build options for its manifest.

        Raises:
            EngineError: the engine cannot be built here.
        """
        if self.builder is None:
            raise EngineError(f"runner {self.name} needs no engine")
        used: dict[str, Any] = import_module(self.builder).build(bundle, options, device, folder, progress)
        return used

    def find_problem(self, device: torch.device) -> str | None:
        """Return why this runner cannot be used on a device, with or without an engine; None if it can."""
        if not self.list_precisions(device):
            return f"it runs on {'NVIDIA GPUs' if self.cuda else 'CPUs'}, not on {device}"
        if problem := self.find_missing_package():
            return problem
        if self.capabilities and (here := describe_capability(device)) not in self.capabilities:
            return f"it runs on compute capability {', '.join(self.capabilities)}, and {device} has {here}"
        if not self.package or self.needs_engine:  # an engine's package is imported where there is an engine
            return None
        try:
            import_module(self.package)
            check = getattr(import_module(self.module), "find_problem", None)
        except (ImportError, OSError) as error:  # one of its libraries is missing, for example
            return f"the installed {self.package} cannot be loaded ({one_line(error)})"
        found: str | None = check(device) if check else None
        return found

    def find_missing_package(self) -> str | None:
        """Return which package of this runner is not installed; None if it needs none, or has it."""
        if self.package and find_spec(self.package) is None:
            return f"the package {self.package} is not installed ({self.install})"
        return None


# Fastest first: `auto` takes the first that can be used.
RUNNERS: dict[str, RunnerEntry] = {
    entry.name: entry
    for entry in (
        RunnerEntry(
            "tensorrt",
            "bsdiff_rt.runners.tensorrt",
            cpu=(),
            cuda=ALL_PRECISIONS,
            builder="bsdiff_rt.runners.tensorrt",
            package="tensorrt",
            install="pip install 'bsdiff-rt[tensorrt]'",
            largest_tensor=LARGEST_TENSOR,  # NvInfer.h, ITensor; documents differ on whether the newest versions insist
        ),
        RunnerEntry(
            "tensorrt-rtx",
            "bsdiff_rt.runners.tensorrt_rtx",
            cpu=(),
            cuda=ALL_PRECISIONS,
            builder="bsdiff_rt.runners.tensorrt_rtx",
            package="tensorrt_rtx_bindings",
            install="pip install 'bsdiff-rt[tensorrt-rtx]'",
            capabilities=RTX_CAPABILITIES,
            largest_tensor=LARGEST_TENSOR,
        ),
        RunnerEntry(
            "openvino",
            "bsdiff_rt.runners.openvino",
            cpu=ALL_PRECISIONS,
            cuda=(),
            builder="bsdiff_rt.runners.openvino_builder",
            package="openvino",
            install="pip install 'bsdiff-rt[openvino]'",
            optional_engine=True,
        ),
        RunnerEntry(
            "aoti",
            "bsdiff_rt.runners.aoti",
            cpu=("fp32", "bf16"),
            cuda=ALL_PRECISIONS,
            builder="bsdiff_rt.runners.aoti_builder",
            max_autotune=True,
        ),
        RunnerEntry(
            "onnxruntime",
            "bsdiff_rt.runners.onnxruntime",
            cuda=("fp32", "fp16"),
            package="onnxruntime",
            install="pip install 'bsdiff-rt[cpu]', or 'bsdiff-rt[cuda]' for NVIDIA GPUs",
            largest_tensor=LARGEST_TENSOR,  # its CUDA kernels count elements in 32 bits in places
        ),
        RunnerEntry("eager", "bsdiff_rt.runners.eager"),
    )
}


def find_entry(name: str) -> RunnerEntry:
    """Return the registry's entry of a runner.

    Raises:
        SettingsError: there is no such runner.
    """
    if name not in RUNNERS:
        raise SettingsError(f"{name!r} is not a runner. Use one of {', '.join(RUNNERS)}.", setting="runner")
    return RUNNERS[name]


def list_engine_runners() -> tuple[str, ...]:
    """Return the names of the runners that have engines, fastest first."""
    return tuple(name for name, entry in RUNNERS.items() if entry.builder is not None)


def list_bundle_runners() -> tuple[str, ...]:
    """Return the names of the runners that have no engines, fastest first."""
    return tuple(name for name, entry in RUNNERS.items() if entry.builder is None)


def find_batch_limit(name: str, manifest: Manifest) -> int | None:
    """Return how many images a runner can safely take at once on a GPU; None for any number.

    Args:
        name: the runner.
        manifest: describes the model.
    """
    most = RUNNERS[name].largest_tensor
    if most is None:
        return None
    size = manifest.preprocessing.size
    denoiser = _count_largest_tensor(manifest.denoiser, size, middle_attention=True)
    enhancer = _count_largest_tensor(manifest.enhancer, size, manifest.enhancer.middle_attention)
    return max(1, most // max(denoiser, enhancer))


def _count_largest_tensor(config: DenoiserConfig | EnhancerConfig, size: int, middle_attention: bool) -> int:
    """Return the most elements that one tensor of a network has for one image.

    A level of the decoder joins its own width with that of the level below. Attention has one score for each pair of
    tokens, and some backends hold all scores of a batch in one tensor.
    """
    sides = [size >> level for level in range(len(config.channels))]
    joined = [width + max(config.channels[level : level + 2]) for level, width in enumerate(config.channels)]
    attention = (*config.attention[:-1], config.attention[-1] or middle_attention)
    features = max(width * side**2 for width, side in zip(joined, sides, strict=True))
    scores = max((side**4 for side, present in zip(sides, attention, strict=True) if present), default=0)
    return max(features, scores)


def resolve_precision(name: str, precision: str, device: torch.device) -> Precision:
    """Return the precision in which a runner computes on a device; of a runner with engines, that of a new engine.

    Args:
        name: the runner.
        precision: "auto" (the runner's default), "fp32", "bf16" or "fp16".
        device: where it runs.

    Raises:
        EngineError: the runner does not have this precision there.
    """
    known = RUNNERS[name].list_precisions(device)
    for each in known:
        if precision in ("auto", each):
            return each
    raise EngineError(f"it computes in {' or '.join(known)} on {device}, not in {precision}")


def load_runner(bundle: Bundle, name: str, device: torch.device, precision: Precision = "fp32") -> Runner:
    """Load a bundle into a runner, without an engine.

    Raises:
        EngineError: the runner cannot be used on this device or in this precision, or it needs an engine.
        BundleError: the weights do not fit the bundle's model.
    """
    entry = find_entry(name)
    if problem := entry.find_problem(device):
        raise EngineError(f"runner {name} cannot be used on {device}: {problem}. Use runner auto or eager.")
    if entry.needs_engine:
        raise EngineError(f"runner {name} needs an engine. Build one with bsdiff-rt build-engine.")
    return entry.load_bundle(bundle, device, resolve_precision(name, precision, device))
