"""What of an X-ray the networks are given: no uniform borders, and its grey levels spread where they span little.

A frame around the picture (a collimator's, a padded export's) is nothing that networks trained on chests know: a white
one of 8 % took the demo model on phantoms from BSR 0.94 to 0.48. Neither do they know a picture in a third of the grey
scale (0.94 to 0.72). Both are undone in the result. Torch-free.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]

UNIFORM = 4 / 255  # largest deviation within a border, of the picture's range: JPEG leaves some around what is drawn
LEAST_BORDER = 0.01  # of the side; below, the networks do not notice it
MOST_BORDER = 0.5  # of the side, both borders together; above, something else is wrong
LEAST_PX = 32  # side of what is left, as small as an X-ray may be

SPAN_SHARES = (0.01, 0.99)  # of the pixels, between whose grey levels the span is measured
SPREAD_TO = 0.88  # span that networks see most: of phantoms 0.75 to 0.9, of the demo model's scanner 0.94


@dataclass(frozen=True)
class View:
    """Part of a picture [H, W] in [0, 1], and a linear change of its grey levels that stays in [0, 1].

    Attributes:
        top, bottom: first row, and the one behind the last.
        left, right: first column, and the one behind the last.
        gain, offset: the networks see `gain * grey + offset`.
    """

    top: int
    bottom: int
    left: int
    right: int
    gain: float = 1.0
    offset: float = 0.0

    def of(self, cxr: Image) -> Image:
        """What the networks are shown of a picture: [bottom - top, right - left] float32 in [0, 1]."""
        return self._spread(cxr[self.top : self.bottom, self.left : self.right])

    def back(self, made: Image, cxr: Image) -> Image:
        """What was made of the view, `made`, in the place of it in `cxr`, [H, W], whose borders stay."""
        inside = np.clip((made - np.float32(self.offset)) / np.float32(self.gain), 0, 1)
        return self._in_place(inside, cxr.copy())

    def deviation_back(self, made: Image, shape: tuple[int, ...]) -> Image:
        """A deviation of what was made of the view in the place of it; borders deviate by nothing."""
        return self._in_place(made / np.float32(self.gain), np.zeros(shape, np.float32))

    def told(self, shape: tuple[int, ...]) -> dict[str, float] | None:
        """What the report says of it; None where it is all of a picture of that shape as it is."""
        return None if self == whole(shape) else asdict(self)

    def _spread(self, picture: Image) -> Image:
        if self.gain == 1.0 and self.offset == 0.0:
            return picture
        spread: Image = np.clip(picture * np.float32(self.gain) + np.float32(self.offset), 0, 1)
        return spread

    def _in_place(self, inside: Image, around: Image) -> Image:
        around[self.top : self.bottom, self.left : self.right] = inside
        return around


def whole(shape: tuple[int, ...]) -> View:
    """All of a picture of that shape, as it is."""
    return View(0, shape[0], 0, shape[1])


def view_of(cxr: Image, *, trim: bool, least_span: float) -> View:
    """What the networks should be shown of a picture.

    Args:
        cxr: [H, W] float32 in [0, 1].
        trim: leave out borders of one grey level.
        least_span: a picture of which the grey levels span less is spread to `SPREAD_TO`, as far as its darkest and
            brightest pixel allow; 0 for never.
    """
    view = _trimmed(cxr) if trim else whole(cxr.shape)
    picture = view.of(cxr)
    low, high = (float(level) for level in np.quantile(picture[::2, ::2], SPAN_SHARES))
    if high - low >= least_span:
        return view
    darkest, brightest = float(picture.min()), float(picture.max())
    gain = min(SPREAD_TO / max(high - low, 1e-6), 1 / max(brightest - darkest, 1e-6))
    offset = min(max(0.5 - gain * (low + high) / 2, -gain * darkest), 1 - gain * brightest)
    return View(view.top, view.bottom, view.left, view.right, gain, offset)


def _trimmed(cxr: Image) -> View:
    rows, columns = cxr.shape
    tolerance = UNIFORM * float(np.ptp(cxr))
    top, bottom = _borders(cxr, tolerance)
    left, right = _borders(cxr[top : rows - bottom].T, tolerance)
    return View(top, rows - bottom, left, columns - right)


def _borders(lines: Image, tolerance: float) -> tuple[int, int]:
    """Number of lines of one grey level at the beginning and at the end; 0 for too few or too many."""
    count = len(lines)
    first, last = (_uniform(one, tolerance) for one in (lines, lines[::-1]))
    first, last = (number if number >= LEAST_BORDER * count else 0 for number in (first, last))
    left = count - first - last
    return (first, last) if first + last <= MOST_BORDER * count and left >= LEAST_PX else (0, 0)


def _uniform(lines: Image, tolerance: float) -> int:
    level = np.median(lines[0])
    for number, line in enumerate(lines):
        if np.abs(line - level).max() > tolerance:
            return number
    return len(lines)
