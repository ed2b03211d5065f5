"""Judge from a thumbnail whether a picture is an upright frontal chest X-ray. Torch-free.

The judge is a logistic regression. Its inputs are the grey levels of a thumbnail, by rank, and histograms of the
directions in which they rise (histograms of oriented gradients, Dalal and Triggs 2005). Ranks make it blind to tone.
`python -m train chest-guard` fits the weights in chest_guard.json. docs/reliability.md says on what, and how well it
judges. It knows the shape of a chest and nothing of its content: it is no check of quality or anatomy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.imaging.network_input import resize

Image = NDArray[np.float32]
Vector = NDArray[np.float64]

WEIGHTS = Path(__file__).with_name("chest_guard.json")
SIDE_PX = 48  # of the thumbnail
SAMPLED_PX = 768  # larger pictures are thinned out to about this many pixels on the shorter side
CELLS = 8  # per side, each with a histogram
DIRECTIONS = 8  # of a histogram, over the whole circle: dark to bright is another direction than bright to dark
GREY_PX = 12  # side of the picture of ranks
FLAT = 0.1  # slope, in ranks per pixel and cell, below which a histogram fades: noise has no direction

INVERTED = "may be inverted (lungs brighter than mediastinum). If so, invert it and run again."
NO_CHEST = "does not look like a frontal chest X-ray. If it is none, do not use the result."
# By the number of quarter turns to the left that put it right.
WRONG_WAY = {
    2: "may be upside down. If so, turn it by 180 degrees and run again.",
    1: "may lie on its side. If so, turn it to the left by 90 degrees and run again.",
    3: "may lie on its side. If so, turn it to the right by 90 degrees and run again.",
}


@dataclass(frozen=True)
class ChestGuard:
    """The fitted judge.

    Attributes:
        weights: one for each feature of `describe_picture`.
        bias: what is added to their sum.
        least: a picture with a lower score is warned of. Scores are log odds.
        clear: a picture whose turned or inverted copy scores this or more gets the warning that names the turn.
    """

    weights: Vector
    bias: float
    least: float
    clear: float

    def score(self, picture: Image) -> float:
        """Return the log odds that a picture, [H, W], air dark, is an upright frontal chest X-ray."""
        return float(describe_picture(picture) @ self.weights + self.bias)

    def check(self, picture: Image) -> str | None:
        """Return a warning if a picture does not look like an upright frontal chest X-ray, else None.

        Args:
            picture: [H, W], float32, any range, air dark, without uniform borders.
        """
        step = max(1, min(picture.shape) // SAMPLED_PX)
        thumbnail = resize(picture[::step, ::step], (SIDE_PX, SIDE_PX))
        if self.score(thumbnail) >= self.least:
            return None
        if self.score(-thumbnail) >= self.clear:
            return INVERTED
        for turns, message in WRONG_WAY.items():
            if self.score(np.rot90(thumbnail, turns)) >= self.clear:
                return message
        return NO_CHEST


@cache
def load_guard() -> ChestGuard:
    """Return the judge that comes with this package."""
    content = json.loads(WEIGHTS.read_text())
    return ChestGuard(np.array(content["weights"]), content["bias"], content["least"], content["clear"])


def describe_picture(picture: Image) -> Vector:
    """Return the features of a picture: histograms of directions, then grey levels. None depends on its tone.

    Args:
        picture: [H, W], any range.

    Returns:
        [CELLS * CELLS * DIRECTIONS + GREY_PX * GREY_PX], float64, each within [-0.5, 2].
    """
    ranks = _rank(resize(picture, (SIDE_PX, SIDE_PX)))
    grey = resize(ranks, (GREY_PX, GREY_PX)).astype(np.float64) - 0.5
    return np.concatenate([_count_directions(ranks).ravel(), grey.ravel()])


def _rank(small: Image) -> Image:
    """Return the rank of each pixel in [0, 1]. Equal pixels get an equal rank."""
    ordered = np.sort(small, axis=None)
    rank = np.searchsorted(ordered, small, "left") + np.searchsorted(ordered, small, "right")
    return (rank / (2 * small.size)).astype(np.float32)


def _count_directions(ranks: Image) -> Vector:
    """Return the share of each direction of slope in each cell, [CELLS, CELLS, DIRECTIONS], in [0, 1]."""
    padded = np.pad(ranks.astype(np.float64), 1, mode="edge")
    down, right = padded[2:, 1:-1] - padded[:-2, 1:-1], padded[1:-1, 2:] - padded[1:-1, :-2]
    slope = np.hypot(down, right)
    place = np.arctan2(down, right) / (2 * np.pi) * DIRECTIONS % DIRECTIONS
    first = place.astype(np.int64) % DIRECTIONS
    part = place - np.floor(place)
    histogram = np.zeros((SIDE_PX, SIDE_PX, DIRECTIONS))
    rows, columns = np.indices(slope.shape)
    histogram[rows, columns, first] = slope * (1 - part)
    histogram[rows, columns, (first + 1) % DIRECTIONS] += slope * part
    cell = SIDE_PX // CELLS
    cells = histogram.reshape(CELLS, cell, CELLS, cell, DIRECTIONS).mean((1, 3))
    around = np.pad(cells, ((1, 1), (1, 1), (0, 0)), mode="edge")
    energy = sum((around[i : i + CELLS, j : j + CELLS] ** 2).sum(-1, keepdims=True) for i in range(3) for j in range(3))
    return np.asarray(np.sqrt(cells / np.sqrt(energy / 9 + FLAT**2)), dtype=np.float64)
