"""Take files through one loaded model: read, suppress, write. One bad file never stops the others.

Reading (reading.py) and writing (writing.py) run in threads beside the model (model.py). A few files are in memory at
once, however many there are. A run has one such worker in its own process (pipeline.py), or many in others
(ray_workers.py).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from bsdiff_rt.bundle import Bundle
from bsdiff_rt.config import InferSettings
from bsdiff_rt.engines.select import Choice
from bsdiff_rt.errors import one_line, out_of_memory
from bsdiff_rt.folder.earlier import Finished
from bsdiff_rt.folder.reading import READERS, Reader, Ready, make_not_done
from bsdiff_rt.folder.report import FileEntry, Report, describe_environment
from bsdiff_rt.folder.tasks import Task
from bsdiff_rt.folder.writing import Writer
from bsdiff_rt.model import Model, list_decisive
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.devices import count_threads
from bsdiff_rt.sampling.batching import Taken

logger = logging.getLogger(__name__)

MOST_HELPERS = 16  # threads that read, and as many that write


def begin_report(bundle: Bundle, settings: InferSettings, device: str, chosen: Choice | Runner) -> Report:
    """Return an empty report that names everything that decides the pixels.

    Args:
        bundle: the model.
        settings: the run's settings, resolved.
        device: name of the device.
        chosen: the runner, or the choice of one.
    """
    name = chosen.runner if isinstance(chosen, Choice) else chosen.name
    decisive = list_decisive(settings, name, chosen.precision) | {"format": settings.format}
    identity = bundle.identity | {"licence": bundle.manifest.licence}
    report = Report(identity, decisive, describe_environment(device))
    if isinstance(chosen, Choice) and chosen.engine:
        report.environment["engine"] = chosen.engine.sha256
    return report


class Worker(Protocol):
    """What does the files of a run: a model in this process, or models in others.

    Its `report` is the run's report, without files. It names what decides the pixels.
    """

    @property
    def report(self) -> Report:
        """Return the report."""

    @property
    def busy_s(self) -> float:
        """Return the seconds that the model worked so far; the mean of several models."""

    def do(self, tasks: Iterable[Task], before: Finished, add: Callable[[FileEntry], None]) -> None:
        """Take every file to its end.

        Args:
            tasks: the files. The next one is read when another one leaves memory.
            before: results that need not be made again.
            add: called with each file's entry, by any thread. When this returns, and after an interruption, no thread
                is left.
        """


class LocalWorker:
    """A model in this process with its reader and writer; a context manager.

    Args:
        bundle: the model.
        settings: the run's settings, resolved.
        report: see `Worker`.
        runner: both networks of the bundle, loaded. It is closed at the end.
        choice: how the runner was chosen; None if the caller made it.
    """

    def __init__(
        self, bundle: Bundle, settings: InferSettings, report: Report, runner: Runner, choice: Choice | None
    ) -> None:
        self.report, self._settings, self._runner = report, settings, runner
        self._preprocessing = bundle.manifest.preprocessing
        self._writer = Writer(settings, bundle, report.settings)
        self._make_model = partial(Model, bundle, runner, settings, choice)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._runner)
            self._model = stack.enter_context(self._make_model())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, _)

    @property
    def busy_s(self) -> float:
        """Return the seconds that the model worked so far."""
        return self._model.busy_s

    def do(self, tasks: Iterable[Task], before: Finished, add: Callable[[FileEntry], None]) -> None:
        """Take every file to its end; see `Worker.do`."""
        # Reading and writing spend their time in libraries that release Python's lock: more threads keep a GPU busy.
        helpers = min(MOST_HELPERS, max(READERS, count_threads()))
        work = _Work(self._model, self._writer, helpers, add)
        reader = Reader(self._settings, self._preprocessing, before)
        with closing(reader.read_ahead(tasks, work.in_flight, helpers)) as outcomes:
            work.do(outcomes)


class _Work:
    """Files on their way through the model and the writers.

    Args:
        model: makes the pictures.
        writer: writes them, in threads.
        writers: number of these threads.
        add: takes each file's entry.
    """

    def __init__(self, model: Model, writer: Writer, writers: int, add: Callable[[FileEntry], None]) -> None:
        self._model, self._writer, self._writers, self._add = model, writer, writers, add

    @property
    def in_flight(self) -> int:
        """Return how many files wait in memory before the model, and behind it: those of two batches."""
        return max(2, 2 * self._model.batch // self._model.passes_per_image)

    def do(self, outcomes: Iterator[Ready | FileEntry]) -> None:
        """Take every file to its end. On return, and after an interruption, the writers are done."""
        writing: deque[Future[None]] = deque()
        with ThreadPoolExecutor(self._writers) as threads:
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
