"""Keep the report of a run up to date while the run goes on. Torch-free."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from bsdiff_rt.errors import SettingsError
from bsdiff_rt.files import file_sha256, remove_parts
from bsdiff_rt.folder.earlier import Named, Results
from bsdiff_rt.folder.report import (
    FILE_NAME,
    FileEntry,
    Report,
    locate_map,
    now,
    read_name,
    read_planned,
    read_rates,
    read_results,
)
from bsdiff_rt.folder.search import STALE
from bsdiff_rt.urls import is_url, list_below

logger = logging.getLogger(__name__)

SAVE_EVERY_S = 5.0
SAVE_SHARE = 0.05  # at most this share of the time, however many files the report names


@contextmanager
def only_run(folder: Path, setting: str | None = "output") -> Iterator[None]:
    """Keep other runs out of an output folder, and remove what a killed one left half written.

    Without this, the last run to end would replace the reports of the others.

    The lock belongs to the process and ends with it. Windows and some network drives have no such locks; there, other
    runs are not kept out. Object storage has none, either, and nothing in it is ever half written.

    Args:
        folder: the output folder.
        setting: what named it, for the message.

    Raises:
        SettingsError: another run is writing into the folder.
    """
    if sys.platform == "win32" or is_url(folder):
        yield
        return
    import fcntl  # not on Windows

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"{folder}: another run is writing into it. Wait for its end, or choose another folder."
            raise SettingsError(message, setting=setting) from error
        except OSError as error:
            logger.debug("%s cannot be locked: %s", folder, error)
        else:
            remove_parts(folder)
        yield
    finally:
        os.close(descriptor)


class Ledger:
    """Keep a run's report up to date: in memory, on disk every few seconds, and for a progress display.

    The report keeps naming the results of earlier runs that are still in the folder. If an input has changed and gives
    no result now, its older result is renamed to NAME.stale, because it may show another patient. If the input is
    unchanged, the older result stays: a full disk, for example, says nothing about it.

    Any thread may add entries. The thread that finishes a file adds its entry, so that an interruption of the main
    thread cannot separate the two.

    A run of more than `journal.LONG` files uses `long_ledger.LongLedger`.

    Args:
        report: the run's report, without files yet.
        folder: the output folder.
        outputs: every input, as the report lists it, and the place of its result below `folder`.
        before: what an earlier run finished (`report.read_finished`). Entries that this run has not reached yet stay
            in the saved report, so that an interrupted run can be resumed again.
        on_file: called with each entry as it is added.
    """

    _earlier: Results
    _results: Named

    def __init__(
        self,
        report: Report,
        folder: Path,
        outputs: Mapping[str, Path | None],
        before: Mapping[str, FileEntry],
        on_file: Callable[[FileEntry], None],
    ) -> None:
        self.report = report
        self._folder = folder
        self._before = before
        self._earlier_rates = read_rates(folder) if before else (0.0, 0.0)
        report.preview = report.preview or read_name(folder, "preview")
        report.page = report.page or read_name(folder, "page")
        self._on_file = on_file
        self._lock = threading.RLock()
        self._started = time.monotonic()
        self._next_save = self._started + SAVE_EVERY_S
        self._outputs: dict[str, Path | None] = {}
        self._planned: dict[str, str] = {}
        self.expect(outputs)

    def expect(self, outputs: Mapping[str, Path | None]) -> None:
        """Expect further inputs. One that was done by this run is done again: its entry leaves the report.

        Args:
            outputs: the inputs and the places of their results, as in the constructor.
        """
        with self._lock:
            self._outputs |= outputs
            self._place = {name: number for number, name in enumerate(self._outputs)}
            self._earlier = self._listed = read_results(self._folder)
            self._results = {*self._listed, *self._outputs.values()}
            self.report.files = [entry for entry in self.report.files if entry.input not in outputs]
            planned = read_planned(self._folder)  # nothing else knows what a killed run has written
            self._there = list_below(self._folder) if is_url(self._folder) else None
            self._planned |= {
                name: str(path)
                for name, path in outputs.items()
                if path and (path in planned or not self._is_there(path))
            }

    def begin(self) -> None:
        """Save which results will be written. If the run is killed, some exist that its report does not list yet.

        Raises:
            SettingsError: the report cannot be written.
        """
        self._save()

    def add(self, entry: FileEntry) -> None:
        """Add one file's outcome."""
        with self._lock:
            if entry.output is None:
                entry = self._set_older_aside(self._outputs[entry.input], entry)
            elif entry.status == "ok":
                self._set_maps_aside(Path(entry.output), entry.maps)
            self._keep(entry)
            self._on_file(entry)
            if (started := time.monotonic()) >= self._next_save:
                try:
                    self._save()
                except SettingsError as error:  # there may be room again when the run ends
                    logger.warning("%s", error)
                ended = time.monotonic()
                self._next_save = ended + max(SAVE_EVERY_S, (ended - started) / SAVE_SHARE)

    def save(self, busy_s: float = 0.0, *, ended: bool = True) -> None:
        """Write the report at the end of a run, or while a run waits for further inputs.

        Args:
            busy_s: seconds in which the model computed.
            ended: whether the run has ended.

        Raises:
            SettingsError: the report cannot be written.
        """
        with self._lock:
            self.report.ended = now() if ended else None
            self._save(busy_s)

    def _keep(self, entry: FileEntry) -> None:
        self.report.files.append(entry)

    def _rate(self, busy_s: float) -> None:
        if written := self.report.counts()["ok"]:
            seconds = max(time.monotonic() - self._started, 1e-9)
            self.report.images_per_second, self.report.model_busy = written / seconds, busy_s / seconds
        else:
            self.report.images_per_second, self.report.model_busy = self._earlier_rates

    def _save(self, busy_s: float = 0.0) -> None:
        self.report.files.sort(key=lambda entry: self._place[entry.input])
        self._rate(busy_s)
        inputs = {entry.input for entry in self.report.files}
        outputs = {entry.output for entry in self.report.files}
        waiting = [
            replace(entry, status="skipped")
            for entry in self._before.values()
            if entry.input not in inputs and entry.output not in outputs and self._exists(entry)
        ]
        files = [*self.report.files, *waiting]
        listed = {entry.output for entry in files}
        earlier = [entry for path, entry in self._listed.items() if str(path) not in listed and self._exists(entry)]
        planned = [output for name, output in self._planned.items() if name not in inputs]
        self._write(replace(self.report, files=files, earlier=earlier, planned=planned))

    def _write(self, report: Report) -> None:
        try:
            report.write(self._folder)
        except OSError as error:
            message = (
                f"{self._folder}: {FILE_NAME} cannot be written ({error.strerror}). Finished results are complete."
            )
            raise SettingsError(message, setting="output") from error

    def _exists(self, entry: FileEntry) -> bool:
        if self._there is None:
            return os.path.isfile(self._folder / str(entry.output))
        return self._is_there(Path(str(entry.output)))

    def _is_there(self, output: Path) -> bool:
        """Return whether a result exists. In object storage, this was found out when its input was expected."""
        return os.path.exists(self._folder / output) if self._there is None else output.as_posix() in self._there

    def _set_older_aside(self, output: Path | None, entry: FileEntry) -> FileEntry:
        """Rename the result of what the input was before, if it is still as it was written. Return the entry."""
        earlier = self._earlier.get(output) if output is not None else None
        if output is None or earlier is None:
            return entry
        if earlier.path_sha256 not in (None, entry.path_sha256):  # the result of another input
            return entry
        digests = {earlier.input_sha256, entry.input_sha256}
        if None in digests or len(digests) == 1:  # the input is not known to have changed
            return entry
        stale = self._rename(output, earlier.sha256)
        if stale is None:
            return entry
        self._set_maps_aside(output)
        warning = f"{self._folder / output}: made before {entry.input} changed. Renamed to {stale.name}."
        logger.error("%s", warning)  # shown with --quiet, too
        return replace(entry, warnings=[*entry.warnings, warning])

    def _set_maps_aside(self, output: Path, new: Mapping[str, str] = MappingProxyType({})) -> None:
        """Rename the maps of an earlier result that is replaced or gone, but the `new` ones. A result stays."""
        earlier = self._earlier.get(output)
        for kind, sha256 in earlier.maps.items() if earlier else ():
            place = locate_map(Path(), kind, output)
            if kind in new or place in self._results:
                continue
            if stale := self._rename(place, sha256):
                logger.info("%s: belongs to an earlier result. Renamed to %s.", self._folder / place, stale.name)

    def _rename(self, output: Path, sha256: str | None) -> Path | None:
        """Rename a file that an earlier run wrote to NAME.stale, or NAME.2.stale and so on if that exists.

        Returns:
            The new path; None if there is no file, it is not as it was written, or it cannot be renamed.
        """
        path = self._folder / output
        try:
            if not path.is_file() or file_sha256(path) != sha256:
                return None
            stale, number = path.with_name(path.name + STALE), 1
            while stale.exists() if is_url(stale) else os.path.lexists(stale):
                number += 1
                stale = path.with_name(f"{path.name}.{number}{STALE}")
            path.rename(stale)
        except OSError as error:
            logger.error("%s: belongs to an earlier input and cannot be renamed (%s).", path, error.strerror)
            return None
        return stale
