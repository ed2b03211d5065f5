"""Write preview.png: one row for each image, with X-ray, soft tissue and bone side by side. Torch-free."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.files import write_atomically
from bsdiff_rt.folder.pictures import BONE_GAIN, DEVIATION_SHOWN, draw_bone, draw_deviation
from bsdiff_rt.folder.report import PREVIEW
from bsdiff_rt.imaging.network_input import place, resize

SIDE_PX = 320
ROWS = 40  # a larger picture would not open in many viewers
GAP_PX = 4
TITLE_PX = 28  # height of the line of column titles
NAME_PX = 20  # height of the line with an image's name, above its row
TITLES = ("X-ray", "Soft tissue", f"Bone, brightened {BONE_GAIN:g} times")
DEVIATION_TITLE = f"Deviation of samples, red: {DEVIATION_SHOWN:.0%} or more"

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_MARGIN_PX = 6


class Preview:
    """Collect the rows of a preview and write the picture."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, NDArray[np.uint8]]] = []

    def add(
        self,
        name: str,
        cxr: NDArray[np.float32],
        soft_tissue: NDArray[np.float32],
        deviation: NDArray[np.float32] | None = None,
    ) -> None:
        """Add one image; after ROWS images, nothing is added.

        Args:
            name: of the image, written above its row.
            cxr: [H, W], float32, in [0, 1].
            soft_tissue: the same; it may have another size.
            deviation: standard deviation of several samples, drawn in red over the soft tissue. All images of a preview
                have one, or none has.
        """
        if len(self._rows) >= ROWS:
            return
        xray, suppressed = _make_thumbnail(cxr), _make_thumbnail(soft_tissue)
        gap = np.ones((SIDE_PX, GAP_PX), np.float32)
        row = np.hstack([xray, gap, suppressed, gap, draw_bone(xray, suppressed)])
        if deviation is not None:
            overlay = draw_deviation(suppressed, _make_thumbnail(deviation))
            row = np.hstack([cv2.cvtColor(row, cv2.COLOR_GRAY2BGR), np.ones((SIDE_PX, GAP_PX, 3), np.float32), overlay])
        self._rows.append((name, np.rint(row * 255).astype(np.uint8)))

    def write(self, folder: Path) -> Path | None:
        """Write preview.png into `folder`.

        Returns:
            The path; None if no image was added.

        Raises:
            OSError: the file cannot be written.
        """
        if not self._rows:
            return None
        shape = self._rows[0][1].shape
        titles = np.full((TITLE_PX, *shape[1:]), 255, np.uint8)
        for column, title in enumerate((*TITLES, DEVIATION_TITLE) if len(shape) == 3 else TITLES):
            _draw_text(titles, title, column * (SIDE_PX + GAP_PX), SIDE_PX, 0.55)
        parts = [titles]
        for name, row in self._rows:
            line = np.full((NAME_PX, *shape[1:]), 255, np.uint8)
            _draw_text(line, name, 0, shape[1], 0.45)
            parts += [line, row]
        write_atomically(folder / PREVIEW, cv2.imencode(".png", np.vstack(parts))[1].tobytes())
        return folder / PREVIEW


def _draw_text(line: NDArray[np.uint8], text: str, left: int, width: int, scale: float) -> None:
    """Draw text into a white line of `line.shape[0]` rows, in black, from a column on; shorten it to `width` px.

    The font has ASCII characters only. Accents are dropped, and other characters become question marks.
    """
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    plain = shown = "".join(c if " " <= c <= "~" else "?" for c in plain)
    while cv2.getTextSize(shown, _FONT, scale, 1)[0][0] > width - 2 * _MARGIN_PX:
        plain = plain[1:]  # the end of a path says more than its beginning
        shown = f"...{plain}"
    baseline = line.shape[0] - _MARGIN_PX
    cv2.putText(line, shown, (left + _MARGIN_PX, baseline), _FONT, scale, (0, 0, 0), 1, cv2.LINE_AA)


def _make_thumbnail(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return `image` in the middle of a black square of SIDE_PX, with its aspect ratio kept."""
    at = place(image.shape, SIDE_PX)
    square = np.zeros((SIDE_PX, SIDE_PX), np.float32)
    small = resize(image, (at.height, at.width))
    square[at.top : at.top + at.height, at.left : at.left + at.width] = np.clip(small, 0, 1)
    return square
