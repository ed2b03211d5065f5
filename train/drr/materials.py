"""From Hounsfield units to two materials, and from their path lengths to attenuation at an effective energy.

A voxel is soft tissue of some density, plus, in bone, an excess of attenuation over soft tissue. Both are projected
once; an image at any energy is a sum of the two with the coefficients of that energy. The image without bone lacks the
second term: soft tissue stands where bone was.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from train.drr.body import ellipse
from train.drr.bones import BOLUS_HU, Tissues
from train.drr.volume import Mask, Spacing, Volume3D

REPLACED_HU = 50  # soft tissue in the place of bone
ENHANCED_HU = 60  # and in the place of contrast medium
GLARING_BONE_HU = 1500  # with contrast medium in the vessels: what is denser is its glare
STREAK_MM = 15.0  # dark glare of metal and contrast medium reaches this far
STREAK_HU, REPAIRED_HU = -200, 0
SCALE = 1000.0  # stored units per 1: water is 1000

CT_KEV = 70.0  # effective energy of a CT at 120 kV: what the Hounsfield units were measured at
BONE_DENSITY, SOFT_DENSITY = 1.92, 1.05  # g/cm3, of cortical bone and soft tissue
# Mass attenuation coefficients, cm2/g: NIST, X-Ray Mass Attenuation Coefficients (water; cortical bone, ICRU 44).
_KEV = np.array([30.0, 40.0, 50.0, 60.0, 80.0, 100.0, 150.0])
_WATER = np.array([0.3756, 0.2683, 0.2269, 0.2059, 0.1837, 0.1707, 0.1505])
_BONE = np.array([1.331, 0.6655, 0.4242, 0.3148, 0.2229, 0.1855, 0.1480])


@dataclass(frozen=True)
class Materials:
    """What is projected, in units of 1 / SCALE, [Y, Z, X] int16: coronal planes, from front to back.

    Attributes:
        soft: attenuation relative to water, with soft tissue in the place of bone; 0 outside of the body.
        excess: what bone attenuates beyond that soft tissue, relative to water, at CT_KEV.
        lungs: SCALE in the lungs, else 0.
        cartilage: depth in the rib cartilage (`find_cartilage`); None if it was not looked for.
    """

    soft: NDArray[np.int16]
    excess: NDArray[np.int16]
    lungs: NDArray[np.int16]
    cartilage: NDArray[np.int16] | None = None


def split_materials(hu: Volume3D, body: Mask, lungs: Mask, tissues: Tissues, spacing: Spacing) -> Materials:
    """Return the materials of a CT; contrast medium is replaced by blood without it."""
    repaired = np.where(tissues.contrast, np.int16(ENHANCED_HU), hu)
    streaks = _streaks(hu, body, lungs, tissues, spacing)
    repaired[streaks] = REPAIRED_HU
    soft = np.where(tissues.bone, np.int16(REPLACED_HU), repaired) + np.int16(SCALE)
    soft[~body] = 0
    most = GLARING_BONE_HU if tissues.contrast.any() else int(hu.max())
    excess = np.where(tissues.bone & body, np.clip(hu, REPLACED_HU, most) - np.int16(REPLACED_HU), np.int16(0))
    volumes = (np.clip(soft, 0, None), excess, lungs * np.int16(SCALE))
    return Materials(*(np.ascontiguousarray(volume.transpose(1, 0, 2)) for volume in volumes))


def _streaks(hu: Volume3D, body: Mask, lungs: Mask, tissues: Tissues, spacing: Spacing) -> Mask:
    """Return the dark glare beside what is denser than bone."""
    kernel = ellipse(STREAK_MM, spacing[1:])
    found = np.zeros(hu.shape, bool)
    source = body & (hu > BOLUS_HU) & ~tissues.bone
    for k in np.flatnonzero(source.any(axis=(1, 2))):
        near = cv2.dilate(source[k].astype(np.uint8), kernel) > 0
        found[k] = near & body[k] & ~lungs[k] & (hu[k] < STREAK_HU)
    return found


def water_per_mm(kev: float) -> float:
    """Return the attenuation of water at an effective energy, per mm."""
    return _interpolate(kev, _WATER) / 10


def excess_per_mm(kev: float) -> float:
    """Return the attenuation per mm and unit of `Materials.excess` at an effective energy.

    The excess was measured at CT_KEV, relative to water; at another energy it changes as cortical bone less the soft
    tissue it displaces does.
    """
    return water_per_mm(CT_KEV) * _bone_less_soft(kev) / _bone_less_soft(CT_KEV)


def _bone_less_soft(kev: float) -> float:
    return BONE_DENSITY * _interpolate(kev, _BONE) - SOFT_DENSITY * _interpolate(kev, _WATER)


def _interpolate(kev: float, table: NDArray[np.float64]) -> float:
    """Return the table's value at an energy, linear in the logarithms."""
    return float(np.exp(np.interp(np.log(kev), np.log(_KEV), np.log(table))))
