"""From what the user named to a list of files to do, each with the place its result goes. Torch-free."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bsdiff_rt.config import FormatName
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.files import file_sha256
from bsdiff_rt.folder.preview import FILE_NAME as PREVIEW
from bsdiff_rt.folder.report import FileEntry, path_digest, planned_in, results_in
from bsdiff_rt.formats import result_suffix
from bsdiff_rt.formats.dicom_in import is_dicom
from bsdiff_rt.formats.raster import RASTER_SUFFIXES

logger = logging.getLogger(__name__)

DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})
# Images that nothing here reads; worth a word, because a folder of them looks like one of X-rays.
OTHER_IMAGES = frozenset({".bmp", ".gif", ".heic", ".j2k", ".jp2", ".jxl", ".mha", ".nii", ".nrrd", ".pgm", ".webp"})
UNCERTAINTY = "uncertainty"  # folder, in the output folder, of the samples' standard deviations


@dataclass(frozen=True)
class Task:
    """One file to do.

    Attributes:
        input: the file.
        output: where the result goes, relative to the output folder.
        refusal: why it cannot be done, known before reading it; None normally.
    """

    input: Path
    output: Path | None
    refusal: str | None = None


def find_tasks(
    inputs: Iterable[Path],
    output: Path,
    file_format: FormatName,
    reserved: Collection[str] = (),
    *,
    overwrite: bool = False,
) -> list[Task]:
    """Every file to do, in the order given, folders in sorted order.

    Folders are searched recursively for files with an image or DICOM suffix and for DICOM files under any other name;
    what else lies there is not an input, and neither is what an earlier run wrote into a folder below one that is
    searched. A file named by the user always is one. The output folder is never searched. No result replaces an
    input or a file beside it, nor, but with `overwrite`, what this program did not write or the result of another
    input: it may be another patient's.

    Args:
        inputs: files and folders.
        output: the output folder.
        file_format: of the results.
        reserved: names of files and folders that the run itself writes into the output folder.
        overwrite: whether other files there, and results of an earlier run's other inputs, may be replaced.

    Raises:
        SettingsError: an input lies where the run itself writes (`reserved`).
    """
    found = list(_files(inputs, output))
    sources = {_real(file): file for file, relative, _ in found if relative is not None}
    for name in reserved:
        if source := sources.get(_real(output / name)):
            raise SettingsError(f"{source}: this run's own {name} would replace the X-ray; choose another --output")
    known = results_in(output)
    written = {*known, *(uncertainty_path(Path(), result) for result in known), *planned_in(output)}
    places = _Places(output, sources, known, written, reserved, overwrite)
    tasks: list[Task] = []
    seen: set[str] = set()
    for file, relative, refusal in found:
        if relative is None:
            tasks.append(Task(file, None, refusal))
            continue
        # Named twice, or named and in a named folder. Two links to one file are two files: archives link by content.
        place = str(Path(_real(file.parent), file.name))
        if place in seen:
            continue
        seen.add(place)
        suffix = result_suffix(file_format, file)
        target = relative.parent / (stem_of(relative) + suffix)
        refusal = places.refusal(file, target)
        tasks.append(Task(file, None if refusal else target, refusal))
    return tasks


@dataclass
class _Places:
    """Where results go, and whose place they would take.

    Attributes:
        output: the output folder.
        sources: every input of this run, by its real path.
        results: of an earlier run, by their places.
        written: these, their deviation maps, and what an interrupted run was to write.
        reserved, overwrite: as of `find_tasks`.
        taken: places given away, and to which file.
        mapped: the same of deviation maps.
    """

    output: Path
    sources: Mapping[str, Path]
    results: Mapping[Path, FileEntry]
    written: Collection[Path]
    reserved: Collection[str]
    overwrite: bool
    taken: dict[Path, Path] = field(default_factory=dict)
    mapped: dict[Path, Path] = field(default_factory=dict)

    def refusal(self, file: Path, target: Path) -> str | None:
        """Why the result of `file` cannot go to `target`; None where it can, which is its place from then on."""
        deviation = uncertainty_path(Path(), target)
        if target in self.taken:
            return f"its result {target} would replace that of {self.taken[target]}; give it another --output"
        if source := self.sources.get(_real(self.output / target)):
            return f"its result would replace the X-ray {source}; choose another --output"
        if UNCERTAINTY in self.reserved and (source := self.sources.get(_real(self.output / deviation))):
            return f"its deviation map would replace the X-ray {source}; choose another --output"
        if foreign := self._foreign(file, target):
            return foreign
        earlier = None if self.overwrite else self.results.get(target)
        if earlier and _is_anothers(self.output / target, earlier, file):
            return (
                f"its result {target} would replace that of an earlier run's {earlier.input}, which is another file; "
                "give it another --output, or --overwrite"
            )
        if str(target) in self.reserved or target.parts[0] in self.reserved:
            return f"its result {target} would replace the run's own; rename it"
        if UNCERTAINTY in self.reserved and deviation in self.mapped:
            other = self.mapped[deviation]
            return f"its deviation map {deviation.name} would replace that of {other}; give it another --output"
        self.taken[target] = self.mapped[deviation] = file
        return None

    def _foreign(self, file: Path, target: Path) -> str | None:
        """Why not to replace a file that no report of the output folder names; beside the X-ray not even if asked."""
        path = self.output / target
        if target in self.written or not path.exists():
            return None
        beside = _real(path.parent) == _real(file.parent)
        if self.overwrite and not beside:
            return None
        instead = "choose another --output" if beside else "choose another --output, or give --overwrite"
        return f"its result would replace {path}, which this program did not write; {instead}"


def _is_anothers(result: Path, earlier: FileEntry, file: Path) -> bool:
    """Whether a result that lies there is of another input than `file`: neither the same path nor the same content.

    What cannot be read will be said by who reads it. Of a report by an older version only the given path is known.
    """
    if not result.is_file():
        return False
    if earlier.path_sha256 == path_digest(file) or (earlier.path_sha256 is None and earlier.input in ("", str(file))):
        return False
    try:
        return file_sha256(file) != earlier.input_sha256
    except OSError:
        return True


def is_input(file: Path) -> bool:
    """Whether a file found in a folder is one to process: by its suffix, or DICOM by content; never a hidden one.

    One whose content cannot be read is worth a word: it may be DICOM.
    """
    if file.name.startswith(".") or file.name.upper() == "DICOMDIR":
        return False
    if not os.path.isfile(file):  # a pipe would be waited for; a link that leads nowhere is worth a word
        return file.is_symlink() and _has_suffix(file)
    return _has_suffix(file) or is_dicom(file) or not os.access(file, os.R_OK)


def _files(inputs: Iterable[Path], output: Path) -> Iterator[tuple[Path, Path | None, str | None]]:
    """Each file with its path relative to the input it was found under, or with None and the reason why not."""
    excluded = _real(output)
    for given in inputs:
        if os.path.isdir(given):
            if _real(given) == excluded:
                yield given, None, "it is the output folder, which is never searched; choose another --output"
                continue
            closed: list[OSError] = []
            others: Counter[str] = Counter()
            results: set[Path] = set()  # of earlier runs, in folders come by so far
            for folder, folders, names in os.walk(given, onerror=closed.append):
                here = Path(folder)
                folders[:] = sorted(n for n in folders if not n.startswith(".") and _real(here / n) != excluded)
                for link in (n for n in folders if (here / n).is_symlink()):
                    logger.warning("%s: a link to a folder, which is not followed; name it to do it", here / link)
                if here != Path(given) and (found := {*results_in(here), *planned_in(here)}):
                    logger.info("%s: results of an earlier run are left out; name the folder to do them", here)
                    results |= {here / PREVIEW}
                    for result in found:
                        results |= {here / result, uncertainty_path(here, result)}
                for file in (here / name for name in sorted(names)):
                    if file not in results and is_input(file):
                        yield _checked(file, file.relative_to(given))
                    elif file.suffix.lower() in OTHER_IMAGES:
                        others[file.suffix.lower()] += 1
            if others:
                kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
                logger.warning("%s: images of kinds not read here are left out (%s); convert to PNG", given, kinds)
            for error in closed:
                yield Path(error.filename), None, f"cannot be searched: {error.strerror}"
        else:
            yield _checked(given, Path(given.name))


def uncertainty_path(folder: Path, output: Path | str) -> Path:
    """Where the deviation of a result's samples goes: x.png beside that of x.dcm, x.dcm.png."""
    path = Path(output)
    return folder / UNCERTAINTY / (path if path.suffix == ".png" else f"{path}.png")


def _real(path: Path) -> str:
    """The path without links; unlike Path.resolve it also answers for links that lead in a circle."""
    return os.path.realpath(path)


def _checked(file: Path, relative: Path) -> tuple[Path, Path | None, str | None]:
    if os.path.isfile(file):
        return file, relative, None
    return (
        file,
        None,
        "no file or folder (a pipe, socket or device)" if os.path.exists(file) else "no such file or folder",
    )


def _has_suffix(file: Path) -> bool:
    return file.suffix.lower() in RASTER_SUFFIXES | DICOM_SUFFIXES


def stem_of(file: Path) -> str:
    """The name without its image suffix. A DICOM file may be named by a UID: what follows its last dot is no suffix."""
    return file.stem if _has_suffix(file) else file.name
