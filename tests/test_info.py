"""`info`: what is there, and for what is not, why."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from bsdiff_rt import __version__, bundle, info
from bsdiff_rt.engines.cache import locate_cache
from bsdiff_rt.engines.manifest import FORMAT, MANIFEST, EngineManifest, Speed
from bsdiff_rt.engines.parity import PSNR, Check, Parity
from bsdiff_rt.runners.registry import RUNNERS


def test_sections(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found = info.describe()
    assert list(found) == ["versions", "devices", "runners on cpu", "bundles", "engines"]
    assert found["versions"]["bsdiff-rt"] == __version__
    assert found["versions"]["torch"] == version("torch")  # without the "+cu130" of torch's own text
    assert list(found["devices"]) == ["cpu"]
    assert set(found["runners on cpu"]) == set(RUNNERS)
    assert found["runners on cpu"]["eager"] == found["runners on cpu"]["onnxruntime"] == "usable"
    assert found["runners on cpu"]["aoti"] == "usable, with an engine built for it"
    assert found["runners on cpu"]["tensorrt"] == "not usable: it runs on NVIDIA GPUs, not on cpu"
    json.dumps(found)


def test_what_can_be_built_without_a_gpu_is_said(monkeypatch):
    monkeypatch.setattr("bsdiff_rt.runners.registry.find_spec", lambda _: object())
    assert info.describe_runners()["tensorrt-rtx"] == (
        "not usable: it runs on NVIDIA GPUs, not on cpu. "
        "It can build engines for compute capability 7.5, 8.0, 8.6, 8.9, 12.0, 12.1"
    )


def test_a_runner_whose_package_is_missing(monkeypatch):
    monkeypatch.setattr("bsdiff_rt.runners.registry.find_spec", lambda _: None)
    runners = next(content for title, content in info.describe().items() if title.startswith("runners"))
    assert runners["onnxruntime"].startswith("not usable: the package onnxruntime is not installed (pip install")


@pytest.fixture
def shipped(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "BUNDLES", tmp_path)
    return shutil.copytree(tiny_bundle, tmp_path / "small")


def test_bundles(shipped):
    (line,) = info.describe()["bundles"].values()
    sha256 = bundle.open_bundle(shipped).sha256
    assert line == (
        f"64 px, predicts x0, sampler ddim 3 steps, licence unstated, training data: none, sha256 {sha256[:16]}. "
        "Not for diagnostic use."
    )


def test_a_damaged_bundle_is_said_and_stops_nothing(shipped):
    (shipped / "denoiser.onnx").write_bytes(b"")
    found = info.describe()
    assert found["bundles"]["small"].startswith("refused: ")
    assert "denoiser.onnx" in found["bundles"]["small"]
    assert found["engines"]


IDENTITY = {"platform": "Linux x86_64", "device": "AMD EPYC", "compute_capability": "AVX2 01234567", "driver": "none"}


def engine(cache, name: str, age: int, **changes) -> Path:
    """An engine folder as far as its manifest and files go."""
    folder = cache / name
    folder.mkdir(parents=True, mode=0o700)
    (folder / "denoiser.pt2").write_bytes(b"code")
    check = Check("denoiser, t = 0, batch 1", PSNR, 91.0, 80.0, True)
    manifest = EngineManifest(
        format=FORMAT,
        bundle={"name": "mine", "sha256": "ab" * 32},
        runner="aoti",
        image_size=256,
        multiprocessors=0,
        versions={"torch": torch.__version__, "cuda": torch.version.cuda or "none"},
        precision="bf16",
        batch_min=1,
        batch_max=8,
        build_options={},
        build_seconds=1.0,
        built="2026-01-02T03:04:05Z",
        bsdiff_rt=__version__,
        parity=Parity("eager fp32 on cpu", "bf16", "ddim", 2, (check,)),
        speed=Speed(1, 92.04, "onnxruntime", 161.3, 1.752),
        files={"denoiser.pt2": bundle.file_sha256(folder / "denoiser.pt2")},
        **IDENTITY,
    )
    (folder / MANIFEST).write_text(dataclasses.replace(manifest, **changes).to_json())
    for path in folder.iterdir():
        path.chmod(0o600)
    os.utime(folder / MANIFEST, (age, age))
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("bsdiff_rt.engines.manifest.identify", lambda _: IDENTITY | {"multiprocessors": 0})
    return locate_cache()


def test_no_engines(cache):
    assert info.describe()["engines"] == {"cache": str(cache)}
    assert not cache.exists()


def test_engines_newest_first_and_why_one_cannot_be_used(cache):
    engine(cache, "good", 1000)
    engine(cache, "other processor", 2000, device="Intel Xeon")
    engine(cache, "other torch", 3000, versions={"torch": "1.0", "cuda": torch.version.cuda or "none"})
    (engine(cache, "damaged", 4000) / "denoiser.pt2").write_bytes(b"c0de")
    engine(cache, "open to others", 5000).chmod(0o777)
    engine(cache, "before a new model", 5500, bundle={"name": "demo", "sha256": "ab" * 32})
    (engine(cache, "no manifest", 6000) / MANIFEST).write_text("{}")
    os.utime(cache / "no manifest" / MANIFEST, (6000, 6000))
    found = info.describe()["engines"]
    assert list(found)[1:] == [
        "no manifest",
        "before a new model",
        "open to others",
        "damaged",
        "other torch",
        "other processor",
        "good",
    ]
    assert found["good"] == (
        f"usable: aoti bf16, batch 1 to 8, bundle mine {'ab' * 8}, on AMD EPYC, 91.0 dB against eager fp32 on cpu, "
        "92 ms a step, 1.75 times as fast as onnxruntime (161 ms), built 2026-01-02T03:04:05Z"
    )
    for name, reason in {
        "no manifest": "format: built as None, this version reads 2",
        "before a new model": f"built for an earlier bundle demo ({'ab' * 8})",
        "open to others": "others may write to it (mode 777)",
        "damaged": "denoiser.pt2: SHA-256: built as ",
        "other torch": f"version of torch: built for 1.0, this is {torch.__version__}",
        "other processor": "device: built for Intel Xeon, this is AMD EPYC",
    }.items():
        assert found[name].startswith("not usable: ")
        assert reason in found[name]


def test_an_engine_for_a_gpu_is_compared_with_the_gpu(cache, monkeypatch):
    engine(cache, "gpu", 1000, multiprocessors=132)
    seen = []
    monkeypatch.setattr(
        "bsdiff_rt.engines.manifest.identify", lambda device: seen.append(device) or {"device": "NVIDIA H100"}
    )
    monkeypatch.setattr(info, "resolve_device", lambda _: torch.device("cuda", 0))
    assert "device: built for AMD EPYC, this is NVIDIA H100" in info.describe_engines()["gpu"]
    assert seen == [torch.device("cuda", 0)]
