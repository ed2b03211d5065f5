"""Noise that belongs to the image: the same pixels and seed give the same noise anywhere. Torch-free.

Each image has a stream of numbered draws. A draw is a field of standard normal values: draw 0 is x_T, draw k + 1 is the
noise z of step k. A draw depends only on the user's seed, the image's pixel digest, the draw's number and its size. It
does not depend on device, runner, batch or the order of images and draws.

Philox (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") is counter-based: its numbers are a function
of a key and a 256-bit counter. The key is the image's. The counter's top 64 bits are the number of the draw. The 192
bits below are far more than a draw can use, so draws never overlap.

NumPy guarantees Philox's bits across versions, but not the method that turns them into normal values (NEP 19). A test
pins values to notice a change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.errors import SettingsError

_SEED_LIMIT = 2**64


class ImageNoise:
    """The noise stream of one image. It holds a key and no state, so any thread may draw in any order.

    Args:
        seed: the user's seed, 0 to 2^64 - 1.
        pixel_digest: SHA-256 of the decoded pixels, 32 bytes (`Radiograph.pixel_digest`).

    Raises:
        SettingsError: seed out of range.
    """

    def __init__(self, seed: int, pixel_digest: bytes) -> None:
        if not 0 <= seed < _SEED_LIMIT:
            raise SettingsError(
                f"{seed} is out of range. Give a whole number from 0 to {_SEED_LIMIT - 1}.", setting="seed"
            )
        digest = hashlib.sha256(b"bsdiff-rt noise" + seed.to_bytes(8, "little") + pixel_digest).digest()
        self._key = np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)

    def draw(self, number: int, size: tuple[int, int], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Return one field of standard normal values.

        Args:
            number: number of the draw, from 0. Draws may be skipped, repeated or taken in any order.
            size: (height, width), in px. Another size gives another field, not a crop of this one.
            out: an array to fill and return: `size`, float32, C-contiguous.

        Returns:
            [H, W] float32, mean 0, variance 1.
        """
        counter = np.array([0, 0, 0, number], dtype=np.uint64)  # least significant word first
        generator = np.random.Generator(np.random.Philox(key=self._key, counter=counter))
        return generator.standard_normal(size, dtype=np.float32, out=out)


def batch_noise(
    streams: Sequence[ImageNoise], number: int, size: tuple[int, int], out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Return one draw of several images.

    Args:
        streams: one per image, B of them.
        number: number of the draw: 0 for x_T, k + 1 for step k.
        size: (height, width), in px.
        out: an array to fill and return: [B, 1, H, W] float32, C-contiguous.

    Returns:
        [B, 1, H, W] float32.
    """
    batch = np.empty((len(streams), 1, *size), dtype=np.float32) if out is None else out
    for stream, field in zip(streams, batch, strict=True):
        stream.draw(number, size, out=field[0])
    return batch
