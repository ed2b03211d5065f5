"""One picture of a run, one row per image: X-ray | soft tissue | bone, and where samples deviate. Torch-free."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.files import write_atomically
from bsdiff_rt.imaging.network_input import place, resize

FILE_NAME = "preview.png"
SIDE_PX = 320
ROWS = 40  # more would make a picture no viewer opens
BONE_GAIN = 2.0
DEVIATION_SHOWN = 0.05  # a standard deviation of this share of the grey levels, or more, is shown in full red
GAP_PX = 4


class Preview:
    """Collects rows and writes the picture."""

    def __init__(self) -> None:
        self._rows: list[NDArray[np.uint8]] = []

    def add(
        self,
        cxr: NDArray[np.float32],
        soft_tissue: NDArray[np.float32],
        deviation: NDArray[np.float32] | None = None,
    ) -> None:
        """Add one image, all [H, W] float32 in [0, 1], of any sizes; nothing is added after ROWS rows.

        `deviation`, the standard deviation of several samples, is laid over the soft tissue in red.
        """
        if len(self._rows) >= ROWS:
            return
        shown, suppressed = _thumbnail(cxr), _thumbnail(soft_tissue)
        # Black where nothing was taken away, as on a dual-energy bone image.
        bone = np.clip((shown - suppressed) * BONE_GAIN, 0, 1)
        gap = np.ones((SIDE_PX, GAP_PX), np.float32)
        row = np.hstack([shown, gap, suppressed, gap, bone])
        if deviation is not None:
            red = np.clip(_thumbnail(deviation) / DEVIATION_SHOWN, 0, 1)[..., None]
            overlay = suppressed[..., None] * (1 - red) + red * np.array([0, 0, 1], np.float32)  # blue, green, red
            row = np.hstack([cv2.cvtColor(row, cv2.COLOR_GRAY2BGR), np.ones((SIDE_PX, GAP_PX, 3), np.float32), overlay])
        self._rows.append(np.rint(row * 255).astype(np.uint8))

    def write(self, folder: Path) -> Path | None:
        """Write preview.png into `folder`; None when no image was added."""
        if not self._rows:
            return None
        gap = np.full((GAP_PX, *self._rows[0].shape[1:]), 255, np.uint8)
        picture = np.vstack([part for row in self._rows for part in (row, gap)][:-1])
        write_atomically(folder / FILE_NAME, cv2.imencode(".png", picture)[1].tobytes())
        return folder / FILE_NAME


def _thumbnail(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """`image` in the middle of a black square of SIDE_PX, aspect ratio kept."""
    at = place(image.shape, SIDE_PX)
    square = np.zeros((SIDE_PX, SIDE_PX), np.float32)
    small = resize(image, (at.height, at.width))
    square[at.top : at.top + at.height, at.left : at.left + at.width] = np.clip(small, 0, 1)
    return square
