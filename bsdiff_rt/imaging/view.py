"""What of an X-ray the networks are given: no uniform borders, no white letters, grey levels spread where faint.

A frame around the picture (a collimator's, a padded export's) is nothing that networks trained on chests know: a white
one of 8 % takes the demo model on phantoms from BSR 0.96 to 0.77. Neither do they know a picture in a third of the grey
scale (0.83; 0.46 where its bones are weak). White letters and side markers they take for bone (0.86), and a marker that
fades is a danger of its own. All of it is undone in the result. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.imaging.network_input import Placement, resize

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]

UNIFORM = 4 / 255  # largest deviation within a border, of the picture's range: JPEG leaves some around what is drawn
LEAST_BORDER = 0.01  # of the side; below, the networks do not notice it
MOST_BORDER = 0.5  # of the side, both borders together; above, something else is wrong
LEAST_PX = 32  # side of what is left, as small as an X-ray may be

SPAN_SHARES = (0.01, 0.99)  # of the pixels, between whose grey levels the span is measured
# A larger span serves faint pictures little better and costs more where a picture has few grey levels of its own, as an
# enlarged lung: six phantoms in half of the grey scale, as they are / enlarged 1.5 times, BSR of the demo model 0.950 /
# 0.909 at 0.6, 0.953 / 0.907 at 0.7, 0.955 / 0.904 at 0.78; unspread 0.937 / 0.912.
SPREAD_TO = 0.7

# A mark is a spot of the brightest grey, sharply bounded and near an edge. Bones are brightest inside and fade
# outwards; none is found in three real pairs at 256 to 1024 px, also where they are 1.3 or 1.6 times as bright and
# clipped, and none in 60 phantoms; in 1 of them at 1.3 times and in 7 at 1.6.
MARK_NEAR = 0.01  # of the picture's range, from the brightest
MARK_ZONE = 0.25  # of the side, from the edge to the spot's centre
LEAST_MARK, MOST_MARK = 2e-5, 0.01  # of the picture's area, one spot
LEAST_MARK_PX = 8  # fewer are pixels of the detector
MARK_CONTRAST = 0.3  # of the picture's range, between the spot and nine tenths of what surrounds it
MARK_EDGE, MARK_RING = 0.004, 0.010  # of the longer side: how far its own blur reaches, and what surrounds it
INPAINT_PX = 3  # of the networks' input: how far around each pixel is looked
MOST_SPOTS = 2000  # more are noise, not letters

# Middle and both lungs, columns of a square of 64 px, and how far off the chest's middle may be. What `looks_negative`
# compares is at most 0.10 in 450 phantoms and -0.09 in three real pairs, whole or with a fifth cut off at a side. Of
# the negatives of 200 whole phantoms 72 in a hundred are over the limit, and those of the three pairs.
NEGATIVE_PLACES = (slice(29, 35), slice(14, 24), slice(40, 50))
NEGATIVE_OFF = 8
NEGATIVE = 0.12


@dataclass(frozen=True)
class View:
    """Part of a picture [H, W] in [0, 1], and a linear change of its grey levels that stays in [0, 1].

    Attributes:
        top, bottom: first row, and the one behind the last.
        left, right: first column, and the one behind the last.
        gain, offset: the networks see `gain * grey + offset`.
        marks: [bottom - top, right - left], where letters are that the networks do not see; None for none.
    """

    top: int
    bottom: int
    left: int
    right: int
    gain: float = 1.0
    offset: float = 0.0
    marks: Mask | None = field(default=None, compare=False)

    def of(self, cxr: Image) -> Image:
        """What the networks are shown of a picture: [bottom - top, right - left] float32 in [0, 1]."""
        return self._spread(cxr[self.top : self.bottom, self.left : self.right])

    def back(self, made: Image, cxr: Image) -> Image:
        """What was made of the view, `made`, in the place of it in `cxr`, [H, W], whose borders stay."""
        inside = np.clip((made - np.float32(self.offset)) / np.float32(self.gain), 0, 1)
        if self.marks is not None:
            inside[self.marks] = cxr[self.top : self.bottom, self.left : self.right][self.marks]
        return self._in_place(inside, cxr.copy())

    def deviation_back(self, made: Image, shape: tuple[int, ...]) -> Image:
        """A deviation of what was made of the view in the place of it; borders deviate by nothing."""
        inside = made / np.float32(self.gain)
        if self.marks is not None:
            inside[self.marks] = 0
        return self._in_place(inside, np.zeros(shape, np.float32))

    def without_marks(self, cxr_net: Image, placement: Placement) -> Image:
        """The networks' input, [S, S] in [-1, 1], with what surrounds marks drawn over them.

        By Bertalmio et al. 2001; of floats OpenCV 5's other method, Telea's, makes values out of range.
        """
        if self.marks is None:
            return cxr_net
        marked = np.zeros(cxr_net.shape, np.uint8)
        shown = resize(self.marks.astype(np.float32), (placement.height, placement.width)) > 0
        marked[placement.top :, placement.left :][: placement.height, : placement.width] = shown
        return np.asarray(
            cv2.inpaint(cxr_net, _grown(marked, 1).astype(np.uint8), INPAINT_PX, cv2.INPAINT_NS), dtype=np.float32
        )

    def told(self, shape: tuple[int, ...]) -> dict[str, float] | None:
        """What the report says of it; None where it is all of a picture of that shape as it is."""
        if self == whole(shape) and self.marks is None:
            return None
        place = {"top": self.top, "bottom": self.bottom, "left": self.left, "right": self.right}
        return place | {"gain": self.gain, "offset": self.offset, "mark_pixels": self.mark_pixels}

    @property
    def mark_pixels(self) -> int:
        """Number of pixels that marks cover."""
        return 0 if self.marks is None else int(self.marks.sum())

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
        trim: leave out borders of one grey level, and marks.
        least_span: a picture of which the grey levels span less is spread to `SPREAD_TO`, as far as its darkest and
            brightest pixel allow; 0 for never.
    """
    view = _trimmed(cxr) if trim else whole(cxr.shape)
    picture = view.of(cxr)
    marks = marks_of(picture) if trim else None
    low, high = (float(level) for level in np.quantile(picture[::2, ::2], SPAN_SHARES))
    if high - low >= least_span:
        return replace(view, marks=marks)
    darkest, brightest = float(picture.min()), float(picture.max())
    gain = min(SPREAD_TO / max(high - low, 1e-6), 1 / max(brightest - darkest, 1e-6))
    offset = min(max(0.5 - gain * (low + high) / 2, -gain * darkest), 1 - gain * brightest)
    return replace(view, gain=gain, offset=offset, marks=marks)


def without_borders(pictures: Sequence[Image]) -> list[Image]:
    """Pictures of one field, [H, W] in [0, 1] each of its size, without the uniform borders of the first one."""
    shape = pictures[0].shape
    view = _trimmed(pictures[0])
    if view == whole(shape):
        return list(pictures)
    return [view.of(resize(picture, shape)) for picture in pictures]


def marks_of(cxr: Image) -> Mask | None:
    """Where letters and markers are in a picture, [H, W], with the blur around them; None where there are none."""
    brightest, scale, side = float(cxr.max()), float(np.ptp(cxr)), max(cxr.shape)
    spots = (cxr >= brightest - MARK_NEAR * scale).astype(np.uint8)
    count, labels, boxes, centres = cv2.connectedComponentsWithStats(spots, connectivity=8)
    if count > MOST_SPOTS:
        return None
    edge = max(1, round(MARK_EDGE * side))
    reach = max(edge + 1, round(MARK_RING * side))
    marks = np.zeros(cxr.shape, bool)
    for label in range(1, count):
        left, top, width, height, area = boxes[label]
        x, y = (centre / size for centre, size in zip(centres[label], cxr.shape[::-1], strict=True))
        if (
            not max(LEAST_MARK * cxr.size, LEAST_MARK_PX) <= area <= MOST_MARK * cxr.size
            or min(x, 1 - x, y, 1 - y) > MARK_ZONE
        ):
            continue
        near = np.s_[max(0, top - reach) : top + height + reach, max(0, left - reach) : left + width + reach]
        spot = (labels[near] == label).astype(np.uint8)
        grown = _grown(spot, edge)
        ring = _grown(spot, reach) & ~grown & (spots[near] == 0)
        if ring.any() and brightest - float(np.quantile(cxr[near][ring], 0.9)) >= MARK_CONTRAST * scale:
            marks[near] |= grown
    return marks if marks.any() else None


def looks_negative(picture: Image) -> bool:
    """Whether a frontal chest, [H, W] in [0, 1], has air white: both lungs brighter than what lies between them.

    That is looked for with the middle at several places; so is the opposite, and how clear either is at its best is
    compared, in shares of the picture's span.
    """
    small = resize(picture, (64, 64))
    low, high = np.quantile(small, SPAN_SHARES)
    columns = np.median(small[18:40], axis=0)
    negative, positive = -np.inf, -np.inf
    for off in range(-NEGATIVE_OFF, NEGATIVE_OFF + 1):
        middle, *lungs = (float(np.median(columns[place.start + off : place.stop + off])) for place in NEGATIVE_PLACES)
        negative, positive = max(negative, min(lungs) - middle), max(positive, middle - max(lungs))
    return negative - positive > NEGATIVE * float(high - low)


def _grown(spot: NDArray[np.uint8], by: int) -> Mask:
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * by + 1, 2 * by + 1))
    return np.asarray(cv2.dilate(spot, disc) > 0)


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
