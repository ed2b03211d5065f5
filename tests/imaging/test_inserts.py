"""Shapes that are not bone: peak, size, area and place of what is drawn."""

import math

import numpy as np
import pytest

from bsdiff_rt.imaging.inserts import Insert, box, nodule, opacity, pleural_edge, spiculated_nodule, tube

SHAPE = (64, 80)
LINE = [(32.0, 10.0), (32.0, 70.0)]
RNG = np.random.default_rng(0)
ALL = {
    "nodule": nodule((30, 40), 8),
    "spiculated": spiculated_nodule((30, 40), 8, spikes=[(0.3, 2.0), (2.0, 1.5)]),
    "tube": tube(LINE, 3),
    "box": box((30, 40), 20, 10),
    "opacity": opacity((30, 40), 10, RNG),
    "pleural edge": pleural_edge(LINE, 1.5, 6),
}


@pytest.mark.parametrize("name", ALL)
def test_every_shape_has_a_peak_of_one_and_an_empty_border(name):
    picture = ALL[name].picture
    assert picture.dtype == np.float32
    assert np.abs(picture).max() == pytest.approx(1.0, abs=1e-5)
    edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert np.abs(edge).max() < (0.06 if name == "pleural edge" else 1e-3)


@pytest.mark.parametrize("radius", [1.5, 4.0, 9.3])
@pytest.mark.parametrize("centre", [(30.0, 40.0), (30.4, 39.7)])
def test_a_nodule_has_the_volume_and_centre_of_half_a_ball(radius, centre):
    layer = nodule(centre, radius).layer(SHAPE)
    if radius > 4:  # a smaller one's peak is lowered by the size of a pixel before it is set to 1
        assert layer.sum() == pytest.approx(2 / 3 * math.pi * radius**2, rel=0.03)
    rows, columns = np.indices(SHAPE)
    assert (layer * rows).sum() / layer.sum() == pytest.approx(centre[0], abs=0.05)
    assert (layer * columns).sum() / layer.sum() == pytest.approx(centre[1], abs=0.05)
    assert not layer[np.hypot(rows - centre[0], columns - centre[1]) > radius + 1].any()


def test_power_aspect_hollow_and_waves_change_the_shape():
    ball, disc, soft = (nodule((30, 40), 9, power=power).picture for power in (0.5, 0.05, 2.0))
    assert disc.sum() > ball.sum() > soft.sum()
    long = nodule((30, 40), 9, aspect=2.0).layer(SHAPE) > 0.1
    assert np.ptp(np.flatnonzero(long.any(1))) > 1.7 * np.ptp(np.flatnonzero(long.any(0)))
    ring = nodule((30, 40), 9, hollow=0.6).layer(SHAPE)
    assert ring[30, 40] < 0.5 * ring[30, 46]
    lobed = nodule((30, 40), 9, waves=[(0.2, 0.0)]).layer(SHAPE) > 0
    assert lobed[30 + 10, 40] != lobed[30, 40 + 10]


def test_spikes_reach_out_of_the_ball():
    layer = spiculated_nodule((30, 40), 8, spikes=[(0.0, 2.0)]).layer(SHAPE)  # along the rows' direction
    assert layer[30 + 11, 40] > 0.1
    assert layer[30 - 11, 40] == 0
    assert layer[30, 40 + 11] == 0


@pytest.mark.parametrize("width", [2.0, 5.0])
def test_a_tube_is_a_cylinder_of_its_width(width):
    profile = tube(LINE, width).layer(SHAPE)[:, 40]
    assert np.argmax(profile) == 32
    assert profile.sum() == pytest.approx(math.pi / 4 * width, rel=0.12)
    assert not profile[np.abs(np.arange(64) - 32) > width / 2 + 1].any()


def test_a_hollow_tube_shows_two_walls():
    profile = tube(LINE, 9, hollow=0.7).layer(SHAPE)[:, 40]
    assert profile[32] < 0.6 * min(profile[:32].max(), profile[33:].max())
    assert profile[:32].sum() == pytest.approx(profile[33:].sum(), rel=0.2)


def test_a_box_covers_its_sides():
    layer = box((30, 40), 20, 10).layer(SHAPE)
    assert layer.sum() == pytest.approx(200, rel=0.05)
    turned = box((30, 40), 20, 10, angle=math.pi / 2).layer(SHAPE)
    assert np.ptp(np.flatnonzero(turned.any(1))) < np.ptp(np.flatnonzero(turned.any(0)))
    assert box((30, 40), 20, 10, corner=5).layer(SHAPE).sum() == pytest.approx(200 - (100 - 25 * math.pi), rel=0.05)


def test_an_opacity_is_dense_inside_and_fades():
    layer = opacity((32, 40), 12, np.random.default_rng(1), ragged=0.2).layer(SHAPE)
    rows, columns = np.indices(SHAPE)
    r = np.hypot(rows - 32, columns - 40)
    assert layer[r < 5].mean() > 0.8
    assert layer[(r > 10) & (r < 14)].mean() == pytest.approx(0.5, abs=0.2)
    assert layer[r > 22].mean() < 0.05
    again = opacity((32, 40), 12, np.random.default_rng(1), ragged=0.2).layer(SHAPE)
    np.testing.assert_array_equal(layer, again)


def test_a_pleural_edge_has_dark_air_on_the_right_of_its_course_alone():
    """Going right over the picture, the right hand is below."""
    column = pleural_edge(LINE, 1.5, 6).layer(SHAPE)[:, 40]
    assert column[32] > 0.9
    assert column[36] < -0.2
    assert column[36] < column[42] < 0
    assert not column[:29].any()


def test_what_lies_outside_of_the_picture_is_cut_off():
    image = np.zeros((10, 12), np.float32)
    Insert(-2, 10, np.ones((4, 4), np.float32)).add_to(image, 0.5)
    assert image.sum() == pytest.approx(0.5 * 4)
    assert image[:2, 10:].min() == 0.5
    Insert(40, 40, np.ones((4, 4), np.float32)).add_to(image, 0.5)
    assert image.sum() == pytest.approx(0.5 * 4)
