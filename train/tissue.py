"""Draw soft tissue and air of the chest phantom as thickness maps. Frame and units are those of train.anatomy."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.imaging.network_input import resize
from train.anatomy import MARGIN, MM, Array, Build, Canvas, fit_curve, measure_cage


def draw_octaves(pixels: int, rng: np.random.Generator, first: int, last: int, slope: float) -> Array:
    """Draw noise [pixels, pixels]: octaves of `first` to `last` cells, each of standard deviation (first / cells) **
    slope.

    Cells finer than a pixel are not drawn. They come last, so a generator of its own keeps a seed's texture at every
    size.
    """
    total = rng.standard_normal((first, first), dtype=np.float32)
    cells = first * 2
    while cells <= min(last, pixels):
        total = resize(total, (cells, cells))
        total += rng.standard_normal((cells, cells), dtype=np.float32) * np.float32((first / cells) ** slope)
        cells *= 2
    return resize(total, (pixels, pixels))


def chord(q: Array) -> Array:
    """Return sqrt(1 - q) where positive: the chord of an ellipsoid at squared radius q."""
    return np.sqrt(np.maximum(1.0 - q, 0.0))


def interpolate_rows(y: Array, knots: Sequence[float], values: Sequence[float] | NDArray[np.float64]) -> Array:
    """Interpolate values [n, 1] at the rows y [n, 1] of a canvas."""
    return round_corners(np.interp(y, knots, values).astype(np.float32))


def round_corners(value: Array) -> Array:
    """Smooth values [n, 1] along a canvas, so that the corners of an interpolation disappear."""
    return np.asarray(cv2.GaussianBlur(value, (1, 2 * (len(value) // 40) + 1), 0.01 * len(value)), dtype=np.float32)


Box = tuple[slice, slice]  # rows, columns
Solid = tuple[float, float, float, float, float, float]  # x, y, two radii in patient units, tilt, depth in millimetres


def draw_ellipsoid(canvas: Canvas, solid: Solid) -> tuple[Box, Array]:
    """Return the box that a solid ellipsoid covers, and its depth there in mm."""
    x0, y0, rx, ry, tilt, depth = solid
    reach, n = max(rx, ry), canvas.pixels
    box = []
    for middle in (y0, x0):
        low = int((middle - reach + MARGIN) * canvas.scale)
        high = int((middle + reach + MARGIN) * canvas.scale) + 2
        box.append(slice(min(max(low, 0), n), min(max(high, 0), n)))
    x, y = canvas.grid()
    x, y = x[:, box[1]] - np.float32(x0), y[box[0]] - np.float32(y0)
    c, s = np.float32(np.cos(tilt)), np.float32(np.sin(tilt))
    u, v = (x * c + y * s) * np.float32(1 / rx), (y * c - x * s) * np.float32(1 / ry)
    return (box[0], box[1]), np.float32(depth) * chord(u * u + v * v)


def draw_body(canvas: Canvas, build: Build, rng: np.random.Generator) -> Array:
    """Draw torso, neck, shoulders and arms, mm."""
    x, y = canvas.grid()
    dx = np.abs(x - 0.5)
    side = build.width + 0.022 + 0.045 * build.bulk
    half = interpolate_rows(y, [0.0, 0.35, 0.6, 0.85, 1.1], [side * 1.02, side * 1.05, side * 1.01, side * 0.97, side])
    r = dx / half
    r *= r
    torso = chord(r * r) * interpolate_rows(y, [0, 0.3, 0.7, 1.1], [125, 185, 215, 230]) * np.float32(build.bulk**0.5)
    radius = rng.uniform(0.085, 0.115) * build.bulk**0.5
    axis = side - radius * rng.uniform(0.1, 0.6) + rng.uniform(0.15, 0.55) * np.maximum(y - 0.2, -0.1)
    r = (dx - axis) * np.float32(1 / radius)
    arm = np.float32(1.5 * radius * MM) * chord(r * r)
    outer = (dx > axis) * 1.5 * radius * MM * np.clip((0.30 - y) / 0.1, 0, 1)  # the shoulder reaches the edge
    slope = rng.uniform(0.12, 0.36)
    top = build.apex + rng.uniform(-0.15, -0.06) + slope * np.maximum(dx - 0.13, 0)
    top = top - 0.8 * np.maximum(0.2 - dx, 0) ** 1.5 + 2.0 * np.maximum(dx - rng.uniform(0.42, 0.5), 0) ** 1.6
    under = np.clip((y - top) / 0.20, 0, 1)
    arm = np.maximum(arm, outer)
    trunk = (np.maximum(torso, arm) + 0.2 * np.minimum(torso, arm)) * np.sqrt(under * (2 - under))
    neck = 120.0 * chord(np.square(dx / (0.145 * build.bulk**0.4))) * interpolate_rows(y, [-0.1, 0.1, 0.25], [1, 1, 0])
    return np.maximum(trunk, neck)


def draw_lungs(canvas: Canvas, build: Build, rng: np.random.Generator) -> Array:
    """Draw the depth of lung along the ray, mediastinum included, mm."""
    x, y = canvas.grid()
    dx = x - 0.5
    depth = 150.0 * chord(np.square(dx / (round_corners(measure_cage(build, y)) + np.float32(1e-4))))
    depth *= interpolate_rows((y - build.apex) / 0.25, [0, 0.25, 1], [0.35, 0.6, 1.0])
    lift, angle = rng.uniform(-0.01, 0.035), rng.uniform(0.10, 0.19)
    s = np.abs(dx) / build.width
    edge = (
        build.dome + lift * (dx > 0) + 4 * (angle * np.maximum(s - 0.5, 0) ** 2 + 0.025 * np.maximum(0.5 - s, 0) ** 2)
    )
    edge = edge + rng.uniform(0, 0.006) * np.sin(s * rng.uniform(4, 12) + rng.uniform(0, 6))
    return depth * (1 - np.sqrt(np.clip((y - edge) / (rng.uniform(0.06, 0.14) * np.minimum(0.3 + s, 1)), 0, 1)))


def draw_mediastinum(canvas: Canvas, build: Build, rng: np.random.Generator) -> Array:
    """Draw heart, great vessels and the central band that displace lung, mm."""
    x, y = canvas.grid()
    w, big = build.width / 0.345, rng.uniform(0.85, 1.2)
    a, base = build.apex, build.dome
    knots = [a, a + 0.06, a + 0.12, a + 0.2, a + 0.28, base]
    left, right = (
        interpolate_rows(y, knots, 0.052 * rng.uniform(0.85, 1.2) * rng.normal(1.0, 0.10, 6)) for _ in range(2)
    )
    dx = x - 0.5
    q = np.where(dx > 0, dx / left, dx / right)
    total = 150 * chord(q * q)
    knob = rng.uniform(0.035, 0.055)
    parts = [
        (0.5 + 0.050 * w, base - 0.075, 0.095 * w * big, 0.16 * big, rng.uniform(-0.95, -0.5), 125),
        (0.5 + 0.075 * w, base - 0.030, 0.09 * w * big, 0.10 * big, -0.9, 90),
        (0.5 - 0.022 * w, base - 0.070, 0.060 * w * big, rng.uniform(0.10, 0.13), 0.15, 110),
        (0.5 + 0.085 * w - knob, a + 0.175, knob, knob * 1.3, 0.0, 100),
        (0.5 + 0.030 * w, a + 0.275, rng.uniform(0.04, 0.055), 0.08, -0.3, 90),
        (0.5 - 0.040 * w, a + 0.20, 0.026, 0.11, 0.08, 60),
    ]
    total *= total  # squares add, so that one organ's edge fades inside a deeper one
    for part in parts:
        where, depth = draw_ellipsoid(canvas, part)
        total[where] += depth * depth
    total = np.sqrt(total)
    hila = np.exp(-np.square((np.abs(dx) - 0.085) / 0.03)) * np.exp(-np.square((y - a - 0.28) / 0.06))
    return total + 25.0 * hila * (0.6 + np.maximum(draw_octaves(canvas.pixels, rng, 16, 64, 0.4), -0.6))


def grow_branches(build: Build, rng: np.random.Generator) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Grow the vessel trees of both lungs. Per generation: diameters [K] and polylines [K, 6, 2], patient units."""
    count = 46
    side = np.repeat([-1.0, 1.0], count // 2)
    heading = np.tile(np.linspace(-1.5, 1.6, count // 2), 2) + rng.normal(0, 0.12, count)
    root = np.stack([0.5 + side * 0.082, build.apex + 0.29 - 0.012 * side + 0.025 * np.sin(heading)], 1)
    start = root + rng.normal(0, 0.010, (count, 2))
    diameter = 0.0045 + 0.011 * rng.random(count) ** 2
    found = []
    for _ in range(6):
        length = rng.uniform(0.025, 0.075, len(start)) * (diameter / 0.008) ** 0.3
        bend = rng.normal(0, 0.4, len(start))
        angle = heading[:, None] + bend[:, None] * np.linspace(0, 1, 5) + rng.normal(0, 0.10, (len(start), 5))
        step = length[:, None] / 5
        path = np.stack([np.cos(angle) * step * side[:, None], np.sin(angle) * step], 2)
        path = start[:, None] + np.concatenate([np.zeros((len(start), 1, 2)), np.cumsum(path, 1)], 1)
        found.append((diameter, path))
        keep = diameter > 0.0011
        start, heading, diameter, side = path[keep, -1], angle[keep, -1], diameter[keep], side[keep]
        fork, share = rng.uniform(0.25, 0.8, len(start)), rng.uniform(0.45, 0.85, len(start))
        heading = np.concatenate([heading + fork * (1 - share), heading - fork * share])
        diameter = np.concatenate([diameter * share**0.42, diameter * (1 - share) ** 0.42])
        start, side = np.concatenate([start, start]), np.concatenate([side, side])
    return found


def draw_vessels(canvas: Canvas, build: Build, rng: np.random.Generator) -> Array:
    """Draw the pulmonary vessels, mm of blood."""
    n = canvas.pixels
    total = np.zeros((n, n), np.float32)
    found = grow_branches(build, rng)
    diameter = np.concatenate([d for d, _ in found])
    path = np.concatenate([p for _, p in found])
    dots = rng.random(len(path)) < 0.03  # seen end-on
    path[dots] = path[dots, :1]
    path = ((path + MARGIN) * (canvas.scale * 16)).round().astype(np.int32)
    level = np.clip(np.round(np.log2(diameter / 0.0012) * 1.25), 0, 5)
    for step in np.unique(level):
        width = 0.0012 * 2 ** (step / 1.25)
        paths = list(path[level == step])
        for part, share in ((1.0, 0.5), (0.55, 0.5)):
            wide = width * canvas.scale * part
            pen = max(1, round(wide))
            layer = np.zeros((n, n), np.uint8)
            cv2.polylines(layer, paths, False, 255, pen, cv2.LINE_AA, 4)
            cv2.scaleAdd(layer.astype(np.float32), width * MM * share * min(1.0, wide / pen) / 255, total, total)
    return total


def draw_smooth_tubes(pixels: int, build: Build, rng: np.random.Generator) -> tuple[Array, Array]:
    """Draw air of trachea and main bronchi, and soft tissue of aorta and muscle folds: both [pixels, pixels], mm."""
    air, flesh = Canvas(pixels // 2), Canvas(pixels // 2)
    a, lean = build.apex, rng.normal(0, 0.006)
    fork = (0.5 - 0.012 + lean, a + rng.uniform(0.20, 0.24))
    half = rng.uniform(0.018, 0.024)
    ends = np.minimum(1, 4 * (1 - np.linspace(0, 1, 24)))
    air.tube(fit_curve((0.5, -0.1), (0.5 + lean / 2, a), fork), half, 14.0)
    for side, drop in ((-1, 0.07), (1, 0.05)):
        far = (0.5 + side * 0.085, fork[1] + drop)
        air.tube(fit_curve(fork, (fork[0] + side * 0.035, fork[1] + drop * 0.6), far), half * 0.6, 9.0 * ends)
    swell = np.sin(np.pi * np.linspace(0, 1, 24)) ** 0.7
    aorta = fit_curve((0.55, a + 0.10), (0.55, a + 0.3), (0.525, build.dome + 0.15))
    flesh.tube(aorta, 0.028, rng.uniform(10, 28) * swell)
    for side in (-1, 1):
        for _ in range(2):
            side_x = build.width + rng.uniform(-0.02, 0.03)
            fold = fit_curve(
                (0.5 + side * rng.uniform(0.38, 0.5), a + 0.02),
                (0.5 + side * side_x, a + 0.22),
                (0.5 + side * (side_x + rng.uniform(-0.04, 0.02)), a + rng.uniform(0.5, 0.8)),
            )
            flesh.tube(fold, rng.uniform(0.02, 0.06) * (0.3 + swell), rng.uniform(6, 24) * swell)
    size = (pixels, pixels)
    drawn = (cv2.resize(one.render(), size, interpolation=cv2.INTER_LINEAR) for one in (air, flesh))
    air_mm, flesh_mm = (np.asarray(one, dtype=np.float32) for one in drawn)
    return air_mm, flesh_mm


def draw_solids(build: Build, rng: np.random.Generator) -> list[Solid]:
    """Draw stomach bubble and bowel gas (negative depth) and nodules, anew for each patient and often none."""
    found: list[Solid] = []
    x, y = 0.5, build.dome
    if rng.random() < 0.75:
        rx, ry = rng.uniform(0.03, 0.08), rng.uniform(0.012, 0.035)
        found.append((x + rng.uniform(0.09, 0.2), y + rng.uniform(0.05, 0.09), rx, ry, rng.normal(0, 0.1), -45.0))
    for _ in range(int(rng.integers(0, 6))):
        r = rng.uniform(0.008, 0.04)
        at = rng.uniform(0.3, 0.75), y + rng.uniform(0.15, 0.35)
        found.append((*at, r, r * rng.uniform(0.5, 1), rng.uniform(0, 3), rng.uniform(-30, -8)))
    if rng.random() < 0.3:
        for _ in range(int(rng.integers(1, 4))):
            r = rng.uniform(0.008, 0.035)
            at = x + rng.choice([-1, 1]) * rng.uniform(0.1, 0.3), build.apex + rng.uniform(0.1, 0.5)
            found.append((*at, r, r * rng.uniform(0.7, 1.0), 1.0, rng.uniform(6, 30)))
    return found


def draw_variants(canvas: Canvas, build: Build, rng: np.random.Generator) -> Array:
    """Draw what patients differ by: breasts, gas, nodules, a hazy opacity; mm of soft tissue, gas negative."""
    total = np.zeros((canvas.pixels, canvas.pixels), np.float32)
    x, y = canvas.grid()
    if build.female:
        depth, r = rng.uniform(15, 60), rng.uniform(0.10, 0.15)
        level, out = build.apex + rng.uniform(0.42, 0.52), build.width * rng.uniform(0.58, 0.68)
        for side in (-1, 1):
            y0 = level + rng.normal(0, 0.01)
            where, value = draw_ellipsoid(canvas, (0.5 + side * out + rng.normal(0, 0.01), y0, r, r * 0.85, 0.0, depth))
            total[where] += value * np.clip((y[where[0]] - y0) / r * 0.6 + 0.5, 0, 1)
    for solid in draw_solids(build, rng):
        where, value = draw_ellipsoid(canvas, solid)
        total[where] += value
    if rng.random() < 0.2:
        x0, y0, r = rng.uniform(0.2, 0.8), build.apex + rng.uniform(0.15, 0.5), rng.uniform(0.04, 0.12)
        cloud = np.exp(-np.square((x - x0) / r)) * np.exp(-np.square((y - y0) / r))
        cloud = cloud * np.maximum(1 + 0.5 * draw_octaves(canvas.pixels, rng, 16, 128, 0.4), 0)
        total += np.float32(rng.uniform(8, 45)) * cloud
    return total


def draw_soft_tissue(pixels: int, build: Build, rng: np.random.Generator) -> Array:
    """Draw everything but bone as equivalent soft tissue, [pixels, pixels], mm."""
    canvas = Canvas(pixels)
    streams = rng.spawn(8)
    body = draw_body(canvas, build, streams[0])
    windpipe, flesh = draw_smooth_tubes(pixels, build, streams[4])
    lung = np.minimum(draw_lungs(canvas, build, streams[1]), body * np.float32(0.9))
    air = np.maximum(lung - draw_mediastinum(canvas, build, streams[2]), 0)
    vessel = draw_vessels(canvas, build, streams[3]) * np.float32(streams[4].uniform(1.0, 2.2))
    texture = 1 + np.float32(0.035) * draw_octaves(pixels, streams[5], 8, 512, 0.35)
    total = body - air * np.float32(1 - streams[4].uniform(0.20, 0.38)) * texture
    total += np.minimum(vessel, air) - np.minimum(windpipe, body * np.float32(0.2))
    total += (draw_variants(canvas, build, streams[6]) + flesh) * np.minimum(body * np.float32(0.02), 1)
    total += body * np.float32(0.012) * draw_octaves(pixels, streams[7], 4, 512, 0.6)
    return np.maximum(total, 0)


def draw_stroke(total: Array, canvas: Canvas, path: Array, width: float, depth: float) -> None:
    """Add a thin line to `total`: path [N, 2] and width in patient units, depth in mm."""
    layer = np.zeros(total.shape, np.uint8)
    wide = width * canvas.scale
    pen = max(1, round(wide))
    fixed = np.round((path + MARGIN) * (canvas.scale * 16)).astype(np.int32)
    cv2.polylines(layer, [fixed], False, 255, pen, cv2.LINE_AA, 4)
    cv2.scaleAdd(layer.astype(np.float32), depth * min(1.0, wide / pen) / 255, total, total)


def draw_letter(total: Array, canvas: Canvas, rng: np.random.Generator) -> None:
    """Add the side marker in a corner of the film."""
    layer = np.zeros(total.shape, np.uint8)
    x, y = rng.choice([0.05, 0.9]) + rng.normal(0, 0.02), rng.uniform(0.04, 0.25)
    origin = (int((x + MARGIN) * canvas.scale), int((y + MARGIN) * canvas.scale))
    size = rng.uniform(1.0, 2.2) * canvas.scale / 900
    pen = max(1, round(size * 2))
    cv2.putText(layer, "R" if x < 0.5 else "L", origin, cv2.FONT_HERSHEY_SIMPLEX, size, 255, pen, cv2.LINE_AA)
    total += layer * np.float32(rng.uniform(60, 300) / 255)


def draw_devices(pixels: int, build: Build, rng: np.random.Generator) -> Array:
    """Draw catheters, leads, electrodes and side markers as equivalent soft tissue, mm. Often there are none."""
    canvas, a = Canvas(pixels), build.apex
    total = np.zeros((pixels, pixels), np.float32)
    if rng.random() < 0.2:
        side = rng.choice([-1, 1])
        first = (0.5 + side * rng.uniform(0.2, 0.4), a + rng.uniform(-0.05, 0.2))
        turn = (0.5 + side * 0.15, a + rng.uniform(0, 0.08))
        path = fit_curve(first, turn, (0.47, a + 0.12), (0.46, a + rng.uniform(0.2, 0.35)), samples=60)
        draw_stroke(total, canvas, path, rng.uniform(0.003, 0.006), rng.uniform(5, 20))
    if rng.random() < 0.15:
        for _ in range(int(rng.integers(1, 5))):
            x, y, depth = rng.uniform(0.1, 0.9), a + rng.uniform(0, 0.7), rng.uniform(5, 25)
            end = (rng.uniform(0, 1), rng.uniform(0.7, 1.2))
            draw_stroke(
                total, canvas, fit_curve((x, y), (x + rng.normal(0, 0.1), y + 0.1), end, samples=60), 0.003, depth
            )
            where, value = draw_ellipsoid(canvas, (x, y, 0.012, 0.012, 0.0, depth))
            total[where] += value
    if rng.random() < 0.3:
        draw_letter(total, canvas, rng)
    return total
