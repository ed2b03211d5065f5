"""Contrast-limited adaptive histogram equalisation (CLAHE) as OpenCV does it, without rounding. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CLAHE_LEVELS = 256  # histogram bins per tile, OpenCV's number for 8-bit pictures


def equalize(picture: NDArray[np.float32], clip_limit: float, tiles: int) -> NDArray[np.float32]:
    """Equalise a picture as OpenCV's CLAHE does on 8 bits, but without rounding to 8 bits.

    The tables are those of OpenCV: 256 bins per tile, clipped, with the excess spread. Values between two levels are
    interpolated, so the result is within one level of OpenCV's. OpenCV's 16-bit CLAHE has 65,536 bins. Its result
    depends on how many of them the source's bit depth fills: 12 and 16 bits of one picture give two results.

    Args:
        picture: [H, W], float32, in [0, 1].
        clip_limit: OpenCV's clip limit, a multiple of the mean bin count.
        tiles: tiles per side.

    Returns:
        [H, W], float32, in [0, 1].
    """
    return EqualizingCurves.measure(picture, clip_limit, tiles).apply(picture)


@dataclass(frozen=True)
class EqualizingCurves:
    """The curves from grey level to grey level that equalise one picture. Each pixel has its own curve.

    Attributes:
        tables: [tiles, tiles, CLAHE_LEVELS], float32, in [0, 1].
        rows: for each row of pixels, the two tiles whose centres enclose it, and the weight of the second.
        columns: likewise for each column of pixels.
    """

    tables: NDArray[np.float32]
    rows: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]
    columns: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]

    @classmethod
    def measure(
        cls, picture: NDArray[np.float32], clip_limit: float, tiles: int, matrix: tuple[int, ...] | None = None
    ) -> EqualizingCurves:
        """Return the curves that equalise a picture.

        Args:
            picture: [H, W], float32, in [0, 1].
            clip_limit: OpenCV's clip limit, a multiple of the mean bin count.
            tiles: tiles per side.
            matrix: rows and columns of the picture to apply the curves to, if it has another resolution than `picture`.
        """
        rows, columns = matrix or picture.shape
        height, width = picture.shape
        bottom, right = 0, 0
        if height % tiles or width % tiles:  # OpenCV then pads both sides; one that fits already gets `tiles` px more
            bottom, right = tiles - height % tiles, tiles - width % tiles
        padded = np.pad(np.clip(picture, 0, 1), ((0, bottom), (0, right)), mode="reflect")
        tile_height, tile_width = padded.shape[0] // tiles, padded.shape[1] // tiles
        return cls(
            _tile_tables(padded, tiles, clip_limit),
            _tile_neighbours(height, tile_height, tiles, rows),
            _tile_neighbours(width, tile_width, tiles, columns),
        )

    def apply(self, picture: NDArray[np.float32]) -> NDArray[np.float32]:
        """Send each grey level through the curve of its pixel.

        Args:
            picture: [H, W], float32, in [0, 1], of the matrix that the curves were made for.

        Returns:
            [H, W], float32, in [0, 1].
        """
        top, bottom, row_weight = self.rows
        left, right, column_weight = self.columns
        position = np.clip(picture, 0, 1) * np.float32(CLAHE_LEVELS - 1)
        level = np.minimum(position.astype(np.int64), CLAHE_LEVELS - 2)
        fraction = position - level.astype(np.float32)

        def look_up(tile_row: NDArray[np.int64], tile_column: NDArray[np.int64]) -> NDArray[np.float32]:
            row, column = tile_row[:, None], tile_column[None, :]
            low: NDArray[np.float32] = self.tables[row, column, level]
            high: NDArray[np.float32] = self.tables[row, column, level + 1]
            return low + fraction * (high - low)

        upper = look_up(top, left) * (1 - column_weight) + look_up(top, right) * column_weight
        lower = look_up(bottom, left) * (1 - column_weight) + look_up(bottom, right) * column_weight
        return np.clip(upper * (1 - row_weight[:, None]) + lower * row_weight[:, None], 0, 1)


def _tile_tables(padded: NDArray[np.float32], tiles: int, clip_limit: float) -> NDArray[np.float32]:
    """Return the clipped cumulative histogram of each tile: [tiles, tiles, CLAHE_LEVELS], float32, in [0, 1]."""
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
    length: int, tile_length: int, tiles: int, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Return, for each pixel along one axis, the two tiles whose centres enclose it, and the weight of the second.

    Args:
        length: of the axis in the picture that made the tiles, px.
        tile_length: of a tile, px.
        tiles: along the axis.
        count: pixels along the axis in the picture that the curves are applied to.
    """
    pixel = (np.arange(count, dtype=np.float32) + np.float32(0.5)) * np.float32(length / count) - np.float32(0.5)
    position = pixel / np.float32(tile_length) - np.float32(0.5)
    first = np.floor(position).astype(np.int64)
    weight = (position - first).astype(np.float32)
    return np.clip(first, 0, tiles - 1), np.clip(first + 1, 0, tiles - 1), weight
