"""The probe's picture: red where a nodule would be lost, grey elsewhere."""

import cv2
import numpy as np

from bsdiff_rt.folder.retention_map import ALL_RED, LINE_PX, LONGEST_PX, STRENGTH, draw_retention
from bsdiff_rt.imaging.probe import Retention


def draw(cxr, retention):
    return cv2.imdecode(np.frombuffer(draw_retention(cxr, retention), np.uint8), cv2.IMREAD_COLOR)


def test_lost_places_are_red_and_others_stay_grey():
    cxr = np.full((200, 300), 0.5, np.float32)
    kept = np.full(cxr.shape, np.nan, np.float32)
    kept[:, 100:200], kept[:, 200:] = 1.0, ALL_RED - 0.1
    picture = draw(cxr, Retention(kept, 0.8, 0.4, (20, 250, 0.4), 9))
    assert picture.shape == (200 + LINE_PX, 300, 3)
    below = picture[LINE_PX + 60 :]
    assert np.ptp(below[:, :200]) == 0
    assert abs(int(below[0, 0, 0]) - 128) <= 1
    blue, green, red = (int(v) for v in below[0, 250])
    assert blue == green == round(255 * 0.5 * (1 - STRENGTH))
    assert red == round(255 * (0.5 * (1 - STRENGTH) + STRENGTH))
    assert (picture[:LINE_PX] < 128).any()  # the text
    yellow = np.all(np.abs(picture.astype(int) - (0, 255, 255)) < 30, axis=2)
    rows, columns = np.nonzero(yellow)
    assert abs(rows.mean() - LINE_PX - 20) < 3
    assert abs(columns.mean() - 250) < 3


def test_large_pictures_are_reduced_and_an_unmeasured_one_is_grey():
    cxr = np.random.default_rng(0).random((2048, 1024), dtype=np.float32)
    picture = draw(cxr, None)
    assert picture.shape == (LONGEST_PX + LINE_PX, 512, 3)
    assert not np.ptp(picture.astype(int), axis=2).any()
