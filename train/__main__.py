"""`python -m train`: prepare data, draw phantoms, and train the denoiser (stage 1) and the enhancer (stage 2)."""

from __future__ import annotations

import logging

import cv2
import typer

from bsdiff_rt.errors import run_command
from train.commands.average import average_command
from train.commands.chest_guard import chest_guard_command
from train.commands.comparator import comparator_command
from train.commands.demo import demo_command
from train.commands.denoiser import denoiser_command
from train.commands.drr import drr_command
from train.commands.enhancer import enhancer_command
from train.commands.phantoms import phantoms_command
from train.commands.prepare import prepare_command
from train.loop import leave_processes
from train.progress import StderrHandler

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help=__doc__,
    result_callback=leave_processes,
)
app.command("prepare")(prepare_command)
app.command("phantoms")(phantoms_command)
app.command("drr")(drr_command)
app.command("denoiser")(denoiser_command)
app.command("enhancer")(enhancer_command)
app.command("average")(average_command)
app.command("demo")(demo_command)
app.command("comparator")(comparator_command)
app.command("chest-guard")(chest_guard_command)


def main() -> None:
    """Run the command line. An error of this package becomes one line on stderr and an exit code."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        handlers=[StderrHandler()],
    )
    cv2.setNumThreads(1)
    run_command(app)


if __name__ == "__main__":
    main()
