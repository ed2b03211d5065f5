"""Engines for the GPUs of other machines: built without a GPU, compared with eager on their first use there.

A stand-in builds and runs them, on the processor, which passes for a GPU of compute capability 8.9.
"""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
from stand_in import CPU, WEIGHTS

from bsdiff_rt.engines import build as builder
from bsdiff_rt.engines import manifest as manifests
from bsdiff_rt.engines.build import REJECTED, build_engine, resolve_options
from bsdiff_rt.engines.manifest import MANIFEST, open_engine, read_engine
from bsdiff_rt.engines.select import RunnerRequest, load_first
from bsdiff_rt.errors import EngineError, SettingsError
from bsdiff_rt.info import describe_engines
from bsdiff_rt.runners import registry
from bsdiff_rt.runners.registry import RUNNERS


class Machine:
    """What the machine says of itself."""

    capability = "8.9"

    def identify(self, _=None):
        return {
            "platform": "Linux x86_64",
            "device": "Some GPU",
            "compute_capability": self.capability,
            "multiprocessors": 46,
            "driver": "CUDA 13.0",
        }


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    for module in (builder, manifests):
        monkeypatch.setattr(module, "identify", machine.identify)
    monkeypatch.setattr(registry, "describe_capability", lambda _: machine.capability)
    return machine


@pytest.fixture
def elsewhere(small, stand_in, cache, machine, monkeypatch):
    """An engine for 8.6 and 8.9 in the cache, as it comes from another machine."""
    monkeypatch.setitem(RUNNERS, "aoti", dataclasses.replace(RUNNERS["aoti"], capabilities=("8.6", "8.9", "12.0")))
    monkeypatch.setattr(builder, "TIMED_S", 0.0)
    stand_in.versions = {"aoti": "1.7", "torch": "without CUDA"}
    options = resolve_options(small, CPU, "aoti", "fp32", None, ("8.6", "8.9"))
    folder = build_engine(small, options, CPU, None, lambda *_: None)
    assert stand_in.loaded == []  # nothing here could run it
    stand_in.versions = {"aoti": "1.7", "torch": "2.13.0"}
    return folder


def test_it_is_marked_as_not_compared(elsewhere, small):
    manifest = read_engine(elsewhere).manifest
    assert (manifest.parity, manifest.speed) == (None, None)
    assert (manifest.device, manifest.compute_capability, manifest.driver) == ("any", "8.6, 8.9", "any")
    assert (manifest.batch_min, manifest.batch_max) == (1, 8)  # a GPU's default
    assert elsewhere.name.endswith("-fp32-b1-8-for_8.6_8.9")
    assert describe_engines()[elsewhere.name].startswith("usable: aoti fp32, batch 1 to 8, bundle small net ")
    assert "for compute capability 8.6, 8.9, not compared with eager yet" in describe_engines()[elsewhere.name]


def test_it_is_compared_on_its_first_use_and_then_is_this_machines(elsewhere, small, stand_in, machine):
    before = read_engine(elsewhere)
    chosen, runner = load_first(RunnerRequest(small, "aoti", CPU))
    with runner:
        assert chosen.engine is not None
        manifest = chosen.engine.manifest
        assert chosen.engine.sha256 == read_engine(elsewhere).sha256 != before.sha256
        assert manifest.parity is not None
        assert manifest.parity.failed == []
        assert manifest.speed is not None
        assert (manifest.device, manifest.compute_capability, manifest.multiprocessors) == ("Some GPU", "8.9", 46)
        assert manifest.versions == stand_in.versions
        assert (manifest.built, manifest.files) == (before.manifest.built, before.manifest.files)
    assert len(stand_in.loaded) == 2  # to be compared, and to be used
    load_first(RunnerRequest(small, "aoti", CPU))[1].close()
    assert len(stand_in.loaded) == 3
    machine.capability = "8.6"
    with pytest.raises(EngineError, match=r"compute_capability: built for 8\.9, this is 8\.6"):
        open_engine(elsewhere, small, CPU)


def test_it_stays_usable_whatever_the_umask(elsewhere, small, stand_in):
    before = os.umask(0o002)
    try:
        with load_first(RunnerRequest(small, str(elsewhere), CPU))[1]:
            pass
    finally:
        os.umask(before)
    assert open_engine(elsewhere, small, CPU).manifest.parity is not None


def test_one_that_does_not_agree_is_not_used(elsewhere, small, stand_in, caplog):
    stand_in.distort = lambda out: out.mul_(1.5)
    with pytest.raises(EngineError, match="does not agree with eager"):
        load_first(RunnerRequest(small, str(elsewhere), CPU))
    assert read_engine(elsewhere).manifest.parity is None
    report = json.loads(elsewhere.with_name(elsewhere.name + REJECTED).read_text())
    assert report["device"] == "Some GPU"
    assert load_first(RunnerRequest(small, "auto", CPU))[0].runner != "aoti"
    assert "Runner aoti does not load (the aoti engine in fp32 does not agree with eager" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capability": "12.0"}, r"compute_capability: built for 8\.6, 8\.9, this is 12\.0"),
        ({"capability": "9.0"}, r"it runs on compute capability 8\.6, 8\.9, 12\.0, and cpu has 9\.0"),
        ({"platform": "Windows AMD64"}, "platform: built for Windows AMD64, this is Linux x86_64"),
        ({"versions": {"aoti": "1.6"}}, r"version of aoti: built for 1\.6, this is 1\.7"),
    ],
    ids=str,
)
def test_a_machine_that_it_was_not_built_for(elsewhere, small, stand_in, machine, changes, message):
    machine.capability = changes.pop("capability", machine.capability)
    path = elsewhere / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(EngineError, match=message):
        open_engine(elsewhere, small, CPU)
    assert stand_in.loaded == []


def test_a_truncated_plan(elsewhere, small, stand_in):
    file = elsewhere / WEIGHTS[0]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(EngineError, match=rf"{WEIGHTS[0]}: SHA-256: .* altered or damaged"):
        load_first(RunnerRequest(small, "aoti", CPU))
    assert stand_in.loaded == []


def test_what_can_be_built_for(small):
    options = resolve_options(small, CPU, capabilities=("all",))
    assert (options.runner, options.precision, options.batch) == ("tensorrt-rtx", "fp16", (1, 8))
    assert options.capabilities == ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
    with pytest.raises(SettingsError, match=r"tensorrt-rtx does not build for compute capability 9\.0\. Use all, or"):
        resolve_options(small, CPU, capabilities=("9.0",))
    with pytest.raises(SettingsError, match=r"aoti builds for this machine alone\. Use runner tensorrt-rtx\."):
        resolve_options(small, CPU, "aoti", capabilities=("8.9",))


def test_the_command(cli, cache):
    said = cli("build-engine", "demo", "--for", "8.6,8.9", "--dry-run")
    assert said.code == 0
    assert "tensorrt-rtx fp16, batch 1:8, for compute capability 8.6, 8.9. Nothing was built." in said.out
    assert str(cache) in said.out
    assert not cache.exists()
    refused = cli("build-engine", "demo", "--for", "9.0")
    assert refused.code == 2
    assert "--for: tensorrt-rtx does not build for compute capability 9.0" in refused.err
    said = cli("build-engine", "demo", "--runner", "aoti", "--dry-run")
    assert "aoti fp32, batch 1. Nothing was built." in said.out


def test_a_dry_run_refuses_what_the_build_would(cli, monkeypatch, cache):
    said = cli("build-engine", "demo", "--precision", "fp16", "--dry-run")
    assert (said.code, said.out) == (4, "")
    assert "no engine of runner aoti can be built here: it computes in fp32 or bf16 on cpu, not in fp16" in said.err
    said = cli("build-engine", "demo", "--runner", "tensorrt", "--dry-run")
    assert said.code == 4
    assert "it runs on NVIDIA GPUs, not on cpu" in said.err
    monkeypatch.setattr(registry, "find_spec", lambda _: None)
    said = cli("build-engine", "demo", "--for", "8.9", "--dry-run")
    assert said.code == 4
    assert "no engine of runner tensorrt-rtx can be built here: the package" in said.err
    assert not cache.exists()


def test_graphs_for_other_tools_may_be_of_any_precision(cli, tiny_bundle, tmp_path, cache):
    """No engine of this precision can be built here, and none is wanted."""
    said = cli("build-engine", tiny_bundle, "--precision", "fp16", "--dry-run", "--save-onnx", tmp_path / "g", "--json")
    assert said.code == 0
    assert json.loads(said.out)["graphs"][0].endswith("denoiser.onnx")


def test_a_dry_run_as_json(cli, cache):
    planned = json.loads(
        cli("build-engine", "demo", "--runner", "aoti", "--precision", "bf16", "--dry-run", "--json").out
    )
    assert (planned["runner"], planned["precision"], planned["batch"]) == ("aoti", "bf16", [1, 1])
    assert planned["engine"].startswith(str(cache))
    assert planned["graphs"] == []
