"""Letters and markers are found, whatever their grey, and nothing else is."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from bsdiff_rt.imaging.marks import _dilate_inside, dilate, find_marks
from train.phantoms import draw_phantom


def lettered(cxr, place=(10, 40), grey=1.0):
    ink = np.zeros(cxr.shape, np.uint8)
    cv2.putText(ink, "R", place, cv2.FONT_HERSHEY_SIMPLEX, 1.2, 255, 3)
    return np.maximum(cxr, grey * ink.astype(np.float32) / 255), ink


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("side", [256, 700])
def test_letters_in_a_corner_are_marks_and_nothing_else_is(seed, side):
    cxr = draw_phantom(seed, side).cxr
    assert find_marks(cxr) is None
    marked, ink = lettered(cxr)
    marks = find_marks(marked)
    assert marks[ink > 128].all()
    assert marks.sum() < 2.5 * (ink > 0).sum()  # the letter and its blur


def test_a_part_is_grown_as_the_whole_is():
    """Growing whole pictures of 19 million pixels took six seconds an X-ray."""
    rng = np.random.default_rng(0)
    for by in (1, 4, 11):
        mask = (rng.random((90, 120)) < 0.003).astype(np.uint8)
        for top, left in rng.integers(0, 80, (20, 2)):
            box = np.s_[int(top) : int(top) + 25, int(left) : int(left) + 45]  # some reach past the picture
            assert np.array_equal(_dilate_inside(mask, box, by), dilate(mask, by)[box])


def test_what_is_no_mark():
    cxr = draw_phantom(0, 256).cxr
    assert find_marks(lettered(cxr, place=(110, 140))[0]) is None  # in the middle: a device, perhaps
    assert find_marks(lettered(cxr, grey=float(cxr.max()) - 0.05)[0]) is None  # not the brightest
    block = cxr.copy()
    block[:40, :40] = 1
    assert find_marks(block) is None  # too large
    soft = cv2.GaussianBlur(block, (0, 0), 20)
    assert find_marks(soft) is None  # no edge
    hot = cxr.copy()
    hot[5, 5:9] = hot[20, 20] = 1
    assert find_marks(hot) is None  # pixels of the detector
    noise = (np.random.default_rng(0).random((512, 512)) > 0.97).astype(np.float32)
    assert find_marks(noise) is None  # more spots than letters


def written(cxr, lines):
    """The picture with lines of text of given greys, and where their ink is."""
    picture, ink = cxr.copy(), np.zeros(cxr.shape, np.float32)
    for number, (text, grey) in enumerate(lines):
        line = np.zeros(cxr.shape, np.uint8)
        place = (10, 30 + 28 * number)
        cv2.putText(line, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.7, 255, 2, cv2.LINE_AA)
        part = line.astype(np.float32) / 255
        picture = picture * (1 - part) + grey * part
        ink = np.maximum(ink, part)
    return picture.astype(np.float32), ink


@pytest.mark.parametrize("seed", range(3))
def test_lines_of_several_greys_are_all_found(seed):
    cxr = (draw_phantom(seed, 512).cxr * np.float32(0.85)).astype(np.float32)
    marked, ink = written(cxr, [("AP ERECT", 1.0), ("MOBILE", 0.97), ("PORTABLE", 0.94), ("SUPINE R", 0.9)])
    marks = find_marks(marked)
    for line in range(4):
        rows = slice(10 + 28 * line, 32 + 28 * line)
        assert marks[rows][ink[rows] > 0.9].mean() > 0.995, line
    assert marks.sum() < 3 * (ink > 0).sum()


@pytest.mark.parametrize("grey", [1.0, 0.9])
def test_a_pixel_brighter_than_the_letters_hides_none(grey):
    cxr = (draw_phantom(1, 512).cxr * np.float32(0.85)).astype(np.float32)
    marked, ink = written(cxr, [("AP ERECT", grey), ("MOBILE", grey - 0.03)])
    for bright in (marked[400, 300], 1):
        marked[400, 300] = bright
        assert find_marks(marked)[ink > 0.9].mean() > 0.995


def test_a_word_is_found_as_a_whole():
    """A letter over something bright stands out less than its neighbours, and belongs to them all the same."""
    cxr = np.full((512, 512), 0.2, np.float32)
    cxr[300:, :40] = 0.0
    cxr[:60, 50:75] = 0.85  # behind the middle of the word
    marked, ink = written(cxr, [("EEEEEEE", 1.0)])
    marks = find_marks(marked)
    assert marks[ink > 0.9].all()


def test_letters_far_from_a_word_need_their_own_contrast():
    cxr = np.full((512, 512), 0.2, np.float32)
    cxr[:60, 400:] = 0.85
    marked, _ = written(cxr, [("EEE", 1.0)])
    letter = np.zeros(cxr.shape, np.uint8)
    cv2.putText(letter, "E", (450, 30), cv2.FONT_HERSHEY_SIMPLEX, 0.7, 255, 2)
    marked[letter > 0] = 1
    marks = find_marks(marked)
    assert marks[:, :100].any()
    assert not marks[:, 400:].any()


def test_a_line_below_another_one_may_stand_out_less():
    cxr = np.full((512, 512), 0.2, np.float32)
    cxr[:200] = 0.75  # tissue behind the text
    cxr[400:, :40] = 0.0
    lines = [("AP ERECT", 1.0), ("SUPINE R", 0.9)]
    first, second = (written(cxr, lines), written(cxr, lines[1:]))
    cxr[:42] = 0.2
    marked, ink = written(cxr, lines)
    assert find_marks(marked)[ink > 0.9].all()
    assert find_marks(second[0]) is None  # alone it is too faint
    assert find_marks(first[0]) is None
