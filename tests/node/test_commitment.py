"""Storage commitment: a destination that offers it is asked, and what it reports decides what is sent again."""

from __future__ import annotations

import re
import sqlite3
import threading
import time
from collections import Counter

import pytest

pytest.importorskip("pynetdicom")
pytest.importorskip("prometheus_client")

from helpers import dicom
from nodes import ARCHIVE, HOST, Archive, free_port, run_node, send, wait_for
from pydicom import Dataset
from pynetdicom import AE, build_role, evt
from pynetdicom.sop_class import ComputedRadiographyImageStorage, StorageCommitmentPushModel
from test_serving import metric, short_pauses  # noqa: F401  # a fixture

from bsdiff_rt.node import sending
from bsdiff_rt.node.commitment import INSTANCE
from bsdiff_rt.node.journal import MOST_ASKS, Journal
from bsdiff_rt.node.settings import Sender
from bsdiff_rt.node.status import State, write_page

NODE_AET = "BSDIFF"


class CommittingArchive(Archive):
    """An archive that offers storage commitment.

    `reports` says how it reports: "same" association, "other" association, "never". `fails` of the reports that are
    next say that nothing is kept. `damaged` reports lack their UID. `delay` is the time before a report, s. `order`
    names what happened.
    """

    def __init__(self, reports="other"):
        super().__init__()
        self.reports, self.fails, self.damaged, self.delay = reports, 0, False, 0.0
        self.order = []
        self.node_port = 0
        self.requests, self.answers = [], Counter()

    def start(self):
        super().start()
        self._ae.add_supported_context(StorageCommitmentPushModel)
        self._ae.shutdown()
        server = self._ae.start_server(
            (HOST, self.port), block=False,
            evt_handlers=[(evt.EVT_C_STORE, self._note_store), (evt.EVT_C_FIND, self._find),
                          (evt.EVT_N_ACTION, self._asked)],
        )  # fmt: skip
        self.port = server.server_address[1]

    def _note_store(self, event):
        self.order.append("image")
        return self._store(event)

    def _asked(self, event):
        request = event.action_information
        self.order.append("request")
        self.requests.append(request)
        if self.reports != "never":
            threading.Thread(target=self.report, args=(request, event.assoc), daemon=True).start()
        return 0, None

    def report(self, request, same):
        report, kept = Dataset(), not self.fails
        report.TransactionUID = request.TransactionUID
        if self.damaged:
            del report.TransactionUID
        items = request.ReferencedSOPSequence
        if kept:
            report.ReferencedSOPSequence = items
        else:
            self.fails -= 1
            for item in items:
                item.FailureReason = 0x0112
            report.FailedSOPSequence = items
        time.sleep(self.delay)
        self.order.append("report")
        association = same if self.reports == "same" else self.open()
        status, _ = association.send_n_event_report(report, 1 if kept else 2, StorageCommitmentPushModel, INSTANCE)
        self.answers[status.get("Status")] += 1
        if self.reports == "other":
            association.release()

    def open(self):
        ae = AE(ae_title=ARCHIVE)
        ae.add_requested_context(StorageCommitmentPushModel)
        ae.add_requested_context(ComputedRadiographyImageStorage)
        role = build_role(StorageCommitmentPushModel, scp_role=True)
        association = ae.associate(HOST, self.node_port, ae_title=NODE_AET, ext_neg=[role])
        assert association.is_established
        return association


def committed(node):
    return metric(node, 'bsdiff_rt_commitments{state="done"}')


@pytest.mark.parametrize("reports", ["same", "other"])
def test_a_destination_that_offers_it_is_asked_once(small, tmp_path, reports):
    with CommittingArchive(reports) as archive:
        archive.node_port = free_port()
        with run_node(tmp_path / "node", small, archive, port=archive.node_port) as node:
            send(node.port, dicom(tmp_path / "a.dcm"), dicom(tmp_path / "b.dcm", seed=1))
            wait_for(lambda: committed(node) == 2)
        asked = [item for request in archive.requests for item in request.ReferencedSOPSequence]
        assert sorted(item.ReferencedSOPInstanceUID for item in asked) == sorted(archive.stored)
        assert {item.ReferencedSOPClassUID for item in asked} == {ComputedRadiographyImageStorage}
        assert set(archive.answers) == {0}
        assert set(archive.times.values()) == {1}


def test_nothing_is_sent_before_the_report_has_come(small, tmp_path):
    """pynetdicom, on either side, ends an association on which both ask at once, and the report would be lost."""
    with CommittingArchive("same") as archive:
        archive.delay = 1.0
        with run_node(tmp_path / "node", small, archive) as node:
            send(node.port, dicom(tmp_path / "a.dcm"))
            wait_for(lambda: archive.requests)
            send(node.port, dicom(tmp_path / "b.dcm", seed=1))
            wait_for(lambda: committed(node) == 2)
        assert archive.order == ["image", "request", "report"] * 2


def test_a_destination_that_does_not_offer_it_is_left_alone(small, tmp_path):
    with Archive() as archive, run_node(tmp_path / "node", small, archive) as node:
        send(node.port, dicom(tmp_path / "a.dcm"))
        wait_for(lambda: archive.stored)
        wait_for(lambda: metric(node, "bsdiff_rt_unsent{") == 0)
        assert [metric(node, f'bsdiff_rt_commitments{{state="{state}"}}') for state in ("wanted", "asked")] == [0, 0]


def test_what_it_does_not_answer_for_is_sent_again(small, tmp_path):
    with CommittingArchive() as archive:
        archive.node_port, archive.fails = free_port(), 1
        with run_node(tmp_path / "node", small, archive, port=archive.node_port) as node:
            send(node.port, dicom(tmp_path / "a.dcm"))
            wait_for(lambda: committed(node) == 1)
        assert list(archive.times.values()) == [2]


def test_it_is_given_up_after_some_refusals(small, tmp_path):
    with CommittingArchive() as archive:
        archive.node_port, archive.fails = free_port(), 100
        with run_node(tmp_path / "node", small, archive, port=archive.node_port) as node:
            send(node.port, dicom(tmp_path / "a.dcm"))
            wait_for(lambda: archive.answers[0] == MOST_ASKS)
            wait_for(lambda: metric(node, "bsdiff_rt_unsent{") == 0)
            assert metric(node, 'bsdiff_rt_commitments{state="failed"}') == 1
        assert list(archive.times.values()) == [MOST_ASKS]


def test_a_report_that_does_not_come_is_asked_for_again_and_then_given_up(small, tmp_path, monkeypatch):
    monkeypatch.setattr(sending, "ASK_AGAIN_S", 0.1)
    monkeypatch.setattr(sending, "_REPORT_S", 0.1)
    with CommittingArchive("never") as archive, run_node(tmp_path / "node", small, archive) as node:
        send(node.port, dicom(tmp_path / "a.dcm"))
        wait_for(lambda: metric(node, 'bsdiff_rt_commitments{state="failed"}') == 1)
        assert len(archive.requests) == MOST_ASKS
        assert list(archive.times.values()) == [1]


def test_a_damaged_report_is_answered_with_a_failure(small, tmp_path):
    with CommittingArchive() as archive:
        archive.node_port, archive.damaged = free_port(), True
        with run_node(tmp_path / "node", small, archive, port=archive.node_port) as node:
            send(node.port, dicom(tmp_path / "a.dcm"))
            wait_for(lambda: archive.answers)
            assert dict(archive.answers) == {0x0110: 1}
            assert committed(node) == 0


def test_a_destination_may_report_but_not_send(small, tmp_path):
    with CommittingArchive() as archive:
        archive.node_port = free_port()
        settings = {"port": archive.node_port, "senders": (Sender("XRAY"),)}
        with run_node(tmp_path / "node", small, archive, **settings) as node:
            assert send(node.port, dicom(tmp_path / "a.dcm"), aet=ARCHIVE) == [0x0124]
            assert send(node.port, dicom(tmp_path / "a.dcm")) == [0]
            wait_for(lambda: committed(node) == 1)


def shown(journal):
    """Return what the page's line says about storage commitment."""
    page = write_page(journal.list_since(0, 10), State([], {}, 1, ["P"]), {}, 0)
    return re.findall(r"<td[^>]*>([^<]*)</td>", page)[-2]


def test_files_are_kept_until_the_report(tmp_path):
    journal = Journal(tmp_path / "journal.sqlite")
    journal.add("a" * 64, "XRAY", 1)
    journal.finish("a" * 64, "1.2", 1, ["P"])
    assert shown(journal) == ""
    journal.note_sent(journal.find_sending("P", ()), "P", commit=True)
    assert shown(journal) == "0 of 1"
    assert journal.find_finished(float("inf")) == []
    assert [one.result_uid for one in journal.find_uncommitted("P", 0, 10)] == ["1.2"]
    journal.begin_commitment(["1.2"], "P", "9.9")
    assert journal.find_uncommitted("P", 0, 10) == []
    assert journal.note_commitment("8.8", ["1.2"], []) == 0  # of no request
    assert journal.find_finished(float("inf")) == []
    assert journal.note_commitment("9.9", ["1.2"], []) == 1
    assert shown(journal) == "1 of 1"
    assert len(journal.find_finished(float("inf"))) == 1
    assert journal.count_commitments() == {"wanted": 0, "asked": 0, "done": 1, "failed": 0}
    journal.close()


def test_a_destination_that_is_not_named_any_more_keeps_no_files(tmp_path):
    journal = Journal(tmp_path / "journal.sqlite")
    journal.add("a" * 64, "XRAY", 1)
    journal.finish("a" * 64, "1.2", 1, ["P"])
    journal.note_sent(journal.find_sending("P", ()), "P", commit=True)
    journal.keep_destinations(["P", "Q"])
    assert journal.count_commitments()["wanted"] == 1
    journal.keep_destinations(["Q"])
    assert len(journal.find_finished(float("inf"))) == 1
    journal.close()


def test_a_journal_of_version_1_is_upgraded(tmp_path):
    path = tmp_path / "journal.sqlite"
    journal = Journal(path)
    journal.add("a" * 64, "XRAY", 1)
    journal.finish("a" * 64, "1.2", 1, ["P"])
    journal.close()
    with sqlite3.connect(path) as db:
        db.execute("DROP INDEX uncommitted")
        for column in ("commitment", "asks", "asked_at", "transaction_uid"):
            db.execute(f"ALTER TABLE sendings DROP COLUMN {column}")
        db.execute("PRAGMA user_version = 1")
    db.close()
    journal = Journal(path)
    journal.note_sent(journal.find_sending("P", ()), "P", commit=True)
    assert journal.count_commitments()["wanted"] == 1
    journal.close()
