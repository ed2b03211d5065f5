"""`python -m train`: phantoms, the denoiser (stage 1), the enhancer (stage 2), or the whole demo model."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import typer
from numpy.typing import NDArray

from bsdiff_rt.config import PRESETS, Objective, Schedule, ScheduleName
from bsdiff_rt.errors import BsdiffError, SettingsError
from train.data import Augmentation, Batches, Pair, find_pairs, load_pair
from train.denoiser import train_denoiser
from train.enhancer import StageOne, stage_one_outputs, train_enhancer
from train.loop import TrainOptions, load_checkpoint
from train.phantom_dicom import write_cr
from train.phantoms import phantom, write_pairs
from train.validation import Validation

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
logger = logging.getLogger("train")

DEMO_PHANTOMS, DEMO_DENOISER_STEPS, DEMO_ENHANCER_STEPS = 900, 6000, 1500
HELD_OUT_PHANTOM_SEED = 10_000_000  # phantoms from here on are never trained on


def phantom_pool(folder: Path, count: int, size: int) -> NDArray[np.uint8]:
    """Phantoms 0 .. count - 1, [N, 2, size, size] uint8; kept in `folder`, extended when more are asked for."""
    path = folder / f"phantoms_{size}.npy"
    pool = np.load(path) if path.exists() else np.empty((0, 2, size, size), np.uint8)
    if len(pool) < count:
        logger.info("making %d phantoms", count - len(pool))
        new = [phantom(seed, size) for seed in range(len(pool), count)]
        stacked = np.stack([np.stack([p.cxr, p.soft_tissue]) for p in new])
        pool = np.concatenate([pool, np.rint(stacked * 255).astype(np.uint8)])
        np.save(path, pool)
    return pool[:count]


def held_out_phantoms(count: int, size: int) -> list[Pair]:
    """Phantoms that no training sees."""
    made = [phantom(HELD_OUT_PHANTOM_SEED + i, size) for i in range(count)]
    return [Pair(f"phantom{i}", p.cxr, p.soft_tissue, p.soft_tissue) for i, p in enumerate(made)]


def split_pairs(folder: Path | None, hold_out: list[str], size: int) -> tuple[list[Pair], list[Pair]]:
    """Training pairs, and held-out pairs at the network's size."""
    if folder is None:
        return [], []
    found = find_pairs(folder)
    unknown = set(hold_out) - {name for name, _, _ in found}
    if unknown:
        raise SettingsError(f"--hold-out {', '.join(sorted(unknown))}: no such pair in {folder}")
    train = [load_pair(*entry) for entry in found if entry[0] not in hold_out]
    held_out = [load_pair(*entry, size=size) for entry in found if entry[0] in hold_out]
    return train, held_out


@app.command()
def denoiser(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoints, log and sample grids.")],
    pairs: Annotated[Path | None, typer.Option(help="Folder of NAME_cxr.* and NAME_soft_tissue.*.")] = None,
    phantoms: Annotated[int, typer.Option(min=0, help="Phantoms to train on.")] = 2000,
    hold_out: Annotated[list[str] | None, typer.Option(help="Pair kept for validation; repeatable.")] = None,
    preset: Annotated[str, typer.Option(help=f"Network shape: {', '.join(PRESETS)}.")] = "demo",
    objective: Annotated[Objective, typer.Option(help="What the network predicts.")] = "eps",
    schedule: Annotated[ScheduleName, typer.Option(help="Noise schedule.")] = "cosine",
    size: Annotated[int, typer.Option(min=16, help="Side of the images, px.")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = TrainOptions.steps,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Peak learning rate.")] = TrainOptions.learning_rate,
    real_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of real samples in a batch.")] = 0.6,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = TrainOptions.save_every,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
) -> None:
    """Train stage 1; resumes where the folder holds a checkpoint."""
    output.mkdir(parents=True, exist_ok=True)
    options = replace(TrainOptions(), steps=steps, learning_rate=learning_rate, seed=seed, save_every=save_every)
    diffusion = Schedule(name=schedule, objective=objective)
    real, held_out = split_pairs(pairs, hold_out or [], size)
    groups = {"phantoms": held_out_phantoms(8, size)} | ({"pairs": held_out} if held_out else {})
    batches = Batches(real, phantom_pool(output, phantoms, size), real_share, Augmentation(), seed)
    train_denoiser(output, PRESETS[preset], diffusion, batches, Validation(groups, diffusion), options, size)


@app.command()
def enhancer(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder that holds denoiser.pt; results go there.")],
    pairs: Annotated[Path | None, typer.Option(help="Folder of NAME_cxr.* and NAME_soft_tissue.*.")] = None,
    phantoms: Annotated[int, typer.Option(min=0, help="Phantoms to train on.")] = 2000,
    hold_out: Annotated[list[str] | None, typer.Option(help="Pair kept for validation; repeatable.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Augmented samples stage 1 is run on.")] = 600,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 2000,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Peak learning rate.")] = TrainOptions.learning_rate,
    real_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of real samples in a batch.")] = 0.6,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = TrainOptions.save_every,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
) -> None:
    """Train stage 2 on what the stage 1 in the same folder makes; resumes where the folder holds a checkpoint."""
    header = load_checkpoint(output / "denoiser.pt")
    stage, size = StageOne.load(output / "denoiser.pt", PRESETS[header["preset"]]), header["size"]
    options = TrainOptions(steps=steps, learning_rate=learning_rate, seed=seed, save_every=save_every)
    real, held_out = split_pairs(pairs, hold_out or [], size)
    groups = {"phantoms": held_out_phantoms(8, size)} | ({"pairs": held_out} if held_out else {})
    batches = Batches(real, phantom_pool(output, phantoms, size), real_share, Augmentation(), seed + 1)
    outputs = stage_one_outputs(output, stage, batches, samples, size)
    train_enhancer(output, stage, outputs, Validation(groups, stage.schedule), options)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything; an interrupted run resumes.")],
    pairs: Annotated[Path | None, typer.Option(help="Folder of real pairs; without it, phantoms alone.")] = None,
) -> None:
    """Train both stages as the bundled demo model was trained (docs/model-card.md); hours on two cores."""
    denoiser(output, pairs, phantoms=DEMO_PHANTOMS, objective="x0", steps=DEMO_DENOISER_STEPS)
    enhancer(output, pairs, phantoms=DEMO_PHANTOMS, steps=DEMO_ENHANCER_STEPS)


@app.command("phantoms")
def make_phantoms(
    folder: Annotated[Path, typer.Argument(help="Where NAME_cxr.png and NAME_soft_tissue.png are written.")],
    count: Annotated[int, typer.Option(min=1, help="Number of pairs.")] = 10,
    size: Annotated[int, typer.Option(min=64, help="Side of the images, px.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first one; the rest follow.")] = HELD_OUT_PHANTOM_SEED,
    dicom: Annotated[bool, typer.Option("--dicom", help="Also NAME_cxr.dcm: CR, 14 bits, MONOCHROME1.")] = False,
) -> None:
    """Write phantom pairs; by default those that no training sees."""
    for i, name in enumerate(write_pairs(folder, count, seed, size)):
        if dicom:
            write_cr(folder / f"{name}_cxr.dcm", phantom(seed + i, size).cxr, name)


def main() -> None:
    """Entry point: library errors become one line and their exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    cv2.setNumThreads(1)
    try:
        app()
    except BsdiffError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
