"""Share of a CPU's sampling time that is spent outside the network: `python -m benchmarks.loop_overhead`."""

from __future__ import annotations

import statistics
import time
from unittest import mock

import torch
import typer

from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.config import SamplerName
from bsdiff_rt.engines.select import load
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.sampling.cuda_graph import CapturedSampler
from bsdiff_rt.sampling.noise import ImageNoise, batch_noise
from bsdiff_rt.sampling.schedule import Table, sampler_table

# Sampler, steps, images.
TRIALS: tuple[tuple[SamplerName, int, int], ...] = (("ddim", 2, 5), ("ddim", 50, 1), ("ddpm", 50, 1))


def share_outside(runner: Runner, table: Table, images: int) -> float:
    """Median share, in [0, 1], of the time of one image that is not spent in `runner.denoise`; noise included."""
    size = (runner.image_size, runner.image_size)
    cxr, noise = torch.zeros(1, 1, *size), [ImageNoise(0, b"")]
    denoise, inside, shares = runner.denoise, 0.0, []

    def timed(*buffers: torch.Tensor) -> None:
        nonlocal inside
        started = time.perf_counter()
        denoise(*buffers)
        inside += time.perf_counter() - started

    with mock.patch.object(runner, "denoise", timed), CapturedSampler(runner) as sampler:
        for _ in range(images + 1):  # the first warms up
            inside, started = 0.0, time.perf_counter()
            sampler.sample(cxr, table, lambda number: torch.from_numpy(batch_noise(noise, number, size)))
            shares.append(1.0 - inside / (time.perf_counter() - started))
    return statistics.median(shares[1:])


def main() -> None:
    """Print one line per trial, for the demo model on ONNX Runtime."""
    bundle = open_bundle("demo")
    with load(bundle, "onnxruntime", torch.device("cpu")) as runner:
        for name, steps, images in TRIALS:
            table = sampler_table(bundle.manifest.schedule, name, steps)
            print(f"{name} {steps} steps: {share_outside(runner, table, images):.2%} outside the network")


if __name__ == "__main__":
    typer.run(main)
