"""The hot loop: from noise to soft tissue, one denoiser call per step.

Notation (the table and its sources are in schedule.py; one row per step k, first step first):

| here                     | in the papers              | meaning                                               |
|--------------------------|----------------------------|-------------------------------------------------------|
| `x_t`                    | x_t                        | noisy soft tissue, replaced by each step              |
| `out`                    | eps_theta, v_theta or x_theta (x_t, cxr, t) | the denoiser's prediction            |
| `x0`                     | predicted x_0              | soft tissue as estimated at this step                 |
| `x0_previous`            | x_theta of the step before | same, one step earlier (Lu 2022, algorithm 2)         |
| `z`                      | z, epsilon_t               | fresh standard normal noise (Ho 2020, algorithm 2)    |
| `P`, `Q`                 | from abar_t                | prediction to x0 (Ho 2020, equation 15, for eps)      |
| `A`, `B`, `C`, `S`       | the sampler's coefficients | x_t, x0, x0_previous and z to the next x_t            |

Inside the loop there is only device work: the row is gathered by an index that lives on the device, every operation
writes into a buffer made before the loop, and nothing is read back, so nothing waits. To watch or to stop a run between
steps, wrap the runner: its `denoise` is called once per step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from bsdiff_rt.errors import SettingsError
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.schedule import Table


@dataclass(frozen=True)
class StepBuffers:
    """What one step reads and writes: made once, always the same memory, so that a CUDA graph can record the step.

    B images of one size; float32 (tests also run float64), all on one device.

    Attributes:
        rows: [N, 7], the sampler's table, columns t, P, Q, A, B, C, S.
        index: [1] int64, which row is next; advanced by the step.
        row: [1, 7], the row gathered by the step.
        t: [B], the row's timestep, once per image.
        cxr: [B, 1, H, W], in [-1, 1]; never written by a step.
        x_t: [B, 1, H, W].
        out: [B, 1, H, W].
        x0: [B, 1, H, W], in [-1, 1].
        x0_previous: [B, 1, H, W], in [-1, 1].
        z: [B, 1, H, W].
    """

    rows: torch.Tensor
    index: torch.Tensor
    row: torch.Tensor
    t: torch.Tensor
    cxr: torch.Tensor
    x_t: torch.Tensor
    out: torch.Tensor
    x0: torch.Tensor
    x0_previous: torch.Tensor
    z: torch.Tensor

    @classmethod
    def allocate(cls, cxr: torch.Tensor, table: Table) -> Self:
        """Buffers for images like `cxr` ([B, 1, H, W], which is used itself, not copied), on its device, in its dtype.

        The image buffers start at zero, not uninitialised: a coefficient of 0 would not silence a NaN in them.
        """
        columns = np.stack([table.t, table.P, table.Q, table.A, table.B, table.C, table.S], axis=1)
        rows = torch.from_numpy(columns).to(cxr)  # float64 until here; whole timesteps stay exact in float32
        index = torch.zeros(1, dtype=torch.int64, device=cxr.device)
        x_t, out, x0, x0_previous, z = (torch.zeros_like(cxr) for _ in range(5))
        return cls(rows, index, torch.empty_like(rows[:1]), rows.new_empty(len(cxr)), cxr, x_t, out, x0, x0_previous, z)

    def start(self, x_T: torch.Tensor) -> None:
        """Before the first step: the first row is next, x_t is draw 0 ([B, 1, H, W], any device), nothing is left over.

        A previous trajectory's x0 would have weight 0 in the first step, which does not silence a NaN in it.

        Raises:
            SettingsError: the noise is not of the images' shape (`copy_` would spread one image's over the batch).
        """
        if x_T.shape != self.x_t.shape:
            raise SettingsError(
                f"noise of shape {tuple(x_T.shape)} for images of {tuple(self.x_t.shape)}; draw one field per image"
            )
        self.index.zero_()
        self.x_t.copy_(x_T, non_blocking=True)
        self.x0_previous.zero_()


@torch.no_grad()
def sample(runner: Runner, cxr: torch.Tensor, table: Table, draw: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """Stage 1: the soft tissue of each chest X-ray.

    Args:
        runner: runs the denoiser; its batch range must hold B.
        cxr: [B, 1, H, W] float32, in [-1, 1], on the runner's device.
        table: the sampler (`schedule.sampler_table`).
        draw: gives draw k of all images, [B, 1, H, W], on any device: draw 0 is x_T, draw k + 1 is step k's z, asked
            for in that order and only where S is not 0. It is copied on the current stream without waiting, so a
            pinned buffer may be reused only after that copy is done (an event recorded on the next call marks it).

    Returns:
        [B, 1, H, W] float32, in [-1, 1]: the x0 of the last step, a new tensor. An infinity from the denoiser has been
        clamped like any other number; a NaN is still NaN. Looking for them is the caller's work, after the loop.

    Raises:
        SettingsError: the noise is not of the images' shape.
        EngineError: from the runner, for buffers it cannot use.
    """
    buffers = StepBuffers.allocate(cxr, table)
    buffers.start(draw(0))
    adds_noise = (table.S != 0.0).tolist()
    for k in range(table.steps):
        if adds_noise[k]:
            buffers.z.copy_(draw(k + 1), non_blocking=True)
        step(runner, buffers)
    return buffers.x0


def step(runner: Runner, buffers: StepBuffers) -> None:
    """One step of any sampler, in place; reads the row at `index`, leaves the next x_t in `x_t`.

    Args:
        runner: runs the denoiser.
        buffers: `cxr`, `x_t` and (where S is not 0) `z` filled in; `index` below N.
    """
    x_t, out, x0, x0_previous, z = buffers.x_t, buffers.out, buffers.x0, buffers.x0_previous, buffers.z
    torch.index_select(buffers.rows, 0, buffers.index, out=buffers.row)  # gathered on the device: no sync
    t, P, Q, A, B, C, S = buffers.row.unbind(1)  # views, [1] each
    buffers.t.copy_(t)

    runner.denoise(x_t, buffers.cxr, buffers.t, out)
    torch.mul(x_t, P, out=x0).addcmul_(out, Q).clamp_(-1.0, 1.0)  # x0 = clamp(P x_t + Q out)
    x_t.mul_(A).addcmul_(x0, B).addcmul_(x0_previous, C).addcmul_(z, S)  # A x_t + B x0 + C x0_previous + S z

    x0_previous.copy_(x0)
    buffers.index.add_(1)
