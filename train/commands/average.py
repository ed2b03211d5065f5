"""`python -m train average`: average the weights of several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bsdiff_rt.errors import SettingsError
from train.average import average_checkpoints


def average_command(
    runs: Annotated[
        list[str], typer.Argument(help="Folders of stage 1's runs, or their denoiser.pt files; RUN=2 counts twice.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new run.")],
) -> None:
    """Average the weights of several runs of stage 1 of one network. Export the result as any run."""
    parts = [parse_run(run) for run in runs]
    average_checkpoints(parts, output / "denoiser.pt")
    named = ", ".join(f"{path} ({weight:g})" for path, weight in parts)
    typer.echo(f"wrote {output / 'denoiser.pt'}, the mean of {named}")


def parse_run(text: str) -> tuple[Path, float]:
    """Return the checkpoint and the weight of RUN or RUN=WEIGHT. A text that is a path is RUN.

    Raises:
        SettingsError: the weight is no number.
    """
    name, _, weight = text.rpartition("=") if "=" in text and not Path(text).exists() else (text, "", "1")
    try:
        value = float(weight)
    except ValueError:
        raise SettingsError(f"{text}: give RUN or RUN=WEIGHT, the weight a number") from None
    path = Path(name)
    return (path / "denoiser.pt" if path.is_dir() else path), value
