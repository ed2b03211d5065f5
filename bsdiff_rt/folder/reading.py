"""Input files, read ahead by threads and made ready for the networks; what cannot be read is told, not raised."""

from __future__ import annotations

import logging
import time
import traceback
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.config import InferSettings, Preprocessing
from bsdiff_rt.errors import BsdiffError, InputRefused
from bsdiff_rt.files import file_sha256
from bsdiff_rt.folder.report import FileEntry, path_digest
from bsdiff_rt.folder.tasks import DICOM_SUFFIXES, Task, uncertainty_path
from bsdiff_rt.formats.dicom_in import is_dicom, read_dicom
from bsdiff_rt.formats.radiograph import Radiograph
from bsdiff_rt.formats.raster import read_raster
from bsdiff_rt.imaging.network_input import Placement, shown, to_network
from bsdiff_rt.imaging.view import View, looks_negative, view_of

logger = logging.getLogger(__name__)

READERS = 2
NEGATIVE = "looks like a negative: its lungs are brighter than what lies between; if so, invert it and do it again"


@dataclass(frozen=True)
class Ready:
    """A file ready for the networks: what they see, [S, S] float32 in [-1, 1], and where the view lies in it."""

    task: Task
    output: Path
    radiograph: Radiograph
    view: View
    cxr_net: NDArray[np.float32]
    placement: Placement
    input_sha256: str
    seconds: float


class Reader:
    """Reads files for one run.

    Args:
        settings: of the run; its output folder holds what an earlier run finished.
        preprocessing: the bundle's.
        before: what an earlier run finished (`report.finished_before`).
    """

    def __init__(self, settings: InferSettings, preprocessing: Preprocessing, before: dict[str, FileEntry]) -> None:
        self.before = before
        self._settings = settings
        self._preprocessing = preprocessing

    def ahead(self, tasks: list[Task], depth: int) -> Generator[Ready | FileEntry, None, None]:
        """Outcomes of reading, in the order of the tasks, read up to `depth` files ahead."""
        pending: deque[Future[Ready | FileEntry]] = deque()
        with ThreadPoolExecutor(READERS) as threads:
            try:
                for task in tasks:
                    pending.append(threads.submit(self.read, task))
                    if len(pending) > depth:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                threads.shutdown(wait=False, cancel_futures=True)

    def read(self, task: Task) -> Ready | FileEntry:
        """Read one file for the networks, or say why not; never raises for what is wrong with a file."""
        started = time.monotonic()
        digest = None
        try:
            if task.refusal or task.output is None:
                raise InputRefused(task.refusal or "no output")
            digest = file_sha256(task.input)
            if self._is_finished(task.output, digest):
                done = self.before[str(task.output)]
                path_sha256 = path_digest(task.input)
                return replace(done, input=str(task.input), path_sha256=path_sha256, status="skipped", seconds=0.0)
            radiograph = read_radiograph(task.input, force_view=self._settings.force_view)
            if self._settings.format == "dicom" and radiograph.dataset is None:
                raise InputRefused("--format dicom needs DICOM input: an image file has no study to belong to")
            # At the networks' matrix a result has no borders to put back.
            trim = self._settings.trim and self._settings.size == "source"
            view = view_of(radiograph.cxr, trim=trim, least_span=self._preprocessing.least_span)
            cxr_net, placement = to_network(view.of(radiograph.cxr), self._preprocessing)
            if looks_negative(shown(cxr_net, placement)):
                logger.warning("%s: %s", task.input, NEGATIVE)
            cxr_net = view.without_marks(cxr_net, placement)
            return Ready(task, task.output, radiograph, view, cxr_net, placement, digest, time.monotonic() - started)
        except Exception as error:
            status: Literal["refused", "failed"] = "refused" if isinstance(error, InputRefused) else "failed"
            return not_done(task, status, reason_of(error, "read"), started, digest)

    def _is_finished(self, output: Path, input_sha256: str) -> bool:
        """Whether an earlier run made this output from the same input and it is still what was written."""
        entry = self.before.get(str(output))
        path = self._settings.output / output
        return (
            entry is not None
            and entry.input_sha256 == input_sha256
            and path.is_file()
            and file_sha256(path) == entry.sha256
            and (self._settings.samples == 1 or self._has_deviation(output, entry))
        )

    def _has_deviation(self, output: Path, entry: FileEntry) -> bool:
        path = uncertainty_path(self._settings.output, output)
        return path.is_file() and file_sha256(path) == entry.deviation_sha256


def read_radiograph(path: Path, *, force_view: bool = False) -> Radiograph:
    """Read a DICOM or raster file, told apart by content, not by name.

    Raises:
        InputRefused, InputFailed: see `dicom.read_dicom` and `raster.read_raster`.
    """
    if is_dicom(path) or path.suffix.lower() in DICOM_SUFFIXES:
        return read_dicom(path, force_view=force_view)
    return read_raster(path)


def not_done(
    task: Task, status: Literal["refused", "failed"], reason: str, started: float, input_sha256: str | None
) -> FileEntry:
    """The entry of a file that was not written; `started` in seconds of the monotonic clock."""
    seconds = round(time.monotonic() - started, 4)
    return FileEntry(str(task.input), None, status, reason, seconds, None, input_sha256, path_digest(task.input))


def reason_of(error: Exception, doing: Literal["read", "written"]) -> str:
    """One line on what happened to a file.

    Of exceptions that are not ours the text is left out: an OSError's repeats the path, others may quote the file. What
    nobody expected is a bug, which is told by its place, and still costs only the file that triggers it.
    """
    if isinstance(error, BsdiffError):
        return str(error)
    if isinstance(error, MemoryError):
        return "too large for this machine's memory"
    if isinstance(error, OSError):
        return f"cannot be {doing}: {error.strerror or type(error).__name__}"
    frames = traceback.extract_tb(error.__traceback__)
    logger.debug("a bug:\n%s", "".join(traceback.format_list(frames)))  # without the text, as above
    place = ([frame for frame in frames if Path(frame.filename).parent == Path(__file__).parent] or frames)[-1]
    return f"a bug ({type(error).__name__} in {Path(place.filename).name}, line {place.lineno}); please report it"
