"""Find the body and the lungs of a chest CT, and refuse a volume that cannot become a chest X-ray.

All volumes are [z, y, x] with z from feet to head; masks are bool of the volume's shape; spacing is (z, y, x) in mm.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bsdiff_rt.errors import InputRefused
from train.drr.volume import FEWEST_SLICES, Mask, Spacing, Volume3D

COARSE_MM = 2.0  # masks of large things are found on voxels of about this size
BODY_HU = -350  # skin and fat are above, air, foam and most clothing below
THIN_MM = 14.0  # table top, blankets and lines are thinner
SKIN_MM = 6.0  # what is this close to the opened body and dense enough belongs to it
SMALLEST_PART_PX = 25  # of a slice of the coarse volume
CROP_MARGIN_MM = 10.0
LUNG_HU = -500
LUNG_SHARE = 0.15  # of the largest air space: what is smaller is bowel gas or airway

LEAST_LUNG_ML = 1000.0
CUT_LUNG_CM2 = 25.0  # of lung in the first or last slice
LEAST_HEIGHT_MM = 200.0
THICKEST_SLICE_MM = 6.0
SIDE_MM = 10.0  # lung that is closer than this to the side of the field of view lacks its ribs
METAL_HU = 2400
MOST_METAL_ML = 15.0
SPINE_HU = 250


def ellipse(radius_mm: float, spacing: tuple[float, float]) -> NDArray[np.uint8]:
    """Return a structuring element of a disc for cv2; spacing is of rows and columns, mm."""
    rows, columns = (max(1, round(radius_mm / step)) for step in spacing)
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * columns + 1, 2 * rows + 1)), dtype=np.uint8)


def fill_holes(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Fill what a slice's mask, [Y, X] of 0 and 1, encloses."""
    padded = np.pad(mask, 1)
    outside = np.zeros((padded.shape[0] + 2, padded.shape[1] + 2), np.uint8)
    flooded = padded.copy()
    cv2.floodFill(flooded, outside, (0, 0), 2)
    return np.asarray(flooded[1:-1, 1:-1] != 2, dtype=np.uint8)


def largest_part(mask: Mask) -> Mask:
    """Return the largest connected part of a mask; the mask itself where it is empty."""
    labels, count = ndimage.label(mask)
    if count < 2:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.asarray(labels == sizes.argmax())


def coarse_step(spacing: Spacing) -> int:
    """Return how many voxels in a row and in a column make one of about COARSE_MM."""
    return max(1, round(COARSE_MM / max(spacing[1], spacing[2])))


def enlarge(mask: Mask, shape: tuple[int, ...]) -> Mask:
    """Return a coarse mask on the fine voxels of `shape`."""
    rows, columns = (np.minimum(np.arange(n) * m // n, m - 1) for n, m in zip(shape[1:], mask.shape[1:], strict=True))
    return mask[:, rows][:, :, columns]


def find_body(hu: Volume3D, spacing: Spacing) -> Mask:
    """Return the body: without table, clothing and what else lies on or under the patient."""
    step = coarse_step(spacing)
    small = hu[:, ::step, ::step]
    pitch = (spacing[1] * step, spacing[2] * step)
    opening, skin = (ellipse(mm, pitch) for mm in (THIN_MM / 2, SKIN_MM))
    opened = np.zeros(small.shape, np.uint8)
    dense = np.zeros(small.shape, np.uint8)
    for k, plane in enumerate(small):
        dense[k] = _fill_parts(np.asarray(plane > BODY_HU, dtype=np.uint8))
        opened[k] = cv2.morphologyEx(dense[k], cv2.MORPH_OPEN, opening, borderType=cv2.BORDER_REPLICATE)
    body = largest_part(opened.astype(bool)).astype(np.uint8)
    grown = [cv2.dilate(plane, skin) & held | plane for plane, held in zip(body, dense, strict=True)]
    return enlarge(np.stack(grown).astype(bool), hu.shape)


def _fill_parts(plane: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Fill each connected part of a slice by itself, so that the air between body and table stays open."""
    filled = np.zeros_like(plane)
    count, labels, statistics, _ = cv2.connectedComponentsWithStats(plane, connectivity=4)
    for part in range(1, count):
        if statistics[part, cv2.CC_STAT_AREA] >= SMALLEST_PART_PX:
            left, top, width, height = statistics[part, :4]
            box = (slice(top, top + height), slice(left, left + width))
            filled[box] |= fill_holes((labels[box] == part).astype(np.uint8))
    return filled


def crop_to_body(body: Mask, spacing: Spacing) -> tuple[slice, slice, slice]:
    """Return the part of the volume that holds the body, with a margin of air."""
    rows, columns = (np.flatnonzero(body.any(axis=(0, axis))) for axis in (2, 1))
    if not len(rows):
        return (slice(None), slice(None), slice(None))
    margins = [round(CROP_MARGIN_MM / step) for step in spacing[1:]]
    sides = [slice(max(0, int(f[0]) - m), int(f[-1]) + m + 1) for f, m in zip((rows, columns), margins, strict=True)]
    return (slice(0, len(body)), sides[0], sides[1])


def find_lungs(hu: Volume3D, body: Mask, spacing: Spacing) -> Mask:
    """Return the air of the lungs and the large airways; empty where the body holds none."""
    step = coarse_step(spacing)
    pitch = (spacing[1] * step, spacing[2] * step)
    skin = ellipse(SKIN_MM, pitch)
    inner = np.stack([cv2.erode(plane.astype(np.uint8), skin) for plane in body[:, ::step, ::step]]).astype(bool)
    labels, count = ndimage.label((hu[:, ::step, ::step] < LUNG_HU) & inner)
    if not count:
        return np.zeros(hu.shape, bool)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    kept = np.isin(labels, np.flatnonzero(sizes > LUNG_SHARE * sizes.max()))
    return enlarge(kept, hu.shape)


def check_geometry(hu: Volume3D, spacing: Spacing) -> None:
    """Refuse a volume with too few, too thick or too little of slices.

    Raises:
        InputRefused: with the reason.
    """
    if spacing[0] > THICKEST_SLICE_MM:
        raise InputRefused(f"slices every {spacing[0]:.1f} mm, thicker than {THICKEST_SLICE_MM:g} mm")
    if len(hu) < FEWEST_SLICES:
        raise InputRefused(f"{len(hu)} slices, fewer than {FEWEST_SLICES}")
    height = (len(hu) - 1) * spacing[0]
    if height < LEAST_HEIGHT_MM:
        raise InputRefused(f"covers {height:.0f} mm from feet to head, less than {LEAST_HEIGHT_MM:g} mm")


def check_chest(hu: Volume3D, body: Mask, lungs: Mask, spacing: Spacing) -> None:
    """Refuse a volume that is not a chest, is cut, upside down or back to front, or holds much metal.

    Raises:
        InputRefused: with the reason.
    """
    voxel_ml = float(np.prod(spacing)) / 1000
    pixel_cm2 = spacing[1] * spacing[2] / 100
    volume = float(lungs.sum()) * voxel_ml
    if volume < LEAST_LUNG_ML:
        raise InputRefused(f"not a chest, or most of it is cut: {volume:.0f} ml of lung, less than {LEAST_LUNG_ML:g}")
    for k, end in ((0, "lower"), (-1, "upper")):
        if (area := float(lungs[k].sum()) * pixel_cm2) > CUT_LUNG_CM2:
            raise InputRefused(f"the lungs are cut at the {end} end ({area:.0f} square cm in the last slice)")
    columns = np.flatnonzero(lungs.any(axis=(0, 1)))
    if min(columns[0], lungs.shape[2] - 1 - columns[-1]) * spacing[2] < SIDE_MM:
        raise InputRefused("the lungs are cut at the side of the field of view")
    metal = float((body & (hu >= METAL_HU)).sum()) * voxel_ml
    if metal > MOST_METAL_ML:
        raise InputRefused(f"{metal:.0f} ml of metal or dense contrast medium, more than {MOST_METAL_ML:g}")
    _check_orientation(hu, lungs)


def _check_orientation(hu: Volume3D, lungs: Mask) -> None:
    """Refuse a volume whose spine is not behind the lungs' middle, or whose upper end is not the apices."""
    planes = np.flatnonzero(lungs.any(axis=(1, 2)))
    rows = np.flatnonzero(lungs.any(axis=(0, 2)))
    columns = np.flatnonzero(lungs.any(axis=(0, 1)))
    middle = slice(columns[0] + len(columns) * 2 // 5, columns[0] + len(columns) * 3 // 5)
    bone = (hu[planes[0] : planes[-1] + 1, :, middle] > SPINE_HU).sum(axis=(0, 2))
    if bone.sum() and np.average(np.arange(len(bone)), weights=bone) < (rows[0] + rows[-1]) / 2:
        raise InputRefused("the spine is at the front: the file's orientation is wrong")
    end = max(1, len(planes) // 10)
    low, high = (np.nonzero(lungs[part])[2] for part in (planes[:end], planes[-end:]))
    centre = np.average(np.arange(lungs.shape[2]), weights=lungs.sum(axis=(0, 1)))
    if np.abs(low - centre).mean() < np.abs(high - centre).mean():
        raise InputRefused("the lungs' apices are not at the head: the file's orientation is wrong")
