"""`python -m train chest-guard`: fit the judge that warns of pictures that are no frontal chest X-rays."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bsdiff_rt.imaging.chest_guard import WEIGHTS
from train.chest_guard import fit_guard
from train.drr.volume import find_sources


def chest_guard_command(
    cts: Annotated[
        list[Path], typer.Argument(metavar="CT...", help="Chest CTs: folders of DICOM series, NIfTI or npz files.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File of the weights.")] = WEIGHTS,
    count: Annotated[int, typer.Option(min=4, help="Projections per CT. The drawn pictures follow it.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Random seed. The same seed gives the same weights.")] = 0,
) -> None:
    """Fit the judge of frontal chest X-rays on projected CTs, phantoms and drawn other pictures. Takes minutes."""
    typer.echo(fit_guard(find_sources(cts), output, count, seed))
