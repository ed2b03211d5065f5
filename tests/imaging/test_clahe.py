"""Equalisation: OpenCV's, at any depth."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from synthetic import chest

from bsdiff_rt.config import Preprocessing
from bsdiff_rt.imaging.clahe import EqualizingCurves, equalize
from bsdiff_rt.imaging.network_input import resize, to_network


@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (256, 211), (131, 256), (64, 40)])
@pytest.mark.parametrize("clip_limit", [1.0, 2.0, 40.0])
def test_clahe_is_opencvs_within_a_level(rows, columns, clip_limit):
    levels = np.rint(chest(rows, columns) * 255).astype(np.uint8)
    expected = cv2.createCLAHE(clip_limit, (8, 8)).apply(levels) / 255
    got = equalize((levels / 255).astype(np.float32), clip_limit, 8)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1.01 / 255)


def test_clahe_does_not_depend_on_the_source_depth():
    # What cv2's 16-bit CLAHE gets wrong: the same picture at 12 and at 16 bits.
    picture = chest(512, 480)
    prep = Preprocessing(size=256, clahe_clip_limit=2.0)
    at_12, _ = to_network((np.rint(picture * 4095) / 4095).astype(np.float32), prep)
    at_16, _ = to_network((np.rint(picture * 65535) / 65535).astype(np.float32), prep)
    plain, _ = to_network(picture, Preprocessing(size=256))
    assert np.abs(at_12 - at_16).max() < 0.03
    assert np.abs(at_12 - at_16).mean() < 0.002
    assert np.abs(at_12 - plain).mean() > 0.05  # and it does something


def test_the_curves_of_a_picture_at_another_resolution():
    picture = chest(200, 170)
    here, finer = (EqualizingCurves.measure(picture, 2.0, 8, matrix) for matrix in (None, (800, 680)))
    large = np.repeat(np.repeat(picture, 4, axis=0), 4, axis=1)
    # A pixel's curve lies between those of the four that share it: no further off than its neighbours' are.
    np.testing.assert_allclose(resize(finer.apply(large), (200, 170)), here.apply(picture), atol=5e-3)
    np.testing.assert_array_equal(
        EqualizingCurves.measure(picture, 2.0, 8, picture.shape).apply(picture), here.apply(picture)
    )
