"""A DICOM node: receive X-rays, run the model that stays loaded, send results. The journal joins the three."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from pydicom import dcmread

from bsdiff_rt.errors import BsdiffError, SettingsError
from bsdiff_rt.folder.ledger import only_run
from bsdiff_rt.folder.pipeline import Inference
from bsdiff_rt.folder.report import FileEntry
from bsdiff_rt.folder.tasks import Task
from bsdiff_rt.formats.dicom_in import quiet_pydicom
from bsdiff_rt.node.commitment import CommitmentReport
from bsdiff_rt.node.journal import Journal, Sending
from bsdiff_rt.node.receiving import Receiver, quiet_libraries, remove_orphans
from bsdiff_rt.node.rules import ELEMENTS
from bsdiff_rt.node.sending import Connection, SendingThread, read_identity
from bsdiff_rt.node.settings import NodeSettings
from bsdiff_rt.node.status import State, StatusServer

logger = logging.getLogger(__name__)

JOURNAL = "journal.sqlite"
MOST_STARTS = 10  # an X-ray that the program did not survive so often is given up
_LONE_STARTS = 3  # one that it did not survive so often is processed alone, so that it is known to be the reason
_JOURNAL_DAYS = 90.0
_CLEAN_EVERY_S = 600.0
_LOOK_EVERY_S = 1.0
_STOP_S = 90.0  # longer than a destination may take to answer


class Node:
    """A DICOM node on its folder.

    Args:
        settings: addresses, permissions and limits.
        inference: the model's settings; its output folder is `settings.results`.

    Raises:
        SettingsError: a setting cannot be used.
    """

    def __init__(self, settings: NodeSettings, inference: Inference) -> None:
        settings.check()
        self._settings, self._inference = settings, inference
        self._ended, self._wanted = threading.Event(), threading.Event()
        self._in_work: dict[str, int] = {}  # SHA-256 and number of X-rays
        self._lock, self._files = threading.Lock(), threading.RLock()
        self._senders: list[SendingThread] = []
        self._receiver: Receiver | None = None
        self._status: StatusServer | None = None
        self._working = False
        self._error: BaseException | None = None

    @property
    def port(self) -> int:
        """Return the TCP port that X-rays are received at."""
        assert self._receiver is not None
        return self._receiver.port

    @property
    def http_port(self) -> int | None:
        """Return the port of the status page, or None if there is none."""
        return None if self._status is None else self._status.port

    def start(self, stack: ExitStack) -> None:
        """Load the model and begin to receive, to process and to send.

        Args:
            stack: its end stops everything: X-rays in work are finished, the others wait in the journal.

        Raises:
            SettingsError: the folder, an address or a certificate cannot be used.
            EngineError: the runner does not load.
        """
        settings = self._settings
        quiet_libraries()
        _check_folder(settings.folder)
        for folder in (settings.received, settings.results):
            _make_folder(folder)
        stack.enter_context(only_run(settings.folder, None))
        self._journal = Journal(settings.folder / JOURNAL)
        stack.callback(self._journal.close)
        for folder in (settings.received, settings.results):
            remove_orphans(folder, self._journal.list_files())
        if settings.http_port is not None:  # before the model, which takes its time: the port may be taken
            self._status = StatusServer(settings.http_port, self._journal, self.read_state)
            stack.callback(self._status.close)
        do = stack.enter_context(self._inference.keep_loaded(self._add))
        self._start_sending(stack)
        worker = threading.Thread(target=self._process, args=(do,), name="model", daemon=True)
        worker.start()
        stack.callback(worker.join)
        stack.callback(self._stop)
        # The last one to start and the first one to stop: what it takes, the others can do.
        self._receiver = Receiver(
            settings, self._journal, self._files, self._make_room, self._wanted.set, self._note_report
        )
        stack.callback(self._receiver.close)

    def _start_sending(self, stack: ExitStack) -> None:
        settings = self._settings
        names = [str(destination) for destination in settings.destinations]
        for name, (count, _) in self._journal.count_unsent().items():
            if name not in names:
                logger.warning(
                    "%d results wait for %s, which is no destination now. Name it to send them.", count, name
                )
        self._journal.keep_destinations(names)
        self._senders = [
            SendingThread(
                destination,
                self._journal,
                Connection(destination, settings.aet, settings.tls, self._note_report),
                settings.results,
                self._note_sent,
            )
            for destination in settings.destinations
        ]
        stack.callback(self._join_senders)
        for sender in self._senders:
            sender.start()

    def _stop(self) -> None:
        self._ended.set()
        self._wanted.set()
        for sender in self._senders:
            sender.stop()

    def _join_senders(self) -> None:
        """Wait for the image that each thread is sending. One that hangs is given up: the journal knows of it."""
        deadline = time.monotonic() + _STOP_S
        for sender in self._senders:
            sender.join(max(0.0, deadline - time.monotonic()))

    def watch(self, seconds: float) -> None:
        """Wait some time, and raise what ended a part of the node meanwhile.

        Raises:
            BsdiffError: the model or a sending thread ended.
        """
        self._ended.wait(seconds)
        if self._error is not None:
            raise BsdiffError(f"the node ended ({type(self._error).__name__}). Start it again.") from self._error
        for sender in self._senders:
            if sender.error is not None:
                raise BsdiffError(f"{sender.name} ended ({type(sender.error).__name__}).") from sender.error

    def read_state(self) -> State:
        """Return how the node is, for the status page."""
        problems = [] if self._working else ["The model is not running."]
        problems += [f"{sender.name} ended." for sender in self._senders if not sender.is_alive()]
        counts = {} if self._receiver is None else dict(self._receiver.counts)
        names = [str(destination) for destination in self._settings.destinations]
        return State(problems, counts, self._settings.quota_bytes, names)

    def _process(self, do: Callable[[Iterable[Task]], None]) -> None:
        """Give the model what was received, until stopped. What nobody expected ends the node."""
        self._working, next_clean = True, 0.0
        try:
            while not self._ended.is_set():
                if time.monotonic() >= next_clean:
                    self._clean()
                    next_clean = time.monotonic() + _CLEAN_EVERY_S
                do(self._take())
                self._wanted.wait(_LOOK_EVERY_S)
                self._wanted.clear()
        except BaseException as error:
            logger.debug("the model's thread ended", exc_info=True)
            self._error = error
            self._ended.set()
        finally:
            self._working = False

    def _take(self) -> Iterator[Task]:
        """Yield X-rays that wait, until there are none or the node stops."""
        while not self._ended.is_set():
            with self._lock:
                waiting = self._journal.find_waiting(self._in_work.values())
                if waiting is None or (waiting.starts >= _LONE_STARTS and self._in_work):
                    return
                self._in_work[waiting.sha256] = waiting.number
            if waiting.starts >= MOST_STARTS:
                self._give_up(waiting.sha256, "failed", f"the program ended {MOST_STARTS} times while processing it")
                continue
            name = f"{waiting.sha256}.dcm"
            reason = self._settings.rules.find_reason(read_rule_values(self._settings.received / name))
            if reason is not None:
                self._give_up(waiting.sha256, "refused", reason)
                continue
            self._journal.begin(waiting.number)
            yield Task(self._settings.received / name, Path(name))
            if waiting.starts >= _LONE_STARTS:
                return

    def _add(self, entry: FileEntry) -> None:
        """Enter what became of an X-ray. Called by the pipeline, in any thread."""
        sha256 = Path(entry.input).stem
        if entry.output is None:
            self._give_up(sha256, "refused" if entry.status == "refused" else "failed", entry.reason or "")
            return
        path = self._settings.results / entry.output  # on the disk: the pipeline flushes it before it says ok
        names = [str(destination) for destination in self._settings.destinations]
        uid, remark = read_identity(path).instance, " ".join(f"Warning: {one}" for one in entry.warnings) or None
        is_sent = self._journal.finish(sha256, uid, path.stat().st_size, names, remark)
        number = self._leave_work(sha256)
        logger.info("X-ray %d: done in %.1f s%s", number, entry.seconds, "" if is_sent else ", sent before")
        for sender in self._senders:
            sender.wake()

    def _give_up(self, sha256: str, state: Literal["refused", "failed"], reason: str) -> None:
        self._journal.give_up(sha256, state, reason)
        logger.warning("X-ray %d: %s: %s", self._leave_work(sha256), state, reason)

    def _leave_work(self, sha256: str) -> int:
        with self._lock:
            return self._in_work.pop(sha256)

    def _note_sent(self, sending: Sending) -> None:
        logger.info("result %d: sent", sending.number)
        if self._status is not None:
            self._status.observe_sent(max(0.0, time.time() - sending.received_at))

    def _note_report(self, report: CommitmentReport) -> None:
        """Enter what a destination says about results that it has. Called in the thread of an association."""
        found = self._journal.note_commitment(report.transaction, report.committed, report.failed)
        for sender in self._senders:
            sender.note_report()
        if not found:
            logger.warning("a report on storage commitment belongs to no request of this node")
            return
        logger.info("storage commitment: a destination answers for %d more", len(report.committed))
        if report.failed:
            logger.warning("a destination does not answer for %d results. They are sent again.", len(report.failed))

    def _clean(self) -> None:
        """Remove the files of objects that were finished some days ago, and very old entries."""
        for number, sha256, _ in self._journal.find_finished(time.time() - self._settings.keep_days * 86400):
            self._remove(number, sha256)
        self._journal.forget(time.time() - _JOURNAL_DAYS * 86400)

    def _make_room(self, missing: int) -> int:
        """Remove files of finished objects, the oldest first, until some bytes are freed. Return how many were."""
        freed = 0
        for number, sha256, size in self._journal.find_finished(float("inf")):
            if freed >= missing:
                break
            freed += size if self._remove(number, sha256) else 0
        return freed

    def _remove(self, number: int, sha256: str) -> bool:
        """Remove the files of a finished object. Return False if it was received again meanwhile."""
        with self._files:
            if not self._journal.note_removed(number):
                return False
            for folder in (self._settings.received, self._settings.results):
                (folder / f"{sha256}.dcm").unlink(missing_ok=True)
        return True


def read_rule_values(path: Path) -> dict[str, str]:
    """Return what rules may ask for of a received X-ray, by name of ELEMENTS; {} for a file that cannot be read.

    Such a file is given to the model's pipeline, which says what is wrong with it.
    """
    try:
        with quiet_pydicom():
            header = dcmread(path, specific_tags=list(ELEMENTS.values()), stop_before_pixels=True, force=True)
            return {name: str(header.get(keyword, "") or "") for name, keyword in ELEMENTS.items()}
    except Exception:  # damaged files make pydicom raise anything
        return {}


def _check_folder(folder: Path) -> None:
    """Check that nothing else lies in the node's folder. Files in it are removed in time.

    Raises:
        SettingsError: something does.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / JOURNAL).is_file():
        raise SettingsError(f"{folder}: holds files, but no {JOURNAL} of a node. Name an empty folder or a new one.")


def _make_folder(folder: Path) -> None:
    """Make a folder that only this user can read: it holds X-rays of patients.

    Raises:
        SettingsError: it cannot be made.
    """
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{folder}: cannot be made ({error.strerror}). Choose another folder.") from error
