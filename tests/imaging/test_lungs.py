"""Lung fields are found where they are drawn, whatever the scale, tone and size; a picture without lungs says so."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from bsdiff_rt.errors import InputRefused
from bsdiff_rt.imaging.lungs import find_lungs


def draw_chest(size=256, seed=0):
    """Return a chest [size, size] float32 in [0, 1] with ribs and noise, and its lung fields."""
    rng = np.random.default_rng(seed)
    grid = np.linspace(0, 1, size)
    y, x = np.meshgrid(grid, grid, indexing="ij")
    body = ((x - 0.5) / 0.47) ** 4 + ((y - 0.75) / 0.8) ** 4 < 1
    image = np.where(body, 0.75, 0.03) + 0.15 * np.exp(-(((x - 0.5) / 0.06) ** 2)) * body
    lungs = np.zeros((size, size), bool)
    for middle in (0.29, 0.71):
        tilt = (middle - 0.5) * 0.35 * (y - 0.5)
        lungs |= ((x - middle - tilt) / 0.13) ** 2 + ((y - 0.46) / 0.3) ** 2 < 1
    heart = ((x - 0.57) / 0.14) ** 2 + ((y - 0.65) / 0.13) ** 2 < 1
    lungs &= ~heart
    image[lungs] = 0.32
    rim = max(1, round(size * 5 / 256))  # find_lungs takes the rim of ribs in
    lungs = cv2.dilate(lungs.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=rim).astype(bool)
    for k in range(9):  # ribs
        arc = np.abs(y - 0.1 - 0.08 * k - 0.5 * (x - 0.5) ** 2) < 0.012
        image[arc & body] += 0.09
    image += rng.normal(0, 0.01, image.shape)
    return np.clip(cv2.GaussianBlur(image, (0, 0), size / 200), 0, 1).astype(np.float32), lungs


def overlap(found, truth):
    return 2 * (found & truth).sum() / (found.sum() + truth.sum())


@pytest.mark.parametrize("size", [128, 256, 700])
def test_lungs_are_found_at_any_size(size):
    image, lungs = draw_chest(size)
    found = find_lungs(image)
    assert found.shape == image.shape
    assert found.dtype == bool
    assert overlap(found, lungs) > 0.93
    assert (found & lungs).sum() / found.sum() > 0.95


@pytest.mark.parametrize("tone", [lambda x: x**2, np.sqrt, lambda x: 0.4 + 0.2 * x, lambda x: 4000 * x])
def test_tone_and_scale_do_not_matter(tone):
    image, lungs = draw_chest(seed=1)
    assert overlap(find_lungs(tone(image)), lungs) > 0.92


def test_a_wide_picture_keeps_its_shape():
    image, lungs = draw_chest()
    wide = np.pad(image, ((0, 0), (30, 50)), constant_values=0.03)
    found = find_lungs(wide)
    assert found.shape == wide.shape
    assert overlap(found[:, 30:-50], lungs) > 0.92


def test_the_two_lungs_do_not_touch():
    found = find_lungs(draw_chest(seed=2)[0])
    count, _ = cv2.connectedComponents(found.astype(np.uint8))
    assert count == 3


def test_one_lung_or_none_is_refused():
    image, lungs = draw_chest()
    image[:, :128][lungs[:, :128]] = 0.75
    for picture in (image, np.full((256, 256), 0.5, np.float32)):
        with pytest.raises(InputRefused, match="two lungs were not found"):
            find_lungs(picture)
