"""Draw structures that are not bone: nodules, tubes, boxes and opacities, to be added to an X-ray. Torch-free.

Each function draws one shape with a peak of 1 and returns an `Insert`: a small picture and where it lies. The caller
multiplies it by a contrast. Every length is in pixels, every angle in radians, every point is (row, column).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Image = NDArray[np.float32]

SUPERSAMPLING = 4  # samples per pixel and axis, so that shapes of one pixel keep their area
EDGE_PX = 3  # empty border of a patch, room for the blur of its edge


@dataclass(frozen=True)
class Insert:
    """One drawn shape.

    Attributes:
        top, left: row and column of the picture's first pixel in the X-ray; may lie outside it.
        picture: [h, w] float32, peak 1.
    """

    top: int
    left: int
    picture: Image

    def add_to(self, image: Image, contrast: float) -> None:
        """Add the shape times `contrast` to `image`, [H, W] float32, in place. What lies outside is cut off."""
        rows, columns = image.shape
        height, width = self.picture.shape
        top, left = max(self.top, 0), max(self.left, 0)
        bottom, right = min(self.top + height, rows), min(self.left + width, columns)
        if top < bottom and left < right:
            part = self.picture[top - self.top : bottom - self.top, left - self.left : right - self.left]
            image[top:bottom, left:right] += np.float32(contrast) * part

    def layer(self, shape: tuple[int, ...]) -> Image:
        """Return the shape alone on an empty picture of `shape` (rows, columns): [H, W] float32."""
        image = np.zeros(shape, np.float32)
        self.add_to(image, 1.0)
        return image


@dataclass(frozen=True)
class _Window:
    """A supersampled square around a point. `rows` and `columns` are offsets from that point, px."""

    top: int
    left: int
    side: int
    rows: Image
    columns: Image

    def insert(self, fine: Image) -> Insert:
        """Return the supersampled picture reduced to pixels, with a peak of 1."""
        picture = cv2.resize(fine, (self.side, self.side), interpolation=cv2.INTER_AREA)
        peak = float(np.abs(picture).max())
        return Insert(self.top, self.left, np.asarray(picture / max(peak, 1e-6), dtype=np.float32))


def _window(centre: tuple[float, float], reach: float) -> _Window:
    half = math.ceil(reach) + EDGE_PX
    top, left = math.floor(centre[0]) - half, math.floor(centre[1]) - half
    side = 2 * half + 1
    axis = (np.arange(side * SUPERSAMPLING, dtype=np.float32) + np.float32(0.5)) / SUPERSAMPLING - np.float32(0.5)
    rows = axis[:, None] + np.float32(top - centre[0])
    columns = axis[None, :] + np.float32(left - centre[1])
    return _Window(top, left, side, rows.astype(np.float32), columns.astype(np.float32))


def nodule(
    centre: tuple[float, float],
    radius: float,
    *,
    power: float = 0.5,
    aspect: float = 1.0,
    angle: float = 0.0,
    hollow: float = 0.0,
    waves: Sequence[tuple[float, float]] = (),
) -> Insert:
    """Draw a round opacity with the profile (1 - (r / radius)^2)^power.

    Args:
        centre: its middle.
        radius: mean of its two half axes.
        power: 0.5 is the shadow of a ball, larger is softer, near 0 is a disc.
        aspect: long half axis over short one, at least 1.
        angle: of the long axis to the rows' direction.
        hollow: radius of an air-filled inside as a share of `radius`, below 1.
        waves: amplitude (share of the radius) and phase of the outline's waves, the first twice around it.
    """
    longest = radius * math.sqrt(aspect) * (1 + sum(abs(amplitude) for amplitude, _ in waves))
    window = _window(centre, longest)
    c, s = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    u = (window.rows * c + window.columns * s) * np.float32(1 / (radius * math.sqrt(aspect)))
    v = (window.columns * c - window.rows * s) * np.float32(math.sqrt(aspect) / radius)
    q = u * u + v * v
    if waves:
        turn = np.arctan2(v, u)
        outline = 1 + sum(
            np.float32(a) * np.cos((k + 2) * turn + np.float32(phase)) for k, (a, phase) in enumerate(waves)
        )
        q = q / np.square(outline)
    fine = np.maximum(1 - q, 0) ** np.float32(power)
    if hollow:
        fine = fine - np.float32(0.85) * np.maximum(1 - q / np.float32(hollow**2), 0) ** np.float32(power)
    return window.insert(np.asarray(fine, dtype=np.float32))


def spiculated_nodule(
    centre: tuple[float, float], radius: float, *, spikes: Sequence[tuple[float, float]], width: float = 0.18
) -> Insert:
    """Draw a ball's shadow with spikes.

    Args:
        centre: its middle.
        radius: of the ball.
        spikes: angle and length of each spike, the length in radii from the centre.
        width: half width of a spike at its root, in radii.
    """
    window = _window(centre, radius * max((1.0, *(length for _, length in spikes))))
    q = (window.rows**2 + window.columns**2) * np.float32(1 / radius**2)
    fine = np.sqrt(np.maximum(1 - q, 0))
    for angle, length in spikes:
        c, s = np.float32(math.cos(angle)), np.float32(math.sin(angle))
        along = (window.rows * c + window.columns * s) * np.float32(1 / (radius * length))
        across = np.abs(window.columns * c - window.rows * s) * np.float32(1 / (radius * width))
        taper = np.clip(1 - along, 0, 1) * (along > 0)
        fine = np.maximum(fine, np.float32(0.7) * taper * np.sqrt(np.maximum(1 - np.square(across), 0)))
    return window.insert(np.asarray(fine, dtype=np.float32))


def tube(path: ArrayLike, width: float, *, hollow: float = 0.0) -> Insert:
    """Draw a cylinder along a path: vessels, catheters, wires, drains.

    Args:
        path: [N, 2] points in order.
        width: its diameter.
        hollow: width of an empty inside as a share of `width`, below 1: two bright walls are seen.
    """
    points = np.asarray(path, dtype=np.float64)
    margin = math.ceil(width / 2) + EDGE_PX
    low = np.floor(points.min(0)).astype(int) - margin
    high = np.ceil(points.max(0)).astype(int) + margin + 1
    rows, columns = (high - low).tolist()
    empty = np.full((rows * SUPERSAMPLING, columns * SUPERSAMPLING), 255, np.uint8)
    bits = 4  # of the fraction of OpenCV's coordinates
    fine = ((points - low + 0.5) * SUPERSAMPLING - 0.5) * 2**bits
    cv2.polylines(empty, [np.rint(fine[:, ::-1]).astype(np.int32)], False, 0, 1, cv2.LINE_8, bits)
    distance = cv2.distanceTransform(empty, cv2.DIST_L2, 5) * np.float32(2 / (SUPERSAMPLING * width))
    drawn = np.sqrt(np.maximum(1 - np.square(distance), 0))
    if hollow:
        drawn = drawn - np.sqrt(np.maximum(np.float32(hollow**2) - np.square(distance), 0))
    picture = cv2.resize(drawn, (columns, rows), interpolation=cv2.INTER_AREA)
    peak = max(float(picture.max()), 1e-6)
    return Insert(int(low[0]), int(low[1]), np.asarray(picture / peak, dtype=np.float32))


def box(centre: tuple[float, float], height: float, width: float, *, angle: float = 0.0, corner: float = 0.0) -> Insert:
    """Draw a plate of even density with round corners: pacemakers, clips, electrodes.

    Args:
        centre: its middle.
        height, width: its sides.
        angle: of the height to the rows' direction.
        corner: radius of the corners, at most half of the shorter side.
    """
    window = _window(centre, math.hypot(height, width) / 2)
    c, s = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    u = np.abs(window.rows * c + window.columns * s) - np.float32(height / 2 - corner)
    v = np.abs(window.columns * c - window.rows * s) - np.float32(width / 2 - corner)
    outside = np.hypot(np.maximum(u, 0), np.maximum(v, 0)) + np.minimum(np.maximum(u, v), 0) - np.float32(corner)
    return window.insert(np.asarray(np.clip(0.5 - outside * SUPERSAMPLING, 0, 1), dtype=np.float32))


def opacity(
    centre: tuple[float, float], radius: float, rng: np.random.Generator, *, grain: float = 0.35, ragged: float = 0.5
) -> Insert:
    """Draw a consolidation: a soft patch with an uneven outline and uneven density.

    Args:
        centre: its middle.
        radius: where it has faded by half, on average.
        rng: draws the unevenness.
        grain: size of its coarsest lumps, in radii.
        ragged: strength of the unevenness, 0 is a smooth patch.
    """
    half = math.ceil(2 * radius) + EDGE_PX
    top, left = math.floor(centre[0]) - half, math.floor(centre[1]) - half
    side = 2 * half + 1
    axis = np.arange(side, dtype=np.float32)
    r = np.hypot(axis[:, None] + np.float32(top - centre[0]), axis[None, :] + np.float32(left - centre[1]))
    noise = np.zeros((side, side), np.float32)
    for octave in range(3):
        cells = max(2, round(side / (radius * grain) * 2**octave))
        field = rng.standard_normal((cells, cells), dtype=np.float32)
        noise += cv2.resize(field, (side, side), interpolation=cv2.INTER_CUBIC) * np.float32(0.6**octave)
    level = (1 - r / np.float32(radius)) * np.float32(2.5) + np.float32(ragged) * noise
    inside = np.clip((2 * np.float32(radius) - r) / np.float32(0.5 * radius), 0, 1)
    picture = inside / (1 + np.exp(-2 * np.clip(level, -20, 20)))
    return Insert(top, left, np.asarray(picture / max(float(picture.max()), 1e-6), dtype=np.float32))


def pleural_edge(path: ArrayLike, width: float, fade: float) -> Insert:
    """Draw the edge of a pneumothorax: a thin bright line, and darker air that fades away on one side of it.

    Args:
        path: [N, 2] points in order. The air lies on the right of the direction of travel, seen on the screen.
        width: of the line.
        fade: distance from the line at which the air's darkness has fallen to 1/e.
    """
    points = np.asarray(path, dtype=np.float64)
    margin = math.ceil(2.5 * fade) + EDGE_PX
    low = np.floor(points.min(0)).astype(int) - margin
    rows, columns = (np.ceil(points.max(0)).astype(int) + margin + 1 - low).tolist()
    line = tube(points, width)
    y = np.arange(rows, dtype=np.float64)[:, None, None] + low[0]
    x = np.arange(columns, dtype=np.float64)[None, :, None] + low[1]
    first, step = points[:-1], np.diff(points, axis=0)
    length = np.maximum((step**2).sum(1), 1e-9)
    along = ((y - first[:, 0]) * step[:, 0] + (x - first[:, 1]) * step[:, 1]) / length
    near = np.clip(along, 0, 1)
    dy, dx = y - first[:, 0] - near * step[:, 0], x - first[:, 1] - near * step[:, 1]
    distance = np.hypot(dy, dx)
    nearest = distance.argmin(-1)[..., None]
    side = np.take_along_axis(step[:, 1] * dy - step[:, 0] * dx, nearest, -1)[..., 0] > 0
    ends = np.take_along_axis((along > 0) & (along < 1), nearest, -1)[..., 0]
    far = np.take_along_axis(distance, nearest, -1)[..., 0]
    picture = np.where(side & ends, -0.6 * np.exp(-far / fade), 0.0).astype(np.float32)
    drawn = Insert(int(low[0]), int(low[1]), picture)
    line_here = Insert(line.top - drawn.top, line.left - drawn.left, line.picture)
    line_here.add_to(picture, 1.0)
    return Insert(drawn.top, drawn.left, np.asarray(picture / max(float(np.abs(picture).max()), 1e-6), np.float32))
