"""`python -m train demo`: train a model like the bundled one from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from train.commands.denoiser import denoiser
from train.commands.options import SharedOptions


def demo_command(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for all files. The same command resumes an interrupted run.")
    ],
    pairs: Annotated[
        Path | None, typer.Option(help="Folder of real pairs. Without it, only phantoms are used.")
    ] = None,
    drrs: Annotated[Path | None, typer.Option(help="Folder of pairs projected from CTs.")] = None,
) -> None:
    """Train a model of the bundled one's shape from nothing, stage 1 alone. It is weaker. Takes hours on two cores."""
    denoiser(output, shared=SharedOptions(pairs=pairs, drrs=drrs))
