"""Tone apart from bones, and a scanner's tone."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic import chest

from bsdiff_rt.config import Preprocessing, ScannerTone
from bsdiff_rt.intensity import from_network, to_network
from bsdiff_rt.tone import (
    BONES_WINDOW_PX,
    RIBS_WINDOW_PX,
    TONE_CHANGE,
    TONE_CXR_RMS,
    scanner_power,
    tone_of,
    tone_quantiles,
)


def padded(picture):
    """A picture of 64 x 48 as the networks see it, and its placement."""
    return to_network(picture, Preprocessing(size=64))


def test_a_power_gives_a_result_its_scanners_mean_and_leaves_black_and_white():
    """Padding, here repeated edges, is no part of the mean."""
    cxr = np.clip(chest(64, 48), 0.1, 1).astype(np.float32)
    soft_tissue = np.clip(cxr - 0.05, 0, 1)
    tone = ScannerTone(tuple(tone_quantiles(cxr, 25)), 0.45)
    (cxr_net, placement), (soft_net, _) = padded(cxr), padded(soft_tissue)
    power = scanner_power(cxr_net, soft_net, placement, tone)
    result = from_network(soft_net, placement, power)
    assert float(result.mean()) == pytest.approx(0.45, abs=1e-4)  # the power's own step is 1e-4
    np.testing.assert_allclose(result, from_network(soft_net, placement) ** power, atol=1e-6)
    assert from_network(soft_net * 0 - 1, placement, power).max() == 0
    assert from_network(soft_net * 0 + 1, placement, power).min() == 1


@pytest.mark.parametrize("off", [-0.15, 0.15])
def test_a_mean_far_off_is_no_matter_of_tone(off):
    cxr = (0.1 + 0.8 * chest(64, 48)).astype(np.float32)
    (cxr_net, placement), (soft_net, _) = padded(cxr), padded(cxr - 0.05)
    own = float((cxr - 0.05).mean())
    quantiles = tuple(tone_quantiles(cxr, 25))
    assert scanner_power(cxr_net, soft_net, placement, ScannerTone(quantiles, own)) == pytest.approx(1, abs=1e-3)
    assert scanner_power(cxr_net, soft_net, placement, ScannerTone(quantiles, own + off)) is None


@pytest.mark.parametrize(("off", "expected"), [(TONE_CXR_RMS - 0.002, True), (TONE_CXR_RMS + 0.002, False)])
def test_an_x_ray_is_its_scanners_by_its_grey_levels(off, expected):
    cxr = (0.1 + 0.8 * chest(64, 48)).astype(np.float32)
    (cxr_net, placement), (soft_net, _) = padded(cxr), padded(cxr - 0.05)
    tone = ScannerTone(tuple(tone_quantiles(cxr, 25) + off), 0.45)
    assert (scanner_power(cxr_net, soft_net, placement, tone) is not None) is expected


@pytest.mark.parametrize(("taken", "expected"), [(TONE_CHANGE + 0.002, True), (TONE_CHANGE - 0.002, False)])
def test_networks_that_keep_a_tone_say_that_it_is_another_scanners(taken, expected):
    """Ribs taken away as well change nothing about that."""
    cxr = (0.1 + 0.8 * chest(64, 48)).astype(np.float32)
    ribs = np.zeros_like(cxr)
    ribs[::12] = ribs[1::12] = 0.1
    (cxr_net, placement), (soft_net, _) = padded(cxr), padded(cxr - taken - ribs)
    tone = ScannerTone(tuple(tone_quantiles(cxr, 25)), 0.45)
    assert (scanner_power(cxr_net, soft_net, placement, tone) is not None) is expected


def bones(side: int, gap: int, wide: int) -> np.ndarray:
    """Bars `wide` px wide, every `gap` px."""
    return (np.mgrid[0:side, 0:side][0] % gap < wide).astype(np.float32)


def test_tone_is_what_lies_between_bones():
    tone = np.tile(np.linspace(-0.2, 0.3, 256, dtype=np.float32), (256, 1))
    found = tone_of(tone + bones(256, 32, 14), 256, BONES_WINDOW_PX)
    # The envelope is the lower quarter of a window that the ramp climbs 0.12 in: it lies up to half of that below.
    assert np.abs(found - tone)[:, 32:-32].max() < 0.06


@pytest.mark.parametrize("side", [32, 64, 128, 512])
def test_the_window_scales_with_the_square(side):
    layer = bones(side, side // 8, side // 16)
    assert np.abs(tone_of(layer, side, BONES_WINDOW_PX)).max() < 1e-3
    wide = bones(side, side, side // 2)  # wider than any bone: tone
    assert tone_of(wide, side, BONES_WINDOW_PX)[side // 4, side // 2] > 0.95
    vertebrae = np.roll(bones(side, side, side // 8), side // 2, axis=0)  # broader than two ribs, but bone
    inside = (side // 2 + side // 16, side // 2)
    assert tone_of(vertebrae, side, RIBS_WINDOW_PX)[inside] > 0.7
    assert tone_of(vertebrae, side, BONES_WINDOW_PX)[inside] < 0.1


@pytest.mark.parametrize("shape", [(1, 256), (256, 1), (3, 200), (256, 200)])
def test_tone_of_a_narrow_picture(shape):
    np.testing.assert_allclose(tone_of(np.full(shape, 0.3, np.float32), 256, RIBS_WINDOW_PX), 0.3, atol=1e-6)
