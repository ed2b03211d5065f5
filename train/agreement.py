"""Find what a dual-energy pair's bone image holds besides bone: structures of the soft tissue, from two causes.

The two exposures of a pair are a moment apart, and heart, vessels and diaphragm move in between. The scanner also
weakens fine contrast when it subtracts them. Both leave soft tissue in the difference of X-ray and truth, and a model
trained on it takes vessels and nodules away with the bone. In the lungs of the pairs of one scanner, this was a sixth
to two fifths of the difference's energy.

The soft-tissue image shows these structures. In each band of sizes and around each place the difference is fitted by
the image itself (weakened contrast) and its two derivatives (movement). Bones are not correlated with either.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]

BANDS_PX = ((0.0, 1.2), (1.2, 2.5), (2.5, 5.0), (5.0, 10.0))  # of an image of REFERENCE_PX; Gaussian sigmas
REFERENCE_PX = 384
NEIGHBOURHOOD_PX = 28.0  # sigma of the surroundings that share one fit: wide, or ribs would be fitted by vessels beside
LARGEST_LOSS = 0.8  # of contrast, as a multiple of what the soft-tissue image still shows
FARTHEST_PX = 2.0  # movement between the exposures
RIDGE = 0.05  # of each feature's own energy: where there is little to fit, little is fitted
NOISE = 0.5 / 255  # grey levels below which a feature says nothing
FILL_PX = (64.0, 16.0, 4.0)  # sigmas of the surroundings that fill what is marked
LEAST_AROUND = 0.01  # share of unmarked surroundings below which wider ones are taken
BONE_EDGE = 4.0  # times the median energy: a strong bone edge counts less, by this


def explain_by_soft_tissue(bone: Image, soft_tissue: Image) -> Image:
    """Return the part of a bone image that is soft tissue which moved or lost contrast.

    Args:
        bone: [S, S] float32, X-ray minus soft tissue, grey levels of [0, 1].
        soft_tissue: [S, S] float32 in [0, 1], of the same tone as the X-ray.

    Returns:
        [S, S] float32. `bone` minus it is the better bone image, `soft_tissue` plus it the better truth.
    """
    scale = bone.shape[0] / REFERENCE_PX
    total = np.zeros_like(bone)
    for fine, coarse in BANDS_PX:
        low, high = fine * scale, coarse * scale
        wanted = _blur(bone, low) - _blur(bone, high)
        smooth = _blur(soft_tissue, max(low, 0.7 * scale))
        slopes = (
            np.asarray(cv2.Sobel(smooth, cv2.CV_32F, *axis, scale=1 / 8), np.float32) for axis in ((1, 0), (0, 1))
        )
        features = [_blur(soft_tissue, low) - _blur(soft_tissue, high)]
        features += [slope - _blur(slope, 2 * high) for slope in slopes]
        limits = ((0.0, LARGEST_LOSS), *((-FARTHEST_PX * scale, FARTHEST_PX * scale),) * 2)
        energy = _blur(wanted * wanted, 3 * scale)
        weight = np.asarray(1 / (1 + energy / (BONE_EDGE * np.median(np.square(wanted)) + NOISE**2)), np.float32)
        for share, feature, limit in zip(
            _fit_locally(wanted, features, weight, NEIGHBOURHOOD_PX * scale), features, limits, strict=True
        ):
            total += np.clip(share, *limit) * feature
    return total


def restore_kept(bone: Image, keep: NDArray[np.bool_]) -> Image:
    """Return a bone image without what is marked as no bone, such as a lead: there it continues its surroundings.

    Args:
        bone: [S, S] float32.
        keep: [S, S], what is no bone.
    """
    around = np.asarray(~keep, np.float32)
    filled = np.zeros_like(bone)
    for sigma in FILL_PX:  # from the widest, which reaches the middle of any mask
        weight = _blur(around, sigma * bone.shape[0] / REFERENCE_PX)
        mean = _blur(bone * around, sigma * bone.shape[0] / REFERENCE_PX) / np.maximum(weight, LEAST_AROUND)
        filled = np.where(weight > LEAST_AROUND, mean, filled)
    return np.where(keep, filled, bone)


def _blur(image: Image, sigma: float) -> Image:
    return image if sigma == 0 else np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), np.float32)


def _fit_locally(wanted: Image, features: list[Image], weight: Image, sigma: float) -> NDArray[np.float32]:
    """Return the coefficients of a weighted least-squares fit around each pixel, [features, S, S]."""
    count = len(features)
    matrix = np.empty((*wanted.shape, count, count), np.float32)
    vector = np.empty((*wanted.shape, count, 1), np.float32)
    for i, one in enumerate(features):
        vector[..., i, 0] = _blur(weight * one * wanted, sigma)
        for j, other in enumerate(features):
            matrix[..., i, j] = _blur(weight * one * other, sigma)
        matrix[..., i, i] = matrix[..., i, i] * (1 + RIDGE) + NOISE**2
    return np.moveaxis(np.linalg.solve(matrix, vector)[..., 0], -1, 0).astype(np.float32)
