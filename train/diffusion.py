"""Samples with noise for the denoiser, and how much the error of each one counts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bsdiff_rt.config import Schedule
from bsdiff_rt.sampling.schedule import alpha_bar

# Share of the training steps spent on the noisiest tenth of the diffusion when the objective can answer there (x0, v):
# a sampler of a handful of steps asks for little else.
NOISY_SHARE = 0.9

# Mean square of an image's bone, in [-1, 1]: of a typical image, and of one with hardly any bone, whose weight would
# otherwise grow without bound.
BONE_ENERGY, LITTLE_BONE_ENERGY = 0.02, 0.004

# What an image's mean counts beside the rest of its error. A scanner that tones soft tissue anew gives it a mean that
# cannot be told from the X-ray: guessing it only adds noise to what such images teach.
MEAN_SHARE = 0.2


def draw_times(rng: np.random.Generator, schedule: Schedule, count: int) -> Tensor:
    """Draw `count` diffusion times, [B] int64 in [0, T): uniform for eps (the paper), else more of the noisy end."""
    times = rng.integers(0, schedule.train_steps, count)
    if schedule.objective != "eps":
        noisy = rng.integers(schedule.train_steps * 9 // 10, schedule.train_steps, count)
        times = np.where(rng.random(count) < NOISY_SHARE, noisy, times)
    return torch.from_numpy(times)


def target(schedule: Schedule, x_0: Tensor, eps: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Return what the denoiser should predict, with a = sqrt(alpha_bar_t), s = sqrt(1 - alpha_bar_t)."""
    return {"eps": eps, "v": a * eps - s * x_0, "x0": x_0}[schedule.objective]


def bone_weights(schedule: Schedule, pair: Tensor) -> Tensor:
    """Return the weights of each sample's squared error about its mean, and of its squared mean, [B, 2].

    The measure is the share of bone that stays (BSR). So the error of x0 is divided by the energy of the sample's bone;
    otherwise images with strong bone alone would decide. The mean has a weight of its own, because some scanners change
    the tone of soft tissue. Most of the difference between X-ray and truth is then one offset, which the X-ray does not
    show. The errors of eps and v are not errors of the picture, so their weights are 1.

    Args:
        schedule: tells what is predicted.
        pair: [B, 2, H, W] in [-1, 1]: X-ray and truth.
    """
    if schedule.objective != "x0":
        return torch.ones(len(pair), 2, device=pair.device)
    bone = pair[:, 0] - pair[:, 1]
    energy, offset = torch.mean(bone**2, dim=(1, 2)), torch.mean(bone, dim=(1, 2)) ** 2
    weights = BONE_ENERGY / (torch.stack([energy - offset, energy], dim=1) + LITTLE_BONE_ENERGY)
    return weights * torch.tensor([1.0, MEAN_SHARE], device=pair.device)


class Diffusion:
    """Makes training samples of a schedule, on a device."""

    def __init__(self, schedule: Schedule, device: torch.device) -> None:
        table = alpha_bar(schedule)
        self.schedule = schedule
        self.root_a, self.root_s = (torch.from_numpy(np.sqrt(x)).float().to(device) for x in (table, 1.0 - table))

    def add_noise(self, pair: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Add noise to samples.

        Returns: x_t, cxr, t, what the denoiser should predict, and the weight of its error.

        Args:
            pair: [B, 2, H, W], X-ray and truth in [-1, 1].
            rng: draws the noise and the times.
        """
        cxr, x_0 = pair[:, 0:1], pair[:, 1:2]
        eps = torch.from_numpy(rng.standard_normal(x_0.shape, dtype=np.float32)).to(pair.device)
        t = draw_times(rng, self.schedule, len(pair)).to(pair.device)
        a, s = self.root_a[t].view(-1, 1, 1, 1), self.root_s[t].view(-1, 1, 1, 1)
        return a * x_0 + s * eps, cxr, t, target(self.schedule, x_0, eps, a, s), bone_weights(self.schedule, pair)


def weighted_error(error: Tensor, weights: Tensor) -> Tensor:
    """Return the sum over samples of their weighted squared error.

    Args:
        error: [B, 1, H, W].
        weights: [B, 2], see `bone_weights`.
    """
    offset = torch.mean(error, dim=(1, 2, 3)) ** 2
    about_it = torch.mean(error**2, dim=(1, 2, 3)) - offset
    return torch.sum(weights * torch.stack([about_it, offset], dim=1))
