"""Rounding is measured: nothing for fp32, less for fp16 than for bf16, and by the figures of the gate."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from helpers import png

from benchmarks import precision
from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.networks.blocks import SelfAttention
from bsdiff_rt.runners.aoti_builder import attention_as_products


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["precision", *map(str, arguments)])
    try:
        precision.run()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_row_for_each_image_and_precision(tiny_bundle, tmp_path, monkeypatch, capsys):
    images = [png(tmp_path / f"{seed}.png", seed=seed) for seed in range(2)]
    arguments = ["--bundle", tiny_bundle, "--sampler", "ddpm", "--steps", 4, "--json", tmp_path / "p.json"]
    assert run(monkeypatch, *images, *arguments) == 0
    found = json.loads((tmp_path / "p.json").read_text())
    assert (found["bundle"]["name"], found["objective"], found["sampler"], found["steps"]) == ("tiny", "x0", "ddpm", 4)
    assert [(row["image"], row["precision"]) for row in found["rows"]] == [
        (0, "fp16"),
        (0, "bf16"),
        (1, "fp16"),
        (1, "bf16"),
    ]
    for fp16, bf16 in (found["rows"][:2], found["rows"][2:]):
        # Three bits less are a factor of 8, 18 dB; random weights: some more or less.
        assert 9 < fp16["psnr"] - bf16["psnr"] < 27
        assert 0 < fp16["taken"] < bf16["taken"]
        assert 0 < fp16["largest"] < bf16["largest"]
        assert fp16["seconds"] > 0 < fp16["seconds_fp32"]
    assert capsys.readouterr().out.count("PSNR") == 4


def test_what_is_rounded_is_what_an_engine_for_a_gpu_holds(tiny_bundle, monkeypatch):
    monkeypatch.setattr("bsdiff_rt.runners.aoti_builder.FUSED_WIDTH", 8)
    runners = precision.make_runners(open_bundle(tiny_bundle))
    assert list(runners) == ["fp32", "fp16", "bf16"]
    kinds = [runner._denoiser.down_blocks[0].downsampler.weight.dtype for runner in runners.values()]
    assert kinds == [torch.float32, torch.float16, torch.bfloat16]
    for name, runner in runners.items():
        assert runner._denoiser.conv_out.weight.dtype == torch.float32
        blocks = [block for block in runner._denoiser.modules() if isinstance(block, SelfAttention)]
        assert blocks
        assert all((block.attend is attention_as_products) == (name != "fp32") for block in blocks)


def test_figures_by_hand():
    cxr, expected = np.full((4, 4), 1.0), np.full((4, 4), 0.6)
    found = precision.compare(expected, expected + 0.02, cxr)
    assert found["psnr"] == pytest.approx(40.0)  # 0.01 of a range of 1
    assert found["taken"] == pytest.approx(0.05)  # 0.01 of 0.2
    assert found["largest"] == pytest.approx(0.01)
    assert precision.compare(expected, expected, cxr) == {"psnr": 200.0, "taken": 0.0, "largest": 0.0}
    assert precision.compare(cxr, cxr, cxr)["taken"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.png"], "nowhere.png: cannot be read"),
        ([__file__], "test_precision.py: "),
        (["--bundle", "nowhere"], "nowhere"),
        (["--steps", "0"], "steps"),
    ],
)
def test_what_cannot_be_used_is_said(tmp_path, monkeypatch, capsys, arguments, message):
    assert run(monkeypatch, png(tmp_path / "a.png"), *arguments) in (2, 3, 4)
    assert message in capsys.readouterr().err
