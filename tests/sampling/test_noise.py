"""Noise depends on seed, pixels, draw number and size, and on nothing else."""

import hashlib

import numpy as np
import pytest

from bsdiff_rt.errors import SettingsError
from bsdiff_rt.sampling.noise import ImageNoise, batch_noise

DIGEST = hashlib.sha256(b"one image").digest()
OTHER = hashlib.sha256(b"another image").digest()
SIZE = (24, 32)

# From numpy 2.4.6 on x86-64. Read as float32.
GOLDEN_DRAW_0 = (0.61748916, -0.47992817, 0.90678614, -1.3231734)
GOLDEN_DRAW_999 = (1.0969422, -1.3707452, -0.30365938, -0.39450818)
GOLDEN_LAST_SEED = (-0.13825348, -1.1598449, 0.66243875, 1.3797085)


def test_golden_values() -> None:
    """Pinned: a change here changes every sampled image of every user, and must be meant."""
    noise = ImageNoise(0, DIGEST)
    np.testing.assert_array_equal(noise.draw(0, SIZE)[0, :4], np.array(GOLDEN_DRAW_0, dtype=np.float32))
    np.testing.assert_array_equal(noise.draw(999, SIZE)[-1, -4:], np.array(GOLDEN_DRAW_999, dtype=np.float32))
    far = ImageNoise(2**64 - 1, DIGEST).draw(1, SIZE)
    np.testing.assert_array_equal(far[0, :4], np.array(GOLDEN_LAST_SEED, dtype=np.float32))


def test_draws_are_addressable_in_any_order() -> None:
    in_order = [ImageNoise(7, DIGEST).draw(k, SIZE) for k in range(6)]
    stream = ImageNoise(7, DIGEST)
    for k in (5, 0, 3, 3, 1):
        np.testing.assert_array_equal(stream.draw(k, SIZE), in_order[k])


def test_seed_pixels_and_number_each_change_the_noise() -> None:
    fields = [
        ImageNoise(0, DIGEST).draw(0, SIZE),
        ImageNoise(1, DIGEST).draw(0, SIZE),
        ImageNoise(256, DIGEST).draw(0, SIZE),
        ImageNoise(0, OTHER).draw(0, SIZE),
        ImageNoise(0, DIGEST).draw(1, SIZE),
        ImageNoise(0, DIGEST).draw(2, SIZE),
    ]
    correlation = np.corrcoef([field.ravel() for field in fields])
    # 768 independent pixels: standard error 0.036; 5 of them for 15 pairs.
    assert np.abs(correlation - np.eye(len(fields))).max() < 0.18


def test_is_standard_normal() -> None:
    pooled = np.concatenate([ImageNoise(3, DIGEST).draw(k, (256, 256)).ravel() for k in range(8)]).astype(np.float64)
    count = pooled.size  # 524,288; each bound is 5 standard errors of its statistic
    assert abs(pooled.mean()) < 5 / np.sqrt(count)
    assert abs(pooled.var() - 1) < 5 * np.sqrt(2 / count)
    assert abs((pooled**3).mean()) < 5 * np.sqrt(15 / count)
    assert abs((pooled**4).mean() - 3) < 5 * np.sqrt(96 / count)
    assert 4 < np.abs(pooled).max() < 6.5


def test_neighbouring_pixels_are_independent() -> None:
    field = ImageNoise(3, DIGEST).draw(0, (256, 256)).astype(np.float64)
    for shifted in (field[:, 1:] * field[:, :-1], field[1:] * field[:-1]):
        assert abs(shifted.mean()) < 5 / np.sqrt(shifted.size)  # 5 standard errors


def test_batch_is_the_streams_side_by_side() -> None:
    streams = [ImageNoise(5, hashlib.sha256(bytes([i])).digest()) for i in range(5)]
    batch = batch_noise(streams, 4, SIZE)
    assert batch.shape == (5, 1, *SIZE)
    assert batch.dtype == np.float32
    for i, stream in enumerate(streams):
        np.testing.assert_array_equal(batch[i, 0], stream.draw(4, SIZE))
    np.testing.assert_array_equal(batch_noise(streams[::-1], 4, SIZE), batch[::-1])


def test_fills_the_buffer_it_is_given() -> None:
    stream = ImageNoise(5, DIGEST)
    buffer = np.full((2, 1, *SIZE), np.nan, dtype=np.float32)
    assert batch_noise([stream, stream], 0, SIZE, out=buffer) is buffer
    np.testing.assert_array_equal(buffer[1, 0], stream.draw(0, SIZE))
    field = np.empty(SIZE, dtype=np.float32)
    assert stream.draw(0, SIZE, out=field) is field


def test_a_buffer_for_another_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        batch_noise([ImageNoise(5, DIGEST)], 0, SIZE, out=np.empty((2, 1, *SIZE), dtype=np.float32))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(SettingsError, match=rf"^{seed} is out of range\. Give a whole number from 0 to {2**64 - 1}\.$"):
        ImageNoise(seed, DIGEST)
