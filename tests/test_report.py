"""report.json: what it holds, when it is written, and what a later run takes from it."""

from __future__ import annotations

import dataclasses
import getpass
import json
import logging
import platform
import socket

import pytest

from bsdiff_rt import __version__, report
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.report import FileEntry, Ledger, Report, environment, finished_before, package_versions

DONE = FileEntry("in/a.png", "a.png", "ok", None, 0.5, "1" * 64, "2" * 64)
FAILED = FileEntry("in/b.png", None, "failed", "truncated", 0.1)
ORDER = ["in/a.png", "in/b.png", "in/c.png"]


def make(files=(), **changes) -> Report:
    settings = {"seed": 0, "steps": 3} | changes
    return Report({"name": "tiny", "sha256": "0" * 64}, settings, {"device": "cpu"}, files=list(files))


def test_the_document():
    document = json.loads(make([DONE, FAILED]).to_json())
    speed = ["images_per_second", "networks_busy"]
    assert list(document) == ["bsdiff_rt", "bundle", "settings", "environment", *speed, "files"]
    assert document["bsdiff_rt"] == __version__
    assert document["bundle"] == {"name": "tiny", "sha256": "0" * 64}
    assert document["files"] == [dataclasses.asdict(DONE), dataclasses.asdict(FAILED)]
    assert {"input", "output", "status", "reason", "seconds", "sha256"} <= set(document["files"][0])


def test_names_of_any_kind_survive(tmp_path):
    names = ["Ünï 日本.png", 'quote" and \\.png', "line\nbreak.png", b"\xff\xfe.png".decode(errors="surrogateescape")]
    entries = [FileEntry(name, name, "ok", None, 0.0, "1", "2") for name in names]
    make(entries).write(tmp_path)
    assert finished_before(tmp_path, make()) == {entry.output: entry for entry in entries}


def test_counts():
    assert make([DONE, DONE, FAILED]).counts() == {"ok": 2, "failed": 1}


def test_the_digest_depends_on_bundle_and_settings_only():
    base = make().settings_digest()
    assert len(base) == 64
    assert make([DONE]).settings_digest() == base
    assert (
        dataclasses.replace(make(), environment={"device": "cuda:0"}, images_per_second=3.0).settings_digest() == base
    )
    assert make(seed=1).settings_digest() != base
    other = dataclasses.replace(make(), bundle={"name": "tiny", "sha256": "1" * 64})
    assert other.settings_digest() != base
    assert dataclasses.replace(make(), settings={"steps": 3, "seed": 0}).settings_digest() == base  # order is nothing


def test_only_finished_files_count(tmp_path):
    skipped = dataclasses.replace(DONE, output="c.png", status="skipped")
    refused = FileEntry("in/d.png", None, "refused", "too small")
    make([DONE, FAILED, skipped, refused]).write(tmp_path)
    assert finished_before(tmp_path, make()) == {"a.png": DONE, "c.png": skipped}


@pytest.mark.parametrize("changed", [{"seed": 1}, {"more": 1}])
def test_other_settings_finish_nothing(tmp_path, changed, caplog):
    make([DONE]).write(tmp_path)
    with caplog.at_level(logging.INFO):
        assert finished_before(tmp_path, make(**changed)) == {}
    assert "is from another version or other settings" in caplog.text


def test_another_bundle_finishes_nothing(tmp_path):
    make([DONE]).write(tmp_path)
    assert finished_before(tmp_path, dataclasses.replace(make(), bundle={"name": "tiny", "sha256": "9" * 64})) == {}


def test_another_version_finishes_nothing(tmp_path):
    make([DONE]).write(tmp_path)
    assert finished_before(tmp_path, dataclasses.replace(make(), bsdiff_rt="0.0.1")) == {}


def test_no_report_is_no_news(tmp_path, caplog):
    assert finished_before(tmp_path, make()) == {}
    assert finished_before(tmp_path / "absent", make()) == {}
    assert not caplog.records


WHOLE = json.loads(make([DONE]).to_json())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\x00\xfe",
        b"null",
        b"[]",
        b"{}",
        json.dumps(WHOLE | {"files": None}).encode(),
        json.dumps(WHOLE | {"files": [1]}).encode(),
        json.dumps(WHOLE | {"files": [{"input": "a"}]}).encode(),
        json.dumps(WHOLE | {"files": [WHOLE["files"][0] | {"new": 1}]}).encode(),
        json.dumps(WHOLE | {"files": [WHOLE["files"][0] | {"output": ["a.png"]}]}).encode(),
        json.dumps(WHOLE)[:-20].encode(),
    ],
)
def test_a_damaged_report_is_said_and_counts_for_nothing(tmp_path, content, caplog):
    (tmp_path / "report.json").write_bytes(content)
    assert finished_before(tmp_path, make()) == {}
    assert "cannot be used" in caplog.text
    assert "every file is done again" in caplog.text


def test_a_folder_in_the_reports_place(tmp_path, caplog):
    (tmp_path / "report.json").mkdir()
    assert finished_before(tmp_path, make()) == {}
    assert "cannot be used (IsADirectoryError)" in caplog.text


def saved(folder):
    return {
        (entry["input"], entry["output"]): entry["status"]
        for entry in json.loads((folder / "report.json").read_text())["files"]
    }


def test_the_ledger_saves_now_and_then_and_at_the_end(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    seen = []
    ledger = Ledger(make(), tmp_path, ORDER, {}, seen.append)
    ledger.add(DONE)
    assert not (tmp_path / "report.json").exists()
    now[0] += report.SAVE_EVERY_S + 1
    ledger.add(FAILED)
    assert saved(tmp_path) == {("in/a.png", "a.png"): "ok", ("in/b.png", None): "failed"}
    ledger.add(dataclasses.replace(DONE, input="in/c.png", output="c.png"))
    assert len(saved(tmp_path)) == 2
    now[0] += 2
    ledger.save()
    assert len(saved(tmp_path)) == 3
    assert [entry.input for entry in seen] == ["in/a.png", "in/b.png", "in/c.png"]
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["images_per_second"] == pytest.approx(2 / 8)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_the_report_lists_the_inputs_in_order_whoever_finishes_first(tmp_path):
    ledger = Ledger(make(), tmp_path, ORDER, {}, lambda _: None)
    ledger.add(FAILED)
    ledger.add(DONE)
    ledger.save()
    assert list(saved(tmp_path)) == [("in/a.png", "a.png"), ("in/b.png", None)]


def test_what_was_finished_before_stays_known(tmp_path):
    before = {"a.png": DONE, "c.png": dataclasses.replace(DONE, input="in/c.png", output="c.png")}
    ledger = Ledger(make(), tmp_path, ORDER, before, lambda _: None)
    ledger.add(dataclasses.replace(DONE, seconds=9.0))
    ledger.save()
    assert saved(tmp_path) == {("in/a.png", "a.png"): "ok", ("in/c.png", "c.png"): "skipped"}
    assert ledger.report.counts() == {"ok": 1}  # this run's own


def test_an_input_has_one_fate(tmp_path):
    """A file that was finished before and fails now is failed, not also skipped."""
    ledger = Ledger(make(), tmp_path, ORDER, {"a.png": DONE}, lambda _: None)
    ledger.add(FileEntry(DONE.input, None, "failed", "truncated"))
    ledger.save()
    assert saved(tmp_path) == {("in/a.png", None): "failed"}


def test_the_environment_names_no_user_and_no_host(monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: pytest.fail("asked for the host's name"))
    found = environment("cpu")
    assert set(found) == {"python", "platform", "device", "packages", "started"}
    assert found["device"] == "cpu"
    text = json.dumps(found)
    assert socket.gethostname() not in text
    if getpass.getuser() != "root":  # a word that may occur by chance
        assert getpass.getuser() not in text


def test_package_versions_are_those_installed():
    found = package_versions()
    assert {"torch", "numpy", "pydicom"} <= set(found)
    assert "tensorrt" not in found or found["tensorrt"]
    assert all(found.values())


def test_a_report_that_cannot_be_written_stops_nothing_before_the_end(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_atomically", full)
    monkeypatch.setattr(report, "SAVE_EVERY_S", -1)
    ledger = Ledger(make(), tmp_path, ORDER, {}, lambda _: None)
    ledger.add(DONE)
    assert f"--output {tmp_path}: report.json cannot be written (No space left on device)" in caplog.text
    with pytest.raises(SettingsError, match=r"report\.json cannot be written"):
        ledger.save()
