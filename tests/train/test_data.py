"""Training data: pairs found and read, tone matched, augmentation that keeps the two images of a pair together."""

import cv2
import numpy as np
import pytest

from bsdiff_rt.errors import SettingsError
from train.data import Augmentation, Batches, Pair, degrade, find_pairs, load_pair, match_tone, tone_curve, warp
from train.phantoms import phantom

PLAIN = Augmentation(geometry=0.0, foreign=0.0, swap_bones=0.0, blur_noise=0.0)


@pytest.fixture(scope="module")
def pair():
    made = phantom(3, 128)
    return Pair("p", made.cxr, made.soft_tissue, made.soft_tissue)


@pytest.fixture(scope="module")
def pool():
    made = [phantom(seed, 64) for seed in range(3)]
    return np.rint(np.stack([[p.cxr, p.soft_tissue] for p in made]) * 255).astype(np.uint8)


def test_pairs_are_found_by_name_and_read_on_one_grey_scale(tmp_path):
    """The truth's largest value needs 15 bits, the X-ray's 16: read alone they would be scaled apart."""
    cxr = np.full((64, 64), 40000, np.uint16)
    cxr[:32] = 60000
    cv2.imwrite(str(tmp_path / "b_cxr.png"), cxr)
    cv2.imwrite(str(tmp_path / "b_soft_tissue.png"), cxr // 2)
    (entry,) = find_pairs(tmp_path)
    assert entry[0] == "b"
    loaded = load_pair(*entry, size=64)
    np.testing.assert_allclose(loaded.soft_tissue * 2, loaded.cxr, atol=1e-4)
    assert loaded.cxr.max() == pytest.approx(60000 / 65535, abs=1e-4)


def test_pairs_missing_or_incomplete_are_said_so(tmp_path):
    with pytest.raises(SettingsError, match="no pairs NAME_cxr"):
        find_pairs(tmp_path)
    cv2.imwrite(str(tmp_path / "a_cxr.png"), np.eye(64, dtype=np.uint8))
    with pytest.raises(SettingsError, match="expected one file a_soft_tissue"):
        find_pairs(tmp_path)


def test_tone_matching_removes_a_change_of_tone_and_keeps_bone(pair):
    darker = np.clip(pair.soft_tissue * 0.9 - 0.02, 0, 1).astype(np.float32)
    before = np.abs(darker - pair.soft_tissue).mean()
    after = np.abs(match_tone(pair.cxr, darker) - pair.soft_tissue).mean()
    assert after < 0.5 * before
    bone = pair.cxr - match_tone(pair.cxr, pair.soft_tissue)
    truth = pair.cxr - pair.soft_tissue
    assert np.corrcoef(bone.ravel(), truth.ravel())[0, 1] > 0.8


def test_a_batch_depends_on_seed_and_step_alone(pair, pool):
    first, again = (Batches([pair], pool, 0.5, Augmentation(), 1) for _ in range(2))
    np.testing.assert_array_equal(first.batch(7, 3, 64, 64), again.batch(7, 3, 64, 64))
    assert not np.array_equal(first.batch(7, 3, 64, 64), first.batch(8, 3, 64, 64))
    assert not np.array_equal(
        first.batch(7, 3, 64, 64), Batches([pair], pool, 0.5, Augmentation(), 2).batch(7, 3, 64, 64)
    )


def test_batches_have_the_networks_range_and_shape(pair, pool):
    batch = Batches([pair], pool, 0.5, Augmentation(), 0).batch(0, 6, 64, 48)
    assert batch.shape == (6, 2, 48, 48)
    assert batch.dtype == np.float32
    assert batch.min() >= -1.0
    assert batch.max() <= 1.0


def test_without_augmentation_a_phantom_comes_back_as_it_is(pool):
    batch = Batches([], pool, 0.5, PLAIN, 0).batch(0, 1, 64, 64)[0]
    # One of the pool, within the rounding of the warp's coordinates.
    assert min(np.abs((batch + 1) / 2 - stored / 255).max() for stored in pool.astype(np.float32)) < 1e-3


def test_nothing_to_train_on_is_refused():
    with pytest.raises(SettingsError, match="nothing to train on"):
        Batches([], np.empty((0, 2, 8, 8), np.uint8), 0.5, PLAIN, 0)


def test_real_share_is_one_without_phantoms(pair):
    assert Batches([pair], np.empty((0, 2, 8, 8), np.uint8), 0.3, PLAIN, 0).real_share == 1.0


def test_warp_moves_every_image_alike(pair):
    """Whatever is done to the X-ray is done to the bone layer: warping commutes with subtraction."""
    for seed in range(4):
        cxr, soft_tissue = warp(np.random.default_rng(seed), [pair.cxr, pair.soft_tissue], 64, 48, 1.0)
        (bone,) = warp(np.random.default_rng(seed), [pair.cxr - pair.soft_tissue], 64, 48, 1.0)
        np.testing.assert_allclose(cxr - soft_tissue, bone, atol=2e-3)  # remap's 5-bit sub-pixel positions


def test_tone_curves_are_monotone_and_stay_in_range():
    grid = np.linspace(0, 1, 500, dtype=np.float32)
    for seed in range(20):
        shown = tone_curve(np.random.default_rng(seed))(grid)
        assert (np.diff(shown) >= 0).all()
        assert shown[0] >= 0
        assert shown[-1] <= 1
        assert shown[-1] - shown[0] > 0.5


def test_degrading_changes_sharpness_of_both_or_noise_of_the_xray(pair):
    kinds = set()
    for seed in range(12):
        cxr, soft_tissue = degrade(np.random.default_rng(seed), pair.cxr, pair.soft_tissue)
        changed = not np.array_equal(cxr, pair.cxr), not np.array_equal(soft_tissue, pair.soft_tissue)
        kinds.add(changed)
    assert kinds == {(True, True), (True, False)}
