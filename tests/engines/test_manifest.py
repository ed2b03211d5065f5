"""Engines are used only where every field of their identity fits."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import mode
from stand_in import CPU, GPU, SIZE, WEIGHTS, change, write_bundle

from bsdiff_rt.engines import manifest as identity
from bsdiff_rt.engines.manifest import MANIFEST, open_engine, read_engine
from bsdiff_rt.engines.select import load
from bsdiff_rt.errors import EngineError
from bsdiff_rt.files import file_sha256


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


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS[0]])
def test_what_cannot_be_read_is_named(built, small, stand_in, unreadable, name):
    unreadable(built / name)
    with pytest.raises(EngineError, match=rf"{name}: cannot be read \(Permission denied\)"):
        open_engine(built, small, CPU)
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
        ("{}", "engine.json: format: built as None, this version reads 2"),
        ('{"format": 1}', "engine.json: format: built as 1, this version reads 2"),
        ('{"format": 2}', "engine.json: field '.*' is missing"),
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
        ({"batch_max": "4"}, "batch_max should be a valid integer, is '4'"),
        ({"runner": "eager"}, "runner should be one of tensorrt, tensorrt-rtx, openvino, aoti, is 'eager'"),
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
        with pytest.raises(EngineError, match=r"not an engine \(no engine.json in it\)\. Build one with"):
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
    expected = "missing. Build the engine" if damage == "missing" else "SHA-256: built as .*, this is .*. The file"
    with pytest.raises(EngineError, match=f"{name}: {expected}"):
        load(small, str(built), CPU)
    assert stand_in.loaded == []


def test_a_file_without_a_hash_is_never_loaded(built, small, stand_in):
    change(built, files={WEIGHTS[0]: file_sha256(built / WEIGHTS[0])})
    with pytest.raises(EngineError, match=f"{WEIGHTS[1]}: not in engine.json. Remove it, or build the engine again"):
        load(small, str(built), CPU)
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
    with pytest.raises(EngineError, match=r"multiprocessors: built for 132, this is 114\. Build the engine again here"):
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
