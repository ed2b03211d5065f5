"""Train stage 2, the enhancer, on the outputs of stage 1. The training loop reads from top to bottom.

Stage 1 is run once over a fixed set of augmented samples. The results are kept in a file named by the hash of its
weights.
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
    """A trained stage 1.

    Attributes:
        network: with its averaged weights, in evaluation mode.
        preset: shape of both networks.
        schedule: the diffusion it was trained for.
        sha256: of its averaged weights.
        trained_on: digests of the X-rays it was trained on (`xray_digest`).
    """

    network: Denoiser
    preset: Preset
    schedule: Schedule
    sha256: str
    trained_on: frozenset[str] = frozenset()  # digests of X-rays (`data.xray_digest`)

    @classmethod
    def load(cls, path: Path, preset: Preset) -> StageOne:
        """Load a checkpoint of `python -m train denoiser`.

        Raises:
            SettingsError: there is none, or it does not fit the preset.
        """
        state = load_checkpoint(path)
        network = Denoiser(preset.denoiser).eval()
        try:
            network.load_state_dict(state["averaged"])
            schedule = Schedule(**state["schedule"])
        except (RuntimeError, TypeError) as error:  # the preset, or the schedule's fields, changed between versions
            raise SettingsError(
                f"{path}: does not fit preset {preset.name} of this version. Train it again."
            ) from error
        digest = hashlib.sha256()
        for tensor in state["averaged"].values():
            digest.update(tensor.contiguous().numpy().tobytes())
        trained_on = frozenset(state.get("trained_on") or ())
        return cls(network, preset, schedule, digest.hexdigest(), trained_on)

    def check_held_out(self, held_out: Iterable[Pair]) -> None:
        """Check that no held-out pair trained this stage 1.

        Raises:
            SettingsError: one did.
        """
        known = [pair.name for pair in held_out if pair.digest in self.trained_on]
        if known:
            raise SettingsError(
                f"held out here, but stage 1 was trained on: {', '.join(known)}. Give both stages the same --dataset, "
                "or the same --pairs and --hold-out."
            )


def _claim(partial: Path, path: Path) -> None:
    """Reserve disk space for a file that has its full length but no content yet.

    Without it, a full disk would end the process with a bus error when the file is written through memory.

    Raises:
        SettingsError: there is no space. The file is removed.
    """
    bytes_wanted = partial.stat().st_size
    try:
        with partial.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, bytes_wanted)
    except OSError as error:
        partial.unlink()
        raise SettingsError(
            f"{path}: stage 1's outputs take {bytes_wanted / 1e6:.0f} MB, which cannot be written ({error.strerror}). "
            "Make room, or give fewer --samples."
        ) from None


def make_stage_one_outputs(
    folder: Path, stage: StageOne, batches: Batches, count: int, size: int, sampler: SamplerSettings
) -> NDArray[np.float16]:
    """Run stage 1 on augmented samples, or read the results from `folder`.

    The file is named by stage 1's weights, the sampler and the samples. An interrupted call continues, and several
    processes share the work.

    Args:
        folder: of the run.
        stage: the stage 1 to run.
        batches: makes the samples.
        count: number of samples, N.
        size: side of the images, S, px.
        sampler: of stage 1.

    Returns:
        Outputs and truths, [N, 2, S, S] float16 in [-1, 1].

    Raises:
        SettingsError: the disk is full, the file is damaged, or an output of stage 1 is not finite.
    """
    parts = (stage.sha256, asdict(sampler), count, batches.fingerprint(), batches.projected_share)
    key = hashlib.sha256(repr(parts).encode()).hexdigest()
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
                f"{folder / 'denoiser.pt'}: its result for sample {i} is not finite. Train stage 1 again with a "
                "lower --learning-rate or --no-bf16."
            )
        outputs[i] = made, soft_tissue
    outputs.flush()
    accelerator.wait_for_everyone()
    return np.load(path)


def _open_outputs(path: Path) -> np.memmap[Any, np.dtype[np.float16]]:
    """Open the file of stage 1's outputs for writing.

    Raises:
        SettingsError: it is cut off, or no array.
    """
    try:
        np.load(path, mmap_mode="r")  # opened to be written to, a file that was cut off would be filled up with zeros
    except (EOFError, ValueError) as error:
        raise SettingsError(f"{path}: damaged ({one_line(error)}). Remove it, and it is made again.") from error
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
    """Train stage 2, or continue the training in `folder`. Also writes enhancer.csv, enhancer_samples.png and
    tensorboard/.

    Args:
        folder: of the run.
        stage: the stage 1 that made `outputs`.
        outputs: stage 1's outputs and truths, [N, 2, S, S] float16 in [-1, 1].
        validation: judges checkpoints.
        options: of the run.
        weights: of the loss. The perceptual term needs `vgg`.
        vgg: VGG-16 with its weights (`load_vgg16`).
        clean_share: share of the samples whose input is the truth.
        samples: description of the samples behind `outputs`, for the checkpoint.

    Returns:
        The path of the checkpoint.

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
    """Return the loss with its networks on the accelerator's device. It has a critic if the adversarial weight is not
    0.
    """
    critic = Critic(weights.adversarial, accelerator) if weights.adversarial else None
    return HybridLoss(weights, vgg.to(accelerator.device) if vgg else None, critic)


def _crops(
    rng: np.random.Generator, outputs: NDArray[np.float16], count: int, crop: int, clean_share: float
) -> NDArray[np.float32]:
    """Cut `count` random windows, half of them flipped: [count, 2, crop, crop] float32, input and truth."""
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
