"""Stage 1: train the denoiser. One loop, readable from top to bottom.

Training follows the paper: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, conditioned on the clean X-ray,
squared error of what the network predicts (`Schedule.objective`): eps as in the paper, v, or x0 relative to its bone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bsdiff_rt.config import Preset, Schedule
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.sampling.schedule import alpha_bar
from train.checkpoint import last_checkpoint
from train.data import Batches
from train.dry_run import Estimate, Part, estimate
from train.loop import Trainee, TrainOptions, split_batch
from train.run import Run
from train.start import start_from
from train.validation import Validation

# Share of the training steps spent on the noisiest tenth of the diffusion when the objective can answer there (x0, v):
# a sampler of a handful of steps asks for little else.
NOISY_SHARE = 0.8

# Mean square of an image's bone, in the networks' [-1, 1]: of a typical image, and of one with hardly any, whose weight
# would otherwise grow without bound.
BONE_ENERGY, LITTLE_BONE_ENERGY = 0.02, 0.004

# What an image's mean counts beside the rest of its error. A scanner that tones soft tissue anew gives it a mean that
# cannot be told from the X-ray: guessing it only adds noise to what such images teach.
MEAN_SHARE = 0.2


def draw_times(rng: np.random.Generator, schedule: Schedule, count: int) -> Tensor:
    """`count` diffusion times, [B] int64 in [0, T): uniform for eps (the paper), else weighted to the noisy end."""
    times = rng.integers(0, schedule.train_steps, count)
    if schedule.objective != "eps":
        noisy = rng.integers(schedule.train_steps * 9 // 10, schedule.train_steps, count)
        times = np.where(rng.random(count) < NOISY_SHARE, noisy, times)
    return torch.from_numpy(times)


def target(schedule: Schedule, x_0: Tensor, eps: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """What the network should predict, with a = sqrt(alpha_bar_t), s = sqrt(1 - alpha_bar_t)."""
    return {"eps": eps, "v": a * eps - s * x_0, "x0": x_0}[schedule.objective]


def bone_weights(schedule: Schedule, pair: Tensor) -> Tensor:
    """Weights of each sample's squared error about its mean, and of its squared mean, [B, 2].

    What counts is the share of the bone left in (BSR), so x0's error is taken relative to the energy of the sample's
    bone; else images of strong bone alone say what is learned. The mean is apart because of scanners that tone soft
    tissue anew: there, most of what X-ray and truth differ by is one offset, which nobody can tell from the X-ray, and
    relative to it the bones hardly counted. The errors of eps and v are not the picture's: all 1.

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

    def noised(self, pair: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x_t, cxr, t, what the network should predict, and the weight of its error.

        Args:
            pair: [B, 2, H, W], X-ray and truth in [-1, 1].
            rng: draws the noise and the times.
        """
        cxr, x_0 = pair[:, 0:1], pair[:, 1:2]
        eps = torch.from_numpy(rng.standard_normal(x_0.shape, dtype=np.float32)).to(pair.device)
        t = draw_times(rng, self.schedule, len(pair)).to(pair.device)
        a, s = self.root_a[t].view(-1, 1, 1, 1), self.root_s[t].view(-1, 1, 1, 1)
        return a * x_0 + s * eps, cxr, t, target(self.schedule, x_0, eps, a, s), bone_weights(self.schedule, pair)


def denoiser_losses(
    trainee: Trainee, x_t: Tensor, cxr: Tensor, t: Tensor, wanted: Tensor, weights: Tensor
) -> Iterator[Tensor]:
    """Mean over the batch of each sample's weighted mean squared error, as a sum over the batch's pieces.

    `weights` are those of `bone_weights`, [B, 2].
    """
    options = trainee.options
    for noisy, condition, times, goal, weight in split_batch(options.accumulate, x_t, cxr, t, wanted, weights):
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=options.bf16):
            out = trainee.model(noisy, condition, times)
        error = out.float() - goal
        offset = torch.mean(error, dim=(1, 2, 3)) ** 2
        about_it = torch.mean(error**2, dim=(1, 2, 3)) - offset
        yield torch.sum(weight * torch.stack([about_it, offset], dim=1)) / len(x_t)


def train_denoiser(
    folder: Path,
    preset: Preset,
    schedule: Schedule,
    batches: Batches,
    validation: Validation,
    options: TrainOptions,
    size: int,
    start: str | None = None,
) -> Path:
    """Train until `options.steps`, resuming from the checkpoint in `folder` where there is one, else from `start`.

    Args:
        folder: of the run.
        preset: the network's shape.
        schedule: the diffusion, and what the network predicts.
        batches: makes the samples.
        validation: what checkpoints are judged on.
        options: of the run.
        size: side of the images, px.
        start: bundle whose weights a new run begins with; a resumed one does not open it.

    Returns: the checkpoint's path. Also writes denoiser.csv (loss, quality), denoiser_samples.png, tensorboard/.

    Raises:
        SettingsError: the checkpoint in `folder` is of other settings, or began with a bundle and now none is given; or
            a pair held out is among those that it, or the bundle, learned from.
    """
    torch.manual_seed(options.seed)
    network = Denoiser(preset.denoiser)
    header: dict[str, Any] = {"preset": preset.name, "schedule": asdict(schedule), "size": size}
    header |= batches.description() | validation.description()
    trained_on = header.pop("trained_on")
    last = last_checkpoint(folder, "denoiser")
    bundle = None if start is None or last else start_from(network, schedule, start)
    trainee = Trainee(network, options)
    judge = functools.partial(validation.denoiser, trainee.averaged)
    run = Run(folder, "denoiser", trainee, "psnr", judge, **header)
    began = None
    if last:
        began = run.restored.get("start")
        if (began is None) != (start is None):
            raise SettingsError(f"{last}: trained with start {began}, not {start}. Give the same, or another folder.")
        trained_on = run.restored.get("trained_on", trained_on)
    elif bundle:
        began = bundle.sha256
        trained_on = sorted({*trained_on, *bundle.manifest.training.get("trained_on", ())})
    check_held_out(validation, trained_on)
    run.header |= {"start": began, "trained_on": trained_on}
    diffusion = Diffusion(schedule, trainee.accelerator.device)

    def make(step: int) -> NDArray[np.float32]:
        count, crop = options.crop(step, size)
        return batches.batch(trainee.sample_index(step), count, size, crop)

    for index, pair in run.batches(make):
        noised = diffusion.noised(pair, np.random.default_rng([options.seed, index, 1]))
        loss = trainee.update(denoiser_losses(trainee, *noised))
        run.after_step({"loss": loss})
    return run.path


def check_held_out(validation: Validation, trained_on: Iterable[str]) -> None:
    """What a network learned from is no measure of it.

    Raises:
        SettingsError: one of the pairs held out is among those whose digests are given.
    """
    known = set(trained_on)
    if seen := [pair.name for pairs in validation.groups.values() for pair in pairs if pair.digest in known]:
        raise SettingsError(
            f"held out, but trained on, here or in the bundle it starts from: {', '.join(seen)}. Hold out other pairs, "
            "or none."
        )


def dry_run_denoiser(preset: Preset, options: TrainOptions, size: int) -> Estimate:
    """Estimate what `train_denoiser` would take on batches of whole images of `size` px. Writes nothing."""

    def inputs(count: int) -> tuple[Tensor, ...]:
        image = torch.zeros(count, 1, size, size)
        return image, image, torch.zeros(count, dtype=torch.int64)

    return estimate([Part(lambda: Denoiser(preset.denoiser), inputs)], options)
