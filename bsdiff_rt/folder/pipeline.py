"""Run the model over many files. One bad file never stops the run.

A worker takes the files from disk to disk (worker.py); with Ray there are many of them (ray_workers.py). This module
lists the files, keeps the report, and resumes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import NoReturn

from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.config import InferSettings
from bsdiff_rt.engines.select import Choice, choose
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.folder.earlier import Finished, find_finished
from bsdiff_rt.folder.html import write_page
from bsdiff_rt.folder.journal import LONG
from bsdiff_rt.folder.ledger import Ledger, only_run
from bsdiff_rt.folder.long_ledger import LongLedger
from bsdiff_rt.folder.ray_workers import RayWorkers
from bsdiff_rt.folder.reading import Reader
from bsdiff_rt.folder.report import (
    PAGE,
    PREVIEW,
    FileEntry,
    Report,
    digest_path,
    list_maps,
    read_entry,
)
from bsdiff_rt.folder.stored_journal import has_journal, open_journal
from bsdiff_rt.folder.tasks import Listing, Task, list_tasks, search_tasks
from bsdiff_rt.folder.watching import Watcher, say_once
from bsdiff_rt.folder.worker import LocalWorker, Worker, begin_report
from bsdiff_rt.folder.writing import Writer
from bsdiff_rt.model import (
    load_runner_for,
    make_table,
    request_runner,
    resolve_settings,
)
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.devices import resolve_device

logger = logging.getLogger(__name__)

ANNOUNCED = 256  # files of a long run that are noted in its journal before the first of them is done


class Inference:
    """One run of `infer`.

    Args:
        settings: what the user asked for.
        runner: both networks of the bundle, already loaded; closed after the run. None chooses one by the settings.
        ray: address of a Ray cluster, or `ray_workers.LOCAL`; None runs in this process.

    Raises:
        SettingsError: settings that cannot be used.
        BundleError: the bundle is refused.
        EngineError: the runner cannot be used here.
    """

    def __init__(self, settings: InferSettings, runner: Runner | None = None, ray: str | None = None) -> None:
        self.bundle = open_bundle(settings.bundle)
        self.settings = resolve_settings(settings, self.bundle.manifest)
        make_table(self.settings, self.bundle.manifest)  # refuses what cannot be run
        self.device = resolve_device(settings.device) if runner is None else runner.device
        self._runner, self._ray = runner, ray
        # The choice may change when the runner is loaded: what does not load is passed over.
        self.report = self._begin_report(runner or choose(request_runner(self.bundle, settings)))

    def _begin_report(self, chosen: Choice | Runner) -> Report:
        report = begin_report(self.bundle, self.settings, str(self.device), chosen)
        report.preview = PREVIEW if self.settings.preview else None
        report.page = PAGE if self.settings.html else None
        return report

    def find_tasks(self, inputs: Iterable[Path]) -> Listing:
        """Return the files to do, each with the place of its result. More than `LONG` files are found on the way."""
        reserved = {*list_maps(self.settings)}
        reserved |= {PREVIEW} if self.settings.preview else set()
        reserved |= {PAGE} if self.settings.html else set()
        settings = self.settings
        found = search_tasks(inputs, settings.output, settings.format, reserved, overwrite=settings.overwrite)
        return list_tasks(found)

    def plan(self, tasks: Iterable[Task]) -> Iterator[FileEntry]:
        """Yield what `run` would report for tasks, without doing it: `ok` for what would be written."""
        reader = Reader(self.settings, self.bundle.manifest.preprocessing, self._find_finished())
        for task in tasks:
            outcome = reader.read(task)
            if isinstance(outcome, FileEntry):
                yield outcome
                continue
            yield FileEntry(
                str(task.input),
                str(task.output),
                "ok",
                input_sha256=outcome.input_sha256,
                path_sha256=digest_path(task.input),
                warnings=list(outcome.warnings),
            )

    def run(self, tasks: Listing, on_file: Callable[[FileEntry], None] = lambda _: None) -> Report:
        """Do every file and return the report, which is also written to the output folder.

        Args:
            tasks: from `find_tasks`.
            on_file: called with each file's entry when it is done.

        Raises:
            SettingsError: the output folder cannot be written, or the page is asked for in a long run.
            EngineError: the runner does not load.
            BaseException: an interruption is passed on, after what was being written is finished and reported.
        """
        folder = self.settings.output
        is_long = tasks.is_long or has_journal(folder)
        if is_long and self.settings.html:
            where = "a part of the folder" if tasks.is_long else "results in another output folder: here was a long run"
            raise SettingsError(f"{PAGE} takes at most {LONG} files. Make it for {where}.", setting="html")
        with self._begin(on_file, is_long=is_long) as do:
            do(tasks, True)
        if self.settings.preview:
            Writer(self.settings, self.bundle, self.report.settings).write_preview(read_files(self.report, folder))
        if self.settings.html:
            write_page(self.report, folder)
        return self.report

    def watch(
        self,
        folder: Path,
        on_file: Callable[[FileEntry], None] = lambda _: None,
        *,
        wait: Callable[[], None],
    ) -> NoReturn:
        """Do the files of a folder as they arrive, with the model kept loaded, until interrupted.

        A file is done when it has kept size and time between two looks, and again when it changes. The report lists the
        files of the whole time. Trouble with a folder is logged, and the files are tried again.

        Args:
            folder: the folder to watch, with everything below it.
            on_file: called with each file's entry when it is done.
            wait: called between two looks. What it raises ends the watch.

        Raises:
            SettingsError: the output folder cannot be written at the start.
            EngineError: the runner does not load.
            BaseException: an interruption is passed on, after what was being written is finished and reported.
        """
        if has_journal(self.settings.output):
            raise SettingsError(
                f"{self.settings.output}: holds a run with more than {LONG} files. Choose another folder.",
                setting="output",
            )
        watcher = Watcher(folder, self.settings.output)
        with say_once(), self._begin(on_file) as do:
            while True:
                if ready := watcher.poll():
                    try:
                        do([task for task in self.find_tasks([folder]) if task.input in ready], False)
                    except SettingsError as error:  # a full disk, a drive that is away
                        logger.error("%s", error)
                        watcher.forget(ready)
                wait()

    @contextmanager
    def keep_loaded(self, add: Callable[[FileEntry], None]) -> Iterator[Callable[[Iterable[Task]], None]]:
        """Load the model, and yield a function that does tasks. Write no report.

        The caller keeps other runs out of the output folder. The function takes tasks that arrive while it works, and
        returns when there are no more and every result is written.

        Args:
            add: called with each file's entry when it is done, in any thread.

        Raises:
            SettingsError: the output folder cannot be written.
            EngineError: the runner does not load.
        """
        _make_output_folder(self.settings.output)
        with self._open_worker() as worker:
            self.report = worker.report
            yield lambda tasks: worker.do(tasks, {}, add)

    @contextmanager
    def _begin(
        self, on_file: Callable[[FileEntry], None], *, is_long: bool = False
    ) -> Iterator[Callable[[Iterable[Task], bool], None]]:
        """Load the model, and yield a function that does tasks and saves the report.

        Its second argument states whether the run ends with these tasks. An interruption ends it anyway.
        """
        folder = self.settings.output
        _make_output_folder(folder)
        with ExitStack() as stack:
            stack.enter_context(only_run(folder))  # first, so that it is let go when no worker writes any more
            worker = stack.enter_context(self._open_worker())
            self.report = worker.report
            before = self._find_finished()
            ledger: Ledger
            if is_long:
                ledger = stack.enter_context(closing(LongLedger(self.report, folder, on_file)))
            else:
                ledger = Ledger(self.report, folder, {}, before if isinstance(before, dict) else {}, on_file)

            def do(tasks: Iterable[Task], last: bool) -> None:
                if is_long:
                    ledger.begin()
                    tasks = _announce(ledger, tasks)
                else:
                    tasks = list(tasks)
                    ledger.expect({str(task.input): task.output for task in tasks})
                    ledger.begin()
                worker.do(tasks, before, ledger.add)
                ledger.save(worker.busy_s, ended=last)

            try:
                yield do
            except BaseException:
                with suppress(SettingsError):  # what ended the run is worth more words
                    ledger.save(worker.busy_s)
                raise

    def _open_worker(self) -> AbstractContextManager[Worker]:
        if self._ray is not None:
            return RayWorkers(self.settings, self.report, self._ray)
        choice, runner = (None, self._runner) if self._runner else load_runner_for(self.bundle, self.settings)
        assert runner is not None
        return LocalWorker(self.bundle, self.settings, self._begin_report(choice or runner), runner, choice)

    def _find_finished(self) -> Finished:
        return {} if self.settings.overwrite else find_finished(self.settings.output, self.report)


def _announce(ledger: Ledger, tasks: Iterable[Task]) -> Iterator[Task]:
    """Yield tasks, some of them after the ledger was told to expect these."""
    tasks = iter(tasks)
    while group := list(islice(tasks, ANNOUNCED)):
        ledger.expect({str(task.input): task.output for task in group})
        yield from group


def read_files(report: Report, folder: Path) -> Iterator[FileEntry]:
    """Yield the entries of a run that has ended, wherever they are kept."""
    if report.files_in is None:
        yield from report.files
        return
    with open_journal(folder) as journal:
        yield from map(read_entry, journal.read_entries())


def _make_output_folder(folder: Path) -> None:
    """Make the output folder and check that results can be written there, before the first image is done.

    Raises:
        SettingsError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".bsdiff-rt-probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SettingsError(
            f"{folder}: cannot be written ({reason}). Choose another folder.", setting="output"
        ) from error
