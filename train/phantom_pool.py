"""The phantoms a model is trained on, drawn once and kept beside it, and those that no training sees."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.errors import SettingsError, one_line
from train.data import Pair
from train.phantoms import phantom

logger = logging.getLogger(__name__)

HELD_OUT_PHANTOM_SEED = 10_000_000  # phantoms from here on are never trained on
DRY_RUN_PHANTOMS = 2
ROUNDING = 1  # grey levels of 255 that two processors may round a phantom's pixel apart


def phantom_pool(folder: Path, count: int, size: int, keep: bool = True) -> NDArray[np.uint8]:
    """Phantoms 0 .. count - 1, [N, 2, size, size] uint8; kept in `folder`, extended when more are asked for.

    Without `keep`, a few of them, and nothing is written.

    Raises:
        SettingsError: what is kept there is damaged, or was drawn by another version of the generator.
    """
    path = folder / f"phantoms_{size}.npy"
    count = count if keep else min(count, DRY_RUN_PHANTOMS)
    pool = _load(path) if path.exists() else np.empty((0, 2, size, size), np.uint8)
    if len(pool) and np.abs(pool[:1].astype(int) - _draw(range(1), size)).max() > ROUNDING:
        raise SettingsError(
            f"{path}: drawn by another version of the phantom generator; a training begun on it can be finished only "
            "with that version, a new one in another folder, or with this file removed"
        )
    if len(pool) < count:
        logger.info("making %d phantoms", count - len(pool))
        pool = np.concatenate([pool, _draw(range(len(pool), count), size)])
        if keep:
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial.npy")
            np.save(partial, pool)
            os.replace(partial, path)
    return pool[:count]


def _load(path: Path) -> NDArray[np.uint8]:
    try:
        pool: NDArray[np.uint8] = np.load(path)
    except (EOFError, ValueError) as error:
        raise SettingsError(f"{path}: damaged ({one_line(error)}); remove it, and it is drawn anew") from error
    return pool


def _draw(seeds: Iterable[int], size: int) -> NDArray[np.uint8]:
    """X-ray and soft tissue of each seed's phantom, [N, 2, size, size]."""
    drawn = (phantom(seed, size) for seed in seeds)
    return np.stack([np.rint(np.stack([each.cxr, each.soft_tissue]) * 255).astype(np.uint8) for each in drawn])


def held_out_phantoms(count: int, size: int) -> list[Pair]:
    """Phantoms that no training sees."""
    made = [phantom(HELD_OUT_PHANTOM_SEED + i, size) for i in range(count)]
    return [Pair(f"phantom{i}", p.cxr, p.soft_tissue, p.soft_tissue) for i, p in enumerate(made)]
