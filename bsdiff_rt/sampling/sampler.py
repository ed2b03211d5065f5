"""The hot loop: from noise to soft tissue, one denoiser call per step.

Notation. schedule.py makes the table and names its sources; it has one row per step, first step first.

| here                     | in the papers              | meaning                                               |
|--------------------------|----------------------------|-------------------------------------------------------|
| `x_t`                    | x_t                        | noisy soft tissue, replaced by each step              |
| `out`                    | eps_theta, v_theta, x_theta | the denoiser's prediction from x_t, cxr and t        |
| `x0`                     | predicted x_0              | soft tissue as estimated at this step                 |
| `x0_previous`            | x_theta of the step before | the estimate of the step before (Lu 2022, alg. 2)     |
| `z`                      | z, epsilon_t               | fresh standard normal noise (Ho 2020, algorithm 2)    |
| `P`, `Q`                 | from abar_t                | prediction to x0 (Ho 2020, equation 15, for eps)      |
| `A`, `B`, `C`, `S`       | the sampler's coefficients | weights of x_t, x0, x0_previous and z in the next x_t |

A step does device work only. Nothing is allocated or read back, so the host never waits. To watch or stop a run between
steps, wrap the runner: its `denoise` is called once per step. cuda_graph.py records the same step and replays it. On a
GPU everything behind the denoiser is one kernel (fused_step.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bsdiff_rt.runners.base import Runner
from bsdiff_rt.sampling.buffers import StepBuffers
from bsdiff_rt.sampling.deep_cache import list_denoisers
from bsdiff_rt.sampling.fused_step import Denoises, choose_step
from bsdiff_rt.sampling.schedule import Table

# Returns draw k of every image, [B, 1, H, W], on any device.
Draw = Callable[[int], torch.Tensor]


@torch.no_grad()
def sample(runner: Runner, cxr: torch.Tensor, table: Table, draw: Draw, cache_every: int = 1) -> torch.Tensor:
    """Run stage 1: sample the soft-tissue image of each X-ray.

    Args:
        runner: runs the denoiser. Its batch range must include B.
        cxr: [B, 1, H, W] float32, in [-1, 1], on the runner's device.
        table: the sampler (`schedule.sampler_table`).
        draw: returns draw k of all images, [B, 1, H, W], on any device. Draw 0 is x_T; draw k + 1 is the noise of
            step k, requested in that order and only where S is not 0. It is copied on the current stream without
            waiting. Reuse a pinned buffer only after that copy: record an event when the next draw is requested.
        cache_every: compute deep features in every Nth step only (deep_cache.py); 1 is exact.

    Returns:
        [B, 1, H, W] float32, in [-1, 1]: the x0 of the last step, in a new tensor. NaN where the denoiser returned NaN
        or an infinity; the caller checks for that after the loop.

    Raises:
        SettingsError: the noise has another shape than the images.
        EngineError: the runner cannot use the buffers, or cannot reuse deep features.
    """
    denoisers = list_denoisers(runner, len(cxr), cache_every)
    buffers = StepBuffers.allocate(cxr, table)
    buffers.start(draw(0))
    adds_noise = (table.S != 0.0).tolist()
    do_step = choose_step(cxr.device, step)
    for k in range(table.steps):
        if adds_noise[k]:
            buffers.ring[0].copy_(draw(k + 1), non_blocking=True)
        do_step(denoisers[k % cache_every], buffers)
    return buffers.x0


def step(runner: Denoises, buffers: StepBuffers) -> None:
    """Do one step of any sampler, in place: replace `x_t` by the next one.

    Args:
        runner: runs the denoiser.
        buffers: `cxr`, `x_t` and, where S is not 0, the current slot of `ring` are filled; `index` is below N.
    """
    P, Q, A, B, C, S = buffers.load_row()
    x_t, out, x0, x0_previous, z = buffers.x_t, buffers.out, buffers.x0, buffers.x0_previous, buffers.z

    # out = denoiser(x_t, cxr, t)
    runner.denoise(x_t, buffers.cxr, buffers.t, out)
    # x0 = clamp(P x_t + Q out, -1, 1)
    torch.mul(x_t, P, out=x0).addcmul_(out, Q).clamp_(-1.0, 1.0)
    # x0 = x0 + 0 out: nothing changes where out is finite; an infinity becomes NaN instead of a valid white pixel
    x0.add_(out, alpha=0)
    # x_t = A x_t + B x0 + C x0_previous + S z
    x_t.mul_(A).addcmul_(x0, B).addcmul_(x0_previous, C).addcmul_(z, S)

    buffers.advance()
