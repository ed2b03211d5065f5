"""Random structures that are not bone, for training: added alike to X-ray and truth, so that the model leaves them.

The shapes' parameters are drawn from wider and other ranges than those of benchmarks/retention.py: lobed, elongated and
hollow opacities of any softness, tubes of any course, boxes, clips, consolidations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.imaging.inserts import Insert, box, nodule, opacity, spiculated_nodule, tube

Image = NDArray[np.float32]
Centre = tuple[float, float]

FEWEST_INSERTS, MOST_INSERTS = 2, 14
ON_BONE = 0.45  # share of the inserts put where the bone layer is strong
BODY_GREY = 0.06  # grey levels of the X-ray above which a pixel is taken for body
NEGATIVE = 0.08  # share of the inserts that are darker than what is around: cavities, bullae, air
HEADROOM = 0.12  # below white, where an insert's contrast fades to nothing, so that it is never cut off
WHOLE_IMAGE_MM = 400.0  # width of what an X-ray shows, about
# An insert's energy (sum of squares, grey levels in [0, 1]) below which its weight grows no more.
LEAST_ENERGY = 0.004
NO_ENERGY = 1e-6  # an insert with less is not seen at all
MASK_SHARE = 0.03  # of its peak: pixels where an insert counts


@dataclass(frozen=True)
class Inserts:
    """What is added to a picture, and where it counts.

    Attributes:
        layer: [H, W] float32, what is added to X-ray and truth.
        weight: [H, W] float32; the sum of weight times squared error is the mean over the inserts of their error's
            energy over their own.
    """

    layer: Image
    weight: Image


def draw_inserts(rng: np.random.Generator, cxr: Image, bone: Image, mm_per_px: float) -> Inserts:
    """Draw some random shapes at random places of an X-ray.

    Args:
        rng: everything is drawn from it.
        cxr: [H, W] float32 in [0, 1], the X-ray.
        bone: [H, W] float32, X-ray minus truth; many shapes are put on purpose where it is strong.
        mm_per_px: size of a pixel.
    """
    headroom = np.clip((1 - np.maximum(cxr, cxr - bone)) / HEADROOM, 0, 1)
    kinds, shares = zip(*KINDS, strict=True)
    places = _places(rng, cxr, bone, int(rng.integers(FEWEST_INSERTS, MOST_INSERTS + 1)))
    drawn: list[tuple[float, Image]] = []
    for centre in places:
        insert, contrast = kinds[rng.choice(len(kinds), p=shares)](rng, centre, mm_per_px)
        alone = np.zeros_like(cxr)
        insert.add_to(alone, -contrast if rng.random() < NEGATIVE else contrast)
        alone *= headroom
        energy = float(np.sum(np.square(alone)))
        if energy > NO_ENERGY:
            drawn.append((energy, alone))
    layer, weight = np.zeros_like(cxr), np.zeros_like(cxr)
    for _, alone in sorted(drawn, key=lambda one: one[0]):
        layer += alone
        # Where two overlap the stronger one's weight counts: by the fainter one's its errors would be all there is.
        own = weigh(alone)
        weight = np.where(own > 0, own / np.float32(len(places)), weight)
    return Inserts(layer, weight)


def weigh(layer: Image) -> Image:
    """Return one over the energy of what is added, [H, W], at its pixels and those beside them; else 0."""
    energy = np.sum(np.square(layer), dtype=np.float64)
    mask = np.abs(layer) > MASK_SHARE * np.abs(layer).max()
    near = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    return np.where(near & (energy > NO_ENERGY), np.float32(1 / (energy + LEAST_ENERGY)), np.float32(0))


def _places(rng: np.random.Generator, cxr: Image, bone: Image, count: int) -> list[Centre]:
    """Draw `count` points of the body, ON_BONE of them where the bone layer is strong and uneven."""
    body = cxr > BODY_GREY
    local = bone - cv2.GaussianBlur(bone, (0, 0), max(cxr.shape) / 32)
    strong = body & (np.abs(local) > np.percentile(np.abs(local), 80))
    places = []
    for _ in range(count):
        where = strong if rng.random() < ON_BONE and strong.any() else body
        candidates = np.flatnonzero(where if where.any() else np.ones_like(where))
        row, column = divmod(int(candidates[rng.integers(len(candidates))]), cxr.shape[1])
        places.append((row + rng.uniform(-0.5, 0.5), column + rng.uniform(-0.5, 0.5)))
    return places


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(math.log(low), math.log(high))))


def _lump(rng: np.random.Generator, centre: Centre, mm_per_px: float) -> tuple[Insert, float]:
    """Draw a nodule: soft or hard, lobed, elongated; now and then hollow, or small and dense like a calcified one."""
    radius = _log_uniform(rng, 1.5, 20.0) / mm_per_px
    waves = [(rng.uniform(0, 0.12), rng.uniform(0, 2 * math.pi)) for _ in range(int(rng.integers(0, 4)))]
    hollow = rng.uniform(0.3, 0.85) if rng.random() < 0.1 else 0.0
    made = nodule(
        centre,
        max(radius, 0.9),
        power=_log_uniform(rng, 0.15, 2.5),
        aspect=1.0 + rng.exponential(0.25),
        angle=rng.uniform(0, math.pi),
        hollow=hollow,
        waves=waves,
    )
    return made, _log_uniform(rng, 0.015, 0.25)


def _star(rng: np.random.Generator, centre: Centre, mm_per_px: float) -> tuple[Insert, float]:
    count = int(rng.integers(4, 14))
    spikes = [(rng.uniform(0, 2 * math.pi), rng.uniform(1.2, 2.6)) for _ in range(count)]
    radius = max(_log_uniform(rng, 2.5, 14.0) / mm_per_px, 1.2)
    return spiculated_nodule(centre, radius, spikes=spikes, width=rng.uniform(0.1, 0.3)), _log_uniform(rng, 0.02, 0.25)


def walk(rng: np.random.Generator, centre: Centre, length: float, bend: float) -> NDArray[np.float64]:
    """Draw a smooth random course of `length` px around a point: [N, 2]. `bend` is its turning in radians, about."""
    count = max(8, min(60, round(length / 3)))
    knots = rng.normal(0.0, bend / 2, 5)
    turning = np.interp(np.linspace(0, 4, count), np.arange(5), np.cumsum(knots))
    direction = rng.uniform(0, 2 * math.pi) + turning
    steps = np.stack([np.sin(direction), np.cos(direction)], 1) * (length / count)
    path = np.cumsum(steps, 0)
    return path - path[count // 2] + np.asarray(centre)


def _vessel(rng: np.random.Generator, centre: Centre, mm_per_px: float) -> tuple[Insert, float]:
    width = _log_uniform(rng, 0.8, 5.0)
    path = walk(rng, centre, _log_uniform(rng, 12.0, 80.0) / mm_per_px, rng.uniform(0.1, 1.2))
    return tube(path, width), _log_uniform(rng, 0.015, 0.15)


def _line(rng: np.random.Generator, centre: Centre, mm_per_px: float) -> tuple[Insert, float]:
    """Draw a catheter, drain, tube or wire."""
    width = _log_uniform(rng, 0.8, 9.0) / mm_per_px
    path = walk(rng, centre, _log_uniform(rng, 50.0, 450.0) / mm_per_px, rng.uniform(0.1, 2.5))
    hollow = rng.uniform(0.4, 0.8) if width > 3 and rng.random() < 0.6 else 0.0
    return tube(path, max(width, 0.7), hollow=hollow), _log_uniform(rng, 0.025, 0.35)


def _device(rng: np.random.Generator, centre: Centre, mm_per_px: float) -> tuple[Insert, float]:
    """Draw a pacemaker, port, electrode or large coin."""
    height = _log_uniform(rng, 6.0, 60.0) / mm_per_px
    width = height * rng.uniform(0.6, 1.0)
    corner = rng.uniform(0.1, 0.5) * min(height, width)
    return box(centre, height, width, angle=rng.uniform(0, math.pi), corner=corner), _log_uniform(rng, 0.06, 0.45)


def _clip(rng: np.random.Generator, centre: Centre, mm_per_px: float) -> tuple[Insert, float]:
    length, width = rng.uniform(3.0, 12.0) / mm_per_px, max(rng.uniform(0.8, 2.5) / mm_per_px, 0.8)
    return box(centre, length, width, angle=rng.uniform(0, math.pi)), _log_uniform(rng, 0.05, 0.5)


def _patch(rng: np.random.Generator, centre: Centre, mm_per_px: float) -> tuple[Insert, float]:
    radius = _log_uniform(rng, 10.0, 60.0) / mm_per_px
    made = opacity(centre, radius, rng, grain=rng.uniform(0.15, 0.6), ragged=rng.uniform(0.1, 0.9))
    return made, _log_uniform(rng, 0.02, 0.25)


Draw = Callable[[np.random.Generator, Centre, float], tuple[Insert, float]]
KINDS: tuple[tuple[Draw, float], ...] = (
    (_lump, 0.46),
    (_star, 0.10),
    (_vessel, 0.12),
    (_line, 0.16),
    (_device, 0.04),
    (_clip, 0.05),
    (_patch, 0.07),
)
