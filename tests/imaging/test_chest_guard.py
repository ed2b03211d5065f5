"""The judge of frontal chest X-rays: what it warns of, and what it must not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data
from synthetic import chest

from bsdiff_rt.config import Preprocessing
from bsdiff_rt.imaging.chest_guard import INVERTED, NO_CHEST, WEIGHTS, WRONG_WAY, describe_picture, load_guard
from bsdiff_rt.imaging.one_image import prepare
from train.phantoms import draw_phantom

FIRST_SEED = 10**6  # none of the fit's phantoms


@pytest.fixture(scope="module")
def phantoms() -> list[np.ndarray]:
    return [draw_phantom(FIRST_SEED + number, 128).cxr for number in range(30)]


def test_chests_pass(phantoms):
    guard = load_guard()
    assert [guard.check(one) for one in phantoms] == [None] * len(phantoms)
    for rows, columns in ((32, 32), (64, 64), (96, 80), (300, 240)):
        assert guard.check(chest(rows, columns)) is None


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_turned_chests_are_told_how_they_lie(phantoms, turns):
    """`turns` quarter turns to the left put the picture right."""
    answers = [load_guard().check(np.rot90(one, -turns)) for one in phantoms]
    assert answers.count(None) <= 1
    assert answers.count(WRONG_WAY[turns]) >= 0.8 * len(phantoms)


@pytest.mark.parametrize(
    "picture",
    [
        skimage.data.camera(),
        skimage.data.coins(),
        skimage.data.page(),
        skimage.data.moon(),
        np.zeros((80, 60)),
        np.ones((64, 64)),
        np.random.default_rng(0).random((128, 128)),
        np.tile(np.linspace(0, 1, 100), (100, 1)),
    ],
    ids=["camera", "coins", "page", "moon", "black", "white", "noise", "slope"],
)
def test_other_pictures_are_warned_of(picture):
    shown = picture.astype(np.float32)
    shown = shown / max(float(shown.max()), 1.0)
    assert load_guard().check(shown) is not None


def test_inverted_chests_are_told_so(phantoms):
    answers = [load_guard().check(1 - one) for one in phantoms]
    assert answers.count(None) == 0
    assert answers.count(INVERTED) >= 0.8 * len(phantoms)


def test_part_of_a_chest_is_warned_of(phantoms):
    warned = [load_guard().check(one[:40, :40]) is not None for one in phantoms]
    assert sum(warned) >= 0.8 * len(phantoms)


def test_the_score_does_not_depend_on_tone_and_size(phantoms):
    guard = load_guard()
    for one in phantoms[:5]:
        smooth = np.kron(one[::2, ::2], np.ones((2, 2), np.float32))
        assert guard.score(0.1 + 0.3 * smooth) == pytest.approx(guard.score(smooth), abs=1e-2)
        assert guard.score(smooth**0.5) == pytest.approx(guard.score(smooth), abs=1.0)
        assert guard.score(np.kron(smooth, np.ones((3, 3), np.float32))) == pytest.approx(guard.score(smooth), abs=1e-2)


def test_a_large_picture_is_judged_like_a_small_one(phantoms):
    guard = load_guard()
    for turned in (phantoms[0], np.ascontiguousarray(phantoms[0][::-1, ::-1]), 1 - phantoms[0]):
        assert guard.check(np.kron(turned, np.ones((20, 20), np.float32))) == guard.check(turned)


def test_features_lie_within_their_bounds():
    for picture in (chest(64, 64), np.zeros((40, 90), np.float32), np.eye(200, dtype=np.float32)):
        features = describe_picture(picture)
        assert features.shape == load_guard().weights.shape
        assert np.abs(features).max() <= 2


def test_the_weights_are_a_small_file():
    assert WEIGHTS.stat().st_size < 50_000
    guard = load_guard()
    assert guard.least <= 0 <= guard.clear


def test_preparing_warns_once_and_leaves_the_pixels():
    photograph = (skimage.data.camera() / 255).astype(np.float32)
    prepared = prepare(photograph, Preprocessing(64))
    assert prepared.warnings == (NO_CHEST,)
    np.testing.assert_array_equal(prepared.cxr, photograph)
    assert prepare(1 - draw_phantom(FIRST_SEED, 96).cxr, Preprocessing(64)).warnings == (INVERTED,)


def with_white_lung(cxr, side, level):
    """The picture with one lung nearly as white as its brightest bone, as after a large effusion."""
    rows, columns = cxr.shape
    y, x = np.mgrid[0:rows, 0:columns]
    centre = columns * (0.29 if side == "left" else 0.71)
    inside = (((x - centre) / (columns * 0.2)) ** 2 + ((y - rows * 0.45) / (rows * 0.36)) ** 2 - 1) * 12
    lung = 1 / (1 + np.exp(np.clip(inside, -50, 50)))
    return (cxr * (1 - lung) + lung * (0.9 * level * cxr.max() + 0.1 * cxr)).astype(np.float32)


@pytest.mark.parametrize("level", [0.6, 0.85, 1.0])
@pytest.mark.parametrize("side", ["left", "right"])
def test_one_white_lung_is_not_inverted(phantoms, side, level):
    assert INVERTED not in [load_guard().check(with_white_lung(one, side, level)) for one in phantoms]


def test_a_chest_cut_or_faint_is_not_inverted_and_its_negative_is(phantoms):
    for one in phantoms:
        for part in (one[:, 24:], one[:, :-24], 0.2 + 0.3 * one):
            assert load_guard().check(part) != INVERTED
            assert load_guard().check(1 - part) is not None
