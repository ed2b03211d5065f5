"""Pixel values in [0, 1] at the source's matrix <-> the square in [-1, 1] that the networks see. Torch-free.

The aspect ratio is kept: the longer side is resized to the network's size, the shorter side is padded in the middle by
repeating the edge. Repeating it (rather than padding with black) puts no false anatomical edge where the networks'
receptive fields reach into the picture. cv2.resize maps pixel centres to pixel centres, so nothing shifts by half a
pixel on the way there and back (tests/test_intensity.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.config import Preprocessing

# Standard deviation of the Gaussian that separates local bone structure (ribs, clavicles) from a change of overall
# tone, in px of a DETAIL_REFERENCE_PX square; other sizes scale it.
DETAIL_SIGMA_PX = 6.0
DETAIL_REFERENCE_PX = 256

CLAHE_LEVELS = 256  # histogram bins per tile, OpenCV's number for 8-bit pictures


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


def place(rows: int, columns: int, size: int) -> Placement:
    """The placement of a picture of `rows` x `columns` px in a square of `size` px: longer side filled, centred."""
    longer = max(rows, columns)
    height = max(1, round(rows * size / longer))
    width = max(1, round(columns * size / longer))
    return Placement(rows, columns, (size - height) // 2, (size - width) // 2, height, width, size)


def to_network(cxr: NDArray[np.float32], prep: Preprocessing) -> tuple[NDArray[np.float32], Placement]:
    """Make a picture into the networks' input.

    CLAHE, where the preprocessing asks for it, runs on the resized picture: there its tiles hold the same number of
    pixels whatever detector the source came from.

    Args:
        cxr: [H, W], float32, in [0, 1].
        prep: the bundle's preprocessing.

    Returns:
        [size, size], float32, in [-1, 1], and where the picture lies in it.
    """
    placement = place(cxr.shape[0], cxr.shape[1], prep.size)
    picture = _resize(cxr, placement.height, placement.width)
    if prep.clahe_clip_limit > 0:
        picture = equalize(picture, prep.clahe_clip_limit, prep.clahe_tiles)
    bottom = prep.size - placement.height - placement.top
    right = prep.size - placement.width - placement.left
    square = np.pad(picture, ((placement.top, bottom), (placement.left, right)), mode="edge")
    return square * np.float32(2) - np.float32(1), placement


def from_network(image: NDArray[np.float32], placement: Placement) -> NDArray[np.float32]:
    """Undo padding and resizing (bicubic on the way up). CLAHE is not undone: the tone is the networks'.

    Args:
        image: [size, size], float32, in [-1, 1].

    Returns:
        [H, W], float32, in [0, 1], with H, W the source's matrix.
    """
    picture = _resize(_crop(image, placement), placement.rows, placement.columns)
    return _unit((picture + np.float32(1)) / np.float32(2))


def subtract_local_bone(
    cxr: NDArray[np.float32],
    cxr_net: NDArray[np.float32],
    soft_tissue_net: NDArray[np.float32],
    placement: Placement,
    sigma_px: float | None = None,
) -> NDArray[np.float32]:
    """Subtract the networks' bone layer, without its slow part, from the full-resolution source (`--detail source`).

    bone = cxr_net - soft_tissue_net; local = bone - Gaussian(bone); soft tissue = source - local. The source's tone and
    sharpness stay; what the networks see only as a change of overall tone is left in.

    Args:
        cxr: [H, W], float32, in [0, 1], the source.
        cxr_net: [size, size], float32, in [-1, 1], the networks' input made from it.
        soft_tissue_net: [size, size], float32, in [-1, 1], their output.
        placement: what `to_network` returned for this picture.
        sigma_px: standard deviation of the Gaussian in px of the square; default DETAIL_SIGMA_PX scaled to its size.

    Returns:
        [H, W], float32, in [0, 1].
    """
    if sigma_px is None:
        sigma_px = DETAIL_SIGMA_PX * placement.size / DETAIL_REFERENCE_PX
    bone = _crop(cxr_net, placement) - _crop(soft_tissue_net, placement)
    local = bone - cv2.GaussianBlur(bone, (0, 0), sigma_px, borderType=cv2.BORDER_REPLICATE)
    local_bone = _resize(local, placement.rows, placement.columns)
    # The networks' range is twice as wide as [0, 1].
    return _unit(cxr - local_bone / np.float32(2))


def equalize(picture: NDArray[np.float32], clip_limit: float, tiles: int) -> NDArray[np.float32]:
    """Contrast-limited adaptive histogram equalisation as OpenCV does it on 8 bits, without rounding to 8 bits.

    Within one level of OpenCV's 8-bit result: the tables are its own (256 bins per tile, clipped, the excess spread),
    values between two levels are interpolated instead of rounded. cv2's own 16-bit CLAHE is not used: it has 65,536
    bins, and how many of them a source's bit depth fills changes its result, so that one picture stored at 12 and at
    16 bits comes out as two.

    Args:
        picture: [H, W], float32, in [0, 1].
        clip_limit: OpenCV's clip limit, a multiple of the mean bin count.
        tiles: tiles per side.

    Returns:
        [H, W], float32, in [0, 1].
    """
    height, width = picture.shape
    bottom, right = 0, 0
    if height % tiles or width % tiles:  # OpenCV then pads both sides, a side that already fits by `tiles` px
        bottom, right = tiles - height % tiles, tiles - width % tiles
    padded = np.pad(_unit(picture), ((0, bottom), (0, right)), mode="reflect")
    tile_height, tile_width = padded.shape[0] // tiles, padded.shape[1] // tiles
    tables = _tile_tables(padded, tiles, clip_limit)

    top, bottom_tile, row_weight = _tile_neighbours(height, tile_height, tiles)
    left, right_tile, column_weight = _tile_neighbours(width, tile_width, tiles)
    position = _unit(picture) * np.float32(CLAHE_LEVELS - 1)
    level = np.minimum(position.astype(np.int64), CLAHE_LEVELS - 2)
    fraction = position - level.astype(np.float32)

    def mapped(tile_row: NDArray[np.int64], tile_column: NDArray[np.int64]) -> NDArray[np.float32]:
        row, column = tile_row[:, None], tile_column[None, :]
        low: NDArray[np.float32] = tables[row, column, level]
        high: NDArray[np.float32] = tables[row, column, level + 1]
        return low + fraction * (high - low)

    upper = mapped(top, left) * (1 - column_weight) + mapped(top, right_tile) * column_weight
    lower = mapped(bottom_tile, left) * (1 - column_weight) + mapped(bottom_tile, right_tile) * column_weight
    blended = upper * (1 - row_weight[:, None]) + lower * row_weight[:, None]
    return _unit(blended)


def _tile_tables(padded: NDArray[np.float32], tiles: int, clip_limit: float) -> NDArray[np.float32]:
    """[tiles, tiles, CLAHE_LEVELS], float32, in [0, 1]: per tile, the clipped cumulative histogram."""
    tile_height, tile_width = padded.shape[0] // tiles, padded.shape[1] // tiles
    area = tile_height * tile_width
    clip = max(int(clip_limit * area / CLAHE_LEVELS), 1)
    levels = np.rint(padded * (CLAHE_LEVELS - 1)).astype(np.int64)
    levels = levels.reshape(tiles, tile_height, tiles, tile_width).swapaxes(1, 2).reshape(tiles * tiles, area)
    offset = np.arange(tiles * tiles)[:, None] * CLAHE_LEVELS
    counts = np.bincount((levels + offset).ravel(), minlength=tiles * tiles * CLAHE_LEVELS).reshape(-1, CLAHE_LEVELS)
    # The excess is spread in whole counts; what does not divide goes to every `step`-th bin from 0 on.
    batch, rest = np.divmod(np.maximum(counts - clip, 0).sum(axis=1, keepdims=True), CLAHE_LEVELS)
    step = np.maximum(CLAHE_LEVELS // np.maximum(rest, 1), 1)
    bins = np.arange(CLAHE_LEVELS)[None, :]
    extra = (bins % step == 0) & (bins // step < rest)
    tables = np.cumsum(np.minimum(counts, clip) + batch + extra, axis=1) / area
    return np.asarray(tables.reshape(tiles, tiles, CLAHE_LEVELS), dtype=np.float32)


def _tile_neighbours(
    length: int, tile_length: int, tiles: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Per pixel along one axis: the two tiles whose centres enclose it, and the weight of the second."""
    position = np.arange(length, dtype=np.float32) / tile_length - np.float32(0.5)
    first = np.floor(position).astype(np.int64)
    weight = (position - first).astype(np.float32)
    return np.clip(first, 0, tiles - 1), np.clip(first + 1, 0, tiles - 1), weight


def _unit(picture: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Clipped to [0, 1], float32."""
    return np.asarray(np.clip(picture, 0, 1), dtype=np.float32)


def _crop(square: NDArray[np.float32], placement: Placement) -> NDArray[np.float32]:
    """The picture's part of the square, [height, width]."""
    bottom, right = placement.top + placement.height, placement.left + placement.width
    return square[placement.top : bottom, placement.left : right]


def _resize(picture: NDArray[np.float32], rows: int, columns: int) -> NDArray[np.float32]:
    """Resize [H, W] to [rows, columns]: area average on the way down, bicubic on the way up, a copy where equal."""
    picture = np.ascontiguousarray(picture, dtype=np.float32)
    if picture.shape == (rows, columns):
        return picture.copy()
    shrinking = rows <= picture.shape[0] and columns <= picture.shape[1]
    method = cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(picture, (columns, rows), interpolation=method), dtype=np.float32)
