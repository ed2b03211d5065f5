"""What rounding to fp16 and bf16 does to a whole picture, without a GPU: `python -m benchmarks.precision IMAGE...`

The denoiser as an engine for a GPU has it (runners/aoti_builder.py: layers that stay fp32, form of attention), by
torch on the CPU operation by operation, each result rounded, over every step of a sampler and with the noise of the
fp32 run beside it. It tells a model that a precision suits from one that it does not; what a compiler makes of it is
for the parity gate to say, on the device itself.
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

from benchmarks.quality import write
from bsdiff_rt import __version__
from bsdiff_rt.bundle import Bundle, open_bundle
from bsdiff_rt.config import Precision, SamplerName, SamplerSettings
from bsdiff_rt.engines.parity import EQUAL_DB
from bsdiff_rt.errors import InputFailed, InputRefused, SettingsError, run_command
from bsdiff_rt.formats.raster import read_raster
from bsdiff_rt.imaging.metrics import mse, psnr
from bsdiff_rt.imaging.network_input import to_network
from bsdiff_rt.runners.aoti_builder import DTYPES, choose_attention, lower_precision
from bsdiff_rt.runners.eager import EagerRunner, load_networks
from bsdiff_rt.sampling.batching import suppress
from bsdiff_rt.sampling.noise import ImageNoise
from bsdiff_rt.sampling.schedule import sampler_table

CPU, GPU = torch.device("cpu"), torch.device("cuda")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    images: Annotated[list[Path], typer.Argument(help="X-rays: PNG, JPEG, TIFF.")],
    bundle: Annotated[str, typer.Option(help="Model.")] = "demo",
    sampler: Annotated[SamplerName | None, typer.Option(show_default="the bundle's", help="Sampler.")] = None,
    steps: Annotated[int | None, typer.Option(show_default="the bundle's", help="Denoiser steps.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
) -> None:
    """Print a row for each image and precision: how far its picture is from that of fp32, stage 2 left out."""
    model = open_bundle(bundle)
    own = model.manifest.sampler
    asked = replace(own, name=sampler or own.name, steps=own.steps if steps is None else steps)
    table = sampler_table(model.manifest.schedule, asked.name, asked.steps)
    runners = candidates(model)
    rows = []
    for number, cxr in enumerate([shown(path, model) for path in images]):
        noise, pictures, seconds = [ImageNoise(asked.seed, bytes([number]))], {}, {}
        for name, runner in runners.items():
            started = time.perf_counter()
            pictures[name] = suppress(runner, cxr[None, None], table, noise, enhance=False)[0, 0]
            seconds[name] = time.perf_counter() - started
        for name in list(runners)[1:]:
            row = {"image": number, "precision": name, **compared(pictures["fp32"], pictures[name], cxr)}
            rows.append(row | {"seconds": seconds[name], "seconds_fp32": seconds["fp32"]})
            typer.echo(
                f"image {number}  {name}  PSNR {row['psnr']:6.2f} dB  of what is taken {row['taken']:.4f}  "
                f"largest {row['largest']:.4f}"
            )
    if json_path is not None:
        write(json_path, document(bundle, model.manifest.schedule.objective, asked, rows))


def shown(path: Path, model: Bundle) -> np.ndarray[Any, Any]:
    """What the networks are shown of a file, [S, S] float32 in [-1, 1].

    Raises:
        SettingsError: it is no picture.
    """
    try:
        return to_network(read_raster(path).cxr, model.manifest.preprocessing)[0]
    except (InputRefused, InputFailed) as error:
        raise SettingsError(f"{path}: {error}") from error


def candidates(model: Bundle) -> dict[str, EagerRunner]:
    """The denoiser in fp32, and rounded; by name, fp32 first."""
    denoiser, enhancer = load_networks(model)
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
    made: dict[str, EagerRunner] = {}
    for precision in precisions:
        network = deepcopy(denoiser)
        lower_precision(network, DTYPES[precision])
        choose_attention(network, precision, GPU)  # which form it takes there; it is computed here
        made[precision] = EagerRunner(network, enhancer, model.manifest.preprocessing.size, CPU)
    return made


def compared(expected: np.ndarray[Any, Any], made: np.ndarray[Any, Any], cxr: np.ndarray[Any, Any]) -> dict[str, float]:
    """PSNR, and the difference as a share of what is taken from the X-ray (RMS), as in the parity gate; the largest.

    All [S, S] in [-1, 1]; the figures are of grey levels in [0, 1].
    """
    expected, made, cxr = ((image.astype(np.float64) + 1) / 2 for image in (expected, made, cxr))
    return {
        "psnr": min(psnr(expected, made), EQUAL_DB),
        "taken": sqrt(mse(expected, made) / max(mse(cxr, expected), 1e-20)),
        "largest": float(np.abs(made - expected).max()),
    }


def document(bundle: str, objective: str, sampler: SamplerSettings, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is written."""
    return {
        "bsdiff_rt": __version__,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "device": f"cpu, {torch.get_num_threads()} threads",
        "bundle": Path(bundle).name,
        "objective": objective,
        "sampler": sampler.name,
        "steps": sampler.steps,
        "rows": rows,
    }


def run() -> None:
    """Entry point: our errors become one line and their exit code."""
    run_command(app)


if __name__ == "__main__":
    run()
