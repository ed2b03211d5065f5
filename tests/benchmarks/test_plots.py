"""Pictures of recorded benchmarks: what is drawn, from which rows, and what is refused."""

import json
import sys

import cv2
import numpy as np
import pytest

from benchmarks import plots
from bsdiff_rt.bench.plot import OTHER_COLOUR, choose_ceilings, choose_style

ROW = {"name": "eager", "precision": "fp32", "batch": 1, "step_ms": 60.0, "step_ms_p95": 66.0}
ROW |= {"images_per_second": 1.5, "tflops": 25.0}
DOCUMENT = {
    "device": "a device",
    "conditions": {"started": "2026-11-23T02:03:04+0000"},
    "bundle": {"name": "a bundle"},
    "size_px": 256,
    "sampler": "ddpm",
    "steps": 10,
    "enhance": True,
    "work_per_image": {"denoiser": {"flop": 1.6e12, "weights": 2e8, "values": 1e9}},
    "work_parts": {
        "attention": {"flop": 1.1e12, "weights": 0, "values": 1e8},
        "rest": {"flop": 5e11, "weights": 2e8, "values": 9e8},
    },
    "matmul_tflops": {"fp32": 50.0, "bf16": 790.0, "fp16": 780.0},
    "copy_gb_s": 3000.0,
}
ROWS = [
    ROW,
    ROW | {"batch": 4, "step_ms": 200.0, "step_ms_p95": 201.0, "images_per_second": 1.9, "tflops": 32.0},
    ROW | {"name": "aoti fp16", "precision": "fp16", "step_ms": 10.0, "step_ms_p95": 10.0, "part": "steps"},
    ROW | {"name": "published eager", "part": "peers"},
]


@pytest.fixture
def recorded(tmp_path):
    path = tmp_path / "b.json"
    path.write_text(json.dumps(DOCUMENT | {"rows": ROWS}))
    return path


def draw(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["plots", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        plots.main()
    return end.value.code


def test_a_picture(recorded, tmp_path, monkeypatch):
    path = tmp_path / "b.png"
    assert draw(monkeypatch, recorded, "-o", path) == 0
    picture = cv2.imread(str(path))
    assert min(picture.shape[:2]) > 500
    black, orange, sky = ((0, 0, 0), (0x00, 0x5E, 0xD5), (0xE9, 0xB4, 0x56))  # BGR of eager, aoti, published
    for colour in (black, orange):
        assert np.count_nonzero((picture == colour).all(axis=2)) > 50
    assert np.count_nonzero((picture == sky).all(axis=2)) == 0  # a row of another part


def test_a_runner_has_the_same_colour_in_every_plot():
    names = ["eager", "published eager", "aoti fp16, batch 1", "tensorrt fp16", "tensorrt-rtx fp16", "onnxruntime"]
    colours = [choose_style({"name": name, "precision": "fp32"})["color"] for name in names]
    assert len(set(colours)) == len(names)
    assert choose_style({"name": "aoti bf16", "precision": "bf16"})["color"] == colours[2]
    engine = {"name": "engine mine", "runner": "aoti", "precision": "fp16"}
    assert choose_style(engine) == {"color": colours[2], "marker": "D"}
    assert choose_style({"name": "new", "precision": "fp32"})["color"] == OTHER_COLOUR


def test_a_cpu_has_no_line_for_fp16():
    names = [name for name, _ in choose_ceilings(DOCUMENT)]
    assert names == ["fp32", "fp16", "bf16"]
    on_cpu = DOCUMENT | {"conditions": {"device": "cpu"}}
    assert [name for name, _ in choose_ceilings(on_cpu)] == ["fp32", "bf16"]


def test_one_part_of_a_gpu_suite(recorded):
    assert [row["name"] for row in plots.read_document(recorded, "peers")["rows"]] == [
        "eager",
        "eager",
        "published eager",
    ]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"rows": [1]}', '{"rows": []}'])
def test_what_is_no_benchmark(content, tmp_path, monkeypatch, capsys):
    path = tmp_path / "b.json"
    path.write_text(content)
    assert draw(monkeypatch, path, "-o", tmp_path / "b.png") == 2
    assert f"{path}: not the JSON file of a benchmark" in capsys.readouterr().err


def test_a_missing_file_and_another_ending(recorded, tmp_path, monkeypatch, capsys):
    assert draw(monkeypatch, tmp_path / "none.json", "-o", tmp_path / "b.png") == 2
    assert "not the JSON file of a benchmark (FileNotFoundError)" in capsys.readouterr().err
    assert draw(monkeypatch, recorded, "-o", tmp_path / "b.jpg") == 2
    assert "name a .png, .pdf or .svg file" in capsys.readouterr().err
