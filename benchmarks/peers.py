"""Time this project's runners beside other projects' code for the same network.

    python -m export random paper -o /tmp/paper
    python -m benchmarks.peers --bundle /tmp/paper --device cpu --batch 1 --json benchmarks/results/peers-paper-cpu.json

All candidates are measured in turn, so that ratios hold on a noisy machine. Timing needs no trained weights. The peers
use the model's own weights:

- `published eager`: the published networks (`DiffusionModelUNet`, `AutoencoderKL` of monai-generative) in eager fp32.
- `published compiled`: the same under `torch.compile(mode="max-autotune")`, in fp16 on CUDA and fp32 on a CPU. On a CPU
  compiling takes minutes, so it is measured only on request (`--peer "published compiled"`).
- `diffusers loop`: whole images by diffusers' scheduler around this project's eager network, with the same noise. Its
  dpmpp-2m does not clamp x0, so its images may differ.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast
from unittest import mock

import numpy as np
import torch
import typer
from torch import Tensor, nn

from bsdiff_rt.bench import plot
from bsdiff_rt.bench.candidates import Candidate, Missing, Wanted, describe_missing, load_candidate
from bsdiff_rt.bench.document import BenchSettings, Document, run_benchmark
from bsdiff_rt.bench.networks import BenchModel
from bsdiff_rt.bench.report import build_table, write_notes
from bsdiff_rt.config import Schedule
from bsdiff_rt.errors import EngineError, run_command
from bsdiff_rt.networks.published import denoiser_state, enhancer_state
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.eager import EagerRunner
from bsdiff_rt.runners.timing import median_ratio
from bsdiff_rt.sampling.sampler import Draw, sample
from bsdiff_rt.sampling.schedule import Table, alpha_bar
from bsdiff_rt.tables import print_table

PUBLISHED, COMPILED, DIFFUSERS = "published eager", "published compiled", "diffusers loop"


class PublishedDenoiser(nn.Module):
    """The published U-Net with this project's signature. The first of its two output channels is the prediction."""

    def __init__(self, network: nn.Module, residual: bool) -> None:
        super().__init__()
        self.network, self.residual = network, residual

    def forward(self, x_t: Tensor, cxr: Tensor, t: Tensor) -> Tensor:
        """Return the prediction, [B, 1, H, W], in the network's dtype (see `networks.unet.Denoiser`)."""
        dtype = next(self.network.parameters()).dtype
        out = self.network(torch.cat((x_t, cxr), dim=1).to(dtype), timesteps=t)[:, :1]
        return cxr + out if self.residual else out


class PublishedEnhancer(nn.Module):
    """The published autoencoder. It decodes the mean, without the published noise."""

    def __init__(self, network: Any, residual: bool) -> None:
        super().__init__()
        self.network, self.residual = network, residual

    def forward(self, x: Tensor) -> Tensor:
        """Return the enhanced image, [B, 1, H, W], in the network's dtype (see `networks.autoencoder.Enhancer`)."""
        out = self.network.reconstruct(x.to(next(self.network.parameters()).dtype))
        return x + out if self.residual else out


class PublishedRunner(EagerRunner):
    """The published networks as a runner."""

    name = "monai-generative"


def build_published_networks(model: BenchModel) -> tuple[PublishedDenoiser, PublishedEnhancer]:
    """Return both published networks in the model's shapes with its weights: fp32, on the CPU.

    Raises:
        ImportError: monai-generative is not installed.
    """
    from generative.networks.nets import AutoencoderKL, DiffusionModelUNet

    shape, second = model.denoiser, model.enhancer
    unet = DiffusionModelUNet(
        spatial_dims=2,
        in_channels=2,
        out_channels=2,
        num_res_blocks=list(shape.res_blocks),
        num_channels=list(shape.channels),
        attention_levels=list(shape.attention),
        num_head_channels=list(shape.channels),
        norm_num_groups=shape.norm_groups,
    )
    autoencoder = AutoencoderKL(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        num_channels=second.channels,
        latent_channels=second.latent_channels,
        num_res_blocks=second.res_blocks,
        norm_num_groups=second.norm_groups,
        attention_levels=second.attention,
        with_encoder_nonlocal_attn=second.middle_attention,
        with_decoder_nonlocal_attn=second.middle_attention,
    )
    denoiser, enhancer = model.load_networks()
    with torch.no_grad():
        # The converted dictionaries share memory with the published networks, except for the final convolution. So
        # copying into them fills both networks.
        _copy_weights(denoiser_state(unet.state_dict(), shape), denoiser)
        _copy_weights(enhancer_state(autoencoder.state_dict(), second), enhancer)
        final = unet.out[2].conv
        final.weight[:1], final.bias[:1] = denoiser.conv_out.weight, denoiser.conv_out.bias
    return PublishedDenoiser(unet, shape.residual), PublishedEnhancer(autoencoder, second.residual)


def _copy_weights(theirs: Mapping[str, Tensor], ours: nn.Module) -> None:
    for name, tensor in ours.state_dict().items():
        theirs[name].copy_(tensor)


def load_published(model: BenchModel, device: torch.device, _: Candidate) -> Candidate:
    """Load the published networks in eager fp32, with the plain loop."""
    candidate = load_candidate(
        PUBLISHED, lambda: PublishedRunner(*build_published_networks(model), model.size, device), device
    )
    return Candidate(PUBLISHED, candidate.runner, candidate.loading, sample)


def load_compiled(model: BenchModel, device: torch.device, _: Candidate) -> Candidate:
    """Load the published networks under torch.compile, with the plain loop: torch.compile captures graphs itself."""

    def load() -> Runner:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        networks = (network.to(device, dtype).eval() for network in build_published_networks(model))
        denoiser, enhancer = (cast(nn.Module, torch.compile(n, mode="max-autotune")) for n in networks)
        runner = PublishedRunner(denoiser, enhancer, model.size, device)
        runner.precision = "fp16" if device.type == "cuda" else "fp32"
        return runner

    candidate = load_candidate(COMPILED, load, device)
    return Candidate(COMPILED, candidate.runner, candidate.loading, sample)


def load_diffusers_loop(model: BenchModel, _: torch.device, eager: Candidate) -> Candidate:
    """Return diffusers' scheduler around this project's eager network.

    Raises:
        ImportError: diffusers is not installed.
        EngineError: diffusers does not have the model's sampler.
    """
    import diffusers  # noqa: F401 - here, so that its absence is noticed now

    if model.sampler.name not in ("ddpm", "ddim", "dpmpp-2m"):
        raise EngineError(f"diffusers has no sampler {model.sampler.name}")
    return Candidate(DIFFUSERS, eager.runner, eager.loading, partial(_run_diffusers, model))


def _run_diffusers(model: BenchModel, runner: Runner, cxr: Tensor, table: Table, draw: Draw) -> Tensor:
    """Sample an image as diffusers' pipelines do, with this project's noise, so that the images can be compared."""
    fresh = _list_draws(table, draw, cxr)
    with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", side_effect=lambda *_, **__: next(fresh)):
        scheduler, options = _make_scheduler(model)
        scheduler.set_timesteps(table.steps, device=cxr.device)
        x_t = draw(0).to(cxr.device, copy=True)
        out = torch.empty_like(x_t)
        for t in scheduler.timesteps:
            runner.denoise(x_t, cxr, t.expand(len(cxr)).to(torch.float32).contiguous(), out)
            x_t = scheduler.step(out, t, x_t, **options).prev_sample.contiguous()
    return x_t


def _list_draws(table: Table, draw: Draw, like: Tensor) -> Iterator[Tensor]:
    """Yield the noise in the order in which diffusers asks for it; zeros where the table adds none."""
    for k, scale in enumerate(table.S):
        yield draw(k + 1).to(like.device, copy=True) if scale != 0.0 else torch.zeros_like(like)


def _make_scheduler(model: BenchModel) -> tuple[Any, dict[str, Any]]:
    """Return diffusers' scheduler for the model's sampler and schedule, and the options of its step."""
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    arguments = _convert_schedule(model.schedule)
    if model.sampler.name == "ddpm":
        return DDPMScheduler(variance_type="fixed_small", clip_sample=True, **arguments), {}
    if model.sampler.name == "ddim":
        return DDIMScheduler(clip_sample=True, set_alpha_to_one=True, **arguments), {"use_clipped_model_output": True}
    return DPMSolverMultistepScheduler(solver_order=2, final_sigmas_type="zero", **arguments), {}


def _convert_schedule(schedule: Schedule) -> dict[str, Any]:
    kind = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[schedule.objective]
    abar = alpha_bar(schedule)
    betas = 1.0 - abar / np.append(1.0, abar[:-1])
    return {"timestep_spacing": "trailing", "prediction_type": kind, "trained_betas": betas}


PEERS: dict[str, Callable[[BenchModel, torch.device, Candidate], Candidate]] = {
    PUBLISHED: load_published,
    COMPILED: load_compiled,
    DIFFUSERS: load_diffusers_loop,
}


def load_peers(
    names: tuple[str, ...], model: BenchModel, device: torch.device, eager: Candidate
) -> tuple[list[Candidate], list[Missing]]:
    """Load the peers asked for, or all for this device.

    Args:
        names: keys of `PEERS`; empty for all.
        model: the model.
        device: where to run.
        eager: the baseline, whose networks the diffusers loop uses.

    Returns: what was loaded, and what could not be loaded, with the reason.
    """
    found: list[Candidate] = []
    absent: list[Missing] = []
    for name in names or PEERS:
        asked = bool(names)
        try:
            if name == COMPILED and device.type == "cpu" and not asked:
                raise EngineError(f'compiling takes minutes on a CPU; request it with --peer "{COMPILED}"')
            found.append(PEERS[name](model, device, eager))
        except ImportError as error:
            reason = EngineError(f"the package {error.name} is not installed; `pip install 'bsdiff-rt[peers]'`")
            absent.append(describe_missing(name, name, "-", None, reason, asked))
        except Exception as error:  # packages raise any type; the others are still measured
            absent.append(describe_missing(name, name, "-", None, error, asked))
    return found, absent


def add_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with `published_over_this`: the median ratio of step times within one round.

    It is None if the published network was not measured at that batch size.
    """
    times = {row["batch"]: row["step_times_ms"] for row in rows if row["name"] == PUBLISHED}
    return [
        row
        | {
            "published_over_this": median_ratio(times[row["batch"]], row["step_times_ms"])
            if row["batch"] in times
            else None
        }
        for row in rows
    ]


def to_dict(document: Document) -> dict[str, Any]:
    """Return the content of the JSON file."""
    found = document.to_dict()
    return found | {"rows": add_ratios(found["rows"])}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def compare(
    bundle: Annotated[
        str, typer.Option(help="Model: demo, a bundle's folder, or paper (the full-size network, random weights).")
    ] = "demo",
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:N.")] = "cpu",
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1",
    steps: Annotated[
        int | None, typer.Option(help="Denoiser steps of a whole image.", show_default="the bundle's, at most 10")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds of steps.")] = 5,
    runner: Annotated[
        list[str] | None,
        typer.Option(show_default="all that can be used", help="Runner of this project. Repeat it for several."),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(show_default="all for this device", help=f"Peer: {', '.join(PEERS)}. Repeat it for several."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Write the JSON document to a file.")] = None,
    picture: Annotated[
        Path | None, typer.Option("--plot", help="Draw a plot: .png, .pdf or .svg. Needs matplotlib.")
    ] = None,
) -> None:
    """Print one row for each runner, peer and batch size."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if unknown := set(peer or ()) - set(PEERS):
        raise typer.BadParameter(f"{unknown.pop()!r} is not known; choose from {', '.join(PEERS)}", param_hint="--peer")
    if not all(part.isdecimal() and int(part) for part in batch.split(",")):
        raise typer.BadParameter(f"{batch!r} is not a list of whole numbers above 0", param_hint="--batch")
    if picture is not None:
        plot.check_plot(picture)
    batches = tuple(int(part) for part in batch.split(","))
    settings = BenchSettings(bundle, Wanted(tuple(runner or ())), device, batches, steps, repeats)

    def save(document: Document) -> None:
        if output is not None:
            output.write_text(json.dumps(to_dict(document), indent=1, allow_nan=False) + "\n")

    document = run_benchmark(settings, save, partial(load_peers, tuple(peer or ())))
    found = to_dict(document)
    print_table(*build_table(found))
    for line in write_notes(found):
        print(line)
    if picture is not None:
        plot.draw_plot(found, picture)
    if document.exit_code:
        raise typer.Exit(document.exit_code)


def main() -> None:
    """Run the command; an error of this project becomes one line and its exit code."""
    run_command(app)


if __name__ == "__main__":
    main()
