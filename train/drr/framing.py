"""Choose how a patient is shown: pose, beam, field, and how the chest is stretched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from train.drr.projection import Beam, Heights, Pose
from train.drr.volume import Mask, Spacing

View = Literal["mixed", "PA", "AP"]
BeamKind = Literal["mixed", "cone", "parallel"]

PA_SHARE, PARALLEL_SHARE = 0.7, 0.1  # where the user says "mixed"
TURN_DEG = (4.0, 4.0, 2.5)  # standard deviation of yaw, tilt and roll
MOST_TURN_DEG = (9.0, 8.0, 7.0)
SIDE_MM = (260.0, 430.0)  # of the field at the isocentre: smallest and largest
END_MARGIN = 0.94  # of the volume's height that a field may cover: a tilted patient needs the rest
FINEST_ROW_MM = 1.0  # thicker slices are interpolated to rows of this height


@dataclass(frozen=True)
class Anatomy:
    """What the choice depends on.

    Attributes:
        spacing: of the volume's voxels in z, y and x, mm.
        size: of the volume in z, y and x, voxels.
        lungs: first and last voxel of the lungs in z, y and x.
        cut: whether the field of view cuts the body at both sides.
    """

    spacing: Spacing
    size: tuple[int, int, int]
    lungs: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    cut: bool

    @classmethod
    def measure(cls, body: Mask, lungs: Mask, spacing: Spacing) -> Anatomy:
        """Return the anatomy of a volume with these masks; the lungs must not be empty."""
        found = [np.flatnonzero(lungs.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
        z, y, x = ((int(places[0]), int(places[-1])) for places in found)
        shown = body[z[0] : z[1] + 1]
        cut = bool((shown[:, :, 0].any(1) & shown[:, :, -1].any(1)).mean() > 0.25)
        return cls(spacing, (body.shape[0], body.shape[1], body.shape[2]), (z, y, x), cut)


@dataclass(frozen=True)
class Framing:
    """One choice: arguments of `project`, with the spacing of the stretched patient."""

    pose: Pose
    beam: Beam
    spacing: Spacing
    heights: Heights


def draw_framing(
    rng: np.random.Generator, anatomy: Anatomy, pixels: int, view: View, beam: BeamKind, pose_scale: float
) -> Framing:
    """Draw how a patient is shown; `pose_scale` multiplies the spread of the rotations, 0 is straight."""
    stretch = rng.uniform(0.95, 1.06), rng.uniform(0.94, 1.06), rng.uniform(0.96, 1.05)
    heights, row_mm = _breathe(rng, anatomy, stretch[0])
    dy, dx = anatomy.spacing[1] * stretch[1], anatomy.spacing[2] * stretch[2]
    places = np.interp(np.array(anatomy.lungs[0], dtype=float), heights, np.arange(len(heights)))
    low, high = (float(place) * row_mm for place in places)
    (front, back), (right, left) = anatomy.lungs[1], anatomy.lungs[2]
    top = (len(heights) - 1) * row_mm
    width = (left - right) * dx
    side = max((high - low) + rng.uniform(40, 110), width + rng.uniform(30, 100))
    most = min(END_MARGIN * top, END_MARGIN * anatomy.size[2] * dx if anatomy.cut else np.inf)
    side = float(min(np.clip(side, *SIDE_MM), most))
    rest = max(0.0, (top - side) / 2 - 0.03 * side)
    middle = float(np.clip((low + high) / 2 + rng.uniform(-25, 25), top / 2 - rest, top / 2 + rest))
    turns = [
        float(np.clip(rng.normal(0, spread), -most_, most_)) * pose_scale
        for spread, most_ in zip(TURN_DEG, MOST_TURN_DEG, strict=True)
    ]
    centre = ((right + left) / 2 * dx + rng.normal(0, 6), (front + back) / 2 * dy, middle)
    return Framing(
        Pose(turns[0], turns[1], turns[2], centre), _draw_beam(rng, side, pixels, view, beam), (row_mm, dy, dx), heights
    )


def _breathe(rng: np.random.Generator, anatomy: Anatomy, stretch: float) -> tuple[NDArray[np.float64], float]:
    """Stretch the volume from feet to head, most of all about the diaphragm.

    Returns:
        The rows to project as places between slices, and the distance of these rows, mm.
    """
    count, step = anatomy.size[0], anatomy.spacing[0]
    (low, high), slices = anatomy.lungs[0], np.arange(count)
    diaphragm, spread = low + 0.25 * (high - low), 0.2 * (high - low) + 1
    local = 1 + rng.uniform(-0.08, 0.10) * np.exp(-0.5 * ((slices - diaphragm) / spread) ** 2)
    place = np.concatenate([[0], np.cumsum(step * stretch * (local[1:] + local[:-1]) / 2)])
    rows = max(2, 1 + round(place[-1] / min(step, max(FINEST_ROW_MM, step / 4))))
    heights = np.interp(np.linspace(0, place[-1], rows), place, slices)
    return heights, float(place[-1]) / (rows - 1)


def _draw_beam(rng: np.random.Generator, side: float, pixels: int, view: View, kind: BeamKind) -> Beam:
    is_pa = rng.random() < PA_SHARE if view == "mixed" else view == "PA"
    is_parallel = rng.random() < PARALLEL_SHARE if kind == "mixed" else kind == "parallel"
    source = rng.uniform(1500, 2000) if is_pa else rng.uniform(1000, 1800)
    gap = rng.uniform(120, 180)
    return Beam(side, pixels, "PA" if is_pa else "AP", None if is_parallel else float(source), float(gap))
