"""preview.png: one row per image, X-ray | soft tissue | bone."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from helpers import pixels

from bsdiff_rt.folder import preview as module
from bsdiff_rt.folder.preview import BONE_GAIN, DEVIATION_SHOWN, GAP_PX, NAME_PX, ROWS, SIDE_PX, TITLE_PX, Preview

WIDTH = 3 * SIDE_PX + 2 * GAP_PX
FIRST = TITLE_PX + NAME_PX  # the first row with pictures


def panels(folder, row=0):
    """X-ray, soft tissue and bone of one row, uint8."""
    picture = pixels(folder / "preview.png")
    top = FIRST + row * (SIDE_PX + NAME_PX)
    return [picture[top : top + SIDE_PX, left : left + SIDE_PX] for left in range(0, WIDTH, SIDE_PX + GAP_PX)]


def flat(level, shape=(64, 64)):
    return np.full(shape, level, np.float32)


def test_one_row(tmp_path):
    preview = Preview()
    preview.add("a.png", flat(0.8), flat(0.6))
    assert preview.write(tmp_path) == tmp_path / "preview.png"
    assert pixels(tmp_path / "preview.png").shape == (FIRST + SIDE_PX, WIDTH)
    cxr, soft_tissue, bone = panels(tmp_path)
    assert np.unique(cxr).tolist() == [204]
    assert np.unique(soft_tissue).tolist() == [153]
    assert np.unique(bone).tolist() == [round(BONE_GAIN * 0.2 * 255)]
    assert np.unique(pixels(tmp_path / "preview.png")[FIRST:, SIDE_PX : SIDE_PX + GAP_PX]).tolist() == [255]
    assert [path.name for path in tmp_path.iterdir()] == ["preview.png"]


def test_bone_is_never_negative_and_never_too_bright(tmp_path):
    preview = Preview()
    preview.add("a.png", flat(0.2), flat(0.6))
    preview.add("a.png", flat(1.0), flat(0.0))
    preview.write(tmp_path)
    assert panels(tmp_path, 0)[2].max() == 0
    assert panels(tmp_path, 1)[2].min() == 255


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [((64, 64), 320, 320), ((3000, 1500), 320, 160), ((40, 80), 160, 320), ((1, 500), 1, 320), ((321, 320), 320, 319)],
)
def test_the_aspect_ratio_is_kept_and_the_rest_is_black(tmp_path, shape, rows, columns):
    preview = Preview()
    preview.add("a.png", flat(1.0, shape), flat(1.0))
    preview.write(tmp_path)
    shown = panels(tmp_path)[0] == 255
    assert (shown.any(axis=1).sum(), shown.any(axis=0).sum()) == (rows, columns)
    assert shown.sum() == rows * columns
    assert abs(int(np.flatnonzero(shown.any(axis=1))[0]) - (SIDE_PX - rows) // 2) <= 1


def test_the_two_pictures_may_differ_in_size(tmp_path):
    preview = Preview()
    preview.add("a.png", flat(0.8, (1000, 1000)), flat(0.6, (64, 64)))
    preview.write(tmp_path)
    assert np.unique(panels(tmp_path)[2]).tolist() == [102]


def test_rows_are_bounded_and_in_order(tmp_path):
    preview = Preview()
    for number in range(ROWS + 3):
        preview.add("a.png", flat(number / (ROWS + 3)), flat(0.0))
    preview.write(tmp_path)
    assert pixels(tmp_path / "preview.png").shape == (TITLE_PX + ROWS * (NAME_PX + SIDE_PX), WIDTH)
    for number in (0, 1, ROWS - 1):
        assert panels(tmp_path, number)[0][160, 160] == round(number / (ROWS + 3) * 255)


def test_nothing_to_show(tmp_path):
    assert Preview().write(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_where_samples_deviate_is_laid_over_in_red(tmp_path):
    preview = Preview()
    deviation = flat(0.0)
    deviation[32:] = DEVIATION_SHOWN / 2
    preview.add("a.png", flat(0.8), flat(0.6), deviation)
    preview.write(tmp_path)
    picture = cv2.imread(str(tmp_path / "preview.png"))
    assert picture.shape == (FIRST + SIDE_PX, WIDTH + GAP_PX + SIDE_PX, 3)
    assert picture[FIRST + 10, 10].tolist() == [204] * 3
    assert picture[FIRST + 10, -10].tolist() == [153] * 3
    assert picture[-10, -10].tolist() == [76, 76, 204]  # blue and green 0.6 / 2, red 0.6 / 2 + 1 / 2


@pytest.fixture
def texts(monkeypatch):
    """Every text drawn, with its column, in order."""
    drawn = []
    real = cv2.putText

    def draw(line, text, place, *rest):
        drawn.append((text, place[0]))
        return real(line, text, place, *rest)

    monkeypatch.setattr(module.cv2, "putText", draw)
    return drawn


def test_titles_and_names(tmp_path, texts):
    preview = Preview()
    for name in ("sub/a.png", "Ünï 日本.png", "x" * 300 + "end.png"):
        preview.add(name, flat(0.8), flat(0.6))
    preview.write(tmp_path)
    step = SIDE_PX + GAP_PX
    titles = [("X-ray", 6), ("Soft tissue", 6 + step), ("Bone, brightened 2 times", 6 + 2 * step)]
    assert texts[:3] == titles
    assert [text for text, _ in texts[3:5]] == ["sub/a.png", "Uni ??.png"]
    assert texts[5][0].startswith("...x")
    assert texts[5][0].endswith("xend.png")
    picture = pixels(tmp_path / "preview.png")
    assert picture[:TITLE_PX, :SIDE_PX].min() < 64 < picture[:TITLE_PX, :SIDE_PX].mean()  # black on white
    assert picture[TITLE_PX:FIRST, :SIDE_PX].min() < 64
    assert picture[:FIRST, -6:].min() == 255  # the margin


def test_the_deviation_has_a_title_too(tmp_path, texts):
    preview = Preview()
    preview.add("a.png", flat(0.8), flat(0.6), flat(0.1))
    preview.write(tmp_path)
    assert texts[3] == ("Deviation of samples, red: 5% or more", 6 + 3 * (SIDE_PX + GAP_PX))
