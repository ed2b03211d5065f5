"""Files to X-rays and soft-tissue images to files. This is the only place that decides which format a file has."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.errors import InputFailed, InputRefused, SettingsError
from bsdiff_rt.formats.base import Derivation, Format, Identity, ReadOptions, ResultToWrite
from bsdiff_rt.formats.dicom import DICOM
from bsdiff_rt.formats.radiograph import Radiograph
from bsdiff_rt.formats.raster import RASTER

# The registry. A new format is one module and one line here. The first one that recognises a file reads it.
FORMATS: tuple[Format, ...] = (DICOM, RASTER)

AUTO = "auto"  # the kind of result that fits the X-ray's own format
MAX_FILE_BYTES = 1 << 30  # a larger file would not fit into memory, and no chest X-ray has so many
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
    with suppress(OSError):  # the reader says what is wrong
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise InputRefused(f"the file has {size >> 20} MB; at most {MAX_FILE_BYTES >> 20} MB are processed")
    return found.read(path, ReadOptions(any_view, derived, least_bits))


def read_together(paths: Sequence[Path], *, any_view: bool = False, derived: bool = False) -> list[Radiograph]:
    """Read pictures that share one grey scale: an X-ray and its soft-tissue images.

    A 16-bit image file does not state its depth. Read alone it gets the smallest depth that holds its values, so a dark
    picture would appear brighter than its partner. Here it gets the X-ray's depth. If the X-ray does not state its
    depth, either, all such files get that of the deepest one.

    Args:
        paths: the X-ray first.
        any_view: accept lateral views and other body parts, too.
        derived: accept results of this program, too.

    Returns:
        One picture a path.

    Raises:
        InputRefused, InputFailed: for the reasons that `read` lists. The message names the file.
    """

    def read_one(path: Path, least_bits: int = 8) -> Radiograph:
        try:
            return read(path, any_view=any_view, derived=derived, least_bits=least_bits)
        except (InputRefused, InputFailed) as error:
            raise type(error)(f"{path}: {error}") from error

    pictures = [read_one(path) for path in paths]
    states_depth = [_states_depth(picture) for picture in pictures]
    bits = [picture.bits_stored for picture in pictures]
    shared = bits[0] if states_depth[0] else max(b for b, stated in zip(bits, states_depth, strict=True) if not stated)
    return [
        picture if stated or picture.bits_stored >= shared else read_one(path, shared)
        for path, picture, stated in zip(paths, pictures, states_depth, strict=True)
    ]


def read_identity(path: Path) -> Identity:
    """Return the study and the patient that a file names. It never raises. Never write them anywhere."""
    found = find_format(path)
    return Identity() if found is None or found.identify is None else found.identify(path)


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
    writer, kind = _find_writer(kind, _find_by_name(like.format))
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
    writer, kind = _find_writer(kind, _find_by_name(like.format))
    if writer.needs_source and like.format != writer.name:
        titles = " or ".join(writer.titles)
        raise InputRefused(f"a {titles} result needs a {titles} X-ray, whose patient and study it belongs to")


def check_name(target: Path, kind: str, like: Radiograph) -> None:
    """Raise SettingsError if a result of this kind would lie in a file whose suffix says another format.

    Args:
        target: the file to write.
        kind: "auto", or one of `result_kinds()`.
        like: the X-ray that the result belongs to.
    """
    writer, _ = _find_writer(kind, _find_by_name(like.format))
    suffix = target.suffix.lower()
    if suffix != writer.result_suffix and any(suffix in each.suffixes for each in FORMATS):
        raise SettingsError(
            f"{target}: the result would be a {writer.result_suffix} file. Name it so, or give another format."
        )


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


def _find_by_name(name: str) -> Format | None:
    return next((each for each in FORMATS if each.name == name), None)


def _states_depth(picture: Radiograph) -> bool:
    source = _find_by_name(picture.format)
    return source is not None and source.states_depth


def _find_writer(kind: str, source: Format | None) -> tuple[Format, str]:
    """Return the format that writes results of a kind, and the kind that "auto" stands for."""
    if kind == AUTO:
        kind = source.kinds[0] if source is not None and source.kinds else _FALLBACK
    writer = next((each for each in FORMATS if kind in each.kinds), None)
    if writer is None:
        known = ", ".join((AUTO, *result_kinds()))
        raise SettingsError(f"unknown kind of result {kind!r}. Use one of {known}.", setting="format")
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
