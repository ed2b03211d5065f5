"""`python -m train prepare`: make a data set of pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from train.prepare import PrepareOptions, parse_split, prepare, read_exclusions


def prepare_command(
    cxr: Annotated[Path, typer.Argument(help="Folder of X-rays (DICOM, PNG, JPEG or TIFF). Searched recursively.")],
    soft_tissue: Annotated[Path, typer.Argument(help="Folder of soft-tissue images. May be the same folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the data set. Must be new or empty.")],
    size: Annotated[int, typer.Option(min=16, help="Side of the images, px.")] = PrepareOptions.size,
    split: Annotated[str, typer.Option(help="Shares of patients in train, val and test.")] = "7:2:1",
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the split.")] = PrepareOptions.seed,
    clahe: Annotated[float, typer.Option(min=0.0, help="CLAHE clip limit. 0: no CLAHE.")] = PrepareOptions.clahe,
    register: Annotated[
        bool, typer.Option("--register/--no-register", help="Register the soft-tissue image to its X-ray.")
    ] = PrepareOptions.register,
    trim: Annotated[
        bool, typer.Option("--trim/--no-trim", help="Cut off uniform borders, as infer does.")
    ] = PrepareOptions.trim,
    min_correlation: Annotated[
        float,
        typer.Option(
            min=-1.0, max=1.0, help="Leave out pairs whose edges correlate less than this. -1: keep every pair."
        ),
    ] = PrepareOptions.min_correlation,
    exclude: Annotated[
        Path | None,
        typer.Option(help="Text file of pairs to leave out: one name or stem a line, then ` # reason`."),
    ] = None,
    patient_pattern: Annotated[
        str | None,
        typer.Option(help="Regular expression whose group 1 is the patient. Used instead of PatientID."),
    ] = None,
    cxr_suffix: Annotated[str, typer.Option(help="Ending of an X-ray's file stem.")] = "_cxr",
    soft_suffix: Annotated[str, typer.Option(help="Ending of a soft-tissue image's file stem.")] = "_soft_tissue",
) -> None:
    """Make a data set: match, register and resize pairs, split them by patient, draw a contact sheet to look at."""
    options = PrepareOptions(
        size=size,
        clahe=clahe,
        register=register,
        trim=trim,
        min_correlation=min_correlation,
        split=parse_split(split),
        seed=seed,
        cxr_suffix=cxr_suffix,
        soft_tissue_suffix=soft_suffix,
        patient_pattern=patient_pattern,
    )
    dataset = prepare(cxr, soft_tissue, output, options, read_exclusions(exclude) if exclude else {})
    typer.echo(dataset.summarise())
    if not dataset.complete:
        raise typer.Exit(3)
