"""Read what a run shows of a finished file: X-ray, soft-tissue image and maps. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from bsdiff_rt import formats
from bsdiff_rt.errors import InputFailed
from bsdiff_rt.folder.evaluate import read_result
from bsdiff_rt.folder.report import RETENTION, UNCERTAINTY, FileEntry, locate_map
from bsdiff_rt.folder.retention_map import LINE_PX
from bsdiff_rt.urls import on_disk, to_path

BONE_GAIN = 2.0
DEVIATION_BITS = 16  # of a deviation map: 65535 is the whole range of grey levels
DEVIATION_SHOWN = 0.05  # a standard deviation of this share of the grey levels, or more, is shown in full red

Image = NDArray[np.float32]


@dataclass(frozen=True)
class Pictures:
    """The pictures of one finished file, as it lies in the output folder.

    Attributes:
        cxr: the X-ray, [H, W], float32, in [0, 1].
        soft_tissue: its result, on the same grey scale.
        deviation: standard deviation of several samples, [H, W], in [0, 1]; None if there is none.
        retention: the probe's picture without its line of text, [h, w, 3] in the order BGR, in [0, 1]; None without
            the probe.
        bits_stored: depth of X-ray and result, 8 to 16.
    """

    cxr: Image
    soft_tissue: Image
    deviation: Image | None
    retention: Image | None
    bits_stored: int


def read_pictures(folder: Path, entry: FileEntry) -> Pictures:
    """Read the pictures of one finished file.

    Args:
        folder: the output folder.
        entry: the file's entry in the report, with an output.

    Raises:
        InputRefused, InputFailed: one of the files is gone or has changed since it was written. The message names it.
    """
    with on_disk(to_path(entry.input), formats.MAX_FILE_BYTES) as file:
        radiograph = formats.read(file, any_view=True)
    soft_tissue = read_result(folder / str(entry.output), radiograph.bits_stored)
    deviation = retention = None
    if UNCERTAINTY in entry.maps:
        deviation = read_result(locate_map(folder, UNCERTAINTY, str(entry.output)), DEVIATION_BITS)
    if RETENTION in entry.maps:
        retention = _read_retention(locate_map(folder, RETENTION, str(entry.output)))
    return Pictures(radiograph.cxr, soft_tissue, deviation, retention, radiograph.bits_stored)


def draw_bone(cxr: Image, soft_tissue: Image) -> Image:
    """Return what was taken away, brightened, [H, W], in [0, 1]. It is black where nothing was, as in dual energy."""
    return np.asarray(np.clip((cxr - soft_tissue) * np.float32(BONE_GAIN), 0, 1), dtype=np.float32)


def draw_deviation(soft_tissue: Image, deviation: Image) -> Image:
    """Return the soft-tissue image with red where samples deviate, [H, W, 3] in the order BGR, in [0, 1]."""
    red = np.clip(deviation / np.float32(DEVIATION_SHOWN), 0, 1)[..., None]
    grey = cv2.cvtColor(soft_tissue, cv2.COLOR_GRAY2BGR)
    return np.asarray(grey * (1 - red) + red * np.array([0, 0, 1], np.float32), dtype=np.float32)


def _read_retention(path: Path) -> Image:
    with on_disk(path) as file:
        picture = cv2.imread(str(file), cv2.IMREAD_COLOR)
    if picture is None:
        raise InputFailed(f"{path}: missing or damaged")
    return np.asarray(picture[LINE_PX:], dtype=np.float32) / np.float32(255)
