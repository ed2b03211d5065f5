"""The published network beside our runners: one denoiser step, measured in turn so that ratios hold on a noisy machine.

    python -m export random paper -o /tmp/paper
    python -m benchmarks.peers --bundle /tmp/paper --device cpu --batch 1 --json benchmarks/results/peers-paper-cpu.json

Timing needs no trained weights. The published network is `DiffusionModelUNet` of monai-generative in eager fp32, in the
shape of the bundle's denoiser, with random weights of its own.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import onnxruntime
import torch
import typer
from generative.networks.nets import DiffusionModelUNet

from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.config import DenoiserConfig
from bsdiff_rt.runners import load_runner, resolve_device
from bsdiff_rt.runners.base import Runner

Step = Callable[[], None]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    bundle: Annotated[str, typer.Option(help="demo, or a bundle's folder.")] = "demo",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    batch: Annotated[int, typer.Option(min=1, help="Images per step.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of each row, after one to warm up.")] = 5,
    output: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
) -> None:
    """Print and write one row per network: median and p95 of one step."""
    model, place = open_bundle(bundle), resolve_device(device)
    size = model.manifest.preprocessing.size
    generator = torch.Generator().manual_seed(0)
    x_t, cxr = (torch.randn(batch, 1, size, size, generator=generator).to(place) for _ in range(2))
    t, out = torch.full((batch,), 500.0, device=place), torch.empty_like(x_t)

    def of(runner: Runner) -> Step:
        return lambda: runner.denoise(x_t, cxr, t, out)

    steps = {"published eager": published_step(model.manifest.denoiser, x_t, cxr, t)}
    for name in ("eager", "onnxruntime") if place.type == "cpu" else ("eager",):
        steps[name] = of(load_runner(model, name, place))
    times = interleaved(steps, repeats, place)
    rows = []
    for name, seconds in times.items():
        ordered = sorted(seconds)
        median, p95 = statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
        rows.append(
            {"name": name, "precision": "fp32", "batch": batch, "step_ms": median * 1e3, "step_ms_p95": p95 * 1e3}
        )
        ratio = statistics.median(a / b for a, b in zip(times["published eager"], seconds, strict=True))
        rows[-1]["published_over_this"] = ratio
        print(f"{name:16} step {median * 1e3:9.1f} ms  p95 {p95 * 1e3:9.1f} ms  published / this {ratio:5.2f}")
    if output:
        head = {"device": describe(place), "date": time.strftime("%Y-%m-%d"), "bundle": model.manifest.preset}
        head |= {"size_px": size, "torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
        output.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


def published_step(config: DenoiserConfig, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor) -> Step:
    """One call of the published network in the shape of `config`, as its own sampling loop calls it."""
    network = DiffusionModelUNet(
        spatial_dims=2,
        in_channels=2,
        out_channels=2,
        num_res_blocks=list(config.res_blocks),
        num_channels=list(config.channels),
        attention_levels=list(config.attention),
        num_head_channels=list(config.channels),
        norm_num_groups=config.norm_groups,
    )
    network = network.to(x_t.device).eval()

    @torch.no_grad()
    def step() -> None:
        network(torch.cat((x_t, cxr), dim=1), timesteps=t)

    return step


def interleaved(steps: dict[str, Step], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step, taken in turn (A B C A B C ...), device work included; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:
                times[name].append(time.perf_counter() - started)
    return times


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    app()
