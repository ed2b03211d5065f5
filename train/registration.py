"""Lay a soft-tissue image over its X-ray, and say how well it lies: ECC (Evangelidis and Psarakis 2008) by OpenCV.

The two exposures of a dual-energy pair are a fraction of a second apart; what moves between them is mostly the patient
as a whole, so the motion is rotation and shift. It is estimated coarse to fine on grey values, which pulls from far
away, and finished on edges, which tell better: edges of ribs are in one image alone, but the outlines of lung, heart
and diaphragm are in both, whatever their tones.

Limits, tried at 256 px: shifts up to 20 px and turns up to 3 degrees of real pairs came back within 0.3 px at the
corners. What is left pulls the estimate: the ribs, which are in one image alone, by up to 0.6 px in phantoms, whose
images lie exactly on each other; in one real pair the diaphragm, which had moved with the breath, by 0.6 px, and
following it laid the vessels of the lungs off each other. So a motion below MIN_MOVE_PX is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.errors import InputFailed
from bsdiff_rt.imaging.network_input import place, resize

Image = NDArray[np.float32]
Matrix = NDArray[np.float64]

REGISTRATION_PX = 256  # longer side at which the motion is estimated
COARSE_SCALES = (0.25, 0.5, 1.0)
MIN_MOVE_PX = 1.0  # at REGISTRATION_PX
# Edges of three real pairs correlate with 0.71 to 0.82 as they lie or after a simulated motion; those of pairs made up
# of two patients, or with one image mirrored, with 0.20 to 0.41 after registration; drawn phantoms' with 0.44 to 0.92.
MIN_CORRELATION = 0.5

_SMOOTH_PX = 1.0
_ECC_WINDOW_PX = 3
_STOP = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 300, 1e-7)


@dataclass(frozen=True)
class Registration:
    """How a soft-tissue image lies on its X-ray.

    Attributes:
        matrix: [2, 3] float64, from X-ray to soft-tissue pixel coordinates (x, y), both at the sources' matrix.
        correlation_before, correlation_after: of the edges of both images where they overlap, in [-1, 1].
        displacement: farthest that `matrix` moves a corner of the picture, as a share of its longer side.
        rotation_deg: clockwise on the screen.
    """

    matrix: Matrix
    correlation_before: float
    correlation_after: float
    displacement: float
    rotation_deg: float

    @property
    def negligible(self) -> bool:
        """Whether the motion is too small to be told from none."""
        return self.displacement * REGISTRATION_PX < MIN_MOVE_PX


def register(cxr: Image, soft_tissue: Image) -> Registration:
    """Find the motion between two images of one size, [H, W] float32 in [0, 1].

    Raises:
        InputFailed: the estimate does not converge.
    """
    fixed, moving = reduce_image(cxr), reduce_image(soft_tissue)
    warp = np.eye(2, 3, dtype=np.float32)
    try:
        for scale in COARSE_SCALES:
            size = tuple(max(1, round(side * scale)) for side in fixed.shape)
            warp = _ecc(_smooth(resize(fixed, size)), _smooth(resize(moving, size)), warp, scale)
        warp = _ecc(find_edges(fixed), find_edges(moving), warp, 1.0)
    except cv2.error:
        raise InputFailed("X-ray and soft tissue cannot be registered: the estimate does not converge") from None
    found = np.vstack([warp.astype(np.float64), [0.0, 0.0, 1.0]])
    to_source = _scaling(fixed.shape, cxr.shape)
    matrix = (to_source @ found @ np.linalg.inv(to_source))[:2]
    return Registration(
        matrix,
        measure_unregistered(cxr, soft_tissue).correlation_before,
        _correlation(find_edges(fixed), find_edges(moving), warp),
        measure_displacement(matrix, cxr.shape),
        float(np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0]))),
    )


def measure_unregistered(cxr: Image, soft_tissue: Image) -> Registration:
    """Two images of one size as they lie."""
    as_it_lies = _correlation(
        find_edges(reduce_image(cxr)), find_edges(reduce_image(soft_tissue)), np.eye(2, 3, dtype=np.float32)
    )
    return Registration(np.eye(2, 3), as_it_lies, as_it_lies, 0.0, 0.0)


def apply_motion(soft_tissue: Image, matrix: Matrix) -> Image:
    """The soft-tissue image as seen from its X-ray, [H, W] float32 in [0, 1] (bicubic; what lies outside repeats)."""
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(soft_tissue, matrix, soft_tissue.shape[::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(np.clip(moved, 0, 1), dtype=np.float32)


def measure_displacement(matrix: Matrix, shape: tuple[int, ...]) -> float:
    """Farthest that `matrix` moves a corner of a picture of `shape`, as a share of its longer side."""
    rows, columns = shape
    corners = np.array([[x, y, 1.0] for x in (0, columns - 1) for y in (0, rows - 1)])
    moves = corners @ matrix.T - corners[:, :2]
    return float(np.linalg.norm(moves, axis=1).max()) / max(shape)


def find_edges(image: Image) -> Image:
    """Steepness of the smoothed image: [H, W] float32, not negative."""
    smooth = _smooth(image)
    steep: Image = np.hypot(cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1))
    return steep


def _ecc(fixed: Image, moving: Image, warp: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    """`warp`, in px at scale 1, improved on images at `scale`."""
    # OpenCV maps pixel centres, which lie at (i + 1/2) * scale - 1/2 of the other scale.
    to_scale = np.array([[scale, 0, (scale - 1) / 2], [0, scale, (scale - 1) / 2], [0, 0, 1]])
    square = np.vstack([warp, [0.0, 0.0, 1.0]])
    start = (to_scale @ square @ np.linalg.inv(to_scale))[:2].astype(np.float32)
    everywhere = np.full(fixed.shape, 255, np.uint8)
    _, found = cv2.findTransformECC(fixed, moving, start, cv2.MOTION_EUCLIDEAN, _STOP, everywhere, _ECC_WINDOW_PX)
    improved = np.linalg.inv(to_scale) @ np.vstack([found, [0.0, 0.0, 1.0]]) @ to_scale
    return np.asarray(improved[:2], dtype=np.float32)


def _correlation(fixed: Image, moving: Image, warp: NDArray[np.float32]) -> float:
    size, flags = fixed.shape[::-1], cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    inside = cv2.warpAffine(np.ones_like(moving), warp, size, flags=flags) > 0.999
    seen = cv2.warpAffine(moving, warp, size, flags=flags)
    if not inside.any() or min(fixed[inside].std(), seen[inside].std()) == 0:
        return 0.0  # nothing in common, or no edges
    return float(np.corrcoef(fixed[inside], seen[inside])[0, 1])


def reduce_image(image: Image) -> Image:
    """The image with its longer side at REGISTRATION_PX."""
    placement = place(image.shape, REGISTRATION_PX)
    return resize(image, (placement.height, placement.width))


def _smooth(image: Image) -> Image:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), _SMOOTH_PX), dtype=np.float32)


def _scaling(shape: tuple[int, ...], source: tuple[int, ...]) -> Matrix:
    """[3, 3]: pixel coordinates (x, y) in a picture of `shape` to those in `source`; centres to centres."""
    y, x = (ours / theirs for ours, theirs in zip(source, shape, strict=True))
    return np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]])
