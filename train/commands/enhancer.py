"""`python -m train enhancer`: train stage 2."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bsdiff_rt.errors import SettingsError
from train.checkpoint import load_checkpoint
from train.commands.options import FROM_RECIPE, SharedOptions, share_options
from train.commands.setup import Samples, drop_none, find_preset, find_recipe, resolve_options
from train.enhancer import StageOne, dry_run_enhancer, make_stage_one_outputs, train_enhancer
from train.perceptual import WEIGHTS_FILE, load_vgg16
from train.recipe import VERSIONS_PER_PAIR
from train.validation import Validation


def enhancer(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder that holds denoiser.pt. Results go there.")],
    samples: Annotated[
        int | None, typer.Option(min=1, help="Number of augmented samples for stage 1.", show_default=FROM_RECIPE)
    ] = None,
    stage_one_steps: Annotated[
        int | None, typer.Option(min=1, help="Denoiser steps of stage 1 on each sample.", show_default=FROM_RECIPE)
    ] = None,
    perceptual: Annotated[
        float | None, typer.Option(min=0.0, help="Weight of the perceptual term.", show_default=FROM_RECIPE)
    ] = None,
    adversarial: Annotated[
        float | None, typer.Option(min=0.0, help="Weight of the adversarial term.", show_default=FROM_RECIPE)
    ] = None,
    vgg16: Annotated[
        Path | None, typer.Option(help=f"File {WEIGHTS_FILE} of torchvision.", show_default="in torch.hub's cache")
    ] = None,
    shared: SharedOptions = SharedOptions(),  # noqa: B008  # frozen
) -> None:
    """Train stage 2 on the outputs of the stage 1 in the same folder. The same command resumes an interrupted run."""
    losses = replace(find_recipe(shared.recipe).losses, **drop_none(perceptual=perceptual, adversarial=adversarial))
    vgg = load_vgg16(vgg16) if losses.perceptual else None  # early: a missing file must not stop the run hours later
    path = output / "denoiser.pt"
    header = load_checkpoint(path)
    if not {"preset", "size", "schedule"} <= header.keys():
        raise SettingsError(f"{path}: not a checkpoint of stage 1. Write one with `python -m train denoiser`.")
    shape, size = find_preset(header["preset"]), header["size"]
    data = Samples.load(shared, size)
    recipe = data.recipe
    options = resolve_options(recipe, recipe.enhancer, len(data.train), shared, None)
    if shared.dry_run:
        typer.echo(dry_run_enhancer(shape, options, size, losses, vgg))
        return
    stage = StageOne.load(path, shape)
    stage.check_held_out(data.held_out)
    batches = data.make_batches(output, size, shared.seed + 1)
    check_clahe(path, header.get("clahe"), batches.clahe)
    sampler = replace(recipe.stage_one, steps=stage_one_steps or recipe.stage_one.steps)
    count = samples or recipe.samples or VERSIONS_PER_PAIR * len(data.train)
    outputs = make_stage_one_outputs(output, stage, batches, count, size, sampler)
    validation = Validation(data.choose_groups(size, options.patience), stage.schedule, recipe.validation)
    train_enhancer(output, stage, outputs, validation, options, losses, vgg, recipe.clean_share, batches.description())


def check_clahe(path: Path, stage_one: float | None, stage_two: float | None) -> None:
    """Raise SettingsError if the two stages would learn from images of different CLAHE clip limits."""
    if None not in (stage_one, stage_two) and stage_one != stage_two:
        raise SettingsError(
            f"{path}: trained on CLAHE {stage_one:g}, but this data set has {stage_two:g}. Give both stages the same "
            "--dataset."
        )


enhancer_command = share_options(enhancer)
