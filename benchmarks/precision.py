"""Measure the effect of fp16 and bf16 on a whole image, without a GPU: `python -m benchmarks.precision IMAGE...`

The denoiser keeps the same layers in fp32 and has the same form of attention as in an engine for a GPU
(runners/aoti_builder.py). torch computes it on the CPU and rounds the result of every operation. Each precision runs
all steps of a sampler with the same noise as fp32. The result shows whether a precision suits a model. Only the parity
gate, on the device itself, can judge what a compiler makes of it.
"""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.documents import describe_run, write_json
from bsdiff_rt.bundle import Bundle, open_bundle
from bsdiff_rt.config import Precision, SamplerName
from bsdiff_rt.engines.parity import EQUAL_DB
from bsdiff_rt.errors import InputFailed, InputRefused, SettingsError, run_command
from bsdiff_rt.formats import read
from bsdiff_rt.imaging.metrics import mse, psnr
from bsdiff_rt.imaging.one_image import prepare
from bsdiff_rt.runners.aoti_builder import DTYPES, choose_attention, lower_precision
from bsdiff_rt.runners.eager import EagerRunner, load_networks
from bsdiff_rt.sampling.batching import suppress
from bsdiff_rt.sampling.noise import ImageNoise
from bsdiff_rt.sampling.schedule import sampler_table

CPU, GPU = torch.device("cpu"), torch.device("cuda")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    images: Annotated[list[Path], typer.Argument(help="X-rays, in any format that infer reads.")],
    bundle: Annotated[str, typer.Option(help="Model.")] = "demo",
    sampler: Annotated[SamplerName | None, typer.Option(show_default="the bundle's", help="Sampler.")] = None,
    steps: Annotated[int | None, typer.Option(show_default="the bundle's", help="Denoiser steps.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows to a JSON file.")] = None,
) -> None:
    """Print how far each precision's image is from that of fp32, without stage 2."""
    model = open_bundle(bundle)
    own = model.manifest.sampler
    asked = replace(own, name=sampler or own.name, steps=own.steps if steps is None else steps)
    table = sampler_table(model.manifest.schedule, asked.name, asked.steps)
    runners = make_runners(model)
    rows = []
    for number, cxr in enumerate([read_input(path, model) for path in images]):
        noise, pictures, seconds = [ImageNoise(asked.seed, bytes([number]))], {}, {}
        for name, runner in runners.items():
            started = time.perf_counter()
            pictures[name] = suppress(runner, cxr[None, None], table, noise, enhance=False)[0, 0]
            seconds[name] = time.perf_counter() - started
        for name in list(runners)[1:]:
            row = {"image": number, "precision": name, **compare(pictures["fp32"], pictures[name], cxr)}
            rows.append(row | {"seconds": seconds[name], "seconds_fp32": seconds["fp32"]})
            typer.echo(
                f"image {number}  {name}  PSNR {row['psnr']:6.2f} dB  error over removed bone {row['taken']:.4f}  "
                f"largest error {row['largest']:.4f}"
            )
    if json_path is not None:
        settings = {"objective": model.manifest.schedule.objective, "sampler": asked.name, "steps": asked.steps}
        write_json(json_path, describe_run(model, CPU) | settings | {"rows": rows})


def read_input(path: Path, model: Bundle) -> np.ndarray[Any, Any]:
    """Return the model's input for a file: [S, S], float32, in [-1, 1].

    Raises:
        SettingsError: the file is not an image.
    """
    try:
        return prepare(read(path).cxr, model.manifest.preprocessing).cxr_net
    except (InputRefused, InputFailed) as error:
        raise SettingsError(f"{path}: {error}") from error


def make_runners(model: Bundle) -> dict[str, EagerRunner]:
    """Return the model in fp32, fp16 and bf16 by the name of the precision, fp32 first."""
    denoiser, enhancer = load_networks(model)
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
    runners: dict[str, EagerRunner] = {}
    for precision in precisions:
        network = deepcopy(denoiser)
        lower_precision(network, DTYPES[precision])
        choose_attention(network, precision, GPU)  # the form that it has on a GPU
        runners[precision] = EagerRunner(network, enhancer, model.manifest.preprocessing.size, CPU)
    return runners


def compare(
    expected: np.ndarray[Any, Any], actual: np.ndarray[Any, Any], cxr: np.ndarray[Any, Any]
) -> dict[str, float]:
    """Compare an image with that of fp32.

    Args:
        expected: image of fp32, [S, S], in [-1, 1].
        actual: the other image, likewise.
        cxr: the model's input, likewise.

    Returns:
        For grey levels in [0, 1]: "psnr" in dB; "taken", the RMS difference over the RMS of the bone that fp32 removed,
        as in the parity gate; "largest", the largest difference.
    """
    expected, actual, cxr = ((image.astype(np.float64) + 1) / 2 for image in (expected, actual, cxr))
    return {
        "psnr": min(psnr(expected, actual), EQUAL_DB),
        "taken": sqrt(mse(expected, actual) / max(mse(cxr, expected), 1e-20)),
        "largest": float(np.abs(actual - expected).max()),
    }


def run() -> None:
    """Run the command; an error of this project becomes one line and its exit code."""
    run_command(app)


if __name__ == "__main__":
    run()
