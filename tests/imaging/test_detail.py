"""What of the source goes into a result, and what of it is bone."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from synthetic import chest

from bsdiff_rt.config import Preprocessing
from bsdiff_rt.imaging.clahe import EqualizingCurves
from bsdiff_rt.imaging.detail import add_source_detail, bone_share, subtract_local_bone
from bsdiff_rt.imaging.network_input import from_network, resize, to_network


def test_no_bone_leaves_the_source_alone():
    source, prep = chest(300, 260), Preprocessing(size=128)
    square, placement = to_network(source, prep)
    np.testing.assert_array_equal(subtract_local_bone(source, square, square, placement, prep), source)


def test_a_change_of_tone_alone_leaves_the_source_alone():
    source, prep = chest(300, 260), Preprocessing(size=128)
    square, placement = to_network(source, prep)
    np.testing.assert_allclose(subtract_local_bone(source, square, square - 0.3, placement, prep), source, atol=1e-6)


def test_local_bone_is_subtracted_and_detail_stays():
    generator = np.random.default_rng(1)
    fine = 0.05 * generator.standard_normal((1024, 900)).astype(np.float32)
    y, x = np.mgrid[0:1024, 0:900]
    rib = (0.1 * np.exp(-(((y - 500) / 12.0) ** 2))).astype(np.float32)
    tone = (0.05 * x / 900).astype(np.float32)  # soft tissue is darker to the right: not bone
    source = np.float32(0.5) + rib + fine
    cxr_net, placement = to_network(source, Preprocessing(size=256))
    soft_net, _ = to_network(np.float32(0.5) + fine - tone, Preprocessing(size=256))
    result = subtract_local_bone(source, cxr_net, soft_net, placement, Preprocessing(size=256))
    assert result.shape == source.shape
    assert result.dtype == np.float32
    left = result - fine - 0.5
    # The whole rib goes, and nothing beside it gets darker; the edges of the ramp are smoothed (2 % of the range).
    assert abs(left[495:505, 100:800].mean()) < 0.03 * rib.max()
    assert np.abs(cv2.blur(left, (15, 15))[:, 60:840]).max() < 0.1 * rib.max()
    fine_in, fine_out = (image - cv2.blur(image, (5, 5)) for image in (source, result))
    assert np.corrcoef(fine_in[:400].ravel(), fine_out[:400].ravel())[0, 1] > 0.9999
    at_rib = np.corrcoef(fine_in[480:520].ravel(), fine_out[480:520].ravel())[0, 1]
    assert 0.8 < at_rib < 0.999  # there a share of it is taken for bone


def test_a_bones_edge_leaves_no_outline_and_a_vessel_stays():
    """Both have edges that the networks' matrix blurs; the networks took the one out and left the other."""
    y, x = np.mgrid[0:1024, 0:1024]
    rib, vessel = (0.2 * (np.abs(line - 500.5) < 30).astype(np.float32) for line in (y, x))
    vessel[380:620] = 0  # crossings are a matter of share
    source = np.float32(0.3) + rib + vessel
    (cxr_net, placement), (soft_net, _) = (
        to_network(image, Preprocessing(size=256)) for image in (source, source - rib)
    )
    result = subtract_local_bone(source, cxr_net, soft_net, placement, Preprocessing(size=256))
    outline = np.abs(result - 0.3)[:, 100:400]
    without = np.abs(source - cv2.resize(cxr_net - soft_net, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC) / 2 - 0.3)
    assert outline.max() < 0.25 * without[:, 100:400].max()
    np.testing.assert_allclose(result[700:1000], source[700:1000], atol=1e-3)


@pytest.mark.parametrize("clip_limit", [0.0, 1.0, 2.0, 4.0])
def test_bone_is_subtracted_as_strong_as_it_is_in_the_source_though_the_networks_see_it_equalised(clip_limit):
    y = np.mgrid[0:256, 0:256][0]
    soft_tissue = (0.3 + 0.2 * chest(256, 256)).astype(np.float32)
    rib = 0.04 * (y % 32 < 10).astype(np.float32)
    source = soft_tissue + rib
    prep = Preprocessing(size=256, clahe_clip_limit=clip_limit)
    cxr_net, placement = to_network(source, prep)
    if clip_limit:  # networks that know the truth, in the grey levels they are shown
        soft_net = 2 * EqualizingCurves.of(source, clip_limit, prep.clahe_tiles).apply(soft_tissue) - 1
    else:
        soft_net = 2 * soft_tissue - 1
    result = subtract_local_bone(source, cxr_net, soft_net, placement, prep)
    assert 1 - np.sum((result - soft_tissue) ** 2) / np.sum(rib**2) > 0.97  # BSR (Yang); as without equalising


def test_the_share_of_bone_is_a_local_slope():
    generator = np.random.default_rng(2)
    texture = 0.1 * generator.standard_normal((64, 64)).astype(np.float32)
    for slope in (0.0, 0.4, 1.0):
        # The assumed noise, a hundredth of the texture's variance, pulls the slope down by as much.
        np.testing.assert_allclose(bone_share(texture, slope * texture), slope, atol=0.04)
    assert bone_share(texture, -texture).max() == 0
    assert bone_share(np.full((8, 8), 0.4, np.float32), np.full((8, 8), 0.1, np.float32)).max() == 0


def test_detail_finer_than_the_networks_pixels_is_added_but_for_bones_edges():
    y, x = np.mgrid[0:1024, 0:1024]
    rib, vessel = (0.2 * (np.abs(line - 500.5) < 30).astype(np.float32) for line in (y, x))
    vessel[380:620] = 0
    source, prep = np.float32(0.3) + rib + vessel, Preprocessing(size=256)
    (cxr_net, placement), (soft_net, _) = (to_network(image, prep) for image in (source, source - rib - 0.1))
    result, blurred = add_source_detail(source, cxr_net, soft_net, placement, prep), from_network(soft_net, placement)
    np.testing.assert_allclose(result[700:1000], source[700:1000] - 0.1, atol=1e-3)  # the vessel, in the networks' tone
    assert np.abs(blurred[700:1000] - source[700:1000] + 0.1).max() > 0.05  # which theirs alone blurs
    outline = np.abs(result - 0.2)[:, 100:400].max()
    without = np.abs(blurred + source - from_network(cxr_net, placement) - 0.2)[:, 100:400].max()
    assert outline < 0.25 * without


@pytest.mark.parametrize("shape", [(256, 256), (200, 256), (90, 70)])
def test_a_source_no_larger_than_the_networks_has_no_finer_detail(shape):
    source, prep = chest(*shape), Preprocessing(size=256)
    cxr_net, placement = to_network(source, prep)
    soft_net = cxr_net * np.float32(0.5)
    np.testing.assert_array_equal(
        add_source_detail(source, cxr_net, soft_net, placement, prep), from_network(soft_net, placement)
    )


@pytest.mark.parametrize("shape", [(1024, 1024), (1024, 830), (700, 1001)])
def test_what_is_added_is_equalised_as_the_networks_saw_it(shape):
    """Networks that take nothing out: the result is the equalised source."""
    generator = np.random.default_rng(3)
    fine = 0.02 * generator.standard_normal(shape).astype(np.float32)
    source, prep = np.clip(chest(*shape) * 0.9 + 0.05 + fine, 0, 1), Preprocessing(size=256, clahe_clip_limit=2.0)
    cxr_net, placement = to_network(source, prep)
    small = resize(source, (placement.height, placement.width))
    expected = EqualizingCurves.of(small, 2.0, 8, shape).apply(source)
    result = add_source_detail(source, cxr_net, cxr_net, placement, prep)
    np.testing.assert_allclose(result, expected, atol=1e-5)
