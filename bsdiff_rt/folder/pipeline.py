"""Folder to folder: read, sample, enhance, write. One bad file never stops the run.

Reading (reading.py) and writing run in worker threads around the networks (batching.py); a few files are held in memory
at once, however many there are.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bsdiff_rt.bundle import Bundle, open_bundle
from bsdiff_rt.config import InferSettings
from bsdiff_rt.engines.select import Choice, choose, load_first
from bsdiff_rt.errors import SettingsError, one_line, out_of_memory
from bsdiff_rt.folder.ledger import Ledger, only_run
from bsdiff_rt.folder.preview import FILE_NAME as PREVIEW
from bsdiff_rt.folder.reading import Reader, Ready, not_done
from bsdiff_rt.folder.report import FileEntry, Report, environment, finished_before, path_digest
from bsdiff_rt.folder.tasks import UNCERTAINTY, Task, find_tasks
from bsdiff_rt.folder.writing import Writer
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.registry import resolve_device
from bsdiff_rt.sampling.batching import Suppressor, Taken, auto_batch
from bsdiff_rt.sampling.noise import ImageNoise
from bsdiff_rt.sampling.schedule import Table, sampler_table

logger = logging.getLogger(__name__)

WRITERS = 2


class Inference:
    """One run of `infer`: the settings resolved against bundle and machine, and the run itself.

    Args:
        settings: what the user asked for.

    Raises:
        SettingsError: settings that cannot be used.
        BundleError: the bundle is refused.
        EngineError: the runner cannot be used here.
    """

    def __init__(self, settings: InferSettings) -> None:
        self.bundle = open_bundle(settings.bundle)
        manifest = self.bundle.manifest
        sampler = settings.sampler or manifest.sampler.name
        # The bundle's number of steps was chosen for its own sampler; another one runs in full.
        own_steps = manifest.sampler.steps if sampler == manifest.sampler.name else manifest.schedule.train_steps
        self.settings = replace(
            settings,
            sampler=sampler,
            steps=own_steps if settings.steps is None else settings.steps,
            enhance=manifest.enhance if settings.enhance is None else settings.enhance,
            mirror=manifest.mirror if settings.mirror is None else settings.mirror,
            detail=settings.detail or manifest.detail,
        )
        self.settings = replace(self.settings, scanner_tone=self._scanner_tone(settings.scanner_tone))
        self._passes = settings.samples * (2 if self.settings.mirror else 1)  # of each image through the networks
        self.table: Table = sampler_table(manifest.schedule, sampler, self.settings.steps or 0)
        for seed in (settings.seed, settings.seed + settings.samples - 1):
            ImageNoise(seed, b"")  # refuses a seed out of range before any work is done
        self.device = resolve_device(settings.device)
        self.batch = settings.batch or 1  # images the networks are given at once; resolved when the runner is loaded
        self._settle(choose(*self._asked()))

    def _asked(self) -> tuple[Bundle, str, torch.device, str, Path | None, int | None]:
        """What to run, in the order of `choose` and `load_first`."""
        asked = self.settings
        return self.bundle, asked.runner, self.device, asked.precision, asked.engine, asked.batch

    def _settle(self, choice: Choice) -> None:
        """Begin the report: what decides the pixels. Batch and device do not: noise belongs to the image."""
        names = ("sampler", "steps", "seed", "samples", "enhance", "mirror", "scanner_tone", "trim", "size", "detail")
        decisive = {name: getattr(self.settings, name) for name in (*names, "format", "sop")}
        decisive |= {"runner": choice.runner, "precision": choice.precision}
        self.report = Report(self.bundle.identity, decisive, environment(str(self.device)))
        if choice.engine:
            self.report.environment["engine"] = choice.engine.sha256

    def _scanner_tone(self, asked: bool | None) -> bool:
        """Whether results get their scanner's tone: by default where it is known and the picture is the networks'.

        Raises:
            SettingsError: asked for where that cannot be.
        """
        known, detail = bool(self.bundle.manifest.tone.cxr), self.settings.detail
        if asked and not known:
            raise SettingsError("--scanner-tone: this bundle knows no scanner's tone; `python -m export --tone PAIRS`")
        if asked and detail == "source":
            raise SettingsError(
                "--scanner-tone: --detail source keeps the source's tone; give --detail network or both"
            )
        return known and detail != "source" if asked is None else asked

    def tasks(self, inputs: Iterable[Path]) -> list[Task]:
        """Every file to do (`discover.find_tasks`)."""
        reserved = {PREVIEW} if self.settings.preview else set()
        reserved |= {UNCERTAINTY} if self.settings.samples > 1 else set()
        settings = self.settings
        return find_tasks(inputs, settings.output, settings.format, reserved, overwrite=settings.overwrite)

    def plan(self, inputs: Iterable[Path]) -> Iterator[FileEntry]:
        """What `run` would do, without doing it: `ok` would be written, `skipped` and `refused` as they would be."""
        reader = self._reader()
        for task in self.tasks(inputs):
            outcome = reader.read(task)
            yield (
                outcome
                if isinstance(outcome, FileEntry)
                else FileEntry(
                    str(task.input),
                    str(task.output),
                    "ok",
                    input_sha256=outcome.input_sha256,
                    path_sha256=path_digest(task.input),
                )
            )

    def run(self, tasks: list[Task], on_file: Callable[[FileEntry], None] = lambda _: None) -> Report:
        """Do every file; the report, also written to the output folder, tells each one's fate.

        Args:
            tasks: from `tasks`.
            on_file: told each file's entry when it is done.

        Raises:
            SettingsError: the output folder cannot be written.
            EngineError: the runner does not load.
            BaseException: an interruption is passed on, after what was being written is finished and reported.
        """
        folder = self.settings.output
        _make_output_folder(folder)
        choice, runner = load_first(*self._asked())
        with runner, only_run(folder):
            self._settle(choice)  # not always the one of the plan: what does not load is passed over
            reader, writer = self._reader(), Writer(self.settings, self.bundle, self.table.steps, self.report)
            outputs = {str(task.input): task.output for task in tasks}
            ledger = Ledger(self.report, folder, outputs, reader.before, on_file)
            self.batch = _batch(self.settings.batch, runner)
            suppressor = Suppressor(runner, self.table, enhance=bool(self.settings.enhance), batch=self.batch)
            ledger.begin()
            try:
                with (
                    suppressor,
                    closing(reader.ahead(tasks, self._in_flight())) as outcomes,
                    ThreadPoolExecutor(WRITERS) as threads,
                ):
                    writing: deque[Future[None]] = deque()
                    for outcome in self._batched(outcomes):
                        if isinstance(outcome, FileEntry):
                            ledger.add(outcome)
                            continue
                        writing += self._do(outcome, suppressor, threads, writer, ledger)
                        while len(writing) > self._in_flight():
                            writing.popleft().result()
                    for write in writing:
                        write.result()
            except BaseException:
                with suppress(SettingsError):  # what ended the run is worth more words
                    ledger.save(suppressor.busy_s)
                raise
            # After the writers: leaving their `with` has waited for what they were given.
            ledger.save(suppressor.busy_s)
        if self.settings.preview:
            writer.write_preview(self.report.files)
        return self.report

    def _in_flight(self) -> int:
        """Files held in memory before the networks, and as many behind them: two batches, of all passes of a file."""
        return max(2, 2 * self.batch // self._passes)

    def _reader(self) -> Reader:
        before = {} if self.settings.overwrite else finished_before(self.settings.output, self.report)
        return Reader(self.settings, self.bundle.manifest.preprocessing, before)

    def _batched(self, outcomes: Iterator[Ready | FileEntry]) -> Iterator[list[Ready] | FileEntry]:
        """Group what is ready into batches; what is decided already passes through at once."""
        batch: list[Ready] = []
        for outcome in outcomes:
            if isinstance(outcome, FileEntry):
                yield outcome
                continue
            batch.append(outcome)
            if (len(batch) + 1) * self._passes > self.batch:  # one more would begin another batch
                yield batch
                batch = []
        if batch:
            yield batch

    def _do(
        self, batch: list[Ready], suppressor: Suppressor, threads: ThreadPoolExecutor, writer: Writer, ledger: Ledger
    ) -> Iterator[Future[None]]:
        """Both networks on every pass of some files, then hand each file to a writer, which enters it in the ledger.

        A backend without the memory for this batch gets smaller ones from now on. One that fails otherwise (any
        RuntimeError) fails these files; the next ones may fit.
        """
        started = time.monotonic()
        try:
            results = list(self._order(batch, suppressor, threads))
        except (RuntimeError, MemoryError) as error:
            logger.debug("a batch failed", exc_info=True)
            smaller = max(self.batch // 2, suppressor.smallest)
            if out_of_memory(error) and smaller < self.batch:
                logger.warning("out of memory with %d images at once; going on with %d", self.batch, smaller)
                self.batch = smaller
                yield from self._do(batch, suppressor, threads, writer, ledger)
                return
            reason = f"the networks failed ({one_line(error)}); nothing was written"
            for ready in batch:
                ledger.add(not_done(ready.task, "failed", reason, started - ready.seconds, ready.input_sha256))
            return

        def finish(ready: Ready, mine: list[Future[Taken]]) -> None:
            ledger.add(self._finish(ready, mine, writer))

        for index, ready in enumerate(batch):
            mine = results[index * self._passes : (index + 1) * self._passes]
            yield threads.submit(finish, ready, mine)

    def _order(
        self, files: list[Ready], suppressor: Suppressor, threads: ThreadPoolExecutor
    ) -> Iterator[Future[Taken]]:
        """Give the networks `batch` passes at a time; each one's result, [S, S], is fetched by a writer thread.

        Passes of a file: its samples, one after another, each followed by that of its mirror image where asked for.
        """
        passes = []
        for ready in files:
            for number in range(self.settings.samples):
                noise = ImageNoise(self.settings.seed + number, ready.radiograph.pixel_digest)
                passes.append((ready.cxr_net, noise))
                if self.settings.mirror:
                    passes.append((ready.cxr_net[:, ::-1], noise))
        for first in range(0, len(passes), self.batch):
            part = passes[first : first + self.batch]
            host = suppressor.submit([cxr_net for cxr_net, _ in part], [noise for _, noise in part])
            for place in range(len(part)):  # before anything waits for them: they free the memory for the next part
                yield threads.submit(host.take, place)

    def _finish(self, ready: Ready, results: list[Future[Taken]], writer: Writer) -> FileEntry:
        """Wait for a file's passes and write what they give."""
        started = time.monotonic()
        try:
            taken = [result.result() for result in results]
            passes = np.stack([image for image, _ in taken])
        except (RuntimeError, MemoryError) as error:
            reason = f"the networks failed ({one_line(error)}); nothing was written"
            return not_done(ready.task, "failed", reason, started - ready.seconds, ready.input_sha256)
        return writer.write(ready, passes, sum(seconds for _, seconds in taken))


def _batch(asked: int | None, runner: Runner) -> int:
    """Images per batch: what was asked for, if the runner takes it, else what suits the device.

    Raises:
        SettingsError: asked for more than the runner takes; fewer are filled up.
    """
    _, most = runner.batch_range
    if asked is not None and most is not None and asked > most:
        raise SettingsError(
            f"--batch {asked}: the {runner.name} runner takes at most {most} here; give less, or build an engine for it"
        )
    return asked or auto_batch(runner)


def _make_output_folder(folder: Path) -> None:
    """Raises SettingsError if results could not be written there; better now than after the first image."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".bsdiff-rt-probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SettingsError(f"--output {folder}: cannot be written ({reason}); choose another folder") from error
