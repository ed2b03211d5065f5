"""`python -m train drr`: the command line of the pool."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from bsdiff_rt.errors import SettingsError
from train.drr.framing import BeamKind, View
from train.drr.pool import DrrOptions, Entry, Labels, make_pool
from train.drr.volume import find_sources


def parse_labels(text: str | None) -> frozenset[int] | None:
    """Return the numbers in a list such as `25-50,69`; None for None.

    Raises:
        SettingsError: something else is in it.
    """
    if text is None:
        return None
    values: set[int] = set()
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            values |= set(range(int(first), int(last or first) + 1))
    except ValueError:
        raise SettingsError(
            f"{text} is not a list of numbers and ranges, such as 25-50,69", setting="bone_labels"
        ) from None
    return frozenset(values)


def describe_entry(entry: Entry) -> str:
    """Return one line about a CT."""
    if entry.status != "ok":
        return f"{entry.name}: {entry.status}, {entry.reason}"
    made = f", {entry.seconds_per_pair:.2f} s per new pair" if entry.seconds_per_pair else ""
    return f"{entry.name}: {entry.pairs} pairs{made}"


def drr_command(
    cts: Annotated[
        list[Path], typer.Argument(metavar="CT...", help="Chest CTs: folders of DICOM series, NIfTI or npz files.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the pool: new, or one to continue.")],
    count: Annotated[int, typer.Option(min=1, help="Pairs per CT.")] = 50,
    size: Annotated[int, typer.Option(min=256, max=1024, help="Side of the images, px.")] = DrrOptions.size,
    view: Annotated[View, typer.Option(help="PA: the patient faces the detector.")] = DrrOptions.view,
    beam: Annotated[BeamKind, typer.Option(help="Shape of the X-ray beam.")] = DrrOptions.beam,
    pose: Annotated[
        float, typer.Option(min=0.0, max=3.0, help="Strength of the random rotations; 0: none.")
    ] = DrrOptions.pose,
    labels: Annotated[Path | None, typer.Option(help="Bone label file, or a folder of them, named as the CTs.")] = None,
    bone_labels: Annotated[
        str | None, typer.Option(help="Labels that are bone, such as 25-50,69.", show_default="all but 0")
    ] = None,
    lungs: Annotated[bool, typer.Option("--lungs", help="Also write NAME_lungs.png, the lung fields.")] = False,
    calcified: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of pairs with calcifications drawn into the rib cartilage.")
    ] = DrrOptions.calcified,
    seed: Annotated[
        int, typer.Option(min=0, help="Random seed. The same seed gives the same pairs.")
    ] = DrrOptions.seed,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes.", show_default="one per processor core")
    ] = None,
) -> None:
    """Project chest CTs into pairs of X-ray and soft-tissue image; look at the contact sheet.

    An interrupted run continues with the same command. A larger --count adds pairs.
    """
    options = DrrOptions(size, seed, view, beam, pose, lungs, calcified)
    sources = find_sources(cts)
    wanted = Labels(labels, parse_labels(bone_labels))
    entries = make_pool(sources, output, count, options, wanted, workers or os.cpu_count() or 1)
    for entry in entries:
        typer.echo(describe_entry(entry))
    used = [entry for entry in entries if entry.status == "ok"]
    typer.echo(f"{sum(e.pairs for e in used)} pairs. CTs used: {len(used)}, without pairs: {len(entries) - len(used)}")
    if len(used) < len(entries):
        raise typer.Exit(3)
