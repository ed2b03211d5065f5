"""Measure how much of a small nodule would survive at each place of an X-ray. Torch-free.

Virtual nodules are put into the X-ray on a grid, and the model is run without and with them. Neighbours go into
different pictures, so that they do not touch each other's response. With n the nodule and r the change of the result,
kept = <r, n> / <n, n>: 1 if the nodule stays as it is, 0 if the model takes it away with the bone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.imaging.inserts import Insert, nodule

Image = NDArray[np.float32]

PICTURES = 4  # neighbours in rows, columns and diagonals are in different ones
VIEW_MM = 400.0  # what the longer side of an X-ray's view is taken to show; image files do not say
NODULE_MM = 8.0  # diameter
CONTRAST = 0.06  # peak of a nodule, grey levels in [0, 1]: subtle, but seen by a trained eye
LEAST_CONTRAST = 0.02  # where the X-ray is nearly white, less fits in; below this, no nodule is put there
SPACING_MM = 20.0  # of the grid
MAP_PX = 256  # longer side of the map before it is enlarged
NEAR = 0.15  # of the highest density of places; below it, a place of the map is not known
AIR = 0.06  # grey level below which a place is air beside the patient


@dataclass(frozen=True)
class Nodule:
    """One virtual nodule.

    Attributes:
        centre: its row and column in the view, px.
        shape: the drawn shape, with a peak of 1.
        contrast: its peak in the X-ray.
    """

    centre: tuple[float, float]
    shape: Insert
    contrast: float


@dataclass(frozen=True)
class Retention:
    """How much of a small nodule would survive in one X-ray. Shares are 1 for all of it.

    Attributes:
        map: the share at each pixel, [H, W], float32, in [0, 1]; NaN where it was not measured: air, white, borders.
        mean: mean share over the nodules.
        percentile_5: share that 5 % of the nodules stay below.
        worst: row, column and share of the nodule that lost most.
        count: number of nodules.
    """

    map: Image = field(repr=False)
    mean: float
    percentile_5: float
    worst: tuple[int, int, float]
    count: int

    def to_report(self) -> dict[str, object]:
        """Return the figures for a report."""
        row, column, kept = self.worst
        return {
            "nodule_mm": NODULE_MM,
            "contrast": CONTRAST,
            "count": self.count,
            "mean": round(self.mean, 4),
            "percentile_5": round(self.percentile_5, 4),
            "worst": {"row": row, "column": column, "kept": round(kept, 4)},
        }


def place_nodules(view: Image, white: float = 1.0) -> list[list[Nodule]]:
    """Put nodules on a grid over an X-ray, and spread them over `PICTURES` pictures.

    Args:
        view: the part of the X-ray that the model sees, [h, w], float32, in [0, 1].
        white: the grey above which the model sees no more: nothing is added there.

    Returns:
        The nodules of each picture. Places in air, and places too bright for a nodule, are left out.
    """
    px_per_mm = max(view.shape) / VIEW_MM
    step, radius = SPACING_MM * px_per_mm, NODULE_MM / 2 * px_per_mm
    brightest = cv2.dilate(view, np.ones((3, 3), np.uint8), iterations=max(1, round(radius)))
    grey = cv2.GaussianBlur(view, (0, 0), max(radius, 1.0))
    pictures: list[list[Nodule]] = [[] for _ in range(PICTURES)]
    for i, row in enumerate(np.arange(step / 2, view.shape[0], step)):
        for j, column in enumerate(np.arange(step / 2, view.shape[1], step)):
            y, x = int(row), int(column)
            contrast = min(CONTRAST, white - float(brightest[y, x]))
            if grey[y, x] >= AIR and contrast >= LEAST_CONTRAST:
                shape = nodule((float(row), float(column)), radius)
                pictures[2 * (i % 2) + j % 2].append(Nodule((float(row), float(column)), shape, contrast))
    return pictures


def add_nodules(view: Image, nodules: Sequence[Nodule]) -> Image:
    """Return a copy of a picture, [h, w], float32, with nodules added."""
    picture = view.copy()
    for one in nodules:
        one.shape.add_to(picture, one.contrast)
    return picture


def measure_retention(
    pictures: Sequence[Sequence[Nodule]], without: Image, results: Sequence[Image], corner: tuple[int, int]
) -> Retention | None:
    """Compare results with and without nodules.

    Args:
        pictures: the nodules of each picture, from `place_nodules`.
        without: the result without nodules, [H, W], float32, in [0, 1].
        results: the result of each picture, as `without`.
        corner: row and column of the view's first pixel in the X-ray.

    Returns:
        The shares, or None if there was no place for a nodule.
    """
    found: list[tuple[float, float, float]] = []  # row, column, share
    for nodules, result in zip(pictures, results, strict=True):
        response = result - without
        for one in nodules:
            row, column = one.centre[0] + corner[0], one.centre[1] + corner[1]
            found.append((row, column, _measure_share(one, response, corner)))
    if not found:
        return None
    shares = np.array([share for _, _, share in found])
    worst = found[int(shares.argmin())]
    return Retention(
        map=_interpolate(found, without.shape),
        mean=float(shares.mean()),
        percentile_5=float(np.percentile(shares, 5)),
        worst=(int(worst[0]), int(worst[1]), worst[2]),
        count=len(found),
    )


def _measure_share(one: Nodule, response: Image, corner: tuple[int, int]) -> float:
    """Return <r, n> / <n, n> of one nodule."""
    height, width = one.shape.picture.shape
    top, left = one.shape.top + corner[0], one.shape.left + corner[1]
    rows = slice(max(top, 0), min(top + height, response.shape[0]))
    columns = slice(max(left, 0), min(left + width, response.shape[1]))
    drawn = (
        one.contrast * one.shape.picture[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    )
    return float(np.sum(response[rows, columns] * drawn) / np.sum(np.square(drawn)))


def _interpolate(found: Sequence[tuple[float, float, float]], shape: tuple[int, ...]) -> Image:
    """Spread the shares of single places over a picture of `shape`: a Gaussian mean, NaN far from every place."""
    scale = MAP_PX / max(shape)
    small = max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))
    weights, sums = np.zeros(small, np.float32), np.zeros(small, np.float32)
    for row, column, share in found:
        place = min(int(row * scale), small[0] - 1), min(int(column * scale), small[1] - 1)
        weights[place] += 1
        sums[place] += min(max(share, 0.0), 1.0)
    sigma = 0.5 * SPACING_MM / VIEW_MM * MAP_PX
    density, total = (cv2.GaussianBlur(image, (0, 0), sigma) for image in (weights, sums))
    near = density > NEAR * float(density.max())
    shares = np.where(near, total / np.maximum(density, 1e-12), np.nan).astype(np.float32)
    return np.asarray(cv2.resize(shares, shape[::-1], interpolation=cv2.INTER_NEAREST), dtype=np.float32)
