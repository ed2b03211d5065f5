"""Registration: a motion put in is found, nothing is moved that lies right, and what is no pair does not correlate."""

import cv2
import numpy as np
import pytest

from bsdiff_rt.errors import InputFailed
from train.phantoms import draw_phantom
from train.registration import (
    MIN_CORRELATION,
    MIN_MOVE_PX,
    REGISTRATION_PX,
    Registration,
    apply_motion,
    find_edges,
    measure_displacement,
    measure_unregistered,
    register,
)

WINDOW_PX, WHOLE_PX = 384, 512  # a window of a larger picture: what moves in from outside is anatomy, not border
TOLERANCE_PX = 0.3  # at REGISTRATION_PX


@pytest.fixture(scope="module")
def pair():
    """A phantom whose ribs pull little (seed 5: 0.1 px), so that the error measured is the method's."""
    made = draw_phantom(5, WHOLE_PX)
    return made.cxr, made.soft_tissue


def window(image, matrix=None, columns=WINDOW_PX):
    """The middle of a picture; with a matrix, of the picture that maps to it: output to input pixels of the window."""
    top, left = (WHOLE_PX - WINDOW_PX) // 2, (WHOLE_PX - columns) // 2
    full = np.eye(2, 3) if matrix is None else matrix.copy()
    full[:, 2] += left, top
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return np.clip(cv2.warpAffine(image, full, (columns, WINDOW_PX), flags=flags), 0, 1)


def motion(x, y, degrees, columns=WINDOW_PX):
    """Rotation about the window's centre, clockwise on the screen, then a shift; [2, 3], in px at the window's size."""
    # A turn of the coordinates by +a is cv2's rotation by -a.
    matrix = cv2.getRotationMatrix2D(((columns - 1) / 2, (WINDOW_PX - 1) / 2), -degrees, 1.0)
    matrix[:, 2] += x, y
    return matrix


def difference_px(one, other, shape):
    """Farthest two motions are apart at a corner, in px at REGISTRATION_PX."""
    apart = one - other
    apart[:, :2] += np.eye(2)
    return measure_displacement(apart, shape) * REGISTRATION_PX


@pytest.mark.parametrize(
    "put_in", [(0, 30, 0), (-30, 0, 0), (21, -21, 3), (8, 5, -1.5), (2.2, -1, -0.4), (-21, 15, -3)]
)
def test_a_known_motion_is_found(pair, put_in):
    """Up to 20 px at 256 (30 at 384) and 3 degrees, measured against what is found where nothing was moved."""
    cxr = window(pair[0])
    at_rest = register(cxr, window(pair[1]))
    true = motion(*put_in)
    # The picture moved by the inverse: a point p of the X-ray is found at true(p).
    found = register(cxr, window(pair[1], cv2.invertAffineTransform(true)))
    expected = (np.vstack([true, [0, 0, 1]]) @ np.vstack([at_rest.matrix, [0, 0, 1]]))[:2]
    assert difference_px(found.matrix, expected, cxr.shape) < TOLERANCE_PX
    assert found.rotation_deg == pytest.approx(put_in[2], abs=0.15)
    assert found.displacement == pytest.approx(
        measure_displacement(true, cxr.shape), abs=2 * TOLERANCE_PX / REGISTRATION_PX
    )
    assert not found.negligible
    assert found.correlation_before < at_rest.correlation_before
    assert found.correlation_after == pytest.approx(at_rest.correlation_after, abs=0.05)


def test_a_motion_is_found_through_another_tone_and_a_picture_that_is_not_square(pair):
    columns = 300
    true = motion(12, -6, 2, columns)
    plain, moved = window(pair[1], columns=columns), window(pair[1], cv2.invertAffineTransform(true), columns)
    found = register(plain, (0.2 + 0.5 * moved**1.6).astype(np.float32))
    assert difference_px(found.matrix, true, plain.shape) < TOLERANCE_PX


def test_applying_what_was_found_lays_the_images_on_each_other(pair):
    true = motion(20, -10, 2)
    plain, moved = window(pair[1]), window(pair[1], cv2.invertAffineTransform(true))
    back = apply_motion(moved, register(plain, moved).matrix)
    assert back.dtype == np.float32
    assert back.min() >= 0
    assert back.max() <= 1
    inner = slice(60, -60)
    before = np.abs(moved - plain)[inner, inner].mean()
    assert np.abs(back - plain)[inner, inner].mean() < 0.05 * before


def test_phantoms_that_lie_right_are_left_alone():
    """On grey values alone the ribs of phantom 1 pull by 0.97 px and those of 2 by 0.86; on edges by 0.14 and 0.23."""
    for seed in (1, 2, 5):
        made = draw_phantom(seed, 256)
        found = register(made.cxr, made.soft_tissue)
        assert found.displacement * REGISTRATION_PX < TOLERANCE_PX
        assert found.negligible
        assert (found.correlation_after > MIN_CORRELATION) == (seed != 1)  # 0.49: the strongest ribs


def test_what_is_negligible_is_measured_at_the_registration_size():
    limit = MIN_MOVE_PX / REGISTRATION_PX
    assert Registration(np.eye(2, 3), 1, 1, 0.99 * limit, 0).negligible
    assert not Registration(np.eye(2, 3), 1, 1, 1.01 * limit, 0).negligible


def test_two_patients_and_a_mirrored_image_do_not_correlate(pair):
    other = draw_phantom(4, WHOLE_PX).soft_tissue
    for wrong in (window(other), np.ascontiguousarray(window(pair[1])[:, ::-1])):
        assert register(window(pair[0]), wrong).correlation_after < MIN_CORRELATION


def test_as_it_lies(pair):
    same = measure_unregistered(pair[1], pair[1])
    assert same.correlation_before == same.correlation_after == pytest.approx(1.0)
    assert same.negligible
    np.testing.assert_array_equal(same.matrix, np.eye(2, 3))


def test_nothing_correlates_with_a_picture_without_edges(pair):
    assert measure_unregistered(pair[0], np.full_like(pair[1], 0.5)).correlation_before == 0.0


def test_what_does_not_converge_is_said_so(pair):
    flat = np.zeros_like(pair[1])
    with pytest.raises(InputFailed, match="does not converge"):
        register(pair[0], flat)


def test_displacement_is_the_farthest_corner():
    """3, 4, 5; a quarter turn about the first pixel takes the opposite corner by the diagonal times sqrt 2."""
    assert measure_displacement(np.array([[1.0, 0, 3], [0, 1, 4]]), (50, 100)) == pytest.approx(0.05)
    assert measure_displacement(np.array([[0.0, -1, 0], [1, 0, 0]]), (11, 11)) == pytest.approx(20 / 11)


def test_edges_are_where_grey_changes():
    step = np.zeros((32, 32), np.float32)
    step[:, 16:] = 1
    found = find_edges(step)
    assert found[:, :10].max() < 1e-6
    assert found[16].argmax() in (15, 16)
