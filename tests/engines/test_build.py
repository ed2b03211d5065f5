"""Engines are published whole, and only if they agree with eager."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import mode, tree
from stand_in import CPU, FP32, GPU, SIZE, WEIGHTS, build

from bsdiff_rt.config import EngineOptions
from bsdiff_rt.engines import build as engine
from bsdiff_rt.engines import cache as engine_cache
from bsdiff_rt.engines.build import REJECTED, build_engine, resolve_options
from bsdiff_rt.engines.cache import list_engines, name_engine
from bsdiff_rt.engines.manifest import MANIFEST, EngineManifest, Speed, open_engine, read_engine
from bsdiff_rt.engines.parity import compare
from bsdiff_rt.engines.select import RunnerRequest, choose, load
from bsdiff_rt.errors import EngineError, SettingsError
from bsdiff_rt.files import file_sha256
from bsdiff_rt.runners import timing
from bsdiff_rt.runners.eager import EagerRunner, load_networks
from bsdiff_rt.runners.registry import RUNNERS

# --- building ---------------------------------------------------------------------------------------------------------


def test_built(small, stand_in, cache):
    phases = []
    folder = build_engine(small, FP32, CPU, None, lambda *phase: phases.append(phase))
    assert folder.parent == cache
    assert tree(cache) == {f"{folder.name}/{name}" for name in (*WEIGHTS, MANIFEST)}
    assert [mode(path) for path in (cache.parent, cache, folder)] == [0o700] * 3
    assert {mode(path) for path in folder.iterdir()} == {0o600}
    assert phases[0] == ("standing in", 0.5)
    assert phases[1][0] == "comparing single calls with eager fp32"
    assert stand_in.closed == 1

    manifest = read_engine(folder).manifest
    assert manifest.bundle == {"name": "small net", "sha256": small.sha256}
    assert (manifest.runner, manifest.precision, manifest.image_size) == ("aoti", "fp32", SIZE)
    assert (manifest.batch_min, manifest.batch_max) == (1, 4)
    assert manifest.files == {name: file_sha256(folder / name) for name in WEIGHTS}
    assert (manifest.versions, manifest.build_options) == (stand_in.versions, {"option": 1})
    assert (manifest.multiprocessors, manifest.driver) == (0, "none")
    assert manifest.parity.failed == []
    assert (manifest.parity.sampler, manifest.parity.steps) == ("ddim", 2)
    assert EngineManifest.from_json(manifest.to_json()) == manifest


def test_the_name_says_what_it_is_and_is_the_same_next_time(small, monkeypatch):
    monkeypatch.setattr(engine_cache, "identify", lambda _: {"device": "AMD/EPYC (R) 9B14 .."})
    expected = f"small_net-{small.sha256[:8]}-aoti-fp32-b1-4-AMD_EPYC_R_9B14"
    assert name_engine(small, FP32, CPU) == name_engine(small, FP32, CPU) == expected
    static = EngineOptions("tensorrt", "fp16", (4, 4))
    assert name_engine(small, static, CPU) == f"small_net-{small.sha256[:8]}-tensorrt-fp16-b4-AMD_EPYC_R_9B14"
    tuned = replace(FP32, max_autotune=True)
    assert name_engine(small, tuned, CPU) == f"small_net-{small.sha256[:8]}-aoti-fp32-b1-4-tuned-AMD_EPYC_R_9B14"


def test_built_again_it_replaces_the_old_one(small, stand_in, cache):
    first = build(small)
    (first / "left over").write_bytes(b"")
    stand_in.versions = {"torch": "2.14.0", "cuda": "none"}
    assert build(small) == first
    assert tree(cache) == {f"{first.name}/{name}" for name in (*WEIGHTS, MANIFEST)}
    assert read_engine(first).manifest.versions["torch"] == "2.14.0"


def test_output_is_the_engines_own_folder(small, stand_in, tmp_path):
    assert build(small, tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert tree(tmp_path / "a") == {f"b/{name}" for name in (*WEIGHTS, MANIFEST)}
    (tmp_path / "empty").mkdir()
    build(small, tmp_path / "empty")
    assert set(os.listdir(tmp_path / "empty")) == {*WEIGHTS, MANIFEST}


def test_output_that_is_something_else(small, stand_in, tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_bytes(b"mine")
    for name in ("file", "folder"):
        with pytest.raises(SettingsError, match=f"{name} is not empty and not an engine. Choose another folder"):
            build(small, tmp_path / name)
    with pytest.raises(SettingsError, match=r"engine cannot be written \(.+\)\. Choose another folder"):
        build(small, tmp_path / "file" / "engine")
    assert (tmp_path / "file").read_bytes() == (tmp_path / "folder" / "mine").read_bytes() == b"mine"
    assert stand_in.bundle is None  # nothing was built first


def test_output_that_cannot_be_renamed_is_said_before_the_build(small, stand_in, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(SettingsError, match=r"^\. is the current folder, which cannot be replaced"):
        build(small, Path())
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "disk")
    with pytest.raises(SettingsError, match="disk is a mounted disk, which cannot be replaced"):
        build(small, tmp_path / "disk")
    assert stand_in.bundle is None
    assert not os.listdir(tmp_path / "here")


def test_output_below_where_it_runs(small, stand_in, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert build(small, Path("engine")) == Path("engine")
    assert set(os.listdir("engine")) == {*WEIGHTS, MANIFEST}


def test_an_engine_that_cannot_be_published(small, stand_in, cache, monkeypatch):
    def refused(self: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(SettingsError, match=r"fp32.* cannot be written \(Permission denied\)\. Choose"):
        build(small)
    assert list_engines() == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("no"), EngineError("no"), SystemExit(1)])
@pytest.mark.parametrize("when", ["building", "comparing"])
@pytest.mark.parametrize("before", [False, True])
def test_a_build_that_ends_early_leaves_nothing(small, stand_in, cache, failure, when, before):
    old = {}
    if before:
        folder = build(small)
        old = {path: path.read_bytes() for path in folder.iterdir()}

    def end(_: object) -> None:
        raise failure

    setattr(stand_in, "during" if when == "building" else "distort", end)
    refused = type(failure) is RuntimeError and when == "comparing"
    with pytest.raises(EngineError if refused else type(failure)):
        build(small)
    assert {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == old
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def test_an_interruption_while_publishing_leaves_the_old_engine(small, stand_in, cache, monkeypatch):
    folder = build(small)
    old = {path: path.read_bytes() for path in folder.iterdir()}
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name == "engine":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(small)
    assert {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == old


@pytest.mark.parametrize(
    ("distort", "value"), [(lambda out: out.mul_(1.1), 0.1), (lambda out: out.fill_(float("nan")), None)]
)
def test_a_rejected_engine_leaves_only_its_report(small, stand_in, cache, distort, value):
    stand_in.distort = distort
    phases = []
    with pytest.raises(EngineError, match="the aoti engine in fp32 does not agree with eager: denoiser, t = 0"):
        build_engine(small, FP32, CPU, None, lambda phase, _: phases.append(phase))
    assert phases[-1].startswith("comparing")  # it is not timed
    name = name_engine(small, FP32, CPU) + REJECTED
    assert tree(cache) == {name}
    report = json.loads((cache / name).read_text())
    first = report["parity"]["checks"][0]
    assert (first["what"], first["passed"]) == ("denoiser, t = 0, batch 1", False)
    assert first["value"] == (None if value is None else pytest.approx(value, rel=0.01))
    assert (report["bundle"]["sha256"], report["precision"]) == (small.sha256, "fp32")
    assert "speed" not in report  # nobody wants to know
    assert list_engines() == []

    stand_in.distort = lambda out: None
    folder = build(small)
    assert tree(cache) == {f"{folder.name}/{file}" for file in (*WEIGHTS, MANIFEST)}  # the report is no longer true


@pytest.mark.parametrize(
    ("objective", "precision", "hint"),
    [
        (
            "eps",
            "bf16",
            " This model predicts eps, which needs more digits than bf16 has: use fp16 on a GPU, fp32 on a CPU.",
        ),
        ("eps", "fp32", ""),
        ("x0", "bf16", ""),
    ],
)
def test_a_rejected_engine_is_told_what_may_help(small, stand_in, cache, monkeypatch, objective, precision, hint):
    schedule = replace(small.manifest.schedule, objective=objective)
    bundle = replace(small, manifest=replace(small.manifest, schedule=schedule))
    stand_in.distort = lambda out: out.zero_()
    with pytest.raises(EngineError, match=r"It was not written; see .*rejected\.json\." + re.escape(hint)):
        build(bundle, options=EngineOptions("aoti", precision, (1, 1)))


def test_a_runner_that_cannot_be_used_is_not_built(small, stand_in, cache):
    with pytest.raises(EngineError, match=r"^runner tensorrt cannot be used on cpu: it runs on NVIDIA GPUs"):
        build(small, options=EngineOptions("tensorrt", "fp16", (1, 1)))
    assert not cache.exists()


@pytest.mark.parametrize(
    ("device", "tensorrt", "expected"),
    [
        (CPU, True, EngineOptions("aoti", "fp32", (1, 1))),
        (GPU, False, EngineOptions("aoti", "fp16", (1, 8))),
        (GPU, True, EngineOptions("tensorrt", "fp16", (1, 8))),
    ],
)
def test_default_options(small, monkeypatch, device, tensorrt, expected):
    package = "json" if tensorrt else "no_such_package"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))  # an H200, not an RTX card
    monkeypatch.setitem(RUNNERS, "tensorrt", replace(RUNNERS["tensorrt"], package=package))
    assert resolve_options(small, device) == expected
    assert resolve_options(small, device, "aoti", "bf16", (2, 3)) == EngineOptions("aoti", "bf16", (2, 3))


def test_a_runner_without_engines_cannot_be_built(small):
    with pytest.raises(SettingsError, match=r"^eager needs no engine\. Use one of tensorrt, .*, aoti\.$"):
        resolve_options(small, CPU, "eager")
    with pytest.raises(SettingsError, match=r"^'abacus' is not a runner"):
        resolve_options(small, CPU, "abacus")


def test_only_torch_can_try_more_kernels(small):
    assert resolve_options(small, CPU, "aoti", max_autotune=True).max_autotune
    with pytest.raises(SettingsError, match=r"^openvino has no choice of kernels .* or use runner aoti\.$"):
        resolve_options(small, CPU, "openvino", max_autotune=True)


# --- timing -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def takes(monkeypatch) -> dict[str, float]:
    """Seconds that the fastest call of each runner takes, by its name; every call is made all the same."""
    seconds = {"aoti": 0.2, "onnxruntime": 0.3, "eager": 0.5}
    calls = itertools.count()

    def fake(call, device):
        call()
        busy = 1.0 if next(calls) % 5 == 4 else 0.0  # the machine, now and then
        return seconds[call.func.__self__.name] + busy

    for module in (engine, timing):
        monkeypatch.setattr(module, "time_call", fake)
    return seconds


def instead(monkeypatch, name: str, fails: Exception | None = None) -> None:
    """Let a runner without engines load in this test; inside it is eager."""

    class Other(EagerRunner):
        def denoise(self, x_t, cxr, t, out):
            if fails:
                raise fails
            super().denoise(x_t, cxr, t, out)

    Other.name = name

    def load_bundle(bundle, device, precision):
        return Other(*load_networks(bundle), bundle.manifest.preprocessing.size, device)

    monkeypatch.setitem(sys.modules, "other_runner", SimpleNamespace(load_bundle=load_bundle))
    monkeypatch.setitem(RUNNERS, name, replace(RUNNERS[name], module="other_runner"))


def test_an_engine_is_timed_beside_what_auto_would_take_without_it(small, stand_in, cache, takes, monkeypatch):
    instead(monkeypatch, "onnxruntime")
    build(small)  # another one in the cache is not what it is timed beside
    speed = read_engine(build(small, options=EngineOptions("aoti", "fp32", (2, 4)))).manifest.speed
    assert speed == Speed(batch=2, step_ms=200.0, instead="onnxruntime", instead_ms=300.0, ratio=1.5)
    assert choose(RunnerRequest(small, "auto", CPU)).runner == "aoti"
    takes["aoti"] = 0.4
    build(small, options=EngineOptions("aoti", "fp32", (2, 4)))
    shutil.rmtree(cache / build(small).name)
    chosen = choose(RunnerRequest(small, "auto", CPU))
    assert chosen.runner == "onnxruntime"
    assert "took 400 ms a step, 0.75 times as fast as onnxruntime (300 ms) when it was built" in chosen.why


@pytest.mark.parametrize(("seconds", "rounds"), [(0.001, 25), (0.5, 10), (60.0, 3)])
def test_an_engine_is_timed_for_some_seconds(small, stand_in, cache, takes, monkeypatch, seconds, rounds):
    takes |= {"aoti": seconds, "eager": seconds}
    asked = []
    real = engine.time_in_turn

    def spy(calls, count, device, warm_up=1):
        asked.append((count, warm_up))
        return real(calls, count, device, warm_up)

    monkeypatch.setattr(engine, "time_in_turn", spy)
    build(small)
    assert asked == [(0, 1), (rounds, 0)]


def test_what_does_not_load_beside_it_is_left_out(small, stand_in, cache, takes, caplog):
    assert read_engine(build(small)).manifest.speed.instead == "eager"  # the small bundle has no graphs
    assert "Not timed beside onnxruntime: it does not load (" in caplog.text


def test_where_nothing_runs_beside_it(small, stand_in, cache, monkeypatch):
    monkeypatch.setattr(engine, "list_bundle_runners", lambda: ("onnxruntime",))
    monkeypatch.setitem(RUNNERS, "onnxruntime", replace(RUNNERS["onnxruntime"], cpu=()))
    with pytest.raises(EngineError, match="no runner without an engine runs here"):
        build(small)
    assert list(cache.iterdir()) == []


def test_what_does_not_run_beside_it_is_left_out(small, stand_in, cache, takes, monkeypatch, caplog):
    instead(monkeypatch, "onnxruntime", RuntimeError("no kernel image\nis available"))
    speed = read_engine(build(small)).manifest.speed
    assert (speed.instead, speed.ratio) == ("eager", 2.5)
    assert "Not timed beside onnxruntime: it does not run (RuntimeError: no kernel image is available)" in caplog.text


def test_an_engine_that_fails_while_it_is_timed_is_not_published(small, stand_in, cache, monkeypatch):
    def fail(_):
        raise RuntimeError("an illegal memory access")

    def compare_and_break(*arguments):
        found = compare(*arguments)
        stand_in.distort = fail
        return found

    monkeypatch.setattr(engine, "compare", compare_and_break)
    with pytest.raises(
        EngineError, match=r"was built and does not run \(RuntimeError: an illegal memory access\)\. It was not"
    ):
        build(small)
    assert list(cache.iterdir()) == []


# --- the command ------------------------------------------------------------------------------------------------------


def test_command(cli, small, stand_in, cache):
    done = cli("build-engine", small.folder, "--batch", "2:3")
    assert done.code == 0, done.err
    (folder,) = list_engines()
    first, second, third, fourth = done.out.splitlines()
    assert first == str(folder)
    assert second == "aoti fp32, batch 2:3, built in 0 s."
    found = re.match(r"Compared with eager fp32 on cpu: single calls differ by at most (\S+) of the", third)
    assert found
    assert float(found[1]) < 1e-5  # the batch of three goes to eager in parts, which sum in another order
    assert third.endswith("Images after 2 steps of ddim have 200.0 dB or more.")
    assert re.match(r"Speed at batch 2: \S+ ms a step, \S+ times as fast as eager \(\S+ ms\)\.$", fourth)
    assert re.search(r"standing in, 50% done \(.* so far\)$", done.err, re.MULTILINE)
    assert re.search(r"comparing 2 steps of ddim with eager fp32 \(.* so far\)$", done.err, re.MULTILINE)
    manifest = read_engine(folder).manifest
    assert (manifest.batch_min, manifest.batch_max, manifest.precision) == (2, 3, "fp32")


def test_command_says_that_an_engine_is_slower(cli, small, stand_in, cache, takes):
    slower = "This engine is slower than eager, so `--runner auto` prefers that. If the machine was busy, build it"
    done = cli("build-engine", small.folder)
    assert "Speed at batch 1: 200 ms a step, 2.50 times as fast as eager (500 ms)." in done.out
    assert slower not in done.err
    takes["aoti"] = 1.0
    done = cli("build-engine", small.folder)
    assert "Speed at batch 1: 1000 ms a step, 0.50 times as fast as eager (500 ms)." in done.out
    assert slower in done.err


def test_the_batch_by_default(cli, small, stand_in, cache, monkeypatch):
    """A range costs a CPU speed, and gains it nothing; a GPU wants batches."""
    done = cli("build-engine", small.folder)
    assert "aoti fp32, batch 1, built in" in done.out
    asked = []

    def build(_, options, device, *__):
        asked.append((options.batch, options.precision, device.type))
        raise EngineError("seen")

    monkeypatch.setattr(engine, "build_engine", build)
    monkeypatch.setattr("bsdiff_rt.runners.devices.resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))  # an H200, not an RTX card
    assert cli("build-engine", small.folder).code == 4
    monkeypatch.setattr(engine, "find_batch_limit", lambda runner, _: 7 if runner == "tensorrt" else None)
    assert cli("build-engine", small.folder, "--runner", "tensorrt").code == 4
    assert asked == [((1, 8), "fp16", "cuda"), ((1, 4), "fp16", "cuda")]


def test_a_batch_that_the_runner_may_refuse_is_tried_with_a_warning(small, stand_in, cache, monkeypatch, caplog):
    monkeypatch.setattr(engine, "find_batch_limit", lambda *_: 3)
    build(small, options=EngineOptions("aoti", "fp32", (1, 3)))
    assert "2^31" not in caplog.text
    build(small)
    assert (
        "A batch of 4 makes tensors of 2^31 elements or more, which aoti may refuse. Batches up to 3 are safe."
    ) in caplog.text


def test_command_quiet_verbose_json(cli, small, stand_in, tmp_path):
    done = cli("build-engine", small.folder, "-q", "--json", "-o", tmp_path / "engine", "--precision", "bf16")
    assert done.err == ""
    found = json.loads(done.out)
    assert (found["engine"], found["parity"]["tolerance"]) == (str(tmp_path / "engine"), "bf16")
    assert found["build_seconds"] >= 0
    assert (found["speed"]["batch"], found["speed"]["instead"]) == (1, "eager")
    manifest = read_engine(tmp_path / "engine").manifest
    assert (manifest.batch_min, manifest.batch_max) == (1, 1)
    done = cli("build-engine", small.folder, "-v", "-o", tmp_path / "engine", "--batch", "1:2")
    assert "denoiser, t = 999, batch 2: largest difference" in done.err


@pytest.mark.parametrize("batch", ["0", "0:2", "3:2", "x", "1:", ":2", "1:2:3", "-1", "1.5", "²"])
def test_command_refuses_a_batch(cli, batch):
    done = cli("build-engine", "--batch", batch)
    assert done.code == 2
    assert repr(batch) in done.err


def test_command_exit_codes(cli, small, stand_in, cache, tmp_path):
    assert cli("build-engine", tmp_path / "nowhere").code == 4
    assert cli("build-engine", small.folder, "--runner", "tensorrt", "--device", "cpu").code == 4
    assert cli("build-engine", small.folder, "--device", "abacus").code == 2
    stand_in.distort = lambda out: out.zero_()
    done = cli("build-engine", small.folder)
    assert done.code == 4
    assert "does not agree with eager: denoiser, t = 0, batch 1: largest difference" in done.err
    assert done.out == ""


def test_command_interrupted(cli, small, stand_in, cache):
    stand_in.during = lambda _: signal.raise_signal(signal.SIGINT)
    assert cli("build-engine", small.folder).code == 130
    assert tree(cache) == set()
    assert list(cache.iterdir()) == []


def test_a_terminal_sees_the_phase(monkeypatch, capsys):
    from bsdiff_rt.folder.progress import BuildProgress

    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with BuildProgress(quiet=False) as phases:
        phases.show("compiling the denoiser", 0.25)
        phases.show("comparing", None)
        assert phases._live is not None
        (task,) = phases._live.tasks
        assert (task.description, task.percentage) == ("comparing", 25)
    assert "comparing" in capsys.readouterr().err


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("options", [EngineOptions("aoti", "fp32", (1, 4)), EngineOptions("aoti", "fp16", (1, 1))])
def test_an_engine_for_a_gpu_is_built_judged_and_recorded(small, tmp_path, options):
    """All of `build-engine` (the gate compares images whose step was recorded), and what `infer` does with it."""
    folder = build_engine(small, options, GPU, tmp_path / "engine", lambda *_: None)
    assert open_engine(folder, small, GPU).manifest.parity.failed == []
    with load(small, str(folder), GPU, options.precision) as runner:
        assert (runner.name, runner.batch_range) == ("aoti", options.batch)
