"""Stand-ins that the tests of the benchmark share."""

from __future__ import annotations

from dataclasses import replace

import torch
from helpers import ToyRunner

from bsdiff_rt.bench.candidates import Candidate
from bsdiff_rt.bench.memory import Memory
from bsdiff_rt.bench.networks import BenchModel
from bsdiff_rt.bench.plan import Plan
from bsdiff_rt.config import PRESETS, SamplerSettings, Schedule

CPU = torch.device("cpu")
SIZE_PX = 16
CONTRACT = {
    *("name", "runner", "precision", "batch", "step_ms", "step_ms_p95", "image_s", "images_per_second"),
    *("peak_bytes", "psnr_vs_eager"),
}


def make_model(**changes) -> BenchModel:
    """Return tiny networks that predict x0 in three steps of ddpm, with attributes changed."""
    tiny = PRESETS["tiny"]
    made = BenchModel(
        "toy", tiny.denoiser, tiny.enhancer, Schedule(objective="x0"), SamplerSettings("ddpm", 3), SIZE_PX, True
    )
    return replace(made, **changes)


def make_plan(**changes) -> Plan:
    """Return a plan of 5 rounds of steps and 2 of images on the CPU, with attributes changed."""
    return replace(Plan(make_model(), CPU, 3, 5, 2, {"fp32": 1e12}), **changes)


def make_toys(*names: str) -> list[Candidate]:
    """Return one candidate with a toy runner for each name."""
    return [Candidate(name, ToyRunner(SIZE_PX), Memory(1000, 900)) for name in names]
