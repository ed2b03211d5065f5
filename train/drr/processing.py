"""From path lengths to a pair as a scanner shows it: exposure, detector, display.

Whatever is done to the X-ray is done to the soft-tissue image with the same numbers: the same scatter, noise, tone and
local equalisation, all of them the X-ray's. So the two differ by bone alone, and where there is no bone they are equal
(but for the reach of the detector's blur and of the edge enhancement).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from bsdiff_rt.imaging.clahe import EqualizingCurves
from train.drr.materials import SCALE, excess_per_mm, water_per_mm
from train.drr.projection import Array

PIXEL_MM = 0.7  # photons are counted per square of this side
BODY_LOG = 0.25  # attenuation above which a pixel shows the body


@dataclass(frozen=True)
class Exposure:
    """One exposure.

    Attributes:
        kev: effective energy of the beam behind the patient.
        scatter: scattered rays that reach the detector behind a grid, of the mean of the rays about a pixel.
        scatter_mm: spread of the scatter, standard deviation.
        blur_mm: spread of focus and detector, standard deviation.
        photons: logarithm to base 10 of the photons per PIXEL_MM squared that reach the detector through air.
        correlated: whether the detector's blur also blurs the noise.
    """

    kev: float
    scatter: float
    scatter_mm: float
    blur_mm: float
    photons: float
    correlated: bool


@dataclass(frozen=True)
class Display:
    """How a scanner shows the logarithm of an exposure; every curve is monotone, air is dark.

    Attributes:
        low, high: percentiles of the body that become black and white, before the margins.
        margin: added below black, of the span; negative cuts.
        compress, compress_mm: share of the wide structure that is taken away, and its size.
        sharpen, sharpen_mm: weight and size of the unsharp mask.
        steepness, middle: of the S-shaped curve; steepness 0 is a power curve with exponent `gamma`.
        gamma: see `steepness`.
        clip, tiles, local: clip limit and tiles of the local equalisation, and its share; share 0 is none.
        black, white: darkest and brightest grey level, in [0, 1].
    """

    low: float
    high: float
    margin: float
    compress: float
    compress_mm: float
    sharpen: float
    sharpen_mm: float
    steepness: float
    middle: float
    gamma: float
    clip: float
    tiles: int
    local: float
    black: float
    white: float


def draw_exposure(rng: np.random.Generator) -> Exposure:
    """Draw an exposure of a chest unit, from soft to hard and from weak to strong."""
    return Exposure(
        kev=rng.uniform(38, 60),
        scatter=rng.uniform(0.05, 0.6),
        scatter_mm=rng.uniform(25, 60),
        blur_mm=rng.uniform(0.1, 0.5),
        photons=rng.uniform(4.3, 5.8),
        correlated=bool(rng.random() < 0.6),
    )


def draw_display(rng: np.random.Generator) -> Display:
    """Draw a display, from plain to strongly processed."""
    return Display(
        low=rng.uniform(0.2, 4),
        high=rng.uniform(96, 99.9),
        margin=rng.uniform(-0.03, 0.25),
        compress=rng.uniform(0.2, 0.6) if rng.random() < 0.7 else 0.0,
        compress_mm=rng.uniform(12, 45),
        sharpen=rng.uniform(0.2, 1.2) if rng.random() < 0.6 else 0.0,
        sharpen_mm=rng.uniform(0.5, 6),
        steepness=rng.uniform(3, 6.5) if rng.random() < 0.7 else 0.0,
        middle=rng.uniform(0.35, 0.6),
        gamma=rng.uniform(0.75, 1.5),
        clip=rng.uniform(1.2, 3),
        tiles=int(rng.integers(3, 9)),
        local=rng.uniform(0.4, 1) if rng.random() < 0.45 else 0.0,
        black=rng.uniform(0, 0.12) if rng.random() < 0.5 else 0.0,
        white=rng.uniform(0.9, 1),
    )


def expose(
    soft_path: Array, excess_path: Array, exposure: Exposure, pixel_mm: float, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Return the logarithm of both exposures, with and without bone, air 0.

    Args:
        soft_path, excess_path: projections of `Materials`, [S, S], mm times SCALE.
        exposure: the exposure.
        pixel_mm: side of a pixel at the patient.
        rng: source of the noise.
    """
    soft_log = soft_path * np.float32(water_per_mm(exposure.kev) / SCALE)
    bone_log = excess_path * np.float32(excess_per_mm(exposure.kev) / SCALE)
    rays = [np.exp(-soft_log - bone_log), np.exp(-soft_log)]
    haze = _blur_wide(np.minimum(rays[0], np.float32(0.35)), exposure.scatter_mm / pixel_mm)
    haze = haze * np.float32(exposure.scatter) + np.float32(0.002)
    if (sigma := exposure.blur_mm / pixel_mm) > 0.25:
        rays = [_blur(image, sigma) for image in rays]
    counted = rays[0] + haze
    noise = rng.standard_normal(counted.shape, dtype=np.float32)
    noise /= np.sqrt(counted * np.float32(10**exposure.photons * (pixel_mm / PIXEL_MM) ** 2))
    if exposure.correlated:
        noise = _blur(noise, 0.55) * np.float32(1.6)
    cxr, soft = (noise - np.log(image + haze) for image in rays)
    return cxr, soft


def display(cxr: Array, soft: Array, shown: Display, pixel_mm: float) -> tuple[Array, Array]:
    """Return both logarithms as the scanner shows them, [S, S] float32 in [0, 1]."""
    body = cxr[cxr > BODY_LOG]
    low, high = np.percentile(body if body.size else cxr, [shown.low, shown.high])
    low -= shown.margin * (high - low)
    span = np.float32(max(high - low, 1e-3))
    cxr, soft = ((image - np.float32(low)) / span for image in (cxr, soft))
    if shown.compress:
        wide = _blur_wide(np.clip(cxr, 0, 1), shown.compress_mm / pixel_mm) - np.float32(0.55)
        cxr, soft = (image - np.float32(shown.compress) * wide for image in (cxr, soft))
    if shown.sharpen and (sigma := shown.sharpen_mm / pixel_mm) > 0.3:
        cxr, soft = (image + np.float32(shown.sharpen) * (image - _blur(image, sigma)) for image in (cxr, soft))
    cxr, soft = (_tone(image, shown) for image in (cxr, soft))
    if shown.local:
        curves = EqualizingCurves.measure(cxr, shown.clip, shown.tiles)
        share = np.float32(shown.local)
        cxr, soft = (image * (1 - share) + share * curves.apply(image) for image in (cxr, soft))
    scale = np.float32(shown.white - shown.black)
    cxr, soft = (np.clip(np.float32(shown.black) + scale * image, 0, 1) for image in (cxr, soft))
    return cxr, soft


def _tone(image: Array, shown: Display) -> Array:
    """Return the image under the display's curve, in [0, 1]."""
    if not shown.steepness:
        return np.asarray(np.clip(image, 0, 1) ** np.float32(shown.gamma), dtype=np.float32)
    ends = [1 / (1 + np.exp(-shown.steepness * (end - shown.middle))) for end in (0, 1)]
    curve = 1 / (1 + np.exp(-np.float32(shown.steepness) * (np.clip(image, -0.5, 1.5) - np.float32(shown.middle))))
    return np.asarray(np.clip((curve - ends[0]) / (ends[1] - ends[0]), 0, 1), dtype=np.float32)


def _blur(image: Array, sigma: float) -> Array:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE), dtype=np.float32)


def _blur_wide(image: Array, sigma: float) -> Array:
    """Blur over many pixels, at a lower resolution."""
    side = image.shape[0]
    factor = max(1, int(sigma / 4))
    if factor == 1:
        return _blur(image, sigma)
    small = cv2.resize(image, (max(1, side // factor),) * 2, interpolation=cv2.INTER_AREA)
    blurred = _blur(np.asarray(small, dtype=np.float32), sigma / factor)
    return np.asarray(cv2.resize(blurred, (side, side), interpolation=cv2.INTER_CUBIC), dtype=np.float32)
