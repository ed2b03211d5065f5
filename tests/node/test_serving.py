"""A node with both ends: what is received, processed, sent and shown."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import urllib.error
import urllib.request

import pytest

pytest.importorskip("pynetdicom")
pytest.importorskip("prometheus_client")

from helpers import ToyRunner, dicom
from nodes import ARCHIVE, HOST, Archive, free_port, run_node, send, wait_for
from pydicom import dcmread
from stand_in import SIZE
from synthetic import SECRETS

from bsdiff_rt.config import InferSettings
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.folder.pipeline import Inference
from bsdiff_rt.imaging.chest_guard import NO_CHEST
from bsdiff_rt.node import receiving, sending
from bsdiff_rt.node.rules import read_rules
from bsdiff_rt.node.settings import Destination, Sender, Tls


@pytest.fixture
def archive():
    with Archive() as started:
        yield started


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(sending, "FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr(sending, "LONGEST_PAUSE_S", 0.2)


def get(node, path):
    with urllib.request.urlopen(f"http://{HOST}:{node.http_port}{path}", timeout=10) as answer:
        return answer.read().decode()


def metric(node, name):
    lines = [line for line in get(node, "/metrics").splitlines() if line.startswith(name)]
    assert len(lines) == 1, lines
    return float(lines[0].split()[-1])


def test_results_are_those_of_infer(archive, small, tmp_path, caplog):
    caplog.set_level("DEBUG")
    paths = [dicom(tmp_path / "in" / f"{seed}.dcm", seed=seed) for seed in range(3)]
    with run_node(tmp_path / "node", small, archive) as node:
        assert send(node.port) == [0]
        assert send(node.port, *paths) == [0, 0, 0]
        wait_for(lambda: len(archive.stored) == 3)
        wait_for(lambda: metric(node, "bsdiff_rt_unsent{") == 0)
        page = get(node, "/")
    settings = InferSettings(output=tmp_path / "out", bundle=str(small.folder), format="dicom")
    inference = Inference(settings, ToyRunner(SIZE))
    inference.run(inference.find_tasks([tmp_path / "in"]))
    for path in (tmp_path / "out").glob("*.dcm"):
        expected = dcmread(path)
        assert archive.times[expected.SOPInstanceUID] == 1
        assert archive.stored[expected.SOPInstanceUID].PixelData == expected.PixelData
        assert archive.stored[expected.SOPInstanceUID].PatientName == expected.PatientName
    assert page.count('<td class="done">done</td>') == 3
    assert not [secret for secret in SECRETS if secret in page + caplog.text]


def test_a_refused_x_ray_has_its_reason_on_the_page(archive, small, tmp_path):
    with run_node(tmp_path / "node", small, archive) as node:
        assert send(node.port, dicom(tmp_path / "a.dcm", ViewPosition="LL")) == [0]
        wait_for(lambda: metric(node, 'bsdiff_rt_objects{state="refused"}') == 1)
        assert "View Position LL" in get(node, "/")
    assert not archive.stored


def test_an_x_ray_that_is_known_is_not_processed_again(archive, small, tmp_path):
    path, compressed = dicom(tmp_path / "a.dcm"), tmp_path / "b.dcm"
    with run_node(tmp_path / "node", small, archive) as node:
        assert send(node.port, path) == [0]
        wait_for(lambda: archive.stored)
        assert send(node.port, path) == [0]
        assert metric(node, 'bsdiff_rt_answered_total{answer="known"}') == 1
        dataset = dcmread(path)  # the same X-ray in another encoding gives the same object
        dataset.compress("1.2.840.10008.1.2.5", generate_instance_uid=False)
        dataset.save_as(compressed)
        assert send(node.port, compressed) == [0]
        wait_for(lambda: metric(node, 'bsdiff_rt_objects{state="done"}') == 2)
        assert "the same result was sent before" in get(node, "/")
    assert list(archive.times.values()) == [1]


def test_the_destination_is_down_and_comes_back(archive, small, tmp_path):
    archive.stop()
    with run_node(tmp_path / "node", small, archive) as node:
        assert send(node.port, dicom(tmp_path / "a.dcm"), dicom(tmp_path / "b.dcm", seed=1)) == [0, 0]
        wait_for(lambda: metric(node, "bsdiff_rt_unsent{") == 2)
        wait_for(lambda: "cannot be reached" in get(node, "/"))
        assert json.loads(get(node, "/health"))["status"] == "ok"  # the node itself works
    with run_node(tmp_path / "node", small, archive):
        archive.start()
        wait_for(lambda: len(archive.stored) == 2)
    assert set(archive.times.values()) == {1}


def test_a_name_that_nobody_knows_now_is_a_destination_that_is_down(archive, small, tmp_path):
    """A resolver that is out of order must not end the node."""
    both = (Destination(ARCHIVE, "nowhere.invalid", 104), Destination(ARCHIVE, HOST, archive.port))
    with run_node(tmp_path / "node", small, archive, destinations=both) as node:
        assert send(node.port, dicom(tmp_path / "a.dcm")) == [0]
        wait_for(lambda: archive.stored)
        wait_for(lambda: "ARCHIVE@nowhere.invalid:104 cannot be reached" in get(node, "/"))
        assert json.loads(get(node, "/health"))["status"] == "ok"
        assert send(node.port, dicom(tmp_path / "b.dcm", seed=1)) == [0]
        wait_for(lambda: len(archive.stored) == 2)


def test_a_folder_with_other_files_is_no_node(archive, small, tmp_path):
    dicom(tmp_path / "archive" / "a.dcm")
    with pytest.raises(SettingsError, match="holds files"), run_node(tmp_path / "archive", small, archive):
        pass
    assert [path.name for path in (tmp_path / "archive").iterdir()] == ["a.dcm"]


def test_two_nodes_in_one_folder(archive, small, tmp_path):
    with run_node(tmp_path / "node", small, archive), pytest.raises(SettingsError, match="another run") as raised:  # noqa: SIM117
        with run_node(tmp_path / "node", small, archive):
            pass
    assert raised.value.setting is None  # serve has no --output


def test_a_result_that_is_refused_waits_and_others_pass(archive, small, tmp_path):
    with Archive() as other:
        both = tuple(Destination(ARCHIVE, HOST, port) for port in (archive.port, other.port))
        archive.status = 0xA700
        with run_node(tmp_path / "node", small, archive, destinations=both) as node:
            send(node.port, dicom(tmp_path / "a.dcm"))
            wait_for(lambda: other.stored)
            wait_for(lambda: "0xA700" in get(node, "/"))
            archive.status = 0
            wait_for(lambda: archive.stored)
    assert [*archive.times.values(), *other.times.values()] == [1, 1]


@pytest.mark.parametrize(
    ("sender", "accepted"),
    [
        (Sender("XRAY"), True),
        (Sender("XRAY", HOST), True),
        (Sender("XRAY", "10.0.0.7"), False),
        (Sender("OTHER"), False),
    ],
)
def test_only_those_who_may_send_are_heard(archive, small, tmp_path, sender, accepted):
    with run_node(tmp_path / "node", small, archive, senders=(sender,)) as node:
        assert send(node.port, dicom(tmp_path / "a.dcm")) == ([0] if accepted else [])
        assert metric(node, 'bsdiff_rt_answered_total{answer="rejected"}') == (0 if accepted else 1)


def test_a_full_quota_refuses_and_finished_files_make_room(archive, small, tmp_path):
    paths = [dicom(tmp_path / f"{seed}.dcm", seed=seed) for seed in range(3)]
    size = paths[0].stat().st_size
    archive.stop()
    with run_node(tmp_path / "node", small, archive, quota_bytes=int(4.5 * size)) as node:
        assert send(node.port, *paths[:2]) == [0, 0]
        wait_for(lambda: metric(node, "bsdiff_rt_unsent{") == 2)  # and as many results
        assert send(node.port, paths[2]) == [0xA700]
        archive.start()
        wait_for(lambda: len(archive.stored) == 2)
        wait_for(lambda: metric(node, "bsdiff_rt_unsent{") == 0)
        assert send(node.port, paths[2]) == [0]
        wait_for(lambda: len(archive.stored) == 3)
        assert metric(node, "bsdiff_rt_disk_bytes") < 4.5 * size


def test_a_full_disk_refuses(archive, small, tmp_path, monkeypatch):
    with run_node(tmp_path / "node", small, archive) as node:
        monkeypatch.setattr(receiving, "FREE_BYTES", 1 << 60)
        assert send(node.port, dicom(tmp_path / "a.dcm")) == [0xA700]


def test_an_endless_object_is_cut_off(archive, small, tmp_path, monkeypatch):
    monkeypatch.setattr(receiving, "MAX_OBJECT_BYTES", 20_000)
    with run_node(tmp_path / "node", small, archive, pdu_bytes=4096) as node:
        assert send(node.port, dicom(tmp_path / "a.dcm")) == [None]
        assert send(node.port) == [0]


def test_files_of_finished_x_rays_are_removed(archive, small, tmp_path):
    with run_node(tmp_path / "node", small, archive) as node:
        send(node.port, dicom(tmp_path / "a.dcm"))
        wait_for(lambda: archive.stored)
    assert len(list((tmp_path / "node").rglob("*.dcm"))) == 2
    with run_node(tmp_path / "node", small, archive, keep_days=0.0) as node:
        wait_for(lambda: not list((tmp_path / "node").rglob("*.dcm")))
        assert send(node.port, tmp_path / "a.dcm") == [0]  # still known
        assert metric(node, 'bsdiff_rt_answered_total{answer="known"}') == 1
    assert list(archive.times.values()) == [1]


def test_a_lost_result_is_made_again(archive, small, tmp_path):
    archive.stop()
    with run_node(tmp_path / "node", small, archive) as node:
        send(node.port, dicom(tmp_path / "a.dcm"))
        wait_for(lambda: metric(node, "bsdiff_rt_unsent{") == 1)
    for path in (tmp_path / "node" / "results").glob("*.dcm"):
        path.write_bytes(path.read_bytes()[:100])
    archive.start()
    with run_node(tmp_path / "node", small, archive):
        wait_for(lambda: archive.stored)


def test_a_model_that_ends_is_told_by_health(archive, small, tmp_path, monkeypatch):
    monkeypatch.setattr("bsdiff_rt.node.serving.read_identity", lambda path: 1 / 0)
    with run_node(tmp_path / "node", small, archive) as node:
        send(node.port, dicom(tmp_path / "a.dcm"))
        with pytest.raises(Exception, match="the node ended"):
            wait_for(lambda: node.watch(0.1))
        with pytest.raises(urllib.error.HTTPError) as answer:
            get(node, "/health")
        assert answer.value.code == 503


def test_two_nodes_do_not_share_a_folder(archive, small, tmp_path):
    with (
        run_node(tmp_path / "node", small, archive),
        pytest.raises(SettingsError, match="another run"),
        run_node(tmp_path / "node", small, archive),
    ):
        pass


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """An authority, and a certificate of it for this machine."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")

    def run(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ("req", "-newkey", "rsa:2048", "-nodes")
    run(*new, "-x509", "-days", "9", "-subj", "/CN=authority", "-keyout", "ca-key.pem", "-out", "ca.pem")
    run(*new, "-subj", "/CN=node", "-keyout", "key.pem", "-out", "request.pem")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1")
    run(
        *("x509", "-req", "-in", "request.pem", "-CA", "ca.pem", "-CAkey", "ca-key.pem", "-CAcreateserial"),
        *("-days", "9", "-extfile", "names", "-out", "cert.pem"),
    )
    return Tls(folder / "cert.pem", folder / "key.pem", folder / "ca.pem")


# pynetdicom ends the silent connection with an error in its own thread.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tls_asks_both_sides_for_a_certificate(certificates, small, tmp_path):
    path, client = dicom(tmp_path / "a.dcm"), certificates.make_context(server=False)
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    stranger.load_verify_locations(certificates.authority)
    with Archive(ssl_context=certificates.make_context(server=True)) as archive:
        destination = Destination(ARCHIVE, HOST, archive.port, tls=True)
        with (
            run_node(tmp_path / "node", small, archive, destinations=(destination,), tls=certificates) as node,
            socket.create_connection((HOST, node.port)),  # one that never speaks holds up nobody
        ):
            assert send(node.port, path) == []
            assert send(node.port, path, tls_args=(stranger, HOST)) == []
            assert send(node.port, path, tls_args=(client, HOST)) == [0]
            wait_for(lambda: archive.stored)


def test_a_port_that_is_taken_is_named(archive, small, tmp_path):
    with (
        pytest.raises(SettingsError, match=str(archive.port)),
        run_node(tmp_path / "node", small, archive, port=archive.port),
    ):
        pass
    assert free_port() != archive.port


def test_rules_decide_what_is_processed(archive, small, tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text('[[rule]]\nstation = "ICU*"\ndo = "ignore"\n[[rule]]\nmodality = "CR"\ndo = "process"')
    with run_node(tmp_path / "node", small, archive, rules=read_rules(path)) as node:
        send(node.port, dicom(tmp_path / "a.dcm", StationName="ICU-SECRET"), dicom(tmp_path / "b.dcm", seed=1))
        wait_for(lambda: archive.stored)
        wait_for(lambda: metric(node, 'bsdiff_rt_objects{state="refused"}') == 1)
        page = get(node, "/")
    assert "ignored by rule 1" in page
    assert "SECRET" not in page
    assert len(archive.stored) == 1


def test_a_warning_stands_on_the_page(archive, small, tmp_path):
    with run_node(tmp_path / "node", small, archive) as node:
        send(node.port, dicom(tmp_path / "a.dcm", PhotometricInterpretation="MONOCHROME1"))
        wait_for(lambda: archive.stored)
        assert f"Warning: {NO_CHEST}" in get(node, "/")
