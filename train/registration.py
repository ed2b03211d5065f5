"""Register a soft-tissue image to its X-ray and measure how well they match, with OpenCV's ECC (Evangelidis 2008).

The two exposures are a fraction of a second apart, so the motion is mostly rotation and shift of the whole patient. It
is estimated coarse to fine on grey values and finished on edges, which are more precise. Outlines of lung, heart and
diaphragm are in both images, whatever their tones.

Tested at 256 px: shifts up to 20 px and rotations up to 3 degrees of real pairs are recovered within 0.3 px at the
corners. Ribs, which are in one image only, pull the estimate by up to 0.6 px. A breathing diaphragm does the same and
would shift the vessels of the lungs. So a motion below MIN_MOVE_PX is ignored.
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
        correlation_before: of the edges of both images as they are, in [-1, 1].
        correlation_after: of the edges after registration, where the images overlap, in [-1, 1].
        displacement: largest displacement of an image corner, as a share of the longer side.
        rotation_deg: clockwise on the screen.
    """

    matrix: Matrix
    correlation_before: float
    correlation_after: float
    displacement: float
    rotation_deg: float

    @property
    def negligible(self) -> bool:
        """Return whether the motion is within the error of the estimate."""
        return self.displacement * REGISTRATION_PX < MIN_MOVE_PX


def register(cxr: Image, soft_tissue: Image) -> Registration:
    """Estimate the motion between two images of one size, [H, W] float32 in [0, 1].

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
    """Return the registration of two images of one size as they are, without motion."""
    as_it_lies = _correlation(
        find_edges(reduce_image(cxr)), find_edges(reduce_image(soft_tissue)), np.eye(2, 3, dtype=np.float32)
    )
    return Registration(np.eye(2, 3), as_it_lies, as_it_lies, 0.0, 0.0)


def apply_motion(soft_tissue: Image, matrix: Matrix) -> Image:
    """Return the soft-tissue image in the X-ray's coordinates, [H, W] float32 in [0, 1]. Bicubic, edges repeated."""
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(soft_tissue, matrix, soft_tissue.shape[::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(np.clip(moved, 0, 1), dtype=np.float32)


def measure_displacement(matrix: Matrix, shape: tuple[int, ...]) -> float:
    """Return the largest displacement of a corner of an image of `shape`, as a share of its longer side."""
    rows, columns = shape
    corners = np.array([[x, y, 1.0] for x in (0, columns - 1) for y in (0, rows - 1)])
    moves = corners @ matrix.T - corners[:, :2]
    return float(np.linalg.norm(moves, axis=1).max()) / max(shape)


def find_edges(image: Image) -> Image:
    """Return the gradient magnitude of the smoothed image, [H, W] float32."""
    smooth = _smooth(image)
    steep: Image = np.hypot(cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1))
    return steep


def _ecc(fixed: Image, moving: Image, warp: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    """Improve `warp`, in px at scale 1, on images at `scale`."""
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
    """Return the image with its longer side at REGISTRATION_PX."""
    placement = place(image.shape, REGISTRATION_PX)
    return resize(image, (placement.height, placement.width))


def _smooth(image: Image) -> Image:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), _SMOOTH_PX), dtype=np.float32)


def _scaling(shape: tuple[int, ...], source: tuple[int, ...]) -> Matrix:
    """Return [3, 3]: from pixel coordinates (x, y) in an image of `shape` to those in `source`, centre to centre."""
    y, x = (ours / theirs for ours, theirs in zip(source, shape, strict=True))
    return np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]])
