"""Engines for runners `tensorrt` and `tensorrt-rtx`: built from the bundle's ONNX graphs (tensorrt_library.py)."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
import torch

from bsdiff_rt.bundle import Bundle
from bsdiff_rt.config import EngineOptions
from bsdiff_rt.errors import EngineError
from bsdiff_rt.runners.base import Progress
from bsdiff_rt.runners.devices import make_current
from bsdiff_rt.runners.onnx_precision import CONVERSION, reduce_precision
from bsdiff_rt.runners.tensorrt_library import Library

if TYPE_CHECKING:
    import tensorrt as trt

logger = logging.getLogger(__name__)

INPUTS = {"denoiser": ("x_t", "cxr", "t"), "enhancer": ("x",)}
OPTIMIZATION_LEVEL = 3  # the default; 4 and 5 try more kernels for longer


def build_plans(
    library: Library,
    bundle: Bundle,
    options: EngineOptions,
    device: torch.device,
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Build denoiser.plan and enhancer.plan. This takes minutes; an interruption ends it within seconds.

    The denoiser is built in `options.precision`. The enhancer, which runs once per image, stays fp32. Unless the
    precision is fp32, it uses TF32 products, and fp16 in attention: only that is fused, and unfused it takes gigabytes.

    Args:
        library: TensorRT, or TensorRT for RTX.
        bundle: the model.
        options: precision, batch range and compute capabilities.
        device: the CUDA device to build for; the CPU if `options.capabilities` says for what.
        folder: where to write; it exists.
        progress: called with each phase, from several threads, never from two at once. An exception that it raises ends
            the build and is raised here.

    Returns:
        The options used, for the engine's manifest.

    Raises:
        EngineError: there is no CUDA device to build for, or the library cannot read a graph or build an engine.
    """
    if device.type != "cuda" and not options.capabilities:
        raise EngineError(f"{library.title} builds engines for CUDA devices, not for {device}. Use device cuda.")
    library.check_capabilities(options.capabilities)
    tf32 = options.precision != "fp32"
    version = tuple(int(part) for part in library.trt.__version__.split(".")[:2])
    softmax_fp32 = options.precision == "fp16" and version >= library.fp32_softmax_from
    with tempfile.TemporaryDirectory() as work, make_current(device):
        for name in INPUTS:
            graph = bundle.file(f"{name}.onnx")
            if options.precision != "fp32":
                reduced = Path(work, graph.name)
                if name == "denoiser":
                    reduce_precision(graph, reduced, options.precision, softmax_fp32=softmax_fp32)
                else:
                    reduce_precision(graph, reduced, "fp16", softmax_fp32=softmax_fp32, attention_only=True)
                graph = reduced
            plan = _plan(library, graph, options, tf32, device, make_monitor(library.trt, name, progress))
            (folder / f"{name}.plan").write_bytes(memoryview(plan))
    return {
        "conversion": CONVERSION,
        "enhancer": "tf32 with fp16 attention" if tf32 else "fp32",
        "max_aux_streams": 0,
        "optimization_level": OPTIMIZATION_LEVEL,
        "softmax_fp32": softmax_fp32,
    }


def _plan(
    library: Library, graph: Path, options: EngineOptions, tf32: bool, device: torch.device, monitor: Any
) -> trt.IHostMemory:
    """Build the engine of one graph and return it serialised."""
    trt = library.trt
    library.logger.take_errors()
    builder = library.make("builder", lambda: trt.Builder(library.logger))
    # In 11 every network is strongly typed, and the flag has no effect.
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = library.make("network", lambda: builder.create_network(typed))
    _parse(library, network, graph)
    config = library.make("builder configuration", builder.create_builder_config)
    config.builder_optimization_level = OPTIMIZATION_LEVEL
    config.max_aux_streams = 0  # one stream: less memory, and a CUDA graph records it as it is
    config.progress_monitor = monitor
    if tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    _add_profiles(library, builder, network, config, graph, options.batch)
    path = cache = None
    if library.capabilities:
        library.set_capabilities(config, options.capabilities)
    else:
        path = locate_timing_cache(library, device)
        cache = _open_timing_cache(library, config, path)

    def work() -> Any:
        with make_current(device):  # the current device belongs to the thread
            return builder.build_serialized_network(network, config)

    # In a thread of its own, so that an interruption reaches this one. TensorRT stops at its next step.
    with ThreadPoolExecutor(1) as pool:
        try:
            plan = pool.submit(work).result()
        except BaseException:
            monitor.cancel()
            raise
    if monitor.error is not None:
        raise monitor.error
    if plan is None:
        raise EngineError(f"{graph.name}: {library} cannot build an engine{library.logger.take_errors()}")
    if cache is not None and path is not None:
        _save_timing_cache(library, cache, path)
    return plan


def _parse(library: Library, network: trt.INetworkDefinition, graph: Path) -> None:
    """Read a graph into an empty network.

    Raises:
        EngineError: the library cannot read it.
    """
    parser = library.make("parser", lambda: library.trt.OnnxParser(network, library.logger))
    if not parser.parse_from_file(str(graph)):
        errors: list[trt.ParserError] = [parser.get_error(index) for index in range(parser.num_errors)]
        reasons = [f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors[:3]]
        text = "; ".join(" ".join(reason.split()) for reason in reasons)
        raise EngineError(f"{graph.name}: {library} cannot read it: {text}{library.logger.take_errors()}")


def _add_profiles(
    library: Library,
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    config: trt.IBuilderConfig,
    graph: Path,
    batch: tuple[int, int],
) -> None:
    """Add a profile for the smallest batch, which is the common one, and another for all larger ones.

    Kernels are chosen for a profile's largest batch. TensorRT for RTX chooses them when an engine runs, and would keep
    the weights once for each profile. So it gets one profile.
    """
    low, high = batch
    for sizes in [(low, high)] if library.capabilities or low == high else [(low, low), (low + 1, high)]:
        profile = library.make("optimization profile", builder.create_optimization_profile)
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            smallest, largest = ((size, *tuple(tensor.shape)[1:]) for size in sizes)
            try:
                profile.set_shape(tensor.name, min=smallest, opt=largest, max=largest)
            except RuntimeError as error:
                raise _describe_refusal(library, graph, batch) from error
        if config.add_optimization_profile(profile) < 0:
            raise _describe_refusal(library, graph, batch)


def _describe_refusal(library: Library, graph: Path, batch: tuple[int, int]) -> EngineError:
    return EngineError(
        f"{graph.name}: {library.title} refuses batches of {batch[0]} to {batch[1]}{library.logger.take_errors()}"
    )


def locate_timing_cache(library: Library, device: torch.device) -> Path:
    """Return the file of kernel timings for this TensorRT and GPU. With it, later builds take seconds, not minutes."""
    gpu = "".join(letter if letter.isalnum() else "-" for letter in torch.cuda.get_device_name(device))
    folder = platformdirs.user_cache_path("bsdiff-rt", appauthor=False) / "timing"
    return folder / f"tensorrt-{library.trt.__version__}-{gpu}.cache"


def _open_timing_cache(library: Library, config: trt.IBuilderConfig, path: Path) -> trt.ITimingCache:
    """Attach the timing cache at `path`, or an empty one, to `config`. It must live until the build has ended."""
    stored = [path.read_bytes()] if path.is_file() else []
    for content in (*stored, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
        logger.warning(
            "%s does not accept the timing cache %s%s",
            library.title,
            path if content else "(empty)",
            library.logger.take_errors(),
        )
    raise EngineError(f"{library} accepts no timing cache, not even an empty one")


def _save_timing_cache(library: Library, cache: trt.ITimingCache, path: Path) -> None:
    content = memoryview(library.make("timing cache to keep", cache.serialize))
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)  # whole or not at all: another build may be reading


def make_monitor(trt: Any, what: str, progress: Progress) -> Any:
    """Return a progress monitor that passes progress on, and tells the library whether to continue.

    The library only prints an exception that leaves one of the three methods, so the exception is kept in `error`.

    Args:
        trt: the library's Python module.
        what: name of the network.
        progress: called with each phase.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # it has no types
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self._lock = threading.Lock()
            self._cancelled = False
            self.error: BaseException | None = None

        def cancel(self) -> None:
            """End the build at its next step."""
            self._cancelled = True

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """Note the start of a phase of `num_steps` steps. Phases nest, and their names differ between versions."""
            self._steps[phase_name] = num_steps
            self._report(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Note that step number `step` is done. Returning False ends the build."""
            self._report(phase_name, step + 1)
            return not self._cancelled

        def phase_finish(self, phase_name: str) -> None:
            """Note the end of a phase, perhaps before its last step."""
            self._steps.pop(phase_name, None)

        def _report(self, phase: str, done: int) -> None:
            steps = self._steps.get(phase, 0)
            with self._lock:
                if self._cancelled:
                    return
                try:
                    progress(f"{what}: {phase}", min(done / steps, 1.0) if steps > 0 else None)
                except BaseException as error:
                    self._cancelled, self.error = True, error

    return Monitor()
