"""`python -m train comparator`: train a network of the paper's Table 1."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bsdiff_rt.errors import SettingsError
from train.commands.options import SharedOptions, share_options
from train.commands.setup import Samples, resolve_options
from train.comparator import choose_crop, dry_run_comparator, train_comparator
from train.comparators import COMPARATORS
from train.folders import claim_run_folder
from train.loop import make_accelerator
from train.validation import Validation


def comparator(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(COMPARATORS)}.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoint, log and NAME.onnx.")],
    size: Annotated[int, typer.Option(min=32, help="Side of the images, px.")] = 256,
    crop: Annotated[
        int | None, typer.Option(min=32, help="Side of the training crops, px.", show_default="whole images")
    ] = None,
    shared: SharedOptions = SharedOptions(),  # noqa: B008  # frozen
) -> None:
    """Train a network of the paper's Table 1 on the same pairs and as long as stage 1, for `benchmarks.table1`."""
    if name not in COMPARATORS:
        raise SettingsError(f"comparator {name!r}: choose one of {', '.join(COMPARATORS)}")
    side = choose_crop(name, size, crop)
    samples = Samples.load(shared, size)
    recipe = samples.recipe
    options = resolve_options(recipe, recipe.denoiser, len(samples.train), shared, None)
    if shared.dry_run:
        typer.echo(dry_run_comparator(name, options, size, side))
        return
    with make_accelerator().main_process_first():
        claim_run_folder(output)
    batches = samples.make_batches(output, size, shared.seed)
    validation = Validation(samples.choose_groups(size, options.patience), recipe.schedule)
    typer.echo(train_comparator(output, name, batches, validation, options, size, side))


comparator_command = share_options(comparator)
