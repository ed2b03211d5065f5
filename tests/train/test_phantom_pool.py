"""The phantoms of a run: drawn once, extended, written whole; none of them is one that models are judged on."""

import numpy as np
import pytest

from bsdiff_rt.errors import SettingsError
from train.phantom_pool import DRY_RUN_PHANTOMS, HELD_OUT_PHANTOM_SEED, held_out_phantoms, phantom_pool
from train.phantoms import phantom


def test_a_pool_is_drawn_once_and_extended(tmp_path, monkeypatch):
    first = phantom_pool(tmp_path, 2, 64)
    drawn = phantom(1, 64)
    np.testing.assert_array_equal(first[1, 0], np.rint(drawn.cxr * 255))
    np.testing.assert_array_equal(first[1, 1], np.rint(drawn.soft_tissue * 255))
    assert [path.name for path in tmp_path.iterdir()] == ["phantoms_64.npy"]
    seeds = []
    monkeypatch.setattr("train.phantom_pool.phantom", lambda seed, size: seeds.append(seed) or phantom(seed, size))
    more = phantom_pool(tmp_path, 4, 64)
    assert seeds == [0, 2, 3]  # the first: was it this generator?
    np.testing.assert_array_equal(more[:2], first)
    np.testing.assert_array_equal(phantom_pool(tmp_path, 1, 64), first[:1])


def test_a_pool_of_another_generator_is_refused(tmp_path, monkeypatch):
    pool = phantom_pool(tmp_path, 2, 64)
    one_off = pool.copy()
    one_off[0, 0, 5, 7] += 1
    np.save(tmp_path / "phantoms_64.npy", one_off)  # another processor's rounding
    phantom_pool(tmp_path, 2, 64)
    np.save(tmp_path / "phantoms_64.npy", pool[::-1])
    with pytest.raises(SettingsError, match=r"phantoms_64\.npy: drawn by another version of the phantom generator"):
        phantom_pool(tmp_path, 2, 64)


@pytest.mark.parametrize("length", [0, 40, 500])  # no header, half of it, half of the phantoms
def test_a_damaged_pool_is_named(tmp_path, length):
    phantom_pool(tmp_path, 1, 64)
    path = tmp_path / "phantoms_64.npy"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(SettingsError, match=r"phantoms_64\.npy: damaged \(.*\); remove it, and it is drawn anew"):
        phantom_pool(tmp_path, 1, 64)


def test_an_interrupted_write_leaves_the_pool_as_it_was(tmp_path, monkeypatch):
    first = phantom_pool(tmp_path, 1, 64)

    def cut_off(path, pool):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.phantom_pool.np.save", cut_off)
    try:
        phantom_pool(tmp_path, 2, 64)
    except OSError:
        monkeypatch.undo()
    np.testing.assert_array_equal(phantom_pool(tmp_path, 1, 64), first)


def test_a_dry_run_draws_a_few_and_writes_nothing(tmp_path):
    assert len(phantom_pool(tmp_path / "none", 900, 64, keep=False)) == DRY_RUN_PHANTOMS
    assert not (tmp_path / "none").exists()


def test_held_out_phantoms_are_others():
    (pair,) = held_out_phantoms(1, 64)
    np.testing.assert_array_equal(pair.cxr, phantom(HELD_OUT_PHANTOM_SEED, 64).cxr)
    np.testing.assert_array_equal(pair.tone_matched, pair.soft_tissue)
