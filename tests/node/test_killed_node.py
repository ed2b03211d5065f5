"""A node that is ended by SIGKILL at chosen points: nothing is lost, and nothing arrives twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

pytest.importorskip("pynetdicom")
pytest.importorskip("prometheus_client")
from helpers import dicom, toy_command
from nodes import ARCHIVE, HOST, Archive, NodeProcess, free_port, listens, send, wait_for
from stand_in import SIZE

from bsdiff_rt.node.journal import Journal
from bsdiff_rt.node.settings import Destination

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")

# Each point, and whether the sender was answered before the node ended.
POINTS = {
    "before the journal": (("receiving:Journal.add", "before"), False),
    "before the answer": (("receiving:Journal.add", "after"), False),
    "before the model": (("serving:Journal.begin", "before"), True),
    "behind the model": (("serving:Journal.finish", "before"), True),
    "before sending": (("sending:Journal.begin_sending", "before"), True),
    "while sending": (("sending:Journal.begin_sending", "after"), True),
    "before the answer is noted": (("sending:Connection.send", "after"), True),
}


@pytest.mark.parametrize("point", POINTS)
def test_each_x_ray_arrives_once(small, tmp_path, point):
    kill_at, answered = POINTS[point]
    path, port = dicom(tmp_path / "a.dcm"), free_port()
    with Archive() as archive:
        destination = Destination(ARCHIVE, HOST, archive.port)
        with NodeProcess(tmp_path / "node", small, destination, port, kill_at) as node:
            send(port, path)
            assert node.wait() == -signal.SIGKILL
        with NodeProcess(tmp_path / "node", small, destination, port) as node:
            if not answered:  # as a modality does
                assert send(port, path) == [0]
            wait_for(lambda: archive.stored)
            wait_for(lambda: count_unsent(tmp_path / "node") == 0)
        assert list(archive.times.values()) == [1]
        assert archive.questions == (point in ("while sending", "before the answer is noted"))


def count_unsent(folder):
    journal = Journal(folder / "journal.sqlite")
    try:
        states = journal.count_states()
        return states["received"] + sum(count for count, _ in journal.count_unsent().values())
    finally:
        journal.close()


def test_an_archive_that_cannot_be_asked_gets_the_same_object_again(small, tmp_path):
    port = free_port()
    with Archive(answers=False) as archive:
        destination = Destination(ARCHIVE, HOST, archive.port)
        kill_at = ("sending:Connection.send", "after")
        with NodeProcess(tmp_path / "node", small, destination, port, kill_at) as node:
            send(port, dicom(tmp_path / "a.dcm"))
            assert node.wait() == -signal.SIGKILL
        with NodeProcess(tmp_path / "node", small, destination, port):
            wait_for(lambda: list(archive.times.values()) == [2])


def test_an_x_ray_that_ends_the_program_is_given_up(small, tmp_path):
    """The others are processed. It is in the journal as failed."""
    folder = tmp_path / "node"
    with Archive() as archive:
        destination = Destination(ARCHIVE, HOST, archive.port)
        with NodeProcess(folder, small, destination, port := free_port(), ("serving:Journal.begin", "after")) as node:
            send(port, dicom(tmp_path / "a.dcm"))
            node.wait()
        journal = Journal(folder / "journal.sqlite")
        waiting = journal.find_waiting(())
        assert waiting.starts == 1
        for _ in range(9):
            journal.begin(waiting.number)
        journal.close()
        with NodeProcess(folder, small, destination, port):
            assert send(port, dicom(tmp_path / "b.dcm", seed=1)) == [0]
            wait_for(lambda: archive.stored)
        journal = Journal(folder / "journal.sqlite")
        assert journal.count_states() == {"received": 0, "done": 1, "refused": 0, "failed": 1}
        journal.close()


@pytest.mark.slow
def test_sigterm_ends_the_command_cleanly(small, tmp_path):
    port = free_port()
    with Archive() as archive:
        arguments = ["serve", str(tmp_path / "node"), "--to", f"{ARCHIVE}@{HOST}:{archive.port}", "--http", "0"]
        arguments += ["--listen", f"{HOST}:{port}", "--bundle", str(small.folder), "--runner", "eager"]
        code = toy_command(SIZE, arguments)
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        try:
            wait_for(lambda: listens(port) or process.poll() is not None, 120)
            assert send(port, dicom(tmp_path / "a.dcm")) == [0]
            wait_for(lambda: archive.stored)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, err
    assert "BSDIFF listens at" in err
    assert "result 1: sent" in err
    assert "SECRET" not in err
