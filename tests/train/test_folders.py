"""Folders that a command writes: a user's files are never mixed with new ones."""

import json

import pytest
import torch

from bsdiff_rt.errors import SettingsError
from train.folders import claim_run_folder, require_empty


def test_a_new_or_an_empty_folder_is_taken(tmp_path):
    require_empty(tmp_path / "new")
    require_empty(tmp_path)
    (tmp_path / "notes.txt").touch()
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(SettingsError, match=r"exists and is not empty\. Choose a new or an empty folder"):
            require_empty(path)


def test_a_run_continues_in_its_own_folder_alone(tmp_path):
    folder = tmp_path / "a" / "run"
    claim_run_folder(folder)
    assert json.loads((folder / "run.json").read_text())["kind"] == "bsdiff-rt training run"
    (folder / "phantoms_64.npy").touch()
    claim_run_folder(folder)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "notes.txt").touch()
    torch.save({"weights": 1}, theirs / "model.pt")  # another program's
    for path in (theirs, theirs / "notes.txt"):
        with pytest.raises(SettingsError, match="exists and is no folder of a training run"):
            claim_run_folder(path)
    assert sorted(path.name for path in theirs.iterdir()) == ["model.pt", "notes.txt"]


def test_a_checkpoint_shows_that_a_folder_is_a_runs(tmp_path):
    torch.save({"averaged": {}}, tmp_path / "denoiser.pt")
    claim_run_folder(tmp_path)
