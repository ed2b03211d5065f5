"""Runner `eager`: both networks in torch, fp32, as written. The baseline every other runner is compared with."""

from __future__ import annotations

import torch
from torch import nn

from bsdiff_rt.runners.base import Runner


class EagerRunner(Runner):
    """Both networks as torch modules.

    Args:
        denoiser: (x_t, cxr, t) -> [B, 1, H, W].
        enhancer: x -> [B, 1, H, W].
        image_size: side of the square images, in px.
        device: where to run; the networks are moved there.
    """

    name = "eager"

    def __init__(self, denoiser: nn.Module, enhancer: nn.Module, image_size: int, device: torch.device) -> None:
        super().__init__(device=device, precision="fp32", batch_range=(1, None), image_size=image_size)
        self._denoiser = denoiser.to(self.device).eval()
        self._enhancer = enhancer.to(self.device).eval()

    @torch.no_grad()
    def denoise(self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
        """Stage 1; see `Runner.denoise`."""
        self.check(x_t, cxr, out, t=t)
        out.copy_(self._denoiser(x_t, cxr, t))

    @torch.no_grad()
    def enhance(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Stage 2; see `Runner.enhance`."""
        self.check(x, out)
        out.copy_(self._enhancer(x))
