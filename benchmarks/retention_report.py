"""Figures and pictures of benchmarks.retention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.retention_cases import Image, Wanted
from benchmarks.table1 import bootstrap_interval
from bsdiff_rt.files import write_atomically
from bsdiff_rt.tables import print_table

UNTOUCHED = "X-ray"  # the method that returns its input
LOST = 0.5  # less kept is lost
WORST = 10
CROP_PX = 160


@dataclass(frozen=True)
class Kept:
    """What one method kept of one insert.

    Attributes:
        method, group, image: of what, in which set, in which X-ray.
        wanted, place: the insert and what lies behind it.
        kept: 1 as it was, 0 gone.
        gain: contrast to noise in the result over that in the X-ray.
        crops: X-ray with it, results without and with it, around the insert; empty for most kinds.
    """

    method: str
    group: str
    image: str
    wanted: Wanted
    place: str
    kept: float
    gain: float
    crops: list[Image] = field(default_factory=list)


def is_nodule(one: Kept) -> bool:
    """Return whether the insert is a nodule, smooth or spiculated."""
    return "nodule" in one.wanted.kind


# What rows there are: a name for each part of the inserts that a function puts them into; None is in none.
PARTS: dict[str, Callable[[Kept], str | None]] = {
    "kind": lambda one: "nodules, all" if is_nodule(one) else one.wanted.kind,
    "nodules by shape": lambda one: one.wanted.kind if is_nodule(one) else None,
    "size": lambda one: f"{'nodule' if is_nodule(one) else one.wanted.kind}, {one.wanted.size:g} mm",
    "nodules by contrast": lambda one: f"nodule, contrast {one.wanted.contrast:g}" if is_nodule(one) else None,
    "nodules by place": lambda one: f"nodule, {one.place}" if is_nodule(one) else None,
}


def summarise(found: list[Kept], seed: int) -> list[dict[str, Any]]:
    """Return a row for each method, set and part: mean, interval over X-rays, share that lost half, worst, gain."""
    parts: dict[tuple[str, str, str, str], list[Kept]] = {}
    for one in found:
        for by, name_of in PARTS.items():
            if one.method == UNTOUCHED and by != "kind":  # it keeps everything: shown once as a check
                continue
            if (name := name_of(one)) is not None:
                parts.setdefault((one.method, one.group, by, name), []).append(one)
    rows = []
    for (method, group, by, name), some in parts.items():
        kept, images = [one.kept for one in some], [one.image for one in some]
        lost = [float(one.kept < LOST) for one in some]
        row = {"method": method, "set": group, "by": by, "part": name, "inserts": len(some)}
        row |= {"kept": float(np.mean(kept)), "kept_interval": bootstrap_interval(kept, images, seed)}
        row |= {"lost_half": float(np.mean(lost)), "lost_half_interval": bootstrap_interval(lost, images, seed)}
        row |= {"fifth_percentile": float(np.percentile(kept, 5))}
        gains = np.log([max(one.gain, 1e-3) for one in some])
        row |= {"contrast_to_noise_gain": float(np.exp(gains.mean()))}
        rows.append(row)
    order = list(PARTS)
    return sorted(rows, key=lambda row: (row["set"], row["method"], order.index(str(row["by"])), str(row["part"])))


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    header = ("set", "method", "insert", "number", "kept", "95 % interval", "lost half", "5th percentile", "gain")
    cells = []
    for row in rows:
        between = row["kept_interval"]
        cells.append(
            [
                row["set"],
                row["method"],
                row["part"],
                str(row["inserts"]),
                f"{row['kept']:.3f}",
                f"{between[0]:.3f} to {between[1]:.3f}" if between else "",
                f"{100 * row['lost_half']:.1f} %",
                f"{row['fifth_percentile']:.3f}",
                f"{row['contrast_to_noise_gain']:.2f}",
            ]
        )
    print_table(header, cells)


def write_picture(path: Path, found: list[Kept]) -> None:
    """Write the nodules that lost most, a row each: X-ray with it, result without, result with, twice the response."""
    worst = sorted((one for one in found if one.crops), key=lambda one: one.kept)[:WORST]
    rows = []
    for one in worst:
        cxr, plain, changed = one.crops
        low, high = float(cxr.min()), max(float(cxr.max()), float(cxr.min()) + 0.05)
        tiles = [(image - low) / (high - low) for image in (cxr, plain, changed)]
        tiles.append(0.5 + 2 * (changed - plain) / (high - low))
        row = np.hstack([cv2.resize(np.clip(tile, 0, 1), (CROP_PX, CROP_PX)) for tile in tiles])
        text = f"{one.method[-12:]} {one.wanted.size:g} mm {one.wanted.contrast:g} {one.place}: {one.kept:.2f}"
        strip = np.zeros((18, row.shape[1]), np.uint8)
        cv2.putText(strip, text, (4, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.4, 255)
        rows += [strip, (row * 255).astype(np.uint8)]
    ok, data = cv2.imencode(".png", np.vstack(rows))
    assert ok
    write_atomically(path, data.tobytes())
