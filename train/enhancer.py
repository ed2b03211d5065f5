"""Stage 2: train the enhancer on what stage 1 makes. One loop, readable from top to bottom.

Stage 1 is run once over a fixed set of augmented samples; its results are cached with the hash of its weights. A share
of the batches shows the true soft tissue as input instead: an autoencoder that cannot return a sharp image unchanged
would blur whatever it is given.
"""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bsdiff_rt.config import Preset, Schedule
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.unet import Denoiser
from train.data import Batches
from train.denoiser import record
from train.loop import Trainee, TrainOptions, ahead, load_checkpoint
from train.losses import enhancer_loss
from train.validation import Validation, few_step

logger = logging.getLogger(__name__)

CLEAN_SHARE = 0.25  # of the samples whose input is the truth itself


@dataclass(frozen=True)
class StageOne:
    """A trained stage 1: its averaged weights, in evaluation mode, and what it was trained for."""

    network: Denoiser
    preset: Preset
    schedule: Schedule
    sha256: str

    @classmethod
    def load(cls, path: Path, preset: Preset) -> StageOne:
        """From a checkpoint of `python -m train denoiser`."""
        state = load_checkpoint(path)
        network = Denoiser(preset.denoiser).eval()
        network.load_state_dict(state["averaged"])
        digest = hashlib.sha256()
        for tensor in state["averaged"].values():
            digest.update(tensor.contiguous().numpy().tobytes())
        return cls(network, preset, Schedule(**state["schedule"]), digest.hexdigest())


def stage_one_outputs(folder: Path, stage: StageOne, batches: Batches, count: int, size: int) -> NDArray[np.float16]:
    """Stage 1 outputs and truths of `count` augmented samples, [N, 2, S, S] float16 in [-1, 1]; cached in `folder`."""
    path = folder / f"stage1_{stage.sha256[:16]}_{count}_{size}.npy"
    if path.exists():
        return np.load(path)
    logger.info("running stage 1 on %d samples", count)
    outputs = np.empty((count, 2, size, size), np.float16)
    for i in range(count):
        cxr, soft_tissue = batches.batch(i, 1, size, size)[0]
        outputs[i] = few_step(stage.network, stage.schedule, (cxr + 1) / 2) * 2 - 1, soft_tissue
    np.save(path, outputs)
    return outputs


def train_enhancer(
    folder: Path,
    stage: StageOne,
    outputs: NDArray[np.float16],
    validation: Validation,
    options: TrainOptions,
) -> Path:
    """Train until `options.steps`, resuming from `folder`/enhancer.pt where there is one.

    Returns: the checkpoint's path. Also writes enhancer.csv (step, loss, quality) and enhancer_samples.png.
    """
    torch.manual_seed(options.seed)
    trainee = Trainee(Enhancer(stage.preset.enhancer), options)
    path = folder / "enhancer.pt"
    if path.exists():
        trainee.restore(path)
        logger.info("resuming at step %d", trainee.step)
    size = outputs.shape[-1]

    def make(step: int) -> NDArray[np.float32]:
        count, crop = options.crop(step, size)
        return _crops(np.random.default_rng([options.seed, step, 2]), outputs, count, crop)

    started, losses = time.monotonic(), []
    for _, pair in ahead(make, trainee.step, options.steps):
        x, soft_tissue = pair[:, 0:1], pair[:, 1:2]
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            predicted = trainee.network(x)
        loss = enhancer_loss(predicted.float(), soft_tissue)
        trainee.update(loss)
        losses.append(float(loss.detach()))
        if trainee.step % options.save_every == 0 or trainee.step == options.steps:
            trainee.save(path, preset=stage.preset.name, stage_one=stage.sha256, size=size)
            quality = validation.both(stage.network, trainee.averaged, folder / "enhancer_samples.png")
            record(folder / "enhancer.csv", trainee.step, float(np.mean(losses)), quality)
            pace = (time.monotonic() - started) / len(losses)
            logger.info("step %d, loss %.5f, %.2f s per step, %s", trainee.step, np.mean(losses), pace, quality)
            started, losses = time.monotonic(), []
    return path


def _crops(rng: np.random.Generator, outputs: NDArray[np.float16], count: int, crop: int) -> NDArray[np.float32]:
    """`count` random windows, flipped half the time, [count, 2, crop, crop] float32: input and truth."""
    batch = np.empty((count, 2, crop, crop), np.float32)
    free = outputs.shape[-1] - crop
    for sample in batch:
        top, left = rng.integers(0, free + 1, 2)
        sample[:] = outputs[rng.integers(len(outputs)), :, top : top + crop, left : left + crop]
        if rng.random() < CLEAN_SHARE:
            sample[0] = sample[1]
        if rng.random() < 0.5:
            sample[:] = sample[:, :, ::-1].copy()
    return batch
