"""Engines for runner `tensorrt`: built by TensorRT from the bundle's ONNX graphs, for the GPU of this machine.

Only this module imports tensorrt, which is an optional package. The code uses what TensorRT has from 10.9 to 11:

- strongly typed networks: the precision is in the graph (onnx_precision.py);
- flags by name, because their numbers changed with 11;
- the `_v2` and `_v3` methods.

Most calls return False or None and log a reason instead of raising. So every result is checked, and the reason is taken
from the logger.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import platformdirs
import torch

from bsdiff_rt.bundle import Bundle
from bsdiff_rt.config import EngineOptions
from bsdiff_rt.errors import EngineError, one_line
from bsdiff_rt.runners.base import Progress
from bsdiff_rt.runners.onnx_precision import CONVERSION, reduce_precision

try:
    import tensorrt as trt
except (ImportError, OSError) as error:  # the package, or one of the libraries it loads
    raise EngineError(
        f"TensorRT cannot be imported ({one_line(error)}). Install it: pip install 'bsdiff-rt[tensorrt]'"
    ) from error

__all__ = ["INPUTS", "LOGGER", "build", "list_versions", "make", "trt"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

INPUTS = {"denoiser": ("x_t", "cxr", "t"), "enhancer": ("x",)}
OPTIMIZATION_LEVEL = 3  # TensorRT's default; 4 and 5 try more kernels for longer
# From this version on, Casts to float32 around attention select float32 sums in the fused fp16 kernel. Before, they
# prevent a fused kernel. The bf16 kernel sums in float32 anyway.
FP32_ATTENTION_FROM = (11, 3)


class _Logger(trt.ILogger):  # type: ignore[misc]  # tensorrt has no types
    """Write TensorRT's messages to our log. One per process: TensorRT keeps the first logger and ignores others."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self._errors: deque[str] = deque(maxlen=3)
        self._levels = {
            trt.ILogger.INTERNAL_ERROR: logging.ERROR,
            trt.ILogger.ERROR: logging.ERROR,
            trt.ILogger.WARNING: logging.WARNING,
        }

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        """Log a message. TensorRT calls this from any of its threads."""
        level = self._levels.get(severity, logging.DEBUG)
        logger.log(level, "TensorRT: %s", msg)
        if level == logging.ERROR:
            self._errors.append(" ".join(msg.split())[:200])

    def take_errors(self) -> str:
        """Return the last errors as the end of a sentence, and clear them. "" if there were none."""
        errors, self._errors = self._errors, deque(maxlen=3)
        return f"; TensorRT says: {'; '.join(errors)}" if errors else ""


LOGGER = _Logger()


def list_versions() -> dict[str, str]:
    """Return the versions of the libraries that an engine is tied to."""
    return {"tensorrt": trt.__version__, "torch": torch.__version__, "cuda": str(torch.version.cuda)}


def build(
    bundle: Bundle, options: EngineOptions, device: torch.device, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Build denoiser.plan and enhancer.plan. This takes minutes; an interruption ends it within seconds.

    The denoiser is built in `options.precision`. The enhancer, which runs once per image, stays fp32. It uses TF32
    products unless the precision is fp32.

    Args:
        bundle: the model.
        options: precision and batch range. Kernels are chosen for the largest batch.
        device: the CUDA device to build for.
        folder: where to write; it exists.
        progress: called with each phase, from several threads, never from two at once. An exception that it raises ends
            the build and is raised here.

    Returns:
        The options used, for the engine's manifest.

    Raises:
        EngineError: the device is not a CUDA device, or TensorRT cannot read a graph or build an engine.
    """
    if device.type != "cuda":
        raise EngineError(f"TensorRT builds engines for CUDA devices, not for {device}. Use device cuda.")
    tf32 = options.precision != "fp32"
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    attention_fp32 = options.precision == "fp16" and version >= FP32_ATTENTION_FROM
    with tempfile.TemporaryDirectory() as work, torch.cuda.device(device):
        for name in INPUTS:
            graph = bundle.file(f"{name}.onnx")
            if name == "denoiser" and options.precision != "fp32":
                reduced = Path(work, graph.name)
                reduce_precision(graph, reduced, options.precision, attention_fp32=attention_fp32)
                graph = reduced
            plan = _plan(graph, options.batch, tf32, device, _Monitor(name, progress))
            (folder / f"{name}.plan").write_bytes(memoryview(plan))
    return {
        "attention_fp32": attention_fp32,
        "conversion": CONVERSION,
        "enhancer": "tf32" if tf32 else "fp32",
        "max_aux_streams": 0,
        "optimization_level": OPTIMIZATION_LEVEL,
        "optimized_batch": options.batch[1],
    }


def _plan(graph: Path, batch: tuple[int, int], tf32: bool, device: torch.device, monitor: _Monitor) -> trt.IHostMemory:
    """Build the engine of one graph and return it serialised."""
    LOGGER.take_errors()
    builder = make("builder", lambda: trt.Builder(LOGGER))
    # In 11 every network is strongly typed, and the flag has no effect.
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = make("network", lambda: builder.create_network(typed))
    parser = make("parser", lambda: trt.OnnxParser(network, LOGGER))
    if not parser.parse_from_file(str(graph)):
        errors: list[trt.ParserError] = [parser.get_error(index) for index in range(parser.num_errors)]
        reasons = "; ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors[:3])
        raise EngineError(f"{graph.name}: TensorRT {trt.__version__} cannot read it: {reasons}{LOGGER.take_errors()}")
    config = make("builder configuration", builder.create_builder_config)
    config.builder_optimization_level = OPTIMIZATION_LEVEL
    config.max_aux_streams = 0  # one stream: less memory, and a CUDA graph records it as it is
    config.progress_monitor = monitor
    if tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    profile = make("optimization profile", builder.create_optimization_profile)
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        smallest, largest = ((size, *tuple(tensor.shape)[1:]) for size in batch)
        try:
            profile.set_shape(tensor.name, min=smallest, opt=largest, max=largest)
        except RuntimeError as error:
            raise _describe_refusal(graph, batch) from error
    if config.add_optimization_profile(profile) < 0:
        raise _describe_refusal(graph, batch)
    path = locate_timing_cache(device)
    cache = _open_timing_cache(config, path)

    def work() -> trt.IHostMemory | None:
        with torch.cuda.device(device):  # the current device belongs to the thread
            return builder.build_serialized_network(network, config)

    # In a thread of its own, so that an interruption reaches this one. TensorRT stops at its next step.
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        try:
            plan = future.result()
        except BaseException:
            monitor.cancel()
            raise
    if monitor.error is not None:
        raise monitor.error
    if plan is None:
        raise EngineError(f"{graph.name}: TensorRT {trt.__version__} cannot build an engine{LOGGER.take_errors()}")
    _save_timing_cache(cache, path)
    return plan


def _describe_refusal(graph: Path, batch: tuple[int, int]) -> EngineError:
    return EngineError(f"{graph.name}: TensorRT refuses batches of {batch[0]} to {batch[1]}{LOGGER.take_errors()}")


def make(what: str, create: Callable[[], T]) -> T:
    """Return what `create` returns. Where TensorRT fails, its constructors raise TypeError and its methods return None.

    Raises:
        EngineError: TensorRT fails.
    """
    try:
        made = create()
    except (TypeError, RuntimeError) as error:
        raise EngineError(
            f"TensorRT {trt.__version__} gives no {what}: {one_line(error)}{LOGGER.take_errors()}"
        ) from error
    if made is None:
        raise EngineError(f"TensorRT {trt.__version__} gives no {what}{LOGGER.take_errors()}")
    return made


def locate_timing_cache(device: torch.device) -> Path:
    """Return the file of kernel timings for this TensorRT and GPU. With it, later builds take seconds, not minutes."""
    gpu = "".join(letter if letter.isalnum() else "-" for letter in torch.cuda.get_device_name(device))
    folder = platformdirs.user_cache_path("bsdiff-rt", appauthor=False) / "timing"
    return folder / f"tensorrt-{trt.__version__}-{gpu}.cache"


def _open_timing_cache(config: trt.IBuilderConfig, path: Path) -> trt.ITimingCache:
    """Attach the timing cache at `path`, or an empty one, to `config`. It must live until the build has ended."""
    stored = [path.read_bytes()] if path.is_file() else []
    for content in (*stored, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
        logger.warning(
            "TensorRT does not accept the timing cache %s%s", path if content else "(empty)", LOGGER.take_errors()
        )
    raise EngineError(f"TensorRT {trt.__version__} accepts no timing cache, not even an empty one")


def _save_timing_cache(cache: trt.ITimingCache, path: Path) -> None:
    content = memoryview(make("timing cache to keep", cache.serialize))
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)  # whole or not at all: another build may be reading


class _Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # tensorrt has no types
    """Pass TensorRT's progress on, and tell TensorRT whether to continue.

    TensorRT only prints an exception that leaves one of the three methods, so the exception is kept in `error`.
    """

    def __init__(self, what: str, progress: Progress) -> None:
        trt.IProgressMonitor.__init__(self)
        self._what, self._progress = what, progress
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
                self._progress(f"{self._what}: {phase}", min(done / steps, 1.0) if steps > 0 else None)
            except BaseException as error:
                self._cancelled, self.error = True, error
