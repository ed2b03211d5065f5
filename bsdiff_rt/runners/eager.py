"""Runner `eager`: both networks in torch, in fp32, as written. Every other runner is compared with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import torch
from safetensors.torch import load_file
from torch import nn

from bsdiff_rt.bundle import Bundle
from bsdiff_rt.config import Precision
from bsdiff_rt.errors import BundleError, one_line
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.runners.base import Runner

C = TypeVar("C")
N = TypeVar("N", bound=nn.Module)


class EagerRunner(Runner):
    """Run both networks as torch modules.

    Args:
        denoiser: (x_t, cxr, t) -> [B, 1, H, W].
        enhancer: x -> [B, 1, H, W].
        image_size: side of the square images, in px.
        device: where to run. Both networks are moved there.
    """

    name = "eager"

    def __init__(self, denoiser: nn.Module, enhancer: nn.Module, image_size: int, device: torch.device) -> None:
        super().__init__(device=device, precision="fp32", batch_range=(1, None), image_size=image_size)
        self._denoiser = denoiser.to(self.device).eval()
        self._enhancer = enhancer.to(self.device).eval()

    @torch.no_grad()
    def denoise(self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
        """Run stage 1 (`Runner.denoise`)."""
        self.check(x_t, cxr, out, t=t)
        out.copy_(self._denoiser(x_t, cxr, t))

    def make_deep(self, batch: int) -> torch.Tensor:
        """Return memory for the deep features of a batch (`Runner.make_deep`)."""
        if not isinstance(self._denoiser, Denoiser):
            return super().make_deep(batch)
        return torch.zeros(self._denoiser.shape_deep(batch, self.image_size), device=self.device)

    @torch.no_grad()
    def denoise_and_keep(
        self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor, deep: torch.Tensor
    ) -> None:
        """Run stage 1 and keep its deep features (`Runner.denoise_and_keep`)."""
        self.check(x_t, cxr, out, t=t)
        prediction, features = cast(Denoiser, self._denoiser).compute(x_t, cxr, t)  # `make_deep` has checked it
        out.copy_(prediction)
        deep.copy_(features)

    @torch.no_grad()
    def denoise_top(
        self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor, deep: torch.Tensor
    ) -> None:
        """Run the first level of stage 1 (`Runner.denoise_top`)."""
        self.check(x_t, cxr, out, t=t)
        out.copy_(cast(Denoiser, self._denoiser).compute(x_t, cxr, t, deep)[0])

    @torch.no_grad()
    def enhance(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Run stage 2 (`Runner.enhance`)."""
        self.check(x, out)
        out.copy_(self._enhancer(x))


def load_bundle(bundle: Bundle, device: torch.device, precision: Precision) -> EagerRunner:
    """Load a bundle.

    Args:
        bundle: the model.
        device: where to run.
        precision: fp32, the only one of this runner.

    Raises:
        BundleError: the weights do not fit the bundle's model.
    """
    denoiser, enhancer = load_networks(bundle)
    return EagerRunner(denoiser, enhancer, bundle.manifest.preprocessing.size, device)


def load_networks(bundle: Bundle) -> tuple[Denoiser, Enhancer]:
    """Return both networks of a bundle with their weights: fp32, on the CPU, in evaluation mode.

    Raises:
        BundleError: the weights do not fit the network shapes in the manifest.
    """
    manifest = bundle.manifest
    return (
        _load_network(Denoiser, manifest.denoiser, bundle.file("denoiser.safetensors")),
        _load_network(Enhancer, manifest.enhancer, bundle.file("enhancer.safetensors")),
    )


def _load_network(network_type: Callable[[C], N], config: C, weights: Path) -> N:
    try:
        network = network_type(config)
        network.load_state_dict(load_file(weights))
    except Exception as error:  # torch layers and safetensors raise anything for numbers that fit no network
        raise BundleError(f"{weights}: weights do not fit the manifest's network: {one_line(error)}") from error
    return network.eval()
