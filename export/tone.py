"""The tone of the scanner that made a set of pairs, for `infer --scanner-tone`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from bsdiff_rt.config import Preprocessing, ScannerTone
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.folder.evaluate import read_result
from bsdiff_rt.formats.raster import find_pairs, read_together
from bsdiff_rt.imaging.network_input import seen_by_networks
from bsdiff_rt.imaging.tone import tone_quantiles

QUANTILES = 25
DATASET_FILE, DATASET_BITS = "dataset.json", 16  # what `python -m train prepare` writes


def scanner_tone(folder: Path, prep: Preprocessing) -> ScannerTone:
    """What one scanner's pairs have in common.

    Args:
        folder: of NAME_cxr.png and NAME_soft_tissue.png; of a data set that `python -m train prepare` made, its train
            part.
        prep: how the networks see them.

    Raises:
        SettingsError: fewer than two pairs, or an X-ray without its soft tissue; or the means of the soft tissue vary
            more than what is taken from the X-rays' does, so that knowing the one would tell less than the networks
            know.
        InputRefused, InputFailed: a file that cannot be read.
    """
    found = find_pairs(folder)
    prepared = (folder.parent / DATASET_FILE).is_file()
    if prepared:  # equalised already
        prep = replace(prep, clahe_clip_limit=0.0)
    if len(found) < 2:
        raise SettingsError(f"--tone {folder}: one pair; it takes two or more to see what they share")
    quantiles, means = [], []
    for _, *paths in found:
        images = [read_result(path, DATASET_BITS) for path in paths] if prepared else read_together(paths)
        cxr, soft_tissue = (seen_by_networks(image, prep) for image in images)
        quantiles.append(tone_quantiles(cxr, QUANTILES))
        means.append((cxr.mean(dtype=np.float64), soft_tissue.mean(dtype=np.float64)))
    soft_tissue_means = np.array([mean for _, mean in means])
    spread, taken = soft_tissue_means.std(), np.array([x - mean for x, mean in means]).std()
    if spread >= taken:
        raise SettingsError(
            f"--tone {folder}: soft-tissue means vary by {spread:.4f}, those of X-ray less soft tissue by "
            f"{taken:.4f}; this scanner does not equalise each image on its own, leave --tone out"
        )
    cxr_quantiles = tuple(round(float(value), 4) for value in np.mean(quantiles, axis=0))
    return ScannerTone(cxr_quantiles, round(float(soft_tissue_means.mean()), 4))
