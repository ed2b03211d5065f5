"""Storage commitment (PS3.4 annex J): ask a destination to answer for results, and read its report. Torch-free.

The request is an N-ACTION. The report is an N-EVENT-REPORT on the same association, or on one that the destination
opens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pydicom import Dataset
from pydicom.uid import UID
from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.sop_class import StorageCommitmentPushModel  # type: ignore[attr-defined]  # made at its import

from bsdiff_rt.formats.dicom_in import quiet_pydicom

logger = logging.getLogger(__name__)

INSTANCE = UID("1.2.840.10008.1.20.1.1")  # Storage Commitment Push Model SOP Instance (PS3.4 J.3.5)
_REQUEST = 1  # action type (PS3.4 J.3.2)
_PROCESSING_FAILURE = 0x0110


@dataclass(frozen=True)
class CommitmentReport:
    """What a destination says about the results of one request.

    Attributes:
        transaction: UID of the request.
        committed: SOP Instance UIDs that it answers for.
        failed: those that it does not.
    """

    transaction: str
    committed: frozenset[str]
    failed: frozenset[str]


OnReport = Callable[[CommitmentReport], None]


def offers_commitment(association: Association) -> bool:
    """Return whether the other side of an open association takes requests for storage commitment."""
    return any(context.abstract_syntax == StorageCommitmentPushModel for context in association.accepted_contexts)


def request_commitment(association: Association, transaction: str, results: Iterable[tuple[str, str]]) -> int | None:
    """Ask for storage commitment, and return the status of the answer; None if there is none.

    Args:
        association: open, with a destination that offers it.
        transaction: UID of the request.
        results: SOP Class and SOP Instance UID of each result.
    """
    request = Dataset()
    request.TransactionUID = transaction
    request.ReferencedSOPSequence = []
    for sop_class, instance in results:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, instance
        request.ReferencedSOPSequence.append(item)
    with quiet_pydicom():
        status, _ = association.send_n_action(request, _REQUEST, StorageCommitmentPushModel, INSTANCE)
    return int(status.Status) if "Status" in status else None


def make_handler(on_report: OnReport) -> tuple[object, Callable[[evt.Event], tuple[int, None]]]:
    """Return a handler for pynetdicom that passes reports on. A damaged one is answered with a failure.

    Args:
        on_report: called with each report, in the association's thread.
    """

    def handle(event: evt.Event) -> tuple[int, None]:
        try:
            with quiet_pydicom():
                report = read_report(event.event_information)
            on_report(report)
        except Exception as error:  # damaged reports make pydicom raise anything; its text quotes values
            logger.warning("a report on storage commitment was not understood (%s)", type(error).__name__)
            return _PROCESSING_FAILURE, None
        return 0x0000, None

    return evt.EVT_N_EVENT_REPORT, handle


def read_report(information: Dataset) -> CommitmentReport:
    """Return what an N-EVENT-REPORT says.

    Raises:
        Exception: of any kind, if an element is missing or damaged.
    """
    lists = [
        frozenset(str(item.ReferencedSOPInstanceUID) for item in information.get(name) or ())
        for name in ("ReferencedSOPSequence", "FailedSOPSequence")
    ]
    return CommitmentReport(str(information.TransactionUID), lists[0] - lists[1], lists[1])
