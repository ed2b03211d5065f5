"""Pairs of X-ray and true soft-tissue image on which methods are judged."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.methods import read_picture
from bsdiff_rt.config import Preprocessing
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.formats import read_together
from bsdiff_rt.formats.radiograph import hash_grey
from bsdiff_rt.formats.raster import find_pairs
from bsdiff_rt.imaging.network_input import resize
from bsdiff_rt.imaging.one_image import Prepared, prepare

DATASET_FILE, DATASET_BITS = "dataset.json", 16  # written by `python -m train prepare`

Image = NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """One pair to judge on.

    Attributes:
        name: stem of its files, without `_cxr`.
        patient: name of the patient.
        prepared: the X-ray, ready for the model.
        soft_tissue: the truth, [H, W], float32, in [0, 1].
        bits_stored: depth of the X-ray, 8 to 16.
        noise_key: digest of the X-ray's pixels, which keys its noise as in `infer`.
        digest: the X-ray's entry in a bundle's `trained_on`.
    """

    name: str
    patient: str
    prepared: Prepared
    soft_tissue: Image
    bits_stored: int
    noise_key: bytes
    digest: str


def read_cases(folder: Path, part: str, prep: Preprocessing) -> list[Case]:
    """Read the pairs of a plain folder, or of one part of a prepared data set.

    In a plain folder each pair counts as a patient. Images of a prepared data set are equalised already, so they are
    only resized for the model.

    Args:
        folder: pairs NAME_cxr.*, NAME_soft_tissue.*, or a folder of `python -m train prepare`.
        part: train, val or test.
        prep: preprocessing of the model.

    Raises:
        SettingsError: no pair, a pair without its soft-tissue image, or a damaged record.
        InputRefused: a file is not an image that can be used.
        InputFailed: a file is missing, unreadable or damaged.
    """
    record = folder / DATASET_FILE
    if not record.is_file():
        return [_make_case(name, name, read_together(paths), prep, digest=None) for name, *paths in find_pairs(folder)]
    prep = replace(prep, clahe_clip_limit=0.0)
    cases = []
    for entry in _read_record(record, part):
        stem = folder / part / entry["name"]
        paths = [stem.with_name(f"{stem.name}{role}.png") for role in ("_cxr", "_soft_tissue")]
        pair = [read_picture(path, DATASET_BITS) for path in paths]
        cases.append(_make_case(entry["name"], entry["patient"], pair, prep, entry.get("digest")))
    return cases


def _read_record(record: Path, part: str) -> list[dict[str, Any]]:
    """Return the entries of one part of a prepared data set.

    Raises:
        SettingsError: the record is damaged, or the part is empty.
    """
    try:
        entries = [entry for entry in json.loads(record.read_text())["pairs"] if entry["part"] == part]
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{record}: not the record of a data set ({type(error).__name__})") from None
    if not entries:
        raise SettingsError(f"{record.parent}: no pairs in {part}")
    return entries


def _make_case(name: str, patient: str, pair: list[Any], prep: Preprocessing, digest: str | None) -> Case:
    cxr, truth = pair
    soft_tissue = resize(truth.cxr, cxr.cxr.shape)
    digest = digest or hash_grey(cxr.cxr).hex()[:16]  # as train/data.py does
    return Case(name, patient, prepare(cxr.cxr, prep), soft_tissue, cxr.bits_stored, cxr.pixel_digest, digest)


def count_training_images(trained_on: Iterable[str], cases: list[Case]) -> int:
    """Return how many of the cases are among the X-rays that a model was trained on.

    Args:
        trained_on: digests of X-rays.
        cases: the pairs.
    """
    known = set(trained_on)
    return sum(case.digest in known for case in cases)
