"""Keep the journal of a long run into object storage. Torch-free.

A file in the storage cannot be appended to. So each commit uploads what has changed as a small file of its own, below
`report.journal`, and a journal that is opened reads these in order. Questions are answered from a file on a disk.
"""

from __future__ import annotations

import json
import re
import secrets
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from bsdiff_rt.errors import SettingsError
from bsdiff_rt.files import parse_json
from bsdiff_rt.folder.journal import JOURNAL, Journal
from bsdiff_rt.urls import is_dir, is_url, list_below

FOLDER = "report.journal"
_DIGITS = 9
_PART = re.compile(rf"\d{{{_DIGITS}}}-[0-9a-f]{{8}}\.jsonl")
_AT_ONCE = 16  # files that are read from the storage at the same time

_OPEN: dict[str, StoredJournal] = {}  # by output folder: what one part of a run changes, the others must see
_OPENING = threading.Lock()


def has_journal(folder: Path) -> bool:
    """Return whether a long run was begun in a folder. Its journal then serves every later run.

    Raises:
        SettingsError: the journal is damaged, or the storage does not say.
    """
    if is_url(folder):
        return str(folder) in _OPEN or (is_dir(folder / FOLDER) and bool(_list_parts(folder)))
    if not (folder / JOURNAL).is_file():
        return False
    with Journal(folder) as journal:
        return not journal.is_new


def name_journal(folder: Path) -> str:
    """Return the name, in an output folder, of the file or folder that holds the journal."""
    return FOLDER if is_url(folder) else JOURNAL


def open_journal(folder: Path) -> Journal:
    """Return the journal of an output folder. For object storage it is the same one until it is closed.

    Raises:
        SettingsError: it is not a journal of this program, is damaged or cannot be opened.
    """
    if not is_url(folder):
        return Journal(folder)
    with _OPENING:
        return _OPEN.get(str(folder)) or StoredJournal(folder)


class StoredJournal(Journal):
    """A journal in object storage; see `Journal`. Get it from `open_journal`.

    Args:
        folder: the output folder, a `UrlPath`.

    Raises:
        SettingsError: it is damaged, or the storage does not give it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._disk = tempfile.TemporaryDirectory(prefix="bsdiff-rt-", ignore_cleanup_errors=True)
        self._changes: list[str] = []
        super().__init__(Path(self._disk.name))
        self._base.execute("PRAGMA synchronous = OFF")  # after a power failure the storage has everything
        names = _list_parts(folder)
        numbers = {int(name[:_DIGITS]) for name in names}
        self._number = max(numbers, default=-1) + 1
        if missing := set(range(self._number)) - numbers:
            first = f"{min(missing):0{_DIGITS}}-*.jsonl"
            raise SettingsError(
                f"{folder / FOLDER}: {first} is missing. Put it back, or choose another output folder.",
                setting="output",
            )
        self._replay([folder / FOLDER / name for name in names])
        _OPEN[str(folder)] = self

    def close(self) -> None:
        """Upload what has changed, and close."""
        try:
            self.commit()
        finally:
            _OPEN.pop(str(self._folder), None)
            super().close()
            self._disk.cleanup()

    def begin_run(self, head: dict[str, Any]) -> None:
        """Begin a run, in the storage, too."""
        self._change("begin_run", head)
        self.commit()

    def plan(self, outputs: Iterable[Path]) -> None:
        """Note results that will be written. They are in the storage before this returns."""
        self._change("plan", [str(path) for path in outputs])
        self.commit()

    def add(self, place: int, entry: dict[str, Any], maps: Iterable[Path] = (), planned: Path | None = None) -> None:
        """Add an entry of this run, in the place of an earlier one with the same result."""
        self._change("add", place, entry, [str(path) for path in maps], None if planned is None else str(planned))

    def forget(self, output: Path) -> None:
        """Forget a result that is not in the folder any more."""
        self._change("forget", str(output))

    def commit(self) -> None:
        """Upload what has changed. If the storage refuses, the next time uploads it.

        Raises:
            SettingsError: the storage refuses it.
        """
        with self._lock:
            super().commit()
            if not self._changes or self._together:
                return
            # The end of the name keeps two runs from replacing each other's entries.
            place = self._folder / FOLDER / f"{self._number:0{_DIGITS}}-{secrets.token_hex(4)}.jsonl"
            try:
                place.write_bytes("\n".join(self._changes).encode())
            except OSError as error:
                raise SettingsError(
                    f"{self._folder / FOLDER}: cannot be written ({error.strerror}). Finished results are complete.",
                    setting="output",
                ) from error
            self._changes.clear()
            self._number += 1

    def _change(self, kind: str, *values: Any) -> None:
        with self._lock:
            self._do(kind, *values)
            self._changes.append(json.dumps([kind, *values]))

    def _do(self, kind: str, *values: Any) -> None:
        """Change the file on the disk."""
        if kind == "begin_run":
            super().begin_run(*values)
        elif kind == "plan":
            super().plan(map(Path, values[0]))
        elif kind == "add":
            place, entry, maps, planned = values
            super().add(place, entry, map(Path, maps), None if planned is None else Path(planned))
        elif kind == "forget":
            super().forget(Path(values[0]))
        else:
            raise ValueError(kind)

    def _replay(self, files: list[Path]) -> None:
        """Do what the files say, in order.

        Raises:
            SettingsError: one is damaged, or the storage does not give it.
        """
        for file, content in zip(files, _read_ahead(files), strict=True):
            try:
                if not content:
                    raise ValueError("empty")
                for line in content.decode().splitlines():
                    self._do(*parse_json(line))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise SettingsError(
                    f"{file}: damaged. Put it back as it was, or choose another output folder.", setting="output"
                ) from error


def _list_parts(folder: Path) -> list[str]:
    """Return the names of the journal's files in order. Other files, such as a storage's mark of a folder, are none."""
    return sorted(name for name in list_below(folder / FOLDER) if _PART.fullmatch(name))


def _read_ahead(files: Iterable[Path]) -> Iterator[bytes]:
    files = iter(files)
    with ThreadPoolExecutor(_AT_ONCE) as readers:
        while group := list(islice(files, 4 * _AT_ONCE)):
            yield from readers.map(_read, group)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read ({error.strerror}). Try again.", setting="output") from error
