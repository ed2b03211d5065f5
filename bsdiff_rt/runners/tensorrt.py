"""Runner `tensorrt`: the engines of tensorrt_builder.py, on the caller's buffers and stream.

Runner `tensorrt-rtx` (tensorrt_rtx.py) is the same with another library.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bsdiff_rt.config import Precision
from bsdiff_rt.errors import EngineError
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.streams import in_order
from bsdiff_rt.runners.tensorrt_builder import INPUTS, build_plans
from bsdiff_rt.runners.tensorrt_kernels import KernelCache, locate_kernels
from bsdiff_rt.runners.tensorrt_library import TENSORRT, Library

if TYPE_CHECKING:
    import tensorrt as trt

ALIGNMENT_BYTES = 256  # of every address that a context takes


class TensorRTRunner(Runner):
    """Run both engines of a folder. Their contexts share one working memory, because they never run at the same time.

    On the default stream TensorRT would synchronise. There it runs on a stream of its own, ordered with the caller's.

    Args:
        library: TensorRT, or TensorRT for RTX.
        folder: holds denoiser.plan and enhancer.plan, built for this GPU and library. They are native code: the
            caller has verified them (engines/manifest.py).
        device, precision, batch_range, image_size: what the engines were built for.

    Raises:
        EngineError: an engine cannot be loaded, or it is not one of this bundle's networks.
    """

    def __init__(
        self,
        library: Library,
        folder: Path,
        *,
        device: torch.device,
        precision: Precision,
        batch_range: tuple[int, int | None],
        image_size: int,
    ) -> None:
        super().__init__(device=device, precision=precision, batch_range=batch_range, image_size=image_size)
        self.name = library.runner  # type: ignore[misc]  # one class for both runners
        trt = library.trt
        with torch.cuda.device(self.device):
            self._own_stream = torch.cuda.Stream(self.device)
            self._runtime = library.make("runtime", lambda: trt.Runtime(library.logger))  # must outlive its engines
            engines = {name: _load_plan(library, self._runtime, folder / f"{name}.plan", name) for name in INPUTS}
            scratch_bytes = max(engine.device_memory_size_v2 for engine in engines.values())
            _check_memory(scratch_bytes, self.device)
            scratch = torch.empty(max(scratch_bytes, 1), dtype=torch.uint8, device=self.device)
            self._kernels: dict[str, KernelCache] = {}
            if library.compiles_later:
                for name, engine in engines.items():
                    self._kernels[name] = KernelCache(library, engine, locate_kernels(folder / f"{name}.plan"))
            self._networks = {
                name: _Network(library, name, engine, scratch, batch_range[0], self._kernels.get(name))
                for name, engine in engines.items()
            }

    def denoise(self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
        """Run stage 1 (`Runner.denoise`)."""
        self.check(x_t, cxr, out, t=t)
        self._run("denoiser", {"x_t": x_t, "cxr": cxr, "t": t, "out": out})

    def enhance(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Run stage 2 (`Runner.enhance`)."""
        self.check(x, out)
        self._run("enhancer", {"x": x, "out": out})

    def close(self) -> None:
        """Wait for the device and keep its kernels. Then release contexts, engines and runtime, in this order."""
        if self._networks:
            torch.cuda.synchronize(self.device)
            for kernels in self._kernels.values():
                kernels.save()
            self._networks.clear()
            self._kernels.clear()
            self._runtime = None

    def _run(self, name: str, buffers: dict[str, torch.Tensor]) -> None:
        current = torch.cuda.current_stream(self.device)
        stream = current if current.cuda_stream else self._own_stream
        with torch.cuda.device(self.device), in_order(stream, self.device):
            self._networks[name].run(buffers, stream.cuda_stream)


load_engine = partial(TensorRTRunner, TENSORRT)
list_versions = TENSORRT.list_versions
build = partial(build_plans, TENSORRT)


def _load_plan(library: Library, runtime: trt.Runtime, path: Path, name: str) -> trt.ICudaEngine:
    """Load the engine in a file, and check that its inputs and output are those of network `name`, in float32.

    Raises:
        EngineError: the file cannot be read or loaded, or it is another network's engine.
    """
    trt = library.trt
    library.logger.take_errors()
    try:
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
    except OSError as error:
        raise EngineError(f"{path}: cannot be read ({type(error).__name__}). Build the engine again.") from error
    if engine is None:
        raise EngineError(f"{path}: {library} cannot load it{library.logger.take_errors()}. Build the engine again.")
    tensors = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    if set(tensors) != {*INPUTS[name], "out"} or any(
        engine.get_tensor_dtype(it) != trt.DataType.FLOAT for it in tensors
    ):
        raise EngineError(
            f"{path}: its tensors are {', '.join(sorted(tensors))}, not the {name}'s. Build the engine again."
        )
    return engine


def _check_memory(scratch_bytes: int, device: torch.device) -> None:
    """Raise EngineError, before anything is allocated, if the device lacks the memory that the engines work in."""
    free_bytes, _ = torch.cuda.mem_get_info(device)
    free_bytes += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch gives it back
    if scratch_bytes > free_bytes:
        raise EngineError(
            f"the engine works in {scratch_bytes / 1e6:.0f} MB, and {device} has {free_bytes / 1e6:.0f} MB free. Free "
            "some, or build an engine for smaller batches."
        )


class _Network:
    """One engine and its execution contexts.

    A CUDA graph keeps the shapes and addresses of the context that it recorded, and becomes undefined when they change.
    So a recorded context serves only its batch and addresses from then on. Other buffers get a new context. Contexts
    are small, because they share the working memory.
    """

    def __init__(
        self,
        library: Library,
        name: str,
        engine: trt.ICudaEngine,
        scratch: torch.Tensor,
        smallest_batch: int,
        kernels: KernelCache | None,
    ) -> None:
        self._library, self._name, self._engine, self._scratch = library, name, engine, scratch
        self._kernels = kernels
        self._smallest_batch = smallest_batch  # it has the first profile, every other batch the last
        self._recorded: dict[tuple[int, ...], trt.IExecutionContext] = {}
        self._context: trt.IExecutionContext | None = self._make_context()
        self._batch = 0  # the batch that `_context` is set to; 0 for none
        self._key: tuple[int, ...] = ()  # the batch and addresses that it is set to; () for none

    def run(self, buffers: dict[str, torch.Tensor], stream: int) -> None:
        """Enqueue the network.

        Args:
            buffers: by name, the inputs first.
            stream: handle of a stream that is not the default one.

        Raises:
            RuntimeError: TensorRT cannot run.
        """
        batch = next(iter(buffers.values())).shape[0]
        key = (batch, *(buffer.data_ptr() for buffer in buffers.values()))
        context = self._recorded.get(key) or self._prepare_context(buffers, key, stream)
        if not context.execute_async_v3(stream):
            raise RuntimeError(
                f"{self._library.title} cannot run the {self._name} at batch {batch}{self._take_errors()}"
            )

    def _prepare_context(
        self, buffers: dict[str, torch.Tensor], key: tuple[int, ...], stream: int
    ) -> trt.IExecutionContext:
        """Return a context set to these buffers, which no graph has recorded.

        If a graph is recording now, the context is kept for these buffers alone.
        """
        recording = torch.cuda.is_current_stream_capturing()
        if recording and key != self._key:
            raise EngineError(f"the {self._name} must run once on the same buffers before a CUDA graph records it")
        context = self._context or self._make_context()
        if recording:
            self._recorded[key] = context
            self._context, self._batch, self._key = None, 0, ()
        elif key != self._key:
            self._context, self._key = context, ()
            self._set(context, buffers, key[0], stream)
            self._key = key
        return context

    def _set(self, context: trt.IExecutionContext, buffers: dict[str, torch.Tensor], batch: int, stream: int) -> None:
        """Set the addresses of a context, and its profile and shapes if the batch changed."""
        if batch != self._batch:
            self._batch = 0
            profile = 0 if batch == self._smallest_batch else self._engine.num_optimization_profiles - 1
            if context.active_optimization_profile != profile and not context.set_optimization_profile_async(
                profile, stream
            ):
                raise EngineError(f"the {self._name}'s engine has no profile for batch {batch}{self._take_errors()}")
            for name in INPUTS[self._name]:
                if not context.set_input_shape(name, tuple(buffers[name].shape)):
                    raise EngineError(f"the {self._name}'s engine does not take batch {batch}{self._take_errors()}")
            try:
                missing = context.infer_shapes()
            except RuntimeError as error:
                raise EngineError(
                    f"the {self._name}'s engine cannot work out its shapes at batch {batch}{self._take_errors()}"
                ) from error
            if missing:
                raise EngineError(
                    f"the {self._name}'s engine leaves {', '.join(missing)} undefined{self._take_errors()}"
                )
            self._batch = batch
        for name, buffer in buffers.items():
            address = buffer.data_ptr()
            if address % ALIGNMENT_BYTES:
                raise EngineError(
                    f"{name}: its address {address:#x} is not a multiple of {ALIGNMENT_BYTES}. "
                    f"Give the {self._library.runner} runner a whole buffer, not a slice of another."
                )
            if not context.set_tensor_address(name, address):
                raise EngineError(f"the {self._name}'s engine does not take the buffer {name}{self._take_errors()}")

    def _make_context(self) -> trt.IExecutionContext:
        trt = self._library.trt
        self._take_errors()
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        kernels, plan = self._kernels, self._engine
        create = kernels.make_context if kernels else lambda: plan.create_execution_context(strategy)
        context = self._library.make("execution context", create)
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.nbytes)
        if errors := self._take_errors():  # the call itself returns nothing
            raise EngineError(f"{self._library} does not take its working memory{errors}")
        return context

    def _take_errors(self) -> str:
        errors: str = self._library.logger.take_errors()
        return errors
