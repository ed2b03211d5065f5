"""Receive X-rays by DICOM C-STORE, and answer success only for what is on the disk and in the journal. Torch-free."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import RLock
from weakref import WeakKeyDictionary

from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    AllTransferSyntaxes,
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
)
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.sop_class import (  # type: ignore[attr-defined]  # made when pynetdicom is imported
    StorageCommitmentPushModel,
    Verification,
)

from bsdiff_rt.errors import SettingsError
from bsdiff_rt.files import write_atomically
from bsdiff_rt.formats.dicom_in import quiet_pydicom
from bsdiff_rt.node.commitment import OnReport, make_handler
from bsdiff_rt.node.journal import Journal
from bsdiff_rt.node.settings import NodeSettings

logger = logging.getLogger(__name__)

IMAGE_CLASSES = (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    SecondaryCaptureImageStorage,
)
MAX_OBJECT_BYTES = 1 << 28  # twice the pixels of the largest picture that is processed
FREE_BYTES = 1 << 28  # of the disk, left for the journal and for results of what is being processed
TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 10.0  # a connection without a request holds the place of a sender so long
# Statuses of C-STORE (PS3.4 table B.2-1).
SUCCESS, OUT_OF_RESOURCES, NOT_UNDERSTOOD = 0x0000, 0xA700, 0xC000
NOT_AUTHORISED = 0x0124  # PS3.7 annex C.5.20
_REJECT_SENDER = (1, 1, 3)  # permanent, by the user, calling AE title not recognised (PS3.8 table 9-21)

_UNCOMPRESSED = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
)


class Receiver:
    """Listens for X-rays.

    Args:
        settings: where to listen, and who may send how much.
        journal: takes each X-ray.
        files: held while files are written and entered, and by the caller while it removes some.
        make_room: called with a number of bytes that do not fit into the quota; returns how many it freed.
        on_new: called when there is an X-ray to process.
        on_report: called with each report on storage commitment.

    Attributes:
        counts: X-rays since the start by what was answered: new, known, no_room, damaged. Also rejected senders.
    """

    def __init__(
        self,
        settings: NodeSettings,
        journal: Journal,
        files: RLock,
        make_room: Callable[[int], int],
        on_new: Callable[[], None],
        on_report: OnReport,
    ) -> None:
        self._on_report = on_report
        self._settings, self._journal = settings, journal
        self._make_room, self._on_new = make_room, on_new
        self._files = files
        self._pending_bytes: WeakKeyDictionary[Association, int] = WeakKeyDictionary()
        self.counts: Counter[str] = Counter()
        self._ae = AE(ae_title=settings.aet)
        self._ae.maximum_associations = settings.associations
        self._ae.maximum_pdu_size = settings.pdu_bytes
        self._ae.acse_timeout = REQUEST_TIMEOUT_S
        self._ae.dimse_timeout = self._ae.network_timeout = TIMEOUT_S
        self._ae.add_supported_context(Verification)
        for image_class in IMAGE_CLASSES:
            self._ae.add_supported_context(image_class, list_transfer_syntaxes())
        # A destination that reports is the SCP on its own association (PS3.4 J.3.3).
        self._ae.add_supported_context(StorageCommitmentPushModel, scu_role=False, scp_role=True)
        self.port = self._listen()

    def _listen(self) -> int:
        """Begin to listen, and return the port.

        Raises:
            SettingsError: the address cannot be used.
        """
        settings = self._settings
        context = settings.tls.make_context(server=True) if settings.tls else None
        handlers = [
            (evt.EVT_REQUESTED, self._check_sender),
            (evt.EVT_DATA_RECV, self._limit_size),
            (evt.EVT_C_STORE, self._store),
            make_handler(self._on_report),
        ]
        try:
            self._server = self._ae.start_server(
                (settings.host, settings.port),
                block=False,
                ssl_context=context,
                evt_handlers=handlers,  # type: ignore[arg-type]
            )
        except OSError as error:
            raise SettingsError(
                f"{settings.host}:{settings.port} cannot be listened at ({error.strerror}). Choose another port, or "
                "end the program that has it.",
                setting="listen",
            ) from error
        assert self._server is not None
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop listening. X-rays that are being received are not answered, so their senders send them again."""
        self._ae.shutdown()

    def _check_sender(self, event: evt.Event) -> None:
        """Reject an association of somebody who may neither send nor report on storage commitment."""
        aet = str(getattr(event.assoc.requestor.primitive, "calling_ae_title", "")).strip()
        address = event.assoc.requestor.address
        if self._may_send(aet, address) or any(aet == one.aet for one in self._settings.destinations):
            return
        self.counts["rejected"] += 1
        logger.warning("rejected an association of %r from %s: not allowed to send", aet, address)
        event.assoc.acse.send_reject(*_REJECT_SENDER)
        event.assoc.kill()

    def _may_send(self, aet: str, address: str) -> bool:
        """Return whether a node may send X-rays."""
        senders = self._settings.senders
        return not senders or any(one.aet == aet and one.address in (None, address) for one in senders)

    def _limit_size(self, event: evt.Event) -> None:
        """Abort an association that sends more than an object may have, before memory runs out."""
        size = self._pending_bytes.get(event.assoc, 0) + len(event.data)
        self._pending_bytes[event.assoc] = size
        if size > MAX_OBJECT_BYTES:
            logger.warning("aborted an association: an object of more than %d MB", MAX_OBJECT_BYTES >> 20)
            self._pending_bytes[event.assoc] = 0
            event.assoc.abort()

    def _store(self, event: evt.Event) -> int:
        """Keep one object, and return the status to answer."""
        self._pending_bytes[event.assoc] = 0
        try:
            content = event.encoded_dataset()
        except Exception as error:  # damaged requests make pynetdicom raise anything; its text quotes values
            self.counts["damaged"] += 1
            logger.warning("an object was not understood (%s)", type(error).__name__)
            return NOT_UNDERSTOOD
        sender = str(event.assoc.requestor.ae_title).strip()
        if not self._may_send(sender, event.assoc.requestor.address):
            self.counts["rejected"] += 1
            logger.warning("an object of %r was refused: not allowed to send", sender)
            return NOT_AUTHORISED
        try:
            return self._keep(content, sender)
        except OSError as error:
            self.counts["no_room"] += 1
            logger.error("an object of %s cannot be kept: %s", sender, error.strerror or type(error).__name__)
            return OUT_OF_RESOURCES
        except Exception as error:  # the sender must not take silence for success
            self.counts["no_room"] += 1
            logger.error("an object of %s cannot be kept (%s)", sender, type(error).__name__)
            return OUT_OF_RESOURCES

    def _keep(self, content: bytes, sender: str) -> int:
        """Write an object to the disk and into the journal. Return the status to answer.

        Raises:
            OSError: the disk has an error.
            sqlite3.Error: the journal has one.
        """
        sha256 = hashlib.sha256(content).hexdigest()
        if self._journal.is_settled(sha256):
            self.counts["known"] += 1
            return SUCCESS
        with self._files:  # two objects must not take the same room
            if not self._has_room(len(content)):
                self.counts["no_room"] += 1
                logger.error(
                    "an object of %s was refused: the quota or the disk is full. Raise --quota, or see why results "
                    "are not sent.",
                    sender,
                )
                return OUT_OF_RESOURCES
            write_atomically(self._settings.received / f"{sha256}.dcm", content, durable=True)
            is_new = self._journal.add(sha256, sender, len(content))
        self.counts["new" if is_new else "known"] += 1
        self._on_new()
        return SUCCESS

    def _has_room(self, size: int) -> bool:
        """Return whether an object fits, after files that are no longer needed were removed."""
        missing = self._journal.count_bytes() + size - self._settings.quota_bytes
        if missing > 0 and self._make_room(missing) < missing:
            return False
        return shutil.disk_usage(self._settings.folder).free - size > FREE_BYTES


def quiet_libraries() -> None:
    """Keep what pydicom and pynetdicom log out of this process's log: it quotes headers."""
    for name in ("pydicom", "pynetdicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with quiet_pydicom():  # its filter of warnings stays
        pass


def list_transfer_syntaxes() -> list[str]:
    """Return every transfer syntax that can be read here, uncompressed ones first."""
    decoded = []
    for syntax in AllTransferSyntaxes:
        if syntax in _UNCOMPRESSED:
            continue
        try:
            available = get_decoder(syntax).is_available
        except NotImplementedError:  # video and other kinds without pixels of one image
            continue
        if available:
            decoded.append(syntax)
    return [*_UNCOMPRESSED, *decoded]


def remove_orphans(folder: Path, known: set[str]) -> int:
    """Remove X-rays or results that the journal does not name, and return how many.

    A node that was killed between writing a file and its entry in the journal did not answer success for it: its
    sender still has it. Only files of this program are touched.
    """
    count = 0
    for path in folder.glob("*.dcm"):
        if len(path.stem) == 64 and path.stem not in known:
            path.unlink(missing_ok=True)
            count += 1
    return count
