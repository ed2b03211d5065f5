"""Random inserts for training: alike for a seed, inside the picture, never cut off, each with the same weight."""

import numpy as np
import pytest

from train.inserts import FEWEST_INSERTS, KINDS, MOST_INSERTS, draw_inserts, walk

CXR = np.tile(np.linspace(0.2, 0.8, 96, dtype=np.float32), (96, 1))
BONE = np.zeros_like(CXR)
BONE[40:48] = 0.1


def test_the_shares_of_the_kinds_add_up_to_one():
    assert sum(share for _, share in KINDS) == pytest.approx(1.0)


def test_a_seed_gives_the_same_inserts_and_another_one_others():
    first, again, other = (draw_inserts(np.random.default_rng(seed), CXR, BONE, 2.0) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.layer, again.layer)
    np.testing.assert_array_equal(first.weight, again.weight)
    assert not np.array_equal(first.layer, other.layer)


def test_nothing_is_added_where_the_x_ray_is_white():
    """An insert cut off at white would be asked of a network that cannot see it."""
    cxr = CXR.copy()
    cxr[:, 48:] = 1.0
    for seed in range(10):
        layer = draw_inserts(np.random.default_rng(seed), cxr, 0 * cxr, 2.0).layer
        assert not layer[:, 48:].any()
        assert (cxr + layer).max() <= 1.0 + 1e-6


def test_an_output_without_the_inserts_has_an_error_of_about_one():
    """Faint inserts count for less."""
    found = []
    for seed in range(40):
        inserts = draw_inserts(np.random.default_rng(seed), CXR, BONE, 2.0)
        found.append(float((inserts.weight * inserts.layer**2).sum()))
    assert 0.6 < np.median(found) < 1.0
    assert 0.2 < min(found) < max(found) < 1.1


def test_many_inserts_lie_on_bone():
    bone = np.zeros_like(CXR)
    bone[44:47] = 0.2  # 3 of 96 rows
    on_bone, anywhere = [], []
    for seed in range(30):
        weight = draw_inserts(np.random.default_rng(seed), CXR, bone, 4.0).weight
        on_bone.append(weight[42:49].mean())
        anywhere.append(weight.mean())
    assert np.mean(on_bone) > 1.5 * np.mean(anywhere)


@pytest.mark.parametrize(("draw", "share"), KINDS)
def test_every_kind_draws_a_visible_shape(draw, share):
    for seed in range(5):
        insert, contrast = draw(np.random.default_rng(seed), (40.0, 50.0), 1.6)
        assert insert.picture.max() == pytest.approx(1.0, abs=0.02)
        assert 0.01 <= contrast <= 0.5
        assert 0 < share < 1


def test_a_course_is_as_long_as_asked_and_passes_its_point():
    path = walk(np.random.default_rng(0), (10.0, 20.0), 60.0, 1.0)
    assert np.linalg.norm(np.diff(path, axis=0), axis=1).sum() == pytest.approx(60, rel=0.1)
    assert np.linalg.norm(path - (10, 20), axis=1).min() < 1e-6


def test_there_are_several_inserts():
    assert 1 <= FEWEST_INSERTS < MOST_INSERTS
