"""The adversarial term of the loss: a patch discriminator after pix2pixHD (Wang et al. 2018) and its optimiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from monai.networks.nets.patchgan_discriminator import PatchDiscriminator
from torch import Tensor

CHANNELS, LAYERS, LEARNING_RATE = 64, 3, 5e-4  # the paper's
CRITIC_PASSES = 9  # work of one optimiser step, in forward passes: three forward and three backward passes
CRITIC_COPIES = 4  # float32 copies of its parameters: weights, gradients, AdamW's two moments
View = Callable[[Tensor, Tensor | None], Tensor]


def image_alone(image: Tensor, _: Tensor | None) -> Tensor:
    """Return what the paper's discriminator sees: the image, [B, 1, H, W]."""
    return image


def build_critic(channels: int = 1) -> PatchDiscriminator:
    """Build the discriminator's network: input [B, channels, H, W], output a list of features and, last, scores."""
    return PatchDiscriminator(
        spatial_dims=2, channels=CHANNELS, in_channels=channels, num_layers_d=LAYERS, norm="BATCH"
    )


class Critic:
    """A discriminator that learns to tell true soft-tissue images from predictions, by least squares (Mao et al. 2017).

    True images should score 1, predictions 0. Layers, channels, batch norm and AdamW are the paper's. The
    discriminator's own loss is multiplied by `weight`, too, as published; AdamW almost cancels that. In the published
    code the scores pass a leaky ReLU before they are squared. Here they do not.

    Args:
        weight: of the adversarial term.
        accelerator: places the network and averages its gradients over processes.
        channels: of the discriminator's input.
        view: makes that input, [B, channels, H, W], from an image and the X-ray it is conditioned on, or None.
    """

    def __init__(self, weight: float, accelerator: Accelerator, channels: int = 1, view: View = image_alone) -> None:
        self.network = build_critic(channels).to(accelerator.device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=LEARNING_RATE)
        self.weight, self.view, self._accelerator = weight, view, accelerator

    def against(self, predicted: Tensor, cxr: Tensor | None = None) -> Tensor:
        """Return how far a prediction is from passing as true. A scalar in the prediction's graph."""
        return (self._score(predicted, cxr) - 1).square().mean()

    def update(self, predicted: Tensor, soft_tissue: Tensor, cxr: Tensor | None = None) -> float:
        """Make one optimiser step of the discriminator on a detached prediction. Return its loss before the weight."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = (self._score(predicted, cxr).square().mean() + (self._score(soft_tissue, cxr) - 1).square().mean()) / 2
        (self.weight * loss).backward()
        for parameter in self.network.parameters():
            parameter.grad = self._accelerator.reduce(parameter.grad, "mean")
        self.optimizer.step()
        return float(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to continue."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _score(self, image: Tensor, cxr: Tensor | None) -> Tensor:
        score: Tensor = self.network(self.view(image, cxr))[-1]
        return score
