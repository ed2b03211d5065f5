"""Augmentation: how training samples are warped, blurred and toned, so that a small set of pairs goes a long way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.errors import SettingsError

Image = NDArray[np.float32]
Curve = Callable[[Image], Image]

BLACK_OUTSIDE = 0.2  # share of the rotated samples with black corners, as a viewer or a scanner rotates an image


@dataclass(frozen=True)
class Augmentation:
    """How often and how strongly training pairs are changed. Probabilities in [0, 1].

    Attributes:
        geometry: scale of rotation, zoom, shear and elastic deformation; 1 is the recipe of the demo model, 0 none.
        foreign: share of the real samples made to look like another scanner's (tone-matched target).
        swap_bones: share of the real samples whose bone layer comes from another pair or a phantom.
        blur_noise: share of the samples with changed sharpness or added noise.
        phantoms: share of the phantoms warped and, unless `foreign` is 0, shown with weaker or stronger bone, and toned
            anew as often as `foreign` says. The others stay as drawn but for the flip: each is another patient under
            another exposure already, and warping smooths its grain.
        flip, rotation, zoom, elastic: which parts of the geometry there are; rotation is also black corners, zoom
            shift, aspect and shear.
        contrast: whether exposure and bone contrast of real samples vary as one scanner's do.
        inserts: share of the samples with nodules, tubes and the like added to X-ray and truth alike
            (`train.inserts`), where a sample is not shown both without and with them.
    """

    geometry: float = 1.0
    foreign: float = 0.4
    swap_bones: float = 0.35
    blur_noise: float = 0.3
    phantoms: float = 0.3
    flip: bool = True
    rotation: bool = True
    zoom: bool = True
    elastic: bool = True
    contrast: bool = True
    inserts: float = 0.8

    @classmethod
    def of(cls, kinds: str) -> Augmentation:
        """Return only the named kinds, comma separated, each as strong as by default; or one of AUGMENTATION_SETS.

        Raises:
            SettingsError: an unknown kind.
        """
        chosen = AUGMENTATION_SETS.get(kinds, frozenset(kinds.split(",")))
        if unknown := sorted(chosen - AUGMENTATION_SETS["demo"]):
            known = ", ".join((*AUGMENTATION_SETS, *sorted(AUGMENTATION_SETS["demo"])))
            raise SettingsError(f"augmentation {unknown[0]!r} is not known. Choose from {known}.")
        off: dict[str, Any] = {kind.replace("-", "_"): 0 for kind in AUGMENTATION_SETS["demo"] - chosen}
        return replace(cls(), **off)


# The paper's three, which made 840 images of 120 and are drawn anew for each batch here; what made the demo model.
AUGMENTATION_SETS: dict[str, frozenset[str]] = {
    "demo": frozenset(
        {"flip", "rotation", "zoom", "elastic", "contrast", "foreign", "swap-bones", "blur-noise", "inserts"}
    ),
    "paper": frozenset({"flip", "rotation", "contrast"}),
    "none": frozenset(),
}


def warp(
    rng: np.random.Generator, images: list[Image], size: int, crop: int, augmentation: Augmentation
) -> list[Image]:
    """Apply one random flip, affine map and elastic deformation to every image alike, and cut a window out.

    The ranges are 15 degrees of rotation, zoom 0.85 to 1.57, 8 % of aspect and shear, and elastic displacements of
    about 1 % of the image, each times the geometry's strength. Borders repeat the edge, as in preprocessing, or are
    black now and then. A part that is switched off draws its random numbers, too, so the other parts keep theirs.

    Args:
        rng: draws the geometry.
        images: [H, W] each, of one shape.
        size: side of the whole image in px, for which the geometry is drawn.
        crop: side of the window in px.
        augmentation: how strong each part is.

    Returns:
        [crop, crop] each, float32.
    """
    source = images[0].shape[0]
    strength = augmentation.geometry
    framing = strength * augmentation.zoom
    angle = np.deg2rad(rng.uniform(-15, 15) * strength * augmentation.rotation)
    zoom = np.exp(rng.uniform(-0.16, 0.45) * framing)
    stretch = np.exp(rng.uniform(-0.08, 0.08) * framing)
    shear = rng.uniform(-0.08, 0.08) * framing
    flip = -1.0 if strength > 0 and rng.random() < 0.5 and augmentation.flip else 1.0
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    # From output to source coordinates, both centred and in units of half a side.
    matrix = rotation @ np.array([[flip * stretch, shear], [0.0, 1.0 / stretch]]) / zoom
    free = size - crop
    corner = rng.integers(0, free + 1, 2) if free else np.zeros(2, int)
    axis = (np.arange(crop) + 0.5) * 2.0 / size - 1.0
    x, y = np.meshgrid(axis + corner[0] * 2.0 / size, axis + corner[1] * 2.0 / size)
    shift = rng.uniform(-0.08, 0.08, 2) * framing
    elastic = rng.normal(0.0, 0.02 * strength * augmentation.elastic, (2, 6, 6)).astype(np.float32)
    black = rng.random() < BLACK_OUTSIDE and strength > 0 and augmentation.rotation
    border = cv2.BORDER_CONSTANT if black else cv2.BORDER_REPLICATE
    bend = [cv2.resize(field, (crop, crop), interpolation=cv2.INTER_CUBIC) for field in elastic]
    map_x = (matrix[0, 0] * x + matrix[0, 1] * y + shift[0] + bend[0] + 1.0) * source / 2.0 - 0.5
    map_y = (matrix[1, 0] * x + matrix[1, 1] * y + shift[1] + bend[1] + 1.0) * source / 2.0 - 0.5
    # Linear sampling aliases when it skips source pixels: blur first by what the reduction calls for.
    reduction = source / size / zoom
    blur = 0.45 * np.sqrt(max(reduction**2 - 1.0, 0.0))
    maps = map_x.astype(np.float32), map_y.astype(np.float32)
    soft = [_blur(image, blur) if blur > 0.2 else image for image in images]
    warped = [cv2.remap(image, *maps, cv2.INTER_LINEAR, borderMode=border) for image in soft]
    return [np.asarray(image, dtype=np.float32) for image in warped]


def keep_grey_levels(image: Image) -> Image:
    """Return the image: the tone curve of a sample whose tone is not changed."""
    return image


def tone_curve(rng: np.random.Generator) -> Curve:
    """Return a random monotone curve on [0, 1]: gamma, a smooth piecewise-linear bend, and a range inside [0, 1]."""
    knots = np.cumsum(np.concatenate([[0.0], rng.uniform(0.45, 1.55, 7)]))
    gamma = np.exp(rng.uniform(-0.5, 0.5))
    grid = np.linspace(0.0, 1.0, 257)
    bent = np.interp(grid**gamma, np.linspace(0.0, 1.0, 8), knots / knots[-1])
    # The bend's corners would show as edges in smooth tissue.
    smooth = cv2.GaussianBlur(bent[None], (0, 0), 12.0, borderType=cv2.BORDER_REFLECT)[0]
    low, high = rng.uniform(0.0, 0.15), rng.uniform(0.8, 1.0)
    values = low + (high - low) * smooth
    return lambda image: np.interp(image, grid, values).astype(np.float32)


def degrade(rng: np.random.Generator, *images: Image) -> list[Image]:
    """Make all images softer, sharper or noisier alike, as another detector would. Noise is no bone, so it stays."""
    kind = rng.integers(3)
    if kind == 0:
        sigma = rng.uniform(0.3, 0.9)
        return [_blur(image, sigma) for image in images]
    if kind == 1:
        amount = np.float32(rng.uniform(0.2, 1.2))
        return [image + amount * (image - _blur(image, 1.5)) for image in images]
    noise = rng.normal(0.0, np.exp(rng.uniform(*np.log((0.002, 0.03)))), images[0].shape).astype(np.float32)
    return [image + noise for image in images]


def _blur(image: Image, sigma: float) -> Image:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), dtype=np.float32)
