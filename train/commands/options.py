"""Options that the training commands share, and the decorator that gives them to a command."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from train.augment import AUGMENTATION_SETS
from train.recipe import RECIPES

FROM_RECIPE = "from the recipe"


@dataclass(frozen=True)
class SharedOptions:
    """What every training command can be asked for. None means: take the recipe's value."""

    pairs: Annotated[Path | None, typer.Option(help="Folder with NAME_cxr.* and NAME_soft_tissue.* files.")] = None
    recipe: Annotated[str, typer.Option(help=f"Training settings: {', '.join(RECIPES)} (see train/recipe.py).")] = (
        "demo"
    )
    phantoms: Annotated[
        int | None, typer.Option(min=0, help="Number of drawn phantoms to train on.", show_default=FROM_RECIPE)
    ] = None
    hold_out: Annotated[
        list[str] | None, typer.Option(help="Name of a pair to validate on instead of training. Repeatable.")
    ] = None
    dataset: Annotated[
        Path | None, typer.Option(help="Folder written by `prepare`: train on its train part, validate on val.")
    ] = None
    augment: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(AUGMENTATION_SETS)}, or a list of: {', '.join(sorted(AUGMENTATION_SETS['demo']))}.",
            show_default=FROM_RECIPE,
        ),
    ] = None
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps.", show_default=FROM_RECIPE)] = None
    learning_rate: Annotated[
        float | None, typer.Option(min=0.0, help="Peak learning rate.", show_default=FROM_RECIPE)
    ] = None
    real_share: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Share of real samples in a batch.", show_default=FROM_RECIPE),
    ] = None
    drrs: Annotated[
        Path | None,
        typer.Option(help="Folder with NAME_cxr.* and NAME_soft_tissue.* files that were projected from CTs."),
    ] = None
    drr_share: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Share of --drrs samples in a batch.", show_default=FROM_RECIPE),
    ] = None
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between two checkpoints.", show_default=FROM_RECIPE)
    ] = None
    accumulate: Annotated[
        int, typer.Option(min=1, help="Compute each batch in this many parts: less memory, same gradient.")
    ] = 1
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0
    bf16: Annotated[
        bool | None,
        typer.Option("--bf16/--no-bf16", show_default="on if the device computes bf16", help="Mixed precision."),
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the memory and time needed. Write nothing.")] = False


def share_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter `shared: SharedOptions` by one option for each of its fields.

    Args:
        command: a command of typer whose other parameters are options and arguments of its own.

    Returns:
        The command as typer should see it. The shared options follow its own ones.
    """
    hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name])
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "shared"
    ]
    shared_hints = get_type_hints(SharedOptions, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=shared_hints[field.name]
        )
        for field in fields(SharedOptions)
        if field.default is not MISSING
    ]

    @functools.wraps(command)
    def run(**options: Any) -> None:
        values = {parameter.name: options.pop(parameter.name) for parameter in shared}
        command(**options, shared=SharedOptions(**values))

    keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    run.__signature__ = inspect.Signature([*keyword_only, *shared])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *shared)}
    return run
