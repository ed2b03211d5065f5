"""Resize, padding and tone: there and back without a shift, and the local bone layer."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from synthetic import chest

from bsdiff_rt.config import Preprocessing, ScannerTone
from bsdiff_rt.intensity import (
    BONES_WINDOW_PX,
    RIBS_WINDOW_PX,
    TONE_CHANGE,
    TONE_CXR_RMS,
    EqualizingCurves,
    bone_share,
    equalize,
    from_network,
    place,
    resize,
    scanner_power,
    subtract_local_bone,
    to_network,
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


@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (256, 200), (101, 256)])
def test_a_picture_of_the_networks_size_comes_back_unchanged(rows, columns):
    levels = np.random.default_rng(0).integers(0, 65536, (rows, columns))
    picture = (levels / 65535).astype(np.float32)
    square, placement = to_network(picture, Preprocessing(size=256))
    assert square.shape == (256, 256)
    assert square.dtype == np.float32
    assert (placement.height, placement.width) == (rows, columns)
    back = from_network(square, placement)
    np.testing.assert_allclose(back, picture, atol=1e-7)
    np.testing.assert_array_equal(np.rint(back * 65535), levels)


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        (1024, 1024, (0, 0, 256, 256)),
        (1955, 1841, (0, 7, 256, 241)),
        (2048, 2500, (23, 0, 210, 256)),
        (333, 77, (0, 98, 256, 59)),
        (40, 50, (25, 0, 205, 256)),
        (3, 3000, (127, 0, 1, 256)),
    ],
)
def test_placement_keeps_the_aspect_and_centres(rows, columns, expected):
    placement = place((rows, columns), 256)
    assert (placement.top, placement.left, placement.height, placement.width) == expected
    assert (placement.rows, placement.columns, placement.size) == (rows, columns, 256)


def test_enlarging_keeps_the_range():
    """Bicubic interpolation overshoots at sharp edges; the networks have seen nothing outside [-1, 1]."""
    edges = np.zeros((40, 40), np.float32)
    edges[::7, :], edges[:, 20:] = 1, 1
    square, _ = to_network(edges, Preprocessing(size=64))
    assert (square.min(), square.max()) == (-1, 1)


@pytest.mark.parametrize(("rows", "columns"), [(1024, 1024), (1955, 1841), (700, 901), (333, 77), (120, 95), (64, 256)])
def test_smooth_pictures_survive_the_round_trip(rows, columns):
    y, x = np.mgrid[0:rows, 0:columns]
    picture = (0.5 + 0.4 * np.sin(4 * (x + 0.5) / columns) * np.cos(3 * (y + 0.5) / rows)).astype(np.float32)
    square, placement = to_network(picture, Preprocessing(size=256))
    assert -1 <= square.min() <= square.max() <= 1
    back = from_network(square, placement)
    assert back.shape == picture.shape
    assert back.dtype == np.float32
    # Rows and columns each hold less than a period: bicubic is good to a thousandth, edges (no gradient there) to 1 %.
    np.testing.assert_allclose(back, picture, atol=0.02)
    assert np.abs(back - picture).mean() < 1.5e-3


def _centroid(picture):
    y, x = np.mgrid[0 : picture.shape[0], 0 : picture.shape[1]]
    weights = picture.astype(np.float64) / picture.sum(dtype=np.float64)
    return (y * weights).sum(), (x * weights).sum()


@pytest.mark.parametrize(("rows", "columns"), [(1024, 1024), (1000, 700), (511, 513), (100, 130)])
def test_nothing_shifts(rows, columns):
    centre = (0.4 * rows, 0.62 * columns)
    y, x = np.mgrid[0:rows, 0:columns]
    sigma = 0.05 * max(rows, columns)
    picture = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / (2 * sigma**2)).astype(np.float32)
    square, placement = to_network(picture, Preprocessing(size=256))
    scale = placement.height / rows, placement.width / columns
    row, column = _centroid((square + 1) / 2)
    # The centre of pixel i lies at i + 0.5; half a pixel of the 256 square would be 0.5 here.
    assert row == pytest.approx((centre[0] + 0.5) * scale[0] - 0.5 + placement.top, abs=0.02)
    assert column == pytest.approx((centre[1] + 0.5) * scale[1] - 0.5 + placement.left, abs=0.02)
    assert _centroid(from_network(square, placement)) == pytest.approx(_centroid(picture), abs=0.02 * rows / 256)


def test_the_border_is_the_repeated_edge():
    picture = chest(100, 60)
    square, placement = to_network(picture, Preprocessing(size=128))
    inside = slice(placement.left, placement.left + placement.width)
    assert (square[:, : placement.left] == square[:, inside][:, :1]).all()
    assert (square[:, placement.left + placement.width :] == square[:, inside][:, -1:]).all()


def test_results_outside_the_range_are_clipped():
    placement = place((64, 64), 32)
    assert from_network(np.full((32, 32), 1.5, np.float32), placement).max() == 1
    assert from_network(np.full((32, 32), -1.5, np.float32), placement).min() == 0


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


def test_equalising_can_be_undone():
    picture = chest(200, 170)
    curves = EqualizingCurves.of(picture, 2.0, 8)
    shown = curves.apply(picture)
    assert np.abs(shown - picture).mean() > 0.03
    # A curve is flat where no pixel has the level: another level then shows the same.
    np.testing.assert_allclose(curves.apply(curves.undo(shown)), shown, atol=2e-3)
    assert np.median(np.abs(curves.undo(shown) - picture)) < 1e-3


def test_the_share_of_bone_is_a_local_slope():
    generator = np.random.default_rng(2)
    texture = 0.1 * generator.standard_normal((64, 64)).astype(np.float32)
    for slope in (0.0, 0.4, 1.0):
        # The assumed noise, a hundredth of the texture's variance, pulls the slope down by as much.
        np.testing.assert_allclose(bone_share(texture, slope * texture), slope, atol=0.04)
    assert bone_share(texture, -texture).max() == 0
    assert bone_share(np.full((8, 8), 0.4, np.float32), np.full((8, 8), 0.1, np.float32)).max() == 0


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


def test_resizing_averages_areas_on_the_way_down_and_overshoots_on_the_way_up():
    checks = (np.indices((8, 8)).sum(0) % 2).astype(np.float32)
    np.testing.assert_allclose(resize(checks, (4, 4)), 0.5)
    same = resize(checks, (8, 8))
    np.testing.assert_array_equal(same, checks)
    assert not np.shares_memory(same, checks)
    assert resize(checks, (21, 21)).min() < 0  # bicubic
