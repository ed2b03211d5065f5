"""Stage 1: train the denoiser. One loop, readable from top to bottom.

Training follows the paper: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, conditioned on the clean X-ray,
mean squared error on what the network predicts (`Schedule.objective`: eps as in the paper, v or x0).
"""

from __future__ import annotations

import csv
import logging
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bsdiff_rt.config import Preset, Schedule
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.schedule import alpha_bar
from train.data import Batches
from train.loop import Trainee, TrainOptions, ahead
from train.validation import Validation

logger = logging.getLogger(__name__)

# Share of the training steps spent on the noisiest tenth of the diffusion when the objective can answer there (x0, v):
# a sampler of a handful of steps asks for little else.
NOISY_SHARE = 0.5


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


def train_denoiser(
    folder: Path,
    preset: Preset,
    schedule: Schedule,
    batches: Batches,
    validation: Validation,
    options: TrainOptions,
    size: int,
) -> Path:
    """Train until `options.steps`, resuming from `folder`/denoiser.pt where there is one.

    Returns: the checkpoint's path. Also writes denoiser.csv (step, loss, quality) and denoiser_samples.png.
    """
    torch.manual_seed(options.seed)
    trainee = Trainee(Denoiser(preset.denoiser), options)
    path = folder / "denoiser.pt"
    if path.exists():
        trainee.restore(path)
        logger.info("resuming at step %d", trainee.step)
    tables = alpha_bar(schedule)
    root_a, root_s = (torch.from_numpy(np.sqrt(table)).float() for table in (tables, 1.0 - tables))

    started, losses = time.monotonic(), []

    def make(step: int) -> NDArray[np.float32]:
        count, crop = options.crop(step, size)
        return batches.batch(step, count, size, crop)

    for step, pair in ahead(make, trainee.step, options.steps):
        rng = np.random.default_rng([options.seed, step, 1])
        cxr, x_0 = pair[:, 0:1], pair[:, 1:2]
        eps = torch.from_numpy(rng.standard_normal(x_0.shape, dtype=np.float32))
        t = draw_times(rng, schedule, len(pair))
        a, s = root_a[t].view(-1, 1, 1, 1), root_s[t].view(-1, 1, 1, 1)
        x_t = a * x_0 + s * eps
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            out = trainee.network(x_t, cxr, t)
        loss = torch.mean((out.float() - target(schedule, x_0, eps, a, s)) ** 2)
        trainee.update(loss)
        losses.append(float(loss.detach()))
        if trainee.step % options.save_every == 0 or trainee.step == options.steps:
            trainee.save(path, preset=preset.name, schedule=asdict(schedule), size=size)
            quality = validation.denoiser(trainee.averaged, folder / "denoiser_samples.png")
            record(folder / "denoiser.csv", trainee.step, float(np.mean(losses)), quality)
            pace = (time.monotonic() - started) / len(losses)
            logger.info("step %d, loss %.5f, %.2f s per step, %s", trainee.step, np.mean(losses), pace, quality)
            started, losses = time.monotonic(), []
    return path


def record(path: Path, step: int, loss: float, quality: dict[str, float]) -> None:
    """Append one row to a training log, with a header when the file is new."""
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(["time", "step", "loss", *quality])
        figures = (f"{value:.4f}" for value in quality.values())
        writer.writerow([time.strftime("%Y-%m-%dT%H:%M:%S"), step, f"{loss:.6f}", *figures])
