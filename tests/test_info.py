"""`info`: what is there, and for what is not, why."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from bsdiff_rt import __version__, bundle, info
from bsdiff_rt.config import RUNNERS


def test_sections(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found = info.describe()
    assert list(found) == ["versions", "devices", "runners on cpu", "bundles", "engines"]
    assert found["versions"]["bsdiff-rt"] == __version__
    assert found["versions"]["torch"] == torch.__version__
    assert list(found["devices"]) == ["cpu"]
    assert set(found["runners on cpu"]) == set(RUNNERS)
    assert found["runners on cpu"]["eager"] == found["runners on cpu"]["onnxruntime"] == "usable"
    for name in ("aoti", "tensorrt"):
        assert found["runners on cpu"][name].startswith("not usable: ")
    json.dumps(found)


def test_a_runner_whose_package_is_missing(monkeypatch):
    monkeypatch.setattr("bsdiff_rt.runners.find_spec", lambda _: None)
    runners = next(content for title, content in info.describe().items() if title.startswith("runners"))
    assert runners["onnxruntime"] == "not usable: the package onnxruntime is not installed"


@pytest.fixture
def shipped(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "BUNDLES", tmp_path)
    return shutil.copytree(tiny_bundle, tmp_path / "small")


def test_bundles(shipped):
    (line,) = info.describe()["bundles"].values()
    sha256 = bundle.open_bundle(shipped).sha256
    assert line == f"64 px, x0, default ddim 3 steps, sha256 {sha256[:16]}, Not for diagnostic use."


def test_a_damaged_bundle_is_said_and_stops_nothing(shipped):
    (shipped / "denoiser.onnx").write_bytes(b"")
    found = info.describe()
    assert found["bundles"]["small"].startswith("refused: ")
    assert "denoiser.onnx" in found["bundles"]["small"]
    assert found["engines"]
