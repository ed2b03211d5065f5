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

from bsdiff_rt.config import Preprocessing, ScannerTone

# How `tone_of` tells a change of overall tone from bones: on a square of TONE_PX, within a window wider than a bone,
# TONE_PERCENTILE of the pixels lie between bones; what they show is smoothed by a Gaussian a sixth as wide.
TONE_PX = 64
TONE_PERCENTILE = 25
# Windows, px of that square. The one holds two ribs and what lies between: broader structure in a network's bone layer
# may be its mistake about a foreign picture's tone. The other holds any bone, for a layer that is known to be true.
RIBS_WINDOW_PX = 7
BONES_WINDOW_PX = 15

# How `bone_share` compares bone with X-ray: around each pixel of the square (standard deviation of a Gaussian), against
# this variance of noise, grey levels in [0, 1].
SHARE_SIGMA_PX = 1.5
SHARE_NOISE = 1e-4

# `scanner_power` takes an X-ray for the training scanner's when its quantiles are as near to that scanner's (root mean
# square), and the networks take its tone for that scanner's when they change it by more (median over the image). The
# demo model's training X-rays lie within 0.009 to 0.014 of their mean and 0.017 to 0.025 from each other, so that one
# not seen lies some 0.017 off, now and then twice that. Phantoms are beyond 0.08; of 3000 random tone curves over the
# same X-rays, 61 in a thousand are as near, 16 in a thousand also retoned.
TONE_CXR_RMS = 0.04
TONE_CHANGE = 0.01
TONE_POWERS = (0.8, 1.25)  # what would take a stronger one is no matter of tone

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


def place(shape: tuple[int, ...], size: int) -> Placement:
    """The placement of a picture of `shape` (rows, columns) in a square of `size` px: longer side filled, centred."""
    rows, columns = shape
    longer = max(shape)
    height = max(1, round(rows * size / longer))
    width = max(1, round(columns * size / longer))
    return Placement(rows, columns, (size - height) // 2, (size - width) // 2, height, width, size)


def resize(picture: NDArray[np.floating[Any]], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Resize [H, W] to `shape` (rows, columns), float32: area average on the way down, a copy where equal.

    On the way up bicubic, which overshoots: clip the result where its range counts.
    """
    picture = np.ascontiguousarray(picture, dtype=np.float32)
    if picture.shape == shape:
        return picture.copy()
    rows, columns = shape
    shrinking = rows <= picture.shape[0] and columns <= picture.shape[1]
    method = cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(picture, (columns, rows), interpolation=method), dtype=np.float32)


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
    placement = place(cxr.shape, prep.size)
    picture = _unit(resize(cxr, (placement.height, placement.width)))  # enlarging overshoots at edges
    if prep.clahe_clip_limit > 0:
        picture = equalize(picture, prep.clahe_clip_limit, prep.clahe_tiles)
    bottom = prep.size - placement.height - placement.top
    right = prep.size - placement.width - placement.left
    square = np.pad(picture, ((placement.top, bottom), (placement.left, right)), mode="edge")
    return square * np.float32(2) - np.float32(1), placement


def seen_by_networks(picture: NDArray[np.float32], prep: Preprocessing) -> NDArray[np.float32]:
    """What the networks see of a picture, without the padding: [height, width] in [0, 1], from [H, W] in [0, 1]."""
    square, placement = to_network(picture, prep)
    return _shown(square, placement)


def from_network(image: NDArray[np.float32], placement: Placement, power: float | None = None) -> NDArray[np.float32]:
    """Undo padding and resizing (bicubic on the way up). CLAHE is not undone: the tone is the networks'.

    Args:
        image: [size, size], float32, in [-1, 1].
        power: what the grey levels are raised to (`scanner_power`); None leaves them.

    Returns:
        [H, W], float32, in [0, 1], with H, W the source's matrix.
    """
    picture = resize(_crop(image, placement), (placement.rows, placement.columns))
    picture = _unit((picture + np.float32(1)) / np.float32(2))
    return picture if power is None else picture ** np.float32(power)


def tone_quantiles(cxr: NDArray[np.float32], count: int) -> NDArray[np.float64]:
    """`ScannerTone.cxr` of one picture, [H, W] in [0, 1]: [count], float64."""
    return np.asarray(np.quantile(cxr, np.linspace(0.02, 0.98, count)), dtype=np.float64)


def scanner_power(
    cxr_net: NDArray[np.float32], soft_tissue_net: NDArray[np.float32], placement: Placement, tone: ScannerTone
) -> float | None:
    """The power of its grey levels that gives a result the mean of its scanner's soft-tissue images.

    For an X-ray that looks like that scanner's, and that the networks took for one: other images keep their own tone,
    and so does the result for them.

    Args:
        cxr_net: [size, size], float32, in [-1, 1], the networks' input.
        soft_tissue_net: [size, size], float32, in [-1, 1], their output.
        placement: what `to_network` returned for this picture.
        tone: of the scanner; known.

    Returns:
        The power, within TONE_POWERS; None for an X-ray that is not this scanner's, or where no such power gives that
        mean.
    """
    cxr, soft_tissue = _shown(cxr_net, placement), _shown(soft_tissue_net, placement)
    distance = tone_quantiles(cxr, len(tone.cxr)) - np.array(tone.cxr)
    if float(np.sqrt(np.mean(distance**2))) > TONE_CXR_RMS:
        return None
    if float(np.median(tone_of(cxr - soft_tissue, placement.size, BONES_WINDOW_PX))) < TONE_CHANGE:
        return None

    def mean(power: float) -> float:
        return float(np.mean(soft_tissue ** np.float32(power), dtype=np.float64))

    low, high = TONE_POWERS
    if not mean(high) <= tone.soft_tissue_mean <= mean(low):  # a larger power is a darker image
        return None
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) > tone.soft_tissue_mean else (low, middle)
    return round((low + high) / 2, 4)


def subtract_local_bone(
    cxr: NDArray[np.float32],
    cxr_net: NDArray[np.float32],
    soft_tissue_net: NDArray[np.float32],
    placement: Placement,
    prep: Preprocessing,
) -> NDArray[np.float32]:
    """Subtract the networks' bone layer, without the change of tone in it, from the source (`--detail source`).

    bone = cxr_net - soft_tissue_net; soft tissue = source - (bone - tone_of(bone)) - bone_share * detail, where detail
    is what of the source is too fine for the networks' matrix. The source's tone stays, and so does its sharpness but
    for the edges of bones. What the networks see only as a change of overall tone is left in, and so is the inside of
    bones broader than two ribs (vertebrae). Where the preprocessing equalises, what is subtracted is taken back to the
    source's grey levels: equalised contrast is another at every place.

    Args:
        cxr: [H, W], float32, in [0, 1], the source.
        cxr_net: [size, size], float32, in [-1, 1], the networks' input made from it.
        soft_tissue_net: [size, size], float32, in [-1, 1], their output.
        placement: what `to_network` returned for this picture.
        prep: the bundle's preprocessing, which made `cxr_net`.

    Returns:
        [H, W], float32, in [0, 1].
    """
    # The networks' range is twice as wide as [0, 1].
    shown, soft_tissue = (_crop(image, placement) / np.float32(2) for image in (cxr_net, soft_tissue_net))
    bone = shown - soft_tissue
    local = bone - tone_of(bone, placement.size, RIBS_WINDOW_PX)
    small = resize(cxr, (placement.height, placement.width))
    if prep.clahe_clip_limit > 0:
        curves = EqualizingCurves.of(small, prep.clahe_clip_limit, prep.clahe_tiles)
        seen = shown + np.float32(0.5)
        local = curves.undo(seen) - curves.undo(seen - local)
    share = np.clip(resize(bone_share(shown, bone), cxr.shape), 0, 1)
    detail = cxr - resize(small, cxr.shape)
    return _unit(cxr - resize(local, cxr.shape) - share * detail)


def bone_share(cxr: NDArray[np.float32], bone: NDArray[np.float32]) -> NDArray[np.float32]:
    """How much of the X-ray's contrast around each pixel is bone: the slope of bone over X-ray.

    The linear coefficient of the guided filter (He et al., IEEE TPAMI 35, 2013, equation 5, with Gaussian weights). At
    a bone's edge both images rise together (1), at a vessel's the X-ray alone (0); finer structure at the same place is
    taken for bone to the same share.

    Args:
        cxr: [h, w], float32, a grey scale 1 wide.
        bone: [h, w], float32, the same scale.

    Returns:
        [h, w], float32, in [0, 1].
    """

    def mean(image: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(cv2.GaussianBlur(image, (0, 0), SHARE_SIGMA_PX), dtype=np.float32)

    cxr, bone = cxr - cxr.mean(), bone - bone.mean()  # small numbers: the differences below keep their digits
    variance = np.maximum(mean(cxr * cxr) - mean(cxr) ** 2, 0)
    slope = (mean(cxr * bone) - mean(cxr) * mean(bone)) / (variance + np.float32(SHARE_NOISE))
    return _unit(slope)


def tone_of(bone: NDArray[np.float32], side: int, window_px: int) -> NDArray[np.float32]:
    """The change of tone in a layer X-ray - soft tissue: its smooth lower envelope. What rises above it is bone.

    An envelope and not a mean (a Gaussian): bone only ever adds, so a mean would leave a part of every bone in the
    picture and darken what lies beside it.

    Args:
        bone: [h, w], float32, any range.
        side: of the square that the layer is (part of), px.
        window_px: side of the window, px of a square of TONE_PX.

    Returns:
        [h, w], float32.
    """
    height, width = bone.shape
    scale = min(TONE_PX / side, 1.0)
    small = resize(bone, (max(1, round(height * scale)), max(1, round(width * scale))))
    reach = max(1, round(window_px * side * scale / TONE_PX) // 2)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(small, reach, mode="symmetric"), (2 * reach + 1,) * 2)
    values = windows.reshape(*small.shape, -1)
    rank = round((values.shape[-1] - 1) * TONE_PERCENTILE / 100)
    envelope = np.ascontiguousarray(np.partition(values, rank, axis=-1)[..., rank])
    sigma = window_px / 6 * side * scale / TONE_PX
    smooth = cv2.GaussianBlur(envelope, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
    return resize(np.asarray(smooth, dtype=np.float32), (height, width))


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
    return EqualizingCurves.of(picture, clip_limit, tiles).apply(picture)


UNDO_STEPS = 14  # of bisection: within 1 / 2**15 of the grey scale, finer than what the networks resolve


@dataclass(frozen=True)
class EqualizingCurves:
    """The monotone curves that equalise one picture, another at every pixel: what `equalize` applies, and its inverse.

    Attributes:
        tables: [tiles, tiles, CLAHE_LEVELS], float32, in [0, 1].
        rows, columns: per line of pixels, the two tiles whose centres enclose it, and the weight of the second.
    """

    tables: NDArray[np.float32]
    rows: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]
    columns: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]

    @classmethod
    def of(cls, picture: NDArray[np.float32], clip_limit: float, tiles: int) -> EqualizingCurves:
        """The curves of a picture; arguments as of `equalize`."""
        height, width = picture.shape
        bottom, right = 0, 0
        if height % tiles or width % tiles:  # OpenCV then pads both sides, a side that already fits by `tiles` px
            bottom, right = tiles - height % tiles, tiles - width % tiles
        padded = np.pad(_unit(picture), ((0, bottom), (0, right)), mode="reflect")
        tile_height, tile_width = padded.shape[0] // tiles, padded.shape[1] // tiles
        return cls(
            _tile_tables(padded, tiles, clip_limit),
            _tile_neighbours(height, tile_height, tiles),
            _tile_neighbours(width, tile_width, tiles),
        )

    def apply(self, picture: NDArray[np.float32]) -> NDArray[np.float32]:
        """Grey levels [H, W] in [0, 1] of the picture's matrix, each through the curve of its place."""
        top, bottom, row_weight = self.rows
        left, right, column_weight = self.columns
        position = _unit(picture) * np.float32(CLAHE_LEVELS - 1)
        level = np.minimum(position.astype(np.int64), CLAHE_LEVELS - 2)
        fraction = position - level.astype(np.float32)

        def mapped(tile_row: NDArray[np.int64], tile_column: NDArray[np.int64]) -> NDArray[np.float32]:
            row, column = tile_row[:, None], tile_column[None, :]
            low: NDArray[np.float32] = self.tables[row, column, level]
            high: NDArray[np.float32] = self.tables[row, column, level + 1]
            return low + fraction * (high - low)

        upper = mapped(top, left) * (1 - column_weight) + mapped(top, right) * column_weight
        lower = mapped(bottom, left) * (1 - column_weight) + mapped(bottom, right) * column_weight
        return _unit(upper * (1 - row_weight[:, None]) + lower * row_weight[:, None])

    def undo(self, picture: NDArray[np.float32]) -> NDArray[np.float32]:
        """The darkest grey levels, [H, W] in [0, 1], that `apply` makes into `picture`, by bisection."""
        low, high = np.zeros(picture.shape, np.float32), np.ones(picture.shape, np.float32)
        for _ in range(UNDO_STEPS):
            middle = (low + high) / np.float32(2)
            too_dark = self.apply(middle) < picture
            low, high = np.where(too_dark, middle, low), np.where(too_dark, high, middle)
        return (low + high) / np.float32(2)


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


def _shown(square: NDArray[np.float32], placement: Placement) -> NDArray[np.float32]:
    """The picture's part of a square in [-1, 1], in [0, 1]."""
    return _unit((_crop(square, placement) + 1) / 2)


def _crop(square: NDArray[np.float32], placement: Placement) -> NDArray[np.float32]:
    """The picture's part of the square, [height, width]."""
    bottom, right = placement.top + placement.height, placement.left + placement.width
    return square[placement.top : bottom, placement.left : right]
