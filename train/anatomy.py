"""Draw the bones of the chest phantom as thickness maps.

The frame is in patient units: 1 is the width of the X-ray (about 400 mm), x to the right, y down, middle of the body at
x = 0.5. The seed alone decides the geometry. The number of pixels only decides how finely it is sampled.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float32]
MARGIN = 0.10  # of the patient frame drawn around [0, 1], so that shift and rotation never show an edge
MM = 400.0  # millimetres per patient unit
RATE = 1.1  # samples per pixel along and across a tube: a ripple below one per cent after linear splatting


@dataclass
class Canvas:
    """A square thickness map [pixels, pixels] over [-MARGIN, 1 + MARGIN], filled by summed samples."""

    pixels: int
    _samples: list[tuple[Array, Array, Array]] = field(default_factory=list)  # x, y, mass

    @property
    def scale(self) -> float:
        """Return the pixels per patient unit."""
        return self.pixels / (1.0 + 2.0 * MARGIN)

    def grid(self) -> tuple[Array, Array]:
        """Return the pixel centres in patient units: x [1, pixels] and y [pixels, 1]."""
        line = (np.arange(self.pixels, dtype=np.float32) + 0.5) / self.scale - MARGIN
        return line[None, :], line[:, None]

    def tubes(self, centre: ArrayLike, half: ArrayLike, depth_mm: ArrayLike, wall: ArrayLike, marrow: float) -> None:
        """Add K hollow tubes.

        Args:
            centre: [K, N, 2] centre lines, patient units.
            half: broadcasts to [K, N], half width seen in the image, patient units.
            depth_mm: broadcasts to [K, N], length of the ray through the middle if the tube were solid.
            wall: broadcasts to [K, 1], cortex thickness over half width, in (0, 1]; 1 is solid.
            marrow: density of the inside relative to the cortex, in [0, 1].
        """
        centre = np.asarray(centre, np.float32)
        shape = centre.shape[:2]
        half = np.broadcast_to(np.asarray(half, np.float32), shape)
        depth_mm = np.broadcast_to(np.asarray(depth_mm, np.float32), shape)
        tangent = np.gradient(centre, axis=1)
        speed = np.hypot(tangent[..., 0], tangent[..., 1]) + 1e-9  # patient units per node
        along = max(int(speed.max() * (shape[1] - 1) * self.scale * RATE), 4)
        across = max(int(2.0 * half.max() * self.scale * RATE), 4)
        node = (np.arange(along, dtype=np.float32) + 0.5) * ((shape[1] - 1) / along)
        first = node.astype(np.int32)
        part = (node - first)[None, :, None]
        normal_x, normal_y = -tangent[..., 1] / speed * half, tangent[..., 0] / speed * half
        table = np.stack([centre[..., 0], centre[..., 1], normal_x, normal_y, depth_mm * speed * half], 2)
        table = table.astype(np.float32)
        table = table[:, first] * (1 - part) + table[:, first + 1] * part
        u = (np.arange(across, dtype=np.float32) + 0.5) * (2.0 / across) - 1.0
        inner = np.maximum(1.0 - np.asarray(wall, np.float32).reshape(-1, 1), 1e-3)
        profile = np.sqrt(1 - u**2) - (1 - marrow) * inner * np.sqrt(np.maximum(1 - (u / inner) ** 2, 0))
        profile = (profile * (2.0 / across * (shape[1] - 1) / along * self.scale**2)).astype(np.float32)
        x = table[:, :, 0, None] + table[:, :, 2, None] * u
        y = table[:, :, 1, None] + table[:, :, 3, None] * u
        self._samples.append((x.ravel(), y.ravel(), (table[:, :, 4, None] * profile[:, None, :]).ravel()))

    def tube(self, centre: Array, half: ArrayLike, depth_mm: ArrayLike, wall: float = 1.0, marrow: float = 1.0) -> None:
        """Add one tube: centre [N, 2], the rest as in `tubes`."""
        self.tubes(centre[None], np.atleast_1d(half)[None], np.atleast_1d(depth_mm)[None], wall, marrow)

    def render(self) -> Array:
        """Sum everything added: [pixels, pixels], mm."""
        n = self.pixels
        if not self._samples:
            return np.zeros((n, n), np.float32)
        x, y, mass = (np.concatenate(part) for part in zip(*self._samples, strict=True))
        x = np.clip((x + MARGIN) * self.scale - 0.5, 0, n - 1.01)
        y = np.clip((y + MARGIN) * self.scale - 0.5, 0, n - 1.01)
        column, row = x.astype(np.int64), y.astype(np.int64)
        x -= column
        y -= row
        index = row * n + column
        low = mass * y
        high = mass - low
        total = np.zeros(n * n)
        for step, weight in ((0, high), (n, low)):
            right = weight * x
            total += np.bincount(index + step, weight - right, n * n)
            total += np.bincount(index + (step + 1), right, n * n)
        picture = total.reshape(n, n).astype(np.float32)
        picture[[0, -1, -2]] = 0  # what lies outside was gathered on the rim
        picture[:, [0, -1, -2]] = 0
        return picture


@dataclass(frozen=True)
class Build:
    """What one patient's skeleton and organs share. Lengths are in patient units."""

    width: float  # half width of the rib cage at its widest
    apex: float  # y of the lung apices
    pitch: float  # y distance of neighbouring thoracic vertebrae
    fall: float  # descent of the ribs from spine to side, 1 = usual
    tilt: float  # share of that descent that happens at the side, in [0, 1]
    dome: float  # y of the right diaphragm dome
    density: float  # bone mineral, 1 = strong adult
    bulk: float  # soft tissue, 1 = average adult
    female: bool


def draw_build(rng: np.random.Generator) -> Build:
    """Draw one patient."""
    apex = rng.uniform(0.09, 0.16)
    return Build(
        width=rng.uniform(0.315, 0.385),
        apex=apex,
        pitch=rng.uniform(0.055, 0.068),
        fall=rng.uniform(0.85, 1.5),
        tilt=rng.uniform(0.35, 1.0),
        dome=apex + rng.uniform(0.50, 0.62),
        density=float(np.clip(rng.normal(0.9, 0.22), 0.45, 1.35)),
        bulk=float(np.clip(rng.lognormal(0.0, 0.2), 0.65, 1.6)),
        female=bool(rng.random() < 0.5),
    )


REACH = np.array([0.46, 0.66, 0.79, 0.88, 0.945, 0.98, 1.0, 1.01, 1.01, 0.98, 0.92, 0.75])  # of Build.width, per rib
FALL = np.array([0.06, 0.065, 0.085, 0.12, 0.165, 0.205, 0.23, 0.24, 0.24, 0.23, 0.21, 0.19])  # spine to side, per rib
END = np.array([2.3, 2.45, 2.5, 2.5, 2.5, 2.5, 2.45, 2.2, 2.05, 1.9, 1.5, 1.0])  # angle of the front end, per rib


def locate_rib_sides(build: Build) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return where each rib turns: y [12] and distance from the middle line [12], patient units."""
    return build.apex + build.pitch * (np.arange(12) - 0.1) + build.fall * FALL, build.width * REACH


def measure_cage(build: Build, y: Array) -> Array:
    """Return the half width of the inside of the rib cage at height y (any shape), patient units."""
    level, side = locate_rib_sides(build)
    top = build.apex + (level[0] - build.apex) * np.array([0.0, 0.03, 0.12, 0.3, 0.6])
    reach = side[0] * np.array([0.0, 0.45, 0.68, 0.84, 0.95])
    knots, value = np.concatenate([top, level[:10]]), np.concatenate([reach, side[:10]])
    return np.interp(y, knots, value - 0.006).astype(np.float32)


def draw_ribs(canvas: Canvas, build: Build, rng: np.random.Generator) -> None:
    """Draw twelve pairs of ribs as tilted loops in space, so that their sides, seen end-on, are bright."""
    count = int(rng.choice([11, 12, 12, 12]))
    thick, gauge = rng.uniform(0.85, 1.15), rng.uniform(0.85, 1.15)
    k = np.tile(np.arange(12), 2)
    side = np.repeat([-1.0, 1.0], 12)[:, None]
    level, reach = (np.tile(v, 2)[:, None] for v in locate_rib_sides(build))
    reach = reach * rng.normal(1, 0.010, (24, 1)) + side * rng.normal(0, 0.006)
    fall = (build.fall * FALL[k])[:, None] * rng.normal(1, 0.03, (24, 1))
    end = (END[k] + rng.normal(0, 0.06, 24))[:, None]
    start = np.arcsin(np.clip(0.042 / reach, 0, 0.6))
    phi = start + (end - start) * np.linspace(0, 1, 90)
    wave = 0.003 * np.sin(phi * rng.uniform(2, 4, (24, 1)) + rng.uniform(0, 6, (24, 1)))
    x = reach * np.sin(phi) ** 0.95
    y = level - build.fall * FALL[k][:, None] + rng.normal(0, 0.004, (24, 1)) + wave
    t = np.clip((phi - 0.25) / 2.45, 0, 1)
    steps = t * t * (3 - 2 * t) / 0.556  # 1 at the side, where the fall is steepest
    y = y + fall * (build.tilt * steps + (1 - build.tilt) * (1 - np.cos(phi)))
    z = -(0.75 * reach + 0.05) * np.cos(phi)
    dx, dy, dz = (np.gradient(v, axis=1) for v in (x, y, z))
    flat = np.hypot(dx, dy)
    stretch = np.minimum(np.sqrt(flat**2 + dz**2) / (flat + 1e-6), 4.5)
    shape = 1 + 0.13 * np.cos(phi * 1.7 + rng.uniform(-0.5, 0.5, (24, 1)))
    tall = (6.3 - 0.12 * np.abs(k - 6))[:, None] * thick / MM * shape  # half height and half thickness of the section
    thin = 3.4 * gauge / MM
    steep = np.abs(dy) / (flat + 1e-9)  # 1 where the loop turns: there the flat side is seen end-on
    half = np.sqrt((tall**2) * (1 - steep**2) + (thin * steep) ** 2) * np.where(k == 0, 1.25, 1.0)[:, None]
    deep = 2.0 * tall * thin / half * MM * stretch
    front = np.clip((phi - 1.7) / 0.6, 0, 1) * rng.uniform(0.2, 0.55)  # thinner in front, fading into cartilage
    deep *= np.clip(0.08 + (end - phi) / 0.22, 0.0, 1.0) * (1 - front) * np.where(k < count, 1.0, 0.0)[:, None]
    wall = np.clip(0.19 * build.density * rng.normal(1, 0.08, 24), 0.07, 0.4)
    centre = np.stack([0.5 + side * x, y], 2)
    marrow = 0.30 + 0.22 * build.density * rng.uniform(0.7, 1.2)
    for part in (slice(0, 2), slice(2, 10), slice(10, 12)):  # alike lengths together: fewer samples
        pick = np.concatenate([np.arange(12)[part], np.arange(12, 24)[part]])
        canvas.tubes(centre[pick], half[pick], deep[pick], wall[pick], marrow)
    edge = np.stack([0.5 + side * x, y + 0.86 * half * (1 - steep)], 2)[:, 5:45]  # the sharp lower margin
    canvas.tubes(edge[2:10], 0.0022, 2.0 * build.density, 1.0, 1.0)
    canvas.tubes(edge[14:22], 0.0022, 2.0 * build.density, 1.0, 1.0)
    if rng.random() < 0.3:
        draw_calcifications(canvas, centre[:, -1], side[:, 0], rng)


def draw_calcifications(
    canvas: Canvas, tips: NDArray[np.float64], side: NDArray[np.float64], rng: np.random.Generator
) -> None:
    """Draw patches of calcified cartilage from the front ends of the ribs (tips [24, 2]) towards the sternum."""
    count = int(rng.integers(20, 90))
    rib = rng.integers(0, len(tips), count)
    t, size = rng.uniform(0, 0.7, count), rng.uniform(0.003, 0.010, count)
    x = tips[rib, 0] + (0.5 + side[rib] * 0.04 - tips[rib, 0]) * t
    y = tips[rib, 1] - 0.07 * t + rng.normal(0, 0.004, count)
    reach = np.linspace(-1, 1, 5) * size[:, None]
    path = np.stack([x[:, None] + reach, y[:, None] + reach * rng.normal(0, 0.4, (count, 1))], 2)
    amount = rng.uniform(1.0, 5.0) * rng.random((count, 1))
    canvas.tubes(path, size[:, None] * 0.5 * taper(5), amount, 1.0, 1.0)


def fit_curve(*points: tuple[float, float], samples: int = 24) -> Array:
    """Return a smooth curve [samples, 2] through a few points, evenly sampled (cubic Hermite, central-difference
    slopes).
    """
    p = np.asarray(points, np.float64)
    t = np.linspace(0, len(p) - 1, 3 * samples)
    m = np.gradient(p, axis=0)
    i = np.minimum(t.astype(int), len(p) - 2)
    f = (t - i)[:, None]
    ease = f * f * (3 - 2 * f)
    bend = f * (1 - f) ** 2 * m[i] - f * f * (1 - f) * m[i + 1]
    path = p[i] * (1 - ease) + p[i + 1] * ease + bend
    arc = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(path, axis=0).T))])
    even = np.linspace(0, arc[-1], samples)
    return np.stack([np.interp(even, arc, path[:, 0]), np.interp(even, arc, path[:, 1])], 1).astype(np.float32)


def taper(samples: int) -> NDArray[np.float64]:
    """Return width factors [samples] that round both ends of a tube."""
    return np.sqrt(1 - np.linspace(-1, 1, samples) ** 12 * 0.97)


def make_rings(x: ArrayLike, y: ArrayLike, rx: ArrayLike, ry: ArrayLike, tilt: float = 0.0) -> Array:
    """Return closed ellipses [K, 28, 2]."""
    a = np.linspace(0, 2 * np.pi, 28)
    x, y, rx, ry = (np.atleast_1d(v)[:, None] for v in (x, y, rx, ry))
    px, py = rx * np.cos(a), ry * np.sin(a)
    c, s = np.cos(tilt), np.sin(tilt)
    return np.stack(np.broadcast_arrays(x + c * px - s * py, y + s * px + c * py), 2).astype(np.float32)


def draw_spine(canvas: Canvas, build: Build, rng: np.random.Generator) -> None:
    """Draw vertebral bodies, end plates, pedicles and processes, from the neck to the lumbar spine."""
    k = np.arange(-7, 17)
    pitch = build.pitch * np.interp(k, [-7, -1, 0, 8, 14], [0.70, 0.78, 0.95, 1.0, 1.2])
    y = np.cumsum(pitch) - pitch
    y += build.apex - y[7] - 0.1 * build.pitch
    half = np.interp(k, [-7, -2, 0, 3, 12, 16], [0.036, 0.044, 0.046, 0.040, 0.050, 0.056]) * rng.uniform(0.92, 1.08)
    x = 0.5 + rng.normal(0, 0.005) * np.sin(y * 6 + rng.uniform(0, 6))
    strong = build.density
    t = np.linspace(0, 1, 9)
    level = (y + 0.10 * pitch)[:, None] + (0.80 * pitch)[:, None] * t
    body = np.stack(np.broadcast_arrays(x[:, None], level), 2)
    canvas.tubes(body, half[:, None] * (1 - 0.12 * np.sin(np.pi * t)), 15.0, 0.07, 0.30 * strong + 0.05)
    across = np.linspace(-1, 1, 9)
    for where, sign in ((0.10, 1), (0.90, -1)):
        plate = (y + where * pitch)[:, None] + sign * 0.002 * (1 - across**2)
        canvas.tubes(np.stack([x[:, None] + half[:, None] * across, plate], 2), 0.0035, 8.0 * strong, 0.6, 0.5)
    drop = y + pitch * rng.uniform(0.75, 1.05, 24)
    canvas.tubes(make_rings(x, drop, 0.009, 0.28 * pitch), 0.0028, 5.0 * strong, 0.7, 0.4)
    for side in (-1.0, 1.0):
        eye = x + side * half * 0.62
        canvas.tubes(make_rings(eye, y + pitch * 0.36, 0.0085, 0.2 * pitch), 0.0028, 5.0 * strong, 0.7, 0.4)
        out = half * 0.75 + (0.032 + rng.normal(0, 0.003, 24)) * np.linspace(0, 1, 9)[:, None]
        rise = (y + pitch * 0.38)[:, None] - 0.14 * pitch[:, None] * np.linspace(0, 1, 9)
        wing = np.stack([x[:, None] + side * out.T, rise], 2)
        canvas.tubes(wing, 0.0095 * (1 + 0.25 * np.linspace(-1, 1, 9) ** 2) * taper(9), 6.0, 0.25 * strong, 0.30)


@dataclass(frozen=True)
class Girdle:
    """Place of one shoulder. `at` maps a drawing of a standard right half to patient units."""

    side: float  # -1 left of the picture, 1 right
    spread: float
    shift: tuple[float, float]
    strong: float  # bone mineral

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return a point, x from the middle line and y from the top, moved to this shoulder."""
        return 0.5 + self.side * x * self.spread + self.shift[0], y + self.shift[1]


def draw_clavicle(canvas: Canvas, g: Girdle, tilt: float, thick: float) -> None:
    """Draw the S of the collar bone, from the breastbone up to the shoulder."""
    bend = [
        (0.045, 0.25 - tilt / 3),
        (0.13, 0.215),
        (0.23, 0.155 + tilt / 2),
        (0.31, 0.12 + tilt),
        (0.385, 0.125 + tilt),
    ]
    path = fit_curve(*(g.at(*point) for point in bend))
    width = np.interp(np.linspace(0, 1, 24), [0, 0.12, 0.5, 0.8, 1], [0.022, 0.0175, 0.0145, 0.015, 0.018])
    canvas.tube(path, width * thick * taper(24), 12.0, 0.20 * g.strong, 0.34)


def draw_scapula(canvas: Canvas, g: Girdle, neck: float, low: float) -> None:
    """Draw the shoulder blade: strong lateral border, thin medial one, blade, spine, coracoid and socket."""
    t, at, strong = np.linspace(0, 1, 24), g.at, g.strong
    border = fit_curve(at(neck, 0.24), at(neck + 0.005, 0.32), at(neck - 0.01, 0.40), at(neck - 0.035, low))
    canvas.tube(border, np.linspace(0.019, 0.010, 24) * taper(24), 9.0 * strong, 0.25, 0.30)
    inner = fit_curve(at(neck - 0.035, low), at(neck - 0.085, 0.37), at(neck - 0.115, 0.25), at(neck - 0.11, 0.16))
    canvas.tube(inner, 0.0045 * taper(24), 4.0 * strong, 0.6, 0.5)
    blade = fit_curve(at(neck - 0.03, low - 0.02), at(neck - 0.055, 0.31), at(neck - 0.06, 0.17))
    canvas.tube(blade, np.interp(t, [0, 0.6, 1], [0.012, 0.052, 0.048]) * taper(24), 1.8 * strong)
    ridge = fit_curve(at(neck - 0.11, 0.215), at(neck - 0.04, 0.18), at(neck + 0.04, 0.13), at(neck + 0.075, 0.135))
    canvas.tube(ridge, np.linspace(0.006, 0.020, 24) * taper(24), 8.0, 0.22 * strong, 0.34)
    canvas.tubes(make_rings(*at(neck - 0.025, 0.185), 0.017, 0.013), 0.0045, 6.0 * strong, 0.6, 0.4)
    canvas.tubes(make_rings(*at(neck + 0.012, 0.225), 0.010, 0.034, 0.12 * g.side), 0.0035, 6.0 * strong, 0.6, 0.4)


def draw_humerus(canvas: Canvas, g: Girdle, neck: float, swing: float) -> None:
    """Draw the upper arm bone with its head."""
    (hx, hy), out = g.at(neck + 0.05, 0.215), g.side
    steps = [(-0.01, -0.05), (0.008, 0.0), (0.03 + swing / 4, 0.10), (0.09 + swing, 0.30), (0.18 + 2 * swing, 0.70)]
    path = fit_curve(*((hx + out * x, hy + y) for x, y in steps), samples=64)
    t = np.linspace(0, 1, 64)
    knots, value = [0, 0.01, 0.03, 0.06, 0.10, 0.17, 0.23, 1], [0.008, 0.022, 0.036, 0.046, 0.048, 0.040, 0.029, 0.025]
    canvas.tube(path, np.interp(t, knots, value), np.interp(t, [0, 0.12, 0.5], [14, 26, 20]), 0.13 * g.strong, 0.20)


def draw_shoulders(canvas: Canvas, build: Build, rng: np.random.Generator) -> None:
    """Draw clavicles, scapulae and upper arms of both sides."""
    lift, tilt = rng.uniform(-0.02, 0.03), rng.uniform(-0.05, 0.06)
    spread, turn = build.width / 0.35 * rng.uniform(0.97, 1.1), rng.normal(0, 0.008)
    thick, neck = rng.uniform(0.85, 1.12), 0.365 + rng.uniform(-0.03, 0.03)
    for side in (-1.0, 1.0):
        jitter = rng.normal(0, 0.004, 2)
        g = Girdle(side, spread, (turn + jitter[0], lift + build.apex - 0.13 + jitter[1]), build.density)
        draw_clavicle(canvas, g, tilt, thick)
        draw_scapula(canvas, g, neck, 0.45 + rng.uniform(-0.03, 0.06))
        draw_humerus(canvas, g, neck, rng.uniform(-0.02, 0.08))


def draw_skeleton(pixels: int, build: Build, rng: np.random.Generator) -> Array:
    """Draw all bones: thickness equivalent to cortical bone, [pixels, pixels], mm."""
    canvas = Canvas(pixels)
    draw_ribs(canvas, build, rng)
    draw_spine(canvas, build, rng)
    draw_shoulders(canvas, build, rng)
    breastbone = fit_curve((0.5, build.apex + 0.15), (0.5, build.apex + 0.22), (0.5, build.apex + 0.50))
    width = np.interp(np.linspace(0, 1, 24), [0, 0.25, 0.4, 1], [0.055, 0.048, 0.033, 0.038])
    canvas.tube(breastbone, width, 3.0, 0.05, 0.25)
    return canvas.render()
