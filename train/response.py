"""The error of what inserts change: f(x + n) - f(x) should be the insert n, whatever bones both pictures show.

A squared error of whole pictures hardly feels a small nodule beside all bones. Here each sample is shown to the network
without and with inserts, under the same noise. An error that both results share does not count, and each insert counts
alike, whatever its size and contrast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from train.diffusion import Diffusion, weighted_error
from train.loop import Trainee, split_batch


@dataclass(frozen=True)
class PairedSamples:
    """Noised samples without and with inserts.

    Attributes:
        x_t, cxr, wanted: [B, 2, 1, H, W], without and with the inserts.
        t: [B] int64.
        weights: [B, 2], see `train.diffusion.bone_weights`.
        insert_weight: [B, 1, H, W], see `train.inserts.Inserts`.
    """

    x_t: Tensor
    cxr: Tensor
    wanted: Tensor
    t: Tensor
    weights: Tensor
    insert_weight: Tensor


def paired_samples(diffusion: Diffusion, samples: Tensor, rng: np.random.Generator) -> PairedSamples:
    """Noise the samples of `Batches.draw_pairs`.

    Args:
        diffusion: makes training samples of the schedule.
        samples: [B, 5, H, W], see `Batches.draw_pairs`.
        rng: draws noise and times, the same for a sample without and with its inserts.
    """
    without, with_inserts, insert_weight = samples[:, 0:2], samples[:, 2:4], samples[:, 4:5]
    x_t, cxr, t, wanted, weights = diffusion.add_noise(without, rng)
    change = with_inserts[:, 1:2] - without[:, 1:2]
    a, s = diffusion.root_a[t].view(-1, 1, 1, 1), diffusion.root_s[t].view(-1, 1, 1, 1)
    # The noise is the same, so what the network should predict changes by a share of what the truth does.
    share = {"eps": torch.zeros_like(a), "v": -s, "x0": torch.ones_like(a)}[diffusion.schedule.objective]
    return PairedSamples(
        x_t=torch.stack([x_t, x_t + a * change], 1),
        cxr=torch.stack([cxr, with_inserts[:, 0:1]], 1),
        wanted=torch.stack([wanted, wanted + share * change], 1),
        t=t,
        weights=weights,
        insert_weight=insert_weight,
    )


def response_losses(
    trainee: Trainee, response: float, samples: PairedSamples, terms: dict[str, float]
) -> Iterator[Tensor]:
    """Yield the loss of each piece of a batch: both pictures' own error, and `response` times that of the change.

    Args:
        trainee: the network in training.
        response: weight of the second term.
        samples: from `paired_samples`.
        terms: both terms are added up in it, as `base` and `response`.
    """
    options, count = trainee.options, len(samples.t)
    fields = (samples.x_t, samples.cxr, samples.t, samples.wanted, samples.weights, samples.insert_weight)
    for noisy, condition, times, goal, weight, where in split_batch(options.accumulate, *fields):
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=options.bf16):
            out = trainee.model(noisy.flatten(0, 1), condition.flatten(0, 1), times.repeat_interleave(2))
        error = out.float() - goal.flatten(0, 1)
        base = weighted_error(error, weight.repeat_interleave(2, dim=0)) / (2 * count)
        difference = error[1::2] - error[::2]
        change = response * torch.sum(where * difference**2) / count
        for name, term in (("base", base), ("response", change)):
            terms[name] = terms.get(name, 0.0) + float(term.detach())
        yield base + change
