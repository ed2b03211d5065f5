"""Grey levels at which a chest X-ray is displayed well. Torch-free."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]

# Where both lungs are in a frontal chest, of the rows and of the columns.
LUNG_ROWS, LUNG_COLUMNS = (0.2, 0.65), ((0.18, 0.4), (0.6, 0.82))
LUNG_SHARES = (0.02, 0.98)  # of the pixels there; the rest is border, text or beside the lungs
LUNG_MARGIN = 0.1  # of the lungs' span, below and above
FAINT = 0.4  # of the full range: a picture whose grey levels span less looks faint
FAINT_SHARES = (0.01, 0.99)  # of the pixels


def find_lung_levels(picture: Image) -> tuple[float, float]:
    """Find the grey levels to display as black and white to see the lungs well.

    Args:
        picture: a frontal chest, [H, W], float32, in [0, 1].

    Returns:
        Black and white level, in [0, 1]; black is below white unless the picture is flat.
    """
    rows, columns = picture.shape
    top, bottom = (round(share * rows) for share in LUNG_ROWS)
    lungs = [picture[top:bottom, round(left * columns) : round(right * columns)] for left, right in LUNG_COLUMNS]
    low, high = np.quantile(np.concatenate(lungs, axis=1), LUNG_SHARES)
    margin = LUNG_MARGIN * (high - low)
    return float(np.clip(low - margin, 0, 1)), float(np.clip(high + margin, 0, 1))


def is_faint(picture: Image) -> bool:
    """Return whether the grey levels of a picture, [H, W] in [0, 1], span so little that it looks faint."""
    low, high = np.quantile(picture, FAINT_SHARES)
    return bool(high - low < FAINT)
