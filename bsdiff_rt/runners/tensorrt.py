"""Runner `tensorrt`: engines built by tensorrt_builder.py, run on the caller's buffers and stream."""

from __future__ import annotations

from pathlib import Path

import torch

from bsdiff_rt.config import Precision
from bsdiff_rt.errors import EngineError
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.streams import in_order
from bsdiff_rt.runners.tensorrt_builder import INPUTS, LOGGER, build, made, trt, versions

__all__ = ["TensorRTRunner", "build", "versions"]

ALIGNMENT_BYTES = 256  # of every address given to a context


class TensorRTRunner(Runner):
    """Both engines of a folder. Their contexts share one piece of working memory, for they never run at once.

    On the default stream, where TensorRT would synchronise, it runs on a stream of its own in order with it.

    Args:
        folder: with denoiser.plan and enhancer.plan, built by this process's user for this GPU and TensorRT (an engine
            is native code: engine.py checks where it comes from before it is given here).
        device, precision, batch_range, image_size: what the engines were built for.

    Raises:
        EngineError: an engine cannot be loaded or is not one of this bundle's networks.
    """

    name = "tensorrt"

    def __init__(
        self,
        folder: Path,
        *,
        device: torch.device,
        precision: Precision,
        batch_range: tuple[int, int | None],
        image_size: int,
    ) -> None:
        super().__init__(device=device, precision=precision, batch_range=batch_range, image_size=image_size)
        with torch.cuda.device(self.device):
            self._own_stream = torch.cuda.Stream(self.device)
            self._runtime = made("runtime", lambda: trt.Runtime(LOGGER))  # must outlive its engines
            engines = {name: _load(self._runtime, folder / f"{name}.plan", name) for name in INPUTS}
            scratch_bytes = max(engine.device_memory_size_v2 for engine in engines.values())
            scratch = torch.empty(max(scratch_bytes, 1), dtype=torch.uint8, device=self.device)
            self._networks = {name: _Network(name, engine, scratch) for name, engine in engines.items()}

    def denoise(self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
        """Stage 1; see `Runner.denoise`."""
        self.check(x_t, cxr, out, t=t)
        self._run("denoiser", {"x_t": x_t, "cxr": cxr, "t": t, "out": out})

    def enhance(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Stage 2; see `Runner.enhance`."""
        self.check(x, out)
        self._run("enhancer", {"x": x, "out": out})

    def close(self) -> None:
        """Wait for the device, then release contexts, engines and runtime, in this order."""
        if self._networks:
            torch.cuda.synchronize(self.device)
            self._networks.clear()
            self._runtime = None

    def _run(self, name: str, buffers: dict[str, torch.Tensor]) -> None:
        current = torch.cuda.current_stream(self.device)
        stream = current if current.cuda_stream else self._own_stream
        with torch.cuda.device(self.device), in_order(stream, self.device):
            self._networks[name].run(buffers, stream.cuda_stream)


def _load(runtime: trt.Runtime, path: Path, name: str) -> trt.ICudaEngine:
    """The engine in a file, once its inputs and output are those of network `name`, in float32."""
    LOGGER.said()
    try:
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
    except OSError as error:
        raise EngineError(f"{path}: cannot be read ({type(error).__name__}); build the engine again") from error
    if engine is None:
        raise EngineError(f"{path}: TensorRT {trt.__version__} cannot load it; build the engine again{LOGGER.said()}")
    tensors = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    if set(tensors) != {*INPUTS[name], "out"} or any(
        engine.get_tensor_dtype(it) != trt.DataType.FLOAT for it in tensors
    ):
        raise EngineError(f"{path}: an engine of {', '.join(sorted(tensors))}, not the {name}'s; build it again")
    return engine


class _Network:
    """One engine and its execution contexts.

    A CUDA graph keeps the shapes and addresses of the context it recorded, and is undefined once they change. So a
    context that was recorded serves only that batch and those addresses from then on, and the next one is made when
    something else is asked for. Contexts are small: the working memory is shared.
    """

    def __init__(self, name: str, engine: trt.ICudaEngine, scratch: torch.Tensor) -> None:
        self._name, self._engine, self._scratch = name, engine, scratch
        self._recorded: dict[tuple[int, ...], trt.IExecutionContext] = {}
        self._context: trt.IExecutionContext | None = self._make_context()
        self._batch = 0  # that `_context` is set to, 0 for none
        self._key: tuple[int, ...] = ()  # batch and addresses that it is set to, () for none

    def run(self, buffers: dict[str, torch.Tensor], stream: int) -> None:
        """Enqueue the network on buffers by name, the inputs first, on a stream that is not the default one."""
        batch = next(iter(buffers.values())).shape[0]
        key = (batch, *(buffer.data_ptr() for buffer in buffers.values()))
        context = self._recorded.get(key) or self._prepared(buffers, key)
        if not context.execute_async_v3(stream):
            raise RuntimeError(f"TensorRT cannot run the {self._name} at batch {batch}{LOGGER.said()}")

    def _prepared(self, buffers: dict[str, torch.Tensor], key: tuple[int, ...]) -> trt.IExecutionContext:
        """A context set to these buffers that no graph has recorded; kept for them alone if a graph records it now."""
        recording = torch.cuda.is_current_stream_capturing()
        if recording and key != self._key:
            raise EngineError(f"the {self._name} must run once on the same buffers before a CUDA graph records it")
        context = self._context or self._make_context()
        if recording:
            self._recorded[key] = context
            self._context, self._batch, self._key = None, 0, ()
        elif key != self._key:
            self._context, self._key = context, ()
            self._set(context, buffers, key[0])
            self._key = key
        return context

    def _set(self, context: trt.IExecutionContext, buffers: dict[str, torch.Tensor], batch: int) -> None:
        """Give a context its shapes, where the batch changes, and its addresses."""
        if batch != self._batch:
            self._batch = 0
            for name in INPUTS[self._name]:
                if not context.set_input_shape(name, tuple(buffers[name].shape)):
                    raise EngineError(f"the {self._name}'s engine does not take batch {batch}{LOGGER.said()}")
            try:
                missing = context.infer_shapes()
            except RuntimeError as error:
                raise EngineError(
                    f"the {self._name}'s engine cannot work out its shapes at batch {batch}{LOGGER.said()}"
                ) from error
            if missing:
                raise EngineError(f"the {self._name}'s engine leaves {', '.join(missing)} undefined{LOGGER.said()}")
            self._batch = batch
        for name, buffer in buffers.items():
            address = buffer.data_ptr()
            if address % ALIGNMENT_BYTES:
                raise EngineError(
                    f"{name} at address {address:#x}, which is no multiple of {ALIGNMENT_BYTES}; "
                    "give the tensorrt runner a buffer of its own, not a slice of another"
                )
            if not context.set_tensor_address(name, address):
                raise EngineError(f"the {self._name}'s engine does not take the buffer {name}{LOGGER.said()}")

    def _make_context(self) -> trt.IExecutionContext:
        LOGGER.said()
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = made("execution context", lambda: self._engine.create_execution_context(strategy))
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.nbytes)
        if refused := LOGGER.said():  # it returns nothing
            raise EngineError(f"TensorRT {trt.__version__} does not take its working memory{refused}")
        return context
