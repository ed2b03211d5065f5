"""The phantoms that a model is trained on, drawn once and kept in its folder, and those that no training uses."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.errors import SettingsError, one_line
from train.data import Pair
from train.phantoms import draw_phantom

logger = logging.getLogger(__name__)

HELD_OUT_PHANTOM_SEED = 10_000_000  # no training uses phantoms from this seed on
ROUNDING = 1  # largest difference of a phantom's pixel between two processors, of 255 grey levels
LOG_EVERY_S = 30.0


def load_phantom_pool(folder: Path, count: int, size: int) -> NDArray[np.uint8]:
    """Return phantoms 0 to `count` - 1 from a file in `folder`, after drawing the ones it lacks.

    Args:
        folder: of the training run.
        count: number of phantoms.
        size: side of the images, px.

    Returns:
        [count, 2, size, size] uint8: X-ray and soft-tissue image of each phantom.

    Raises:
        SettingsError: the file is damaged, or was drawn by another version of the generator.
    """
    path = folder / f"phantoms_{size}.npy"
    pool = _load(path) if path.exists() else np.empty((0, 2, size, size), np.uint8)
    if len(pool) and np.abs(pool[:1].astype(int) - _draw(0, size)).max() > ROUNDING:
        raise SettingsError(
            f"{path}: drawn by another version of the phantom generator. Continue this run with that version, or "
            "choose another folder, or remove this file."
        )
    if len(pool) < count:
        pool = np.concatenate([pool, np.stack(list(_draw_many(len(pool), count, size)))])
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npy")
        np.save(partial, pool)
        os.replace(partial, path)
    return pool[:count]


def draw_held_out_phantoms(count: int, size: int) -> list[Pair]:
    """Draw `count` phantoms of `size` px that no training uses."""
    logger.info("drawing %d held-out phantoms of %d px", count, size)
    phantoms = [draw_phantom(HELD_OUT_PHANTOM_SEED + i, size) for i in range(count)]
    return [Pair(f"phantom{i}", p.cxr, p.soft_tissue, p.soft_tissue) for i, p in enumerate(phantoms)]


def _load(path: Path) -> NDArray[np.uint8]:
    try:
        pool: NDArray[np.uint8] = np.load(path)
    except (EOFError, ValueError) as error:
        raise SettingsError(f"{path}: damaged ({one_line(error)}). Remove it, and it is drawn again.") from error
    return pool


def _draw_many(first: int, last: int, size: int) -> Iterator[NDArray[np.uint8]]:
    """Draw the phantoms of seeds `first` to `last` - 1, and log how far it is now and then."""
    logger.info("drawing %d phantoms of %d px", last - first, size)
    started = logged = time.monotonic()
    for seed in range(first, last):
        yield _draw(seed, size)
        now = time.monotonic()
        if now - logged > LOG_EVERY_S:
            logged, done = now, seed + 1 - first
            left_s = (now - started) / done * (last - seed - 1)
            logger.info("drew %d of %d phantoms, about %.0f s left", done, last - first, left_s)


def _draw(seed: int, size: int) -> NDArray[np.uint8]:
    """Draw one phantom: [2, size, size] uint8, X-ray and soft-tissue image."""
    phantom = draw_phantom(seed, size)
    return np.rint(np.stack([phantom.cxr, phantom.soft_tissue]) * 255).astype(np.uint8)
