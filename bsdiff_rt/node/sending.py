"""Send results to DICOM nodes: a thread for each destination, which never gives up. Torch-free."""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydicom import Dataset, dcmread
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    generate_uid,
)
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.sop_class import (  # type: ignore[attr-defined]  # made when pynetdicom is imported
    StorageCommitmentPushModel,
    StudyRootQueryRetrieveInformationModelFind,
)

from bsdiff_rt.errors import BsdiffError, InputFailed
from bsdiff_rt.formats.dicom_in import quiet_pydicom
from bsdiff_rt.node.commitment import OnReport, make_handler, offers_commitment, request_commitment
from bsdiff_rt.node.journal import MOST_ASKS, Journal, Sending, Uncommitted
from bsdiff_rt.node.receiving import IMAGE_CLASSES, TIMEOUT_S
from bsdiff_rt.node.settings import Destination, Tls

logger = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 600.0
_IDLE_S = 0.5  # a wake-up call that is missed costs this much
ASK_AGAIN_S = 600.0  # a report on storage commitment that does not come is asked for again
_REPORT_S = 3.0  # how long an association waits for the report
_MOST_ASKED = 100  # results in one request
_DUPLICATE = 0x0111  # Duplicate SOP Instance (PS3.7 annex C.4)
_WARNINGS = (0xB000, 0xB006, 0xB007)  # stored, with changes or not as the class asks (PS3.4 table B.2-1)


class NotSent(BsdiffError):
    """A result that did not arrive.

    Args:
        message: the reason, without anything from the header.
        away: whether the destination cannot be used at all now, rather than refusing this one object.
        unsure: whether it may have arrived all the same, because the answer is missing.
    """

    def __init__(self, message: str, *, away: bool = False, unsure: bool = False) -> None:
        super().__init__(message)
        self.away, self.unsure = away, unsure


@dataclass(frozen=True)
class Identity:
    """The UIDs of a result, as a destination knows it."""

    study: str
    series: str
    instance: str
    sop_class: str


class Connection:
    """An association with a destination, opened when it is needed.

    Args:
        destination: whom to speak to.
        aet: our own AE title.
        tls: our certificate; needed if the destination wants TLS.
        on_report: takes reports on storage commitment that come on the same association; None to ask for no commitment.
    """

    def __init__(
        self, destination: Destination, aet: str, tls: Tls | None = None, on_report: OnReport | None = None
    ) -> None:
        self._destination = destination
        self._handlers = [] if on_report is None else [make_handler(on_report)]
        self._context: ssl.SSLContext | None = None
        if destination.tls:
            assert tls is not None
            self._context = tls.make_context(server=False)
        self._ae = AE(ae_title=aet)
        self._ae.acse_timeout = self._ae.dimse_timeout = self._ae.network_timeout = TIMEOUT_S
        self._ae.connection_timeout = 10
        for image_class in IMAGE_CLASSES:
            self._ae.add_requested_context(image_class, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
            self._ae.add_requested_context(image_class, JPEG2000Lossless)
        self._ae.add_requested_context(StudyRootQueryRetrieveInformationModelFind)
        if on_report is not None:
            self._ae.add_requested_context(StorageCommitmentPushModel)
        self._association: Association | None = None
        self._may_ask = True

    def open(self) -> Association:
        """Return the association, opened if there is none.

        Raises:
            NotSent: the destination does not answer or does not accept it.
        """
        if self._association is not None and self._association.is_established:
            return self._association
        destination = self._destination
        tls = None if self._context is None else (self._context, destination.host)
        try:
            association = self._ae.associate(
                destination.host,
                destination.port,
                ae_title=destination.aet,
                tls_args=tls,
                evt_handlers=self._handlers,  # type: ignore[arg-type]
            )
        except OSError as error:  # a host name that nobody knows now, for example
            raise NotSent(f"{destination} cannot be reached ({error.strerror})", away=True) from error
        if not association.is_established:
            why = "rejected the association" if association.is_rejected else "cannot be reached"
            raise NotSent(f"{destination} {why}", away=True)
        self._association = association
        return association

    def close(self) -> None:
        """Release the association if there is one."""
        if self._association is not None and self._association.is_established:
            self._association.release()
        self._association, self._may_ask = None, True

    def has(self, identity: Identity) -> bool:
        """Return whether the destination says, asked by C-FIND, that it has an image. False if it gives no answer.

        Orthanc ends the association if it does not know who asks. It is not asked again before this one is closed.

        Raises:
            NotSent: the destination cannot be reached.
        """
        association = self.open()
        known = {context.abstract_syntax for context in association.accepted_contexts}
        if StudyRootQueryRetrieveInformationModelFind not in known or not self._may_ask:
            return False
        query = Dataset()
        query.QueryRetrieveLevel = "IMAGE"
        query.StudyInstanceUID, query.SeriesInstanceUID = identity.study, identity.series
        query.SOPInstanceUID = identity.instance
        found = False
        with quiet_pydicom():
            for status, answer in association.send_c_find(query, StudyRootQueryRetrieveInformationModelFind):
                if "Status" not in status:
                    logger.warning("%s does not answer C-FIND. It may get a result twice.", self._destination)
                    self._may_ask = False
                found = found or (answer is not None and answer.get("SOPInstanceUID") == identity.instance)
        if not self._may_ask:  # it may look open for a while, and nobody is there
            association.abort()
            self._association = None
        return found

    @property
    def offers_commitment(self) -> bool:
        """Return whether the destination, whose association is open, offers storage commitment."""
        return self._association is not None and offers_commitment(self._association)

    def ask_commitment(self, transaction: str, results: Iterable[Identity]) -> bool:
        """Ask the destination to answer for results. Return False if it does not offer this.

        Args:
            transaction: UID of the request.
            results: which it has.

        Raises:
            NotSent: the destination cannot be reached, refused the request, or did not answer.
        """
        association = self.open()
        if not offers_commitment(association):
            return False
        try:
            status = request_commitment(association, transaction, [(one.sop_class, one.instance) for one in results])
        except RuntimeError as error:
            raise NotSent(f"{self._destination} ended the association", away=True) from error
        if status is None:
            raise NotSent(f"{self._destination} did not answer the request for storage commitment", away=True)
        if status:
            raise NotSent(f"{self._destination} refused storage commitment with status 0x{status:04X}")
        return True

    def send(self, path: Path) -> None:
        """Send one image by C-STORE.

        Raises:
            NotSent: the destination did not take it, or did not answer.
        """
        association = self.open()
        try:
            with quiet_pydicom():
                status = association.send_c_store(path)
        except (ValueError, AttributeError) as error:  # no presentation context; their text may quote values
            raise NotSent(f"{self._destination} does not take this class or transfer syntax") from error
        except RuntimeError as error:  # the association ended between two images
            raise NotSent(f"{self._destination} ended the association", away=True) from error
        except OSError as error:
            raise NotSent(f"the result cannot be read ({error.strerror})") from error
        if "Status" not in status:
            raise NotSent(f"{self._destination} did not answer", away=True, unsure=True)
        if status.Status not in (0, _DUPLICATE, *_WARNINGS):
            raise NotSent(f"{self._destination} refused it with status 0x{status.Status:04X}")


def read_identity(path: Path) -> Identity:
    """Return the UIDs of a result.

    Raises:
        OSError: the file is missing or cannot be read.
        InputFailed: it is damaged.
    """
    keywords = ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"]
    try:
        with quiet_pydicom():
            header = dcmread(path, specific_tags=list(keywords), stop_before_pixels=True)
            return Identity(*(str(header[keyword].value) for keyword in keywords))
    except OSError:
        raise
    except Exception as error:  # damaged files make pydicom raise anything
        raise InputFailed(f"the result is damaged ({type(error).__name__})") from None


@dataclass(frozen=True)
class Outcome:
    """What became of one result that was to be sent: its path, the destination, and the reason if it failed."""

    path: str
    destination: str
    status: Literal["sent", "skipped", "failed"]
    reason: str | None = None


def send_results(folder: Path, paths: Iterable[Path], destination: str, connection: Connection) -> Iterator[Outcome]:
    """Send results once each, and yield what became of them. One that the destination has is skipped.

    Args:
        folder: of the results.
        paths: of the results, below the folder.
        destination: name for the outcomes.
        connection: to the destination. It is closed at the end.
    """
    try:
        for path in paths:
            try:
                if connection.has(read_identity(folder / path)):
                    yield Outcome(str(path), destination, "skipped", "it is there already")
                    continue
                connection.send(folder / path)
            except (NotSent, InputFailed) as error:
                yield Outcome(str(path), destination, "failed", str(error))
            except OSError as error:
                yield Outcome(str(path), destination, "failed", f"cannot be read ({error.strerror})")
            else:
                yield Outcome(str(path), destination, "sent")
    finally:
        connection.close()


class SendingThread(threading.Thread):
    """Sends what the journal holds for one destination, until it is stopped.

    A destination that cannot be reached is tried again after a pause, which doubles each time up to ten minutes. A
    result that is refused waits in the same way while others are sent.

    Args:
        destination: where to send.
        journal: what to send.
        connection: to the destination.
        results: folder of the results.
        on_sent: called when a result has arrived.
    """

    def __init__(
        self,
        destination: Destination,
        journal: Journal,
        connection: Connection,
        results: Path,
        on_sent: Callable[[Sending], None] = lambda _: None,
    ) -> None:
        super().__init__(name=f"sending to {destination.aet}", daemon=True)
        self._name, self._journal, self._connection = str(destination), journal, connection
        self._results, self._on_sent = results, on_sent
        self._postponed: dict[int, float] = {}  # number -> time of the monotonic clock
        self._pauses: dict[int | None, float] = {}  # number, or None for the destination -> last pause, s
        self._ended, self._wanted, self._reported = (threading.Event() for _ in range(3))
        self.error: Exception | None = None

    def wake(self) -> None:
        """Look at once for results to send."""
        self._wanted.set()

    def note_report(self) -> None:
        """Go on: a report on storage commitment has come."""
        self._reported.set()

    def stop(self) -> None:
        """End after the image that is being sent."""
        self._ended.set()
        self._wanted.set()
        self._reported.set()

    def run(self) -> None:
        """Send results until stopped. What nobody expected ends the thread, and the node with it."""
        try:
            while not self._ended.is_set():
                self._send_all()
                if self._ask_commitment():
                    # Nothing is sent meanwhile: an association on which both sides ask at once ends.
                    self._reported.wait(_REPORT_S)
                    continue
                self._connection.close()
                self._wanted.wait(_IDLE_S)
                self._wanted.clear()
            self._connection.close()
        except Exception as error:
            logger.debug("sending to %s ended", self._name, exc_info=True)
            self.error = error

    def _send_all(self) -> None:
        """Send what waits, until there is nothing more or the destination is away."""
        while not self._ended.is_set():
            now = time.monotonic()
            self._postponed = {number: until for number, until in self._postponed.items() if until > now}
            sending = self._journal.find_sending(self._name, self._postponed)
            if sending is None:
                return
            try:
                self._send(sending)
            except NotSent as error:
                unsure = error.unsure or (sending.begun and error.away)
                self._journal.note_unsent(sending, self._name, str(error), unsure=unsure)
                pause = self._lengthen_pause(None if error.away else sending.number)
                logger.warning("result %d: %s. Next try in %.0f s.", sending.number, error, pause)
                if error.away:
                    self._connection.close()
                    self._ended.wait(pause)
                else:
                    self._postponed[sending.number] = time.monotonic() + pause

    def _lengthen_pause(self, number: int | None) -> float:
        pause = min(2 * self._pauses.get(number, FIRST_PAUSE_S / 2), LONGEST_PAUSE_S)
        self._pauses[number] = pause
        return pause

    def _send(self, sending: Sending) -> None:
        """Send one result, unless it has arrived before.

        Raises:
            NotSent: it did not arrive.
        """
        path = self._results / f"{sending.sha256}.dcm"
        try:
            identity = read_identity(path)
        except (OSError, InputFailed):
            logger.error("result %d is missing or damaged. It is made again.", sending.number)
            self._journal.redo(sending.number)
            return
        if not (sending.begun and self._connection.has(identity)):
            self._connection.open()
            self._journal.begin_sending(sending, self._name)
            self._connection.send(path)
        self._journal.note_sent(sending, self._name, commit=self._connection.offers_commitment)
        self._pauses.pop(None, None)
        self._pauses.pop(sending.number, None)
        self._on_sent(sending)

    def _ask_commitment(self) -> bool:
        """Ask the destination to answer for what it was sent. Return whether it was asked and has taken the request."""
        asked_before = time.time() - ASK_AGAIN_S
        results = self._journal.find_uncommitted(self._name, asked_before, _MOST_ASKED)
        tired = [result.result_uid for result in results if result.asks >= MOST_ASKS]
        if tired:
            logger.warning("%s does not answer for %d results. They are not asked for again.", self._name, len(tired))
            self._journal.give_up_commitment(tired, self._name, "the destination does not report on it")
        identities = [one for result in results if result.asks < MOST_ASKS for one in self._identify(result)]
        if not identities or self._ended.is_set():
            return False
        transaction, instances = generate_uid(prefix=None), [one.instance for one in identities]
        try:
            self._connection.open()
            # Before the request: the report may come first. Without one, this is what asks again later.
            self._journal.begin_commitment(instances, self._name, transaction)
            self._reported.clear()
            offered = self._connection.ask_commitment(transaction, identities)
        except NotSent as error:
            logger.warning("%s. It is asked for storage commitment again later.", error)
            if error.away:
                self._connection.close()
                self._ended.wait(self._lengthen_pause(None))
            return False
        self._pauses.pop(None, None)
        if not offered:
            self._journal.give_up_commitment(instances, self._name, "the destination offers no commitment any more")
        return offered

    def _identify(self, result: Uncommitted) -> list[Identity]:
        """Return the identity of a result in a list, which is empty if its file is gone. Nobody can ask for it then."""
        try:
            return [read_identity(self._results / f"{result.sha256}.dcm")]
        except (OSError, InputFailed):
            self._journal.give_up_commitment([result.result_uid], self._name, "its file is gone")
            return []
