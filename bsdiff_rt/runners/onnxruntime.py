"""Runner `onnxruntime`: the bundle's ONNX graphs in ONNX Runtime. fp32 on the CPU, fp32 or fp16 on CUDA."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from bsdiff_rt.bundle import Bundle
from bsdiff_rt.config import Precision
from bsdiff_rt.errors import EngineError, one_line
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.devices import count_threads
from bsdiff_rt.runners.onnx_attention import fuse_attention
from bsdiff_rt.runners.onnx_precision import reduce_precision
from bsdiff_rt.runners.registry import find_batch_limit
from bsdiff_rt.runners.streams import in_order

_ERRORS_ONLY = 3  # severity; otherwise a GPU build on a machine without GPU warns at every session
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"  # for a graph that is not a file
# Otherwise its threads spin for some 30 ms after each call, on the processors that read and write files. They would
# also disturb whatever is timed next.
_STOP_SPINNING = "session.force_spinning_stop"
_CPU = torch.device("cpu")


class OnnxRuntimeRunner(Runner):
    """Run both graphs as ONNX Runtime sessions on one device.

    The caller's buffers are bound by address, so nothing is copied in or out, and nothing is synchronised. On CUDA the
    sessions work on the stream that is current at construction, or on one of their own if that is the default stream.
    A call on another stream is ordered with it. On the CPU attention is fused (`onnx_attention`). In fp16 the enhancer,
    which runs once per image, stays fp32.

    Args:
        denoiser: path of denoiser.onnx: x_t, cxr, t -> out.
        enhancer: path of enhancer.onnx: x -> out.
        image_size: side of the square images, in px.
        threads: threads per operator on the CPU; None takes `devices.count_threads()`.
        device: the CPU or a CUDA device.
        precision: fp32, or fp16 on CUDA.
        batch_max: the largest batch that it takes; None for any.

    Raises:
        EngineError: ONNX Runtime cannot load a graph, cannot use the device, or lacks the precision there.
    """

    name = "onnxruntime"

    def __init__(
        self,
        denoiser: Path,
        enhancer: Path,
        image_size: int,
        threads: int | None = None,
        *,
        device: torch.device = _CPU,
        precision: Precision = "fp32",
        batch_max: int | None = None,
    ) -> None:
        super().__init__(device=device, precision=precision, batch_range=(1, batch_max), image_size=image_size)
        available = ("fp32",) if device.type == "cpu" else ("fp32", "fp16")  # it has no bf16 convolution
        if precision not in available:
            raise EngineError(
                f"runner onnxruntime computes in {' or '.join(available)} on {device.type}, not in {precision}"
            )
        self._stream = None if device.type == "cpu" else _stream(self.device)
        provider = _provider(self.device, self._stream, tf32=precision == "fp16")
        with tempfile.TemporaryDirectory() as work:
            if precision == "fp16":
                # Its CUDA softmax sums in float32 whatever the type of its input.
                reduce_precision(denoiser, Path(work, denoiser.name), precision)
                denoiser = Path(work, denoiser.name)
            self._denoiser = _session(denoiser, threads, provider)
        self._enhancer = _session(enhancer, threads, provider)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def denoise(self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
        """Run stage 1 (`Runner.denoise`)."""
        self.check(x_t, cxr, out, t=t)
        self._run(self._denoiser, {"x_t": x_t, "cxr": cxr, "t": t}, out)

    def enhance(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Run stage 2 (`Runner.enhance`)."""
        self.check(x, out)
        self._run(self._enhancer, {"x": x}, out)

    def _run(self, session: ort.InferenceSession, inputs: dict[str, torch.Tensor], out: torch.Tensor) -> None:
        place = self.device.type, self.device.index or 0, np.float32
        binding = session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_input(name, *place, tuple(tensor.shape), tensor.data_ptr())
        binding.bind_output("out", *place, tuple(out.shape), out.data_ptr())
        with nullcontext() if self._stream is None else in_order(self._stream, self.device):
            session.run_with_iobinding(binding, self._options)


def load_bundle(bundle: Bundle, device: torch.device, precision: Precision) -> OnnxRuntimeRunner:
    """Load a bundle.

    Args:
        bundle: the model.
        device: the CPU or a CUDA device.
        precision: fp32, or fp16 on CUDA.

    Raises:
        EngineError: ONNX Runtime cannot load a graph, cannot use the device, or lacks the precision there.
    """
    return OnnxRuntimeRunner(
        bundle.file("denoiser.onnx"),
        bundle.file("enhancer.onnx"),
        bundle.manifest.preprocessing.size,
        device=device,
        precision=precision,
        batch_max=None if device.type == "cpu" else find_batch_limit("onnxruntime", bundle.manifest),
    )


def find_problem(device: torch.device) -> str | None:
    """Return why the installed ONNX Runtime cannot use a device; None if it can."""
    if device.type == "cpu":
        return None
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return "the installed onnxruntime has no CUDA provider. Install onnxruntime-gpu instead"
    # It brings no CUDA libraries: it finds those that torch has loaded.
    theirs, ours = (str(version).split(".")[0] for version in (ort.cuda_version, torch.version.cuda))
    if theirs != ours:
        return f"the installed onnxruntime is built for CUDA {theirs}, torch for CUDA {ours}. Install a matching one"
    return None


def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the current stream of a CUDA device, or a new one if that is the default stream, which has no handle."""
    current = torch.cuda.current_stream(device)
    return current if current.cuda_stream else torch.cuda.Stream(device)


def _provider(device: torch.device, stream: torch.cuda.Stream | None, tf32: bool) -> tuple[str, dict[str, Any]]:
    """Return name and options of the execution provider for a device."""
    if stream is None:
        return "CPUExecutionProvider", {}
    options = {
        "device_id": str(device.index),
        "user_compute_stream": str(stream.cuda_stream),
        "use_tf32": str(int(tf32)),
        "enable_cuda_graph": "0",  # CapturedSampler records the whole step
    }
    return "CUDAExecutionProvider", options


def _session(graph: Path, threads: int | None, provider: tuple[str, dict[str, Any]]) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads or count_threads()
    try:
        source: Path | bytes = graph
        if provider[0] == "CPUExecutionProvider":
            source = fuse_attention(graph).SerializeToString()
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(graph.parent))
            options.add_session_config_entry(_STOP_SPINNING, "1")
            # Planning all activations as one block takes a sixth more memory and gains no time (docs/benchmarks.md).
            options.enable_mem_pattern = False
        session = ort.InferenceSession(source, options, providers=[provider])
    except Exception as error:  # its exceptions share no base class but Exception
        raise EngineError(f"{graph}: ONNX Runtime {ort.__version__} cannot load it: {one_line(error)}") from error
    # If a provider's libraries are missing, ONNX Runtime only logs it and takes the CPU.
    if session.get_providers()[0] != provider[0]:
        raise EngineError(
            f"ONNX Runtime {ort.__version__} cannot use {provider[0]}, only {', '.join(session.get_providers())}: "
            "its CUDA and cuDNN libraries are missing or of another version. Install them or use another runner."
        )
    return session
