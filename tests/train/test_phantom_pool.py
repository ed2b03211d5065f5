"""The phantoms of a run: drawn once, extended, written whole; none of them is one that models are judged on."""

import numpy as np
import pytest

from bsdiff_rt.errors import SettingsError
from train.phantom_pool import HELD_OUT_PHANTOM_SEED, draw_held_out_phantoms, load_phantom_pool
from train.phantoms import draw_phantom


def test_a_pool_is_drawn_once_and_extended(tmp_path, monkeypatch):
    first = load_phantom_pool(tmp_path, 2, 64)
    drawn = draw_phantom(1, 64)
    np.testing.assert_array_equal(first[1, 0], np.rint(drawn.cxr * 255))
    np.testing.assert_array_equal(first[1, 1], np.rint(drawn.soft_tissue * 255))
    assert [path.name for path in tmp_path.iterdir()] == ["phantoms_64.npy"]
    seeds = []
    monkeypatch.setattr(
        "train.phantom_pool.draw_phantom", lambda seed, size: seeds.append(seed) or draw_phantom(seed, size)
    )
    more = load_phantom_pool(tmp_path, 4, 64)
    assert seeds == [0, 2, 3]  # the first: was it this generator?
    np.testing.assert_array_equal(more[:2], first)
    np.testing.assert_array_equal(load_phantom_pool(tmp_path, 1, 64), first[:1])


def test_a_pool_of_another_generator_is_refused(tmp_path, monkeypatch):
    pool = load_phantom_pool(tmp_path, 2, 64)
    one_off = pool.copy()
    one_off[0, 0, 5, 7] += 1
    np.save(tmp_path / "phantoms_64.npy", one_off)  # another processor's rounding
    load_phantom_pool(tmp_path, 2, 64)
    np.save(tmp_path / "phantoms_64.npy", pool[::-1])
    with pytest.raises(SettingsError, match=r"phantoms_64\.npy: drawn by another version of the phantom generator"):
        load_phantom_pool(tmp_path, 2, 64)


@pytest.mark.parametrize("length", [0, 40, 500])  # no header, half of it, half of the phantoms
def test_a_damaged_pool_is_named(tmp_path, length):
    load_phantom_pool(tmp_path, 1, 64)
    path = tmp_path / "phantoms_64.npy"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(SettingsError, match=r"phantoms_64\.npy: damaged \(.*\)\. Remove it, and it is drawn again"):
        load_phantom_pool(tmp_path, 1, 64)


def test_an_interrupted_write_leaves_the_pool_as_it_was(tmp_path, monkeypatch):
    first = load_phantom_pool(tmp_path, 1, 64)

    def cut_off(path, pool):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.phantom_pool.np.save", cut_off)
    try:
        load_phantom_pool(tmp_path, 2, 64)
    except OSError:
        monkeypatch.undo()
    np.testing.assert_array_equal(load_phantom_pool(tmp_path, 1, 64), first)


def test_held_out_phantoms_are_others():
    (pair,) = draw_held_out_phantoms(1, 64)
    np.testing.assert_array_equal(pair.cxr, draw_phantom(HELD_OUT_PHANTOM_SEED, 64).cxr)
    np.testing.assert_array_equal(pair.tone_matched, pair.soft_tissue)
