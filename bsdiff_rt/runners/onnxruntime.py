"""Runner `onnxruntime`: the bundle's ONNX graphs, fp32 on the CPU, fp32 or fp16 on CUDA. The default without a GPU."""

from __future__ import annotations

import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from bsdiff_rt.config import Precision
from bsdiff_rt.errors import EngineError, one_line
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.onnx_attention import fuse_attention
from bsdiff_rt.runners.onnx_precision import reduce_precision
from bsdiff_rt.runners.streams import in_order

_ERRORS_ONLY = 3  # severity; a GPU build on a machine without GPU warns at every session otherwise
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"  # for a graph that is not a file
# Its threads would spin for some 30 ms after each call, on the processors that read and write files, and that whatever
# is timed next runs on.
_STOP_SPINNING = "session.force_spinning_stop"
_CPU = torch.device("cpu")


class OnnxRuntimeRunner(Runner):
    """Both graphs as ONNX Runtime sessions on the execution provider of one device.

    The caller's buffers are bound by address, so nothing is copied in or out. On CUDA the sessions work on the stream
    that is current at construction, or one of their own where that is the default stream; a call on another stream is
    put in order with it. Nothing is synchronised. On the CPU attention is fused (`onnx_attention`). In fp16 the
    enhancer, which runs once per image, stays fp32.

    Args:
        denoiser: path of denoiser.onnx: x_t, cxr, t -> out.
        enhancer: path of enhancer.onnx: x -> out.
        image_size: side of the square images, in px.
        threads: threads per operator on the CPU; default: the processors this process may use.
        device: the CPU or a CUDA device.
        precision: fp32, or fp16 on CUDA.
        batch_max: the largest batch it takes; None: any.

    Raises:
        EngineError: ONNX Runtime cannot load a graph, cannot use the device, or has not the precision there.
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
                f"--precision {precision}: runner onnxruntime computes in {' or '.join(available)} on {device.type}"
            )
        self._stream = None if device.type == "cpu" else _stream(self.device)
        provider = _provider(self.device, self._stream, tf32=precision == "fp16")
        with tempfile.TemporaryDirectory() as work:
            if precision == "fp16":
                # Its CUDA softmax sums in float32 whatever the type of its input.
                reduce_precision(denoiser, Path(work, denoiser.name), precision, attention_fp32=False)
                denoiser = Path(work, denoiser.name)
            self._denoiser = _session(denoiser, threads, provider)
        self._enhancer = _session(enhancer, threads, provider)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def denoise(self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
        """Stage 1; see `Runner.denoise`."""
        self.check(x_t, cxr, out, t=t)
        self._run(self._denoiser, {"x_t": x_t, "cxr": cxr, "t": t}, out)

    def enhance(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Stage 2; see `Runner.enhance`."""
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


def _stream(device: torch.device) -> torch.cuda.Stream:
    """The current stream of a CUDA device, or a new one where that is the default stream, which has no handle."""
    current = torch.cuda.current_stream(device)
    return current if current.cuda_stream else torch.cuda.Stream(device)


def _provider(device: torch.device, stream: torch.cuda.Stream | None, tf32: bool) -> tuple[str, dict[str, Any]]:
    """Name and options of the execution provider for a device."""
    if stream is None:
        return "CPUExecutionProvider", {}
    options = {
        "device_id": str(device.index),
        "user_compute_stream": str(stream.cuda_stream),
        "use_tf32": str(int(tf32)),
        "enable_cuda_graph": "0",  # CapturedSampler records the whole step
    }
    return "CUDAExecutionProvider", options


def _processors() -> int:
    """How many processors this process may use; macOS and Windows do not say, there it is all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _session(graph: Path, threads: int | None, provider: tuple[str, dict[str, Any]]) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads or _processors()
    try:
        source: Path | bytes = graph
        if provider[0] == "CPUExecutionProvider":
            source = fuse_attention(graph).SerializeToString()
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(graph.parent))
            options.add_session_config_entry(_STOP_SPINNING, "1")
        session = ort.InferenceSession(source, options, providers=[provider])
    except Exception as error:  # its exceptions share no base class but Exception
        raise EngineError(f"{graph}: ONNX Runtime {ort.__version__} cannot load it: {one_line(error)}") from error
    # Where a provider's libraries are missing, it only logs and takes the CPU.
    if session.get_providers()[0] != provider[0]:
        raise EngineError(
            f"ONNX Runtime {ort.__version__} cannot use {provider[0]}, only {', '.join(session.get_providers())}; "
            "its CUDA and cuDNN libraries are missing or of another version; install them or use another --runner"
        )
    return session
