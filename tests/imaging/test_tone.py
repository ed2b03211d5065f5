"""Tone is the smooth envelope under the bones."""

from __future__ import annotations

import numpy as np
import pytest

from bsdiff_rt.imaging.tone import BONES_WINDOW_PX, measure_tone


def bones(side: int, gap: int, wide: int) -> np.ndarray:
    """Bars `wide` px wide, every `gap` px."""
    return (np.mgrid[0:side, 0:side][0] % gap < wide).astype(np.float32)


def test_tone_is_what_lies_between_bones():
    tone = np.tile(np.linspace(-0.2, 0.3, 256, dtype=np.float32), (256, 1))
    found = measure_tone(tone + bones(256, 32, 14), 256, BONES_WINDOW_PX)
    # The envelope is the lower quarter of a window that the ramp climbs 0.12 in: it lies up to half of that below.
    assert np.abs(found - tone)[:, 32:-32].max() < 0.06


@pytest.mark.parametrize("side", [32, 64, 128, 512])
def test_the_window_scales_with_the_square(side):
    layer = bones(side, side // 8, side // 16)
    assert np.abs(measure_tone(layer, side, BONES_WINDOW_PX)).max() < 1e-3
    wide = bones(side, side, side // 2)  # wider than any bone: tone
    assert measure_tone(wide, side, BONES_WINDOW_PX)[side // 4, side // 2] > 0.95
    vertebrae = np.roll(bones(side, side, side // 8), side // 2, axis=0)  # broader than two ribs, but bone
    assert measure_tone(vertebrae, side, BONES_WINDOW_PX)[side // 2 + side // 16, side // 2] < 0.1


@pytest.mark.parametrize("shape", [(1, 256), (256, 1), (3, 200), (256, 200)])
def test_tone_of_a_narrow_picture(shape):
    np.testing.assert_allclose(measure_tone(np.full(shape, 0.3, np.float32), 256, BONES_WINDOW_PX), 0.3, atol=1e-6)
