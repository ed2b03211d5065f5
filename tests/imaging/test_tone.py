"""Tone apart from bones, and a scanner's tone."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic import chest

from bsdiff_rt.config import Preprocessing, ScannerTone
from bsdiff_rt.imaging.network_input import from_network, to_network
from bsdiff_rt.imaging.tone import (
    BONES_WINDOW_PX,
    RIBS_WINDOW_PX,
    TONE_CHANGE,
    TONE_CXR_RMS,
    TONE_OTHER_RMS,
    ToneChange,
    tone_change,
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
    change = tone_change(cxr_net, soft_net, placement, tone)
    assert change.offset is None
    result = from_network(change.apply(soft_net, cxr_net), placement)
    assert float(result.mean()) == pytest.approx(0.45, abs=1e-4)  # the power's own step is 1e-4
    np.testing.assert_allclose(result, from_network(soft_net, placement) ** change.power, atol=1e-6)
    assert change.apply(soft_net * 0 - 1, cxr_net).max() == -1
    assert change.apply(soft_net * 0 + 1, cxr_net).min() == 1


@pytest.mark.parametrize("off", [-0.15, 0.15])
def test_a_mean_far_off_is_no_matter_of_tone(off):
    cxr = (0.1 + 0.8 * chest(64, 48)).astype(np.float32)
    (cxr_net, placement), (soft_net, _) = padded(cxr), padded(cxr - 0.05)
    own = float((cxr - 0.05).mean())
    quantiles = tuple(tone_quantiles(cxr, 25))
    known = tone_change(cxr_net, soft_net, placement, ScannerTone(quantiles, own))
    assert (known.power, known.offset) == (pytest.approx(1, abs=1e-3), None)
    assert tone_change(cxr_net, soft_net, placement, ScannerTone(quantiles, own + off)) == ToneChange()


@pytest.mark.parametrize(
    ("off", "done"),
    [
        (TONE_CXR_RMS - 0.002, "power"),
        (TONE_CXR_RMS + 0.002, None),  # perhaps its, perhaps not: left as the networks made it
        (TONE_OTHER_RMS - 0.002, None),
        (TONE_OTHER_RMS + 0.002, "offset"),
    ],
)
def test_an_x_ray_is_its_scanners_by_its_grey_levels(off, done):
    cxr = (0.1 + 0.8 * chest(64, 48)).astype(np.float32)
    (cxr_net, placement), (soft_net, _) = padded(cxr), padded(cxr - 0.05)
    tone = ScannerTone(tuple(tone_quantiles(cxr, 25) + off), 0.45)
    change = tone_change(cxr_net, soft_net, placement, tone)
    assert [name for name in ("power", "offset") if getattr(change, name) is not None] == ([done] if done else [])


@pytest.mark.parametrize(("taken", "retoned"), [(TONE_CHANGE + 0.002, True), (TONE_CHANGE - 0.002, False)])
def test_networks_that_keep_a_tone_say_that_it_is_another_scanners(taken, retoned):
    """Ribs taken away as well change nothing about that."""
    cxr = (0.1 + 0.8 * chest(64, 48)).astype(np.float32)
    ribs = np.zeros_like(cxr)
    ribs[::12] = ribs[1::12] = 0.1
    (cxr_net, placement), (soft_net, _) = padded(cxr), padded(cxr - taken - ribs)
    tone = ScannerTone(tuple(tone_quantiles(cxr, 25)), 0.45)
    change = tone_change(cxr_net, soft_net, placement, tone)
    assert (change.power is not None, change.offset is not None) == (retoned, not retoned)


def test_what_is_known_to_be_another_scanners_keeps_its_tone():
    cxr = (0.1 + 0.8 * chest(64, 48)).astype(np.float32)
    (cxr_net, placement), (soft_net, _) = padded(cxr), padded(cxr - 0.05)
    tone = ScannerTone(tuple(tone_quantiles(cxr, 25)), 0.45)
    assert tone_change(cxr_net, soft_net, placement, tone).power is not None
    change = tone_change(cxr_net, soft_net, placement, tone, foreign=True)
    assert (change.power, change.offset) == (None, pytest.approx(0.05, abs=1e-3))


@pytest.mark.parametrize("shift", [0.006, -0.006, 0.03])
def test_another_scanners_x_ray_keeps_its_own_tone(shift):
    """Ribs are gone, and what the networks changed the tone by is undone, whatever they left of black."""
    cxr = (0.1 + 0.8 * chest(64, 48)).astype(np.float32)
    cxr[:6] = 0  # collimated
    ribs = np.zeros_like(cxr)
    ribs[8::12] = ribs[9::12] = 0.1
    (cxr_net, placement), (soft_net, _) = padded(cxr + ribs), padded(np.clip(cxr - shift, 0, 1))
    change = tone_change(cxr_net, soft_net, placement, ScannerTone(tuple(tone_quantiles(cxr * 0.5, 25)), 0.45))
    assert (change.power, change.offset) == (None, pytest.approx(shift, abs=2e-3))
    result = from_network(change.apply(soft_net, cxr_net), placement)
    np.testing.assert_allclose(result, cxr, atol=2e-3)
    if shift > 0:
        assert result[:6].max() == 0


def test_an_offset_makes_nothing_brighter_than_the_x_ray_shows_it():
    soft_net = np.array([[-1.0, 0.0, 0.5, 0.98]], np.float32)
    cxr_net = np.array([[-1.0, 0.1, 0.3, 1.0]], np.float32)  # of the third the networks made something brighter
    lifted, lowered = (ToneChange(offset=offset).apply(soft_net, cxr_net) for offset in (0.02, -0.02))
    np.testing.assert_allclose(lifted, [[-1.0, 0.04, 0.5, 1.0]], atol=1e-6)
    np.testing.assert_allclose(lowered, [[-1.0, -0.04, 0.46, 0.94]], atol=1e-6)
    np.testing.assert_array_equal(ToneChange().apply(soft_net, cxr_net), soft_net)


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
