"""The programs in examples/ run as their first lines say, and give what the package gives."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch

from bsdiff_rt.bundle import BUNDLES, open_bundle
from bsdiff_rt.runners.registry import load_runner
from bsdiff_rt.sampling.sampler import sample
from bsdiff_rt.sampling.schedule import sampler_table

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "phantom10000001_cxr.png"
TRUTH = ROOT / "benchmarks" / "examples_truth" / "phantom10000001_soft_tissue.png"


def load(name: str) -> ModuleType:
    """Return a program of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: Path) -> None:
    """Run a program of examples/ with these arguments."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    load(name).main()


def read(path: Path) -> np.ndarray:
    """Return a picture's pixels."""
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert pixels is not None, path
    return pixels


def to_grey_levels(pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return a picture at another matrix, in [0, 1]."""
    levels = pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
    return cv2.resize(levels, shape, interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize("objective", ["x0", "v", "eps"])
def test_own_runtime_computes_what_the_sampler_computes(objective, tiny_bundle, bundle_copy):
    """Three steps of `ddim`, for each thing a denoiser may predict."""
    content = json.loads((bundle_copy / "manifest.json").read_text())
    content["schedule"]["objective"] = objective
    content["enhance"] = False
    (bundle_copy / "manifest.json").write_text(json.dumps(content))
    manifest = open_bundle(tiny_bundle).manifest
    shape = (1, 1, manifest.preprocessing.size, manifest.preprocessing.size)
    cxr = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    noise = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    got = load("own_runtime").suppress(bundle_copy, cxr, noise, 3)

    table = sampler_table(replace(manifest.schedule, objective=objective), "ddim", 3)
    with load_runner(open_bundle(tiny_bundle), "onnxruntime", torch.device("cpu")) as runner:
        expected = sample(runner, torch.from_numpy(cxr), table, lambda _: torch.from_numpy(noise))
    np.testing.assert_allclose(got, expected.numpy(), atol=2e-4)


def test_own_runtime_writes_a_soft_tissue_image(monkeypatch, tmp_path):
    run(monkeypatch, "own_runtime", BUNDLES / "demo", EXAMPLE, tmp_path / "out.png")
    size = read(tmp_path / "out.png").shape
    soft_tissue, truth, cxr = (to_grey_levels(read(path), size) for path in (tmp_path / "out.png", TRUTH, EXAMPLE))
    assert np.mean((soft_tissue - truth) ** 2) < 0.15 * np.mean((cxr - truth) ** 2)  # most of the bone is gone


def test_suppress_array_writes_what_infer_writes(monkeypatch, cli, tmp_path):
    run(monkeypatch, "suppress_array", EXAMPLE, tmp_path / "array")
    assert cli("infer", EXAMPLE, "--output", tmp_path / "infer").code == 0
    soft_tissue, bone = (read(tmp_path / "array" / f"{name}.png") / 255 for name in ("soft_tissue", "bone"))
    np.testing.assert_allclose(soft_tissue, read(tmp_path / "infer" / EXAMPLE.name) / 65535, atol=0.6 / 255)
    difference = (read(EXAMPLE) / 65535 - soft_tissue).clip(0)
    np.testing.assert_allclose(bone, difference, atol=1.1 / 255)


def test_the_notebook_runs(monkeypatch):
    """Its code cells run one after the other in one namespace, as in Jupyter."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(ROOT / "examples")
    cells = json.loads((ROOT / "examples" / "bsdiff_rt.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
    namespace: dict[str, object] = {}
    for cell in code:
        exec("".join(cell["source"]), namespace)
    assert namespace["result"].uncertainty.max() > 0
    assert "BONE_SUPPRESSED" in namespace["derived"].ImageType
