"""The phantoms a model is trained on, drawn once and kept beside it, and those that no training sees."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.data import Pair
from train.phantoms import phantom

logger = logging.getLogger(__name__)

HELD_OUT_PHANTOM_SEED = 10_000_000  # phantoms from here on are never trained on
DRY_RUN_PHANTOMS = 2


def phantom_pool(folder: Path, count: int, size: int, keep: bool = True) -> NDArray[np.uint8]:
    """Phantoms 0 .. count - 1, [N, 2, size, size] uint8; kept in `folder`, extended when more are asked for.

    Without `keep`, a few of them, and nothing is written.
    """
    path = folder / f"phantoms_{size}.npy"
    count = count if keep else min(count, DRY_RUN_PHANTOMS)
    pool = np.load(path) if path.exists() else np.empty((0, 2, size, size), np.uint8)
    if len(pool) < count:
        logger.info("making %d phantoms", count - len(pool))
        new = [phantom(seed, size) for seed in range(len(pool), count)]
        stacked = np.stack([np.stack([p.cxr, p.soft_tissue]) for p in new])
        pool = np.concatenate([pool, np.rint(stacked * 255).astype(np.uint8)])
        if keep:
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial.npy")
            np.save(partial, pool)
            os.replace(partial, path)
    return pool[:count]


def held_out_phantoms(count: int, size: int) -> list[Pair]:
    """Phantoms that no training sees."""
    made = [phantom(HELD_OUT_PHANTOM_SEED + i, size) for i in range(count)]
    return [Pair(f"phantom{i}", p.cxr, p.soft_tissue, p.soft_tissue) for i, p in enumerate(made)]
