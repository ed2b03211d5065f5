"""Draw the probe's result: an X-ray on which the places that would lose a small nodule are red. Torch-free."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.imaging.network_input import resize
from bsdiff_rt.imaging.probe import NODULE_MM, Retention

LONGEST_PX = 1024
LINE_PX = 28  # height of the line of text above the picture
NOTHING_LOST, ALL_RED = 0.95, 0.5  # share of a nodule that is kept without colour, and in full red or below
FONT_SIZES = (0.5, 0.4, 0.3, 0.2)
STRENGTH = 0.7  # of full red: the X-ray stays visible below it
NO_PLACE = "No nodule fits: every place is air or nearly white."

_RED = np.array([0, 0, 1], np.float32)  # blue, green, red
_FONT, _MARGIN_PX, _RING_PX = cv2.FONT_HERSHEY_SIMPLEX, 6, 14


def draw_retention(cxr: NDArray[np.float32], retention: Retention | None) -> bytes:
    """Return a PNG of an X-ray with the shares kept in colour, and a ring around the worst place.

    Args:
        cxr: [H, W], float32, in [0, 1].
        retention: the probe's result; None if there was no place for a nodule.
    """
    rows, columns = cxr.shape
    scale = min(1.0, LONGEST_PX / max(rows, columns))
    shape = (max(1, round(rows * scale)), max(1, round(columns * scale)))
    grey = np.clip(resize(cxr, shape), 0, 1)
    if retention is None:
        return _encode(np.repeat(grey[..., None], 3, axis=2), NO_PLACE)
    kept = cv2.resize(retention.map, shape[::-1], interpolation=cv2.INTER_NEAREST)
    red = STRENGTH * np.clip((NOTHING_LOST - np.nan_to_num(kept, nan=1.0)) / (NOTHING_LOST - ALL_RED), 0, 1)
    picture = grey[..., None] * (1 - red[..., None]) + red[..., None] * _RED
    row, column, share = retention.worst
    centre = (int(column * scale), int(row * scale))
    cv2.circle(picture, centre, max(3, _RING_PX * max(shape) // LONGEST_PX), (0, 1, 1), 2, cv2.LINE_AA)
    text = (
        f"{NODULE_MM:g} mm nodules keep {retention.mean:.0%}; 5% of them keep {retention.percentile_5:.0%} or less; "
        f"ring: {share:.0%}. Full red: {ALL_RED:.0%} or less."
    )
    return _encode(picture, text)


def _encode(picture: NDArray[np.float32], text: str) -> bytes:
    """Return a PNG of a picture, [H, W, 3], below a white line with `text`."""
    width = picture.shape[1]
    line = np.full((LINE_PX, width, 3), 255, np.uint8)
    size = FONT_SIZES[0]
    for size in FONT_SIZES:
        if cv2.getTextSize(text, _FONT, size, 1)[0][0] <= width - 2 * _MARGIN_PX:
            break
    cv2.putText(line, text, (_MARGIN_PX, LINE_PX - 9), _FONT, size, (0, 0, 0), 1, cv2.LINE_AA)
    pixels = np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    encoded: bytes = cv2.imencode(".png", np.vstack([line, pixels]))[1].tobytes()
    return encoded
