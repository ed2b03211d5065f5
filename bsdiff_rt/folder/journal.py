"""Keep the entries of a long run on disk, in report.sqlite: written as files are finished, never all in memory.

What is committed survives a killed process. Entries are JSON objects here; `report.py` knows their keys. Torch-free.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bsdiff_rt.errors import SettingsError

JOURNAL = "report.sqlite"
LONG = 10_000  # a run with more files than this is a long one
_WAIT_S = 60  # for another connection of this process
_FETCHED = 1000  # rows that are read at once

# `place` is the number of the input in its run's listing. A result of any run has one row, keyed by its path.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (run INTEGER PRIMARY KEY, head TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS entries (
    id INTEGER PRIMARY KEY, run INTEGER NOT NULL, place INTEGER NOT NULL, output BLOB UNIQUE, status TEXT NOT NULL,
    entry TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS by_place ON entries (run, place);
CREATE TABLE IF NOT EXISTS maps (path BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS planned (output BLOB PRIMARY KEY) WITHOUT ROWID;
"""


@contextmanager
def sqlite_errors(folder: Path) -> Iterator[None]:
    """Turn what SQLite raises into a SettingsError: a full disk, for example."""
    try:
        yield
    except sqlite3.Error as error:
        raise SettingsError(
            f"{folder / JOURNAL}: cannot be written ({error}). Finished results are complete.", setting="output"
        ) from error


class Journal:
    """The entries of the runs into one output folder. Any thread may use it; a context manager.

    Args:
        folder: the output folder, which exists. The file is made if it is not there.

    Raises:
        SettingsError: the file is not a journal of this program, is damaged or cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self._lock = threading.RLock()
        self._together = False
        try:
            self._base = sqlite3.connect(folder / JOURNAL, timeout=_WAIT_S, check_same_thread=False)
            self._base.execute("PRAGMA journal_mode = TRUNCATE")
            self._base.execute("PRAGMA synchronous = NORMAL")
            self._base.executescript(_SCHEMA)
            self._run = self._read_one("SELECT max(run) FROM runs")[0] or 0
        except sqlite3.Error as error:
            raise SettingsError(
                f"{folder / JOURNAL}: cannot be used ({error}). Move it and report.json away, or name another folder.",
                setting="output",
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Commit and close."""
        with self._lock:
            self._base.commit()
            self._base.close()

    def begin_run(self, head: dict[str, Any]) -> None:
        """Begin a run. Inputs that an earlier run refused or failed are forgotten; results are kept.

        Args:
            head: what the report says of the run as a whole.
        """
        with self._lock:
            self._run += 1
            self._base.execute("INSERT INTO runs VALUES (?, ?)", (self._run, json.dumps(head)))
            self._base.execute("DELETE FROM entries WHERE output IS NULL")
            self._commit()

    def plan(self, outputs: Iterable[Path]) -> None:
        """Note results that will be written. They are on disk before this returns."""
        with self._lock:
            self._base.executemany("INSERT OR IGNORE INTO planned VALUES (?)", [(os.fsencode(one),) for one in outputs])
            self._commit()

    def add(self, place: int, entry: dict[str, Any], maps: Iterable[Path] = (), planned: Path | None = None) -> None:
        """Add an entry of this run, in the place of an earlier one with the same result.

        Args:
            place: number of the input in the listing.
            entry: an entry of report.json.
            maps: places of the result's maps below the output folder.
            planned: place of the result that this input might have had. It is not planned any more.
        """
        output = None if entry["output"] is None else os.fsencode(entry["output"])
        row = (self._run, place, output, entry["status"], json.dumps(entry))
        with self._lock:
            self._base.execute(
                "INSERT OR REPLACE INTO entries (run, place, output, status, entry) VALUES (?, ?, ?, ?, ?)", row
            )
            if planned is not None:
                self._base.execute("DELETE FROM planned WHERE output = ?", (os.fsencode(planned),))
            self._base.executemany("INSERT OR IGNORE INTO maps VALUES (?)", [(os.fsencode(one),) for one in maps])

    def forget(self, output: Path) -> None:
        """Forget a result that is not in the folder any more."""
        with self._lock:
            self._base.execute("DELETE FROM entries WHERE output = ?", (os.fsencode(output),))

    def commit(self) -> None:
        """Put on disk what was added."""
        with self._lock:
            self._commit()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Put what is changed in this block on disk as a whole, or nothing of it if the process is killed."""
        with self._lock:
            self._together = True
            try:
                yield
            except BaseException:
                self._base.rollback()
                raise
            finally:
                self._together = False
            self.commit()

    def _commit(self) -> None:
        if not self._together:
            self._base.commit()

    def read_heads(self) -> dict[int, dict[str, Any]]:
        """Return what each run's report says of the run as a whole, by the number of the run."""
        with self._lock:
            return {run: json.loads(head) for run, head in self._base.execute("SELECT run, head FROM runs")}

    @property
    def is_new(self) -> bool:
        """Return whether no run was begun."""
        return self._run == 0

    def find(self, output: str | Path) -> tuple[int, dict[str, Any]] | None:
        """Return the run and the entry of a result, or None."""
        row = self._read_one("SELECT run, entry FROM entries WHERE output = ?", os.fsencode(output))
        return None if row is None else (row[0], json.loads(row[1]))

    def is_planned(self, output: Path) -> bool:
        """Return whether an unfinished run was going to write a result here. It may exist."""
        return self._read_one("SELECT 1 FROM planned WHERE output = ?", os.fsencode(output)) is not None

    def is_map(self, path: Path) -> bool:
        """Return whether a map of a result was written here."""
        return self._read_one("SELECT 1 FROM maps WHERE path = ?", os.fsencode(path)) is not None

    def count(self) -> Counter[str]:
        """Return the number of files of the last run by status."""
        with self._lock:
            rows = self._base.execute(
                "SELECT status, count(*) FROM entries WHERE run = ? GROUP BY status", (self._run,)
            )
            return Counter(dict(rows))

    def read_results(self) -> Iterator[dict[str, Any]]:
        """Yield the entries of every result that is in the folder, of any run."""
        after = 0
        while True:
            with self._lock:
                query = "SELECT id, entry FROM entries WHERE output IS NOT NULL AND id > ? ORDER BY id LIMIT ?"
                rows = self._base.execute(query, (after, _FETCHED)).fetchall()
            if not rows:
                return
            after = rows[-1][0]
            yield from (json.loads(entry) for _, entry in rows)

    def read_entries(self) -> Iterator[dict[str, Any]]:
        """Yield the entries of the last run, in the order of the listing."""
        after = -1
        while True:
            with self._lock:  # nothing else waits for a reader that is slow
                rows = self._base.execute(
                    "SELECT place, entry FROM entries WHERE run = ? AND place > ? ORDER BY place LIMIT ?",
                    (self._run, after, _FETCHED),
                ).fetchall()
            if not rows:
                return
            after = rows[-1][0]
            yield from (json.loads(entry) for _, entry in rows)

    def _read_one(self, query: str, *values: object) -> Any:
        with self._lock:
            return self._base.execute(query, values).fetchone()
