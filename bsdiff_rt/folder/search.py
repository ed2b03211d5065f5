"""Find the X-rays in what the user named: files are taken as they are, folders are searched. Torch-free."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import cv2

from bsdiff_rt.errors import BsdiffError, SettingsError
from bsdiff_rt.folder.earlier import Named, find_named
from bsdiff_rt.folder.journal import LONG
from bsdiff_rt.folder.report import FILE_NAME
from bsdiff_rt.formats import find_format, has_known_suffix, is_candidate
from bsdiff_rt.formats.base import Format
from bsdiff_rt.formats.dicom import DICOM
from bsdiff_rt.urls import (
    head_on_disk,
    is_dir,
    is_file,
    is_url,
    lexists,
    on_disk,
    read_heads_ahead,
    resolve,
    to_path,
    walk,
)

logger = logging.getLogger(__name__)

STALE = ".stale"  # suffix of an outdated result that was renamed (ledger.py)

# Images, and archives that may hold images, that no reader here takes. A folder of them looks like one of X-rays.
_OTHER = (
    "7z avif bmp bz2 dng exr fits gif gz h5 hdf5 hdr heic heif ico img j2c j2k jls jp2 jpf jpx jxl mat mha mhd nii npy "
    "npz nrrd pbm pgm pnm ppm psd rar raw tar tga tgz vtk webp xz zip zst"
)
OTHER_SUFFIXES = frozenset(f".{suffix}" for suffix in _OTHER.split())
_PACKED = (".gz", ".bz2", ".xz", ".zst")  # the suffix before such a one says what is inside
# How files begin that are images under a name without a known suffix.
_SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "PNG without .png",
    b"\xff\xd8\xff": "JPEG without .jpg",
    b"II*\x00": "TIFF without .tif",
    b"MM\x00*": "TIFF without .tif",
    b"GIF8": "GIF",
    b"\x00\x00\x00\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\x93NUMPY": "NumPy array",
}

ICON_PX = 128  # beside DICOM files, a picture with both sides shorter than this is part of a viewer
_ICON_BYTES = 1 << 18  # a larger file is no such picture, so it need not be decoded to know


@dataclass(frozen=True)
class Found:
    """A file to process, or a path that cannot be processed.

    Attributes:
        file: the path.
        given: the input it was found under: the file itself, or a folder.
        relative: its path relative to that folder; None if it cannot be processed.
        refusal: the reason why not; None normally.
    """

    file: Path
    given: Path
    relative: Path | None
    refusal: str | None = None


def find_files(inputs: Iterable[Path], output: Path) -> Iterator[Found]:
    """Yield every file to process, in the order given; folders in sorted order, with everything below them.

    In a folder, files with the suffix of a known format are taken, and files of formats that are common under any name
    (DICOM). Left out are hidden files, results of earlier runs in folders below, and the output folder. A file that
    the user names is always taken.

    Args:
        inputs: files and folders (`check_inputs`).
        output: the output folder; it need not exist.
    """
    for given in inputs:
        if is_dir(given):
            yield from _search(given, output)
        else:
            yield Found(given, given, Path(given.name))


def check_inputs(inputs: Iterable[Path], output: Path) -> None:
    """Check what the user named, before anything is searched or loaded.

    Raises:
        SettingsError: an input does not exist, is no file or folder, or is the output folder.
    """
    for given in inputs:
        if not (lexists(given) if is_url(given) else os.path.exists(given)):
            raise SettingsError(f"{given}: no such file or folder.")
        if is_dir(given):
            if resolve_path(given) == resolve_path(output):
                raise SettingsError(f"{given}: this is the output folder, too. Choose another output folder.")
        elif not is_file(given):
            raise SettingsError(f"{given}: not a file or folder, but a pipe, socket or device.")


class Sources:
    """Tells whether a file in or outside the output folder is an input, without listing the inputs.

    Args:
        inputs: what the user named.
        output: the output folder.
    """

    def __init__(self, inputs: Iterable[Path], output: Path) -> None:
        self._inputs, self._output = list(inputs), output
        self._files = {resolve_path(given): given for given in self._inputs if not is_dir(given)}
        self._folders = [(to_path(resolve_path(given)), given) for given in self._inputs if is_dir(given)]
        self._links: dict[str, Path] | None = None

    def find(self, path: Path) -> Path | None:
        """Return the input that a path leads to, by the name under which it is found; None if it is no input."""
        if not lexists(path):
            return None
        real = resolve_path(path)
        if self._links is None:  # found only if something is in the place of a result: the folders are searched once
            self._links = {resolve_path(link): link for link in self._find_links()}
        return self._files.get(real) or self._links.get(real) or self._find_below(to_path(real))

    def _find_links(self) -> Iterator[Path]:
        for given in (given for _, given in self._folders if not is_url(given)):
            for here, names in _walk(given, self._output, [], quiet=True):
                yield from (link for link in map(here.joinpath, names) if link.is_symlink() and is_input(link))

    def _find_below(self, real: Path) -> Path | None:
        """Return a file in a folder that the user named, if the search would find it there."""
        output = to_path(resolve_path(self._output))
        for folder, given in self._folders:
            if not real.is_relative_to(folder):
                continue
            inside = output.is_relative_to(folder) and real.is_relative_to(output)
            relative = real.relative_to(folder)
            if not inside and not any(part.startswith(".") for part in relative.parts) and is_input(real):
                return given / relative
        return None


def is_input(file: Path) -> bool:
    """Return whether a file found in a folder should be processed.

    A file whose content cannot be read is included, because it may be DICOM; the reader then reports it. The same
    holds for a link that leads nowhere. Pipes are not, because reading one would wait for ever.
    """
    if file.name.startswith(".") or file.name.upper() == "DICOMDIR" or file.name.endswith(STALE):
        return False
    if is_url(file):
        with head_on_disk(file) as head:
            return is_candidate(head)
    if not os.path.isfile(file):
        return file.is_symlink() and has_known_suffix(file)
    return is_candidate(file) or not os.access(file, os.R_OK)


def strip_suffix(file: Path) -> str:
    """Return the name without the suffix of a known format. Any other part of a name stays: it may belong to a UID."""
    return file.stem if has_known_suffix(file) else file.name


def recognise(file: Path) -> Format | None:
    """Return the format of a file, by its first bytes or its suffix; None if it is of no known format."""
    with head_on_disk(file) as head:
        return find_format(head)


def resolve_path(path: Path) -> str:
    """Return the path with links resolved. Unlike Path.resolve it accepts links that lead in a circle."""
    return resolve(path)


def _search(given: Path, output: Path) -> Iterator[Found]:
    """Search one folder, and log what was left out."""
    closed: list[OSError] = []
    others: Counter[str] = Counter()
    files = _list_inputs(given, output, closed, others)
    yield from (_check_found(file, given) for file in _without_icons(given, files))
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
        logger.warning(
            "%s: left out files of kinds not read here (%s). Unpack them, or convert them to DICOM or PNG.",
            given,
            kinds,
        )
    for error in closed:
        yield Found(to_path(error.filename), given, None, f"cannot be searched ({error.strerror})")


def _list_inputs(given: Path, output: Path, closed: list[OSError], others: Counter[str]) -> Iterator[Path]:
    """Yield the inputs below a folder. Kinds of files that are not read here are counted in `others`."""
    earlier: list[tuple[Path, Named]] = []  # results of earlier runs, in the folders seen so far
    for here, names in _walk(given, output, closed):
        has_report = not is_url(here) or FILE_NAME in names
        if here != given and has_report and (named := find_named(here)):
            logger.info("%s: results of an earlier run are left out. Name the folder to process them.", here)
            earlier.append((here, named))
        earlier = [(folder, named) for folder, named in earlier if here.is_relative_to(folder)]
        for file in read_heads_ahead(here / name for name in sorted(names)):
            if any(file.relative_to(folder) in named for folder, named in earlier):
                continue
            if is_input(file):
                yield file
            elif kind := _describe_other(file):
                others[kind] += 1


def _walk(given: Path, output: Path, closed: list[OSError], *, quiet: bool = False) -> Iterator[tuple[Path, list[str]]]:
    """Yield each folder below `given` with its file names, without the output folder and hidden folders.

    Folders that cannot be searched are added to `closed`.
    """
    excluded = resolve_path(output)
    folders_below = walk(given, closed.append) if is_url(given) else os.walk(given, onerror=closed.append)
    for folder, folders, names in folders_below:
        here = to_path(folder)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and resolve_path(here / name) != excluded
        )
        for link in (name for name in folders if not quiet and (here / name).is_symlink()):
            logger.warning("%s: a link to a folder is not followed. Name it to process it.", here / link)
        yield here, names


def _check_found(file: Path, given: Path) -> Found:
    if is_url(file) or os.path.isfile(file):
        return Found(file, given, Path(*file.relative_to(given).parts))
    return Found(file, given, None, "the link leads to no file")


def _describe_other(file: Path) -> str | None:
    """Return what kind of image or archive a file is that no reader here takes; None if it is neither."""
    if file.name.startswith(".") or file.name.endswith(STALE) or not (is_url(file) or os.path.isfile(file)):
        return None
    suffix = file.suffix.lower()
    if suffix in OTHER_SUFFIXES:
        inner = Path(file.stem)
        known = suffix in _PACKED and (has_known_suffix(inner) or inner.suffix.lower() in OTHER_SUFFIXES)
        return f"{inner.suffix.lower()}{suffix}" if known else suffix
    try:
        with head_on_disk(file) as there, there.open("rb") as content:
            head = content.read(16)
    except OSError:
        return None
    return next((kind for signature, kind in _SIGNATURES.items() if head.startswith(signature)), None)


def _without_icons(given: Path, files: Iterator[Path]) -> Iterator[Path]:
    """Yield `files` without the small pictures that a viewer on a patient CD brings along; log how many there are.

    Only beside DICOM files: a folder of small pictures alone is a data set. In a folder of more than `LONG` files,
    DICOM files that come later than these and than the picture do not count.
    """
    first = list(islice(files, LONG))
    has_dicom = any(recognise(file) is DICOM for file in first)
    icons = 0
    for file in chain(first, files):
        if recognise(file) is DICOM:
            has_dicom = True
        elif has_dicom and _is_icon(file):
            icons += 1
            continue
        yield file
    if icons:
        logger.warning(
            "%s: left out %d small picture%s beside DICOM files (under %d px a side: a viewer's icons). "
            "Name a file to process it.",
            given,
            icons,
            "" if icons == 1 else "s",
            ICON_PX,
        )


def _is_icon(file: Path) -> bool:
    """Return whether a file is a readable picture with both sides shorter than ICON_PX."""
    try:
        with on_disk(file, _ICON_BYTES) as copy:
            if copy.stat().st_size > _ICON_BYTES:
                return False
            picture = cv2.imread(str(copy), cv2.IMREAD_UNCHANGED)
    except (OSError, cv2.error, BsdiffError):
        return False
    return picture is not None and max(picture.shape[:2]) < ICON_PX
