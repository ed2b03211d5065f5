"""Draw all pairs of a data set as one picture, to look at before training."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.imaging.network_input import resize

logger = logging.getLogger(__name__)

Image = NDArray[np.float32]

CELL_PX, TEXT_PX, GAP_PX = 192, 18, 6
COLUMNS = 3  # pairs beside each other
PAIRS = 300  # more would make a picture no viewer opens
DIFFERENCE_GAIN = 3.0
_USED, _BAD = (230, 230, 230), (80, 80, 255)  # BGR


@dataclass(frozen=True)
class Row:
    """One pair of the sheet. Both images are reduced at once, so that large data sets fit into memory.

    Attributes:
        name: of the pair.
        used: whether it is in the data set.
        registration: its entry in dataset.json.
        cxr: X-ray, [S, S] float32 in [0, 1].
        soft_tissue: soft-tissue image, as `cxr`.
    """

    name: str
    used: bool
    registration: dict[str, Any]
    cxr: Image
    soft_tissue: Image

    def __post_init__(self) -> None:
        """Reduce both images to the size they are shown at."""
        for role in ("cxr", "soft_tissue"):
            object.__setattr__(self, role, resize(getattr(self, role), (CELL_PX, CELL_PX)))


def contact_sheet(rows: list[Row]) -> bytes:
    """Return the sheet as a PNG file. Bad pairs come first, in red; then the lowest correlation first."""
    ordered = sorted(rows, key=lambda row: (row.used, row.registration["correlation_after"]))
    if len(ordered) > PAIRS:
        logger.warning("the contact sheet shows the worst %d of %d pairs", PAIRS, len(ordered))
    strips = [_strip(row) for row in ordered[:PAIRS]]
    strips += [np.zeros_like(strips[0])] * (-len(strips) % min(COLUMNS, len(strips)))
    columns = min(COLUMNS, len(strips))
    lines = [np.hstack(strips[i : i + columns]) for i in range(0, len(strips), columns)]
    return cv2.imencode(".png", np.vstack(lines))[1].tobytes()


def _strip(row: Row) -> NDArray[np.uint8]:
    """Return one pair with its line of text: [CELL_PX + TEXT_PX + GAP_PX, 3 CELL_PX + GAP_PX, 3] uint8.

    The third picture is the difference, with its median at mid-grey. What moved shows as a bright and a dark edge side
    by side. Bone shows as bright only.
    """
    difference = row.cxr - row.soft_tissue
    shown = 0.5 + DIFFERENCE_GAIN * (difference - np.median(difference))
    grey = np.hstack([row.cxr, row.soft_tissue, shown])
    strip = np.zeros((CELL_PX + TEXT_PX + GAP_PX, 3 * CELL_PX + GAP_PX, 3), np.uint8)
    strip[TEXT_PX : TEXT_PX + CELL_PX, : 3 * CELL_PX] = np.rint(np.clip(grey, 0, 1) * 255)[..., None]
    r = row.registration
    pixels = f"{r['displacement_px']:.1f} px"
    moved = f"moved by {pixels}" if r["applied"] else f"not moved ({pixels})"
    text = f"edges {r['correlation_before']:.2f} > {r['correlation_after']:.2f}, {moved}"
    text = f"{'' if row.used else 'BAD '}{text}  {row.name}"
    style = (cv2.FONT_HERSHEY_SIMPLEX, 0.42, _USED if row.used else _BAD, 1, cv2.LINE_AA)
    cv2.putText(strip, text.encode("ascii", "replace").decode(), (4, TEXT_PX - 5), *style)
    return strip
