"""What earlier runs left in an output folder: asked of report.json, or of the journal of a long run. Torch-free.

A journal is asked for one path at a time, so that a folder of any length takes no memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from bsdiff_rt.errors import SettingsError
from bsdiff_rt.folder import report as short
from bsdiff_rt.folder.journal import JOURNAL, Journal
from bsdiff_rt.folder.report import EARLIER, PARQUET, FileEntry, Report, read_entry, read_name
from bsdiff_rt.folder.stored_journal import FOLDER, has_journal, open_journal
from bsdiff_rt.urls import is_file, is_url, lexists


class Results(Protocol):
    """Results of earlier runs, by path below the output folder."""

    def get(self, path: Path, /) -> FileEntry | None:
        """Return the entry of a result, or None."""


class Finished(Protocol):
    """Results that need not be made again, by path below the output folder."""

    def get(self, path: str, /) -> FileEntry | None:
        """Return the entry of a result, or None."""


class Named(Protocol):
    """Files that this program wrote into the output folder, by path below it."""

    def __contains__(self, path: object, /) -> bool: ...


class _JournalResults:
    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def get(self, path: Path, /) -> FileEntry | None:
        """Return the entry of a result with the keys in `EARLIER`, or None."""
        found = self._journal.find(path)
        if found is None:
            return None
        return _to_entry({key: found[1].get(key) for key in EARLIER} | {"status": "skipped"})


class _JournalFinished:
    def __init__(self, journal: Journal, report: Report) -> None:
        self._journal = journal
        self._runs = {run for run, head in journal.read_heads().items() if not short.find_difference(head, report)}

    def get(self, path: str, /) -> FileEntry | None:
        """Return the entry of a result of the same bundle and settings, or None."""
        found = self._journal.find(path)
        return _to_entry(found[1]) if found is not None and found[0] in self._runs else None


class _JournalNamed:
    def __init__(self, folder: Path, journal: Journal) -> None:
        names = (read_name(folder, "preview"), read_name(folder, "page"), JOURNAL, PARQUET)
        self._pictures, self._journal = {Path(name) for name in names if name}, journal

    def __contains__(self, path: object, /) -> bool:
        return isinstance(path, Path) and (
            path in self._pictures
            or path.parts[:1] == (FOLDER,)
            or self._journal.find(path) is not None
            or self._journal.is_planned(path)
            or self._journal.is_map(path)
        )


def check_output(folder: Path) -> None:
    """Check that what an earlier run left in the output folder, if anything, is readable and of this program.

    Raises:
        SettingsError: another program wrote it, or it is damaged. A run would replace it.
    """
    short.check_output(folder)
    if is_url(folder):
        named = short.load_report(folder).get("files_in")
        if named is not None and not has_journal(folder):
            why = "is missing. Put it back" if named == FOLDER else "is of a run on a disk. Copy the results there"
            raise SettingsError(
                f"{folder}: its report names {named}, which {why}, or choose another output folder.", setting="output"
            )
    for name in (PARQUET,) if is_url(folder) else (JOURNAL, PARQUET):
        if lexists(folder / name) and not is_file(folder / short.FILE_NAME):
            raise SettingsError(
                f"{folder / name}: no report.json says that this program wrote it. Move it away, or choose another "
                "output folder.",
                setting="output",
            )
    if not is_url(folder) and os.path.isfile(folder / JOURNAL):
        Journal(folder).close()


def find_results(folder: Path, journal: Journal | None = None) -> Results:
    """Return what tells the result of an earlier run in a folder, of any version and settings.

    Args:
        folder: the output folder.
        journal: its journal, if that is open.
    """
    if journal is None and not has_journal(folder):
        return short.read_results(folder)
    return _JournalResults(journal or open_journal(folder))


def list_results(folder: Path) -> Iterator[tuple[Path, FileEntry]]:
    """Yield every result that a run of any length left in a folder, by path below it."""
    if not has_journal(folder):
        yield from short.read_results(folder).items()
        return
    with open_journal(folder) as journal:
        for content in journal.read_results():
            entry = _to_entry(content)
            yield Path(str(entry.output)), entry


def find_finished(folder: Path, report: Report) -> Finished:
    """Return what tells the results of earlier runs with the bundle and settings of `report`."""
    if not has_journal(folder):
        return short.read_finished(folder, report)
    return _JournalFinished(open_journal(folder), report)


def find_named(folder: Path, journal: Journal | None = None) -> Named:
    """Return what tells the files in a folder that a later run may replace. False if there are none.

    Args:
        folder: the output folder.
        journal: its journal, if that is open.
    """
    if journal is None and not has_journal(folder):
        return short.read_named(folder)
    return _JournalNamed(folder, journal or open_journal(folder))


def take_over(folder: Path, journal: Journal) -> None:
    """Copy what report.json names into a new journal, before the first long run into a folder: all of it or nothing."""
    content: dict[str, Any] = short.load_report(folder)
    if content:
        with journal.together():
            _take_over(content, journal)


def _take_over(content: dict[str, Any], journal: Journal) -> None:
    head = {key: value for key, value in content.items() if key not in ("files", "earlier", "planned")}
    for entries in (content.get("earlier", []), content["files"]):
        # The results of other runs are known to be ours, but not how they were made.
        journal.begin_run(head if entries is content["files"] else {"bundle": {"sha256": ""}, "settings": {}})
        for place, one in enumerate(entries):
            entry = {"status": "skipped", "input": ""} | one
            if entry["output"] is not None:
                maps = [short.locate_map(Path(), kind, entry["output"]) for kind in entry.get("maps", ())]
                journal.add(place, dict.fromkeys(EARLIER) | {"maps": {}} | entry, maps)
    journal.plan(map(Path, content.get("planned", [])))


def _to_entry(content: dict[str, Any]) -> FileEntry:
    """Return an entry of the journal.

    Raises:
        SettingsError: somebody changed it.
    """
    try:
        return read_entry(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"{JOURNAL}: damaged. Choose another output folder.", setting="output") from error
