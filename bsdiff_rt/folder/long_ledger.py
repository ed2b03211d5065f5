"""Keep the report of a long run: entries go to the journal, and report.parquet is written at the end. Torch-free."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bsdiff_rt.errors import SettingsError
from bsdiff_rt.files import open_atomically
from bsdiff_rt.folder.earlier import find_named, find_results, take_over
from bsdiff_rt.folder.journal import sqlite_errors
from bsdiff_rt.folder.ledger import SAVE_EVERY_S, Ledger
from bsdiff_rt.folder.report import PARQUET, FileEntry, Report, locate_map, read_name, read_rates
from bsdiff_rt.folder.stored_journal import name_journal, open_journal

logger = logging.getLogger(__name__)

_ROWS = 10_000  # of a row group
# Columns that hold JSON, because each has another shape for other settings.
_AS_JSON = ("maps", "retention", "view", "warnings")


class LongLedger(Ledger):
    """Keep the report of a run of any length up to date. Only files in flight are in memory.

    Args:
        report: the run's report, without files.
        folder: the output folder.
        on_file: called with each entry as it is added.

    Raises:
        SettingsError: the journal in the folder cannot be used.
    """

    def __init__(self, report: Report, folder: Path, on_file: Callable[[FileEntry], None]) -> None:
        self.report, self._folder, self._on_file = report, folder, on_file
        self._lock = threading.RLock()
        self._earlier_rates = read_rates(folder)
        report.preview = report.preview or read_name(folder, "preview")
        report.page = report.page or read_name(folder, "page")
        self._journal = open_journal(folder)
        if self._journal.is_new:
            take_over(folder, self._journal)
        self._earlier = find_results(folder, self._journal)
        self._results = find_named(folder, self._journal)
        self._outputs: dict[str, Path | None] = {}
        self._places: dict[str, int] = {}
        self._listed_count = 0
        self._started = time.monotonic()
        self._next_save = self._started + SAVE_EVERY_S
        report.files_in, report.counted = name_journal(folder), self._journal.count()

    def expect(self, outputs: Mapping[str, Path | None]) -> None:
        """Expect further inputs, which are forgotten when their entries are added.

        Args:
            outputs: the inputs and the places of their results, as in `Ledger`.
        """
        with self._lock, sqlite_errors(self._folder):
            for name in outputs:
                self._places[name] = self._listed_count
                self._listed_count += 1
            self._outputs |= outputs
            self._journal.plan(path for path in outputs.values() if path)

    def begin(self) -> None:
        """Save the report without files. What `expect` was told is on disk already.

        Raises:
            SettingsError: the report cannot be written.
        """
        with sqlite_errors(self._folder):
            self._journal.begin_run(json.loads(self.report.to_json()))
        assert self.report.counted is not None
        self.report.counted.clear()
        self._save()

    def save(self, busy_s: float = 0.0, *, ended: bool = True) -> None:
        """Write the report, and report.parquet if the run has ended."""
        super().save(busy_s, ended=ended)
        if ended:
            with sqlite_errors(self._folder):
                write_parquet(self._journal.read_entries(), self._folder)

    def close(self) -> None:
        """Close the journal."""
        with sqlite_errors(self._folder):
            self._journal.close()

    def _keep(self, entry: FileEntry) -> None:
        assert self.report.counted is not None
        planned = self._outputs.pop(entry.input)
        maps = [locate_map(Path(), kind, entry.output) for kind in entry.maps] if entry.output else []
        with sqlite_errors(self._folder):
            self._journal.add(self._places.pop(entry.input), asdict(entry), maps, planned)
        self.report.counted[entry.status] += 1

    def _rename(self, output: Path, sha256: str | None) -> Path | None:
        stale = super()._rename(output, sha256)
        if stale is not None:
            self._journal.forget(output)
        return stale

    def _save(self, busy_s: float = 0.0) -> None:
        self._rate(busy_s)
        with sqlite_errors(self._folder):
            self._journal.commit()
        self._write(self.report)


def write_parquet(entries: Iterator[dict[str, Any]], folder: Path) -> None:
    """Write report.parquet: one row for each input. Without pyarrow a warning says what to install."""
    if find_spec("pyarrow") is None:
        logger.warning(
            "%s needs pyarrow. Install bsdiff-rt[archive]. %s has every entry.", PARQUET, name_journal(folder)
        )
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ("input", "output", "status", "reason", "sha256", "input_sha256", "path_sha256", *_AS_JSON)
    schema = pa.schema([*((name, pa.string()) for name in texts), ("seconds", pa.float64())])
    try:
        with open_atomically(folder / PARQUET) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for rows in _group(map(_flatten, entries), _ROWS):
                writer.write_table(pa.Table.from_pylist(rows, schema))
    except OSError as error:
        raise SettingsError(
            f"{folder / PARQUET}: cannot be written ({error.strerror}). {name_journal(folder)} has every entry.",
            setting="output",
        ) from error


def _flatten(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry as a row. Bytes of a file name that are no text become escapes, as in report.html."""
    row = entry | {key: json.dumps(entry.get(key)) for key in _AS_JSON}
    return {
        key: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
        for key, value in row.items()
    }


def _group(rows: Iterable[dict[str, Any]], count: int) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    for row in rows:
        group.append(row)
        if len(group) == count:
            yield group
            group = []
    if group:
        yield group
