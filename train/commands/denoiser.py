"""`python -m train denoiser`: train stage 1."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bsdiff_rt.config import PRESETS, Objective, ScheduleName
from train.commands.options import FROM_RECIPE, SharedOptions, share_options
from train.commands.setup import Samples, drop_none, find_preset, resolve_options
from train.denoiser import dry_run_denoiser, train_denoiser
from train.folders import claim_run_folder
from train.loop import fix_crop, make_accelerator
from train.validation import Validation


def denoiser(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoints, log and sample images.")],
    preset: Annotated[
        str | None, typer.Option(help=f"Network shape: {', '.join(PRESETS)}.", show_default=FROM_RECIPE)
    ] = None,
    objective: Annotated[
        Objective | None, typer.Option(help="What the model predicts.", show_default=FROM_RECIPE)
    ] = None,
    schedule: Annotated[ScheduleName | None, typer.Option(help="Noise schedule.", show_default=FROM_RECIPE)] = None,
    size: Annotated[int, typer.Option(min=16, help="Side of the images, px.")] = 256,
    crop: Annotated[
        int | None, typer.Option(min=16, help="Side of the training crops, px.", show_default="grows, as in the recipe")
    ] = None,
    response: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Weight of the error of what added inserts change in the result.", show_default=FROM_RECIPE
        ),
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="Start from the weights of this bundle: `demo` or a bundle folder.")
    ] = None,
    shared: SharedOptions = SharedOptions(),  # noqa: B008  # frozen
) -> None:
    """Train stage 1. The same command resumes an interrupted run."""
    samples = Samples.load(shared, size)
    recipe = samples.recipe
    crops = None if crop is None else fix_crop(crop, size)
    options = resolve_options(recipe, recipe.denoiser, len(samples.train), shared, crops)
    options.crop(0, size)  # refuse a wrong size before phantoms are drawn
    diffusion = replace(recipe.schedule, **drop_none(name=schedule, objective=objective))
    shape = find_preset(preset or recipe.preset)
    if shared.dry_run:
        typer.echo(dry_run_denoiser(shape, options, size))
        return
    with make_accelerator().main_process_first():
        claim_run_folder(output)
    batches = samples.make_batches(output, size, shared.seed)
    validation = Validation(samples.choose_groups(size, options.patience), diffusion, recipe.validation)
    weight = recipe.response if response is None else response
    train_denoiser(output, shape, diffusion, batches, validation, options, size, start, weight)


denoiser_command = share_options(denoiser)
