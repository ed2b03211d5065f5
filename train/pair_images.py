"""Read the two images of a pair onto one matrix and grey scale, and check that they can be X-ray and soft tissue."""

from __future__ import annotations

import logging
from pathlib import Path

import cv2
import numpy as np

from bsdiff_rt.errors import InputRefused
from bsdiff_rt.formats import read_together
from bsdiff_rt.imaging.network_input import resize
from train.registration import Image, reduce_image

logger = logging.getLogger(__name__)

SAME_IMAGE = 1e-4  # largest difference of grey levels in [0, 1]: less than one of 14 bits is rounding
ASPECT_TOLERANCE = 1.02  # ratio of aspect ratios up to which two pictures show the same field
# Mean of a soft-tissue image over that of its X-ray: outside, one of them was probably scaled by another depth.
SAME_SCALE = (0.5, 1.4)
# What `_bright_lines` says of the X-ray less what it says of the soft tissue. Three real pairs: 0.58 to 1.06; with the
# soft tissue toned by powers of 0.5 to 2, 0.43 to 1.5; with the bones at 0.3 of their strength besides, 0.44 to 1.4.
# Sixty phantoms: 1.3 and more. Only an X-ray toned by a power of 0.5 whose bones are that weak gives as little as -0.8.
SWAPPED = -0.4


def read_pair(cxr_path: Path, soft_tissue_path: Path) -> tuple[Image, Image]:
    """Read both images of a pair as inference reads them, at the X-ray's matrix.

    Returns:
        X-ray and soft-tissue image, [H, W] float32 in [0, 1].

    Raises:
        InputRefused: a file is no radiograph, or the two differ in aspect ratio.
        InputFailed: a file cannot be read.
    """
    cxr, soft_tissue = (picture.cxr for picture in read_together([cxr_path, soft_tissue_path]))
    if not SAME_SCALE[0] < soft_tissue.mean() / cxr.mean() < SAME_SCALE[1]:
        logger.warning(
            "%s: its soft-tissue image is %.2f times as bright on average. Check that both have one grey scale "
            "(docs/training.md).",
            cxr_path.name,
            soft_tissue.mean() / cxr.mean(),
        )
    ratios = [image.shape[0] / image.shape[1] for image in (cxr, soft_tissue)]
    if max(ratios) / min(ratios) > ASPECT_TOLERANCE:
        shapes = " and ".join(f"{image.shape[0]} x {image.shape[1]} px" for image in (cxr, soft_tissue))
        raise InputRefused(f"X-ray and soft tissue differ in aspect ratio: {shapes}")
    return cxr, np.clip(resize(soft_tissue, cxr.shape), 0, 1)


def explain_same_image(cxr: Image, soft_tissue: Image) -> str | None:
    """Return the reason for refusal if both images are the same, else None.

    Args:
        cxr: [H, W] in [0, 1].
        soft_tissue: as `cxr`.
    """
    return "X-ray and soft tissue are the same image" if np.abs(cxr - soft_tissue).max() < SAME_IMAGE else None


def explain_swap(cxr: Image, soft_tissue: Image) -> str | None:
    """Return the reason for refusal if the soft-tissue image shows the bones and the X-ray does not, else None.

    Args:
        cxr: [H, W] float32 in [0, 1].
        soft_tissue: as `cxr`, registered.
    """
    lines = _bright_lines(reduce_image(cxr), reduce_image(soft_tissue)) - _bright_lines(
        reduce_image(soft_tissue), reduce_image(cxr)
    )
    return "the soft tissue shows the bones, not the X-ray: are they swapped?" if lines < SWAPPED else None


def _bright_lines(image: Image, other: Image) -> float:
    """Return the skewness of the fine detail that is in `image` only. Ribs are bright, narrow and sharp.

    The other image's grey levels are first fitted by a cubic, because a different tone is no bone.
    """
    tone = np.polynomial.Polynomial.fit(other.ravel(), image.ravel(), 3)
    alone = image - tone(other).astype(np.float32)
    fine = alone - cv2.GaussianBlur(alone, (0, 0), max(alone.shape) / 16)
    fine = fine.astype(np.float64) - float(fine.mean())
    return float(np.mean(fine**3)) / max(float(np.mean(fine**2)) ** 1.5, 1e-30)
