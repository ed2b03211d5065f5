"""Find the rib cartilage in a CT, and draw calcifications into it.

With age the cartilage between ribs and breastbone calcifies: along its border, in lumps inside, or both. On an X-ray
this is bone, and few patients of a small set of CTs have it.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from train.drr.body import ellipse
from train.drr.bones import Tissues, inside_of_cage
from train.drr.volume import Mask, Spacing, Volume3D

LEAST_HU, MOST_HU = 65, 190  # of cartilage that is not calcified: muscle has 40 to 60
ORGANS_PERCENTILE, ABOVE_ORGANS_HU = 90, 3  # cartilage is denser than most of what the ribs enclose
SMOOTH_MM = 1.5
BONE_HU, FROM_BONE_MM = 260, 2.5  # where labels count cartilage as bone, it is what lies apart from dense bone
HALF_THICKNESS_MM = (2.5, 9.0)  # what is thinner is muscle or noise, what is thicker an organ
ORGAN_MM = 14.0  # how far about an organ nothing counts
FRONT = 0.5  # of the chest, from the front
SMALLEST_ML = 1.0
TOUCH_MM = 3.0  # from a rib or the breastbone
DEPTH_UNITS = 10  # per mm

SHELL_MM = (1.5, 3.5)  # thickness of a calcified border
SHELL_HU, LUMP_HU = (500.0, 1200.0), (300.0, 1200.0)
PATCH_MM, LUMP_MM, RIB_MM = 20.0, 6.0, 45.0  # size of border patches, of lumps, and of what differs from rib to rib


def find_cartilage(
    hu: Volume3D, body: Mask, lungs: Mask, tissues: Tissues, spacing: Spacing, *, labelled: bool = False
) -> NDArray[np.int16]:
    """Return how deep each voxel lies in rib cartilage, [Z, Y, X], in 1 / DEPTH_UNITS mm; 0 outside of it.

    Cartilage is a little denser than muscle, not thick, in the wall of the chest's front half, and touches bone. Where
    `tissues.bone` is `labelled`, cartilage may count as bone: then what is soft in it counts, too.
    """
    cage = inside_of_cage(lungs, spacing)
    depth = np.zeros(hu.shape, np.int16)
    rows, columns = (np.flatnonzero(lungs.any(axis=axes)) for axes in ((0, 2), (0, 1)))
    if not len(rows):
        return depth
    last_row = rows[0] + round(FRONT * (rows[-1] - rows[0]))
    front = np.s_[:, :last_row, columns[0] : columns[-1] + 1]
    other = ~body | lungs | tissues.bone | tissues.contrast
    smooth = ndimage.gaussian_filter(
        np.clip(hu[front], -150, 250).astype(np.float32), [SMOOTH_MM / step for step in spacing]
    )
    organs = smooth[cage[front] & ~other[front] & (smooth > 0)]
    least = float(LEAST_HU)
    if len(organs):
        least = max(least, float(np.percentile(organs, ORGANS_PERCENTILE)) + ABOVE_ORGANS_HU)
    found = ~other[front] & ~cage[front] & (smooth > least) & (smooth < MOST_HU)
    allowed = ~other[front]
    if labelled:
        dense = ndimage.distance_transform_edt(hu[front] <= BONE_HU, sampling=spacing)
        soft = tissues.bone[front] & (smooth > LEAST_HU) & (smooth < MOST_HU) & (dense > FROM_BONE_MM)
        found, allowed = found | soft, allowed | (tissues.bone[front] & (hu[front] <= BONE_HU))
    found = _neither_thin_nor_thick(found, spacing)
    found = _beside_bone(found, tissues.bone[front], spacing)
    in_plane = ndimage.generate_binary_structure(2, 1)[None]  # slices may be thick
    inside = ndimage.binary_dilation(found, in_plane) & allowed
    if inside.any():
        mm = ndimage.distance_transform_edt(inside, sampling=spacing)
        depth[front] = np.clip(np.rint(mm * DEPTH_UNITS), 0, np.iinfo(np.int16).max)
    return depth


def _neither_thin_nor_thick(found: Mask, spacing: Spacing) -> Mask:
    thin, thick = (ellipse(each, spacing[1:]) for each in HALF_THICKNESS_MM)
    near = ellipse(ORGAN_MM, spacing[1:])
    margin = max(near.shape)
    kept = np.zeros_like(found)
    for k in np.flatnonzero(found.any(axis=(1, 2))):
        plane = np.pad(found[k].astype(np.uint8), margin)
        organ = cv2.dilate(cv2.morphologyEx(plane, cv2.MORPH_OPEN, thick), near)
        plane = np.where(organ > 0, 0, cv2.morphologyEx(plane, cv2.MORPH_OPEN, thin))
        kept[k] = plane[margin:-margin, margin:-margin] > 0
    return kept


def _beside_bone(found: Mask, bone: Mask, spacing: Spacing) -> Mask:
    parts, _ = ndimage.label(found, np.ones((3, 3, 3)))
    sizes = np.bincount(parts.ravel())
    near = ndimage.binary_dilation(bone, iterations=max(1, round(TOUCH_MM / spacing[1])))
    keep = (sizes * np.prod(spacing) / 1000 >= SMALLEST_ML) & (np.bincount(parts[near], minlength=len(sizes)) > 0)
    keep[0] = False
    return np.take(keep, parts)


def calcify(rng: np.random.Generator, depth: NDArray[np.int16], spacing: Spacing) -> NDArray[np.int16]:
    """Draw calcifications: Hounsfield units above the cartilage's, with `depth`'s axes.

    Args:
        rng: decides how much, whether at the border or in lumps, and where.
        depth: of `find_cartilage`, in any order of axes.
        spacing: distance of the voxels along these axes, mm.
    """
    excess = np.zeros(depth.shape, np.int16)
    voxels = np.nonzero(depth)
    if not len(voxels[0]):
        return excess
    mm = depth[voxels].astype(np.float32) / DEPTH_UNITS
    places = np.stack([axis * step for axis, step in zip(voxels, spacing, strict=True)]).astype(np.float32)
    patches, lumps, ribs = (_draw_field(rng, places, size) for size in (PATCH_MM, LUMP_MM, RIB_MM))
    border, inner = rng.uniform(0, 1, 2)
    thick = rng.uniform(*SHELL_MM)
    shell = np.exp(-((mm / thick) ** 2)) * _rise(patches + 0.7 * ribs, 1.2 - 3.5 * border) * rng.uniform(*SHELL_HU)
    lump = (mm > thick / 2) * _rise(lumps + 0.7 * ribs, 1.7 - 2.5 * inner) * rng.uniform(*LUMP_HU)
    excess[voxels] = np.rint(np.maximum(shell, lump))
    return excess


def _draw_field(rng: np.random.Generator, places: NDArray[np.float32], size_mm: float) -> NDArray[np.float32]:
    """Return smooth noise of about unit variance at `places` [3, N], mm."""
    low = places.min(axis=1, keepdims=True)
    grid = rng.normal(size=[int(n) + 2 for n in np.ptp(places, axis=1) / size_mm]).astype(np.float32)
    values = ndimage.map_coordinates(grid, (places - low) / size_mm, order=1, mode="nearest")
    return np.asarray(1.5 * values, np.float32)  # interpolation takes a third to a half of the spread


def _rise(field: NDArray[np.float32], threshold: float) -> NDArray[np.float32]:
    """Return 0 where the field is below the threshold, 1 where it is well above."""
    return np.clip((field - np.float32(threshold)) / np.float32(0.6), 0, 1)
