"""Tell bone from everything else in a chest CT, contrast medium above all.

Bone is dense, but so are vessels, heart and kidneys full of contrast medium, and metal. They are told apart by where
they are: seeds of blood are thick, smooth, dense regions inside the rib cage; seeds of bone are what is dense in or
outside of the cage's wall and in the spine, and the user's labels. Every dense voxel joins the seed it is nearest to,
on a path of dense voxels.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from train.drr.body import COARSE_MM, METAL_HU, ellipse, fill_holes
from train.drr.volume import Mask, Spacing, Volume3D

DENSE_HU = 200  # cortical and most trabecular bone
EDGE_HU = 110  # of the partial volume beside it
MARROW_HU = -150  # darkest fat that is filled inside of a bone
LABEL_EDGE_HU = 130
EDGE_MM = 2.0
CLOSE_MM = 4.0
LARGEST_CAVITY_CM2 = 22.0  # what bone encloses in a slice: a larger one is not marrow
SMALLEST_BONE_ML = 0.4
SMALLEST_BLOOD_ML = 20.0  # less than this is no contrast medium in the vessels
BLOOD_HU = 130
BLOOD_MM = 4.0  # half the thickness of a seed of blood
BLOOD_ROUGHNESS_HU = 60.0  # standard deviation inside of 10 mm, above it is no seed of blood
SPINE_DEPTH = 0.6  # of the body, from the front: the middle of the spine is behind
VERTEBRA_MM = (28.0, 60.0, 16.0)  # in front of the spine's middle, behind it and to each side: nothing but bone
SPINE_MM = (42.0, 60.0, 42.0)  # where a vertebra may look like a vessel
BOLUS_HU = 1200  # with contrast medium in the vessels: what is thicker than cortical bone and denser is a vein
BOLUS_MM = 2.5  # half its thickness
GLARE_MM = 12.0
BLOOD_BAND = (0.7, 1.4)  # of the vessels' median: what a seed of blood beside the spine has
WALL_MM = 8.0  # how far inside the lungs' hull the ribs may reach


@dataclass(frozen=True)
class Tissues:
    """What is dense. Both are bool, [Z, Y, X].

    Attributes:
        bone: bone with its marrow.
        contrast: other voxels denser than soft tissue that belong to vessels or organs with contrast medium.
    """

    bone: Mask
    contrast: Mask


def find_tissues(hu: Volume3D, body: Mask, lungs: Mask, spacing: Spacing, labels: Mask | None = None) -> Tissues:
    """Return bone and contrast medium; `labels` is bone for certain, but need not be complete."""
    dense = body & (hu > DENSE_HU)
    dense &= ~_metal(hu, body, spacing)
    if labels is not None:
        dense |= labels & body
    cage = inside_of_cage(lungs, spacing)
    blood = _grow_blood(hu, body, dense, cage, spacing, labels)
    has_contrast = blood is not None
    core = dense & ~blood if blood is not None else dense
    core = _without_specks(core, cage, spacing, labels)
    bone = _with_marrow(
        hu, core, body, spacing, EDGE_HU if labels is None and not has_contrast else LABEL_EDGE_HU, blood
    )
    contrast = body & ~bone & (hu > BLOOD_HU - 10) if has_contrast else np.zeros_like(bone)
    return Tissues(bone, contrast)


def _metal(hu: Volume3D, body: Mask, spacing: Spacing) -> Mask:
    """Return metal and its glare: within EDGE_MM of what no bone reaches, in each slice."""
    kernel = ellipse(EDGE_MM, spacing[1:])
    found = np.zeros(hu.shape, bool)
    for k in np.flatnonzero((hu >= METAL_HU).any(axis=(1, 2))):
        found[k] = cv2.dilate((body[k] & (hu[k] >= METAL_HU)).astype(np.uint8), kernel).astype(bool)
    return found


def inside_of_cage(lungs: Mask, spacing: Spacing) -> Mask:
    """Return what the ribs enclose: the convex hull of the lungs of a slice and of all above it, without its rim."""
    kernel = ellipse(WALL_MM, spacing[1:])
    cage = np.zeros(lungs.shape, bool)
    below = np.zeros(lungs.shape[1:], np.uint8)
    for k in range(len(lungs) - 1, -1, -1):
        points = cv2.findNonZero(lungs[k].astype(np.uint8))
        hull = np.zeros_like(below)
        if points is not None:
            cv2.fillConvexPoly(hull, cv2.convexHull(points), 1)
        below |= hull
        cage[k] = cv2.erode(below, kernel).astype(bool)
    return cage


def _spine_places(dense: Mask, body: Mask, spacing: Spacing) -> NDArray[np.float64]:
    """Return row and column of the spine's middle in each slice, [Z, 2]; NaN where nothing dense is found.

    The middle is where a square of 45 mm in the rear of the body, near its midline, holds most dense voxels.
    """
    rows, columns = (max(1, round(45.0 / step)) for step in spacing[1:])
    places = np.full((len(dense), 2), np.nan)
    for k in range(len(dense)):
        across, along = (np.flatnonzero(body[k].any(axis=axis)) for axis in (1, 0))
        if not len(across):
            continue
        counts = cv2.boxFilter(dense[k].astype(np.float32), -1, (columns, rows), normalize=False)
        half = round(across[0] + SPINE_DEPTH * (across[-1] - across[0]))
        middle = (along[0] + along[-1]) // 2
        reach = max(1, len(along) // 6)
        part = counts[half : across[-1], max(0, middle - reach) : middle + reach]
        if part.size and part.max() > 0:
            row, column = np.unravel_index(part.argmax(), part.shape)
            places[k] = half + row, max(0, middle - reach) + column
    known = np.flatnonzero(np.isfinite(places[:, 0]))
    if not len(known):
        return places
    reach = max(1, round(30 / spacing[0]))
    smooth = np.empty_like(places)
    for k in range(len(dense)):
        near = known[np.abs(known - k) <= reach]
        smooth[k] = np.median(places[near if len(near) else known], axis=0)
    return smooth


def _boxes(
    places: NDArray[np.float64], shape: tuple[int, ...], spacing: Spacing, size: tuple[float, float, float]
) -> Mask:
    """Return a box about each slice's place; `size` is in front of it, behind it and to each side, mm."""
    zone = np.zeros(shape, bool)
    front, behind = round(size[0] / spacing[1]), round(size[1] / spacing[1])
    side = round(size[2] / spacing[2])
    for k in np.flatnonzero(np.isfinite(places[:, 0])):
        row, column = places[k].astype(int)
        zone[k, max(0, row - front) : row + behind + 1, max(0, column - side) : column + side + 1] = True
    return zone


def _grow_blood(
    hu: Volume3D, body: Mask, dense: Mask, cage: Mask, spacing: Spacing, labels: Mask | None
) -> Mask | None:
    """Return the dense voxels that belong to contrast medium; None where there is none in the vessels."""
    steps = tuple(max(1, round(COARSE_MM / each)) for each in spacing)
    every = (slice(None, None, steps[0]), slice(None, None, steps[1]), slice(None, None, steps[2]))
    pitch = (spacing[0] * steps[0], spacing[1] * steps[1], spacing[2] * steps[2])
    small, small_dense, inside = hu[every], dense[every], cage[every] & body[every]
    places = _spine_places(small_dense, body[every], pitch)
    vertebra, spine = (_boxes(places, small.shape, pitch, size) for size in (VERTEBRA_MM, SPINE_MM))
    seeds = _mostly_inside(_blood_seeds(small, body[every] & ~spine, pitch), inside)
    if labels is not None:
        seeds &= ~labels[every]
    if seeds.sum() * np.prod(pitch) / 1000 < SMALLEST_BLOOD_ML:
        return None
    low, high = np.median(small[seeds]) * np.array(BLOOD_BAND)
    seeds |= _blood_seeds(small, inside & spine & ~vertebra & (small > low) & (small < high), pitch)
    bolus = _bolus(small, body[every], pitch)
    seeds |= bolus
    if labels is not None:
        seeds &= ~labels[every]
    near = _widen(bolus, pitch)
    bone_seeds = small_dense & (~inside | vertebra) & ~near & ~seeds if labels is None else labels[every]
    blood = _compete(small_dense, seeds, bone_seeds)
    if labels is not None:
        blood |= near & ~labels[every]
    index = [np.minimum(np.arange(n) // s, m - 1) for n, s, m in zip(hu.shape, steps, blood.shape, strict=True)]
    return np.asarray(dense & blood[np.ix_(*index)])


def _blood_seeds(hu: Volume3D, inside: Mask, pitch: Spacing) -> Mask:
    """Return thick, smooth regions of contrast medium."""
    kernel = ellipse(BLOOD_MM, pitch[1:])
    window = tuple(max(3, round(10 / step)) for step in pitch[:0:-1])
    seeds = np.zeros(hu.shape, bool)
    for k, plane in enumerate(hu):
        thick = cv2.morphologyEx(((plane > BLOOD_HU) & inside[k]).astype(np.uint8), cv2.MORPH_OPEN, kernel)
        if not thick.any():
            continue
        weight = cv2.boxFilter(thick.astype(np.float32), -1, window) + 1e-6
        values = plane.astype(np.float32) * thick
        mean = cv2.boxFilter(values, -1, window) / weight
        square = cv2.boxFilter(values**2, -1, window) / weight
        rough = np.sqrt(np.maximum(square - mean**2, 0)) > np.maximum(BLOOD_ROUGHNESS_HU, 0.15 * mean)
        seeds[k] = thick.astype(bool) & ~rough
    return seeds


def _mostly_inside(seeds: Mask, inside: Mask) -> Mask:
    """Return the connected parts of which more than half is inside."""
    parts, _ = ndimage.label(seeds)
    sizes = np.bincount(parts.ravel())
    keep = np.bincount(parts[inside], minlength=len(sizes)) > 0.5 * sizes
    keep[0] = False
    return np.take(keep, parts)


def _bolus(hu: Volume3D, body: Mask, pitch: Spacing) -> Mask:
    """Return veins full of undiluted contrast medium."""
    kernel = ellipse(BOLUS_MM, pitch[1:])
    found = np.zeros(hu.shape, bool)
    for k in np.flatnonzero((hu > BOLUS_HU).any(axis=(1, 2))):
        found[k] = cv2.morphologyEx((body[k] & (hu[k] > BOLUS_HU)).astype(np.uint8), cv2.MORPH_OPEN, kernel) > 0
    return found


def _widen(bolus: Mask, pitch: Spacing) -> Mask:
    """Return what is so near to a bolus in its slice that it may be its vein or its glare."""
    kernel = ellipse(GLARE_MM, pitch[1:])
    widened = bolus.copy()
    for k in np.flatnonzero(bolus.any(axis=(1, 2))):
        widened[k] = cv2.dilate(bolus[k].astype(np.uint8), kernel) > 0
    return widened


def _compete(where: Mask, first: Mask, second: Mask) -> Mask:
    """Return the part of `where` that is nearer to `first` than to `second`, on paths inside of `where`."""
    where = where | first
    mine, theirs = first & ~second, second & where
    free = where & ~mine & ~theirs
    for _ in range(max(where.shape)):
        step_mine = ndimage.binary_dilation(mine) & free
        step_theirs = ndimage.binary_dilation(theirs) & free & ~step_mine
        if not (step_mine.any() or step_theirs.any()):
            break
        mine |= step_mine
        theirs |= step_theirs
        free &= ~(step_mine | step_theirs)
    return mine


def _without_specks(core: Mask, cage: Mask, spacing: Spacing, labels: Mask | None) -> Mask:
    """Leave out small parts, and parts that lie wholly inside of the rib cage: calcifications, clips, noise."""
    parts, count = ndimage.label(core, np.ones((3, 3, 3)))
    if not count:
        return core
    sizes = np.bincount(parts.ravel())
    within = np.bincount(parts[cage], minlength=len(sizes))
    keep = (sizes * np.prod(spacing) / 1000 >= SMALLEST_BONE_ML) & (within < 0.98 * sizes)
    if labels is not None:
        keep |= np.bincount(parts[labels], minlength=len(sizes)) > 0
    keep[0] = False
    return np.take(keep, parts)


def _with_marrow(hu: Volume3D, core: Mask, body: Mask, spacing: Spacing, edge: int, blood: Mask | None) -> Mask:
    """Add the blurred edge of bones, and what they enclose in an axial slice."""
    near, closing = ellipse(EDGE_MM, spacing[1:]), ellipse(CLOSE_MM, spacing[1:])
    margin, largest = max(closing.shape), round(LARGEST_CAVITY_CM2 * 100 / (spacing[1] * spacing[2]))
    grown = core.copy()
    for k in np.flatnonzero(core.any(axis=(1, 2))):
        ring = cv2.dilate(core[k].astype(np.uint8), near).astype(bool) & (hu[k] > edge) & body[k]
        here = core[k] | (ring if blood is None else ring & ~blood[k])
        padded = np.pad(here.astype(np.uint8), margin)
        closed = fill_holes(cv2.morphologyEx(padded, cv2.MORPH_CLOSE, closing).astype(np.uint8))
        enclosed = closed[margin:-margin, margin:-margin].astype(bool) & ~here
        if blood is not None:
            enclosed &= ~blood[k]
        count, parts, statistics, _ = cv2.connectedComponentsWithStats(enclosed.astype(np.uint8), connectivity=4)
        small = statistics[:count, cv2.CC_STAT_AREA] <= largest
        small[0] = False
        grown[k] = here | (small[parts] & (hu[k] > MARROW_HU))
    return grown
