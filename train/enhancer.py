"""Stage 2: train the enhancer on what stage 1 makes. One loop, readable from top to bottom.

Stage 1 is run once over a fixed set of augmented samples; its results are cached with the hash of its weights.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from bsdiff_rt.config import Preset, SamplerSettings, Schedule
from bsdiff_rt.errors import SettingsError, one_line
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.unet import Denoiser
from train.checkpoint import load_checkpoint
from train.data import Batches, Pair
from train.discriminator import CRITIC_COPIES, CRITIC_PASSES, Critic, build_critic
from train.dry_run import Estimate, Part, estimate
from train.loop import Trainee, TrainOptions, make_accelerator
from train.losses import HybridLoss, LossWeights, optimise
from train.perceptual import VGG16, VGG16_PASSES
from train.run import Run
from train.validation import Validation, run_stage_one

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageOne:
    """A trained stage 1: its averaged weights, in evaluation mode, and what it was trained for."""

    network: Denoiser
    preset: Preset
    schedule: Schedule
    sha256: str
    trained_on: frozenset[str] = frozenset()  # digests of X-rays (`data.xray_digest`)

    @classmethod
    def load(cls, path: Path, preset: Preset) -> StageOne:
        """From a checkpoint of `python -m train denoiser`.

        Raises:
            SettingsError: there is none, or it is of another network than the preset's.
        """
        state = load_checkpoint(path)
        network = Denoiser(preset.denoiser).eval()
        try:
            network.load_state_dict(state["averaged"])
            schedule = Schedule(**state["schedule"])
        except (RuntimeError, TypeError) as error:  # the preset, or the schedule's fields, changed between versions
            raise SettingsError(f"{path}: does not fit preset {preset.name} of this version; train it anew") from error
        digest = hashlib.sha256()
        for tensor in state["averaged"].values():
            digest.update(tensor.contiguous().numpy().tobytes())
        trained_on = frozenset(state.get("trained_on") or ())
        return cls(network, preset, schedule, digest.hexdigest(), trained_on)

    def check_held_out(self, held_out: Iterable[Pair]) -> None:
        """What it learned from is no measure of it.

        Raises:
            SettingsError: one of the pairs held out trained this stage 1.
        """
        known = [pair.name for pair in held_out if pair.digest in self.trained_on]
        if known:
            raise SettingsError(
                f"held out here, but stage 1 was trained on: {', '.join(known)}; give both stages the same --dataset, "
                "or the same --pairs and --hold-out"
            )


def _claim(partial: Path, path: Path) -> None:
    """Have the disk keep room for a file that was only given its length: written through memory where there is none, it
    would end the process with a bus error.

    Raises:
        SettingsError: there is none; the file is gone.
    """
    bytes_wanted = partial.stat().st_size
    try:
        with partial.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, bytes_wanted)
    except OSError as error:
        partial.unlink()
        raise SettingsError(
            f"{path}: stage 1's outputs take {bytes_wanted / 1e6:.0f} MB, which cannot be written ({error.strerror}); "
            "free some, or give fewer --samples"
        ) from None


def make_stage_one_outputs(
    folder: Path, stage: StageOne, batches: Batches, count: int, size: int, sampler: SamplerSettings
) -> NDArray[np.float16]:
    """Stage 1 outputs and truths of `count` augmented samples, [N, 2, S, S] float16 in [-1, 1]; cached in `folder`.

    The cache is known by stage 1's weights, the sampler and what the samples are made of. What is missing of it is
    made: an interrupted run goes on, and several processes share the work.

    Raises:
        SettingsError: the disk has no room for the cache, it is damaged, or an output of stage 1 is not finite.
    """
    key = hashlib.sha256(repr((stage.sha256, asdict(sampler), count, batches.fingerprint())).encode()).hexdigest()
    path = folder / f"stage1_{stage.sha256[:16]}_{key[:16]}.npy"
    accelerator = make_accelerator()
    if accelerator.is_main_process and not path.exists():
        logger.info("running stage 1 on %d samples, %s in %d steps", count, sampler.name, sampler.steps)
        partial = path.with_suffix(".partial")
        empty = np.lib.format.open_memmap(partial, "w+", np.float16, (count, 2, size, size))
        _claim(partial, path)
        empty[:] = np.nan  # not made yet
        empty.flush()
        os.replace(partial, path)
    accelerator.wait_for_everyone()
    outputs = _open_outputs(path)
    network = stage.network.to(accelerator.device)
    for i in range(accelerator.process_index, count, accelerator.num_processes):
        if not np.isnan(outputs[i]).any():
            continue
        cxr, soft_tissue = batches.batch(i, 1, size, size)[0]
        made = run_stage_one(network, stage.schedule, (cxr + 1) / 2, sampler) * 2 - 1
        if not np.isfinite(made).all():
            raise SettingsError(
                f"{folder / 'denoiser.pt'}: what it makes of sample {i} is not finite; train stage 1 anew, with a "
                "lower --learning-rate or --no-bf16"
            )
        outputs[i] = made, soft_tissue
    outputs.flush()
    accelerator.wait_for_everyone()
    return np.load(path)


def _open_outputs(path: Path) -> np.memmap[Any, np.dtype[np.float16]]:
    """The cache, to be written to.

    Raises:
        SettingsError: it was cut off, or is no array.
    """
    try:
        np.load(path, mmap_mode="r")  # opened to be written to, a file that was cut off would be filled up with zeros
    except (EOFError, ValueError) as error:
        raise SettingsError(f"{path}: damaged ({one_line(error)}); remove it, and it is made anew") from error
    return np.lib.format.open_memmap(path, "r+")


def train_enhancer(
    folder: Path,
    stage: StageOne,
    outputs: NDArray[np.float16],
    validation: Validation,
    options: TrainOptions,
    weights: LossWeights,
    vgg: VGG16 | None = None,
    clean_share: float = 0.0,
    samples: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Train until `options.steps`, resuming from the checkpoint in `folder` where there is one.

    Args:
        folder: of the run.
        stage: the stage 1 whose `outputs` these are ([N, 2, S, S] float16: output, truth).
        validation: what checkpoints are judged on.
        options: of the run.
        weights: of the loss; `vgg` is needed where the perceptual one is not 0.
        vgg: see `load_vgg16`.
        clean_share: share of the samples whose input is the truth itself.
        samples: what the checkpoint says of what `outputs` were made of (`Batches.description`).

    Returns: the checkpoint's path. Also writes enhancer.csv (losses, quality), enhancer_samples.png, tensorboard/.

    Raises:
        SettingsError: the checkpoint in `folder` belongs to another stage 1, other outputs or another loss.
    """
    torch.manual_seed(options.seed)
    size = outputs.shape[-1]
    trainee = Trainee(Enhancer(stage.preset.enhancer), options)
    loss = hybrid_loss(weights, vgg, trainee.accelerator)
    learned_from = {"data": hashlib.sha256(np.ascontiguousarray(outputs).data).hexdigest(), "losses": asdict(weights)}
    header = {"preset": stage.preset.name, "stage_one": stage.sha256, "size": size}
    header |= dict(samples) | learned_from | validation.description()
    judge = functools.partial(validation.both, stage.network, trainee.averaged)
    run = Run(folder, "enhancer", trainee, "psnr", judge, loss.state, **header)
    loss.resume(run.restored)

    def make(step: int) -> NDArray[np.float32]:
        count, crop = options.crop(step, size)
        rng = np.random.default_rng([options.seed, trainee.sample_index(step), 2])
        return _crops(rng, outputs, count, crop, clean_share)

    for _, pair in run.batches(make):
        run.after_step(optimise(trainee, loss, pair[:, 0:1], pair[:, 1:2]))
    return run.path


def dry_run_enhancer(
    preset: Preset, options: TrainOptions, size: int, weights: LossWeights, vgg: VGG16 | None
) -> Estimate:
    """Estimate what `train_enhancer` would take, without the making of stage 1's outputs. Writes nothing."""

    def inputs(count: int) -> tuple[Tensor, ...]:
        return (torch.zeros(count, 1, size, size),)

    parts = [Part(lambda: Enhancer(preset.enhancer), inputs)]
    if vgg is not None:
        parts.append(Part(VGG16, inputs, passes=VGG16_PASSES, copies=1))
    if weights.adversarial:
        parts.append(Part(build_critic, inputs, passes=CRITIC_PASSES, copies=CRITIC_COPIES))
    return estimate(parts, options)


def hybrid_loss(weights: LossWeights, vgg: VGG16 | None, accelerator: Accelerator) -> HybridLoss:
    """The loss with what it needs on the accelerator's device; a critic where the adversarial weight is not 0."""
    critic = Critic(weights.adversarial, accelerator) if weights.adversarial else None
    return HybridLoss(weights, vgg.to(accelerator.device) if vgg else None, critic)


def _crops(
    rng: np.random.Generator, outputs: NDArray[np.float16], count: int, crop: int, clean_share: float
) -> NDArray[np.float32]:
    """`count` random windows, flipped half the time, [count, 2, crop, crop] float32: input and truth."""
    batch = np.empty((count, 2, crop, crop), np.float32)
    free = outputs.shape[-1] - crop
    for sample in batch:
        top, left = rng.integers(0, free + 1, 2)
        sample[:] = outputs[rng.integers(len(outputs)), :, top : top + crop, left : left + crop]
        if rng.random() < clean_share:
            sample[0] = sample[1]
        if rng.random() < 0.5:
            sample[:] = sample[:, :, ::-1].copy()
    return batch
