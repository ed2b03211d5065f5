"""Damaged and hostile connections to a node: each one ends, and the node goes on receiving."""

from __future__ import annotations

import os
import random
import socket
import threading

import pytest

pytest.importorskip("pynetdicom")
pytest.importorskip("prometheus_client")

from helpers import dicom
from nodes import HOST, Archive, run_node, send, wait_for
from synthetic import SECRETS

from bsdiff_rt.node import receiving

SESSIONS = int(os.environ.get("FUZZ_EXAMPLES", 40))


def record(port, path):
    """Send a file through a relay. Return the bytes that the sender sent."""
    sent = bytearray()
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()

        def relay():
            client, _ = listener.accept()
            server = socket.create_connection((HOST, port))

            def back():
                while data := server.recv(1 << 16):
                    client.sendall(data)

            threading.Thread(target=back, daemon=True).start()
            while data := client.recv(1 << 16):
                sent.extend(data)
                server.sendall(data)
            server.close()

        thread = threading.Thread(target=relay, daemon=True)
        thread.start()
        assert send(listener.getsockname()[1], path) == [0]
        thread.join(10)
    return bytes(sent)


def damage(session, chance):
    """Return a session with a few bytes changed, a part cut out, an end cut off, or something else altogether."""
    content = bytearray(session)
    kind = chance.randrange(5)
    if kind == 0:
        return chance.randbytes(chance.randrange(1, 2000))
    if kind == 1:
        return bytes(content[: chance.randrange(len(content))])
    if kind == 2:
        begin = chance.randrange(1000)
        del content[begin : begin + chance.randrange(1, 200)]
        return bytes(content)
    for _ in range(chance.randrange(1, 20)):  # the association request and the command are at the beginning
        content[chance.randrange(min(len(content), 1500))] = chance.randrange(256)
    return bytes(content)


def speak(port, content):
    """Send some bytes, hear what comes for a moment, and hang up."""
    with socket.create_connection((HOST, port), timeout=0.3) as connection:
        try:
            connection.sendall(content)
            while connection.recv(1 << 16):
                pass
        except OSError:  # it hung up, or waits for more
            pass


# Threads of pynetdicom end with an error when a PDU makes no sense.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_node_survives_damaged_sessions(small, tmp_path, caplog, capfd, monkeypatch):
    monkeypatch.setattr(receiving, "REQUEST_TIMEOUT_S", 1.0)
    chance = random.Random(22)
    paths = [dicom(tmp_path / f"{seed}.dcm", seed=seed) for seed in range(2)]
    with Archive() as archive, run_node(tmp_path / "node", small, archive, associations=3) as node:
        session = record(node.port, paths[0])
        for _ in range(SESSIONS):
            speak(node.port, damage(session, chance))
        assert wait_for(lambda: send(node.port, paths[1])) == [0]  # none of them holds a place for ever
        wait_for(lambda: len(archive.stored) >= 2)
        node.watch(0.01)
        assert node.read_state().problems == []
    assert {path.suffix for path in (tmp_path / "node").rglob("*") if path.is_file()} <= {".dcm", ".sqlite"}
    out, err = capfd.readouterr()
    assert not [secret for secret in SECRETS[:2] if secret in caplog.text + out + err]
