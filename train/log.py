"""The log of a training run: one row per checkpoint in a CSV file; the same and the sample images in TensorBoard."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import cv2
from torch.utils.tensorboard import SummaryWriter


class Log:
    """Write NAME.csv and tensorboard/NAME in a folder. A continued run appends to both.

    Args:
        folder: of the run.
        name: of the stage.
        step: last finished step. TensorBoard hides what it holds of later steps, from before an interruption.
    """

    def __init__(self, folder: Path, name: str, step: int) -> None:
        self._csv, self._picture = folder / f"{name}.csv", folder / f"{name}_samples.png"
        self._board = SummaryWriter(folder / "tensorboard" / name, purge_step=step + 1)

    def write(self, step: int, rate: float, losses: dict[str, float], quality: dict[str, float]) -> None:
        """Add a row for a checkpoint.

        Args:
            step: of the checkpoint.
            rate: learning rate.
            losses: means since the last row, by name.
            quality: validation figures by name.
        """
        columns = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "step": str(step)}
        columns |= {name: f"{value:.6f}" for name, value in losses.items()}
        columns |= {name: f"{value:.4f}" for name, value in quality.items()}
        append_row(self._csv, columns)
        for name, value in losses.items():
            self._board.add_scalar(f"loss/{name}", value, step)
        for name, value in quality.items():
            self._board.add_scalar(f"quality/{name}", value, step)
        self._board.add_scalar("learning_rate", rate, step)
        if self._picture.exists():
            picture = cv2.imread(str(self._picture), cv2.IMREAD_GRAYSCALE)
            self._board.add_image("samples", picture, step, dataformats="HW")
        self._board.flush()


def append_row(path: Path, columns: dict[str, str]) -> None:
    """Add one row to a CSV file under the file's own columns. A new or empty file gets these columns as its header.

    A step that is in the file already gets no second row. This happens after a validation that was interrupted once
    logged.
    """
    if not path.exists() or not path.stat().st_size:  # a full disk leaves it empty
        path.write_text(",".join(columns) + "\n")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        header = list(reader.fieldnames or columns)
        if any(row["step"] == columns["step"] for row in reader):
            return
    with path.open("a", newline="") as file:
        csv.DictWriter(file, header, restval="", extrasaction="ignore").writerow(columns)
