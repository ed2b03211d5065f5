"""Runs in several processes through Ray: the same files, whatever dies on the way. Skipped where Ray is missing."""

from __future__ import annotations

import json
import os
import pickle
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import fates, png, report_of, tree

from bsdiff_rt.config import InferSettings
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.files import file_sha256, write_atomically
from bsdiff_rt.folder import ray_workers
from bsdiff_rt.folder.pipeline import Inference
from bsdiff_rt.folder.ray_workers import LOCAL, TRIES, RayWorkers, Share, find_share
from bsdiff_rt.folder.report import FileEntry
from bsdiff_rt.folder.tasks import Task
from bsdiff_rt.urls import to_path

ROOT = Path(__file__).parents[2]
CPU = {"Alive": True, "Resources": {"CPU": 8.0}}
GPU = {"Alive": True, "Resources": {"CPU": 64.0, "GPU": 4.0}}
DEAD = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
COUNT = 12
STEPS = 60


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


class Killed(BaseException):
    """Stands for SIGKILL."""


class DyingWorker:
    """Does files, and dies over the file that `dies_over` names next, or over every file that it always names."""

    def __init__(self, dies_over, always=None):
        self.busy_s, self._dies_over, self._always = 0.0, dies_over, always

    def do(self, tasks, before, add):
        for task in tasks:
            if self._dies_over and self._dies_over[0] == task.input.name:
                self._dies_over.pop(0)
                raise Killed
            if task.input.name == self._always:
                raise Killed
            add(FileEntry(str(task.input), str(task.output), "ok", None, 0.1, "0" * 64, "0" * 64, "0" * 64))


def do_until_done(worker, names):
    """Hand a group to workers until one survives; return its entries by name."""
    table = pytest.importorskip("pyarrow").table
    census, group = ray_workers._Census(), [pickle.dumps((Task(Path(name), Path(name)), None)) for name in names]
    while True:
        actor = object.__new__(ray_workers._Actor)
        actor._worker, actor._begin, actor._end = worker, census.begin, census.end
        with suppress(Killed):
            entries = [pickle.loads(item) for item in actor(table({"item": group}))["item"].to_pylist()]
            return {entry.input: entry for entry in entries}


def test_files_that_others_died_beside_do_not_fail():
    """Of 500 files in a run with 50 kills, five were reported as failed, though nobody had died over them."""
    names = [f"{number}.png" for number in range(TRIES + 4)]
    entries = do_until_done(DyingWorker(names[1:]), names)
    assert {entry.status for entry in entries.values()} == {"ok"}
    assert len(entries) == len(names)


def test_a_file_that_kills_every_worker_fails_and_the_others_do_not():
    entries = do_until_done(DyingWorker([], always="1.png"), ["0.png", "1.png", "2.png"])
    assert {name: entry.status for name, entry in entries.items()} == {"0.png": "ok", "1.png": "failed", "2.png": "ok"}
    assert entries["1.png"].reason == f"{TRIES} workers died while they processed it"


@pytest.fixture
def folder(tmp_path):
    """Twelve X-rays and an empty file."""
    for number in range(COUNT):
        png(tmp_path / "in" / f"{number}.png", seed=number)
    (tmp_path / "in" / "x.png").write_bytes(b"")
    return tmp_path / "in"


def run(tiny_bundle, inputs, output, ray=None, steps=None):
    asked = {"bundle": str(tiny_bundle), "runner": "eager", "device": "cpu", "threads": 1, "steps": steps}
    settings = InferSettings(output=output, **asked)
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


@pytest.mark.services
@pytest.mark.slow
def test_two_workers_write_the_same_files_though_one_is_killed(tiny_bundle, folder, tmp_path, monkeypatch):
    """One worker is ended by SIGKILL while the run goes on; the second run finds everything finished.

    It is killed when both have loaded the model, and the images take long enough for it to have work then.
    """
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("HOME", str(tmp_path))  # a local Ray keeps its token there,
    monkeypatch.setenv("RAY_AUTH_MODE", "")  # and sets this variable, which is put back
    monkeypatch.delenv("RAY_AUTH_MODE")
    if (os.cpu_count() or 1) < 2 or sys.platform != "linux":
        pytest.skip("needs Linux and two cores")
    plain = run(tiny_bundle, folder, tmp_path / "plain", steps=STEPS)
    done, killed, runs = threading.Event(), [], []
    enter = RayWorkers.__enter__
    monkeypatch.setattr(RayWorkers, "__enter__", lambda workers: runs.append(enter(workers)) or workers)

    def kill():
        while not done.wait(0.05):
            workers = [pid for pid, name in list_children(os.getpid()).items() if "MapWorker" in name]
            if len(workers) == 2 and ray.get(runs[0]._census.count.remote()) == 2:
                os.kill(workers[0], signal.SIGKILL)
                killed.append(workers[0])
                return

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        report = run(tiny_bundle, folder, tmp_path / "out", LOCAL, STEPS)
    finally:
        done.set()
        thread.join()
    token = tmp_path / ".ray" / "auth_token"
    assert not token.exists() or stat.S_IMODE(token.stat().st_mode) == 0o600
    assert fates(tmp_path / "out") == fates(tmp_path / "plain")
    assert report.counts() == {"ok": COUNT, "failed": 1}
    assert report.settings == plain.settings
    assert report.workers_replaced == len(killed) == 1
    assert [entry.input for entry in report.files] == [entry.input for entry in plain.files]
    files = {name for name in tree(tmp_path / "plain") if name.endswith(".png")}
    assert {name for name in tree(tmp_path / "out") if name != "report.json"} == files
    for name in files:
        assert file_sha256(tmp_path / "out" / name) == file_sha256(tmp_path / "plain" / name)
    assert report_of(tmp_path / "out")["environment"]["workers"] == 2
    again = run(tiny_bundle, folder, tmp_path / "out", steps=STEPS)  # without Ray
    assert again.counts() == {"skipped": COUNT, "failed": 1}


def find_free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def cluster(s3):
    """A Ray cluster of two cores on 127.0.0.1: its address, and the environment of a process that belongs to it."""
    pytest.importorskip("ray")
    if (os.cpu_count() or 1) < 2 or sys.platform != "linux":
        pytest.skip("needs Linux and two cores")
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # Ray's sockets are there, and their paths must be short
    # Despite its name, the second one makes Ray listen on 127.0.0.1 alone.
    usual = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_TMPDIR": folder}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # else that of the user's home counts
    environment = os.environ | s3 | usual | token | {"PYTHONPATH": str(ROOT)}
    port, client = find_free_port(), find_free_port()
    options = f"--head --block --node-ip-address 127.0.0.1 --port {port} --ray-client-server-port {client} --num-cpus 2"
    options += f" --include-dashboard false --object-store-memory 100000000 --temp-dir {folder}"
    start = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", *options.split()]
    head = subprocess.Popen(start, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert head.stdout is not None
        lines = iter(head.stdout.readline, "")
        assert any("Ray runtime started" in line for line in lines), "the cluster did not start"
        yield f"127.0.0.1:{port}", environment
    finally:
        children = list_children(head.pid)  # asked to end, it would wait for half a minute
        for pid in (head.pid, *children):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.services
@pytest.mark.slow
def test_a_cluster_writes_the_same_files(tiny_bundle, folder, tmp_path, cluster):
    """By its address from a disk with relative paths, and as this machine's own from S3 to S3."""
    address, environment = cluster
    plain = run(tiny_bundle, folder, tmp_path / "plain")
    archive = to_path("s3://archive")
    for file in folder.iterdir():
        write_atomically(archive / "in" / file.name, file.read_bytes())
    places = {address: ("in", "out"), "auto": (str(archive / "in"), str(archive / "out"))}
    for asked, (inputs, output) in places.items():
        words = ["infer", inputs, "-o", output, "--ray", asked, "--threads", "1", "--bundle", str(tiny_bundle)]
        code = "import sys; from bsdiff_rt.cli import main; sys.argv[0] = 'bsdiff-rt'; main()"
        command = [sys.executable, "-c", code, *words, "--runner", "eager"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 3, done.stderr
        assert f"wrote {COUNT} images, refused 0, failed 1" in done.stdout
        result = tmp_path / "out" if output == "out" else archive / "out"
        report = json.loads((result / "report.json").read_text())
        assert report["settings"] == plain.settings
        assert report["environment"]["workers"] == 2
        assert [entry["sha256"] for entry in report["files"]] == [entry.sha256 for entry in plain.files]
        for entry in plain.files:
            if entry.output:
                assert file_sha256(result / entry.output) == entry.sha256


@pytest.mark.services
@pytest.mark.parametrize("host", ["127.0.0.1", "ray://127.0.0.1", "[::1]", "no-such-host.invalid"])
def test_an_address_where_nobody_listens_is_refused_at_once(host):
    pytest.importorskip("ray")
    started = time.monotonic()
    with pytest.raises(SettingsError, match="no Ray cluster answers"):
        ray_workers._start(f"{host}:{find_free_port()}")
    assert time.monotonic() - started < 30


@pytest.mark.services
def test_a_machine_without_a_cluster(monkeypatch, tmp_path):
    pytest.importorskip("ray")

    def fail(**_):
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr("ray.init", fail)
    with pytest.raises(SettingsError, match=r"belongs to no Ray cluster\. Name HOST:PORT"):
        ray_workers._start("auto")


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
