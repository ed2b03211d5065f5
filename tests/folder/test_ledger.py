"""The report while a run goes on: when it is written, and what becomes of what earlier runs wrote."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import re
import sys
from pathlib import Path

import pytest

from bsdiff_rt.errors import SettingsError
from bsdiff_rt.folder import ledger as ledger_module
from bsdiff_rt.folder import report
from bsdiff_rt.folder.ledger import Ledger, only_run
from bsdiff_rt.folder.report import FileEntry, Report, read_results

DONE = FileEntry("in/a.png", "a.png", "ok", None, 0.5, "1" * 64, "2" * 64)
FAILED = FileEntry("in/b.png", None, "failed", "truncated", 0.1, None, "3" * 64)
OUTPUTS = {f"in/{name}.png": Path(f"{name}.png") for name in "abc"}


def make(**changes) -> Report:
    settings = {"seed": 0, "steps": 3} | changes
    return Report({"name": "tiny", "sha256": "0" * 64, "licence": "MIT"}, settings, {"device": "cpu"})


def saved(folder):
    return {
        (entry["input"], entry["output"]): entry["status"]
        for entry in json.loads((folder / "report.json").read_text())["files"]
    }


def test_the_ledger_saves_now_and_then_and_at_the_end(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(ledger_module.time, "monotonic", lambda: now[0])
    seen = []
    ledger = Ledger(make(), tmp_path, OUTPUTS, {}, seen.append)
    ledger.add(DONE)
    assert not (tmp_path / "report.json").exists()
    now[0] += ledger_module.SAVE_EVERY_S + 1
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
    ledger = Ledger(make(), tmp_path, OUTPUTS, {}, lambda _: None)
    ledger.add(FAILED)
    ledger.add(DONE)
    ledger.save()
    assert list(saved(tmp_path)) == [("in/a.png", "a.png"), ("in/b.png", None)]


def test_what_was_finished_before_stays_known(tmp_path):
    before = {"a.png": DONE, "c.png": dataclasses.replace(DONE, input="in/c.png", output="c.png")}
    (tmp_path / "c.png").touch()
    ledger = Ledger(make(), tmp_path, OUTPUTS, before, lambda _: None)
    ledger.add(dataclasses.replace(DONE, seconds=9.0))
    ledger.save()
    assert saved(tmp_path) == {("in/a.png", "a.png"): "ok", ("in/c.png", "c.png"): "skipped"}
    assert ledger.report.counts() == {"ok": 1}  # this run's own


def test_an_input_has_one_fate(tmp_path):
    """A file that was finished before and fails now is failed, not also skipped."""
    ledger = Ledger(make(), tmp_path, OUTPUTS, {"a.png": DONE}, lambda _: None)
    ledger.add(FileEntry(DONE.input, None, "failed", "truncated"))
    ledger.save()
    assert saved(tmp_path) == {("in/a.png", None): "failed"}


def test_a_report_that_cannot_be_written_stops_nothing_before_the_end(tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_atomically", full)
    monkeypatch.setattr(ledger_module, "SAVE_EVERY_S", -1)
    ledger = Ledger(make(), tmp_path, OUTPUTS, {}, lambda _: None)
    ledger.add(DONE)
    message = f"{tmp_path}: report.json cannot be written (No space left on device). Finished results are complete."
    assert message in caplog.messages
    with pytest.raises(SettingsError, match=re.escape(message)) as refused:
        ledger.save()
    assert refused.value.setting == "output"


def wrote(folder, name, content=b"pixels") -> FileEntry:
    """The entry of a result that lies in `folder`."""
    (folder / name).write_bytes(content)
    return FileEntry(f"in/{name}", name, "ok", None, 0.5, hashlib.sha256(content).hexdigest(), "2" * 64)


def test_results_of_other_settings_stay_known_while_they_lie_there(tmp_path):
    """Else a later search of the folder above takes them for X-rays."""
    first = [wrote(tmp_path, name) for name in ("a.png", "b.png", "c.png")]
    dataclasses.replace(make(), files=first).write(tmp_path)
    everything = read_results(tmp_path)
    for seed in (1, 2):  # the second finds them in the first's list of earlier ones
        ledger = Ledger(make(seed=seed), tmp_path, OUTPUTS, {}, lambda _: None)
        ledger.add(wrote(tmp_path, "a.png"))
        ledger.save()
        assert read_results(tmp_path) == everything
        assert saved(tmp_path) == {("in/a.png", "a.png"): "ok"}
    (tmp_path / "b.png").unlink()
    Ledger(make(seed=3), tmp_path, OUTPUTS, {}, lambda _: None).save()
    assert sorted(read_results(tmp_path)) == [Path("a.png"), Path("c.png")]


@pytest.mark.parametrize("now", [b"pixels", b"mine"])
def test_the_result_of_a_changed_input_that_gives_none_is_renamed(tmp_path, now, caplog):
    dataclasses.replace(make(), files=[wrote(tmp_path, "b.png")]).write(tmp_path)
    (tmp_path / "b.png").write_bytes(now)
    caplog.set_level("ERROR")  # as with --quiet
    added = []
    ledger = Ledger(make(seed=1), tmp_path, OUTPUTS, {}, added.append)
    ledger.add(FAILED)
    ledger.save()
    if now == b"mine":  # not what that run wrote
        assert ((tmp_path / "b.png").read_bytes(), caplog.messages) == (b"mine", [])
        return
    assert [path.name for path in tmp_path.glob("b.*")] == ["b.png.stale"]
    assert (tmp_path / "b.png.stale").read_bytes() == b"pixels"
    warning = f"{tmp_path / 'b.png'}: made before in/b.png changed. Renamed to b.png.stale."
    assert caplog.messages == [warning]
    assert added[0].warnings == [warning]
    assert json.loads((tmp_path / "report.json").read_text())["files"][0]["warnings"] == [warning]
    assert read_results(tmp_path) == {}  # and so no later run touches it


def test_a_stale_result_replaces_no_older_one(tmp_path):
    for number, name in enumerate(("b.png.stale", "b.png.2.stale", "b.png.3.stale")):
        dataclasses.replace(make(), files=[wrote(tmp_path, "b.png", b"%d" % number)]).write(tmp_path)
        ledger = Ledger(make(seed=1), tmp_path, OUTPUTS, {}, lambda _: None)
        ledger.add(FAILED)
        assert (tmp_path / name).read_bytes() == b"%d" % number
    assert len(list(tmp_path.glob("b.png*"))) == 3


@pytest.mark.parametrize("gives", ["nothing", "another result"])
def test_the_deviation_map_of_a_result_that_is_gone_is_renamed_too(tmp_path, gives):
    (tmp_path / "uncertainty").mkdir()
    digest = wrote(tmp_path, "uncertainty/b.png", b"map").sha256
    mapped = dataclasses.replace(wrote(tmp_path, "b.png"), maps={"uncertainty": digest})
    dataclasses.replace(make(), files=[mapped]).write(tmp_path)
    ledger = Ledger(make(samples=1), tmp_path, OUTPUTS, {}, lambda _: None)
    ledger.add(FAILED if gives == "nothing" else wrote(tmp_path, "b.png", b"new"))
    expected = {
        "b.png.stale" if gives == "nothing" else "b.png",
        "uncertainty",
        "uncertainty/b.png.stale",
        "report.json",
    }
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} == expected


def test_a_deviation_map_that_is_not_as_it_was_written_stays(tmp_path):
    (tmp_path / "uncertainty").mkdir()
    (tmp_path / "uncertainty" / "b.png").write_bytes(b"mine")
    mapped = dataclasses.replace(wrote(tmp_path, "b.png"), maps={"uncertainty": "7" * 64})
    dataclasses.replace(make(), files=[mapped]).write(tmp_path)
    ledger = Ledger(make(samples=1), tmp_path, OUTPUTS, {}, lambda _: None)
    ledger.add(wrote(tmp_path, "b.png", b"new"))
    assert (tmp_path / "uncertainty" / "b.png").read_bytes() == b"mine"


def test_started_and_ended(tmp_path):
    ledger = Ledger(make(), tmp_path, OUTPUTS, {}, lambda _: None)
    ledger.begin()
    document = json.loads((tmp_path / "report.json").read_text())
    assert (document["started"], document["ended"]) == (ledger.report.started, None)
    ledger.save()
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["ended"] >= document["started"]


def test_a_run_that_skips_everything_keeps_the_earlier_rates(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(ledger_module.time, "monotonic", lambda: now[0])
    done = wrote(tmp_path, "a.png")
    ledger = Ledger(make(), tmp_path, OUTPUTS, {}, lambda _: None)
    ledger.add(done)
    now[0] += 2
    ledger.save(1.0)
    rates = {"images_per_second": 0.5, "model_busy": 0.5}
    for before, expected in (({"a.png": done}, rates), ({}, dict.fromkeys(rates, 0.0))):  # {}: of other settings
        again = Ledger(make(), tmp_path, OUTPUTS, before, lambda _: None)
        again.add(dataclasses.replace(done, status="skipped"))
        now[0] += 7
        again.save()
        document = json.loads((tmp_path / "report.json").read_text())
        assert {key: document[key] for key in rates} == expected
        assert document["files"][0]["seconds"] == 0.5


def test_the_preview_of_an_earlier_run_stays_named(tmp_path):
    dataclasses.replace(make(), preview="preview.png").write(tmp_path)
    Ledger(make(), tmp_path, OUTPUTS, {}, lambda _: None).save()
    assert report.read_name(tmp_path, "preview") == "preview.png"


def test_anothers_result_stays_where_an_input_gives_none(tmp_path):
    older = dataclasses.replace(wrote(tmp_path, "b.png"), path_sha256="3" * 64)
    dataclasses.replace(make(), files=[older]).write(tmp_path)
    ledger = Ledger(make(seed=1), tmp_path, OUTPUTS, {}, lambda _: None)
    ledger.add(dataclasses.replace(FAILED, path_sha256="4" * 64))
    assert (tmp_path / "b.png").read_bytes() == b"pixels"


def test_a_result_that_is_gone_is_not_called_skipped(tmp_path):
    before = {"b.png": wrote(tmp_path, "b.png")}
    Ledger(make(), tmp_path, OUTPUTS, before, lambda _: None).save()
    assert saved(tmp_path) == {("in/b.png", "b.png"): "skipped"}
    (tmp_path / "b.png").unlink()
    Ledger(make(), tmp_path, OUTPUTS, before, lambda _: None).save()
    assert saved(tmp_path) == {}


@pytest.mark.parametrize("input_sha256", ["2" * 64, None], ids=["as it was", "cannot be read"])
def test_a_failure_that_is_not_the_inputs_destroys_nothing(tmp_path, input_sha256):
    """Out of memory, a full disk, a share that is not there for a moment: older results are as good as before."""
    dataclasses.replace(make(), files=[wrote(tmp_path, "b.png")]).write(tmp_path)
    older = read_results(tmp_path)
    ledger = Ledger(make(seed=1), tmp_path, OUTPUTS, {}, lambda _: None)
    ledger.add(dataclasses.replace(FAILED, input_sha256=input_sha256))
    ledger.save()
    assert (tmp_path / "b.png").read_bytes() == b"pixels"
    assert read_results(tmp_path) == older


def test_saving_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    """A report of a hundred thousand files takes seconds to write."""
    now, saves = [100.0], []
    monkeypatch.setattr(ledger_module.time, "monotonic", lambda: now[0])

    def slow(*_, **__):
        saves.append(now[0])
        now[0] += 3.0

    monkeypatch.setattr(report, "write_atomically", slow)
    ledger = Ledger(make(), tmp_path, OUTPUTS, {}, lambda _: None)
    while now[0] < 400:
        now[0] += 1.0
        ledger.add(FAILED)
    assert saves == [105.0, 168.0, 231.0, 294.0, 357.0]


def test_one_run_at_a_time(tmp_path):
    refusal = f"{tmp_path}: another run is writing into it. Wait for its end, or choose another folder."
    with only_run(tmp_path), pytest.raises(SettingsError, match=re.escape(refusal)), only_run(tmp_path):
        pass
    with only_run(tmp_path):
        assert not list(tmp_path.iterdir())


def test_a_folder_without_locks_is_used_all_the_same(tmp_path, monkeypatch):
    def no(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no)
    with only_run(tmp_path):
        pass
    monkeypatch.setattr(sys, "platform", "win32")
    with only_run(tmp_path / "absent"):  # not even opened
        pass


def test_what_a_killed_run_was_to_write_stays_known_until_it_is_done(tmp_path):
    """Killed twice: the first wrote a.png without a word, the second did not come that far."""
    (tmp_path / "c.png").touch()  # somebody's
    for _ in range(2):
        Ledger(make(), tmp_path, OUTPUTS, {}, lambda _: None).begin()
        assert report.read_planned(tmp_path) == {Path("a.png"), Path("b.png")}
        (tmp_path / "a.png").touch()
    ledger = Ledger(make(), tmp_path, OUTPUTS, {}, lambda _: None)
    ledger.add(DONE)
    ledger.add(FAILED)
    ledger.save()
    assert report.read_planned(tmp_path) == set()
