"""List the files of a run, each with the place of its result, and refuse results that would replace a file. Torch-free.

The rules are the table in docs/reports.md.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from bsdiff_rt.config import FormatName
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.files import file_sha256
from bsdiff_rt.folder.earlier import Named, Results, check_output, find_named, find_results
from bsdiff_rt.folder.journal import LONG
from bsdiff_rt.folder.report import MAPS, FileEntry, digest_path, locate_map
from bsdiff_rt.folder.search import Found, Sources, check_inputs, find_files, resolve_path, strip_suffix
from bsdiff_rt.formats import result_suffix
from bsdiff_rt.urls import head_on_disk, is_file, is_url, list_below, to_path

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


@dataclass(frozen=True)
class Listing:
    """The files of a run. Of a long run only the first ones are known at once; the rest is found on the way.

    Attributes:
        first: at most `LONG` files.
        rest: the others, which can be read once.
        is_long: whether there are others.
    """

    first: list[Task]
    rest: Iterator[Task]
    is_long: bool

    def __iter__(self) -> Iterator[Task]:
        return chain(self.first, self.rest)

    def __bool__(self) -> bool:
        return bool(self.first)

    @property
    def count(self) -> int | None:
        """Return the number of files; None in a long run, before all are found."""
        return None if self.is_long else len(self.first)


def list_tasks(tasks: Iterator[Task]) -> Listing:
    """Return a listing of tasks, looking at no more of them than it needs to know whether there are many."""
    first = list(islice(tasks, LONG))
    following = list(islice(tasks, 1))
    return Listing(first, chain(following, tasks), bool(following))


def find_tasks(
    inputs: Iterable[Path],
    output: Path,
    file_format: FormatName,
    reserved: Collection[str] = (),
    *,
    overwrite: bool = False,
) -> list[Task]:
    """List every file to process: what `search_tasks` yields."""
    return list(search_tasks(inputs, output, file_format, reserved, overwrite=overwrite))


def search_tasks(
    inputs: Iterable[Path],
    output: Path,
    file_format: FormatName,
    reserved: Collection[str] = (),
    *,
    overwrite: bool = False,
) -> Iterator[Task]:
    """Yield every file to process, in the order given; folders in sorted order.

    No result replaces an input, a file that no report of this program names, or the result of another input of this
    run. The result of another input of an earlier run is replaced only with `overwrite`. What this needs to know of
    the files found so far is kept in a database on disk, because there may be millions.

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
    inputs = [to_path(given) for given in inputs]
    check_output(output)
    check_inputs(inputs, output)
    sources, named = Sources(inputs, output), find_named(output)
    for name in reserved:
        _check_reserved(output / name, sources, named=Path(name) in named)
    places = _Places(output, sources, find_results(output), named, reserved, overwrite)
    for each in find_files(inputs, output):
        if each.relative is None:
            yield Task(each.file, None, each.refusal)
            continue
        # Only the folder's links are resolved: two links to one file are two inputs, as in archives sorted by content.
        if not places.is_new(to_path(resolve_path(each.file.parent)) / each.file.name):
            continue
        with head_on_disk(each.file) as head:
            suffix = result_suffix(file_format, head)
        target = each.relative.parent / (strip_suffix(each.relative) + suffix)
        if reason := places.check_length(target):
            yield Task(each.file, None, reason, "failed")
        elif reason := places.take(each, target):
            yield Task(each.file, None, reason)
        else:
            yield Task(each.file, target)


class _OnDisk:
    """Paths seen, each with the input it belongs to, in a database that the system removes with this object."""

    def __init__(self) -> None:
        self._base = sqlite3.connect("", check_same_thread=False)  # the empty name: a file without a name, on disk
        self._base.execute("CREATE TABLE seen (path BLOB PRIMARY KEY, file BLOB, given BLOB) WITHOUT ROWID")

    def add(self, path: Path, found: Found | None = None) -> bool:
        """Add a path. Return whether it is new."""
        names = (found.file, found.given) if found else (b"", b"")
        row = tuple(map(os.fsencode, (path, *names)))
        return self._base.execute("INSERT OR IGNORE INTO seen VALUES (?, ?, ?)", row).rowcount == 1

    def get(self, path: Path) -> tuple[Path, Path] | None:
        """Return the file that a path belongs to, and the input that it was found under; None for a new path."""
        row = self._base.execute("SELECT file, given FROM seen WHERE path = ?", (os.fsencode(path),)).fetchone()
        return None if row is None else (to_path(os.fsdecode(row[0])), to_path(os.fsdecode(row[1])))


@dataclass
class _Places:
    """The places of results, and what they must not replace.

    Attributes:
        output: the output folder.
        sources: the inputs of this run.
        results: results of earlier runs, by path below `output`.
        named: every file that the report in `output` names.
        reserved, overwrite: see `search_tasks`.
        seen: the inputs so far.
        taken: places given away, and to which input.
        mapped: the same for their maps.
    """

    output: Path
    sources: Sources
    results: Results
    named: Named
    reserved: Collection[str]
    overwrite: bool
    seen: _OnDisk = field(default_factory=_OnDisk)
    taken: _OnDisk = field(default_factory=_OnDisk)
    mapped: _OnDisk = field(default_factory=_OnDisk)

    def __post_init__(self) -> None:
        self._longest = _measure_longest_name(self.output)
        self._there = list_below(self.output) if is_url(self.output) else None

    def is_new(self, place: Path) -> bool:
        """Return whether an input was not found before, under another name."""
        return self.seen.add(place)

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
            if other := self.mapped.get(path):
                return f"its {kind} map {path.name} would replace that of {other[0]}. {_ELSEWHERE}"
        self.taken.add(target, found)
        for path in maps.values():
            self.mapped.add(path, found)
        return None

    def _list_maps(self, target: Path) -> dict[str, Path]:
        """Return the places of the maps of a result that this run writes, by kind."""
        return {kind: locate_map(Path(), kind, target) for kind in MAPS if kind in self.reserved}

    def _check_other_result(self, found: Found, target: Path) -> str | None:
        """Return the reason if another input of this run has the same place."""
        if (other := self.taken.get(target)) is None:
            return None
        file, given = other
        reason = f"its result {target} would replace that of {file}."
        if common := _find_common_folder(given, found.given):
            return f"{reason} Name the folder that holds both ({common}), or choose another output folder."
        return f"{reason} Rename one of them, or choose another output folder."

    def _check_unnamed_file(self, target: Path, kind: str) -> str | None:
        """Return the reason if an input, or a file that no report names, is in the place of a result."""
        path = self.output / target
        if not (os.path.lexists(path) if self._there is None else target.as_posix() in self._there):
            return None
        if source := self.sources.find(path):
            return f"its {kind} would replace the X-ray {source}. {_ELSEWHERE}"
        # A folder in the way is reported by the writer, which cannot replace it.
        if target not in self.named and not os.path.isdir(path):
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


def _check_reserved(path: Path, sources: Sources, *, named: bool) -> None:
    """Raise SettingsError if the run itself would replace an input, or a file of the user's."""
    if source := sources.find(path):
        raise SettingsError(f"{source}: this run's own {path.name} would replace the X-ray. {_ELSEWHERE}")
    if not named and is_file(path):
        raise SettingsError(
            f"{path}: this run's own {path.name} would replace it, and this program did not write it. "
            "Move it away, or choose another output folder."
        )


def _is_of_another(result: Path, earlier: FileEntry, file: Path) -> bool:
    """Return whether an existing result belongs to another input: neither the path nor the content is the same.

    An input that cannot be read counts as another one. Without `path_sha256` the path in the report decides.
    """
    if not is_file(result):
        return False
    if earlier.path_sha256 == digest_path(file) or (earlier.path_sha256 is None and earlier.input in ("", str(file))):
        return False
    try:
        return file_sha256(file) != earlier.input_sha256
    except OSError:
        return True


def _find_common_folder(first: Path, second: Path) -> Path | None:
    """Return the folder that holds two inputs, if naming it would keep their results apart; None if not."""
    if is_url(first) or is_url(second):
        return None
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
    if is_url(output):
        return _NAME_BYTES
    while not os.path.isdir(output) and output != output.parent:
        output = output.parent
    try:
        return os.pathconf(output, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # Windows, some network drives
        return _NAME_BYTES


def _measure_name(name: str) -> int:
    return len(name) if sys.platform == "win32" else len(os.fsencode(name))
