"""Counting what the judge of chests makes of pictures."""

from __future__ import annotations

import json

import pytest
from helpers import png

from benchmarks import chest_guard
from bsdiff_rt.errors import SettingsError
from train.phantoms import draw_phantom


def test_every_picture_gets_one_answer():
    phantoms = [draw_phantom(10**6 + seed, 128).cxr for seed in range(4)]
    assert chest_guard.count_answers(phantoms) == {"no warning": 4}
    turned = chest_guard.count_answers(
        [turned for one in phantoms for turned in chest_guard.CHANGES["upside down"](one)]
    )
    assert sum(turned.values()) == 4
    assert turned["upside down"] >= 3


@pytest.mark.parametrize(
    ("change", "pictures"), [("10 degrees turned, both ways", 2), ("a tenth cut off, each side", 4)]
)
def test_chests_a_little_changed_are_chests(change, pictures):
    shown = chest_guard.CHANGES[change](draw_phantom(10**6, 128).cxr)
    assert chest_guard.count_answers(shown) == {"no warning": pictures}


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
    pictures = list(chest_guard.read_natural_pictures())
    assert len(pictures) > 10
    assert all(0 <= one.min() <= one.max() <= 1 for one in pictures)
