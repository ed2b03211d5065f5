"""What the networks are shown of a picture, and that everything else of it stays as it is."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from synthetic import chest

from bsdiff_rt.view import LEAST_BORDER, SPREAD_TO, View, view_of, whole
from train.phantoms import phantom

PICTURE = chest(200, 160)


def framed(top=0, bottom=0, left=0, right=0, grey=0.0):
    return cv2.copyMakeBorder(PICTURE, top, bottom, left, right, cv2.BORDER_CONSTANT, value=grey)


def seen(cxr, *, trim=True, least_span=0.6):
    return view_of(cxr, trim=trim, least_span=least_span)


@pytest.mark.parametrize("grey", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("frame", [(20, 20, 20, 20), (30, 0, 0, 0), (0, 7, 50, 0), (0, 0, 3, 90)])
def test_uniform_borders_are_not_shown(frame, grey):
    top, _, left, _ = frame
    assert seen(framed(*frame, grey=grey), least_span=0.0) == View(top, top + 200, left, left + 160)


def test_a_frame_saved_as_jpeg_is_uniform():
    """Rings up to half a block into the frame are left; the frame behind them is not."""
    values = np.rint(framed(40, 40, 40, 40) * 255).astype(np.uint8)
    again = cv2.imdecode(cv2.imencode(".jpg", values, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_GRAYSCALE)
    view = seen(again.astype(np.float32) / 255, least_span=0.0)
    left_out = [view.top, view.left, 280 - view.bottom, 240 - view.right]
    assert (min(left_out) >= 32, max(left_out) <= 40) == (True, True)


@pytest.mark.parametrize(
    "cxr",
    [
        PICTURE,
        framed(top=1),  # too little to matter
        framed(left=165),  # more than half
        np.pad(PICTURE[:30], ((20, 20), (0, 0))),  # too little would be left
        np.full((64, 64), 0.5, np.float32),
        phantom(3, 128).cxr,
    ],
    ids=["none", "thin", "most", "small", "flat", "phantom"],
)
def test_other_pictures_are_shown_whole(cxr):
    assert seen(cxr, least_span=0.0) == whole(cxr.shape)
    assert 200 * LEAST_BORDER > 1  # `thin` is


def test_borders_are_shown_where_asked_for():
    assert seen(framed(20, 20, 20, 20), trim=False, least_span=0.0) == whole((240, 200))


def span(picture):
    low, high = np.quantile(picture, (0.01, 0.99))
    return high - low


@pytest.mark.parametrize("factor", [0.1, 0.3, 0.7])
def test_a_faint_picture_is_spread_and_comes_back(factor):
    faint = (0.2 + factor * PICTURE).astype(np.float32)
    view = seen(faint)
    shown = view.of(faint)
    assert span(shown) == pytest.approx(SPREAD_TO, abs=0.02)
    assert 0 <= shown.min() < shown.max() <= 1
    np.testing.assert_allclose(view.back(shown, faint), faint, atol=1e-6)


def test_a_bright_spot_limits_the_spreading():
    faint = (0.2 * PICTURE).astype(np.float32)
    faint[5, 5] = 0.5
    view = seen(faint, trim=False)
    shown = view.of(faint)
    assert shown[5, 5] == pytest.approx(1, abs=1e-6)
    assert view.gain == pytest.approx(1 / (0.5 - faint.min()))
    np.testing.assert_allclose(view.back(shown, faint), faint, atol=1e-6)


def test_what_spans_enough_is_shown_as_it_is():
    strong = PICTURE / PICTURE.max()
    assert seen(strong, least_span=span(strong) - 0.02).gain == 1
    assert seen(0.1 * PICTURE, least_span=0.0) == whole(PICTURE.shape)


def test_a_flat_picture_is_not_torn_apart():
    view = seen(np.full((64, 64), 0.5, np.float32))
    assert np.isfinite(view.of(np.full((64, 64), 0.5, np.float32))).all()


def test_what_was_not_shown_stays():
    cxr = (0.3 * framed(20, 10, 30, 0, grey=1.0)).astype(np.float32)
    view = seen(cxr)
    made = view.of(cxr) - np.float32(0.1)
    result = view.back(made, cxr)
    frame = np.ones(cxr.shape, bool)
    frame[20:220, 30:190] = False
    assert np.array_equal(result[frame], cxr[frame])
    np.testing.assert_allclose(result[~frame], np.clip(cxr[~frame] - 0.1 / view.gain, 0, 1), atol=1e-6)
    deviation = view.deviation_back(np.full((200, 160), 0.2, np.float32), cxr.shape)
    assert not deviation[frame].any()
    np.testing.assert_allclose(deviation[~frame], 0.2 / view.gain, rtol=1e-5)


def test_what_the_report_says():
    assert whole((4, 5)).told((4, 5)) is None
    assert View(1, 4, 0, 5).told((4, 5)) == {
        "top": 1,
        "bottom": 4,
        "left": 0,
        "right": 5,
        "gain": 1.0,
        "offset": 0.0,
    }
