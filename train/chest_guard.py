"""Fit the judge of `bsdiff_rt/imaging/chest_guard.py` on drawn phantoms, projected CTs and drawn other pictures.

No picture of a real X-ray is among them. Each chest is shown several times, cropped, turned a little and with another
tone. The same chests upside down, on their side or inverted are no chests, and neither are a fifth of one, projections
from the side, what lies below the diaphragm, drawn hands, text, noise, clouds and scenes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.errors import SettingsError
from bsdiff_rt.files import write_atomically
from bsdiff_rt.imaging.chest_guard import ChestGuard, describe_picture
from bsdiff_rt.imaging.network_input import resize
from train.drr.framing import Anatomy, draw_framing
from train.drr.materials import Materials
from train.drr.prepare import prepare_ct
from train.drr.processing import display, draw_display, draw_exposure, expose
from train.drr.projection import project
from train.drr.volume import Source
from train.phantoms import draw_phantom

logger = logging.getLogger(__name__)

Image = NDArray[np.float32]
Vector = NDArray[np.float64]

PICTURE_PX = 256
KEPT_PX = 96  # side of the pictures that are kept; the judge sees fewer pixels
VOXEL_MM = 1.5
SHOWINGS = 6  # of each picture
PENALTY = 5.0  # on the squared weights
ROUNDS = 25  # of Newton's method
MISSED = 0.002  # share of the chests kept out of the fit that score below `least`
CLEAR_SHARE = 0.05  # share of them that score below `clear`
MARGIN = 1.0  # `least` is so much lower than that, in log odds: real X-rays vary more than projected and drawn ones


@dataclass(frozen=True)
class Pictures:
    """Pictures with the answer, and the group they belong to: pictures of one CT or phantom are kept out together."""

    pictures: list[Image]
    chests: list[bool]
    groups: list[str]

    def add(self, picture: Image, group: str, *, chest: bool) -> None:
        """Add one picture."""
        self.pictures.append(resize(picture, (KEPT_PX, KEPT_PX)))
        self.chests.append(chest)
        self.groups.append(group)


def fit_guard(sources: Iterable[Source], output: Path, count: int, seed: int) -> str:
    """Fit the judge, write its file, and return a line on its scores of chests that were not fitted.

    Args:
        sources: chest CTs without the arms beside the body.
        output: the file.
        count: pictures of each CT, half of them from the front; and a tenth of the phantoms.
        seed: of everything random.

    Raises:
        SettingsError: no CT can be used.
    """
    pictures = draw_pictures(sources, count, seed)
    features = np.stack([describe_picture(one) for one in pictures.pictures])
    chests = np.array(pictures.chests)
    scores = _score_kept_out(features, chests, pictures.groups)
    least = round(float(np.quantile(scores[chests], MISSED)) - MARGIN, 3)
    clear = round(float(np.quantile(scores[chests], CLEAR_SHARE)), 3)
    weights, bias = fit(features, chests)
    guard = ChestGuard(np.round(weights, 4), round(bias, 4), min(least, 0.0), max(clear, 0.0))
    write_guard(output, guard)
    lines = [f"{len(chests)} pictures, {chests.sum()} of them chests; least {guard.least}, clear {guard.clear}"]
    for name in sorted({group.split(" ")[0] for group in pictures.groups}):
        for chest, what in ((True, "chests"), (False, "others")):
            mine = np.array([group.split(" ")[0] == name for group in pictures.groups]) & (chests == chest)
            if mine.any():
                lines.append(f"{name}: {(scores[mine] < guard.least).sum()} of {mine.sum()} {what} are warned of")
    return "\n".join(lines)


def write_guard(path: Path, guard: ChestGuard) -> None:
    """Write a judge as JSON."""
    content = {"bias": guard.bias, "least": guard.least, "clear": guard.clear, "weights": guard.weights.tolist()}
    write_atomically(path, (json.dumps(content) + "\n").encode())


def fit(features: Vector, chests: NDArray[np.bool_]) -> tuple[Vector, float]:
    """Fit a logistic regression by Newton's method. Chests and other pictures count alike in sum.

    Args:
        features: [N, F].
        chests: [N], the answers.

    Returns:
        Weights [F], and the bias.
    """
    inputs = np.hstack([features, np.ones((len(features), 1))])
    share = np.where(chests, 0.5 / chests.sum(), 0.5 / (~chests).sum()) * len(chests)
    penalty = np.full(inputs.shape[1], PENALTY)
    penalty[-1] = 1e-6
    weights = np.zeros(inputs.shape[1])
    for _ in range(ROUNDS):
        chance = 1 / (1 + np.exp(-np.clip(inputs @ weights, -30, 30)))
        gradient = inputs.T @ (share * (chance - chests)) + penalty * weights
        curvature = (inputs * (share * np.maximum(chance * (1 - chance), 1e-6))[:, None]).T @ inputs
        step = np.linalg.solve(curvature + np.diag(penalty), gradient)
        weights -= step
        if np.abs(step).max() < 1e-4:
            break
    return weights[:-1], float(weights[-1])


def _score_kept_out(features: Vector, chests: NDArray[np.bool_], groups: list[str]) -> Vector:
    """Return the score of each picture by a judge that saw none of its group."""
    names = sorted(set(groups))
    folds = {name: (number if " " not in name else number % 4) for number, name in enumerate(names)}
    fold = np.array([folds[group] for group in groups])
    scores = np.empty(len(chests))
    for number in sorted(set(folds.values())):
        mine = fold == number
        weights, bias = fit(features[~mine], chests[~mine])
        scores[mine] = features[mine] @ weights + bias
    return scores


def draw_pictures(sources: Iterable[Source], count: int, seed: int) -> Pictures:
    """Draw all pictures that the judge is fitted on.

    Args:
        sources: chest CTs.
        count: pictures of each CT.
        seed: of everything random.

    Raises:
        SettingsError: there is no CT.
    """
    pictures = Pictures([], [], [])
    for number, source in enumerate(sources):
        prepared = prepare_ct(source, VOXEL_MM)
        for kind, picture in draw_projections(prepared.materials, prepared.anatomy, count, [seed, number]):
            _show(pictures, picture, f"ct{number}", np.random.default_rng([seed, 1, len(pictures.chests)]), kind)
        logger.info("%s: %d pictures", source.name, len(pictures.chests))
    if not pictures.chests:
        raise SettingsError("no CT. Give at least one.")
    for number in range(4 * count):
        phantom = draw_phantom(number, 128)
        for picture in (phantom.cxr, phantom.soft_tissue):
            _show(pictures, picture, f"phantom {number}", np.random.default_rng([seed, 2, number]), "chest")
    logger.info("phantoms: %d pictures", len(pictures.chests))
    for number in range(20 * count):
        rng = np.random.default_rng([seed, 3, number])
        draw = OTHERS[number % len(OTHERS)]
        pictures.add(draw(rng), f"drawn {number}", chest=False)
    return pictures


def draw_projections(
    materials: Materials, anatomy: Anatomy, count: int, seed: list[int]
) -> Iterator[tuple[str, Image]]:
    """Yield projections of a CT: "chest" from the front, "side" from other directions, "below" of the abdomen."""
    sideways = Materials(*(np.ascontiguousarray(v.transpose(2, 1, 0)) for v in _list_maps(materials)))
    z, y, x = anatomy.size
    turned = Anatomy(
        (anatomy.spacing[0], anatomy.spacing[2], anatomy.spacing[1]),
        (z, x, y),
        (anatomy.lungs[0], anatomy.lungs[2], anatomy.lungs[1]),
        False,
    )
    for number in range(count):
        rng = np.random.default_rng([*seed, number])
        kind = ("chest", "side", "chest", "below")[number % 4]
        chosen, where = (sideways, turned) if kind == "side" else (materials, anatomy)
        framing = draw_framing(rng, where, PICTURE_PX, "mixed", "mixed", 1.3)
        pose, beam = framing.pose, framing.beam
        if kind == "side":
            pose = replace(pose, yaw=float(rng.uniform(-40, 40)))
        if kind == "below":
            lowest = float(np.interp(anatomy.lungs[0][0], framing.heights, np.arange(len(framing.heights))))
            side = float(rng.uniform(150, 260))
            middle = lowest * framing.spacing[0] + rng.uniform(-0.2, 0.15) * side
            pose = replace(pose, centre=(pose.centre[0] + rng.uniform(-60, 60), pose.centre[1], middle))
            beam = replace(beam, side_mm=side)
        soft, excess = project(_list_maps(chosen)[:2], framing.spacing, pose, beam, framing.heights)
        pixel_mm = beam.side_mm / PICTURE_PX
        logs = expose(soft, excess, draw_exposure(rng), pixel_mm, rng)
        cxr, soft_tissue = display(*logs, draw_display(rng), pixel_mm)
        yield kind, soft_tissue if rng.random() < 0.2 else cxr


def _list_maps(materials: Materials) -> list[NDArray[np.int16]]:
    return [materials.soft, materials.excess, materials.lungs]


def _show(pictures: Pictures, picture: Image, group: str, rng: np.random.Generator, kind: str) -> None:
    """Add a picture as it may be shown: cropped, turned a little, in another tone; and a chest also wrongly turned."""
    for _ in range(SHOWINGS if kind == "chest" else 3):
        shown = vary(picture, rng)
        pictures.add(shown, group, chest=kind == "chest")
    if kind != "chest":
        return
    for wrong in (np.rot90(picture), np.rot90(picture, -1), picture[::-1, ::-1], picture[::-1], 1 - picture):
        pictures.add(vary(np.ascontiguousarray(wrong), rng), group, chest=False)
    for _ in range(2):
        side = round(picture.shape[0] * rng.uniform(0.2, 0.4))
        top, left = rng.integers(0, picture.shape[0] - side, 2)
        pictures.add(picture[top : top + side, left : left + side], group, chest=False)


def vary(picture: Image, rng: np.random.Generator) -> Image:
    """Return a picture turned, cropped, stretched and with another tone, [KEPT_PX, KEPT_PX] in [0, 1]."""
    side = picture.shape[0]
    angle, zoom = np.deg2rad(np.clip(rng.normal(0, 4), -10, 10)), rng.uniform(0.82, 1.06) * side / KEPT_PX
    c, s = np.cos(angle) * zoom, np.sin(angle) * zoom
    turn = np.array([[c * rng.uniform(0.88, 1.12), -s], [s, c]])
    middle = side / 2 + rng.normal(0, 0.02, 2) * side
    matrix = np.hstack([turn, (middle - turn @ np.full(2, KEPT_PX / 2))[:, None]])
    smooth = cv2.GaussianBlur(picture, (0, 0), max(0.3, 0.4 * zoom))
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    shown = cv2.warpAffine(smooth, matrix, (KEPT_PX, KEPT_PX), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    if rng.random() < 0.3:  # a veil: effusion, or a scanner that saw one side brighter
        veil = cv2.resize(rng.uniform(0, 0.6, (3, 3)).astype(np.float32), (KEPT_PX, KEPT_PX))
        shown = shown + (1 - shown) * veil
    if rng.random() < 0.25:  # a collimator border that is not uniform, or a marker
        width = int(rng.integers(2, 10))
        edges = shown[:width], shown[-width:], shown[:, :width], shown[:, -width:]
        edges[rng.integers(4)][:] = rng.uniform(0, 1)
    noise = rng.normal(0, rng.uniform(0, 0.03), shown.shape)
    return np.asarray(np.clip(np.clip(shown, 0, 1) ** rng.uniform(0.6, 1.7) + noise, 0, 1), dtype=np.float32)


def draw_text(rng: np.random.Generator) -> Image:
    """Draw a page of text, dark on white or white on dark."""
    page = np.full((192, 192), round(rng.uniform(200, 255)), np.uint8)
    size = rng.uniform(0.25, 0.9)
    for line in range(int(rng.integers(3, 16))):
        words = "".join(rng.choice(list("abcdefghijklm nopqrs tuvwxyz  "), int(rng.integers(5, 40))))
        place = (int(rng.integers(0, 30)), int(12 + line * 24 * size + 4))
        cv2.putText(page, words, place, cv2.FONT_HERSHEY_SIMPLEX, size, round(rng.uniform(0, 80)), 1, cv2.LINE_AA)
    shown = page.astype(np.float32) / np.float32(255)
    return shown if rng.random() < 0.6 else 1 - shown


def draw_clouds(rng: np.random.Generator) -> Image:
    """Draw noise of every size, from fine grain to slopes over the whole picture."""
    total = np.zeros((KEPT_PX, KEPT_PX), np.float32)
    fall = rng.uniform(0.3, 1.6)
    for step in range(6):
        side = 2 + 3 * 2**step
        cells = rng.normal(0, 2.0 ** (-fall * step), (side, side)).astype(np.float32)
        total += cv2.resize(cells, (KEPT_PX, KEPT_PX), interpolation=cv2.INTER_CUBIC)
    low, high = total.min(), total.max()
    return np.asarray((total - low) / (high - low), dtype=np.float32)


def draw_scene(rng: np.random.Generator) -> Image:
    """Draw things before a background: ellipses, boxes and bars of any grey, with soft or sharp edges."""
    scene = draw_clouds(rng) * np.float32(rng.uniform(0.1, 0.8))
    for _ in range(int(rng.integers(1, 12))):
        grey = float(rng.uniform(0, 1))
        middle = tuple(int(v) for v in rng.integers(0, KEPT_PX, 2))
        axes = tuple(int(v) for v in rng.integers(3, 45, 2))
        layer = scene.copy()
        if rng.random() < 0.5:
            cv2.ellipse(layer, middle, axes, float(rng.uniform(0, 180)), 0, 360, grey, cv2.FILLED)
        else:
            box = cv2.boxPoints((middle, axes, float(rng.uniform(0, 180)))).astype(np.int32)
            cv2.fillPoly(layer, [box], grey)
        scene = layer
    return np.asarray(cv2.GaussianBlur(scene, (0, 0), rng.uniform(0.3, 3)), dtype=np.float32)


def draw_stripes(rng: np.random.Generator) -> Image:
    """Draw a pattern that repeats, such as bricks, a fence or a grid."""
    rows, columns = np.mgrid[0 : 2 * np.pi : KEPT_PX * 1j, 0 : 2 * np.pi : KEPT_PX * 1j]
    angle, waves, phase = rng.uniform(0, np.pi), rng.uniform(1.5, 20, 2), rng.uniform(0, 2 * np.pi, 2)
    along, across = np.cos(angle) * columns + np.sin(angle) * rows, np.cos(angle) * rows - np.sin(angle) * columns
    pattern = np.sin(waves[0] * along + phase[0])
    if rng.random() < 0.6:
        pattern = pattern + rng.uniform(0.3, 1) * np.sin(waves[1] * across + phase[1])
    pattern = np.clip(pattern * rng.uniform(0.3, 3), -1, 1) + rng.uniform(0, 2) * draw_clouds(rng)
    return np.asarray((pattern - pattern.min()) / np.ptp(pattern), dtype=np.float32)


def draw_flat(rng: np.random.Generator) -> Image:
    """Draw a blank or saturated picture with a slope, some noise or a patch."""
    grey = float(rng.choice([0.0, 1.0, rng.uniform(0, 1)]))
    picture = np.full((KEPT_PX, KEPT_PX), grey, np.float32)
    kind = rng.integers(3)
    if kind == 0:
        picture += rng.normal(0, rng.uniform(0.001, 0.1), picture.shape).astype(np.float32)
    elif kind == 1:
        slope = rng.normal(0, 0.3, 2)
        rows, columns = np.mgrid[0 : 1 : KEPT_PX * 1j, 0 : 1 : KEPT_PX * 1j]
        picture += (slope[0] * rows + slope[1] * columns).astype(np.float32)
    else:
        top, left = rng.integers(0, KEPT_PX - 10, 2)
        picture[top : top + int(rng.integers(5, 60)), left : left + int(rng.integers(5, 60))] = 1 - grey
    return np.asarray(np.clip(picture, 0, 1), dtype=np.float32)


def draw_hand(rng: np.random.Generator) -> Image:
    """Draw the X-ray of a hand or a foot: five rows of bones in soft tissue, in any direction."""
    soft, bone = np.zeros((192, 192), np.float32), np.zeros((192, 192), np.float32)
    root = np.array([96.0, 150.0])
    width, spread, long = rng.uniform(10, 16), rng.uniform(8, 20), rng.uniform(22, 34)
    cv2.ellipse(soft, (96, 140), (int(rng.uniform(30, 45)), int(rng.uniform(30, 45))), 0, 0, 360, 1.0, cv2.FILLED)
    cv2.line(soft, (96, 140), (96, 191), 1.0, int(rng.uniform(35, 55)))
    for x in (86, 106):
        cv2.line(bone, (x, 160), (x, 191), 1.0, int(rng.uniform(10, 14)))
    for finger in range(5):
        angle = np.deg2rad((finger - 2) * spread + rng.normal(0, 3))
        along = np.array([np.sin(angle), -np.cos(angle)])
        start = root + np.array([(finger - 2) * rng.uniform(9, 13), -10.0])
        for part in range(4):
            end = start + along * long * (1.2, 1.0, 0.6, 0.45)[part]
            first, last = np.round(start).astype(int).tolist(), np.round(end).astype(int).tolist()
            cv2.line(soft, first, last, 1.0, round(2.0 * width - 2 * part))
            cv2.line(bone, first, last, 1.0, max(3, round(0.6 * width - part)))
            start = end + along * 2
    shown = cv2.GaussianBlur(soft, (0, 0), 4) * rng.uniform(0.3, 0.6) + cv2.GaussianBlur(bone, (0, 0), 1.5) * 0.4
    turn = cv2.getRotationMatrix2D((96, 96), float(rng.uniform(0, 360)), float(rng.uniform(0.8, 1.2)))
    shown = cv2.warpAffine(shown, turn, (192, 192))
    return np.asarray(np.clip(shown + rng.normal(0, 0.01, shown.shape), 0, 1), dtype=np.float32)


OTHERS = (draw_text, draw_clouds, draw_scene, draw_stripes, draw_scene, draw_flat, draw_hand)
