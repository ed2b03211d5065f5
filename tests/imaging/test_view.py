"""What the model sees of a picture, and that everything else of it stays as it is."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from synthetic import chest
from test_marks import lettered

from bsdiff_rt.config import Preprocessing
from bsdiff_rt.imaging.network_input import to_network
from bsdiff_rt.imaging.view import (
    LEAST_BORDER,
    SPREAD_TO,
    View,
    find_view,
    make_whole_view,
    remove_borders,
)
from train.phantoms import draw_phantom

PICTURE = chest(200, 160)


def framed(top=0, bottom=0, left=0, right=0, grey=0.0):
    return cv2.copyMakeBorder(PICTURE, top, bottom, left, right, cv2.BORDER_CONSTANT, value=grey)


def seen(cxr, *, trim=True, least_span=0.6):
    return find_view(cxr, trim=trim, least_span=least_span)


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


@pytest.mark.parametrize("hot", [1, 4])
def test_hot_pixels_of_the_detector_do_not_hide_a_frame(hot):
    picture = cv2.resize(framed(20, 20, 20, 20), None, fx=4, fy=4, interpolation=cv2.INTER_NEAREST)
    expected = seen(picture, least_span=0.0)
    assert expected == View(80, 880, 80, 720)
    for row, column in ((3, 100), (950, 70), (400, 2), (500, 790))[:hot]:
        picture[row, column] = 1
    assert seen(picture, least_span=0.0) == expected


@pytest.mark.parametrize(
    "cxr",
    [
        PICTURE,
        framed(top=1),  # too little to matter
        framed(left=165),  # more than half
        np.pad(PICTURE[:30], ((20, 20), (0, 0))),  # too little would be left
        np.full((64, 64), 0.5, np.float32),
        draw_phantom(3, 128).cxr,
    ],
    ids=["none", "thin", "most", "small", "flat", "phantom"],
)
def test_other_pictures_are_shown_whole(cxr):
    assert seen(cxr, least_span=0.0) == make_whole_view(cxr.shape)
    assert 200 * LEAST_BORDER > 1  # `thin` is


def test_borders_are_shown_where_asked_for():
    assert seen(framed(20, 20, 20, 20), trim=False, least_span=0.0) == make_whole_view((240, 200))


def span(picture):
    low, high = np.quantile(picture, (0.01, 0.99))
    return high - low


@pytest.mark.parametrize("factor", [0.1, 0.3, 0.7])
def test_a_faint_picture_is_spread_and_comes_back(factor):
    faint = (0.2 + factor * PICTURE).astype(np.float32)
    view = seen(faint)
    shown = view.crop(faint)
    assert span(shown) == pytest.approx(SPREAD_TO, abs=0.02)
    assert 0 <= shown.min() < shown.max() <= 1
    np.testing.assert_allclose(view.paste_into(faint, shown), faint, atol=1e-6)


def test_a_bright_spot_limits_the_spreading():
    faint = (0.2 * PICTURE).astype(np.float32)
    faint[5, 5] = 0.5
    view = seen(faint, trim=False)
    shown = view.crop(faint)
    assert shown[5, 5] == pytest.approx(1, abs=1e-6)
    assert view.gain == pytest.approx(1 / (0.5 - faint.min()))
    np.testing.assert_allclose(view.paste_into(faint, shown), faint, atol=1e-6)


def test_what_spans_enough_is_shown_as_it_is():
    strong = PICTURE / PICTURE.max()
    assert seen(strong, least_span=span(strong) - 0.02).gain == 1
    assert seen(0.1 * PICTURE, least_span=0.0) == make_whole_view(PICTURE.shape)


def test_a_flat_picture_is_not_torn_apart():
    view = seen(np.full((64, 64), 0.5, np.float32))
    assert np.isfinite(view.crop(np.full((64, 64), 0.5, np.float32))).all()


def test_what_was_not_shown_stays():
    cxr = (0.3 * framed(20, 10, 30, 0, grey=1.0)).astype(np.float32)
    view = seen(cxr)
    made = view.crop(cxr) - np.float32(0.1)
    result = view.paste_into(cxr, made)
    frame = np.ones(cxr.shape, bool)
    frame[20:220, 30:190] = False
    assert np.array_equal(result[frame], cxr[frame])
    np.testing.assert_allclose(result[~frame], np.clip(cxr[~frame] - 0.1 / view.gain, 0, 1), atol=1e-6)
    deviation = view.place_deviation(np.full((200, 160), 0.2, np.float32), cxr.shape)
    assert not deviation[frame].any()
    np.testing.assert_allclose(deviation[~frame], 0.2 / view.gain, rtol=1e-5)


def test_what_the_report_says():
    assert make_whole_view((4, 5)).to_report((4, 5)) is None
    assert View(1, 4, 0, 5).to_report((4, 5)) == {
        "top": 1,
        "bottom": 4,
        "left": 0,
        "right": 5,
        "gain": 1.0,
        "offset": 0.0,
        "mark_pixels": 0,
    }


def test_marks_are_kept_and_not_shown():
    cxr = (0.2 + 0.3 * draw_phantom(1, 256).cxr).astype(np.float32)
    marked, ink = lettered(cxr, grey=float(cxr.max()) + 0.01)
    view = find_view(marked, trim=True, least_span=0.6)
    letter = view.marks
    assert letter[ink > 128].all()
    shown, placement = to_network(view.crop(marked), Preprocessing(128))
    plain, _ = to_network(view.crop(cxr), Preprocessing(128))
    without = view.hide_marks(shown, placement)
    small = cv2.resize(letter.astype(np.float32), (128, 128), interpolation=cv2.INTER_AREA) > 0
    assert np.abs(without - plain)[small].mean() < 0.25 * np.abs(shown - plain)[small].mean()
    far = ~cv2.dilate(small.astype(np.uint8), np.ones((5, 5))).astype(bool)
    assert np.array_equal(without[far], shown[far])
    result = view.paste_into(marked, np.zeros((256, 256), np.float32))
    assert np.array_equal(result[letter], marked[letter])
    assert not view.place_deviation(np.ones((256, 256), np.float32), (256, 256))[letter].any()
    assert view.to_report(cxr.shape)["mark_pixels"] == letter.sum()


def test_marks_are_placed_where_the_view_and_the_picture_in_the_square_are():
    """A framed portrait: what the square holds is smaller, and in its middle."""
    cxr = np.ascontiguousarray(draw_phantom(2, 256).cxr[:, 40:200])
    marked, ink = lettered(cxr)
    framed = np.pad(marked, ((30, 10), (20, 40)))
    view = find_view(framed, trim=True, least_span=0.0)
    assert (view.top, view.left, view.marks.shape) == (30, 20, (256, 160))
    shown, placement = to_network(view.crop(framed), Preprocessing(128))
    assert placement.left > 0
    without = view.hide_marks(shown, placement)
    rows, columns = np.nonzero(without != shown)
    y, x = np.nonzero(ink)
    assert abs(rows.mean() - y.mean() / 2) < 2
    assert abs(columns.mean() - placement.left - x.mean() / 2) < 2
    result = view.paste_into(framed, np.zeros((256, 160), np.float32))
    assert np.array_equal(result[30:-10, 20:-40][ink > 128], marked[ink > 128])


def test_pictures_of_one_field_lose_the_same_borders():
    framed_cxr, truth = framed(20, 10, 0, 30, grey=1.0), framed(20, 10, 0, 30, grey=0.2)
    assert [picture.shape for picture in remove_borders([framed_cxr, truth])] == [(200, 160)] * 2
    small = cv2.resize(truth, (95, 115), interpolation=cv2.INTER_AREA)
    cxr, soft_tissue = remove_borders([framed_cxr, small])
    assert cxr.shape == soft_tissue.shape == (200, 160)
    assert np.abs(soft_tissue - PICTURE)[5:-5, 5:-5].mean() < 0.02
    plain = [PICTURE, small]
    assert all(one is other for one, other in zip(remove_borders(plain), plain, strict=True))
