"""Measure what reusing deep features costs and gains, on a CPU: `python -m benchmarks.deep_cache IMAGE...`

Each image is sampled exactly and with deep features computed in every 2nd, 3rd and 5th step (sampling/deep_cache.py),
with the same noise. With --width the model is the paper's network of that width with random weights. Its pictures show
nothing, so its figures say how fast features change in an untrained network, and no more.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.documents import describe_run, write_json
from benchmarks.precision import compare, read_input
from bsdiff_rt.bench.networks import fill_randomly
from bsdiff_rt.bundle import Bundle, open_bundle
from bsdiff_rt.config import PRESETS, SamplerName, Schedule
from bsdiff_rt.errors import run_command
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.runners.eager import EagerRunner, load_networks
from bsdiff_rt.sampling.deep_cache import check_cache
from bsdiff_rt.sampling.noise import ImageNoise, batch_noise
from bsdiff_rt.sampling.sampler import sample
from bsdiff_rt.sampling.schedule import Table, sampler_table

CPU = torch.device("cpu")
GROUPS = 8

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    images: Annotated[list[Path], typer.Argument(help="X-rays, in any format that infer reads.")],
    bundle: Annotated[str, typer.Option(help="Model. Its preprocessing is used also with --width.")] = "demo",
    width: Annotated[
        int | None,
        typer.Option(
            min=GROUPS, show_default="the bundle's model", help="Channels of a random network's first level; paper: 64."
        ),
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=16, show_default="the bundle's", help="Side of the model's images, px.")
    ] = None,
    sampler: Annotated[SamplerName, typer.Option(help="Sampler.")] = "ddpm",
    steps: Annotated[int, typer.Option(help="Denoiser steps.")] = 50,
    every: Annotated[str, typer.Option(help="Steps from one computation of deep features to the next.")] = "2,3,5",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows to a JSON file.")] = None,
) -> None:
    """Print how far the images are from the exact ones, and how much faster they are made. Stage 2 is left out."""
    model, periods = open_resized(bundle, size), [int(number) for number in every.split(",")]
    for period in periods:
        check_cache(period, steps)
    schedule = model.manifest.schedule if width is None else Schedule()
    table = sampler_table(schedule, sampler, steps)
    runner = make_runner(model, width)
    rows = []
    for number, cxr in enumerate([read_input(path, model) for path in images]):
        exact, exact_s = make_picture(runner, cxr, table, number, 1)
        for period in periods:
            picture, seconds = make_picture(runner, cxr, table, number, period)
            row = {"image": number, "every": period, **compare(exact, picture, cxr), "seconds": seconds}
            rows.append(row | {"seconds_exact": exact_s})
            typer.echo(
                f"image {number}  every {period}  PSNR {row['psnr']:6.2f} dB  error over removed bone "
                f"{row['taken']:.4f}  {exact_s / seconds:.2f} times as fast"
            )
    if json_path is not None:
        settings = {"sampler": sampler, "steps": steps, "width": width, "objective": schedule.objective}
        settings |= {"size_px": model.manifest.preprocessing.size}
        write_json(json_path, describe_run(model, CPU) | settings | {"rows": rows})


def open_resized(name: str, size: int | None) -> Bundle:
    """Open a bundle, and let it make images of another size if one is given."""
    model = open_bundle(name)
    preprocessing = replace(model.manifest.preprocessing, size=size or model.manifest.preprocessing.size)
    return replace(model, manifest=replace(model.manifest, preprocessing=preprocessing))


def make_runner(model: Bundle, width: int | None) -> EagerRunner:
    """Return the model, or the paper's network of another width with random weights, in eager."""
    denoiser, enhancer = load_networks(model)
    if width is not None:
        paper = PRESETS["paper"].denoiser
        channels = tuple(width * each // paper.channels[0] for each in paper.channels)
        denoiser = Denoiser(replace(paper, channels=channels, norm_groups=GROUPS)).eval()
        fill_randomly(denoiser, torch.Generator().manual_seed(0))
    return EagerRunner(denoiser, enhancer, model.manifest.preprocessing.size, CPU)


def make_picture(
    runner: EagerRunner, cxr: np.ndarray[Any, Any], table: Table, number: int, cache_every: int
) -> tuple[np.ndarray[Any, Any], float]:
    """Sample one image.

    Args:
        runner: runs the denoiser.
        cxr: the model's input, [S, S] float32, in [-1, 1].
        table: the sampler's coefficients.
        number: of the image, which keys its noise.
        cache_every: compute deep features in every Nth step only; 1 is exact.

    Returns:
        The image, [S, S] float32, in [-1, 1], and the seconds that it took.
    """
    draw = partial(batch_noise, [ImageNoise(0, bytes([number]))], size=cxr.shape)
    started = time.perf_counter()
    image = torch.from_numpy(cxr[None, None])
    x_0 = sample(runner, image, table, lambda k: torch.from_numpy(draw(k)), cache_every)
    return x_0[0, 0].numpy(), time.perf_counter() - started


def run() -> None:
    """Run the command; an error of this project becomes one line and its exit code."""
    run_command(app)


if __name__ == "__main__":
    run()
