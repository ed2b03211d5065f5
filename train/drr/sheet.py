"""A picture of a pool to look at before training: X-ray, soft-tissue image and bone of some pairs."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

CELL_PX, TEXT_PX, COLUMNS = 224, 18, 3


def contact_sheet(folder: Path, names: list[str], most: int) -> bytes:
    """Return a PNG of at most `most` pairs, spread evenly over `names`: X-ray, soft tissue and their difference."""
    chosen = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, min(most, len(names))).astype(int))]
    strips = []
    for name in chosen:
        cxr, soft = (_read_cell(folder / f"{name}_{role}.png") for role in ("cxr", "soft_tissue"))
        grey = np.rint(np.clip(np.hstack([cxr, soft, 2 * (cxr - soft)]), 0, 1) * 255).astype(np.uint8)
        title = np.zeros((TEXT_PX, grey.shape[1]), np.uint8)
        text = name.encode("ascii", "replace").decode()
        cv2.putText(title, text, (4, TEXT_PX - 5), cv2.FONT_HERSHEY_SIMPLEX, 0.42, 230, 1, cv2.LINE_AA)
        strips.append(np.vstack([title, grey]))
    columns = min(COLUMNS, len(strips))
    strips += [np.zeros_like(strips[0])] * (-len(strips) % columns)
    sheet = np.vstack([np.hstack(strips[i : i + columns]) for i in range(0, len(strips), columns)])
    return cv2.imencode(".png", sheet)[1].tobytes()


def _read_cell(path: Path) -> NDArray[np.float32]:
    """Return an image at the sheet's size; black where the file was removed or damaged."""
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if image is None:
        return np.zeros((CELL_PX, CELL_PX), np.float32)
    small = cv2.resize(image.astype(np.float32) / 65535, (CELL_PX, CELL_PX), interpolation=cv2.INTER_AREA)
    return np.asarray(small, dtype=np.float32)
