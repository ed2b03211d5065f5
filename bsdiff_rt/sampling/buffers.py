"""The memory that one sampling step reads and writes.

All of it is allocated before the first step and stays in place, so that a CUDA graph can record the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from bsdiff_rt.errors import SettingsError
from bsdiff_rt.sampling.schedule import Table


@dataclass(frozen=True)
class StepBuffers:
    """Tensors of one step for B images of one size, all on one device: float32 (float64 in tests).

    Attributes:
        rows: [N, 7], the sampler's table. Columns: t, P, Q, A, B, C, S.
        index: [1] int64, the number of the next row.
        row: [1, 7], the current row.
        t: [B], the current timestep, once per image.
        cxr: [B, 1, H, W], in [-1, 1]. A step never writes it.
        x_t: [B, 1, H, W].
        out: [B, 1, H, W].
        x0: [B, 1, H, W], in [-1, 1].
        x0_previous: [B, 1, H, W], in [-1, 1].
        z: [B, 1, H, W], the noise of the current step.
        ring: [R, B, 1, H, W], noise of the coming steps. Step k uses slot k mod R.
        slot: [1] int64, the current slot of the ring.
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
    ring: torch.Tensor
    slot: torch.Tensor

    @classmethod
    def allocate(cls, cxr: torch.Tensor, table: Table, slots: int = 1) -> Self:
        """Allocate the buffers on the device and in the dtype of `cxr`.

        Image buffers start at zero: a coefficient of 0 would not silence a NaN in uninitialised memory.

        Args:
            cxr: [B, 1, H, W], in [-1, 1]. Used itself, not copied.
            table: the sampler.
            slots: number of noise fields in the ring.
        """
        rows = table_rows(table).to(cxr)  # float64 until here; whole timesteps stay exact in float32
        index, slot = (torch.zeros(1, dtype=torch.int64, device=cxr.device) for _ in range(2))
        x_t, out, x0, x0_previous, z = (torch.zeros_like(cxr) for _ in range(5))
        ring = cxr.new_zeros(slots, *cxr.shape)
        row, t = torch.empty_like(rows[:1]), rows.new_empty(len(cxr))
        return cls(rows, index, row, t, cxr, x_t, out, x0, x0_previous, z, ring, slot)

    def start(self, x_T: torch.Tensor) -> None:
        """Prepare for the first step: set `x_t` to `x_T`, select the first row, clear `x0_previous`.

        The first step multiplies `x0_previous` by 0, which would not silence a NaN of an earlier trajectory.

        Args:
            x_T: [B, 1, H, W], draw 0, on any device.

        Raises:
            SettingsError: the noise has another shape than the images. (`copy_` would repeat one image's noise.)
        """
        if x_T.shape != self.x_t.shape:
            raise SettingsError(
                f"noise of shape {tuple(x_T.shape)} for images of {tuple(self.x_t.shape)}; draw one field per image"
            )
        self.index.zero_()
        self.x_t.copy_(x_T, non_blocking=True)
        self.x0_previous.zero_()

    def load_row(self) -> tuple[torch.Tensor, ...]:
        """Load the current row of the table into `t`, and the current noise field into `z`.

        `index` stays on the device, so the host does not wait.

        Returns:
            P, Q, A, B, C, S: views of `row`, [1] each.
        """
        torch.index_select(self.rows, 0, self.index, out=self.row)
        t, *coefficients = self.row.unbind(1)
        self.t.copy_(t)
        torch.remainder(self.index, len(self.ring), out=self.slot)
        torch.index_select(self.ring, 0, self.slot, out=self.z.unsqueeze(0))
        return tuple(coefficients)

    def advance(self) -> None:
        """Keep `x0` as `x0_previous` and select the next row."""
        self.x0_previous.copy_(self.x0)
        self.index.add_(1)


def table_rows(table: Table) -> torch.Tensor:
    """Return the table as [N, 7] float64. Columns: t, P, Q, A, B, C, S."""
    columns = (table.t, table.P, table.Q, table.A, table.B, table.C, table.S)
    return torch.from_numpy(np.stack(columns, axis=1).astype(np.float64))
