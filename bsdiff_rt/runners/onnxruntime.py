"""Runner `onnxruntime`: the bundle's ONNX graphs on the CPU, fp32. The default where no GPU is."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from bsdiff_rt.errors import EngineError, one_line
from bsdiff_rt.runners.base import Runner

_ERRORS_ONLY = 3  # severity; a GPU build on a machine without GPU warns at every session otherwise


class OnnxRuntimeRunner(Runner):
    """Both graphs as ONNX Runtime sessions on the CPU execution provider.

    The caller's buffers are bound by address, so nothing is copied in or out.

    Args:
        denoiser: path of denoiser.onnx: x_t, cxr, t -> out.
        enhancer: path of enhancer.onnx: x -> out.
        image_size: side of the square images, in px.
        threads: threads per operator; default: the processors this process may use.

    Raises:
        EngineError: ONNX Runtime cannot load a graph.
    """

    name = "onnxruntime"

    def __init__(self, denoiser: Path, enhancer: Path, image_size: int, threads: int | None = None) -> None:
        super().__init__(device=torch.device("cpu"), precision="fp32", batch_range=(1, None), image_size=image_size)
        self._denoiser = _session(denoiser, threads)
        self._enhancer = _session(enhancer, threads)

    def denoise(self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
        """Stage 1; see `Runner.denoise`."""
        self.check(x_t, cxr, out, t=t)
        _run(self._denoiser, {"x_t": x_t, "cxr": cxr, "t": t}, out)

    def enhance(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Stage 2; see `Runner.enhance`."""
        self.check(x, out)
        _run(self._enhancer, {"x": x}, out)


def _processors() -> int:
    """How many processors this process may use; macOS and Windows do not say, there it is all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _session(graph: Path, threads: int | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads or _processors()
    try:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class but Exception
        raise EngineError(f"{graph}: ONNX Runtime {ort.__version__} cannot load it: {one_line(error)}") from error


def _run(session: ort.InferenceSession, inputs: dict[str, torch.Tensor], out: torch.Tensor) -> None:
    binding = session.io_binding()
    for name, tensor in inputs.items():
        binding.bind_input(name, "cpu", 0, np.float32, tuple(tensor.shape), tensor.data_ptr())
    binding.bind_output("out", "cpu", 0, np.float32, tuple(out.shape), out.data_ptr())
    session.run_with_iobinding(binding)
