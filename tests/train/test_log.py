"""The training log: CSV rows under the header the file has, the same figures and the picture in TensorBoard."""

import csv

import cv2
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.log import Log, append_row


def test_rows_and_pictures_are_logged(tmp_path):
    cv2.imwrite(str(tmp_path / "x_samples.png"), np.eye(16, dtype=np.uint8) * 255)
    Log(tmp_path, "x", 0).write(5, 1e-3, {"loss": 0.25}, {"pairs_psnr": 30.0})
    Log(tmp_path, "x", 5).write(10, 1e-4, {"loss": 0.125}, {"pairs_psnr": 31.0})
    with (tmp_path / "x.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["loss"], row["pairs_psnr"]) for row in rows] == [
        ("5", "0.250000", "30.0000"),
        ("10", "0.125000", "31.0000"),
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard" / "x"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss/loss")] == [(5, 0.25), (10, 0.125)]
    assert [event.value for event in board.Scalars("quality/pairs_psnr")] == [30.0, 31.0]
    assert len(board.Images("samples")) == 2


def test_a_row_keeps_to_the_columns_of_its_file(tmp_path):
    path = tmp_path / "x.csv"
    append_row(path, {"step": "1", "loss": "2"})
    append_row(path, {"loss": "4", "step": "3", "new": "5"})
    append_row(path, {"step": "6"})
    assert path.read_text().split() == ["step,loss", "1,2", "3,4", "6,"]


def test_a_step_has_one_row(tmp_path):
    path = tmp_path / "x.csv"
    for _ in range(2):  # a run killed between the row and the removal of the checkpoint not judged yet
        append_row(path, {"step": "1", "loss": "2"})
    append_row(path, {"step": "2", "loss": "2"})
    assert path.read_text().split() == ["step,loss", "1,2", "2,2"]


def test_a_log_that_a_full_disk_left_empty_is_a_new_one(tmp_path):
    path = tmp_path / "x.csv"
    path.touch()
    append_row(path, {"step": "1", "loss": "2"})
    assert path.read_text().split() == ["step,loss", "1,2"]
