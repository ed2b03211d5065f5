"""Fitting the judge of frontal chest X-rays: its pictures, the fit, and the file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from made_ct import make_chest, write_npz

from bsdiff_rt.errors import SettingsError
from bsdiff_rt.imaging.chest_guard import describe_picture
from train.chest_guard import KEPT_PX, OTHERS, draw_pictures, fit, fit_guard, vary
from train.drr.volume import find_sources
from train.phantoms import draw_phantom


@pytest.mark.parametrize("draw", dict.fromkeys(OTHERS), ids=lambda draw: draw.__name__)
def test_drawn_pictures_lie_in_their_range_and_differ(draw):
    pictures = [draw(np.random.default_rng(seed)) for seed in range(6)]
    for picture in pictures:
        assert picture.dtype == np.float32
        assert picture.min() >= 0
        assert picture.max() <= 1.0 + 1e-6
    assert len({picture.tobytes() for picture in pictures}) == 6
    assert draw(np.random.default_rng(0)).tobytes() == pictures[0].tobytes()


def test_varied_pictures_show_the_same():
    cxr = draw_phantom(3, 128).cxr
    varied = [vary(cxr, np.random.default_rng(seed)) for seed in range(20)]
    assert {one.shape for one in varied} == {(KEPT_PX, KEPT_PX)}
    kept = describe_picture(cxr)
    likeness = [np.corrcoef(describe_picture(one), kept)[0, 1] for one in varied]
    assert np.median(likeness) > 0.5


def test_a_fit_separates_what_can_be_separated():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 5))
    chests = features @ np.array([2.0, -1.0, 0.0, 0.5, 0.0]) + 1.0 > 0
    weights, bias = fit(features, chests)
    assert ((features @ weights + bias > 0) == chests).mean() > 0.97


def test_the_file_holds_a_judge_of_the_pictures(tmp_path):
    sources = find_sources([write_npz(tmp_path / "ct.npz", make_chest())])
    path = tmp_path / "guard.json"
    text = fit_guard(sources, path, 4, 0)
    assert "chests are warned of" in text
    content = json.loads(path.read_text())
    pictures = draw_pictures(sources, 4, 0)
    scores = np.stack([describe_picture(one) for one in pictures.pictures]) @ content["weights"] + content["bias"]
    assert ((scores > 0) == pictures.chests).mean() > 0.95


def test_no_ct_is_an_error():
    with pytest.raises(SettingsError, match="no CT"):
        draw_pictures([], 4, 0)
