"""Measure on a CPU what small parts of a denoiser step take: `python -m benchmarks.step_parts`.

The parts are the time embedding, the projections of each attention (three products against one), and the arithmetic of
the sampling loop. Everything that is compared is measured in turn.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
import typer

from bsdiff_rt.bench.busy import check_load, read_load, write_warning
from bsdiff_rt.bench.networks import make_random_model
from bsdiff_rt.config import Schedule
from bsdiff_rt.networks.blocks import ResBlock, SelfAttention, join_projections, sinusoidal_embedding
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.runners.timing import median_ratio, time_in_turn
from bsdiff_rt.sampling.buffers import StepBuffers
from bsdiff_rt.sampling.sampler import step
from bsdiff_rt.sampling.schedule import sampler_table

CPU = torch.device("cpu")
LOOP_ROUNDS = 200


class _Nothing:
    """Stands for a runner. Its denoiser writes nothing, so a step is the arithmetic of the loop alone."""

    def denoise(self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
        """Leave `out` as it is."""


def embed_time(denoiser: Denoiser, t: torch.Tensor) -> list[torch.Tensor]:
    """Return the projection of a timestep for each residual block: the part of a step that depends on t alone."""
    embedding = F.silu(denoiser.time_embed(sinusoidal_embedding(t, denoiser.config.channels[0])))
    blocks = [block for block in denoiser.modules() if isinstance(block, ResBlock)]
    return [block.time_emb_proj(embedding) for block in blocks if block.time_emb_proj is not None]


@torch.no_grad()
def measure_embedding(denoiser: Denoiser, size: int, rounds: int) -> tuple[float, float]:
    """Return the median seconds of a step, and the share of the time embedding and its projections, in [0, 1]."""
    image, t = torch.zeros(1, 1, size, size), torch.full((1,), 500.0)
    calls = {"embedding": partial(embed_time, denoiser, t), "step": partial(denoiser, image, image, t)}
    times, _ = time_in_turn(calls, rounds, CPU)
    return statistics.median(times["step"]), median_ratio(times["embedding"], times["step"])


@torch.no_grad()
def measure_projections(denoiser: Denoiser, size: int, rounds: int) -> dict[str, float]:
    """Return, for each width of attention, how many times as long three products take as one."""
    ratios = {}
    level_of = {channels: size >> level for level, channels in enumerate(denoiser.config.channels)}
    for block in denoiser.modules():
        if isinstance(block, SelfAttention):
            channels = block.norm.num_channels
            name = f"{level_of[channels] ** 2} x {channels}"
            tokens = torch.randn(1, level_of[channels] ** 2, channels)
            joined = join_projections(copy.deepcopy(block))
            calls = {"three": partial(block.project, tokens), "one": partial(joined.project, tokens)}
            if name not in ratios:
                times, _ = time_in_turn(calls, rounds, CPU)
                ratios[name] = median_ratio(times["three"], times["one"])
    return ratios


def measure_loop(size: int) -> float:
    """Return the median seconds of everything that a step of `ddpm` does besides the denoiser."""
    buffers = StepBuffers.allocate(torch.zeros(1, 1, size, size), sampler_table(Schedule(), "ddpm", 1000))
    do_step: Callable[[], object] = partial(step, _Nothing(), buffers)
    times, _ = time_in_turn({"loop": do_step}, LOOP_ROUNDS, CPU)
    return statistics.median(times["loop"])


def main(
    preset: Annotated[list[str], typer.Option(help="Preset with random weights.")] = ["demo", "paper"],  # noqa: B006
    size: Annotated[int, typer.Option(min=16, help="Side of the images, px.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each measurement.")] = 5,
) -> None:
    """Print what the parts take, and a warning if the machine was busy."""
    signs = check_load(read_load())
    for name in preset:
        denoiser, _ = make_random_model(name, size).load_networks()
        seconds, share = measure_embedding(denoiser, size, rounds)
        print(f"{name}: a step takes {seconds * 1e3:.4g} ms, of which the time embedding is {share:.3%}")
        for tokens, ratio in measure_projections(denoiser, size, rounds).items():
            print(f"{name}: queries, keys and values of {tokens}: three products take {ratio:.2f} times as long as one")
    print(f"arithmetic of the loop behind the denoiser: {measure_loop(size) * 1e3:.3g} ms a step")
    if signs:
        typer.echo(write_warning(signs), err=True)


if __name__ == "__main__":
    typer.run(main)
