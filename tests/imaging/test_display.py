"""Grey levels for the display of a chest."""

from __future__ import annotations

import numpy as np
from synthetic import chest

from bsdiff_rt.imaging.display import find_lung_levels, is_faint


def test_levels_hold_the_lungs_and_no_more():
    picture = chest(200, 160)
    low, high = find_lung_levels(picture)
    lungs = np.concatenate([picture[40:130, 29:64], picture[40:130, 96:131]])
    assert np.mean((lungs >= low) & (lungs <= high)) > 0.97
    assert high - low < 1.3 * np.ptp(np.quantile(lungs, (0.02, 0.98)))


def test_levels_follow_the_grey_scale_and_stay_in_it():
    picture = chest(200, 160)
    levels = np.array(find_lung_levels(picture))
    np.testing.assert_allclose(
        find_lung_levels((0.3 + 0.5 * picture).astype(np.float32)), 0.3 + 0.5 * levels, atol=1e-5
    )
    assert find_lung_levels(np.zeros((64, 64), np.float32)) == (0, 0)
    assert find_lung_levels(np.ones((64, 64), np.float32)) == (1, 1)


def test_what_is_faint():
    picture = chest(200, 160)
    assert not is_faint(picture)
    assert is_faint(picture * np.float32(0.5))
    assert is_faint((0.6 + picture * np.float32(0.3)).astype(np.float32))
