"""Engines: published whole and only if they agree, used only where every field of their identity fits.

Most of it runs on a stand-in for a runner with engines, which "builds" by copying weights and runs them eagerly; the
last part builds, checks and runs a real one through the command line.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import fates, pixels, png, randomise, report_of, tree
from safetensors.torch import save_file

from bsdiff_rt import bundle as bundles
from bsdiff_rt import engine, identity
from bsdiff_rt.bundle import Bundle, open_bundle
from bsdiff_rt.config import PRESETS, EngineOptions, Preprocessing, SamplerSettings, Schedule
from bsdiff_rt.engine import (
    REJECTED,
    build_engine,
    cache_folder,
    choose,
    engines_in_cache,
    find_engine,
    load,
    load_first,
)
from bsdiff_rt.errors import EngineError, SettingsError
from bsdiff_rt.files import file_sha256
from bsdiff_rt.identity import MANIFEST, Backend, EngineManifest, open_engine, read_engine
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.runners import load_networks
from bsdiff_rt.runners.eager import EagerRunner

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SIZE = 16
FP32 = EngineOptions("aoti", "fp32", (1, 4))
WEIGHTS = ("denoiser.pt2", "enhancer.pt2")
VERSIONS = {"torch": "2.13.0", "cuda": "none"}


def write_bundle(folder: Path, seed: int = 1) -> Bundle:
    """A bundle of tiny networks at 16 px, without graphs."""
    preset = PRESETS["tiny"]
    folder.mkdir()
    for name, network in (("denoiser", Denoiser(preset.denoiser)), ("enhancer", Enhancer(preset.enhancer))):
        randomise(network, seed)
        save_file(network.state_dict(), folder / f"{name}.safetensors")
        (folder / f"{name}.onnx").write_bytes(b"")
    manifest = dataclasses.replace(
        open_bundle("demo").manifest,
        name="small net",
        denoiser=preset.denoiser,
        enhancer=preset.enhancer,
        schedule=Schedule(objective="x0"),
        sampler=SamplerSettings("ddim", 2),
        preprocessing=Preprocessing(SIZE),
        files={name: file_sha256(folder / name) for name in bundles.FILES},
    )
    (folder / bundles.MANIFEST).write_text(manifest.to_json())
    return open_bundle(folder)


@pytest.fixture
def small(tmp_path) -> Bundle:
    return write_bundle(tmp_path / "small")


class StandIn:
    """What runners/aoti.py offers, in milliseconds; a test may change each part."""

    def __init__(self) -> None:
        self.during: Callable[[Path], None] = lambda folder: None
        self.distort: Callable[[torch.Tensor], None] = lambda out: None
        self.versions = VERSIONS
        self.loaded: list[Path] = []
        self.closed = 0
        self.bundle: Bundle | None = None

    def build(self, bundle, options, device, folder, progress) -> dict[str, Any]:
        self.bundle = bundle
        progress("standing in", 0.5)
        for name in WEIGHTS:
            shutil.copy(bundle.file(name.replace("pt2", "safetensors")), folder / name)
            self.during(folder)
        return {"option": 1}

    def load(self, folder, *, device, precision, batch_range, image_size) -> EagerRunner:
        stand_in = self
        self.loaded.append(folder)

        class Runner(EagerRunner):
            name = "aoti"

            def denoise(self, x_t, cxr, t, out):
                super().denoise(x_t, cxr, t, out)
                stand_in.distort(out)

            def close(self):
                stand_in.closed += 1

        assert self.bundle is not None
        runner = Runner(*load_networks(self.bundle), image_size, device)
        runner.precision, runner.batch_range = precision, batch_range
        return runner


@pytest.fixture
def stand_in(monkeypatch) -> StandIn:
    made = StandIn()
    for module in (identity, engine):
        monkeypatch.setattr(module, "backend", lambda _: Backend(made.build, made.load, lambda: made.versions))
    return made


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Where engines are kept, not made yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache home"))
    return cache_folder()


def build(bundle: Bundle, output: Path | None = None, options: EngineOptions = FP32) -> Path:
    return build_engine(bundle, options, CPU, output, lambda *_: None)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def change(folder: Path, **fields: Any) -> None:
    """Rewrite fields of an engine's manifest."""
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


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
    monkeypatch.setattr(identity, "_processor", lambda: ("AMD/EPYC (R) 9B14 ..", "01234567"))
    expected = f"small_net-{small.sha256[:8]}-aoti-fp32-b1-4-AMD_EPYC_R_9B14"
    assert engine.folder_name(small, FP32, CPU) == engine.folder_name(small, FP32, CPU) == expected
    static = EngineOptions("tensorrt", "fp16", (4, 4))
    assert engine.folder_name(small, static, CPU) == f"small_net-{small.sha256[:8]}-tensorrt-fp16-b4-AMD_EPYC_R_9B14"


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
        with pytest.raises(SettingsError, match=f"{name}: not empty and not an engine; choose another folder"):
            build(small, tmp_path / name)
    with pytest.raises(SettingsError, match=r"engine: cannot be written \(.+\); choose another --output"):
        build(small, tmp_path / "file" / "engine")
    assert (tmp_path / "file").read_bytes() == (tmp_path / "folder" / "mine").read_bytes() == b"mine"
    assert stand_in.bundle is None  # nothing was built first


def test_output_that_cannot_be_renamed_is_said_before_the_build(small, stand_in, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(SettingsError, match=r"^\.: the folder this runs in cannot be replaced; choose another"):
        build(small, Path())
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "disk")
    with pytest.raises(SettingsError, match="disk: a mounted disk cannot be replaced; choose a folder on it"):
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
    with pytest.raises(SettingsError, match=r"fp32.*: cannot be written \(Permission denied\); choose"):
        build(small)
    assert engines_in_cache() == []


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
    with pytest.raises(type(failure)):
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
    with pytest.raises(EngineError, match="the aoti engine in fp32 does not agree with eager: denoiser, t = 0"):
        build(small)
    name = engine.folder_name(small, FP32, CPU) + REJECTED
    assert tree(cache) == {name}
    report = json.loads((cache / name).read_text())
    first = report["parity"]["checks"][0]
    assert (first["what"], first["passed"]) == ("denoiser, t = 0, batch 1", False)
    assert first["value"] == (None if value is None else pytest.approx(value, rel=0.01))
    assert (report["bundle"]["sha256"], report["precision"]) == (small.sha256, "fp32")
    assert engines_in_cache() == []

    stand_in.distort = lambda out: None
    folder = build(small)
    assert tree(cache) == {f"{folder.name}/{file}" for file in (*WEIGHTS, MANIFEST)}  # the report is no longer true


def test_a_runner_that_cannot_be_used_is_not_built(small, stand_in, cache):
    with pytest.raises(EngineError, match="--runner tensorrt cannot be used on cpu: it runs on NVIDIA GPUs"):
        build(small, options=EngineOptions("tensorrt", "fp16", (1, 1)))
    assert not cache.exists()


# --- opening ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built_once(tmp_path_factory) -> Path:
    """An engine of what `write_bundle` writes, to be copied."""
    bundle = write_bundle(tmp_path_factory.mktemp("bundle") / "small")
    stand_in = StandIn()
    with pytest.MonkeyPatch.context() as patch:
        for module in (identity, engine):
            patch.setattr(module, "backend", lambda _: Backend(stand_in.build, stand_in.load, lambda: VERSIONS))
        return build(bundle, tmp_path_factory.mktemp("engine") / "engine")


@pytest.fixture
def built(built_once, small, stand_in, cache) -> Path:
    """An engine of the small bundle, in the cache."""
    stand_in.bundle = small
    return Path(shutil.copytree(built_once, cache / "engine"))


def test_opened(built, small, stand_in):
    opened = open_engine(built, small, CPU)
    assert opened.folder == built
    assert opened.sha256 == file_sha256(built / MANIFEST)
    assert stand_in.loaded == []
    runner = opened.load(CPU)
    assert (runner.precision, runner.batch_range, runner.image_size) == ("fp32", (1, 4), SIZE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bundle": {"name": "demo", "sha256": "0" * 64}}, "bundle name: built for demo, this is small net"),
        ({"bundle": {"name": "small net", "sha256": "0" * 64}}, f"bundle sha256: built for {'0' * 64}, this is "),
        ({"image_size": 256}, "image_size: built for 256, this is 16"),
        ({"platform": "Windows AMD64"}, "platform: built for Windows AMD64, this is "),
        ({"device": "NVIDIA H100"}, "device: built for NVIDIA H100, this is "),
        ({"compute_capability": "9.0"}, "compute_capability: built for 9.0, this is "),
        ({"multiprocessors": 132}, "multiprocessors: built for 132, this is 0"),
        ({"driver": "CUDA 12.8"}, "driver: built for CUDA 12.8, this is none"),
        ({"versions": {"torch": "2.12.0", "cuda": "none"}}, "version of torch: built for 2.12.0, this is 2.13.0"),
        ({"versions": {"torch": "2.13.0", "cuda": "13.0"}}, "version of cuda: built for 13.0, this is none"),
        ({"versions": {"torch": "2.13.0"}}, "version of cuda: built for None, this is none"),
        ({"runner": "tensorrt"}, "runner tensorrt: it runs on NVIDIA GPUs, not on cpu"),
    ],
    ids=str,
)
def test_every_field_is_checked_and_the_one_that_differs_is_named(built, small, stand_in, fields, message):
    change(built, **fields)
    with pytest.raises(EngineError, match=message) as caught:
        open_engine(built, small, CPU)
    assert str(built) in str(caught.value)
    assert caught.value.exit_code == 4
    assert stand_in.loaded == []


def test_another_bundle(built, stand_in, tmp_path):
    other = write_bundle(tmp_path / "other", seed=2)
    with pytest.raises(EngineError, match=f"bundle sha256: built for .*, this is {other.sha256}"):
        open_engine(built, other, CPU)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "engine.json is not JSON"),
        ("[]", "engine.json should be an object"),
        ("{}", "engine.json: format: built as None, this version reads 1"),
        ('{"format": 2}', "engine.json: format: built as 2, this version reads 1"),
        ('{"format": 1}', "engine.json: field '.*' is missing"),
    ],
)
def test_a_manifest_that_is_none(built, small, text, message):
    (built / MANIFEST).write_text(text)
    with pytest.raises(EngineError, match=message):
        open_engine(built, small, CPU)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"extra": 1}, "unknown field 'extra'"),
        ({"batch_max": "4"}, "batch_max should be of type int, is '4'"),
        ({"runner": "eager"}, "runner should be one of aoti, tensorrt, is 'eager'"),
        ({"parity": {}}, "parity: field '.*' is missing"),
    ],
    ids=str,
)
def test_a_manifest_is_read_strictly(built, small, fields, message):
    change(built, **fields)
    with pytest.raises(EngineError, match=message):
        open_engine(built, small, CPU)


def test_a_manifest_that_is_no_text(built, small):
    (built / MANIFEST).write_bytes(b"\xff\xfe")
    with pytest.raises(EngineError, match="can't decode"):
        open_engine(built, small, CPU)


def test_no_engine(small, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(EngineError, match=r"no engine.json in it; `bsdiff-rt build-engine` makes an engine"):
            open_engine(folder, small, CPU)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_file_is_named_and_never_loaded(built, small, stand_in, name, damage):
    path = built / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "flipped" else path.read_bytes()[:-1])
    expected = "missing; build the engine" if damage == "missing" else "SHA-256: built as .*, this is .*; the file"
    with pytest.raises(EngineError, match=f"{name}: {expected}"):
        load(small, "auto", CPU, engine=built)
    assert stand_in.loaded == []


def test_a_file_without_a_hash_is_never_loaded(built, small, stand_in):
    change(built, files={WEIGHTS[0]: file_sha256(built / WEIGHTS[0])})
    with pytest.raises(EngineError, match=f"{WEIGHTS[1]}: not in engine.json; remove it, or build the engine again"):
        load(small, "auto", CPU, engine=built)
    assert stand_in.loaded == []


def test_files_outside_the_folder_are_not_read(built, small):
    manifest = read_engine(built).manifest
    change(built, files=manifest.files | {"../secret": "0" * 64})
    with pytest.raises(EngineError, match=r"files names '\.\./secret', which is not a plain file name"):
        open_engine(built, small, CPU)


@pytest.mark.parametrize("bits", [0o020, 0o002])
@pytest.mark.parametrize("part", ["", *WEIGHTS, MANIFEST])
def test_what_others_may_write_is_refused(built, small, part, bits):
    path = built / part
    path.chmod(mode(path) | bits)
    with pytest.raises(EngineError, match=rf"others may write to it \(mode {mode(path):o}\).*chmod -R go-w"):
        open_engine(built, small, CPU)


def test_what_belongs_to_another_user_is_refused(built, small, monkeypatch):
    owner = built.stat().st_uid
    real = Path.stat

    def foreign(self: Path, **options: Any) -> Any:
        found = real(self, **options)
        return SimpleNamespace(st_uid=owner + 1, st_mode=found.st_mode, st_size=0) if self.name == WEIGHTS[0] else found

    monkeypatch.setattr(Path, "stat", foreign)
    with pytest.raises(EngineError, match=f"{WEIGHTS[0]}: belongs to another user"):
        open_engine(built, small, CPU)


def test_a_system_without_such_bits(built, small, monkeypatch):
    built.chmod(0o777)
    monkeypatch.delattr(os, "getuid")  # Windows
    assert open_engine(built, small, CPU)


# --- machines ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch) -> SimpleNamespace:
    """A machine with one GPU, as far as torch says; its fields may be changed."""
    found = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)

    def driver(name: str) -> SimpleNamespace:
        assert name in ("libcuda.so.1", "nvcuda.dll")
        return SimpleNamespace(cuDriverGetVersion=lambda pointer: setattr(pointer._obj, "value", 13010))

    monkeypatch.setattr(identity.ctypes, "CDLL", driver)
    return found


def test_identity_of_a_gpu(gpu):
    found = identity.identify(GPU)
    assert (found["device"], found["compute_capability"], found["multiprocessors"]) == ("NVIDIA H100", "9.0", 132)
    assert found["driver"] == "CUDA 13.1"


def test_an_engine_for_another_gpu(built, small, gpu):
    change(built, **identity.identify(GPU))
    assert open_engine(built, small, GPU)
    gpu.multi_processor_count = 114  # a slice, or the PCIe card
    with pytest.raises(EngineError, match="multiprocessors: built for 132, this is 114; build the engine again here"):
        open_engine(built, small, GPU)
    with pytest.raises(EngineError, match="device: built for NVIDIA H100, this is "):
        open_engine(built, small, CPU)


CPUINFO = "processor\t: 0\nmodel name\t: AMD EPYC 9B14\nflags\t\t: fpu avx2 {}\n\nprocessor\t: 1\nmodel name\t: 2\n"


def test_identity_of_a_processor(monkeypatch):
    text = CPUINFO.format("avx512f")
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    first = identity.identify(CPU)
    assert first["device"] == "AMD EPYC 9B14"
    assert first["compute_capability"].startswith(torch.backends.cpu.get_cpu_capability())
    text = CPUINFO.format("avx512f amx_tile")  # a processor of the same name, elsewhere
    second = identity.identify(CPU)
    assert second["device"] == first["device"]
    assert second["compute_capability"] != first["compute_capability"]


def test_a_processor_that_does_not_say(monkeypatch):
    def missing(self: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    found = identity.identify(CPU)
    assert found["device"]
    assert found["compute_capability"].endswith(" unknown")


# --- finding and choosing ---------------------------------------------------------------------------------------------


def aged(folder: Path, seconds: int) -> Path:
    os.utime(folder / MANIFEST, (seconds, seconds))
    return folder


@pytest.fixture
def three(built, cache) -> list[Path]:
    """Engines of one bundle: fp32, then bf16 (the newest), then an old fp32 one of another batch."""
    others = [Path(shutil.copytree(built, cache / name)) for name in ("lower", "static")]
    change(others[0], precision="bf16")
    change(others[1], batch_min=2, batch_max=2)
    return [aged(folder, age) for folder, age in zip((built, *others), (2000, 3000, 1000), strict=True)]


def test_the_newest_that_fits_is_found(three, small):
    assert engines_in_cache() == [three[1], three[0], three[2]]
    assert find_engine(small, CPU, "auto", "aoti").folder == three[1]
    assert find_engine(small, CPU, "fp32", "aoti").folder == three[0]
    change(three[0], device="another")
    aged(three[0], 2000)
    assert find_engine(small, CPU, "fp32", "aoti").folder == three[2]


@pytest.fixture(autouse=True)
def computes_bf16(monkeypatch):
    """Whatever processor the tests run on."""
    monkeypatch.setattr(engine, "computes_bf16", lambda _: True)


def test_an_engine_in_what_the_device_emulates_is_taken_only_when_named(three, small, monkeypatch):
    monkeypatch.setattr(engine, "computes_bf16", lambda _: False)
    chosen = choose(small, "auto", CPU)
    assert chosen.runner != "aoti"
    assert "not aoti: its newest engine is in bf16, which cpu emulates; --runner aoti takes it" in chosen.why
    for runner, precision in (("aoti", "auto"), ("auto", "bf16")):
        assert choose(small, runner, CPU, precision).engine.folder == three[1]
    monkeypatch.setattr(engine, "computes_bf16", lambda _: True)
    assert choose(small, "auto", CPU).engine.folder == three[1]


def test_a_damaged_engine_is_passed_over(three, small):
    (three[1] / WEIGHTS[0]).write_bytes(b"")
    assert find_engine(small, CPU, "auto", "aoti").folder == three[0]


def test_an_engine_removed_while_it_is_looked_at_is_no_engine(three, monkeypatch):
    real = Path.stat

    def stat(path, **options):
        if path.parent == three[0] and path.name == MANIFEST:
            raise FileNotFoundError(2, "No such file or directory")
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    assert engines_in_cache() == [three[1], three[2]]


def test_auto_takes_an_engine_of_the_batch_asked_for_or_says_why_not(three, small):
    for folder, most, age in zip(three, (4, 1, 2), (2000, 3000, 1000), strict=True):
        change(folder, batch_min=1, batch_max=most)
        aged(folder, age)
    assert choose(small, "auto", CPU, batch=1).engine.folder == three[1]
    assert choose(small, "auto", CPU, batch=3).engine.folder == three[0]
    choice = choose(small, "auto", CPU, batch=8)
    assert (choice.runner, choice.engine) == ("onnxruntime", None)
    assert f"{three[1].name} takes at most 1 at once, not 8" in choice.why
    with pytest.raises(EngineError, match=rf"build-engine {small.folder} --runner aoti --precision fp32 --batch 1:8$"):
        find_engine(small, CPU, "fp32", "aoti", 8)


def test_half_built_engines_are_not_looked_at(three, small, cache):
    shutil.copytree(three[0], cache / ".building-x" / "engine")
    shutil.copytree(three[0], cache / ".building-y")
    assert len(engines_in_cache()) == 3


def test_none_fits(three, small, tmp_path):
    with pytest.raises(EngineError) as caught:
        find_engine(small, CPU, "fp16", "aoti")
    assert str(caught.value) == (
        f"no engine built for this bundle and device in fp16 ({three[1].name} is in bf16, not fp16; {three[0].name} is "
        f"in fp32, not fp16; {three[2].name} is in fp32, not fp16): "
        f"bsdiff-rt build-engine {small.folder} --runner aoti --precision fp16"
    )
    other = write_bundle(tmp_path / "other", seed=2)
    with pytest.raises(EngineError, match=r"no engine built for this bundle and device: bsdiff-rt build-.*/other"):
        find_engine(other, CPU, "auto", "aoti")
    for folder in three:
        change(folder, versions={"torch": "2.12.0", "cuda": "none"})
    with pytest.raises(EngineError, match=r"and device \(.*torch: built for 2\.12\.0, this is 2\.13\.0.*\): bsdiff-rt"):
        find_engine(small, CPU, "auto", "aoti")


def test_without_a_cache(small, cache):
    assert engines_in_cache() == []
    with pytest.raises(EngineError, match="no engine built"):
        find_engine(small, CPU, "auto", "aoti")
    assert not cache.exists()  # looking makes nothing: a home may be read-only


def test_a_bundle_of_the_package_is_called_by_its_name(cache):
    with pytest.raises(EngineError, match=r"build-engine demo --runner aoti --device cuda:1$"):
        find_engine(open_bundle("demo"), torch.device("cuda", 1), "auto", "aoti")


def test_auto_takes_an_engine_that_was_built(three, small):
    choice = choose(small, "auto", CPU)
    assert (choice.runner, choice.precision, choice.engine.folder) == ("aoti", "bf16", three[1])
    assert choice.why == "not tensorrt: it runs on NVIDIA GPUs, not on cpu"
    assert choose(small, "auto", CPU, "fp32").engine.folder == three[0]


def test_auto_without_engines_says_how_to_build_one(small, cache):
    choice = choose(small, "auto", CPU)
    assert (choice.runner, choice.precision, choice.engine) == ("onnxruntime", "fp32", None)
    assert f"not aoti: no engine built for this bundle and device: bsdiff-rt build-engine {small.folder}" in choice.why


def test_auto_passes_over_an_engine_that_does_not_fit_and_says_why(built, small):
    change(built, driver="CUDA 12.8")
    choice = choose(small, "auto", CPU)
    assert choice.runner == "onnxruntime"
    assert "driver: built for CUDA 12.8, this is none" in choice.why


def test_a_precision_nobody_has(built, small):
    with pytest.raises(
        EngineError, match=r"--precision fp16: no runner has it here: not tensorrt: .*; not aoti: no en"
    ):
        choose(small, "auto", CPU, "fp16")


def test_by_name_without_an_engine(small, cache):
    with pytest.raises(
        EngineError, match="--runner aoti cannot be used on cpu: no engine built for this bundle and device: bsdiff-rt"
    ):
        choose(small, "aoti", CPU)


def test_by_name_with_an_engine(built, small):
    choice = choose(small, "aoti", CPU)
    assert (choice.engine.folder, choice.why) == (built, "asked for")
    assert choose(small, "eager", CPU).engine is None


def test_by_folder(built, small, tmp_path):
    elsewhere = built.rename(tmp_path / "elsewhere")
    for runner, precision in (("auto", "auto"), ("aoti", "auto"), ("auto", "fp32"), ("aoti", "fp32")):
        assert choose(small, runner, CPU, precision, elsewhere).engine.folder == elsewhere
    with pytest.raises(SettingsError, match=r"--runner eager: the engine .* is aoti; leave one of the two out"):
        choose(small, "eager", CPU, "auto", elsewhere)
    with pytest.raises(SettingsError, match=r"--precision bf16: the engine .* is fp32; leave one of the two out"):
        choose(small, "auto", CPU, "bf16", elsewhere)
    change(elsewhere, driver="CUDA 12.8")
    with pytest.raises(EngineError, match="driver"):
        choose(small, "auto", CPU, "auto", elsewhere)  # no other one is taken in its place


def test_loading_says_what_and_why(built, small, stand_in, caplog):
    with caplog.at_level(logging.INFO), load(small, "auto", CPU) as runner:
        assert runner.name == "aoti"
    assert f"runner aoti in fp32 on cpu, engine {built} (not tensorrt: it runs on NVIDIA GPUs" in caplog.text
    assert stand_in.loaded == [built]


def fail_to_load(monkeypatch, failures: dict[str, Exception]) -> None:
    """Runners that load as by default but for the ones named."""
    load_runner = engine.load_runner

    def loading(bundle, name, device, precision="fp32"):
        if name in failures:
            raise failures[name]
        return load_runner(bundle, name, device, precision)

    monkeypatch.setattr(engine, "load_runner", loading)


def test_auto_takes_the_next_where_the_first_does_not_load(built, small, stand_in, monkeypatch, caplog):
    def broken(*_, **__):
        raise EngineError("denoiser.pt2: no kernel image")

    monkeypatch.setattr(stand_in, "load", broken)
    monkeypatch.setattr(identity, "backend", lambda _: Backend(stand_in.build, broken, lambda: VERSIONS))
    fail_to_load(monkeypatch, {"onnxruntime": EngineError("not a graph")})
    choice, runner = load_first(small, "auto", CPU)
    assert (choice.runner, choice.engine, runner.name) == ("eager", None, "eager")
    assert choice.why == (
        "not tensorrt: it runs on NVIDIA GPUs, not on cpu; not aoti: it does not load (denoiser.pt2: no kernel image); "
        "not onnxruntime: it does not load (not a graph)"
    )
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        "runner aoti passed over: it does not load (denoiser.pt2: no kernel image)",
        "runner onnxruntime passed over: it does not load (not a graph)",
    ]
    fail_to_load(monkeypatch, {"eager": EngineError("nor this")})
    with pytest.raises(EngineError, match=r"no runner has it here: .*; not eager: it does not load \(nor this\)"):
        load(small, "auto", CPU)


def test_by_name_or_folder_nothing_else_is_taken(built, small, stand_in, monkeypatch):
    fail_to_load(monkeypatch, {"onnxruntime": EngineError("not a graph")})
    with pytest.raises(EngineError, match=r"^not a graph$"):
        load(small, "onnxruntime", CPU)

    def broken(*_, **__):
        raise EngineError("no kernel image")

    monkeypatch.setattr(identity, "backend", lambda _: Backend(stand_in.build, broken, lambda: VERSIONS))
    with pytest.raises(EngineError, match=r"^no kernel image$"):
        load(small, "auto", CPU, engine=built)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError()])
def test_without_the_memory_to_load(small, monkeypatch, error):
    fail_to_load(monkeypatch, {"eager": error})
    with pytest.raises(EngineError, match=r"cpu has not the memory to load runner eager \(.+\); free some, or"):
        load(small, "eager", CPU)
    fail_to_load(monkeypatch, {"eager": RuntimeError("a bug")})
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        load(small, "eager", CPU)


# --- the command ------------------------------------------------------------------------------------------------------


def test_command(cli, small, stand_in, cache):
    done = cli("build-engine", small.folder, "--batch", "2:3")
    assert done.code == 0, done.err
    (folder,) = engines_in_cache()
    first, second = done.out.splitlines()
    assert first == str(folder)
    line = r"aoti fp32, batch 2:3, built in 0 s\. Against eager fp32 on cpu: single calls within (\S+) of the"
    found = re.match(line, second)
    assert found
    assert float(found[1]) < 1e-5  # the batch of three goes to eager in parts, which sum in another order
    assert second.endswith("pictures after 2 steps of ddim 200.0 dB or more.")
    assert re.search(r"^\d+ s: standing in, 50% done$", done.err, re.MULTILINE)
    assert re.search(r"^\d+ s: comparing 2 steps of ddim with eager fp32$", done.err, re.MULTILINE)
    manifest = read_engine(folder).manifest
    assert (manifest.batch_min, manifest.batch_max, manifest.precision) == (2, 3, "fp32")


def test_the_batch_by_default(cli, small, stand_in, cache, monkeypatch):
    """A range costs a CPU speed, and gains it nothing; a GPU wants batches."""
    done = cli("build-engine", small.folder)
    assert "aoti fp32, batch 1, built in" in done.out
    asked = []

    def build(_, options, device, *__):
        asked.append((options.batch, options.precision, device.type))
        raise EngineError("seen")

    monkeypatch.setattr(engine, "build_engine", build)
    monkeypatch.setattr("bsdiff_rt.runners.resolve_device", lambda _: torch.device("cuda"))
    assert cli("build-engine", small.folder).code == 4
    assert asked == [((1, 8), "fp16", "cuda")]


def test_command_quiet_verbose_json(cli, small, stand_in, tmp_path):
    done = cli("build-engine", small.folder, "-q", "--json", "-o", tmp_path / "engine", "--precision", "bf16")
    assert done.err == ""
    found = json.loads(done.out)
    assert (found["engine"], found["parity"]["tolerance"]) == (str(tmp_path / "engine"), "bf16")
    assert found["build_seconds"] >= 0
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
    from bsdiff_rt.progress import BuildProgress

    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with BuildProgress(quiet=False) as phases:
        phases.show("compiling the denoiser", 0.25)
        phases.show("comparing", None)
        assert phases._live is not None
        (task,) = phases._live.tasks
        assert (task.description, task.percentage) == ("comparing", 25)
    assert "comparing" in capsys.readouterr().err


# --- a real engine, through the command line --------------------------------------------------------------------------


@pytest.fixture
def in_cache(tiny_engine, cache) -> Path:
    """The tiny engine, where `auto` finds it."""
    cache.mkdir(parents=True)
    return Path(shutil.copytree(tiny_engine, cache / "tiny"))


def picture(folder: Path) -> np.ndarray:
    return pixels(folder / "a.png").astype(float)


@pytest.mark.slow
def test_infer_with_an_engine_draws_eagers_picture(infer, tiny_engine, tmp_path, cache):
    png(tmp_path / "in" / "a.png")
    assert infer("--runner", "eager").code == 0
    expected = picture(tmp_path / "out")
    done = infer("--engine", tiny_engine, "--overwrite")
    assert done.code == 0, done.err
    settings = report_of(tmp_path / "out")["settings"]
    assert (settings["runner"], settings["precision"]) == ("aoti", "fp32")
    assert report_of(tmp_path / "out")["environment"]["engine"] == file_sha256(tiny_engine / MANIFEST)
    assert fates(tmp_path / "out") == {"a.png": "ok"}
    # fp32 within 1e-4 of each call: at most one grey level of 255 falls on the other side of its rounding.
    assert np.abs(picture(tmp_path / "out") - expected).max() <= 1
    assert expected.std() > 1  # of a picture, not of nothing


@pytest.mark.slow
def test_infer_auto_finds_the_engine_and_says_so(infer, in_cache, tmp_path):
    png(tmp_path / "in" / "a.png")
    done = infer()
    assert done.code == 0, done.err
    assert f"runner aoti in fp32 on cpu, engine {in_cache}" in done.err
    assert report_of(tmp_path / "out")["settings"]["runner"] == "aoti"


@pytest.mark.slow
def test_infer_refuses_an_engine_that_does_not_fit(infer, in_cache, tmp_path):
    png(tmp_path / "in" / "a.png")
    change(in_cache, device="NVIDIA H100")
    done = infer("--engine", in_cache)
    assert done.code == 4
    assert "device: built for NVIDIA H100, this is " in done.err
    assert infer("--runner", "aoti").code == 4
    assert not (tmp_path / "out").exists()
    assert infer().code == 0
    assert report_of(tmp_path / "out")["settings"]["runner"] == "onnxruntime"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--runner", "onnxruntime"], 2, "--runner onnxruntime: the engine .* is aoti"),
        (["--precision", "bf16"], 2, "--precision bf16: the engine .* is fp32"),
        (["--batch", "4"], 2, "--batch 4"),
    ],
)
def test_infer_refuses_what_contradicts_the_engine(infer, tiny_engine, tmp_path, arguments, code, message):
    png(tmp_path / "in" / "a.png")
    done = infer("--engine", tiny_engine, *arguments)
    assert done.code == code
    assert re.search(message, done.err)
    assert not list(tmp_path.glob("out/*.png"))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [EngineOptions("aoti", "fp32", (1, 4)), EngineOptions("aoti", "fp16", (1, 1))])
def test_an_engine_for_a_gpu_is_built_judged_and_recorded(small, tmp_path, options):
    """All of `build-engine` (the gate compares images whose step was recorded), and what `infer` does with it."""
    folder = build_engine(small, options, GPU, tmp_path / "engine", lambda *_: None)
    assert open_engine(folder, small, GPU).manifest.parity.failed == []
    with load(small, "aoti", GPU, options.precision, folder) as runner:
        assert (runner.name, runner.batch_range) == ("aoti", options.batch)
