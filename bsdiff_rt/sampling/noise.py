"""Noise that belongs to the image: the same pixels and seed give the same noise anywhere. Torch-free.

Each image has a stream of numbered draws, each a field of standard normals. Draw 0 is x_T, draw k + 1 is the z of step
k. A draw depends on the user's seed, the image's pixel digest, its number and its size, and on nothing else: not on the
device, the runner, the batch, its neighbours, the order of images or which draws came before it.

Philox (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") is counter-based: its numbers are a function
of a key and a 256-bit counter, nothing is carried from one draw to the next. The key is the image's, the counter's
top 64 bits are the draw's number, and the 192 bits below are far more than a draw can use, so draws never overlap.

NumPy guarantees Philox's bits across versions but not the method that turns them into normals (NEP 19);
tests/test_noise.py pins values, so a NumPy that changes it is noticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.errors import SettingsError

_SEED_LIMIT = 2**64


class ImageNoise:
    """The noise stream of one image; holds a 128-bit key and no state, so any thread may draw from it in any order.

    Args:
        seed: the user's seed, 0 to 2^64 - 1.
        pixel_digest: SHA-256 of the decoded pixels, 32 bytes (`Radiograph.pixel_digest`).

    Raises:
        SettingsError: seed out of range.
    """

    def __init__(self, seed: int, pixel_digest: bytes) -> None:
        if not 0 <= seed < _SEED_LIMIT:
            raise SettingsError(f"seed {seed} is out of range; give a whole number from 0 to {_SEED_LIMIT - 1}")
        digest = hashlib.sha256(b"bsdiff-rt noise" + seed.to_bytes(8, "little") + pixel_digest).digest()
        self._key = np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)

    def draw(self, number: int, size: tuple[int, int], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """One field of standard normals; about 0.5 ms per 256 x 256 px on one core.

        Args:
            number: which draw, from 0; draws may be skipped, repeated or taken in any order.
            size: (height, width), in px. Another size is another field, not a crop of this one.
            out: filled and returned if given: `size`, float32, C-contiguous (a slice of a pinned batch, say).

        Returns:
            [H, W] float32, mean 0, variance 1.
        """
        counter = np.array([0, 0, 0, number], dtype=np.uint64)  # least significant word first
        generator = np.random.Generator(np.random.Philox(key=self._key, counter=counter))
        return generator.standard_normal(size, dtype=np.float32, out=out)


def batch_noise(
    streams: Sequence[ImageNoise], number: int, size: tuple[int, int], out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """The same draw of several images, as the sampler takes it.

    Args:
        streams: one per image, in batch order; B of them.
        number: which draw: 0 for x_T, k + 1 for step k.
        size: (height, width), in px.
        out: filled and returned if given: [B, 1, H, W] float32, C-contiguous (the NumPy view of a pinned tensor, say).

    Returns:
        [B, 1, H, W] float32.
    """
    batch = np.empty((len(streams), 1, *size), dtype=np.float32) if out is None else out
    for stream, field in zip(streams, batch, strict=True):
        stream.draw(number, size, out=field[0])
    return batch
