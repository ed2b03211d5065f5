"""Compare predictions with the truth, matched by stem: the command `evaluate`. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.errors import BsdiffError, SettingsError
from bsdiff_rt.folder.preview import FILE_NAME as PREVIEW
from bsdiff_rt.folder.tasks import UNCERTAINTY, is_input, stem_of
from bsdiff_rt.formats.dicom_in import is_dicom, read_dicom
from bsdiff_rt.formats.radiograph import Radiograph
from bsdiff_rt.formats.raster import read_raster
from bsdiff_rt.imaging.metrics import Quality, quality
from bsdiff_rt.imaging.network_input import place, resize

SIZE_PX = 256  # the longer side at which the paper's figures are taken

_ROLES = re.compile(r"_(cxr|soft_tissue)$")


@dataclass(frozen=True)
class Match:
    """The three files of one patient."""

    name: str
    predicted: Path
    soft_tissue: Path
    cxr: Path


def match(predicted: Path, soft_tissue: Path, cxr: Path) -> list[Match]:
    """Match files or folders by stem; a trailing _cxr or _soft_tissue does not count, and says which is which where
    both kinds lie in one folder.

    Raises:
        SettingsError: a path that is not there, a prediction without its truth or X-ray, or nothing to compare.
    """
    if predicted.is_file() and soft_tissue.is_file() and cxr.is_file():
        return [Match(_name(predicted), predicted, soft_tissue, cxr)]
    predictions = by_name(predicted, "")
    truths, sources = by_name(soft_tissue, "_soft_tissue"), by_name(cxr, "_cxr")
    for name, file in predictions.items():
        if name not in truths:
            raise SettingsError(f"{file}: no soft-tissue image named {name} in {soft_tissue}")
        if name not in sources:
            raise SettingsError(f"{file}: no X-ray named {name} in {cxr}")
    if not predictions:
        raise SettingsError(f"{predicted}: no image to evaluate")
    return [Match(name, file, truths[name], sources[name]) for name, file in predictions.items()]


def evaluate(matches: list[Match], size: int = SIZE_PX) -> Iterator[tuple[str, Quality | BsdiffError]]:
    """Name and quality of each match, with every image brought to `size` px on its longer side first.

    Where there is none, the reason: an InputRefused or InputFailed for a file that cannot be read, a SettingsError for
    images of one patient that differ in aspect ratio.
    """
    for one in matches:
        try:
            yield one.name, _compared(one, size)
        except BsdiffError as error:
            yield one.name, error


def _compared(one: Match, size: int) -> Quality:
    images = _pictures(one)
    ratios = [image.shape[0] / image.shape[1] for image in images]
    if max(ratios) / min(ratios) > 1.02:
        shapes = ", ".join(f"{rows} x {columns}" for rows, columns in (image.shape for image in images))
        raise SettingsError(f"{one.name}: X-ray, truth and prediction differ in aspect ratio ({shapes})")
    placement = place(images[0].shape, size)
    shape = placement.height, placement.width
    return quality(*(np.clip(resize(image, shape), 0, 1) for image in images))


def read_result(path: Path, bits_stored: int) -> NDArray[np.float32]:
    """A result of `infer` on the grey scale of its X-ray, [H, W], float32, in [0, 1].

    A 16-bit PNG does not say its depth. Read by itself, 1.0 is the largest value of the smallest depth that holds its
    values, and a result that stays below half its X-ray's range would come out twice as bright as it is.

    Args:
        path: the result.
        bits_stored: of the X-ray.

    Raises:
        InputRefused, InputFailed: it cannot be read; names the file.
    """
    return _read(path, bits_stored).cxr


def by_name(path: Path, role: str) -> dict[str, Path]:
    """Images of a folder by stem without role, or a file alone; where some are labelled with `role`, only those.

    Previews and maps of deviations are no results.

    Raises:
        SettingsError: no such file or folder, or two of one name.
    """
    if not path.exists():
        raise SettingsError(f"{path}: no such file or folder")
    if path.is_file():
        return {_name(path): path}
    files = [file for file in sorted(path.rglob("*")) if is_input(file) and file.name != PREVIEW]
    files = [file for file in files if UNCERTAINTY not in file.relative_to(path).parts]
    if role and (labelled := [file for file in files if stem_of(file).endswith(role)]):
        files = labelled
    named: dict[str, Path] = {}
    for file in files:
        if _name(file) in named:
            raise SettingsError(f"{file} and {named[_name(file)]} have the same stem; keep them apart")
        named[_name(file)] = file
    return named


def _name(path: Path) -> str:
    return _ROLES.sub("", stem_of(path))


def _pictures(one: Match) -> list[NDArray[np.float32]]:
    """X-ray, truth and prediction. Image files share the deepest one's grey scale; DICOM files say their own, and
    `infer --format png` writes at its DICOM source's depth."""
    paths = one.cxr, one.soft_tissue, one.predicted
    cxr, soft_tissue, _ = three = [_read(path) for path in paths]
    if cxr.dataset is not None:
        truth = soft_tissue.cxr if soft_tissue.dataset is not None else read_result(one.soft_tissue, cxr.bits_stored)
        return [cxr.cxr, truth, read_result(one.predicted, cxr.bits_stored)]
    deepest = max(picture.bits_stored for picture in three if picture.dataset is None)
    return [
        picture.cxr if picture.bits_stored == deepest else read_result(path, deepest)
        for path, picture in zip(paths, three, strict=True)
    ]


def _read(path: Path, at_least: int = 8) -> Radiograph:
    """A file of any kind; `at_least` as many bits if it is one that does not say its depth."""
    try:
        return read_dicom(path, any_view=True, derived=True) if is_dicom(path) else read_raster(path, at_least)
    except BsdiffError as error:
        raise type(error)(f"{path}: {error}") from error
