"""Runner `aoti`: both networks compiled ahead of time by AOTInductor (aoti_builder.py). It needs nothing but torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bsdiff_rt.config import Precision
from bsdiff_rt.errors import EngineError, one_line
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.devices import make_current

DENOISER, ENHANCER = "denoiser.pt2", "enhancer.pt2"


class AotiRunner(Runner):
    """Run both AOTInductor packages of an engine. They are native code: the caller has verified them.

    Args:
        folder: the engine, with denoiser.pt2 and enhancer.pt2.
        device: what it was built for.
        precision: of the denoiser's weights and activations. The enhancer's are fp32.
        batch_range: smallest and largest batch.
        image_size: side of the square images, in px.

    Raises:
        EngineError: torch cannot load a package.
    """

    name = "aoti"

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
        self._ooms = _count_ooms(self.device)
        self._denoiser: Any = _load_package(folder / DENOISER, self.device)
        self._enhancer: Any = _load_package(folder / ENHANCER, self.device)

    @torch.no_grad()
    def denoise(self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
        """Run stage 1 (`Runner.denoise`)."""
        self.check(x_t, cxr, out, t=t)  # the compiled code checks neither size nor batch: it would read past the end
        self._run(self._denoiser, (x_t, cxr, t), out)

    @torch.no_grad()
    def enhance(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Run stage 2 (`Runner.enhance`)."""
        self.check(x, out)
        self._run(self._enhancer, (x,), out)

    def close(self) -> None:
        """Release both packages and their weights."""
        self._denoiser = self._enhancer = None

    def _run(self, package: Any, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        # The package runs on the current stream of the current device, wherever its buffers are: torch's
        # model_container_runner_cuda.cpp asks getCurrentCUDAStream(), without a device index, for each run.
        with make_current(self.device):
            try:
                out.copy_(package(*inputs))
            except RuntimeError as error:
                # The text of the error is a source line of the package. The allocator's count shows what kind it was.
                before, self._ooms = self._ooms, _count_ooms(self.device)
                if self._ooms > before:
                    raise torch.OutOfMemoryError(f"out of memory in an aoti engine ({one_line(error)})") from error
                raise


load_engine = AotiRunner


def list_versions() -> dict[str, str]:
    """Return the versions of the libraries that an engine is tied to: its packages call torch's own libraries."""
    return {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}


def _count_ooms(device: torch.device) -> int:
    """Return how often torch's allocator has run out of memory on a device."""
    return 0 if device.type == "cpu" else int(torch.cuda.memory_stats(device).get("num_ooms", 0))


def _load_package(package: Path, device: torch.device) -> Any:
    from torch._inductor import aoti_load_package

    try:
        # Single-threaded, as a runner is anyway. Otherwise torch asks CUDA events whether an earlier call has ended,
        # which is not permitted while a graph is recorded (pytorch pull request 148601).
        with make_current(device):  # loading makes its device the current one for good (model_base.h)
            return aoti_load_package(
                str(package), run_single_threaded=True, device_index=-1 if device.index is None else device.index
            )
    except Exception as error:
        raise EngineError(f"{package}: torch {torch.__version__} cannot load it: {one_line(error)}") from error
