"""Soft tissue found in a bone image: made pairs whose movement and loss of contrast are known."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from train.agreement import explain_by_soft_tissue, restore_kept

Image = NDArray[np.float32]
SIDE = 384


def make_ribs() -> Image:
    """Bands with sharp edges, a bright line along each, as ribs look."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    phase = (y + 0.002 * (x - SIDE / 2) ** 2) % 48
    return np.asarray(0.08 * (phase < 18) + 0.05 * (phase < 2), np.float32)


def make_vessels(seed: int) -> Image:
    """Random thin curves of all directions on a smooth background."""
    rng = np.random.default_rng(seed)
    image = np.zeros((SIDE, SIDE), np.float32)
    for _ in range(150):
        points = rng.uniform(0, SIDE, 2) + np.cumsum(rng.normal(0, 5, (8, 2)), 0)
        cv2.polylines(image, [np.round(points).astype(np.int32)], False, 0.1, int(rng.integers(1, 4)), cv2.LINE_AA)
    return np.asarray(0.4 + cv2.GaussianBlur(image, (0, 0), 0.8), np.float32)


def share_of(part: Image, whole: Image, shape: Image) -> float:
    """How much of `shape`'s detail is in `part`, as a share of what is in `whole`."""
    detail = shape - cv2.GaussianBlur(shape, (0, 0), 5)
    return float(np.sum(part * detail) / np.sum(whole * detail))


def test_lost_contrast_is_found_and_bones_are_left() -> None:
    vessels, ribs = make_vessels(0), make_ribs()
    lost = np.float32(0.3) * (vessels - cv2.GaussianBlur(vessels, (0, 0), 6))
    soft_tissue, bone = vessels - lost, ribs + lost
    explained = explain_by_soft_tissue(bone, soft_tissue)
    # The fit holds back where bone edges are strong, so it finds part of the loss, and never more than there is.
    assert 0.5 < share_of(explained, lost, vessels) < 1.0
    assert float(np.sum(explained * (ribs - ribs.mean())) / np.sum((ribs - ribs.mean()) ** 2)) < 0.05


def test_movement_between_the_exposures_is_found() -> None:
    first, ribs = make_vessels(1), make_ribs()
    move = np.array([[1, 0, 0.4], [0, 1, -0.3]], np.float32)
    second = np.asarray(cv2.warpAffine(first, move, first.shape[::-1], borderMode=cv2.BORDER_REPLICATE), np.float32)
    moved = first - second  # the X-ray shows `first`, the truth `second`
    explained = explain_by_soft_tissue(ribs + moved, second)
    inner = np.s_[8:-8, 8:-8]
    left = float(np.sum((moved - explained)[inner] ** 2) / np.sum(moved[inner] ** 2))
    assert left < 0.75  # of the movement's energy; a fit of no derivatives leaves all of it


def test_an_exact_pair_is_hardly_changed() -> None:
    bone = make_ribs()
    explained = explain_by_soft_tissue(bone, make_vessels(2))
    detail = bone - cv2.GaussianBlur(bone, (0, 0), 5)
    # A sixth to two fifths of the lungs' energy goes in real pairs. Chance correlations explain this much.
    assert float(np.sum(explained**2) / np.sum(detail**2)) < 0.03


def test_what_is_marked_continues_its_surroundings() -> None:
    bone = np.full((SIDE, SIDE), 0.2, np.float32)
    keep = np.zeros(bone.shape, bool)
    keep[50:60, 20:120] = True
    device = np.where(keep, np.float32(0.5), bone)
    np.testing.assert_allclose(restore_kept(device, keep), bone, atol=1e-5)
    other = np.random.default_rng(0).random(bone.shape, dtype=np.float32)
    np.testing.assert_array_equal(restore_kept(other, keep)[~keep], other[~keep])
