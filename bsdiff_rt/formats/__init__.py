"""Files to X-rays and soft-tissue images to files. This is the only place that decides which format a file has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.errors import InputFailed, InputRefused, SettingsError
from bsdiff_rt.formats.base import Derivation, Format, ReadOptions, ResultToWrite
from bsdiff_rt.formats.dicom import DICOM
from bsdiff_rt.formats.radiograph import Radiograph
from bsdiff_rt.formats.raster import RASTER

# The registry. A new format is one module and one line here. The first one that recognises a file reads it.
FORMATS: tuple[Format, ...] = (DICOM, RASTER)

AUTO = "auto"  # the kind of result that fits the X-ray's own format
_FALLBACK = "png"  # for X-rays of a format that cannot be written


def read(path: Path, *, any_view: bool = False, derived: bool = False, least_bits: int = 8) -> Radiograph:
    """Read a chest X-ray of any known format. The content decides on the format, not the name.

    Args:
        path: the file.
        any_view: accept lateral views and other body parts, too.
        derived: accept results of this program, too. Use it to compare results, not to process them again.
        least_bits: the smallest depth of a file that does not state its own, 8 to 16.

    Returns:
        The X-ray, with warnings about what the reader had to assume.

    Raises:
        InputRefused: the file is readable, but not a chest X-ray that can be processed.
        InputFailed: the file is missing, unreadable, truncated or damaged.
    """
    found = find_format(path)
    if found is None:
        raise _describe_unknown(path)
    return found.read(path, ReadOptions(any_view, derived, least_bits))


def write(
    path: Path,
    picture: NDArray[np.float32],
    *,
    like: Radiograph,
    kind: str = AUTO,
    derivation: Derivation | None = None,
) -> None:
    """Write a soft-tissue image. The file appears whole or not at all.

    Args:
        path: the file; its folder exists.
        picture: [H, W], float32, in [0, 1].
        like: the X-ray that it belongs to. It gives the depth and, in DICOM, the header.
        kind: "auto", or one of `result_kinds()`.
        derivation: how the image was made; DICOM needs it.

    Raises:
        InputRefused: an X-ray of this format cannot have a result of this kind.
        InputFailed: the picture holds NaN or infinity, or the X-ray's header cannot be written again.
        SettingsError: the kind is unknown.
        OSError: the file cannot be written.
    """
    check_kind(kind, like)
    writer, kind = _find_writer(kind, _named(like.format))
    assert writer.write is not None
    writer.write(path, ResultToWrite(picture, like, kind, derivation))


def result_kinds() -> tuple[str, ...]:
    """Return every kind of result that can be written, without "auto"."""
    return tuple(kind for each in FORMATS for kind in each.kinds)


def result_suffix(kind: str, path: Path) -> str:
    """Return the suffix of the result of an X-ray file, before it is read.

    Args:
        kind: "auto", or one of `result_kinds()`.
        path: the X-ray.

    Raises:
        SettingsError: the kind is unknown.
    """
    return _find_writer(kind, find_format(path))[0].result_suffix


def check_kind(kind: str, like: Radiograph) -> None:
    """Raise InputRefused if an X-ray cannot have a result of this kind, SettingsError if the kind is unknown."""
    writer, kind = _find_writer(kind, _named(like.format))
    if writer.needs_source and like.format != writer.name:
        titles = " or ".join(writer.titles)
        raise InputRefused(f"a {titles} result needs a {titles} X-ray, whose patient and study it belongs to")


def find_format(path: Path) -> Format | None:
    """Return the format of a file by its content, else by its suffix; None if it is of no known format."""
    for each in FORMATS:
        if each.recognise(path):
            return each
    suffix = path.suffix.lower()
    return next((each for each in FORMATS if suffix in each.suffixes), None)


def is_candidate(path: Path) -> bool:
    """Return whether a file found in a folder should be read: by its suffix, or by content where names vary."""
    return has_known_suffix(path) or any(each.any_name and each.recognise(path) for each in FORMATS)


def has_known_suffix(path: Path) -> bool:
    """Return whether the file name ends with a suffix of a known format."""
    suffix = path.suffix.lower()
    return any(suffix in each.suffixes for each in FORMATS)


def _named(name: str) -> Format | None:
    return next((each for each in FORMATS if each.name == name), None)


def _find_writer(kind: str, source: Format | None) -> tuple[Format, str]:
    """Return the format that writes results of a kind, and the kind that "auto" stands for."""
    if kind == AUTO:
        kind = source.kinds[0] if source is not None and source.kinds else _FALLBACK
    writer = next((each for each in FORMATS if kind in each.kinds), None)
    if writer is None:
        raise SettingsError(f"unknown kind of result {kind!r}; use one of {', '.join((AUTO, *result_kinds()))}")
    return writer, kind


def _describe_unknown(path: Path) -> InputRefused | InputFailed:
    """Return the reason why a file of no known format or suffix cannot be read."""
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        return InputFailed(f"cannot be read: {error.strerror or type(error).__name__}")
    if empty:
        return InputFailed("the file is empty (0 bytes)")
    *others, last = sorted(title for each in FORMATS for title in each.titles)
    return InputRefused(f"not a {', '.join(others)} or {last} file")
