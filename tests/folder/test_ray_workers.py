"""Runs in several processes through Ray: the same files, whatever dies on the way. Skipped where Ray is missing."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from helpers import fates, png, report_of, tree

from bsdiff_rt.config import InferSettings
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.files import file_sha256
from bsdiff_rt.folder import ray_workers
from bsdiff_rt.folder.pipeline import Inference
from bsdiff_rt.folder.ray_workers import LOCAL, RayWorkers, Share, find_share

CPU = {"Alive": True, "Resources": {"CPU": 8.0}}
GPU = {"Alive": True, "Resources": {"CPU": 64.0, "GPU": 4.0}}
DEAD = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
COUNT = 12


def make(**options):
    return InferSettings(output=Path("out"), **options)


@pytest.mark.parametrize(
    ("nodes", "options", "share"),
    [
        ([CPU], {}, Share(2, 4, 0)),
        ([CPU, CPU], {"threads": 1}, Share(16, 1, 0)),
        ([CPU], {"threads": 5}, Share(1, 5, 0)),
        ([{"Alive": True, "Resources": {"CPU": 2.0}}], {}, Share(1, 2, 0)),
        ([CPU, GPU, DEAD], {}, Share(4, 1, 1)),
        ([GPU], {"device": "cpu", "threads": 16}, Share(4, 16, 0)),
    ],
)
def test_the_share_of_each_worker(nodes, options, share):
    assert find_share(make(**options), nodes) == share


@pytest.mark.parametrize("options", [{"threads": 9}, {"device": "cuda"}])
def test_a_share_that_no_machine_has(options):
    with pytest.raises(SettingsError):
        find_share(make(**options), [CPU])


def test_ray_chooses_the_gpu(monkeypatch):
    monkeypatch.setattr(ray_workers, "find_spec", lambda _: object())
    with pytest.raises(SettingsError, match="cuda:1"):
        RayWorkers(make(device="cuda:1"), None, LOCAL)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(ray_workers, "find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=r"bsdiff-rt\[ray\]"):
        RayWorkers(make(), None, LOCAL)


@pytest.fixture
def folder(tmp_path):
    """Twelve X-rays and an empty file."""
    for number in range(COUNT):
        png(tmp_path / "in" / f"{number}.png", seed=number)
    (tmp_path / "in" / "x.png").write_bytes(b"")
    return tmp_path / "in"


def run(tiny_bundle, inputs, output, ray=None):
    settings = InferSettings(output=output, bundle=str(tiny_bundle), runner="eager", device="cpu", threads=1)
    inference = Inference(settings, ray=ray)
    return inference.run(inference.find_tasks([inputs]))


def list_children(pid):
    """Return the processes below one, by their command lines (Linux)."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = status.read_text().rsplit(")", 1)
            parents[int(status.parent.name)] = int(rest.split()[1]), name.split("(", 1)[1]
        except OSError:
            continue
    found = {pid}
    while new := {each for each, (parent, _) in parents.items() if parent in found} - found:
        found |= new
    return {each: parents[each][1] for each in found - {pid}}


@pytest.mark.slow
def test_two_workers_write_the_same_files_though_one_is_killed(tiny_bundle, folder, tmp_path):
    """One worker is ended by SIGKILL while the run goes on; the second run finds everything finished."""
    pytest.importorskip("ray")
    if (os.cpu_count() or 1) < 2 or sys.platform != "linux":
        pytest.skip("needs Linux and two cores")
    plain = run(tiny_bundle, folder, tmp_path / "plain")
    done, killed = threading.Event(), []

    def kill():
        while not done.wait(0.05):
            workers = [pid for pid, name in list_children(os.getpid()).items() if "MapWorker" in name]
            if len(workers) == 2 and (tmp_path / "out" / "0.png").exists():
                os.kill(workers[0], signal.SIGKILL)
                killed.append(workers[0])
                return

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        report = run(tiny_bundle, folder, tmp_path / "out", LOCAL)
    finally:
        done.set()
        thread.join()
    assert fates(tmp_path / "out") == fates(tmp_path / "plain")
    assert report.counts() == {"ok": COUNT, "failed": 1}
    assert report.settings == plain.settings
    assert (report.workers_replaced or 0) == len(killed)
    assert [entry.input for entry in report.files] == [entry.input for entry in plain.files]
    files = {name for name in tree(tmp_path / "plain") if name.endswith(".png")}
    assert {name for name in tree(tmp_path / "out") if name != "report.json"} == files
    for name in files:
        assert file_sha256(tmp_path / "out" / name) == file_sha256(tmp_path / "plain" / name)
    assert report_of(tmp_path / "out")["environment"]["workers"] == 2
    again = run(tiny_bundle, folder, tmp_path / "out")  # without Ray
    assert again.counts() == {"skipped": COUNT, "failed": 1}


@pytest.mark.parametrize(
    ("words", "address"),
    [
        (["--ray"], "local"),
        (["--ray", "in"], "local"),
        (["--ray", "--quiet"], "local"),
        (["--ray", "auto"], "auto"),
        (["--ray", "head:6379"], "head:6379"),
        (["--ray=10.0.0.1:6379"], "10.0.0.1:6379"),
        ([], None),
    ],
)
def test_the_address_may_be_left_out(cli, folder, tmp_path, monkeypatch, words, address):
    monkeypatch.chdir(tmp_path)
    asked = []

    class Asked(BaseException):
        pass

    def note(settings, runner=None, ray=None):
        asked.append(ray)
        raise Asked

    monkeypatch.setattr("bsdiff_rt.folder.pipeline.Inference", note)
    words = [*words, "-o", "out"] if "in" in words else [*words, "in", "-o", "out"]
    with pytest.raises(Asked):
        cli("infer", *words)
    assert asked == [address]
