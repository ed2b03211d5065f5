"""Train stage 1, the denoiser. The training loop reads from top to bottom.

Training follows the paper: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, conditioned on the clean X-ray. The
loss is the squared error of what the model predicts (`Schedule.objective`): eps as in the paper, v, or x0 relative to
its bone.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.config import Preset, Schedule
from bsdiff_rt.errors import BundleError, SettingsError
from bsdiff_rt.networks.unet import Denoiser
from train.checkpoint import last_checkpoint
from train.data import Batches
from train.diffusion import Diffusion, weighted_error
from train.dry_run import Estimate, Part, estimate
from train.loop import Trainee, TrainOptions, split_batch
from train.response import paired_samples, response_losses
from train.run import Run
from train.start import start_from
from train.validation import Validation

logger = logging.getLogger(__name__)


def denoiser_losses(
    trainee: Trainee, x_t: Tensor, cxr: Tensor, t: Tensor, wanted: Tensor, weights: Tensor
) -> Iterator[Tensor]:
    """Yield the batch's mean of each sample's weighted mean squared error, as terms of a sum over the batch's parts.

    `weights` are those of `bone_weights`, [B, 2].
    """
    options = trainee.options
    for noisy, condition, times, goal, weight in split_batch(options.accumulate, x_t, cxr, t, wanted, weights):
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=options.bf16):
            out = trainee.model(noisy, condition, times)
        yield weighted_error(out.float() - goal, weight) / len(x_t)


def train_denoiser(
    folder: Path,
    preset: Preset,
    schedule: Schedule,
    batches: Batches,
    validation: Validation,
    options: TrainOptions,
    size: int,
    start: str | None = None,
    response: float = 0.0,
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
        response: weight of the error of what inserts change (train/response.py); 0 leaves it out.

    Returns: the checkpoint's path. Also writes denoiser.csv (loss, quality), denoiser_samples.png, tensorboard/.

    Raises:
        SettingsError: the checkpoint in `folder` is of other settings, or began with a bundle and now none is given; or
            a pair held out is among those that it, or the bundle, learned from.
    """
    torch.manual_seed(options.seed)
    network = Denoiser(preset.denoiser)
    header: dict[str, Any] = {"preset": preset.name, "schedule": asdict(schedule), "size": size}
    header |= batches.description() | validation.description() | {"response": response}
    run = _begin(folder, network, schedule, options, validation, header, start)
    trainee = run.trainee
    diffusion = Diffusion(schedule, trainee.accelerator.device)

    def make(step: int) -> NDArray[np.float32]:
        count, crop = options.crop(step, size)
        if response:  # each sample is two images
            return batches.draw_pairs(trainee.sample_index(step), max(1, count // 2), size, crop)
        return batches.batch(trainee.sample_index(step), count, size, crop)

    for index, samples in run.batches(make):
        rng = np.random.default_rng([options.seed, index, 1])
        terms: dict[str, float] = {}
        if response:
            losses = response_losses(trainee, response, paired_samples(diffusion, samples, rng), terms)
        else:
            losses = denoiser_losses(trainee, *diffusion.add_noise(samples, rng))
        run.after_step({"loss": trainee.update(losses), **terms})
    return run.path


def _begin(
    folder: Path,
    network: Denoiser,
    schedule: Schedule,
    options: TrainOptions,
    validation: Validation,
    header: dict[str, Any],
    start: str | None,
) -> Run:
    """Begin or resume a run: see `train_denoiser`. `header` holds what its checkpoint must agree with."""
    trained_on = header.pop("trained_on")
    last = last_checkpoint(folder, "denoiser")
    bundle = None if start is None or last else start_from(network, schedule, start)
    trainee = Trainee(network, options, channels_last=True)
    judge = functools.partial(validation.denoiser, trainee.averaged)
    run = Run(folder, "denoiser", trainee, "psnr", judge, **header)
    began = None
    if last:
        began = run.restored.get("start")
        if (began is None) != (start is None) or (start and began != _identify_start(start, began)):
            raise SettingsError(f"{last}: trained with start {began}, not {start}. Give the same, or another folder.")
        trained_on = run.restored.get("trained_on", trained_on)
    elif bundle:
        began = bundle.sha256
        trained_on = sorted({*trained_on, *bundle.manifest.training.get("trained_on", ())})
    check_held_out(validation, trained_on)
    run.header |= {"start": began, "trained_on": trained_on}
    return run


def _identify_start(start: str, began: str | None) -> str | None:
    """Return the hash of the bundle that a resumed run names as its start; `began` if it is no longer there."""
    try:
        return open_bundle(start).sha256
    except BundleError as error:
        logger.warning("%s The run goes on from its checkpoint.", error)
        return began


def check_held_out(validation: Validation, trained_on: Iterable[str]) -> None:
    """Check that no held-out pair is among the X-rays trained on.

    Raises:
        SettingsError: one is.
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
