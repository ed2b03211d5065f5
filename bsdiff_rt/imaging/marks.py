"""Find burned-in letters and side markers in an X-ray. Torch-free.

A mark is a spot of one bright grey, sharply bounded and near an edge of the picture. Bones are brightest inside and
fade outwards. Text may have several greys: after the marks of the brightest grey those of the next one are looked for,
as long as there are any. Letters beside known ones may stand out less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]
Box = tuple[slice, slice]  # rows and columns

MARK_NEAR = 0.01  # of the picture's range: how far greys of one spot may be from the brightest
MARK_ZONE = 0.25  # of the side, from the edge to the spot's centre
LEAST_MARK, MOST_MARK = 2e-5, 0.01  # of the picture's area, one spot
LEAST_MARK_PX = 8  # fewer are pixels of the detector
MARK_CONTRAST = 0.3  # of the picture's range, between the spot and nine tenths of what surrounds it
MARK_EDGE, MARK_RING = 0.004, 0.010  # of the longer side: how far its own blur reaches, and what surrounds it
MOST_SPOTS = 2000  # more are noise, not letters
MOST_GREYS = 8  # of the letters in one picture
LEAST_GREY = 0.7  # of the picture's range; darker letters are not looked for
# A letter beside others of its grey is one, too, whatever lies behind it: at most so far away and so much taller or
# smaller, both in heights of the other one.
WORD_GAP, WORD_HEIGHTS = 1.0, 2.0
# So are spots above, below or beside letters of a brighter grey, at most so many of their own heights away.
BLOCK_GAP, BLOCK_CONTRAST = 1.5, 0.05


@dataclass(frozen=True)
class _Spot:
    """A connected spot of one grey: its label, and its box in px."""

    label: int
    left: int
    top: int
    width: int
    height: int

    def surround(self, by: int) -> Box:
        """Return its box and as many px around it."""
        rows = slice(max(0, self.top - by), self.top + self.height + by)
        return rows, slice(max(0, self.left - by), self.left + self.width + by)

    def continues(self, other: _Spot) -> bool:
        """Return whether this spot may be a letter in the line of the other one."""
        tall, small = max(self.height, other.height), max(1, min(self.height, other.height))
        apart = max(self.left, other.left) - min(self.left + self.width, other.left + other.width)
        shared = min(self.top + self.height, other.top + other.height) - max(self.top, other.top)
        return tall <= WORD_HEIGHTS * small and apart <= WORD_GAP * other.height and shared >= 0.5 * small


def find_marks(cxr: Image) -> Mask | None:
    """Find letters and markers.

    Args:
        cxr: [H, W], float32, in [0, 1].

    Returns:
        Where they are, [H, W], with the blur around them; None if there are none.
    """
    darkest, brightest = float(cxr.min()), float(cxr.max())
    scale, side = brightest - darkest, max(cxr.shape)
    edge = max(1, round(MARK_EDGE * side))
    reach = max(edge + 1, round(MARK_RING * side))
    marks, near = np.zeros(cxr.shape, bool), np.zeros(cxr.shape, bool)
    grey = _find_brightest(cxr, cxr.size)
    for _ in range(MOST_GREYS):
        letters, labels = _find_letters_of_grey(cxr, marks, grey, scale, edge, reach)
        if not letters:
            break
        letter = np.zeros(cxr.shape, bool)
        for spot in letters:
            letter[spot.surround(0)] |= labels[spot.surround(0)] == spot.label
        for spot in letters:  # each in its own surroundings: growing the whole picture takes seconds
            marks[spot.surround(edge)] |= _dilate_inside(letter, spot.surround(edge), edge)
        for spot in letters:
            near[spot.surround(edge + reach)] |= _dilate_inside(marks, spot.surround(edge + reach), reach)
        rest = cxr[~near]
        grey = _find_brightest(rest, cxr.size)
        if grey < darkest + LEAST_GREY * scale:
            break
    return marks if marks.any() else None


def _find_brightest(picture: Image, size: int) -> float:
    """Return the grey that as many pixels reach as the smallest mark of a picture of `size` pixels has.

    A single pixel of the detector may be brighter than all letters.
    """
    least = math.ceil(max(LEAST_MARK * size, LEAST_MARK_PX))
    return float(np.partition(picture, -least, axis=None)[-least]) if picture.size >= least else 0.0


def dilate(mask: NDArray[np.uint8], by: int) -> Mask:
    """Return a mask grown by a disc of that radius, px."""
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * by + 1, 2 * by + 1))
    return np.asarray(cv2.dilate(mask, disc) > 0)


def _dilate_inside(mask: NDArray[np.uint8] | Mask, box: Box, by: int) -> Mask:
    """Return `dilate(mask, by)[box]`, computed from the box and what is near it."""
    rows, columns = box
    top, left = max(0, rows.start - by), max(0, columns.start - by)
    grown = dilate(mask[top : rows.stop + by, left : columns.stop + by].astype(np.uint8), by)
    return grown[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]


def _find_letters_of_grey(
    cxr: Image, known: Mask, grey: float, scale: float, edge: int, reach: int
) -> tuple[list[_Spot], NDArray[Any]]:
    """Return the letters of one grey outside of known marks, and the label of the spot at each pixel, [H, W]."""
    spots = ((cxr >= grey - MARK_NEAR * scale) & ~known).astype(np.uint8)
    count, labels, boxes, centres = cv2.connectedComponentsWithStats(spots, connectivity=8)
    if count > MOST_SPOTS:
        return [], labels
    letters: list[_Spot] = []
    others: list[_Spot] = []
    for label in range(1, count):
        left, top, width, height, area = (int(value) for value in boxes[label])
        x, y = (centre / size for centre, size in zip(centres[label], cxr.shape[::-1], strict=True))
        in_zone = min(x, 1 - x, y, 1 - y) <= MARK_ZONE
        if not in_zone or not max(LEAST_MARK * cxr.size, LEAST_MARK_PX) <= area <= MOST_MARK * cxr.size:
            continue
        spot = _Spot(label, left, top, width, height)
        around = spot.surround(reach)
        ring = dilate((labels[around] == label).astype(np.uint8), reach)
        ring &= ~(_dilate_inside(spots, around, edge) | known[around])  # without other letters and their blur
        needed = BLOCK_CONTRAST if known[spot.surround(round(BLOCK_GAP * height))].any() else MARK_CONTRAST
        stands_out = ring.any() and grey - float(np.quantile(cxr[around][ring], 0.9)) >= needed * scale
        (letters if stands_out else others).append(spot)
    return _complete_words(letters, others), labels


def _complete_words(letters: list[_Spot], others: list[_Spot]) -> list[_Spot]:
    """Return the letters, and those of the other spots that stand in a line with them."""
    complete, open_ = list(letters), list(letters)
    while open_:
        letter = open_.pop()
        joined = [spot for spot in others if spot.continues(letter)]
        others = [spot for spot in others if spot not in joined]
        complete += joined
        open_ += joined
    return complete
