"""Train a network of the paper's Table 1 on the same pairs as BS-Diff, and export it for benchmarks/table1.py."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bsdiff_rt.errors import SettingsError
from train.comparators import COMPARATORS, Comparator
from train.data import Batches
from train.discriminator import CRITIC_COPIES, CRITIC_PASSES, Critic, build_critic
from train.dry_run import Estimate, Part, estimate
from train.loop import Trainee, TrainOptions
from train.losses import HybridLoss, optimise
from train.run import Run
from train.validation import Validation

OPSET = 18


def train_comparator(
    folder: Path, name: str, batches: Batches, validation: Validation, options: TrainOptions, size: int, crop: int
) -> Path:
    """Train a comparator, or continue the training in `folder`.

    Args:
        folder: of the run.
        name: of the comparator, a key of COMPARATORS.
        batches: makes the samples.
        validation: judges checkpoints.
        options: of the run.
        size: side of the images, px.
        crop: side of the crops trained on, px.

    Returns:
        The path of NAME.onnx, which holds the averaged network. The checkpoint and the log are in the same folder.
    """
    torch.manual_seed(options.seed)
    comparator = COMPARATORS[name]
    trainee = Trainee(comparator.build(size), options)
    loss = build_loss(comparator, trainee)
    header = {"comparator": name, "size": size} | batches.description() | validation.description()
    judge = functools.partial(validation.direct, trainee.averaged)
    run = Run(folder, name, trainee, "psnr", judge, loss.state, **header)
    loss.resume(run.restored)

    def make(step: int) -> NDArray[np.float32]:
        return batches.batch(trainee.sample_index(step), options.images, size, crop)

    for _, pair in run.batches(make):
        run.after_step(optimise(trainee, loss, pair[:, 0:1], pair[:, 1:2]))
    graph = folder / f"{name}.onnx"
    if trainee.accelerator.is_main_process:
        trainee.restore(run.path)  # what early stopping kept
        export(trainee.averaged, graph, size)
    return graph


def dry_run_comparator(name: str, options: TrainOptions, size: int, crop: int) -> Estimate:
    """Estimate what `train_comparator` would take. Writes nothing."""
    comparator = COMPARATORS[name]

    def inputs(count: int) -> tuple[Tensor, ...]:
        return (torch.zeros(count, 1, crop, crop),)

    parts = [Part(lambda: comparator.build(size), inputs)]
    if comparator.losses.adversarial:
        channels = comparator.view_channels
        parts.append(
            Part(
                lambda: build_critic(channels),
                lambda count: (torch.zeros(count, channels, crop, crop),),
                passes=CRITIC_PASSES,
                copies=CRITIC_COPIES,
            )
        )
    return estimate(parts, options)


def choose_crop(name: str, size: int, crop: int | None) -> int:
    """Return the side of the crops that a comparator is trained on, px.

    Args:
        name: of the comparator.
        size: side of the images, px.
        crop: the side asked for; None for whole images.

    Raises:
        SettingsError: it is larger than the image, or the network does not take such images.
    """
    side, multiple = crop or size, COMPARATORS[name].multiple(size)
    if side > size:
        raise SettingsError(f"--crop {side} is more than --size {size}. Choose at most that.")
    if side % multiple or size % multiple:
        raise SettingsError(f"{name}: --crop {side} at --size {size}. Both must be multiples of {multiple} px.")
    return side


def build_loss(comparator: Comparator, trainee: Trainee) -> HybridLoss:
    """Return the comparator's loss, with a discriminator if it has one."""
    weights, critic = comparator.losses, None
    if weights.adversarial:
        critic = Critic(weights.adversarial, trainee.accelerator, comparator.view_channels, comparator.view)
    return HybridLoss(weights, critic=critic)


def export(network: nn.Module, path: Path, size: int) -> None:
    """Write a network to one ONNX file.

    The input `cxr` and the output `out` are [B, 1, size, size], float32, in [-1, 1], for any batch size B.
    """
    example = torch.zeros(2, 1, size, size)
    partial = path.with_suffix(".partial")
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):  # their housekeeping helps nobody
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.cpu().eval(),
            (example,),
            partial,
            dynamo=True,
            external_data=False,
            opset_version=OPSET,
            input_names=["cxr"],
            output_names=["out"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            verbose=False,
        )
    os.replace(partial, path)
