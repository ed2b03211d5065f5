"""List the files of a run, each with the place of its result, and refuse results that would replace a file. Torch-free.

The rules are the table in docs/reports.md.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bsdiff_rt.config import FormatName
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.files import file_sha256
from bsdiff_rt.folder.report import (
    MAPS,
    FileEntry,
    check_output,
    digest_path,
    locate_map,
    read_named,
    read_results,
)
from bsdiff_rt.folder.search import Found, find_files, resolve_path, strip_suffix
from bsdiff_rt.formats import result_suffix

logger = logging.getLogger(__name__)

_NAME_BYTES = 255  # the longest file name of nearly every file system
_ELSEWHERE = "Choose another output folder."


@dataclass(frozen=True)
class Task:
    """One file to process.

    Attributes:
        input: the file.
        output: path of the result, relative to the output folder; None if it cannot be processed.
        refusal: the reason, if this is known before the file is read; None normally.
        status: outcome of a task with a reason.
    """

    input: Path
    output: Path | None
    refusal: str | None = None
    status: Literal["refused", "failed"] = "refused"


def find_tasks(
    inputs: Iterable[Path],
    output: Path,
    file_format: FormatName,
    reserved: Collection[str] = (),
    *,
    overwrite: bool = False,
) -> list[Task]:
    """List every file to process, in the order given; folders in sorted order.

    No result replaces an input, a file that no report of this program names, or the result of another input of this
    run. The result of another input of an earlier run is replaced only with `overwrite`.

    Args:
        inputs: files and folders; folders are searched (`search.find_files`).
        output: the output folder; it need not exist.
        file_format: "auto", or a kind of result that `formats` can write.
        reserved: names of files and folders that the run itself writes into the output folder.
        overwrite: whether results of other inputs of earlier runs may be replaced.

    Raises:
        SettingsError: an input does not exist or is the output folder; the output folder holds a report.json of another
            program; a file in the place of one in `reserved` would be replaced.
    """
    check_output(output)
    found = find_files(inputs, output)
    sources = {resolve_path(each.file): each.file for each in found if each.relative is not None}
    named = read_named(output)
    for name in reserved:
        _check_reserved(output / name, sources, named=Path(name) in named)
    places = _Places(output, sources, read_results(output), named, reserved, overwrite)
    tasks: list[Task] = []
    seen: set[str] = set()
    for each in found:
        if each.relative is None:
            tasks.append(Task(each.file, None, each.refusal))
            continue
        # Only the folder's links are resolved: two links to one file are two inputs, as in archives sorted by content.
        place = str(Path(resolve_path(each.file.parent), each.file.name))
        if place in seen:
            continue
        seen.add(place)
        target = each.relative.parent / (strip_suffix(each.relative) + result_suffix(file_format, each.file))
        if reason := places.check_length(target):
            tasks.append(Task(each.file, None, reason, "failed"))
        elif reason := places.take(each, target):
            tasks.append(Task(each.file, None, reason))
        else:
            tasks.append(Task(each.file, target))
    return tasks


@dataclass
class _Places:
    """The places of results, and what they must not replace.

    Attributes:
        output: the output folder.
        sources: every input of this run, by its real path.
        results: results of earlier runs, by path below `output`.
        named: every file that the report in `output` names.
        reserved, overwrite: see `find_tasks`.
        taken: places given away, and to which input.
        mapped: the same for their maps.
    """

    output: Path
    sources: Mapping[str, Path]
    results: Mapping[Path, FileEntry]
    named: Collection[Path]
    reserved: Collection[str]
    overwrite: bool
    taken: dict[Path, Found] = field(default_factory=dict)
    mapped: dict[Path, Found] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._longest = _measure_longest_name(self.output)

    def check_length(self, target: Path) -> str | None:
        """Return the reason why the file system cannot hold a file of this name, or None."""
        names = (target.name, *(path.name for path in self._list_maps(target).values()))
        if (length := max(map(_measure_name, names))) <= self._longest:
            return None
        return (
            f"the name of its result would have {length} characters or bytes, and {self._longest} are possible here. "
            "Rename the file."
        )

    def take(self, found: Found, target: Path) -> str | None:
        """Reserve `target` for the result of an input. Return the reason why that is impossible, or None."""
        maps = self._list_maps(target)
        reason = (
            self._check_other_result(found, target)
            or self._check_unnamed_file(target, "result")
            or next(filter(None, (self._check_unnamed_file(path, f"{kind} map") for kind, path in maps.items())), None)
            or self._check_earlier_result(found, target)
        )
        if reason:
            return reason
        if str(target) in self.reserved or target.parts[0] in self.reserved:
            return f"its result {target} would replace a file of the run itself. Rename it."
        for kind, path in maps.items():
            if path in self.mapped:
                return f"its {kind} map {path.name} would replace that of {self.mapped[path].file}. {_ELSEWHERE}"
        self.taken[target] = found
        self.mapped |= dict.fromkeys(maps.values(), found)
        return None

    def _list_maps(self, target: Path) -> dict[str, Path]:
        """Return the places of the maps of a result that this run writes, by kind."""
        return {kind: locate_map(Path(), kind, target) for kind in MAPS if kind in self.reserved}

    def _check_other_result(self, found: Found, target: Path) -> str | None:
        """Return the reason if another input of this run has the same place."""
        if target not in self.taken:
            return None
        other = self.taken[target]
        reason = f"its result {target} would replace that of {other.file}."
        if common := _find_common_folder(other.given, found.given):
            return f"{reason} Name the folder that holds both ({common}), or choose another output folder."
        return f"{reason} Rename one of them, or choose another output folder."

    def _check_unnamed_file(self, target: Path, kind: str) -> str | None:
        """Return the reason if an input, or a file that no report names, is in the place of a result."""
        path = self.output / target
        if source := self.sources.get(resolve_path(path)):
            return f"its {kind} would replace the X-ray {source}. {_ELSEWHERE}"
        # A folder in the way is reported by the writer, which cannot replace it.
        if target not in self.named and os.path.lexists(path) and not os.path.isdir(path):
            return f"its {kind} would replace {path}, which this program did not write. {_ELSEWHERE}"
        return None

    def _check_earlier_result(self, found: Found, target: Path) -> str | None:
        """Return the reason if an earlier run's result of another input is in the place."""
        earlier = None if self.overwrite else self.results.get(target)
        if earlier is None or not _is_of_another(self.output / target, earlier, found.file):
            return None
        return (
            f"its result {target} would replace that of another file, {earlier.input}, from an earlier run. "
            "Choose another output folder, or allow overwriting."
        )


def _check_reserved(path: Path, sources: Mapping[str, Path], *, named: bool) -> None:
    """Raise SettingsError if the run itself would replace an input, or a file of the user's."""
    if source := sources.get(resolve_path(path)):
        raise SettingsError(f"{source}: this run's own {path.name} would replace the X-ray. {_ELSEWHERE}")
    if not named and os.path.isfile(path):
        raise SettingsError(
            f"{path}: this run's own {path.name} would replace it, and this program did not write it. "
            "Move it away, or choose another output folder."
        )


def _is_of_another(result: Path, earlier: FileEntry, file: Path) -> bool:
    """Return whether an existing result belongs to another input: neither the path nor the content is the same.

    An input that cannot be read counts as another one. Without `path_sha256` the path in the report decides.
    """
    if not os.path.isfile(result):
        return False
    if earlier.path_sha256 == digest_path(file) or (earlier.path_sha256 is None and earlier.input in ("", str(file))):
        return False
    try:
        return file_sha256(file) != earlier.input_sha256
    except OSError:
        return True


def _find_common_folder(first: Path, second: Path) -> Path | None:
    """Return the folder that holds two inputs, if naming it would keep their results apart; None if not."""
    folders = [each if os.path.isdir(each) else each.parent for each in (first, second)]
    if resolve_path(folders[0]) == resolve_path(folders[1]):
        return None
    try:
        common = Path(os.path.commonpath(folders))
    except ValueError:  # on different drives, or one of them relative
        return None
    return None if common == Path(common.anchor or "/") else common


def _measure_longest_name(output: Path) -> int:
    """Return the length of the longest file name in a folder, in bytes; on Windows in characters."""
    while not os.path.isdir(output) and output != output.parent:
        output = output.parent
    try:
        return os.pathconf(output, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # Windows, some network drives
        return _NAME_BYTES


def _measure_name(name: str) -> int:
    return len(name) if sys.platform == "win32" else len(os.fsencode(name))
