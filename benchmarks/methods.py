"""Folders with the results of any method, given as `--method NAME=FOLDER` and matched with X-rays by stem."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from bsdiff_rt.errors import BsdiffError, SettingsError
from bsdiff_rt.folder.evaluate import list_by_name
from bsdiff_rt.formats import read
from bsdiff_rt.formats.radiograph import Radiograph


def parse_methods(texts: Sequence[str]) -> dict[str, Path]:
    """Return the folder of each method.

    Args:
        texts: values of `--method`, each NAME=FOLDER.

    Raises:
        SettingsError: a value of another form, or a name that is used twice.
    """
    folders: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise SettingsError(f"{text}: give it as NAME=FOLDER", setting="method")
        if name in folders:
            raise SettingsError(f"{name}: two methods have this name; give each another one", setting="method")
        folders[name] = Path(folder)
    return folders


def match_results(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Return the result of each X-ray in a method's folder. All must be there, so that means are of the same images.

    Args:
        folder: results with the stems of the X-rays; `_cxr` and `_soft_tissue` at the end of a stem do not count.
        names: stems of the X-rays.

    Raises:
        SettingsError: the folder does not exist, or a result is missing.
    """
    names = list(names)
    files = list_by_name(folder, "_soft_tissue")
    if missing := [name for name in names if name not in files]:
        raise SettingsError(f"{folder}: no result for {missing[0]} ({len(missing)} of {len(names)} missing)")
    return {name: files[name] for name in names}


def read_picture(path: Path, least_bits: int = 8) -> Radiograph:
    """Read an X-ray or a result. An error names the file.

    Args:
        path: the file.
        least_bits: the smallest depth of a 16-bit file without a stated depth, such as the depth of its X-ray.

    Raises:
        InputRefused: the file is not a picture that can be used.
        InputFailed: the file is missing, unreadable or damaged.
    """
    try:
        return read(path, any_view=True, derived=True, least_bits=least_bits)
    except BsdiffError as error:
        raise type(error)(f"{path}: {error}") from error
