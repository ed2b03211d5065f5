"""Turn a CT into what is projected: read, checked, segmented, split into materials. Once per CT."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.errors import InputRefused
from train.drr.body import check_chest, check_geometry, crop_to_body, find_body, find_lungs
from train.drr.bones import find_tissues
from train.drr.cartilage import find_cartilage
from train.drr.framing import Anatomy
from train.drr.materials import Materials, split_materials
from train.drr.volume import Source, Volume, read_volume

LEAST_BONE_ML = 200.0


@dataclass(frozen=True)
class Prepared:
    """A CT that can be projected. `bone_ml` and `contrast_ml` tell the user how much of each was found."""

    materials: Materials
    anatomy: Anatomy
    bone_ml: float
    contrast_ml: float


def prepare_ct(
    source: Source,
    voxel_mm: float,
    labels: Path | None = None,
    label_values: frozenset[int] | None = None,
    *,
    cartilage: bool = False,
) -> Prepared:
    """Read, check and segment one CT.

    Args:
        source: the CT.
        voxel_mm: finer voxels are averaged to about this size.
        labels, label_values: see `read_volume`.
        cartilage: also look for the rib cartilage.

    Raises:
        InputRefused: not a chest, cut, incomplete, or otherwise of no use; with the reason.
        InputFailed: unreadable.
    """
    volume = coarsen(read_volume(source, labels, label_values), voxel_mm)
    check_geometry(volume.hu, volume.spacing)
    body = find_body(volume.hu, volume.spacing)
    box = crop_to_body(body, volume.spacing)
    hu, body = np.ascontiguousarray(volume.hu[box]), np.ascontiguousarray(body[box])
    known = None if volume.labels is None else np.ascontiguousarray(volume.labels[box])
    spacing = volume.spacing
    del volume
    lungs = find_lungs(hu, body, spacing)
    check_chest(hu, body, lungs, spacing)
    tissues = find_tissues(hu, body, lungs, spacing, known)
    millilitres = [float(mask.sum()) * float(np.prod(spacing)) / 1000 for mask in (tissues.bone, tissues.contrast)]
    if millilitres[0] < LEAST_BONE_ML:
        raise InputRefused(f"{millilitres[0]:.0f} ml of bone were found, less than {LEAST_BONE_ML:g}")
    anatomy = Anatomy.measure(body, lungs, spacing)
    materials = split_materials(hu, body, lungs, tissues, spacing)
    if cartilage:
        depth = find_cartilage(hu, body, lungs, tissues, spacing, labelled=known is not None)
        materials = replace(materials, cartilage=np.ascontiguousarray(depth.transpose(1, 0, 2)))
    return Prepared(materials, anatomy, *millilitres)


def coarsen(volume: Volume, voxel_mm: float) -> Volume:
    """Return the volume with voxels of at least about `voxel_mm`, averaged from finer ones."""
    factor_y, factor_x = (min(1.0, step / voxel_mm) for step in volume.spacing[1:])
    together = max(1, int(voxel_mm / volume.spacing[0]))
    if min(factor_y, factor_x) > 0.95 and together == 1:
        return volume
    rows, columns = (max(1, round(n * f)) for n, f in zip(volume.hu.shape[1:], (factor_y, factor_x), strict=True))
    count = len(volume.hu) // together

    def reduce(values: NDArray[np.int16] | NDArray[np.bool_]) -> NDArray[np.float32]:
        result = np.empty((count, rows, columns), np.float32)
        for k in range(count):
            plane = values[k * together : (k + 1) * together].mean(axis=0, dtype=np.float32)
            result[k] = cv2.resize(plane, (columns, rows), interpolation=cv2.INTER_AREA)
        return result

    spacing = (
        volume.spacing[0] * together,
        volume.spacing[1] * volume.hu.shape[1] / rows,
        volume.spacing[2] * volume.hu.shape[2] / columns,
    )
    labels = None if volume.labels is None else reduce(volume.labels) >= 0.5
    return Volume(volume.name, np.rint(reduce(volume.hu)).astype(np.int16), spacing, labels)
