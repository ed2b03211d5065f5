"""Estimate how long one image takes with a bundle on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bsdiff_rt.bundle import Manifest
from bsdiff_rt.config import step_count
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.onnxruntime import OnnxRuntimeRunner

MEASURE_S = 0.5  # calls are repeated until this time has passed; a call that takes longer is made once


@dataclass(frozen=True)
class Speed:
    """Expected time of one image, without reading and writing.

    Attributes:
        step_s: seconds of one denoiser call.
        steps: denoiser calls in one pass.
        enhance_s: seconds of stage 2; 0 if it is off by default.
        passes: 2 if the mirrored image is run, too, else 1.
    """

    step_s: float
    steps: int
    enhance_s: float
    passes: int

    @property
    def image_s(self) -> float:
        """Return the seconds per image."""
        return self.passes * (self.steps * self.step_s + self.enhance_s)

    def __str__(self) -> str:
        parts = [f"{step_count(self.steps)} of {self.step_s:.2g} s"]
        if self.enhance_s:
            parts.append(f"stage 2 in {self.enhance_s:.2g} s")
        if self.passes > 1:
            parts.append(f"{self.passes} passes (the image and its mirror image)")
        return f"about {self.image_s:.2g} s per image with ONNX Runtime on this machine: {', '.join(parts)}"


def measure_speed(folder: Path, manifest: Manifest) -> Speed:
    """Time one call of each network of the bundle in `folder` with ONNX Runtime on the CPU, batch 1."""
    size = manifest.preprocessing.size
    runner: Runner = OnnxRuntimeRunner(folder / "denoiser.onnx", folder / "enhancer.onnx", size)
    x, t = torch.zeros(1, 1, size, size), torch.zeros(1)
    out = torch.empty_like(x)
    return Speed(
        step_s=_time(lambda: runner.denoise(x, x, t, out)),
        steps=manifest.sampler.steps,
        enhance_s=_time(lambda: runner.enhance(x, out)) if manifest.enhance else 0.0,
        passes=2 if manifest.mirror else 1,
    )


def _time(call: Callable[[], object]) -> float:
    """Return the seconds of the fastest of several calls."""
    started, fastest = time.perf_counter(), float("inf")
    while time.perf_counter() - started < MEASURE_S:
        before = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - before)
    return fastest
