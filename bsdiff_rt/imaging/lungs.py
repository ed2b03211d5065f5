"""Find the lung fields of a chest X-ray by simple image processing. Torch-free.

It is for judging results where the truth is right only inside the lungs. It is not a medical segmentation: it leaves
out lung behind the heart, lung below the diaphragm, and lung that is as white as the chest wall.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.errors import InputRefused

Image = NDArray[np.floating]
Mask = NDArray[np.bool_]

WORK_PX = 256  # longer side of the picture that is searched
SMOOTH_PX = 1.5
OPEN_PX = 7  # a dark region narrower than this, such as the trachea, is no part of a lung
QUANTILES = np.arange(0.04, 0.70, 0.02)  # grey levels that are tried as the lungs' border
CENTRE = (0.35, 0.65)  # of the width: where the spine may be
AREA = (0.02, 0.28)  # of the picture: smallest and largest lung
LEAST_CONTRAST = 0.02  # of the picture's grey levels (1 % to 99 %), between a lung and what surrounds it
ALIKE = 0.35  # a lung with less than this of the other lung's contrast is none
HEIGHT = (0.22, 0.9)  # of the picture
ACROSS = 0.10  # of the width: a lung's middle is farther than this from the sides
DOWN = (0.2, 0.75)  # of the height: where a lung's middle may be
BORDER_SHARE = 0.2  # of a lung's outline that may lie on the picture's border
STEP_PX = 4  # the border's contrast is measured this far inside and outside
CLOSE_SHARE = 0.08  # of the width: gaps left by ribs and vessels are closed
WIDEN_PX = 5  # the outline of most contrast lies inside the ribs' rim, which belongs to the lung fields
USUAL_AREA, SIZE_WEIGHT = 0.11, 0.8  # of two outlines with equal contrast, the larger one is taken up to this area


@dataclass(frozen=True)
class _Candidate:
    score: float
    contrast: float
    mask: NDArray[np.uint8]


def find_lungs(cxr: Image) -> Mask:
    """Return the lung fields.

    Args:
        cxr: [H, W], grey levels of any range, air dark; without uniform borders.

    Returns:
        [H, W] bool.

    Raises:
        InputRefused: two lungs were not found.
    """
    scale = WORK_PX / max(cxr.shape)
    size = (max(16, round(cxr.shape[1] * scale)), max(16, round(cxr.shape[0] * scale)))
    small = cv2.resize(cxr.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    low, high = np.percentile(small, [1, 99])
    smooth = np.asarray(cv2.GaussianBlur((small - low) / max(high - low, 1e-6), (0, 0), SMOOTH_PX), dtype=np.float32)
    middle = _find_midline(smooth)
    first, second = (_best_lung(smooth, side) for side in (slice(0, middle), slice(middle, None)))
    if first is None or second is None:
        raise InputRefused("two lungs were not found in the X-ray")
    weaker, stronger = sorted((first.contrast, second.contrast))
    if weaker < ALIKE * stronger:
        raise InputRefused("two lungs were not found in the X-ray: one side has much less contrast")
    widen = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * WIDEN_PX + 1, 2 * WIDEN_PX + 1))
    found = np.maximum(cv2.dilate(first.mask, widen), cv2.dilate(second.mask, widen))
    whole = cv2.resize(found.astype(np.float32), cxr.shape[::-1], interpolation=cv2.INTER_LINEAR)
    return np.asarray(whole > 0.5)


def _find_midline(smooth: NDArray[np.float32]) -> int:
    """Return the column of the spine: the brightest of the middle, by the mean of the picture's central rows."""
    height, width = smooth.shape
    columns = cv2.GaussianBlur(smooth[height // 5 : height * 4 // 5].mean(axis=0)[None], (0, 0), width / 40)[0]
    first, last = (round(width * share) for share in CENTRE)
    return int(first + np.argmax(columns[first:last]))


def _best_lung(smooth: NDArray[np.float32], side: slice) -> _Candidate | None:
    """Return the dark region of one side whose outline has the most contrast, among those shaped as a lung."""
    best: _Candidate | None = None
    half = np.zeros(smooth.shape, np.uint8)
    half[:, side] = 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (OPEN_PX, OPEN_PX))
    for level in np.quantile(smooth, QUANTILES):
        dark = cv2.morphologyEx((smooth < level).astype(np.uint8) * half, cv2.MORPH_OPEN, kernel)
        count, labels, statistics, centres = cv2.connectedComponentsWithStats(dark, connectivity=4)
        for part in range(1, count):
            if not _has_place_of_lung(statistics[part], centres[part], smooth.shape):
                continue
            candidate = _rate((labels == part).astype(np.uint8), smooth)
            if candidate is not None and (best is None or candidate.score > best.score):
                best = candidate
    return best


def _has_place_of_lung(statistics: NDArray[np.int32], centre: NDArray[np.float64], shape: tuple[int, ...]) -> bool:
    """Return whether size and place of a connected part are those of a lung."""
    area = statistics[cv2.CC_STAT_AREA] / (shape[0] * shape[1])
    tall = statistics[cv2.CC_STAT_HEIGHT] / shape[0]
    across, down = centre[0] / shape[1], centre[1] / shape[0]
    return bool(
        AREA[0] <= area <= AREA[1]
        and HEIGHT[0] <= tall <= HEIGHT[1]
        and min(across, 1 - across) >= ACROSS
        and DOWN[0] <= down <= DOWN[1]
    )


def _rate(part: NDArray[np.uint8], smooth: NDArray[np.float32]) -> _Candidate | None:
    """Return a region with its gaps closed and a score.

    None where its outline has no contrast, or much of it is the picture's border.
    """
    reach = max(3, round(CLOSE_SHARE * part.shape[1]))
    closing = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    padded = cv2.morphologyEx(np.pad(part, reach), cv2.MORPH_CLOSE, closing)[reach:-reach, reach:-reach]
    outlines, _ = cv2.findContours(padded, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    outline = max(outlines, key=len)
    mask = np.zeros_like(part)
    cv2.drawContours(mask, [outline], -1, 1, cv2.FILLED)
    points = outline[:, 0]
    edge = (points == 0) | (points == np.array(part.shape[::-1]) - 1)
    if edge.any(axis=1).mean() > BORDER_SHARE:
        return None
    hull = cv2.contourArea(cv2.convexHull(outline))
    solid = float(cv2.contourArea(outline)) / max(hull, 1.0)
    step = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * STEP_PX + 1, 2 * STEP_PX + 1))
    outside = (cv2.dilate(mask, step) > 0) & (mask == 0)
    inside = (mask > 0) & (cv2.erode(mask, step) == 0)
    contrast = float(smooth[outside].mean() - smooth[inside].mean())
    if contrast < LEAST_CONTRAST:
        return None
    size = min(1.0, float(mask.mean()) / USUAL_AREA) ** SIZE_WEIGHT
    return _Candidate(contrast * solid**2 * size, contrast, mask)
