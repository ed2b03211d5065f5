"""One X-ray in memory: what every reader of a format returns and every writer takes. Torch-free."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.errors import InputFailed, InputRefused

if TYPE_CHECKING:
    from pydicom import Dataset

# Share of the pixels, at either end, that does not count for a picture's range: hot and dead ones, specks. A lead
# marker has more.
STRAY = 5e-4
MAX_PIXELS = 2**26  # 8192 x 8192, more than film at 50 micrometres. The header of a small file may claim any size
MIN_SIDE_PX = 32  # smaller than this is a thumbnail or a damaged header, not a chest X-ray


@dataclass(frozen=True)
class Radiograph:
    """A decoded chest X-ray.

    Attributes:
        cxr: [H, W], float32, in [0, 1], air dark (MONOCHROME2 polarity), after modality LUT, VOI and polarity.
        bits_stored: 8 to 16; the depth results are written at.
        pixel_digest: SHA-256 of the decoded pixels; the image's noise depends on it (sampling/noise.py).
        dataset: the source header without its pixels, for a derived DICOM; None for raster files.
        format: name of the `Format` that read it.
        warnings: what the reader had to assume or found odd, each one sentence without patient data.
    """

    cxr: NDArray[np.float32]
    bits_stored: int
    pixel_digest: bytes
    dataset: Dataset | None = None
    format: str = "raster"
    warnings: tuple[str, ...] = ()


def hash_pixels(pixels: NDArray[np.generic]) -> bytes:
    """Return the SHA-256 over shape, dtype and little-endian bytes of decoded pixels, [H, W], any integer dtype."""
    little = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("<"))
    return hashlib.sha256(f"{little.shape}{little.dtype.str}".encode() + little.tobytes()).digest()


def from_pixels(pixels: NDArray[np.uint8] | NDArray[np.uint16], least_bits: int = 8) -> Radiograph:
    """Return grey pixels without a header as an X-ray; 1.0 is the largest value of their depth.

    8-bit pixels have 8 bits stored. 16-bit pixels do not state their depth: X-rays of 8 to 15 bits are commonly saved
    in 16 without scaling. They get the smallest depth that holds their values apart from stray ones (`find_range`).

    Args:
        pixels: [H, W], uint8 or uint16, air dark.
        least_bits: the smallest depth of 16-bit pixels, 8 to 16. They may be darker than their range.

    Raises:
        InputRefused: the picture is too small or empty.
    """
    depth = 8 if pixels.dtype == np.uint8 else max(find_depth(find_range(pixels)[1]), least_bits)
    cxr = np.minimum(pixels.astype(np.float32) / np.float32(2**depth - 1), 1)
    check_picture(cxr)
    return Radiograph(cxr, depth, hash_pixels(pixels))


def hash_grey(cxr: NDArray[np.float32]) -> bytes:
    """Return the hash of grey levels, [H, W] in [0, 1], at 16 bits, if the stored pixels are not at hand."""
    return hash_pixels(np.rint(cxr * 65535).astype(np.uint16))


def find_range(stored: NDArray[np.integer[Any]]) -> tuple[int, int]:
    """Return the smallest and largest of stored values, [H, W] or [N], without a share of `STRAY` at either end."""
    low, high = np.quantile(stored, (STRAY, 1 - STRAY), method="nearest")
    return int(low), int(high)


def find_depth(highest: int) -> int:
    """Return the smallest depth that holds a value, in bits, at least 8."""
    return max(highest.bit_length(), 8)


def check_size(rows: int, columns: int) -> None:
    """Refuse a picture by the size that its header states, before memory is taken for it.

    Raises:
        InputRefused: it has more than MAX_PIXELS pixels.
    """
    if rows * columns > MAX_PIXELS:
        raise InputRefused(f"the image is {rows} x {columns} px; at most {MAX_PIXELS >> 20} million px are processed")


def check_picture(cxr: NDArray[np.float32]) -> None:
    """Refuse a decoded picture, [H, W], float32, that cannot be a chest X-ray.

    Raises:
        InputRefused: a side is shorter than MIN_SIDE_PX, or all pixels are equal.
    """
    rows, columns = cxr.shape
    if min(rows, columns) < MIN_SIDE_PX:
        raise InputRefused(f"the image is {rows} x {columns} px; at least {MIN_SIDE_PX} px a side are needed")
    if float(cxr.min()) == float(cxr.max()):
        raise InputRefused("the image is empty: every pixel shows the same grey")


def to_stored(soft_tissue: NDArray[np.float32], bits_stored: int) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Round a result to the integers it is stored as.

    Args:
        soft_tissue: [H, W], float32, in [0, 1]; values outside are clipped.
        bits_stored: 8 to 16; 1.0 becomes 2**bits_stored - 1.

    Returns:
        [H, W], uint8 for 8 bits, else uint16.

    Raises:
        InputFailed: NaN or infinity among the values, or not a picture.
    """
    if soft_tissue.ndim != 2 or not soft_tissue.size or not np.isfinite(soft_tissue).all():
        raise InputFailed("the result is not an image (NaN, infinity or no pixels); nothing was written")
    stored = np.rint(np.clip(soft_tissue, 0, 1) * np.float32(2**bits_stored - 1))
    if bits_stored == 8:
        return np.asarray(stored, dtype=np.uint8)
    return np.asarray(stored, dtype=np.uint16)
