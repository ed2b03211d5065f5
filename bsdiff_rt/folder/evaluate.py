"""Compare results with true soft-tissue images, matched by file name: the command `evaluate`. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsdiff_rt import formats
from bsdiff_rt.bundle import Bundle, list_bundles, open_bundle
from bsdiff_rt.errors import BsdiffError, BundleError, SettingsError
from bsdiff_rt.files import parse_json
from bsdiff_rt.folder.report import FILE_NAME, MAPS, PREVIEW
from bsdiff_rt.folder.search import is_input, strip_suffix
from bsdiff_rt.formats.radiograph import hash_grey
from bsdiff_rt.imaging.lungs import find_lungs
from bsdiff_rt.imaging.metrics import Quality, quality
from bsdiff_rt.imaging.network_input import place, resize
from bsdiff_rt.urls import on_disk

SIZE_PX = 256  # the longer side at which the paper's figures are measured
ASPECT_TOLERANCE = 1.02  # ratio of the aspect ratios of two images that are still compared
MASK_ABOVE = 0.5  # grey level of a pixel that belongs to a mask
DIGEST_DIGITS = 16  # of an X-ray's digest in a bundle's `trained_on`

_ROLES = re.compile(r"_(cxr|soft_tissue)$")


@dataclass(frozen=True)
class Match:
    """The three files of one image.

    Attributes:
        name: file name without suffix and role.
        predicted: result of `infer`.
        soft_tissue: true soft-tissue image.
        cxr: the X-ray the result was made from.
    """

    name: str
    predicted: Path
    soft_tissue: Path
    cxr: Path


@dataclass(frozen=True)
class Outcome:
    """The comparison of one image.

    Attributes:
        name: see `Match`.
        quality: the figures; None if they could not be computed.
        error: the reason why not: InputRefused or InputFailed for a file that cannot be read, SettingsError for images
            that differ in aspect ratio.
        trained_on: whether the model was trained on this X-ray.
    """

    name: str
    quality: Quality | None = None
    error: BsdiffError | None = None
    trained_on: bool = False


def match(predicted: Path, soft_tissue: Path, cxr: Path) -> list[Match]:
    """Match files or folders by stem.

    A trailing _cxr or _soft_tissue is not part of the stem. If files of both kinds lie in one folder, it tells them
    apart.

    Raises:
        SettingsError: a path does not exist, a result has no true image or X-ray, or there is nothing to compare.
    """
    if predicted.is_file() and soft_tissue.is_file() and cxr.is_file():
        return [Match(_get_name(predicted), predicted, soft_tissue, cxr)]
    predictions = list_by_name(predicted, "")
    truths, sources = list_by_name(soft_tissue, "_soft_tissue"), list_by_name(cxr, "_cxr")
    for name, file in predictions.items():
        if name not in truths:
            raise SettingsError(f"{file}: no soft-tissue image named {name} in {soft_tissue}.")
        if name not in sources:
            raise SettingsError(f"{file}: no X-ray named {name} in {cxr}.")
    if not predictions:
        raise SettingsError(f"{predicted}: no image to evaluate.")
    return [Match(name, file, truths[name], sources[name]) for name, file in predictions.items()]


def evaluate(
    matches: list[Match], size: int = SIZE_PX, known: Collection[str] = (), *, lungs: bool = False
) -> Iterator[Outcome]:
    """Compare each result with the truth.

    Args:
        matches: from `match`.
        size: every image is first resized to this many px on its longer side.
        known: digests of the X-rays that the model was trained on (`read_trained_on`).
        lungs: count only the lung fields (`load_lungs`), for truths that are right only there.
    """
    for one in matches:
        try:
            paths = one.cxr, one.soft_tissue, one.predicted
            images = [each.cxr for each in formats.read_together(paths, any_view=True, derived=True)]
            # The digest belongs to the X-ray at its own matrix, as training read it.
            trained_on = bool(known) and hash_grey(images[0]).hex()[:DIGEST_DIGITS] in known
            mask = load_lungs(one.cxr.parent / f"{one.name}_lungs.png", images[0]) if lungs else None
            yield Outcome(one.name, _compare(one.name, images, size, mask), trained_on=trained_on)
        except BsdiffError as error:
            yield Outcome(one.name, error=error)


def read_trained_on(results: Path, bundle: str | None = None) -> frozenset[str] | None:
    """Return digests of the X-rays that the model behind some results was trained on.

    Args:
        results: a folder written by `infer`, or a file in it.
        bundle: name or folder of the model. None takes the one that the folder's report.json names, if it is one of
            those shipped with this package.

    Returns:
        The digests; empty if the bundle states none; None if the model is not known.

    Raises:
        BundleError: `bundle` cannot be opened.
    """
    model = open_bundle(bundle) if bundle is not None else _find_bundle(results)
    return None if model is None else frozenset(map(str, model.manifest.training.get("trained_on", ())))


def read_result(path: Path, bits_stored: int) -> NDArray[np.float32]:
    """Return a result of `infer` on the grey scale of its X-ray, [H, W], float32, in [0, 1].

    A 16-bit PNG file does not state its depth. By itself it is read with the smallest depth that holds its values, so a
    result darker than half the X-ray's range would appear twice as bright.

    Args:
        path: the result.
        bits_stored: depth of the X-ray, 8 to 16.

    Raises:
        InputRefused, InputFailed: the file cannot be read. The message names it.
    """
    try:
        with on_disk(path) as file:
            return formats.read(file, any_view=True, derived=True, least_bits=bits_stored).cxr
    except BsdiffError as error:
        raise type(error)(f"{path}: {error}") from error


def list_by_name(path: Path, role: str) -> dict[str, Path]:
    """List the images of a folder by stem without role; or a file alone.

    Previews and maps are left out. If some files are labelled with `role`, only these are listed.

    Raises:
        SettingsError: the path does not exist, or two files have the same name.
    """
    if not path.exists():
        raise SettingsError(f"{path}: no such file or folder.")
    if path.is_file():
        return {_get_name(path): path}
    files = [file for file in sorted(path.rglob("*")) if is_input(file) and file.name != PREVIEW]
    files = [file for file in files if not {*MAPS} & {*file.relative_to(path).parts}]
    if role and (labelled := [file for file in files if strip_suffix(file).endswith(role)]):
        files = labelled
    named: dict[str, Path] = {}
    for file in files:
        if _get_name(file) in named:
            raise SettingsError(
                f"{file} and {named[_get_name(file)]} have the same stem. Put them in different folders."
            )
        named[_get_name(file)] = file
    return named


def _get_name(path: Path) -> str:
    return _ROLES.sub("", strip_suffix(path))


def _find_bundle(results: Path) -> Bundle | None:
    """Return the shipped bundle that the report beside some results names, or None."""
    folder = results if results.is_dir() else results.parent
    try:
        content: Any = parse_json((folder / FILE_NAME).read_text(encoding="utf-8"))
        digest = content["bundle"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for name in list_bundles():
        try:
            bundle = open_bundle(name)
        except BundleError:
            continue
        if bundle.sha256 == digest:
            return bundle
    return None


def load_lungs(path: Path, cxr: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return the lung fields of an X-ray: those of a mask file if there is one, else found in the X-ray.

    Args:
        path: where the mask would be; lungs are white in it.
        cxr: the X-ray, [H, W], float32, in [0, 1].

    Returns:
        [H, W] bool.

    Raises:
        SettingsError: the mask cannot be read or has another shape, or the lungs were not found.
    """
    try:
        mask = formats.read(path, any_view=True).cxr > MASK_ABOVE if path.exists() else find_lungs(cxr)
    except BsdiffError as error:
        raise SettingsError(f"{error}. Give the lung fields as {path.name}.") from error
    if mask.shape != cxr.shape:
        raise SettingsError(f"{path}: {mask.shape[0]} x {mask.shape[1]} px, but its X-ray has another size.")
    return mask


def _compare(
    name: str, images: list[NDArray[np.float32]], size: int, lungs: NDArray[np.bool_] | None = None
) -> Quality:
    """Return the figures of one image: X-ray, truth and result, each [H, W], float32, in [0, 1], of any sizes."""
    ratios = [image.shape[0] / image.shape[1] for image in images]
    if max(ratios) / min(ratios) > ASPECT_TOLERANCE:
        shapes = ", ".join(f"{rows} x {columns}" for rows, columns in (image.shape for image in images))
        raise SettingsError(f"{name}: X-ray, truth and result differ in aspect ratio ({shapes}).")
    placement = place(images[0].shape, size)
    shape = placement.height, placement.width
    cxr, soft_tissue, result = (np.clip(resize(image, shape), 0, 1) for image in images)
    mask = None if lungs is None else resize(lungs.astype(np.float32), shape) > MASK_ABOVE
    return quality(cxr, soft_tissue, result, mask)
