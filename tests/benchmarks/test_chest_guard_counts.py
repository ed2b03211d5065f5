"""Counting what the judge of chests makes of pictures."""

from __future__ import annotations

import json
import sys

import pytest
from helpers import png

from benchmarks import chest_guard
from bsdiff_rt.errors import SettingsError
from train.phantoms import draw_phantom


def test_every_picture_gets_one_answer():
    phantoms = [draw_phantom(10**6 + seed, 128).cxr for seed in range(4)]
    assert chest_guard.count_answers(phantoms) == {"no warning": 4}
    turned = chest_guard.count_answers([chest_guard.CHANGES["upside down"](one) for one in phantoms])
    assert sum(turned.values()) == 4
    assert turned["upside down"] >= 3


def test_counts_are_printed_and_written(tmp_path, capsys, monkeypatch):
    for seed in range(2):
        png(tmp_path / "in" / f"{seed}.png", seed=seed)
    monkeypatch.setattr(chest_guard, "read_natural_pictures", lambda: iter([]))
    chest_guard.main([tmp_path / "in"], tmp_path / "out.json")
    assert "as they are" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["as they are"] == {"no warning": 2}


def test_a_folder_without_pictures_is_an_error(tmp_path):
    with pytest.raises(SettingsError, match="no X-ray with a name"):
        chest_guard.main([tmp_path], None)


def test_natural_pictures_lie_in_their_range():
    assert "skimage" in sys.modules
    pictures = list(chest_guard.read_natural_pictures())
    assert len(pictures) > 10
    assert all(0 <= one.min() <= one.max() <= 1 for one in pictures)
