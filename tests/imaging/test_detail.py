"""What of the source goes into a result, and what of it is bone."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic import chest

from bsdiff_rt.config import Preprocessing
from bsdiff_rt.imaging.clahe import EqualizingCurves
from bsdiff_rt.imaging.detail import add_fine_detail, bone_share
from bsdiff_rt.imaging.network_input import from_network, resize, to_network


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
    result, blurred = add_fine_detail(source, cxr_net, soft_net, placement, prep), from_network(soft_net, placement)
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
        add_fine_detail(source, cxr_net, soft_net, placement, prep), from_network(soft_net, placement)
    )


def test_a_model_that_takes_nothing_out_leaves_hard_edges_as_they_are():
    """Enlarged pictures overshoot there. Clipped on one side alone, that left bright fringes in black."""
    source = chest(1024, 1024)
    source[:, :300], source[:200], source[700:800, 500:600] = 0, 1, 1
    cxr_net, placement = to_network(source, Preprocessing(size=256))
    result = add_fine_detail(source, cxr_net, cxr_net, placement, Preprocessing(size=256))
    np.testing.assert_allclose(result, source, atol=1e-5)


@pytest.mark.parametrize("shape", [(1024, 1024), (1024, 830), (700, 1001)])
def test_what_is_added_is_equalised_as_the_networks_saw_it(shape):
    """Networks that take nothing out: the result is the equalised source."""
    generator = np.random.default_rng(3)
    fine = 0.02 * generator.standard_normal(shape).astype(np.float32)
    source, prep = np.clip(chest(*shape) * 0.9 + 0.05 + fine, 0, 1), Preprocessing(size=256, clahe_clip_limit=2.0)
    cxr_net, placement = to_network(source, prep)
    small = resize(source, (placement.height, placement.width))
    expected = EqualizingCurves.measure(small, 2.0, 8, shape).apply(source)
    result = add_fine_detail(source, cxr_net, cxr_net, placement, prep)
    np.testing.assert_allclose(result, expected, atol=1e-5)
