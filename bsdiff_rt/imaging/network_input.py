"""Turn an X-ray in [0, 1] into the square in [-1, 1] that the model sees, and back. Torch-free.

The aspect ratio is kept. The longer side is resized to the model's size, and the shorter side is padded by repeating
the edge. Padding with black would put a false anatomical edge into the picture. cv2.resize maps pixel centres to pixel
centres, so nothing shifts by half a pixel on the way there and back (tests/imaging/test_network_input.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.config import Preprocessing
from bsdiff_rt.imaging.clahe import equalize


@dataclass(frozen=True)
class Placement:
    """Where a picture lies in the network's square.

    Attributes:
        rows, columns: matrix of the source picture, px.
        top, left: first row and column of the resized picture in the square, px.
        height, width: size of the resized picture in the square, px.
        size: side of the square, px.
    """

    rows: int
    columns: int
    top: int
    left: int
    height: int
    width: int
    size: int


def place(shape: tuple[int, ...], size: int) -> Placement:
    """Return where a picture of `shape` (rows, columns) lies in a square of `size` px: centred, longer side filled."""
    rows, columns = shape
    longer = max(shape)
    height = max(1, round(rows * size / longer))
    width = max(1, round(columns * size / longer))
    return Placement(rows, columns, (size - height) // 2, (size - width) // 2, height, width, size)


def resize(picture: NDArray[np.floating[Any]], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Resize a picture: area average to shrink it, bicubic to enlarge it.

    Bicubic interpolation overshoots at edges. Clip the result if its range counts.

    Args:
        picture: [H, W].
        shape: rows and columns of the result.

    Returns:
        [rows, columns], float32; a copy if the shape stays.
    """
    picture = np.ascontiguousarray(picture, dtype=np.float32)
    if picture.shape == shape:
        return picture.copy()
    rows, columns = shape
    shrinking = rows <= picture.shape[0] and columns <= picture.shape[1]
    method = cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(picture, (columns, rows), interpolation=method), dtype=np.float32)


def to_network(cxr: NDArray[np.float32], prep: Preprocessing) -> tuple[NDArray[np.float32], Placement]:
    """Make a picture into the model's input.

    CLAHE runs on the resized picture, if the preprocessing has it. So its tiles hold the same number of pixels for
    every detector.

    Args:
        cxr: [H, W], float32, in [0, 1].
        prep: the bundle's preprocessing.

    Returns:
        [size, size], float32, in [-1, 1], and where the picture lies in it.
    """
    placement = place(cxr.shape, prep.size)
    picture = clip_to_unit(resize(cxr, (placement.height, placement.width)))  # enlarging overshoots at edges
    if prep.clahe_clip_limit > 0:
        picture = equalize(picture, prep.clahe_clip_limit, prep.clahe_tiles)
    bottom = prep.size - placement.height - placement.top
    right = prep.size - placement.width - placement.left
    square = np.pad(picture, ((placement.top, bottom), (placement.left, right)), mode="edge")
    return square * np.float32(2) - np.float32(1), placement


def from_network(image: NDArray[np.float32], placement: Placement) -> NDArray[np.float32]:
    """Undo padding and resizing (bicubic on the way up). CLAHE is not undone: the tone is the model's.

    Args:
        image: [size, size], float32, in [-1, 1].

    Returns:
        [H, W], float32, in [0, 1], with H, W the source's matrix.
    """
    picture = resize(crop(image, placement), (placement.rows, placement.columns))
    return clip_to_unit((picture + np.float32(1)) / np.float32(2))


def clip_to_unit(picture: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Return a picture clipped to [0, 1], float32."""
    return np.asarray(np.clip(picture, 0, 1), dtype=np.float32)


def view_picture(square: NDArray[np.float32], placement: Placement) -> NDArray[np.float32]:
    """Return the picture's part of a square in [-1, 1], in [0, 1]."""
    return clip_to_unit((crop(square, placement) + 1) / 2)


def crop(square: NDArray[np.float32], placement: Placement) -> NDArray[np.float32]:
    """Return the picture's part of the square, [height, width]."""
    bottom, right = placement.top + placement.height, placement.left + placement.width
    return square[placement.top : bottom, placement.left : right]


def without_mirror(passes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the mean of each image's result and that of its mirror image, turned back.

    Args:
        passes: [2N, ..., S], each image's result and then that of its mirror image.

    Returns:
        [N, ..., S].
    """
    return (passes[::2] + passes[1::2, ..., ::-1]) * np.float32(0.5)
