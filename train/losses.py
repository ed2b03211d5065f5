"""The hybrid loss and an optimiser step down it. Every image is [B, 1, H, W] float32 in [-1, 1]."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from monai.metrics.regression import compute_ms_ssim
from torch import Tensor

from bsdiff_rt.errors import SettingsError
from train.discriminator import Critic
from train.loop import Trainee, split_batch
from train.perceptual import VGG16, perceptual_distance

# Wang, Simoncelli, Bovik 2003, table of weights per scale, finest first.
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SSIM_KERNEL_PX = 11


@dataclass(frozen=True)
class LossWeights:
    """Weight of each term. 0 leaves a term out."""

    mae: float = 1.0
    mse: float = 0.0
    ms_ssim: float = 1.0
    perceptual: float = 0.0
    adversarial: float = 0.0


@dataclass(frozen=True)
class HybridLoss:
    """Weighted terms of a loss, and the two networks that some of them need."""

    weights: LossWeights
    vgg: VGG16 | None = None
    critic: Critic | None = None

    def terms(self, predicted: Tensor, soft_tissue: Tensor, cxr: Tensor | None = None) -> dict[str, Tensor]:
        """Return the weighted terms by name, scalars. The loss is their sum.

        Args:
            predicted: the model's image.
            soft_tissue: the truth.
            cxr: the X-ray, for a critic that sees it.
        """
        weights, error = self.weights, predicted - soft_tissue
        terms = {}
        if weights.mae:
            terms["mae"] = weights.mae * torch.mean(torch.abs(error))
        if weights.mse:
            terms["mse"] = weights.mse * torch.mean(error.square())
        if weights.ms_ssim:
            terms["ms_ssim"] = weights.ms_ssim * ms_ssim_loss(predicted, soft_tissue)
        if weights.perceptual:
            assert self.vgg is not None, "the perceptual term needs VGG-16"
            terms["perceptual"] = weights.perceptual * perceptual_distance(self.vgg, predicted, soft_tissue)
        if weights.adversarial:
            assert self.critic is not None, "the adversarial term needs a critic"
            terms["adversarial"] = weights.adversarial * self.critic.against(predicted, cxr)
        return terms

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold so that the loss can continue."""
        return {"critic": self.critic.state_dict()} if self.critic else {}

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's content. An empty one changes nothing.

        Raises:
            SettingsError: the checkpoint was trained without a critic.
        """
        if self.critic and state:
            if "critic" not in state:
                raise SettingsError("the checkpoint was trained without the adversarial term. Give --adversarial 0.")
            self.critic.load_state_dict(state["critic"])


def ms_ssim_loss(predicted: Tensor, soft_tissue: Tensor) -> Tensor:
    """Return 1 - MS-SSIM, averaged over the batch; scalar. Small images use as many scales as the kernel fits in."""
    side = min(predicted.shape[-2:])
    # The second term is MONAI's own demand, stricter than the kernel at some sides.
    scales = sum(
        min(side >> scale, side // max(1, scale**2)) >= MS_SSIM_KERNEL_PX for scale in range(len(MS_SSIM_WEIGHTS))
    )
    weights = [weight / sum(MS_SSIM_WEIGHTS[:scales]) for weight in MS_SSIM_WEIGHTS[:scales]]
    x, y = ((image.float().clamp(-1, 1) + 1) / 2 for image in (predicted, soft_tissue))
    return 1.0 - compute_ms_ssim(x, y, spatial_dims=2, kernel_size=MS_SSIM_KERNEL_PX, weights=weights).mean()


def optimise(trainee: Trainee, loss: HybridLoss, x: Tensor, soft_tissue: Tensor) -> dict[str, float]:
    """Make one optimiser step of a network that maps `x` to soft tissue, then one of the critic if the loss has one.

    Returns:
        By name: the loss, each weighted term, and the critic's own loss.
    """
    options = trainee.options
    terms_seen: dict[str, float] = {}
    predictions: list[Tensor] = []

    def losses() -> Iterator[Tensor]:
        for given, wanted in split_batch(options.accumulate, x, soft_tissue):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=options.bf16):
                predicted = trainee.model(given)
            terms = loss.terms(predicted.float(), wanted, given)
            predictions.append(predicted.detach().float())
            share = len(given) / len(x)
            for name, term in terms.items():
                terms_seen[name] = terms_seen.get(name, 0.0) + share * float(term.detach())
            yield sum(terms.values(), torch.zeros((), device=x.device)) * share

    found = {"loss": trainee.update(losses()), **terms_seen}
    if loss.critic is not None:
        found["critic"] = loss.critic.update(torch.cat(predictions), soft_tissue, x)
    return found
