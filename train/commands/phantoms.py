"""`python -m train phantoms`: write pairs of drawn chest phantoms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from train.folders import require_empty
from train.phantom_dicom import write_cr
from train.phantom_pool import HELD_OUT_PHANTOM_SEED
from train.phantoms import SMALLEST_PX, draw_phantom, write_pairs


def phantoms_command(
    folder: Annotated[
        Path, typer.Argument(help="Folder for NAME_cxr.png and NAME_soft_tissue.png. Must be new or empty.")
    ],
    count: Annotated[int, typer.Option(min=1, help="Number of pairs.")] = 10,
    size: Annotated[int, typer.Option(min=SMALLEST_PX, help="Side of the images, px.")] = 256,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the first phantom. Each further one adds 1.")
    ] = HELD_OUT_PHANTOM_SEED,
    dicom: Annotated[bool, typer.Option("--dicom", help="Also write NAME_cxr.dcm (CR, 14 bits, MONOCHROME1).")] = False,
) -> None:
    """Write pairs of phantoms. By default these are the ones that no training uses."""
    require_empty(folder)
    for i, name in enumerate(write_pairs(folder, count, seed, size)):
        if dicom:
            write_cr(folder / f"{name}_cxr.dcm", draw_phantom(seed + i, size).cxr, name)
    typer.echo(f"wrote {count} pairs to {folder}")
