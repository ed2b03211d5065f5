"""PNG, JPEG and TIFF in the registry of formats: read grey pictures, write PNG. Torch-free."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.errors import InputFailed, SettingsError
from bsdiff_rt.files import write_atomically
from bsdiff_rt.formats.base import Format, ReadOptions, ResultToWrite
from bsdiff_rt.formats.radiograph import Radiograph, from_pixels, to_stored
from bsdiff_rt.formats.raster_decode import STARTS, decode_grey

RASTER_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff"})


def read_raster(path: Path, at_least: int = 8) -> Radiograph:
    """Read a grey picture of 8 or 16 bits. Grey saved as RGB, as RGBA or with a palette is taken as grey.

    An 8-bit file has 8 bits stored. A 16-bit file does not state its depth. It gets the smallest depth of 8 to 16 bits
    that holds its values apart from stray ones, because X-rays of 8 to 15 bits are often saved in 16 without scaling.
    1.0 is the largest value of that depth, and of everything above.

    Args:
        path: the file.
        at_least: smallest depth of a 16-bit file, in bits, if it is known: the picture may be darker than its range.

    Returns:
        The X-ray, with warnings.

    Raises:
        InputRefused: not PNG, JPEG or TIFF, or not a single, upright, grey picture of 8 or 16 bits.
        InputFailed: unreadable, truncated or damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputFailed(f"cannot be read: {error.strerror or type(error).__name__}") from error
    if not content:
        raise InputFailed("the file is empty (0 bytes)")
    grey, warnings = decode_grey(content)
    return replace(from_pixels(grey, at_least), warnings=tuple(warnings))


def find_pairs(folder: Path) -> list[tuple[str, Path, Path]]:
    """Return name, X-ray and soft-tissue image of every pair NAME_cxr.* and NAME_soft_tissue.* in a folder, by name.

    Raises:
        SettingsError: no pair there, or an X-ray without its soft-tissue image.
    """
    pairs = []
    images = [path for path in sorted(folder.glob("*")) if path.suffix.lower() in RASTER_SUFFIXES]
    for cxr in (path for path in images if path.stem.endswith("_cxr")):
        name = cxr.stem.removesuffix("_cxr")
        partners = [path for path in images if path.stem == f"{name}_soft_tissue"]
        if len(partners) != 1:
            raise SettingsError(f"{cxr}: expected one file {name}_soft_tissue.*, found {len(partners)}")
        pairs.append((name, cxr, partners[0]))
    if not pairs:
        raise SettingsError(f"{folder}: no pairs NAME_cxr.png / NAME_soft_tissue.png found")
    return pairs


def write_png(path: Path, soft_tissue: NDArray[np.float32], bits_stored: int) -> None:
    """Write a result as PNG: 8 bits for an 8-bit source, else 16 bits with values up to 2**bits_stored - 1.

    So the result of a 12-bit source saved in 16 bits has the source's range and can be overlaid. The file appears whole
    or not at all.

    Args:
        path: the file; its folder exists.
        soft_tissue: [H, W], float32, in [0, 1].
        bits_stored: the source's, 8 to 16.

    Raises:
        InputFailed: the result is not an image.
        OSError: the file cannot be written.
    """
    done, encoded = cv2.imencode(".png", to_stored(soft_tissue, bits_stored))
    if not done:
        raise InputFailed("the result could not be encoded as PNG")
    write_atomically(path, encoded.tobytes())


def _recognise(path: Path) -> bool:
    """Return whether a file begins as a PNG, JPEG or TIFF file does; False if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(8).startswith(STARTS)
    except OSError:
        return False


def _read(path: Path, options: ReadOptions) -> Radiograph:
    return read_raster(path, options.least_bits)


def _write(path: Path, result: ResultToWrite) -> None:
    write_png(path, result.picture, result.like.bits_stored)


RASTER = Format(
    name="raster",
    titles=("PNG", "JPEG", "TIFF"),
    suffixes=RASTER_SUFFIXES,
    recognise=_recognise,
    read=_read,
    kinds=("png",),
    result_suffix=".png",
    write=_write,
)
