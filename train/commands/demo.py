"""`python -m train demo`: train both stages of the demo model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from train.commands.denoiser import denoiser
from train.commands.enhancer import enhancer
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
    """Train a small model from nothing, both stages. It is weaker than the bundled one. Takes hours on two cores."""
    shared = SharedOptions(pairs=pairs, drrs=drrs)
    denoiser(output, shared=shared)
    enhancer(output, shared=shared)
