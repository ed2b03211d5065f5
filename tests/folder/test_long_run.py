"""Runs with more files than are kept in memory: the listing, the journal, report.parquet and the command `report`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import fates, png, report_of, tree

from bsdiff_rt.config import InferSettings
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.files import file_sha256
from bsdiff_rt.folder import journal, pipeline, search, tasks
from bsdiff_rt.folder.earlier import find_named, list_results
from bsdiff_rt.folder.journal import JOURNAL, Journal
from bsdiff_rt.folder.pipeline import Inference
from bsdiff_rt.folder.summary import summarise

COUNT = 8


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A run of more than three files is a long one here."""
    for module in (journal, pipeline, search, tasks):
        monkeypatch.setattr(module, "LONG", 3)


@pytest.fixture
def run(toy, tiny_bundle, tmp_path):
    """Run the toy model on tmp_path/in into tmp_path/out. Return the report."""

    def go(**options):
        inference = Inference(InferSettings(output=tmp_path / "out", bundle=str(tiny_bundle), **options), toy)
        return inference.run(inference.find_tasks([tmp_path / "in"]))

    return go


@pytest.fixture
def folder(tmp_path):
    """Eight X-rays, one of them not an image."""
    for number in range(COUNT - 1):
        png(tmp_path / "in" / f"{number}.png", seed=number % 2)
    (tmp_path / "in" / "x.png").write_bytes(b"")
    return tmp_path / "in"


def read_statuses(output):
    with Journal(output) as opened:
        return {Path(entry["input"]).name: entry["status"] for entry in opened.read_entries()}


def test_a_long_run_writes_the_files_of_a_short_one(run, folder, tmp_path, monkeypatch):
    report = run()
    assert report.counts() == {"ok": COUNT - 1, "failed": 1}
    assert report.files == report_of(tmp_path / "out")["files"] == []
    assert report_of(tmp_path / "out")["counts"] == {"ok": COUNT - 1, "failed": 1}
    long = {name: file_sha256(tmp_path / "out" / name) for name in tree(tmp_path / "out") if name.endswith(".png")}
    assert read_statuses(tmp_path / "out") == {f"{n}.png": "ok" for n in range(COUNT - 1)} | {"x.png": "failed"}
    (tmp_path / "out").rename(tmp_path / "long")
    for module in (journal, pipeline, search, tasks):
        monkeypatch.setattr(module, "LONG", 100)
    run()
    assert {name: file_sha256(tmp_path / "out" / name) for name in long} == long


def test_a_long_run_resumes(run, folder, toy, tmp_path):
    run()
    first = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in ("0.png", "5.png")}
    (tmp_path / "out" / "1.png").unlink()
    report = run()
    assert report.counts() == {"ok": 1, "skipped": COUNT - 2, "failed": 1}
    assert first == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in first}
    assert run(seed=1).counts()["ok"] == COUNT - 1


def test_the_journal_takes_over_a_short_run_and_serves_later_ones(run, folder, tmp_path):
    for name in range(3, COUNT - 1):
        (folder / f"{name}.png").rename(tmp_path / f"{name}.png")
    (folder / "x.png").unlink()
    run()
    assert fates(tmp_path / "out") == {f"{n}.png": "ok" for n in range(3)}
    for name in range(3, COUNT - 1):
        (tmp_path / f"{name}.png").rename(folder / f"{name}.png")
    assert run().counts() == {"skipped": 3, "ok": COUNT - 4}
    for name in range(1, COUNT - 1):
        (folder / f"{name}.png").unlink()
    assert run().counts() == {"skipped": 1}
    assert Path("5.png") in find_named(tmp_path / "out")
    assert {path.name for path, _ in list_results(tmp_path / "out")} == {f"{n}.png" for n in range(COUNT - 1)}


def test_what_a_short_run_refuses_is_refused(run, folder, tmp_path):
    (folder / "0.jpg").write_bytes((folder / "0.png").read_bytes())
    png(tmp_path / "out" / "2.png")
    report = run()
    assert report.counts() == {"ok": COUNT - 2, "refused": 2, "failed": 1}
    refused = {name for name, status in read_statuses(tmp_path / "out").items() if status == "refused"}
    assert refused == {"0.png", "2.png"}
    with pytest.raises(SettingsError, match="at most"):
        run(html=True)


def test_an_input_that_changed_and_gives_nothing_sets_its_result_aside(run, folder, tmp_path):
    run()
    (folder / "4.png").write_bytes(b"no image any more")
    assert run().counts() == {"skipped": COUNT - 2, "refused": 1, "failed": 1}
    assert {"4.png.stale"} == {name for name in tree(tmp_path / "out") if "4.png" in name}
    assert Path("4.png") not in find_named(tmp_path / "out")


HANGING = """
import sys, time
sys.path[:0] = {path!r}
from pathlib import Path
from helpers import ToyRunner
from bsdiff_rt.config import InferSettings
from bsdiff_rt.folder import journal, pipeline, search, tasks
for module in (journal, pipeline, search, tasks):
    module.LONG = 3
toy = ToyRunner({size})
toy.before = lambda call: time.sleep(60) if call == 5 else None
inference = pipeline.Inference(InferSettings(output=Path({output!r}), bundle={bundle!r}), toy)
inference.run(inference.find_tasks([Path({folder!r})]))
"""


def test_a_killed_long_run_resumes(folder, toy, tiny_bundle, tmp_path):
    output = tmp_path / "out"
    names = {"path": sys.path, "size": toy.image_size, "output": str(output), "folder": str(folder)}
    process = subprocess.Popen([sys.executable, "-c", HANGING.format(bundle=str(tiny_bundle), **names)])
    deadline = time.monotonic() + 100
    while not (output / "2.png").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert (output / "2.png").exists()
    named = find_named(output)
    assert all(Path(f"{number}.png") in named for number in range(COUNT - 1))
    inference = Inference(InferSettings(output=output, bundle=str(tiny_bundle)), toy)
    report = inference.run(inference.find_tasks([folder]))
    assert report.counts()["failed"] == 1
    assert report.counts()["ok"] + report.counts()["skipped"] == COUNT - 1


def test_another_programs_files_stay(run, folder, tmp_path):
    for name in (JOURNAL, "report.parquet"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_bytes(b"mine")
        with pytest.raises(SettingsError, match=name):
            run()
        (tmp_path / "out" / name).unlink()
    run()
    (tmp_path / "out" / JOURNAL).write_bytes(b"damaged" * 1000)
    with pytest.raises(SettingsError, match=JOURNAL):
        run()


def test_the_parquet_file_lists_every_input_and_is_summarised(run, folder, cli, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    run()
    rows = parquet.read_table(tmp_path / "out" / "report.parquet").to_pylist()
    assert [Path(row["input"]).name for row in rows] == [f"{n}.png" for n in range(COUNT - 1)] + ["x.png"]
    assert rows[0]["sha256"] == file_sha256(tmp_path / "out" / "0.png")
    before = summarise(tmp_path / "out")
    (tmp_path / "out" / JOURNAL).unlink()
    assert summarise(tmp_path / "out") == before
    assert json.loads(cli("report", tmp_path / "out", "--json").out) == before


def test_the_summary_of_a_run(run, folder, cli, tmp_path):
    run()
    found = summarise(tmp_path / "out")
    assert found["counts"] == {"ok": COUNT - 1, "failed": 1}
    assert found["reasons"] == [{"reason": "the file is empty (0 bytes)", "files": 1}]
    seconds = [one["seconds"] for one in found["slowest"]]
    assert len(seconds) == COUNT - 1
    assert seconds == sorted(seconds, reverse=True)
    shown = cli("report", tmp_path / "out")
    assert shown.code == 0
    assert "failed 1, ok 7" in shown.out
    assert cli("report", tmp_path).code == 2


def test_a_listing_is_not_read_further_than_needed():
    read = []

    def produce():
        for number in range(1000):
            read.append(number)
            yield tasks.Task(Path(str(number)), None)

    listing = tasks.list_tasks(produce())
    assert listing.is_long
    assert listing.count is None
    assert len(read) == 4
    assert len(list(listing)) == 1000
