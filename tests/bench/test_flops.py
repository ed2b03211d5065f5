"""Arithmetic counted against the published figure, and rates that are rates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bsdiff_rt.bench import flops
from bsdiff_rt.bench.flops import (
    Work,
    compute_floor_ms,
    count_denoiser_parts,
    count_denoiser_work,
    count_enhancer_work,
    measure_copy_rate,
    measure_matmul_rates,
)
from bsdiff_rt.config import PRESETS

CPU = torch.device("cpu")


def test_the_papers_step_is_the_published_figure():
    """1,657.6 GFLOP per step at 256 px, multiplications and additions apart, are counted for the published network:
    with its second output channel, and with the attentions' output projections, which it holds and never applies.
    """
    config = PRESETS["paper"].denoiser
    work = count_denoiser_work(config, 256)
    second_channel = 2 * 256**2 * 9 * config.channels[0]
    projections = 0
    for level, (channels, blocks, attention) in enumerate(
        zip(config.channels, config.res_blocks, config.attention, strict=True)
    ):
        lowest = level == len(config.channels) - 1
        count = (blocks + blocks + 1) * attention + lowest  # way down, way up, middle
        projections += count * 2 * (256 >> level) ** 2 * channels**2
    assert (work.flop + second_channel + projections) / 1e9 == pytest.approx(1657.6, abs=0.05)
    assert work.flop / 1e9 == pytest.approx(1643.83, abs=0.01)
    assert work.weights == 213_097_729  # the published 220,237,762 less those two


def test_a_count_by_hand():
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(8, 5)

        def forward(self, x):
            return self.linear(self.conv(x))

    with torch.device("meta"):
        work = flops._count_work(Tiny(), torch.empty(1, 2, 4, 8))
    assert work.flop == 2 * 4 * 8 * 9 * 2 * 3 + 2 * (3 * 4) * 8 * 5
    assert work.weights == 3 * 2 * 9 + 3 + 8 * 5 + 5
    assert work.values == (2 + 3) * 4 * 8 + 3 * 4 * 8 + 3 * 4 * 5


def test_the_parts_are_the_whole():
    parts = count_denoiser_parts(PRESETS["paper"].denoiser, 256)
    whole = count_denoiser_work(PRESETS["paper"].denoiser, 256)
    assert list(parts) == ["attention", "convolutions", "rest"]
    assert sum(part.flop for part in parts.values()) == whole.flop
    assert sum(part.weights for part in parts.values()) == whole.weights
    assert parts["convolutions"].values + parts["rest"].values == whole.values
    # Two products of every query with every key, of 7 blocks at each level with attention and one in the middle.
    shapes = [(7, 16384, 128), (7, 4096, 256), (7, 1024, 512), (8, 256, 768)]
    assert parts["attention"].flop == sum(4 * count * tokens**2 * width for count, tokens, width in shapes)
    assert parts["attention"].values == sum(4 * count * tokens * width for count, tokens, width in shapes)
    assert parts["attention"].weights == 0


@pytest.mark.parametrize(("flop_per_s", "bytes_per_s", "expected"), [(1e3, 1e9, 2.0), (1e9, 110.0, 8.0)])
def test_the_floor_is_arithmetic_or_memory(flop_per_s, bytes_per_s, expected):
    work = Work(flop=1000.0, weights=100, values=60)
    assert work.compute_floor_s(2, 4, flop_per_s, bytes_per_s) == pytest.approx(expected)


def test_the_floor_of_a_row():
    document = {"matmul_tflops": {"fp32": 1.0, "fp16": 4.0}, "copy_gb_s": 1.0}
    row = {"precision": "fp32", "ceiling": "fp32", "batch": 2}
    assert compute_floor_ms(document, row) is None  # recorded by an older version
    document["work_parts"] = {
        "attention": {"flop": 2e12, "weights": 0, "values": 10},  # bound by arithmetic
        "rest": {"flop": 1.0, "weights": 1e9, "values": 5e8},  # bound by memory
    }
    assert compute_floor_ms(document, row) == pytest.approx(4e3 + 8e3)
    assert compute_floor_ms(document, row | {"precision": "fp16", "ceiling": "fp16"}) == pytest.approx(1e3 + 4e3)
    assert compute_floor_ms(document, row | {"precision": "bf16", "ceiling": None}) is None


def test_the_enhancer_is_counted_too():
    """Published: 1,957 GFLOP, with output projections (never applied) and a log-sigma branch (never decoded)."""
    assert 0.99 < count_enhancer_work(PRESETS["paper"].enhancer, 256).flop / 1957e9 < 1.0
    tiny = PRESETS["tiny"].enhancer
    # Not exactly 4: the stride-2 convolutions read one padded row and column more.
    assert count_enhancer_work(tiny, 64).values == pytest.approx(4 * count_enhancer_work(tiny, 32).values, rel=1e-3)


def test_a_batch_shares_the_weights():
    work = Work(flop=1000.0, weights=100, values=10)
    assert work.intensity(1, 4) == pytest.approx(1000 / 440)
    assert work.intensity(8, 2) == pytest.approx(8000 / 360)


def test_measure_matmul_rates(monkeypatch):
    monkeypatch.setattr(flops, "MATRIX_SIZES", (16, 32))
    seconds = iter([1.0, 0.5, 2.0, 2.0, 2.0, 2.0, 1.0, 0.25, 4.0, 4.0, 4.0, 4.0])  # the first of each size warms up
    monkeypatch.setattr(flops, "time_call", lambda call, device: next(seconds))
    monkeypatch.setattr(flops, "PRECISIONS", {"fp32": torch.float32, "tf32": torch.float32})
    assert measure_matmul_rates(CPU, ("fp32", "tf32"), budget_s=60.0) == {
        "fp32": 2 * 32**3 / 0.25
    }  # the best; tf32 is CUDA's alone


def test_a_precision_without_a_kernel_is_left_out(monkeypatch):
    monkeypatch.setattr(flops, "MATRIX_SIZES", (16,))
    monkeypatch.setattr(flops, "PRECISIONS", {"fp32": torch.float32, "bool": torch.bool, "fp16": torch.float16})
    before = torch.get_float32_matmul_precision()
    rates = measure_matmul_rates(CPU, ("fp32", "bool", "fp16"), budget_s=0.01)
    assert list(rates) == ["fp32"]
    assert rates["fp32"] > 0
    assert torch.get_float32_matmul_precision() == before


def test_measure_copy_rate_counts_both_ways(monkeypatch):
    monkeypatch.setattr(flops, "COPY_BYTES", {"cpu": 1000})
    seconds = iter([0.001, 4.0, 2.0, 5.0, 4.0, 4.0])  # the first warms up
    monkeypatch.setattr(flops, "time_call", lambda call, device: next(seconds))
    assert measure_copy_rate(CPU) == 1000.0
