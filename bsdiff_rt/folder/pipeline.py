"""Run the model over many files: read, suppress, write. One bad file never stops the run.

Reading (reading.py) and writing (writing.py) run in threads beside the model (model.py). A few files are in memory at
once, however many there are.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import numpy as np

from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.config import InferSettings
from bsdiff_rt.engines.select import Choice, choose
from bsdiff_rt.errors import SettingsError, one_line, out_of_memory
from bsdiff_rt.folder.html import write_page
from bsdiff_rt.folder.ledger import Ledger, only_run
from bsdiff_rt.folder.reading import Reader, Ready, make_not_done
from bsdiff_rt.folder.report import (
    PAGE,
    PREVIEW,
    FileEntry,
    Report,
    describe_environment,
    digest_path,
    list_maps,
    read_finished,
)
from bsdiff_rt.folder.tasks import Task, find_tasks
from bsdiff_rt.folder.watching import Watcher
from bsdiff_rt.folder.writing import Writer
from bsdiff_rt.model import (
    Model,
    list_decisive,
    load_runner_for,
    make_table,
    request_runner,
    resolve_settings,
)
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.devices import resolve_device
from bsdiff_rt.sampling.batching import Taken

logger = logging.getLogger(__name__)

WRITERS = 2


class Inference:
    """One run of `infer`.

    Args:
        settings: what the user asked for.
        runner: both networks of the bundle, already loaded; closed after the run. None chooses one by the settings.

    Raises:
        SettingsError: settings that cannot be used.
        BundleError: the bundle is refused.
        EngineError: the runner cannot be used here.
    """

    def __init__(self, settings: InferSettings, runner: Runner | None = None) -> None:
        self.bundle = open_bundle(settings.bundle)
        self.settings = resolve_settings(settings, self.bundle.manifest)
        make_table(self.settings, self.bundle.manifest)  # refuses what cannot be run
        self.device = resolve_device(settings.device) if runner is None else runner.device
        self._runner = runner
        # The choice may change when the runner is loaded: what does not load is passed over.
        self.report = self._begin_report(runner or choose(request_runner(self.bundle, settings)))

    def _begin_report(self, chosen: Choice | Runner) -> Report:
        """Return an empty report that names everything that decides the pixels."""
        name = chosen.runner if isinstance(chosen, Choice) else chosen.name
        decisive = list_decisive(self.settings, name, chosen.precision) | {"format": self.settings.format}
        bundle = self.bundle.identity | {"licence": self.bundle.manifest.licence}
        report = Report(bundle, decisive, describe_environment(str(self.device)))
        report.preview = PREVIEW if self.settings.preview else None
        report.page = PAGE if self.settings.html else None
        if isinstance(chosen, Choice) and chosen.engine:
            report.environment["engine"] = chosen.engine.sha256
        return report

    def find_tasks(self, inputs: Iterable[Path]) -> list[Task]:
        """Return every file to do, with the place of its result."""
        reserved = {*list_maps(self.settings)}
        reserved |= {PREVIEW} if self.settings.preview else set()
        reserved |= {PAGE} if self.settings.html else set()
        settings = self.settings
        return find_tasks(inputs, settings.output, settings.format, reserved, overwrite=settings.overwrite)

    def plan(self, tasks: list[Task]) -> Iterator[FileEntry]:
        """Yield what `run` would report for tasks, without doing it: `ok` for what would be written."""
        reader = self._make_reader()
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

    def run(self, tasks: list[Task], on_file: Callable[[FileEntry], None] = lambda _: None) -> Report:
        """Do every file and return the report, which is also written to the output folder.

        Args:
            tasks: from `find_tasks`.
            on_file: called with each file's entry when it is done.

        Raises:
            SettingsError: the output folder cannot be written.
            EngineError: the runner does not load.
            BaseException: an interruption is passed on, after what was being written is finished and reported.
        """
        with self._begin(on_file) as do:
            do(tasks, True)
        if self.settings.preview:
            Writer(self.settings, self.bundle, self.report.settings).write_preview(self.report.files)
        if self.settings.html:
            write_page(self.report, self.settings.output)
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
        watcher = Watcher(folder, self.settings.output)
        with self._begin(on_file) as do:
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
        with self._load() as model:
            reader = Reader(self.settings, self.bundle.manifest.preprocessing, {})
            work = _Work(model, Writer(self.settings, self.bundle, self.report.settings), add)

            def do(tasks: Iterable[Task]) -> None:
                with closing(reader.read_ahead(tasks, work.in_flight)) as outcomes:
                    work.do(outcomes)

            yield do

    @contextmanager
    def _load(self) -> Iterator[Model]:
        """Load the model, and begin a report that says which runner it has."""
        choice, runner = (None, self._runner) if self._runner else load_runner_for(self.bundle, self.settings)
        assert runner is not None
        with runner, Model(self.bundle, runner, self.settings, choice) as model:
            self.report = self._begin_report(choice or runner)
            yield model

    @contextmanager
    def _begin(self, on_file: Callable[[FileEntry], None]) -> Iterator[Callable[[list[Task], bool], None]]:
        """Load the model, and yield a function that does tasks and saves the report.

        Its second argument states whether the run ends with these tasks. An interruption ends it anyway.
        """
        folder = self.settings.output
        _make_output_folder(folder)
        with self._load() as model, only_run(folder):
            reader, writer = self._make_reader(), Writer(self.settings, self.bundle, self.report.settings)
            ledger = Ledger(self.report, folder, {}, reader.before, on_file)
            work = _Work(model, writer, ledger.add)

            def do(tasks: list[Task], last: bool) -> None:
                ledger.expect({str(task.input): task.output for task in tasks})
                ledger.begin()
                with closing(reader.read_ahead(tasks, work.in_flight)) as outcomes:
                    work.do(outcomes)
                ledger.save(model.busy_s, ended=last)

            try:
                yield do
            except BaseException:
                with suppress(SettingsError):  # what ended the run is worth more words
                    ledger.save(model.busy_s)
                raise

    def _make_reader(self) -> Reader:
        before = {} if self.settings.overwrite else read_finished(self.settings.output, self.report)
        return Reader(self.settings, self.bundle.manifest.preprocessing, before)


class _Work:
    """Files on their way through the model and the writers.

    Args:
        model: makes the pictures.
        writer: writes them, in threads.
        add: takes each file's entry.
    """

    def __init__(self, model: Model, writer: Writer, add: Callable[[FileEntry], None]) -> None:
        self._model, self._writer, self._add = model, writer, add

    @property
    def in_flight(self) -> int:
        """Return how many files wait in memory before the model, and behind it: those of two batches."""
        return max(2, 2 * self._model.batch // self._model.passes_per_image)

    def do(self, outcomes: Iterator[Ready | FileEntry]) -> None:
        """Take every file to its end. On return, and after an interruption, the writers are done."""
        writing: deque[Future[None]] = deque()
        with ThreadPoolExecutor(WRITERS) as threads:
            for outcome in self._group(outcomes):
                if isinstance(outcome, FileEntry):
                    self._add(outcome)
                    continue
                writing += self._suppress(outcome, threads)
                while len(writing) > self.in_flight:
                    writing.popleft().result()
            for write in writing:
                write.result()

    def _group(self, outcomes: Iterator[Ready | FileEntry]) -> Iterator[list[Ready] | FileEntry]:
        """Group files into batches; what is decided already passes through at once."""
        batch: list[Ready] = []
        for outcome in outcomes:
            if isinstance(outcome, FileEntry):
                yield outcome
                continue
            batch.append(outcome)
            if (len(batch) + 1) * self._model.passes_per_image > self._model.batch:  # one more begins another batch
                yield batch
                batch = []
        if batch:
            yield batch

    def _suppress(self, files: list[Ready], threads: ThreadPoolExecutor) -> Iterator[Future[None]]:
        """Give some files to the model and each result to a writer thread.

        A backend without the memory for this batch gets smaller ones from now on. One that fails otherwise (any
        RuntimeError) fails these files; the next ones may fit.
        """
        started, model = time.monotonic(), self._model
        try:
            images = [(ready.prepared, ready.radiograph.pixel_digest) for ready in files]
            outputs = [threads.submit(take) for take in model.order(images)]
        except (RuntimeError, MemoryError) as error:
            logger.debug("a batch failed", exc_info=True)
            smaller = max(model.batch // 2, model.smallest_batch)
            if out_of_memory(error) and smaller < model.batch:
                logger.warning("out of memory with %d images at once; going on with %d", model.batch, smaller)
                model.batch = smaller
                yield from self._suppress(files, threads)
                return
            for ready in files:
                self._fail(ready, error, started)
            return
        count = model.passes_per_image
        for index, ready in enumerate(files):
            yield threads.submit(self._finish, ready, outputs[index * count : (index + 1) * count])

    def _finish(self, ready: Ready, outputs: list[Future[Taken]]) -> None:
        """Wait for a file's passes and write what they give."""
        started = time.monotonic()
        try:
            taken = [output.result() for output in outputs]
            passes = np.stack([image for image, _ in taken])
        except (RuntimeError, MemoryError) as error:
            self._fail(ready, error, started)
            return
        self._add(self._writer.write(ready, passes, sum(seconds for _, seconds in taken)))

    def _fail(self, ready: Ready, error: Exception, started: float) -> None:
        reason = f"the model failed ({one_line(error)}); nothing was written"
        self._add(make_not_done(ready.task, "failed", reason, started - ready.seconds, ready.input_sha256))


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
