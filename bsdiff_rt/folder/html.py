"""Write report.html: one page with a card for each file of a run, to be opened without a network. Torch-free.

The page is report_page.html with two gaps filled: the pictures, and what the page's program reads from the report.
Pictures are written one file at a time, so that a run of any length needs the memory of a few X-rays.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from bsdiff_rt.errors import BsdiffError
from bsdiff_rt.files import open_atomically
from bsdiff_rt.folder.pictures import BONE_GAIN, DEVIATION_SHOWN, Pictures, draw_bone, draw_deviation, read_pictures
from bsdiff_rt.folder.reading import READERS, read_ahead
from bsdiff_rt.folder.report import PAGE, FileEntry, Report
from bsdiff_rt.imaging.network_input import place, resize
from bsdiff_rt.urls import is_url, to_path

logger = logging.getLogger(__name__)

TEMPLATE = "report_page.html"
SIDE_PX = 512  # longer side of an embedded picture
QUALITY = 85  # of WebP, 0 to 100
TITLES = {
    "compare": "X-ray | soft tissue",
    "xray": "X-ray",
    "soft": "Soft tissue",
    "bone": f"Bone, brightened {BONE_GAIN:g} times",
    "deviation": f"Deviation, red: {DEVIATION_SHOWN:.0%} or more",
    "retention": "Red: nodules fade",
}
STATUSES = ("ok", "skipped", "refused", "failed")
BROWSER_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})  # what every browser shows


def write_page(report: Report, folder: Path) -> None:
    """Write report.html into the output folder of a finished run.

    Finished files of earlier runs are shown as well, because every picture is read from the folder. If the page cannot
    be written, a warning says so: the results do not depend on it.
    """
    try:
        with open_atomically(folder / PAGE) as file:
            for part in make_page(report, folder):
                # Bytes of a file name that are no text become JSON's escapes.
                file.write(part.encode("utf-8", "backslashreplace"))
    except OSError as error:
        logger.warning("%s cannot be written (%s). The results do not depend on it.", PAGE, error.strerror)
        return
    logger.info("wrote %s with %d files", folder / PAGE, len(report.files))


def make_page(report: Report, folder: Path) -> Iterator[str]:
    """Yield the text of the page, one part for each file's pictures."""
    template = files("bsdiff_rt.folder").joinpath(TEMPLATE).read_text(encoding="utf-8")
    head, _, tail = template.replace("@SCRIPT_HASH@", _hash_script(template)).partition("@PICTURES@")
    yield head
    cards: list[dict[str, Any]] = []
    for card, pictures in read_ahead(partial(_make_card, folder), report.files, READERS):
        card["number"] = len(cards)
        for key, picture in pictures.items():
            yield f'<script type="text/plain" id="{key}-{card["number"]}">{picture}</script>\n'
        cards.append(card)
    counts = report.counts()
    content = {
        "titles": TITLES,
        "counts": {status: counts[status] for status in STATUSES if counts[status]},
        "facts": _list_facts(report),
        "cards": cards,
    }
    # `<` could end the script element that holds the text.
    yield tail.replace("@RUN@", json.dumps(content, ensure_ascii=False).replace("<", "\\u003c"))


def _make_card(folder: Path, entry: FileEntry) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what the page says of a file, and its pictures as data URIs by the keys of TITLES."""
    card: dict[str, Any] = {
        "name": entry.output or Path(entry.input).name,
        "status": entry.status,
        "reason": entry.reason,
        "warnings": list(entry.warnings),
        "facts": [],
        "source": _link(to_path(entry.input), folder),
        "result": None if entry.output is None else _link(folder / entry.output, folder),
        "pictures": [],
    }
    if entry.output is None:
        return card, {}
    try:
        pictures = read_pictures(folder, entry)
    except BsdiffError as error:  # changed since it was done
        card["warnings"].append(f"no pictures: {error}")
        return card, {}
    rows, columns = pictures.cxr.shape
    card["facts"] = [f"{rows} x {columns} px", f"{pictures.bits_stored} bits", f"{entry.seconds:.2f} s"]
    card["facts"] += describe_view(entry.view or {}, (rows, columns))
    kept = [(entry.retention or {}).get(key) for key in ("mean", "percentile_5")]
    if all(isinstance(share, float) for share in kept):
        card["facts"].append(f"small nodules keep {kept[0]:.0%}, 5% of them {kept[1]:.0%} or less")
    card["side_px"] = max(rows, columns)
    # A browser shows 16-bit files too dark and DICOM not at all. For these the embedded pictures have to do.
    suffixes = {Path(entry.input).suffix.lower(), Path(entry.output).suffix.lower()}
    card["full"] = pictures.bits_stored == 8 and suffixes <= BROWSER_SUFFIXES and card["source"] is not None
    small = _draw(pictures)
    card["pictures"] = list(small)
    return card, {key: _embed(picture) for key, picture in small.items()}


def describe_view(view: Mapping[str, float], shape: tuple[int, int]) -> list[str]:
    """Return what was changed of an X-ray before the model saw it, for a reader.

    Args:
        view: the report's entry (`View.to_report`).
        shape: of the X-ray, [rows, columns].
    """
    facts = []
    whole = {"top": 0, "bottom": shape[0], "left": 0, "right": shape[1], "gain": 1.0, "mark_pixels": 0}
    top, bottom, left, right, gain, marks = (view.get(key, usual) for key, usual in whole.items())
    if (top, bottom, left, right) != (0, shape[0], 0, shape[1]):
        rows, columns = f"{top + 1:.0f}-{bottom:.0f}", f"{left + 1:.0f}-{right:.0f}"
        facts.append(f"borders hidden from the model: it saw rows {rows}, columns {columns}")
    if gain != 1.0:
        facts.append(f"grey levels spread {gain:.2f} times for the model")
    if marks:
        facts.append(f"{marks:.0f} px of text or markers hidden from the model")
    return facts


def _draw(pictures: Pictures) -> dict[str, NDArray[np.float32]]:
    """Return the embedded pictures, [h, w] or [h, w, 3] in the order BGR, in [0, 1]. None is enlarged."""
    at = place(pictures.cxr.shape, min(SIDE_PX, max(pictures.cxr.shape)))
    shape = at.height, at.width
    cxr, soft_tissue = resize(pictures.cxr, shape), resize(pictures.soft_tissue, shape)
    drawn = {"xray": cxr, "soft": soft_tissue, "bone": draw_bone(cxr, soft_tissue)}
    if pictures.deviation is not None:
        drawn["deviation"] = draw_deviation(soft_tissue, resize(pictures.deviation, shape))
    if pictures.retention is not None:
        drawn["retention"] = np.dstack([resize(pictures.retention[..., channel], shape) for channel in range(3)])
    return drawn


def _embed(picture: NDArray[np.float32]) -> str:
    """Return a picture as the data URI of a WebP file."""
    values = np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    if values.ndim == 3:
        values = cv2.cvtColor(values, cv2.COLOR_BGR2RGB).astype(np.uint8)
    file = io.BytesIO()
    PillowImage.fromarray(values).save(file, "WEBP", quality=QUALITY, method=1)  # 0 is fastest, 6 slowest
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _link(path: Path, folder: Path) -> str | None:
    """Return the relative URL of a file from the output folder; None if there is no way, as between drives."""
    if is_url(path) or is_url(folder):
        return quote(path.relative_to(folder).as_posix()) if path.is_relative_to(folder) else None
    try:
        relative = os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
    except ValueError:
        return None
    return quote(os.fsencode(relative.replace(os.sep, "/")))


def _list_facts(report: Report) -> list[tuple[str, str]]:
    """Return the lines of the page's table: what made the results, and when."""
    environment = report.environment
    packages = ", ".join(f"{name} {version}" for name, version in environment.get("packages", {}).items())
    return [
        ("bsdiff-rt", report.bsdiff_rt),
        ("model", f"{report.bundle['name']} (SHA-256 {report.bundle['sha256']}), {report.bundle['licence']}"),
        ("settings", ", ".join(f"{name} {value}" for name, value in report.settings.items())),
        ("device", f"{environment.get('device')}, {environment.get('platform')}"),
        ("packages", packages),
        ("time", f"{report.started} to {report.ended}"),
        ("speed", f"{report.images_per_second:.2f} images/s"),
    ]


def _hash_script(template: str) -> str:
    """Return the hash by which the page's own program, and no other, may run in it (Content Security Policy)."""
    script = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)[0]
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
