"""Read input files ahead of the model, in threads. A file that cannot be read becomes a report entry, not an error."""

from __future__ import annotations

import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from bsdiff_rt import formats
from bsdiff_rt.config import InferSettings, Preprocessing
from bsdiff_rt.errors import BsdiffError, InputFailed, InputRefused
from bsdiff_rt.files import file_sha256
from bsdiff_rt.folder.earlier import Finished
from bsdiff_rt.folder.report import FileEntry, digest_path, list_maps, locate_map
from bsdiff_rt.folder.tasks import Task
from bsdiff_rt.formats.radiograph import Radiograph
from bsdiff_rt.imaging.one_image import Prepared, prepare
from bsdiff_rt.urls import is_file, on_disk

logger = logging.getLogger(__name__)

READERS = 2  # threads; a run takes more where there are more processors (worker.py)

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Ready:
    """A file that is ready for the model.

    Attributes:
        task: the file and the place of its result.
        output: the result's path below the output folder.
        radiograph: the X-ray as it was read, with its header.
        prepared: the X-ray as the model takes it.
        input_sha256: hash of the file.
        warnings: what a user should know about the X-ray, one sentence each.
        seconds: time that reading and preparing took.
    """

    task: Task
    output: Path
    radiograph: Radiograph
    prepared: Prepared
    input_sha256: str
    warnings: tuple[str, ...]
    seconds: float


class Reader:
    """Reads files for one run.

    Args:
        settings: the run's settings. Its output folder holds what an earlier run finished.
        preprocessing: the bundle's.
        before: results of an earlier run that need not be done again (`earlier.find_finished`).
    """

    def __init__(self, settings: InferSettings, preprocessing: Preprocessing, before: Finished) -> None:
        self.before = before
        self._settings = settings
        self._preprocessing = preprocessing

    def read_ahead(self, tasks: Iterable[Task], depth: int, threads: int) -> Generator[Ready | FileEntry, None, None]:
        """Yield the outcome of reading each task, in order. Threads read up to `depth` files ahead."""
        return read_ahead(self.read, tasks, depth, threads)

    def read(self, task: Task) -> Ready | FileEntry:
        """Read one file for the model, or return the report entry that says why not. Never raises for a bad file."""
        started = time.monotonic()
        digest = None
        try:
            if task.output is None:
                raise (InputFailed if task.status == "failed" else InputRefused)(task.refusal)
            with on_disk(task.input, formats.MAX_FILE_BYTES) as file:
                digest = file_sha256(file)
                if (done := self._find_finished(task.output, digest)) is not None:
                    path_sha256 = digest_path(task.input)
                    return replace(done, input=str(task.input), path_sha256=path_sha256, status="skipped")
                radiograph = formats.read(file, any_view=self._settings.any_view)
            formats.check_kind(self._settings.format, radiograph)
            raw_view, probe = self._settings.raw_view, self._settings.probe
            prepared = prepare(radiograph.cxr, self._preprocessing, raw_view=raw_view, probe=probe)
            warnings = (*radiograph.warnings, *prepared.warnings)
            for warning in warnings:
                logger.warning("%s: %s", task.input, warning)
            seconds = time.monotonic() - started
            return Ready(task, task.output, radiograph, prepared, digest, warnings, seconds)
        except Exception as error:
            status: Literal["refused", "failed"] = "refused" if isinstance(error, InputRefused) else "failed"
            return make_not_done(task, status, describe_error(error, "read"), started, digest)

    def _find_finished(self, output: Path, input_sha256: str) -> FileEntry | None:
        """Return the entry of an earlier run that made this output from the same input, if it is unchanged."""
        entry = self.before.get(str(output))
        path = self._settings.output / output
        finished = (
            entry is not None
            and entry.input_sha256 == input_sha256
            and is_file(path)
            and file_sha256(path) == entry.sha256
            and all(self._has_map(kind, output, entry) for kind in list_maps(self._settings))
        )
        return entry if finished else None

    def _has_map(self, kind: str, output: Path, entry: FileEntry) -> bool:
        path = locate_map(self._settings.output, kind, output)
        return is_file(path) and file_sha256(path) == entry.maps.get(kind)


def read_ahead(
    read: Callable[[T], R], items: Iterable[T], depth: int, threads: int = READERS
) -> Generator[R, None, None]:
    """Yield `read(item)` for each item, in order. Threads read up to `depth` items ahead of the caller."""
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as readers:
        try:
            for item in items:
                pending.append(readers.submit(read, item))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            readers.shutdown(wait=False, cancel_futures=True)


def make_not_done(
    task: Task, status: Literal["refused", "failed"], reason: str, started: float, input_sha256: str | None
) -> FileEntry:
    """Return the report entry of a file that was not written; `started` is a time of the monotonic clock, s."""
    seconds = round(time.monotonic() - started, 4)
    return FileEntry(str(task.input), None, status, reason, seconds, None, input_sha256, digest_path(task.input))


def describe_error(error: Exception, doing: Literal["read", "written"]) -> str:
    """Return one line that says what happened to a file.

    The text of exceptions that are not ours is left out: it repeats the path or may quote the file. An exception that
    nobody expected is a bug. Its place is named, and it costs only the file that triggers it.
    """
    if isinstance(error, BsdiffError):
        return str(error)
    if isinstance(error, MemoryError):
        return "too large for this machine's memory"
    if isinstance(error, OSError):
        return f"cannot be {doing}: {error.strerror or type(error).__name__}"
    frames = traceback.extract_tb(error.__traceback__)
    logger.debug("a bug:\n%s", "".join(traceback.format_list(frames)))  # without the text, as above
    package = Path(__file__).parents[1]
    place = ([frame for frame in frames if package in Path(frame.filename).parents] or frames)[-1]
    return f"a bug ({type(error).__name__} in {Path(place.filename).name}, line {place.lineno}); please report it"
