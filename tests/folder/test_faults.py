"""What hospitals do to software: sources that vanish, clocks set back, homes that cannot be written, full disks.

The trial with killed runs is tests/benchmarks/test_kill_trials.py.
"""

from __future__ import annotations

import errno
import json
import os
from datetime import datetime
from pathlib import Path

import pytest
from helpers import ToyRunner, fates, png, report_of, tree
from stand_in import SIZE

from bsdiff_rt import files
from bsdiff_rt.config import InferSettings
from bsdiff_rt.folder import ledger, report, writing
from bsdiff_rt.folder.pipeline import Inference


@pytest.fixture
def begin(small, tmp_path):
    """Makes a run over three X-rays in tmp_path/in; returns it with its tasks."""

    def do(**settings):
        for seed in range(3):
            if not (tmp_path / "in" / f"{seed}.png").exists():
                png(tmp_path / "in" / f"{seed}.png", seed=seed)
        asked = {"output": tmp_path / "out", "bundle": str(small.folder)} | settings
        inference = Inference(InferSettings(**asked), ToyRunner(SIZE))
        return inference, inference.find_tasks([tmp_path / "in"])

    return do


def test_a_source_that_vanishes_fails_alone(begin, tmp_path):
    inference, tasks = begin()
    (tmp_path / "in" / "1.png").unlink()
    entries = inference.run(tasks).files
    assert [(entry.status, entry.reason) for entry in entries] == [
        ("ok", None),
        ("failed", "cannot be read: No such file or directory"),
        ("ok", None),
    ]


def test_a_folder_of_sources_that_vanishes_fails_its_files(begin, tmp_path):
    inference, tasks = begin()
    (tmp_path / "in").rename(tmp_path / "away")
    assert {entry.status for entry in inference.run(tasks).files} == {"failed"}
    (tmp_path / "away").rename(tmp_path / "in")
    inference, tasks = begin()
    assert {entry.status for entry in inference.run(tasks).files} == {"ok"}


def test_a_clock_that_is_set_back_changes_nothing(begin, tmp_path, monkeypatch):
    inference, tasks = begin()
    inference.run(tasks)

    class Earlier(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2001, 1, 1, tzinfo=tz)

    monkeypatch.setattr(report, "datetime", Earlier)
    for path in (tmp_path / "out").iterdir():
        os.utime(path, (0, 0))
    inference, tasks = begin()
    assert {entry.status for entry in inference.run(tasks).files} == {"skipped"}
    saved = report_of(tmp_path / "out")
    assert saved["started"].startswith("2001-01-01")
    assert all(entry["seconds"] > 0 for entry in saved["files"])


def test_a_home_that_cannot_be_written_is_not_needed(begin, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.write_bytes(b"not a folder")
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(home))
    inference, tasks = begin()
    assert {entry.status for entry in inference.run(tasks).files} == {"ok"}


def test_a_full_disk_fails_what_did_not_fit_and_the_same_run_ends_later(begin, tmp_path, monkeypatch):
    """After 30 kB every write fails, that of the report as well, until there is room again."""
    real, written = files.open_atomically, [0]

    def fill(path: Path, content: bytes, *, durable: bool = False) -> None:
        written[0] += len(content)
        if written[0] > 30_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        with real(path) as file:
            file.write(content)

    with monkeypatch.context() as full:
        for module in ("formats.raster", "folder.report"):
            full.setattr(f"bsdiff_rt.{module}.write_atomically", fill)
        inference, tasks = begin()
        with pytest.raises(Exception, match=r"report\.json cannot be written \(No space left on device\)"):
            inference.run(tasks)
    done = tree(tmp_path / "out") - {"report.json"}
    assert 0 < len(done) < 3
    inference, tasks = begin()
    inference.run(tasks)
    assert fates(tmp_path / "out") == {"0.png": "ok", "1.png": "ok", "2.png": "ok"}
    inference, tasks = begin(output=tmp_path / "undisturbed")
    inference.run(tasks)
    for name in ("0.png", "1.png", "2.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_results_are_on_the_disk_before_the_report_names_them(begin, tmp_path, monkeypatch):
    """A power failure cannot be tried here. So the order of flushing and reporting is checked."""
    flushed, unflushed = set(), []
    real_flush, real_write = writing.flush_to_disk, report.write_atomically

    def flush(path):
        real_flush(path)
        flushed.add(path)

    def write(path, content, **options):
        named = [entry["output"] for entry in json.loads(content)["files"] if entry["status"] == "ok"]
        unflushed.extend(name for name in named if tmp_path / "out" / name not in flushed)
        assert options == {"durable": True}
        real_write(path, content, **options)

    monkeypatch.setattr(writing, "flush_to_disk", flush)
    monkeypatch.setattr(report, "write_atomically", write)
    monkeypatch.setattr(ledger, "SAVE_EVERY_S", 0.0)
    inference, tasks = begin(samples=2)
    inference.run(tasks)
    assert fates(tmp_path / "out") == {f"{seed}.png": "ok" for seed in range(3)}
    assert unflushed == []
    assert {path.parent.name for path in flushed if path.suffix == ".png"} == {"out", "uncertainty"}
    assert {tmp_path / "out", tmp_path / "out" / "uncertainty"} <= flushed


def test_a_result_that_cannot_be_flushed_fails(begin, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "flush_to_disk", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input error")))
    inference, tasks = begin()
    found = {(entry.status, entry.reason) for entry in inference.run(tasks).files}
    assert found == {("failed", "cannot be written: Input error")}
