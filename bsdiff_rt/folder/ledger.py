"""A run's report while the run goes on: who finishes a file enters it here. Torch-free."""

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

from bsdiff_rt.errors import SettingsError
from bsdiff_rt.files import file_sha256
from bsdiff_rt.folder.report import FILE_NAME, FileEntry, Report, planned_in, results_in
from bsdiff_rt.folder.tasks import uncertainty_path

logger = logging.getLogger(__name__)

SAVE_EVERY_S = 5.0
SAVE_SHARE = 0.05  # of the time at most, however many files the report names


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Keep other runs out of an output folder: the last to end would write its own report over the others'.

    The lock is the folder's own and ends with the process, however that ends. Where the system has no such locks
    (Windows, some network drives) nothing is kept out.

    Raises:
        SettingsError: another run is at work there.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl  # not on Windows

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            reason = "another run writes into it; wait for its end, or choose another folder"
            raise SettingsError(f"--output {folder}: {reason}") from error
        except OSError as error:
            logger.debug("%s cannot be locked: %s", folder, error)
        yield
    finally:
        os.close(descriptor)


class Ledger:
    """Keeps a run's report up to date: in memory, on disk every few seconds, and for whoever watches.

    The report goes on naming what earlier runs wrote into the folder and still lies there. An input that has changed
    and gives no result keeps no older one: it may be of another patient's file. One that is as it was keeps it: what
    went wrong, a full disk say, is no fault of the result.

    Any thread may add: who finishes a file adds its entry itself, so that an interruption of the main thread cannot
    part the two.

    Args:
        report: the run's report, without files yet.
        folder: output folder.
        outputs: every input, as the report lists them, and where its result goes, below `folder`.
        before: what an earlier run finished (`finished_before`); entries not reached yet stay in the saved report, so
            that an interrupted run can be resumed again.
        on_file: told each entry as it is added.
    """

    def __init__(
        self,
        report: Report,
        folder: Path,
        outputs: Mapping[str, Path | None],
        before: dict[str, FileEntry],
        on_file: Callable[[FileEntry], None],
    ) -> None:
        self.report = report
        self._folder = folder
        self._outputs = outputs
        self._place = {name: number for number, name in enumerate(outputs)}
        self._before, self._earlier = before, results_in(folder)
        self._results = {*self._earlier, *outputs.values()}
        ours = planned_in(folder)  # what a killed run has written of it is known by nothing else
        self._planned = {
            name: str(path) for name, path in outputs.items() if path and (path in ours or not (folder / path).exists())
        }
        self._on_file = on_file
        self._lock = threading.RLock()
        self._started = time.monotonic()
        self._next_save = self._started + SAVE_EVERY_S

    def begin(self) -> None:
        """Write down what will be written: a run that is killed leaves results that its report does not name yet.

        Raises:
            SettingsError: the report cannot be written.
        """
        self.save()

    def add(self, entry: FileEntry) -> None:
        """Take up one file's fate."""
        with self._lock:
            self.report.files.append(entry)
            if entry.output is None:
                self._remove_older(self._outputs[entry.input], entry)
            elif entry.status == "ok" and self.report.settings.get("samples") == 1:
                self._remove_older_deviation(Path(entry.output))
            self._on_file(entry)
            if (started := time.monotonic()) >= self._next_save:
                try:
                    self.save()
                except SettingsError as error:  # there may be room again when the run ends
                    logger.warning("%s", error)
                now = time.monotonic()
                self._next_save = now + max(SAVE_EVERY_S, (now - started) / SAVE_SHARE)

    def save(self, busy_s: float = 0.0) -> None:
        """Write the report as it stands; `busy_s` is how long the networks worked, known at the end.

        Raises:
            SettingsError: it cannot be written.
        """
        with self._lock:
            self.report.networks_busy = busy_s / max(time.monotonic() - self._started, 1e-9)
            self._save()

    def _save(self) -> None:
        self.report.files.sort(key=lambda entry: self._place[entry.input])
        seconds = max(time.monotonic() - self._started, 1e-9)
        self.report.images_per_second = self.report.counts()["ok"] / seconds
        inputs = {entry.input for entry in self.report.files}
        outputs = {entry.output for entry in self.report.files}
        waiting = [
            replace(entry, status="skipped")
            for entry in self._before.values()
            if entry.input not in inputs
            and entry.output not in outputs
            and (self._folder / str(entry.output)).is_file()
        ]
        files = [*self.report.files, *waiting]
        named = {entry.output for entry in files}
        older = [entry for path, entry in self._earlier.items() if str(path) not in named]
        earlier = [entry for entry in older if (self._folder / str(entry.output)).is_file()]
        try:
            planned = [output for name, output in self._planned.items() if name not in inputs]
            replace(self.report, files=files, earlier=earlier, planned=planned).write(self._folder)
        except OSError as error:
            raise SettingsError(f"--output {self._folder}: {FILE_NAME} cannot be written ({error.strerror})") from error

    def _remove_older(self, output: Path | None, entry: FileEntry) -> None:
        """Remove the result of what the input was before, only while it is what that run wrote."""
        earlier = self._earlier.get(output) if output is not None else None
        if output is None or earlier is None:
            return
        if earlier.path_sha256 not in (None, entry.path_sha256):  # another input's
            return
        inputs = {earlier.input_sha256, entry.input_sha256}
        if None in inputs or len(inputs) == 1:  # not known to have changed
            return
        path = self._folder / output
        try:
            if not path.is_file() or file_sha256(path) != earlier.sha256:
                return
            path.unlink()
            logger.warning("%s: removed; it was made before %s changed", path, entry.input)
        except OSError as error:
            logger.warning("%s: the result of an earlier run cannot be removed (%s)", path, error.strerror)
        self._remove_older_deviation(output)

    def _remove_older_deviation(self, output: Path) -> None:
        """Remove the deviation map of an earlier result that is no longer there; a result in its place stays."""
        path = uncertainty_path(self._folder, output)
        if output not in self._earlier or path.relative_to(self._folder) in self._results:
            return
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s: the map of an earlier run cannot be removed (%s)", path, error.strerror)
