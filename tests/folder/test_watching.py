"""A folder that is watched: which files are taken and when, one report over the whole time, a clean end."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ToyRunner, fates, pixels, png, report_of, toy_command, tree
from stand_in import SIZE

from bsdiff_rt.config import InferSettings
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.files import file_sha256
from bsdiff_rt.folder import ledger
from bsdiff_rt.folder.ledger import only_run
from bsdiff_rt.folder.pipeline import Inference
from bsdiff_rt.folder.search import find_files
from bsdiff_rt.folder.watching import Once, Watcher

# --- which files, and when ---


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def poll(watcher):
    return sorted(path.name for path in watcher.poll())


def test_a_file_is_named_once_it_has_kept_its_size(folder, tmp_path):
    watcher = Watcher(folder, tmp_path / "out")
    (folder / "a.png").write_bytes(b"1")
    assert poll(watcher) == []
    (folder / "a.png").write_bytes(b"12")
    assert poll(watcher) == []  # it grows
    assert poll(watcher) == ["a.png"]
    assert poll(watcher) == []


def test_a_changed_file_is_named_again(folder, tmp_path):
    watcher = Watcher(folder, tmp_path / "out")
    (folder / "a.png").write_bytes(b"1")
    assert [poll(watcher) for _ in range(3)] == [[], ["a.png"], []]
    os.utime(folder / "a.png", ns=(1, 1))  # the same size
    assert [poll(watcher) for _ in range(3)] == [[], ["a.png"], []]


def test_a_file_that_went_and_came_back_is_named_again(folder, tmp_path):
    watcher = Watcher(folder, tmp_path / "out")
    (folder / "a.png").write_bytes(b"1")
    assert [poll(watcher) for _ in range(2)] == [[], ["a.png"]]
    shutil.move(folder / "a.png", tmp_path / "a.png")
    assert poll(watcher) == []
    shutil.move(tmp_path / "a.png", folder / "a.png")
    assert [poll(watcher) for _ in range(2)] == [[], ["a.png"]]


def test_folders_below_are_watched_and_the_output_folder_is_not(folder):
    watcher = Watcher(folder, folder / "out")
    for path in (folder / "sub" / "deeper" / "a.png", folder / "out" / "b.png"):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"1")
    (folder / "dead").symlink_to("nowhere")
    assert [poll(watcher) for _ in range(2)] == [[], ["a.png"]]


def test_a_folder_that_is_away_is_empty(folder, tmp_path):
    watcher = Watcher(folder, tmp_path / "out")
    (folder / "a.png").write_bytes(b"1")
    assert [poll(watcher) for _ in range(2)] == [[], ["a.png"]]
    folder.rename(tmp_path / "away")
    assert poll(watcher) == []


def test_what_was_forgotten_is_named_again(folder, tmp_path):
    watcher = Watcher(folder, tmp_path / "out")
    (folder / "a.png").write_bytes(b"1")
    watcher.poll()
    ready = watcher.poll()
    watcher.forget(ready)
    assert watcher.poll() == ready


def test_a_message_passes_once():
    once = Once()
    records = [logging.makeLogRecord({"msg": "%s: left out", "args": (name,)}) for name in ("a", "b", "a")]
    assert [once.filter(record) for record in records] == [True, True, False]


def test_a_search_says_everything_again_after_a_watch(watch, folder, caplog):
    text = "left out files of kinds not read here (1 .npy)"
    (folder / "scan.npy").write_bytes(b"")
    watch(lambda: png(folder / "a.png"), lambda: png(folder / "b.png"))
    assert caplog.text.count(text) == 1
    list(find_files([folder], folder / "out"))
    assert caplog.text.count(text) == 2


# --- the engine on a folder ---


class Stop(BaseException):
    """As a signal."""


@pytest.fixture
def watch(small, folder, tmp_path):
    """Watches tmp_path/in with the toy. Before each look it does the next of some steps, and stops after the last."""
    toy = ToyRunner(SIZE)

    def do(*steps, **settings):
        asked = {"output": tmp_path / "out", "bundle": str(small.folder)} | settings
        inference = Inference(InferSettings(**asked), toy)
        waiting = [step for each in steps for step in (each, lambda: None, lambda: None)]

        def wait():
            if not waiting:
                raise Stop
            waiting.pop(0)()

        with pytest.raises(Stop):
            inference.watch(folder, wait=wait)
        assert toy.closed
        return inference.report

    do.toy = toy
    return do


def test_files_are_done_as_they_arrive_and_one_report_names_them(watch, folder, tmp_path):
    seen = []

    def check():
        seen.append((fates(tmp_path / "out"), report_of(tmp_path / "out")["ended"]))

    report = watch(
        lambda: png(folder / "a.png"), check, lambda: png(folder / "sub" / "b.png", seed=1), check, lambda: None
    )
    assert seen == [({"a.png": "ok"}, None), ({"a.png": "ok", "b.png": "ok"}, None)]
    assert tree(tmp_path / "out") == {"a.png", "sub/b.png", "report.json"}
    saved = report_of(tmp_path / "out")
    assert saved["ended"] is not None
    assert [entry["output"] for entry in saved["files"]] == ["a.png", "sub/b.png"]
    assert [entry.status for entry in report.files] == ["ok", "ok"]
    for entry in saved["files"]:
        assert entry["sha256"] == file_sha256(tmp_path / "out" / entry["output"])


def test_the_pixels_are_those_of_infer(watch, folder, small, tmp_path):
    watch(lambda: png(folder / "a.png"))
    inference = Inference(InferSettings(output=tmp_path / "other", bundle=str(small.folder)), ToyRunner(SIZE))
    inference.run(inference.find_tasks([folder]))
    assert (tmp_path / "out" / "a.png").read_bytes() == (tmp_path / "other" / "a.png").read_bytes()


def test_a_changed_file_is_done_again_and_listed_once(watch, folder, tmp_path):
    first = []

    def change():
        first.append(pixels(tmp_path / "out" / "a.png"))
        png(folder / "a.png", seed=7)

    watch(lambda: png(folder / "a.png"), change)
    assert fates(tmp_path / "out") == {"a.png": "ok"}
    assert (pixels(tmp_path / "out" / "a.png") != first[0]).any()


def test_half_a_file_fails_and_the_whole_one_is_done(watch, folder, tmp_path):
    whole = png(tmp_path / "whole.png").read_bytes()
    states = []
    watch(
        lambda: (folder / "a.png").write_bytes(whole[:2000]),
        lambda: states.append(fates(tmp_path / "out")),
        lambda: (folder / "a.png").write_bytes(whole),
    )
    assert states == [{"a.png": "failed"}]
    assert fates(tmp_path / "out") == {"a.png": "ok"}


def test_a_result_of_a_file_that_gives_none_now_is_set_aside(watch, folder, tmp_path):
    watch(lambda: png(folder / "a.png"), lambda: (folder / "a.png").write_bytes(b"another patient"))
    assert fates(tmp_path / "out") == {"a.png": "refused"}
    assert tree(tmp_path / "out") == {"a.png.stale", "report.json"}


def test_what_infer_finished_is_skipped_and_the_other_way_round(watch, folder, small, tmp_path):
    png(folder / "a.png")
    watch(lambda: None)
    again = watch(lambda: png(folder / "b.png", seed=1))
    assert {Path(entry.input).name: entry.status for entry in again.files} == {"a.png": "skipped", "b.png": "ok"}
    inference = Inference(InferSettings(output=tmp_path / "out", bundle=str(small.folder)), ToyRunner(SIZE))
    assert {entry.status for entry in inference.run(inference.find_tasks([folder])).files} == {"skipped"}


def test_a_report_that_cannot_be_written_is_tried_again(watch, folder, tmp_path, monkeypatch, caplog):
    real = ledger.Report.write
    full = [True]

    def write(report, place):
        if full[0] and report.planned:
            raise OSError(28, "No space left on device")
        real(report, place)

    monkeypatch.setattr(ledger.Report, "write", write)
    watch(lambda: png(folder / "a.png"), lambda: full.clear() or full.append(False))
    assert "report.json cannot be written (No space left on device)" in caplog.text
    assert fates(tmp_path / "out") == {"a.png": "ok"}


def test_other_runs_are_kept_out(watch, small, folder, tmp_path):
    def run_beside():
        with pytest.raises(SettingsError, match="another run is writing into it"), only_run(tmp_path / "out"):
            pass

    watch(run_beside)


# --- the command ---


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_cleanly(small, folder, tmp_path, number):
    png(folder / "a.png")
    arguments = ["watch", str(folder), "-o", str(tmp_path / "out"), "--bundle", str(small.folder), "--every", "0.1"]
    code = toy_command(SIZE, [*arguments, "--runner", "eager"])
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out" / "a.png").is_file() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "wrote 1 image, refused 0, failed 0" in out
    assert "ok: " in err
    assert report_of(tmp_path / "out")["ended"] is not None
    assert fates(tmp_path / "out") == {"a.png": "ok"}


def test_a_file_cannot_be_watched(cli, tmp_path):
    outcome = cli("watch", png(tmp_path / "a.png"), "-o", tmp_path / "out")
    assert outcome.code == 2
    assert "a.png: not a folder. Name one to watch, or use infer." in outcome.err
    assert cli("watch", tmp_path, "-o", tmp_path).code == 2


def test_the_command_prints_the_report(cli, small, toy, folder, tmp_path, monkeypatch):
    png(folder / "a.png")
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("bsdiff_rt.cli.time.sleep", sleep)
    toy.image_size = SIZE
    outcome = cli("watch", folder, "-o", tmp_path / "out", "--bundle", small.folder, "--every", "0.5", "--json", "-q")
    assert outcome.code == 0, outcome.err
    assert [entry["status"] for entry in json.loads(outcome.out)["files"]] == ["ok"]
    assert looks == [0.5] * 3
    assert outcome.err == ""
