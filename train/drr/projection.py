"""Project two material maps of a CT volume onto a flat detector, with a parallel or a cone beam.

The patient's axes are x (right to left), y (front to back) and z (feet to head), in mm from the isocentre. The image is
shown as a radiograph is: the patient's right is on the left, the head is up, for both PA and AP.

Each coronal plane of the volume is mapped onto the detector by a homography, whatever the pose. The sum over all
planes, with linear interpolation inside each plane, is Joseph's method: rays are followed along y, plane by plane.
Only one plane at a time is in memory beside the volume and the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from train.drr.volume import Spacing

Array = NDArray[np.float32]
Vector = NDArray[np.float64]
Heights = NDArray[np.float64]

PARALLEL_MM = 1e7  # source distance that stands for a parallel beam
WARP = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP


@dataclass(frozen=True)
class Pose:
    """How the patient stands before the detector.

    Attributes:
        yaw: rotation about the long axis, degrees; positive turns the patient's left shoulder to the front.
        tilt: rotation about the left-right axis, degrees; positive leans the head to the front.
        roll: rotation about the front-back axis, degrees; positive leans the head to the patient's left.
        centre: point of the volume that is at the isocentre, (x, y, z) in mm from the volume's first voxel.
    """

    yaw: float = 0.0
    tilt: float = 0.0
    roll: float = 0.0
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def rotation(self) -> Vector:
        """Return the matrix [3, 3] that turns the patient's axes into the room's."""
        yaw, tilt, roll = np.deg2rad([self.yaw, self.tilt, self.roll])
        c, s = np.cos(yaw), np.sin(yaw)
        about_z = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
        c, s = np.cos(tilt), np.sin(tilt)
        about_x = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
        c, s = np.cos(roll), np.sin(roll)
        about_y = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
        return np.asarray(about_y @ about_x @ about_z, dtype=np.float64)


@dataclass(frozen=True)
class Beam:
    """Source and detector.

    Attributes:
        side_mm: side of the square field, measured at the isocentre.
        pixels: side of the image, px.
        view: "PA" (the patient faces the detector) or "AP".
        source_mm: distance from source to detector; None is a parallel beam.
        gap_mm: distance from isocentre to detector.
    """

    side_mm: float
    pixels: int
    view: str = "PA"
    source_mm: float | None = 1800.0
    gap_mm: float = 150.0

    def geometry(self) -> tuple[Vector, Vector]:
        """Return the source's place [3] and the matrix [3, 3] from (column, row, 1) to a place on the detector, mm."""
        to_detector = -1.0 if self.view == "PA" else 1.0
        distance = PARALLEL_MM if self.source_mm is None else self.source_mm
        gap = 0.0 if self.source_mm is None else self.gap_mm
        source = np.array([0.0, -to_detector * (distance - gap), 0.0])
        pitch = self.side_mm / self.pixels * distance / (distance - gap)
        middle = (self.pixels - 1) / 2
        x_axis, z_axis = (pitch, 0.0, -pitch * middle), (0.0, -pitch, pitch * middle)
        return source, np.array([x_axis, (0.0, 0.0, to_detector * gap), z_axis])


def project(
    maps: Sequence[NDArray[Any]], spacing: Spacing, pose: Pose, beam: Beam, heights: Heights | None = None
) -> list[Array]:
    """Return the line integrals of maps, in their unit times mm.

    Args:
        maps: coronal planes [Y, Z, X] of one shape, from front to back, any real dtype. To the sides they are 0; above
            and below, their first and last row continue.
        spacing: distance of the voxels in z, y and x, mm; of the rows of `heights`, where it is given.
        pose: the patient's pose.
        beam: source and detector.
        heights: rows to project instead of the maps' own, as places between them, [Z'] float; None for their own.

    Returns:
        One image [pixels, pixels] per map, float32.
    """
    source, ray = _rays(pose, beam)
    _, dy, dx = spacing
    to_voxels = np.array([[1 / dx, 0, 1], [0, 1 / spacing[0], 0], [0, 0, 1]])  # one column of air is put at each side
    side = beam.pixels
    totals = [np.zeros((side, side), np.float32) for _ in maps]
    for k, planes in enumerate(zip(*maps, strict=True)):
        # Where the ray of (column, row, 1) meets plane y: source + ray (y - source_y) / ray_y, a homography.
        reach = k * dy - source[1]
        meets = np.stack([source[0] * ray[1] + reach * ray[0], source[2] * ray[1] + reach * ray[2], ray[1]])
        for total, plane in zip(totals, planes, strict=True):
            if plane.any():
                layer = _layer(plane, heights)
                total += cv2.warpPerspective(
                    layer, to_voxels @ meets, (side, side), flags=WARP, borderMode=cv2.BORDER_REPLICATE
                )
    columns, rows = np.meshgrid(np.arange(side, dtype=np.float64), np.arange(side, dtype=np.float64))
    direction = np.stack([r[0] * columns + r[1] * rows + r[2] for r in ray])
    step = (dy * np.sqrt((direction**2).sum(0)) / np.abs(direction[1])).astype(np.float32)
    return [total * step for total in totals]


def _rays(pose: Pose, beam: Beam) -> tuple[Vector, Vector]:
    """Return the source's place [3] in the volume, and the matrix [3, 3] from (column, row, 1) to the ray from it."""
    turn = pose.rotation().T  # of the room's axes into the patient's
    source_room, detector_room = beam.geometry()
    source = turn @ source_room
    ray = turn @ detector_room
    ray[:, 2] -= source
    return source + np.array(pose.centre), ray


def _layer(plane: NDArray[Any], heights: Heights | None) -> Array:
    """Return a plane at its own rows or at `heights`, with a column of air at each side: [Z', X + 2] float32."""
    rows, columns = plane.shape
    layer = np.zeros((rows if heights is None else len(heights), columns + 2), np.float32)
    if heights is None:
        layer[:, 1:-1] = plane
        return layer
    below = np.clip(np.floor(heights).astype(np.int64), 0, rows - 1)
    above = np.minimum(below + 1, rows - 1)
    part = np.clip(heights - below, 0, 1).astype(np.float32)[:, None]
    layer[:, 1:-1] = plane[below] * (1 - part) + plane[above] * part
    return layer
