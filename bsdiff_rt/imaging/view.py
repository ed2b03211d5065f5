"""The part of an X-ray that the model sees: without uniform borders and burned-in text, and not too faint. Torch-free.

A model trained on chests does not know frames around the picture, such as a collimator border or a padded export. It
takes letters and side markers for bone, and a marker that fades is a danger of its own. Neither does it know a picture
in a third of the grey scale. All of this is undone in the result. docs/benchmarks.md says what each of them costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.imaging.marks import dilate, find_marks
from bsdiff_rt.imaging.network_input import Placement, resize

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]

UNIFORM = 4 / 255  # largest deviation within a border, of the picture's range: JPEG leaves some around drawn lines
STRAY_SHARE = 0.005  # of a line's pixels: so many may deviate more, such as hot pixels of the detector
LEAST_BORDER = 0.01  # of the side; the model does not notice a thinner one
MOST_BORDER = 0.5  # of the side, both borders together; above, something else is wrong
LEAST_PX = 32  # side of what is left, as small as an X-ray may be

SPAN_SHARES = (0.01, 0.99)  # of the pixels; the span is measured between their grey levels
# A larger span helps faint pictures little and harms those that have few grey levels of their own, such as an enlarged
# lung. Of 0.6, 0.7 and 0.78 this one was best on faint phantoms and second best on enlarged ones.
SPREAD_TO = 0.7
INPAINT_PX = 3  # of the model's input: how far around each pixel the inpainting looks


@dataclass(frozen=True)
class View:
    """Part of a picture [H, W] in [0, 1], and a linear change of its grey levels that stays in [0, 1].

    Attributes:
        top, bottom: first row, and the one behind the last.
        left, right: first column, and the one behind the last.
        gain, offset: the model sees `gain * grey + offset`.
        marks: where burned-in letters are, [bottom - top, right - left]; None for none. The model does not see them.
    """

    top: int
    bottom: int
    left: int
    right: int
    gain: float = 1.0
    offset: float = 0.0
    marks: Mask | None = field(default=None, compare=False)

    def crop(self, cxr: Image) -> Image:
        """Return this part of a picture with its grey levels changed: [bottom - top, right - left], in [0, 1]."""
        part = cxr[self.top : self.bottom, self.left : self.right]
        if self.gain == 1.0 and self.offset == 0.0:
            return part
        spread: Image = np.clip(part * np.float32(self.gain) + np.float32(self.offset), 0, 1)
        return spread

    def paste_into(self, cxr: Image, patch: Image) -> Image:
        """Paste a patch into an X-ray at this view. Borders and burned-in letters keep the X-ray's values.

        Args:
            cxr: the whole X-ray, [H, W], float32, in [0, 1]; it is not changed.
            patch: the result for the viewed part, in the grey levels of `crop`.

        Returns:
            [H, W], float32, in [0, 1], in the X-ray's grey levels.
        """
        inside = np.clip((patch - np.float32(self.offset)) / np.float32(self.gain), 0, 1)
        if self.marks is not None:
            inside[self.marks] = cxr[self.top : self.bottom, self.left : self.right][self.marks]
        return self._place(inside, cxr.copy())

    def place_deviation(self, patch: Image, shape: tuple[int, ...]) -> Image:
        """Return a map of deviations of the whole X-ray from that of the viewed part. It is 0 elsewhere and at letters.

        Args:
            patch: standard deviations, in the grey levels of `crop`.
            shape: of the whole X-ray.
        """
        inside = patch / np.float32(self.gain)
        if self.marks is not None:
            inside[self.marks] = 0
        return self._place(inside, np.zeros(shape, np.float32))

    def hide_marks(self, cxr_net: Image, placement: Placement) -> Image:
        """Return the model's input, [S, S] in [-1, 1], with burned-in letters replaced by their surroundings.

        The method is that of Bertalmio et al. 2001. On floats, OpenCV's other method (Telea) leaves the value range.
        """
        if self.marks is None:
            return cxr_net
        marked = np.zeros(cxr_net.shape, np.uint8)
        reduced = resize(self.marks.astype(np.float32), (placement.height, placement.width)) > 0
        marked[placement.top :, placement.left :][: placement.height, : placement.width] = reduced
        return np.asarray(
            cv2.inpaint(cxr_net, dilate(marked, 1).astype(np.uint8), INPAINT_PX, cv2.INPAINT_NS), dtype=np.float32
        )

    def to_report(self, shape: tuple[int, ...]) -> dict[str, float] | None:
        """Return a report entry, or None if the view is the whole, unchanged picture of that shape."""
        if self == make_whole_view(shape) and self.marks is None:
            return None
        place = {"top": self.top, "bottom": self.bottom, "left": self.left, "right": self.right}
        return place | {"gain": self.gain, "offset": self.offset, "mark_pixels": self.mark_pixels}

    @property
    def white(self) -> float:
        """Return the grey of the X-ray that the model sees as white."""
        return (1 - self.offset) / self.gain

    @property
    def mark_pixels(self) -> int:
        """Return the number of pixels that burned-in letters cover."""
        return 0 if self.marks is None else int(self.marks.sum())

    def _place(self, inside: Image, around: Image) -> Image:
        around[self.top : self.bottom, self.left : self.right] = inside
        return around


def make_whole_view(shape: tuple[int, ...]) -> View:
    """Return the view of a whole picture of that shape, unchanged."""
    return View(0, shape[0], 0, shape[1])


def find_view(cxr: Image, *, trim: bool, least_span: float) -> View:
    """Find the part of an X-ray that the model should see, and how to change its grey levels.

    Args:
        cxr: [H, W], float32, in [0, 1].
        trim: leave out borders of one grey level, and burned-in letters.
        least_span: a picture whose grey levels span less is spread to `SPREAD_TO`, as far as its darkest and brightest
            pixel allow; 0 for never.
    """
    view = _trim_borders(cxr) if trim else make_whole_view(cxr.shape)
    picture = view.crop(cxr)
    marks = find_marks(picture) if trim else None
    low, high = (float(level) for level in np.quantile(picture[::2, ::2], SPAN_SHARES))
    if high - low >= least_span:
        return replace(view, marks=marks)
    darkest, brightest = float(picture.min()), float(picture.max())
    gain = min(SPREAD_TO / max(high - low, 1e-6), 1 / max(brightest - darkest, 1e-6))
    offset = min(max(0.5 - gain * (low + high) / 2, -gain * darkest), 1 - gain * brightest)
    return replace(view, gain=gain, offset=offset, marks=marks)


def remove_borders(pictures: Sequence[Image]) -> list[Image]:
    """Cut the uniform borders of the first picture off all of them.

    Args:
        pictures: pictures of one field of view, [H, W] in [0, 1]; each may have its own size.

    Returns:
        The pictures at the size of the first one's inside; unchanged if it has no borders.
    """
    shape = pictures[0].shape
    view = _trim_borders(pictures[0])
    if view == make_whole_view(shape):
        return list(pictures)
    return [view.crop(resize(picture, shape)) for picture in pictures]


def _trim_borders(cxr: Image) -> View:
    """Return the view without borders of one grey level."""
    rows, columns = cxr.shape
    tolerance = UNIFORM * float(np.ptp(cxr))
    top, bottom = _measure_borders(cxr, tolerance)
    left, right = _measure_borders(cxr[top : rows - bottom].T, tolerance)
    return View(top, rows - bottom, left, columns - right)


def _measure_borders(lines: Image, tolerance: float) -> tuple[int, int]:
    """Return the number of lines of one grey level at the beginning and at the end; 0 for too few or too many."""
    count = len(lines)
    first, last = (_count_uniform(one, tolerance) for one in (lines, lines[::-1]))
    first, last = (number if number >= LEAST_BORDER * count else 0 for number in (first, last))
    left = count - first - last
    return (first, last) if first + last <= MOST_BORDER * count and left >= LEAST_PX else (0, 0)


def _count_uniform(lines: Image, tolerance: float) -> int:
    level = np.median(lines[0])
    for number, line in enumerate(lines):
        if np.count_nonzero(np.abs(line - level) > tolerance) > STRAY_SHARE * len(line):
            return number
    return len(lines)
