"""Where benchmarks.retention puts which inserts into an X-ray. Every length is in millimetres unless it says px."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.errors import InputRefused
from bsdiff_rt.imaging.inserts import Insert, box, nodule, opacity, pleural_edge, spiculated_nodule, tube
from bsdiff_rt.imaging.lungs import find_lungs

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]
Centre = tuple[float, float]

GAP = 10.0  # between two inserts of one picture
MOST_ROUNDS = 12  # pictures with inserts made of one X-ray
TRIES = 60  # places tried in a picture before the next one is taken
BRIGHTEST = 0.98  # an insert is not put where it would be cut off at white
CLAVICLE_SHARE = 0.25  # of the lungs' height, from above: bone there is mostly clavicle and first rib
ANYWHERE = "not known"


@dataclass(frozen=True)
class Xray:
    """One X-ray to put inserts into: [H, W] float32 in [0, 1]; `truth` is its soft tissue where known."""

    name: str
    cxr: Image
    truth: Image | None
    mm_per_px: float


@dataclass(frozen=True)
class Wanted:
    """One insert to place. `size` is its diameter or width, mm; `contrast` the peak in grey levels of [0, 1]."""

    kind: str
    size: float
    contrast: float


@dataclass(frozen=True)
class Case:
    """One insert in one picture.

    Attributes:
        wanted: what it is.
        place: what lies behind it: rib, clavicle, between ribs, lung, heart, or ANYWHERE.
        round: which of the X-ray's pictures with inserts it is in.
        rows, columns: the window of the picture that it lies in.
        insert: [h, w] float32, what was added there.
    """

    wanted: Wanted
    place: str
    round: int
    rows: slice
    columns: slice
    insert: Image


NODULES = [Wanted("nodule", *each) for each in itertools.product((5, 8, 13, 25), (0.03, 0.06, 0.12))]
SPICULATED = [Wanted("spiculated nodule", *each) for each in itertools.product((10, 20), (0.05, 0.1))]
VESSELS = [Wanted("vessel", *each) for each in itertools.product((0.8, 1.6, 3.2), (0.03, 0.06))]
LINES = [Wanted("line or tube", *each) for each in ((1.0, 0.06), (2.0, 0.06), (2.0, 0.12), (6.0, 0.06))]
OTHERS = [
    Wanted("clip", 2.0, 0.25),
    Wanted("pneumothorax edge", 1.2, 0.06),
    Wanted("consolidation", 40.0, 0.06),
    Wanted("consolidation", 60.0, 0.12),
]
PLAN = (*NODULES, *SPICULATED, *VESSELS, *LINES, *OTHERS)


def draw(wanted: Wanted, centre: Centre, mm_per_px: float, rng: np.random.Generator) -> Insert:
    """Draw one insert, its peak 1."""
    size = wanted.size / mm_per_px
    angle = rng.uniform(0, math.pi)
    draws: dict[str, Callable[[], Insert]] = {
        "nodule": lambda: nodule(centre, size / 2),
        "spiculated nodule": lambda: spiculated_nodule(
            centre, size / 2, spikes=[(angle + k * math.pi / 4, (1.5, 2.0)[k % 2]) for k in range(8)]
        ),
        "vessel": lambda: tube(_arc(centre, 30 / mm_per_px, angle, 0.4), size),
        "line or tube": lambda: tube(
            _arc(centre, 90 / mm_per_px, angle, 0.8), size, hollow=0.6 if wanted.size > 4 else 0.0
        ),
        "clip": lambda: box(centre, 8 / mm_per_px, size, angle=angle),
        "pneumothorax edge": lambda: pleural_edge(_arc(centre, 60 / mm_per_px, angle, 0.6), size, 8 / mm_per_px),
        "consolidation": lambda: opacity(centre, size / 4, rng),
    }
    return draws[wanted.kind]()


def _arc(centre: Centre, length: float, angle: float, bend: float) -> NDArray[np.float64]:
    """Return an arc of `length` px around a point that turns by `bend` radians: [N, 2]."""
    direction = angle + bend * np.linspace(-0.5, 0.5, 33)
    path = np.cumsum(np.stack([np.sin(direction), np.cos(direction)], 1) * (length / 33), 0)
    return path - path[16] + np.asarray(centre)


def place_inserts(xray: Xray, plan: tuple[Wanted, ...], rng: np.random.Generator) -> list[Case]:
    """Choose a place for every insert of the plan, so that no two of one picture touch.

    An insert that finds no place in MOST_ROUNDS pictures is left out.
    """
    places = find_places(xray.cxr, xray.truth)
    turns: Iterator[str] = itertools.cycle(rng.permutation(sorted(places)).tolist())
    taken: list[Mask] = []
    cases = []
    for index in rng.permutation(len(plan)):
        wanted = plan[index]
        case = _find_place(xray, wanted, next(turns), places, taken, rng)
        if case is not None:
            cases.append(case)
    return cases


def _find_place(
    xray: Xray, wanted: Wanted, place: str, places: dict[str, Mask], taken: list[Mask], rng: np.random.Generator
) -> Case | None:
    """Put one insert into the first picture that has room for it; `taken` is each picture's area in use."""
    candidates = np.flatnonzero(places[place] & (xray.cxr + wanted.contrast < BRIGHTEST))
    if not len(candidates):
        return None
    columns = xray.cxr.shape[1]
    for number in range(MOST_ROUNDS):
        if number == len(taken):
            taken.append(np.zeros(xray.cxr.shape, np.bool_))
        for _ in range(TRIES):
            row, column = divmod(int(candidates[rng.integers(len(candidates))]), columns)
            case = _place_at(xray, wanted, place, (row, column), number, taken[number], rng)
            if case is not None:
                return case
    return None


def _place_at(
    xray: Xray, wanted: Wanted, place: str, centre: Centre, number: int, taken: Mask, rng: np.random.Generator
) -> Case | None:
    """Return the case at that place and mark its area, or None where it does not fit."""
    drawn = draw(wanted, centre, xray.mm_per_px, rng)
    height, width = drawn.picture.shape
    gap = math.ceil(GAP / xray.mm_per_px)
    rows, columns = slice(drawn.top, drawn.top + height), slice(drawn.left, drawn.left + width)
    total_rows, total_columns = taken.shape
    if min(rows.start, columns.start) < 0 or rows.stop > total_rows or columns.stop > total_columns:
        return None
    around = slice(max(rows.start - gap, 0), rows.stop + gap), slice(max(columns.start - gap, 0), columns.stop + gap)
    if taken[around].any():
        return None
    below = xray.cxr[rows, columns]
    insert = np.clip(below + np.float32(wanted.contrast) * drawn.picture, 0, 1) - below
    asked = wanted.contrast**2 * float(np.sum(np.square(drawn.picture)))
    if float(np.sum(np.square(insert))) < 0.9 * asked:
        return None  # cut off at black or white
    taken[rows, columns] = True
    return Case(wanted, place, number, rows, columns, insert)


def find_places(cxr: Image, truth: Image | None) -> dict[str, Mask]:
    """Return where inserts may be put, by what lies there.

    With a truth the bone layer tells ribs, clavicles and what lies between ribs; without one only lung and heart are
    told apart, by grey level. Where no lungs are found: the middle of the picture, as ANYWHERE.
    """
    try:
        lungs = find_lungs(cxr if truth is None else truth)
    except InputRefused:
        middle = np.zeros(cxr.shape, np.bool_)
        rows, columns = cxr.shape
        middle[rows // 6 : -rows // 6, columns // 6 : -columns // 6] = True
        return {ANYWHERE: middle}
    rows = np.flatnonzero(lungs.any(1))
    top, bottom = int(rows[0]), int(rows[-1])
    places = {"heart": _between_lungs(lungs, top + (bottom - top) // 2, bottom)}
    if truth is None:
        return {name: mask for name, mask in (places | {"lung": lungs}).items() if mask.any()}
    bone = cv2.GaussianBlur(np.maximum(cxr - truth, 0), (0, 0), max(cxr.shape) / 512)
    level = np.clip(bone / max(float(np.quantile(bone[lungs], 0.98)), 1e-6) * 255, 0, 255).astype(np.uint8)
    threshold, _ = cv2.threshold(level[lungs], 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    on_bone = lungs & (level > threshold)
    upper = np.arange(cxr.shape[0])[:, None] < top + CLAVICLE_SHARE * (bottom - top)
    places |= {"clavicle": on_bone & upper, "rib": on_bone & ~upper, "between ribs": lungs & (level <= threshold)}
    return {name: mask for name, mask in places.items() if mask.any()}


def _between_lungs(lungs: Mask, top: int, bottom: int) -> Mask:
    """Return what is no lung but has lung on both sides, in these rows."""
    left = np.maximum.accumulate(lungs, 1)
    right = np.maximum.accumulate(lungs[:, ::-1], 1)[:, ::-1]
    between = left & right & ~lungs
    between[:top] = between[bottom:] = False
    return between
