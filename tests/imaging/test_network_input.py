"""Resize and padding: there and back without a shift."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic import chest

from bsdiff_rt.config import Preprocessing
from bsdiff_rt.imaging.network_input import from_network, place, resize, to_network


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


def test_resizing_averages_areas_on_the_way_down_and_overshoots_on_the_way_up():
    checks = (np.indices((8, 8)).sum(0) % 2).astype(np.float32)
    np.testing.assert_allclose(resize(checks, (4, 4)), 0.5)
    same = resize(checks, (8, 8))
    np.testing.assert_array_equal(same, checks)
    assert not np.shares_memory(same, checks)
    assert resize(checks, (21, 21)).min() < 0  # bicubic
