"""Dual-energy chest phantoms: thickness maps, X-ray physics, display tone.

A phantom is drawn in three steps. Anatomy gives two thickness maps, bone and everything else. Physics makes two log
images of them under the same scatter and noise: the X-ray, and the one with soft tissue in place of bone. Display
applies the same tone curves to both, so that they differ only by bone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from train.anatomy import MARGIN, Array, draw_build, draw_skeleton
from train.tissue import draw_devices, draw_octaves, draw_soft_tissue

SMALLEST_PX = 64  # a phantom's side
SOFT_PER_MM = 0.019  # attenuation of soft tissue at the standard exposure
BONE_EXCESS_PER_MM = 0.060  # cortical bone minus the soft tissue it displaces


@dataclass(frozen=True)
class Phantom:
    """A pair: float32 [size, size] in [0, 1], air dark. The bone image is cxr - soft_tissue."""

    cxr: Array
    soft_tissue: Array


def place_maps(maps: list[Array], size: int, rng: np.random.Generator) -> list[Array]:
    """Rotate, zoom, shift and stretch maps onto the detector, [size, size]."""
    n = maps[0].shape[0]
    angle = np.deg2rad(np.clip(rng.normal(0, 2.0), -6, 6))
    zoom, aspect, shift = rng.uniform(0.90, 1.18), rng.uniform(0.95, 1.05), rng.normal(0, 0.012, 2)
    work = n / (1 + 2 * MARGIN)
    zoom *= size / work
    c, s = np.cos(angle) / zoom, np.sin(angle) / zoom
    turn = np.array([[c * aspect, -s], [s * aspect, c]])
    offset = np.array([n / 2, n / 2]) - 0.5 + shift * work - turn @ np.full(2, size / 2 - 0.5)
    matrix = np.concatenate([turn, offset[:, None]], 1)
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    moved = (cv2.warpAffine(m, matrix, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE) for m in maps)
    return [np.maximum(m, 0) for m in moved]


def expose_maps(soft_mm: Array, bone_mm: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return the log images of the X-ray and of its soft tissue, both [size, size], under the scatter of the X-ray.

    Args:
        soft_mm: thickness of soft tissue, [size, size], mm.
        bone_mm: thickness of bone, [size, size], mm.
        rng: draws the scatter.
    """
    beam_soft = np.exp(soft_mm * np.float32(-SOFT_PER_MM))
    beam_all = beam_soft * np.exp(bone_mm * np.float32(-BONE_EXCESS_PER_MM))
    n = soft_mm.shape[0]
    small = cv2.resize(np.minimum(beam_all, 0.4), (64, 64), interpolation=cv2.INTER_AREA)
    haze = cv2.resize(cv2.GaussianBlur(small, (0, 0), rng.uniform(4, 9)), (n, n), interpolation=cv2.INTER_LINEAR)
    haze = haze * np.float32(rng.uniform(0.1, 0.5)) + np.float32(0.002)
    return -np.log(beam_all + haze), -np.log(beam_soft + haze)


def draw_grain(log_soft: Array, rng: np.random.Generator, level: float) -> Array:
    """Draw the quantum noise of a log image. It grows with attenuation, and with finer pixels, which count fewer
    photons.
    """
    n = log_soft.shape[0]
    noise = rng.standard_normal((n, n), dtype=np.float32) * np.float32(level * (n / 256) ** 0.7)
    return noise * np.exp(0.5 * np.clip(log_soft - 2.0, -2.0, 2.5)).astype(np.float32)


def compute_local_curves(source: Array, tiles: int, clip: float, bins: int = 64) -> Array:
    """Return contrast-limited equalisation curves of `source`, [n, n] in [0, 1]: [tiles, tiles, bins + 1] in [0, 1]."""
    n = source.shape[0]
    level = np.minimum((source * bins).astype(np.int64), bins - 1)
    tile = np.arange(n) * tiles // n
    level += (tile[:, None] * tiles + tile[None, :]) * bins
    count = np.bincount(level.ravel(), minlength=tiles * tiles * bins).reshape(tiles, tiles, bins)
    share = np.minimum(count / count.sum(2, keepdims=True), clip / bins)
    share += (1 - share.sum(2, keepdims=True)) / bins
    return np.concatenate([np.zeros((tiles, tiles, 1)), np.cumsum(share, 2)], 2).astype(np.float32)


def apply_curves(image: Array, curves: Array) -> Array:
    """Map an image [n, n] in [0, 1] through the curves of its place, linear between tiles and between bins."""
    n, tiles, bins = image.shape[0], curves.shape[0], curves.shape[2] - 1
    value = np.clip(image, 0, 1) * np.float32(bins - 0.001)
    level = value.astype(np.int32)
    rest = value - level
    where = np.clip((np.arange(n, dtype=np.float32) + 0.5) * (tiles / n) - 0.5, 0, tiles - 1.001).astype(np.float32)
    low = where.astype(np.int32)
    part = where - low
    table = curves.ravel()
    slope = np.append(np.diff(table), np.float32(0))
    total = np.zeros_like(image)
    for dy, wy in ((0, 1 - part), (1, part)):
        for dx, wx in ((0, 1 - part), (1, part)):
            index = ((low + dy)[:, None] * tiles + (low + dx)[None, :]) * (bins + 1) + level
            total += (table.take(index) + slope.take(index) * rest) * (wy[:, None] * wx[None, :])
    return total


@dataclass(frozen=True)
class Display:
    """How a film is shown. Every curve is monotone, and air stays dark."""

    gamma: float
    sharpen: float  # weight of the unsharp mask
    radius: float  # of the unsharp mask, share of the width
    tiles: int  # of the local equalisation, per side
    clip: float  # its limit, in mean bin counts
    local: float  # its share in the result, in [0, 1]
    black: float  # darkest and brightest value shown
    white: float


def draw_display(rng: np.random.Generator) -> Display:
    """Draw a display, from plain to strongly equalised."""
    return Display(
        gamma=rng.uniform(0.7, 1.3),
        sharpen=rng.uniform(0.2, 0.7) if rng.random() < 0.3 else 0.0,
        radius=rng.uniform(0.006, 0.03),
        tiles=int(rng.integers(3, 9)),
        clip=rng.uniform(1.5, 3.5),
        local=rng.uniform(0.4, 1.0) if rng.random() < 0.8 else 0.0,
        black=rng.uniform(0.0, 0.06),
        white=rng.uniform(0.9, 1.0),
    )


def apply_display(logs: list[Array], guide: Array, display: Display) -> list[Array]:
    """Show log images [n, n] with the curves computed for `guide`. Returns values in [0, 1]."""
    n = guide.shape[0]
    if display.sharpen:
        size = (0, 0), display.radius * n
        *logs, guide = (m + display.sharpen * (m - cv2.GaussianBlur(m, *size)) for m in (*logs, guide))
    low, high = np.percentile(guide[:: n // 64, :: n // 64], [0.3, 99.8])
    span = np.float32(1 / (high - low))
    *shown, guide = (np.clip((m - np.float32(low)) * span, 0, 1) ** np.float32(display.gamma) for m in (*logs, guide))
    if display.local:
        curves = compute_local_curves(guide, display.tiles, display.clip)
        shown = [m + np.float32(display.local) * (apply_curves(m, curves) - m) for m in shown]
    return [m * np.float32(display.white - display.black) + np.float32(display.black) for m in shown]


def draw_phantom(seed: int, size: int = 256) -> Phantom:
    """Draw one patient and one exposure.

    Args:
        seed: patient and exposure; the same seed at another size is the same patient under the same exposure.
        size: side of the images in pixels, at least SMALLEST_PX.

    Returns:
        The pair. It depends on the arguments alone.
    """
    if size < SMALLEST_PX:
        raise ValueError(f"phantom size is {size} px. At least {SMALLEST_PX} px are needed.")
    streams = [np.random.default_rng([seed, part]) for part in range(7)]
    pixels = 2 * round(size * (1 + 2 * MARGIN) * (1.2 if size <= 384 else 1.0) / 2)
    build = draw_build(streams[0])
    bone = draw_skeleton(pixels, build, streams[1])
    bone *= np.maximum(1 + np.float32(0.07) * draw_octaves(pixels, streams[2], 128, 1024, -0.1), np.float32(0.3))
    soft = draw_soft_tissue(pixels, build, streams[3])
    exposure = streams[4]
    soft, bone = place_maps([soft + draw_devices(pixels, build, streams[5]), bone], size, exposure)
    log_cxr, log_soft = expose_maps(soft, bone * np.float32(exposure.uniform(0.4, 1.6)), exposure)
    noise = draw_grain(log_soft, streams[6], exposure.uniform(0.002, 0.012))
    log_cxr, log_soft = log_cxr + noise, log_soft + noise
    display = draw_display(exposure)
    cxr, soft = apply_display([log_cxr, log_soft], log_cxr, display)
    return Phantom(*(np.ascontiguousarray(np.clip(m, 0, 1), np.float32) for m in (cxr, soft)))


def write_pairs(folder: Path | str, count: int, first_seed: int = 0, size: int = 256) -> list[str]:
    """Write pairs as NAME_cxr.png and NAME_soft_tissue.png, 16 bits.

    Args:
        folder: is made if it does not exist.
        count: number of pairs.
        first_seed: seed of the first phantom.
        size: side of the images, px.

    Returns:
        The names.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for seed in range(first_seed, first_seed + count):
        pair = draw_phantom(seed, size)
        name = f"phantom{seed:06d}"
        for kind, image in (("cxr", pair.cxr), ("soft_tissue", pair.soft_tissue)):
            path = folder / f"{name}_{kind}.png"
            if not cv2.imwrite(str(path), np.round(image * 65535).astype(np.uint16)):
                raise OSError(f"cannot write {path}")
        names.append(name)
    return names
