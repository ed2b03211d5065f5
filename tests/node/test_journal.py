"""The journal: what an object passes through, and what is found again when the file is opened anew."""

from __future__ import annotations

import sqlite3

import pytest

from bsdiff_rt.errors import SettingsError
from bsdiff_rt.node.journal import Journal, Waiting

EVER = float("inf")


@pytest.fixture
def journal(tmp_path):
    opened = Journal(tmp_path / "journal.sqlite")
    yield opened
    opened.close()


def finish(journal, sha256="a", uid="1.2", destinations=("P", "Q")):
    journal.add(sha256, "XRAY", 10)
    return journal.finish(sha256, uid, 20, destinations)


def test_the_way_of_an_object(journal, tmp_path):
    assert journal.add("a", "XRAY", 10)
    assert journal.count_states() == {"received": 1, "done": 0, "refused": 0, "failed": 0}
    assert journal.find_waiting(()) == Waiting(1, "a", 0)
    assert journal.find_waiting([1]) is None
    journal.begin(1)
    assert journal.find_waiting(()).starts == 1
    assert journal.finish("a", "1.2", 20, ["P", "Q"])
    assert journal.find_waiting(()) is None
    assert journal.count_bytes() == 30
    assert {name: count for name, (count, _) in journal.count_unsent().items()} == {"P": 1, "Q": 1}
    sending = journal.find_sending("P", ())
    assert (sending.sha256, sending.result_uid, sending.begun) == ("a", "1.2", False)
    journal.begin_sending(sending, "P")
    assert journal.find_sending("P", ()).begun
    journal.note_sent(sending, "P")
    assert journal.find_sending("P", ()) is None
    assert journal.find_finished(EVER) == []  # Q has to get it, too
    journal.begin_sending(sending, "Q")
    journal.note_unsent(sending, "Q", "no room", unsure=False)
    assert not journal.find_sending("Q", ()).begun
    assert journal.find_sending("Q", [1]) is None
    (line,) = journal.list_since(0, 10)
    assert (line.state, line.reason, line.sent, line.unsent) == ("done", "no room", 1, 1)
    other = Journal(tmp_path / "journal.sqlite")  # what another process sees
    assert other.find_sending("Q", ()).result_uid == "1.2"
    other.close()
    journal.note_sent(sending, "Q")
    assert journal.find_finished(EVER) == [(1, "a", 30)]


def test_an_answer_that_is_missing_stays_unsure(journal):
    finish(journal)
    sending = journal.find_sending("P", ())
    journal.begin_sending(sending, "P")
    journal.note_unsent(sending, "P", "no answer", unsure=True)
    assert journal.find_sending("P", ()).begun


def test_an_object_that_is_known_is_not_entered_again(journal):
    assert journal.add("a", "XRAY", 10)
    assert not journal.add("a", "XRAY", 10)
    assert journal.is_settled("a")
    journal.give_up("a", "refused", "a hand")
    assert not journal.is_settled("a")
    assert journal.list_since(0, 10)[0].reason == "a hand"
    assert journal.add("a", "XRAY", 10)  # another chance, perhaps with a newer version
    assert journal.find_waiting(()) == Waiting(1, "a", 0)


def test_a_result_is_sent_once_to_each_destination(journal):
    assert finish(journal, "a")
    assert not finish(journal, "b")
    assert finish(journal, "c", destinations=("P", "R"))  # R is new
    assert {name: count for name, (count, _) in journal.count_unsent().items()} == {"P": 1, "Q": 1, "R": 1}


def test_a_lost_result_waits_again_and_what_was_sent_stays_so(journal):
    finish(journal)
    journal.note_sent(journal.find_sending("P", ()), "P")
    journal.redo(1)
    assert journal.find_waiting(()).number == 1
    finish(journal)
    assert set(journal.count_unsent()) == {"Q"}


def test_only_finished_objects_are_removed_and_forgotten(journal):
    finish(journal)
    assert not journal.note_removed(1)
    for destination in ("P", "Q"):
        journal.note_sent(journal.find_sending(destination, ()), destination)
    journal.forget(EVER)
    assert journal.count_states()["done"] == 1
    assert journal.list_files() == {"a"}
    assert journal.note_removed(1)
    assert journal.list_files() == set()
    assert journal.count_bytes() == 0
    journal.forget(EVER)
    assert journal.count_states()["done"] == 0
    assert finish(journal)  # its sendings were forgotten, too


def test_a_change_happens_as_a_whole(journal):
    journal.add("a", "XRAY", 10)
    with pytest.raises(sqlite3.Error):
        journal.finish("a", None, 20, ["P"])  # entered as done before its sendings fail
    assert journal.find_waiting(()).number == 1


def test_a_file_that_is_no_journal_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"no database" * 100)
    with pytest.raises(SettingsError, match="cannot be used as a journal"):
        Journal(tmp_path / "a")
    database = sqlite3.connect(tmp_path / "b")
    database.execute("PRAGMA user_version = 7")
    database.close()
    with pytest.raises(SettingsError, match="version 7"):
        Journal(tmp_path / "b")
