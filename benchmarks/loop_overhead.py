"""Measure the share of sampling time spent outside the network, on a CPU: `python -m benchmarks.loop_overhead`."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from unittest import mock

import torch
import typer

from bsdiff_rt.bench.busy import check_load, check_rates, check_tail, read_load, write_warning
from bsdiff_rt.bench.flops import measure_matmul_rates
from bsdiff_rt.bench.measure import compute_p95
from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.config import SamplerName
from bsdiff_rt.engines.select import load
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.sampling.cuda_graph import CapturedSampler
from bsdiff_rt.sampling.noise import ImageNoise, batch_noise
from bsdiff_rt.sampling.schedule import Table, sampler_table

CPU = torch.device("cpu")
# Sampler, steps, images.
TRIALS: tuple[tuple[SamplerName, int, int], ...] = (("ddim", 2, 5), ("ddim", 50, 1), ("ddpm", 50, 1))


@dataclass(frozen=True)
class Overhead:
    """Times of several images.

    Attributes:
        share: median share, in [0, 1], of an image's time outside `Runner.denoise`, noise included.
        step_times: seconds of each denoiser call.
    """

    share: float
    step_times: tuple[float, ...]


def measure_overhead(runner: Runner, table: Table, images: int) -> Overhead:
    """Sample images one by one, after one image to warm up, and time the denoiser calls inside.

    Args:
        runner: runs the model on a CPU.
        table: the sampler's coefficients.
        images: number of measured images, at least 1.
    """
    size = (runner.image_size, runner.image_size)
    cxr, noise = torch.zeros(1, 1, *size), [ImageNoise(0, b"")]
    denoise, shares = runner.denoise, []
    times: list[float] = []

    def time_step(*buffers: torch.Tensor) -> None:
        started = time.perf_counter()
        denoise(*buffers)
        times.append(time.perf_counter() - started)

    with mock.patch.object(runner, "denoise", time_step), CapturedSampler(runner) as sampler:
        for number in range(images + 1):
            first, started = len(times), time.perf_counter()
            sampler.sample(cxr, table, lambda draw: torch.from_numpy(batch_noise(noise, draw, size)))
            shares.append(1.0 - sum(times[first:]) / (time.perf_counter() - started))
            if number == 0:  # the warm-up
                times.clear()
                shares.clear()
    return Overhead(statistics.median(shares), tuple(times))


def main() -> None:
    """Print one line for each trial, with the demo model in ONNX Runtime, and a warning if the machine was busy."""
    bundle = open_bundle("demo")
    signs = check_load(read_load())
    before = measure_matmul_rates(CPU, ("fp32",))
    with load(bundle, "onnxruntime", CPU) as runner:
        for name, steps, images in TRIALS:
            table = sampler_table(bundle.manifest.schedule, name, steps)
            found = measure_overhead(runner, table, images)
            median, p95 = statistics.median(found.step_times), compute_p95(found.step_times)
            signs += check_tail(f"{name}, {steps} steps", median, p95)
            print(f"{name}, {steps} steps: {found.share:.2%} of the time outside the network")
    signs += check_rates(before, measure_matmul_rates(CPU, ("fp32",)))
    if signs:
        typer.echo(write_warning(signs), err=True)


if __name__ == "__main__":
    typer.run(main)
