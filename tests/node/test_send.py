"""`send`: results of a run to an archive, each once, and what is not sent is named."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("pynetdicom")
pytest.importorskip("prometheus_client")

from helpers import ToyRunner, dicom, png
from nodes import ARCHIVE, HOST, Archive
from stand_in import SIZE
from synthetic import SECRETS

from bsdiff_rt.config import InferSettings
from bsdiff_rt.folder.pipeline import Inference


@pytest.fixture
def results(small, tmp_path):
    """The output folder of a run with two DICOM results and a picture."""
    for seed in range(2):
        dicom(tmp_path / "in" / f"{seed}.dcm", seed=seed)
    png(tmp_path / "in" / "c.png")
    inference = Inference(InferSettings(output=tmp_path / "out", bundle=str(small.folder)), ToyRunner(SIZE))
    inference.run(inference.find_tasks([tmp_path / "in"]))
    return tmp_path / "out"


def test_results_are_sent_once(cli, results):
    with Archive() as archive:
        to = f"{ARCHIVE}@{HOST}:{archive.port}"
        outcome = cli("send", results, "--to", to)
        assert (outcome.code, outcome.out) == (0, "sent 2, skipped 0 that were there, failed 0\n")
        outcome = cli("send", results, "--to", to, "--json")
        assert [each["status"] for each in json.loads(outcome.out)] == ["skipped", "skipped"]
    assert list(archive.times.values()) == [1, 1]


def test_an_archive_that_hangs_up_on_questions_gets_results(cli, results):
    with Archive() as archive:
        archive.hangs_up = True
        outcome = cli("send", results, "--to", f"{ARCHIVE}@{HOST}:{archive.port}")
    assert (outcome.code, archive.questions) == (0, 1)
    assert outcome.err.count("does not answer C-FIND") == 1
    assert list(archive.times.values()) == [1, 1]


@pytest.mark.parametrize("trouble", ["refuses", "away", "damaged", "missing"])
def test_what_is_not_sent_is_named(cli, results, trouble):
    with Archive() as archive:
        if trouble == "refuses":
            archive.status = 0xA700
        elif trouble == "away":
            archive.stop()
        elif trouble == "damaged":
            (results / "0.dcm").write_bytes((results / "0.dcm").read_bytes()[:300])
        else:
            (results / "0.dcm").unlink()
        outcome = cli("send", results, "--to", f"{ARCHIVE}@{HOST}:{archive.port}")
    sent = 1 if trouble in ("damaged", "missing") else 0
    assert outcome.code == 3
    assert f"sent {sent}, skipped 0 that were there, failed {2 - sent}" in outcome.out
    assert "failed: 0.dcm: " in outcome.err
    assert not [secret for secret in SECRETS if secret in outcome.out + outcome.err]


def test_a_name_that_nobody_knows_is_no_fault_of_the_file(cli, results):
    outcome = cli("send", results, "--to", "PACS@nowhere.invalid:104")
    assert outcome.code == 3
    assert "failed: 0.dcm: PACS@nowhere.invalid:104 cannot be reached (" in outcome.err


def test_a_folder_without_results_is_refused(cli, tmp_path):
    outcome = cli("send", tmp_path, "--to", f"{ARCHIVE}@{HOST}:104")
    assert outcome.code == 2
    assert "no report.json" in outcome.err


@pytest.fixture
def infer_and_send(cli, small, tmp_path):
    """Runs `infer` over two DICOM files and a picture, with `--send` to the node that is given."""
    for seed in range(2):
        dicom(tmp_path / "in" / f"{seed}.dcm", seed=seed)
    png(tmp_path / "in" / "c.png")
    run = ("infer", tmp_path / "in", "-o", tmp_path / "out", "--bundle", small.folder, "--runner", "eager")
    return lambda to, *more: cli(*run, "--send", to, *more)


def test_a_run_sends_its_results_once(infer_and_send):
    with Archive() as archive:
        to = f"{ARCHIVE}@{HOST}:{archive.port}"
        outcome = infer_and_send(to, "--json")
        assert outcome.code == 0, outcome.err
        assert [entry["status"] for entry in json.loads(outcome.out)["files"]] == ["ok"] * 3
        assert "sent 2, skipped 0 that were there, failed 0" in outcome.err
        outcome = infer_and_send(to)
        assert (outcome.code, "sent 0, skipped 2 that were there" in outcome.out) == (0, True)
        assert infer_and_send(to, "--dry-run", "--overwrite").code == 0
    assert list(archive.times.values()) == [1, 1]


@pytest.mark.parametrize(("fail_on", "code"), [("failed", 3), ("never", 0)])
def test_results_wait_in_the_folder_if_the_archive_is_away(infer_and_send, tmp_path, fail_on, code):
    with Archive() as archive:
        archive.stop()
        outcome = infer_and_send(f"{ARCHIVE}@{HOST}:{archive.port}", "--fail-on", fail_on)
    assert outcome.code == code
    assert "failed: 0.dcm: " in outcome.err
    assert "bsdiff-rt send" in outcome.err
    assert (tmp_path / "out" / "0.dcm").is_file()


@pytest.mark.parametrize(
    ("to", "more", "message"),
    [
        ("PACS", (), "--send: 'PACS' is not AET@host:port"),
        (f"{ARCHIVE}@{HOST}:104/tls", (), "--send: .*TLS.*bsdiff-rt send"),
        (f"{ARCHIVE}@{HOST}:104", ("--format", "png"), "--send: .*DICOM"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_the_run(infer_and_send, tmp_path, to, more, message):
    outcome = infer_and_send(to, *more)
    assert outcome.code == 2
    assert re.search(message, outcome.err), outcome.err
    assert not (tmp_path / "out").exists()
