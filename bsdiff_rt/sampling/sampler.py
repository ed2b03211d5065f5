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

`sample` is the plain loop. `CapturedSampler` runs the same `step`, recorded once in a CUDA graph and replayed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import torch

from bsdiff_rt.errors import EngineError, SettingsError, one_line, out_of_memory
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.sampling.schedule import Table

Draw = Callable[[int], torch.Tensor]

WARM_UP_STEPS = 3  # libraries choose algorithms and allocate workspaces in the first calls, which cannot be recorded
RING_SLOTS = 4  # noise fields on the device: the copy of one overlaps the steps that use those before it


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
        z: [B, 1, H, W], gathered by the step from its slot of the ring.
        ring: [R, B, 1, H, W], noise sent ahead: step k uses slot k mod R.
        slot: [1] int64, the slot gathered by the step.
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
        """Buffers for images like `cxr` ([B, 1, H, W], which is used itself, not copied), on its device, in its dtype.

        The image buffers start at zero, not uninitialised: a coefficient of 0 would not silence a NaN in them.
        """
        rows = _rows(table).to(cxr)  # float64 until here; whole timesteps stay exact in float32
        index, slot = (torch.zeros(1, dtype=torch.int64, device=cxr.device) for _ in range(2))
        x_t, out, x0, x0_previous, z = (torch.zeros_like(cxr) for _ in range(5))
        ring = cxr.new_zeros(slots, *cxr.shape)
        row, t = torch.empty_like(rows[:1]), rows.new_empty(len(cxr))
        return cls(rows, index, row, t, cxr, x_t, out, x0, x0_previous, z, ring, slot)

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


def _rows(table: Table) -> torch.Tensor:
    """[N, 7] float64, columns t, P, Q, A, B, C, S."""
    columns = (table.t, table.P, table.Q, table.A, table.B, table.C, table.S)
    return torch.from_numpy(np.stack(columns, axis=1).astype(np.float64))


@torch.no_grad()
def sample(runner: Runner, cxr: torch.Tensor, table: Table, draw: Draw) -> torch.Tensor:
    """Stage 1: the soft tissue of each chest X-ray.

    Args:
        runner: runs the denoiser; its batch range must hold B.
        cxr: [B, 1, H, W] float32, in [-1, 1], on the runner's device.
        table: the sampler (`schedule.sampler_table`).
        draw: gives draw k of all images, [B, 1, H, W], on any device: draw 0 is x_T, draw k + 1 is step k's z, asked
            for in that order and only where S is not 0. It is copied on the current stream without waiting, so a
            pinned buffer may be reused only after that copy is done (an event recorded on the next call marks it).

    Returns:
        [B, 1, H, W] float32, in [-1, 1]: the x0 of the last step, a new tensor. Where the denoiser returned an
        infinity or NaN it is NaN, not what the clamp would make of it; looking for that, after the loop, is the
        caller's work.

    Raises:
        SettingsError: the noise is not of the images' shape.
        EngineError: from the runner, for buffers it cannot use.
    """
    buffers = StepBuffers.allocate(cxr, table)
    buffers.start(draw(0))
    adds_noise = (table.S != 0.0).tolist()
    for k in range(table.steps):
        if adds_noise[k]:
            buffers.ring[0].copy_(draw(k + 1), non_blocking=True)
        step(runner, buffers)
    return buffers.x0


def step(runner: Runner, buffers: StepBuffers) -> None:
    """One step of any sampler, in place; reads the row at `index`, leaves the next x_t in `x_t`.

    Args:
        runner: runs the denoiser.
        buffers: `cxr`, `x_t` and (where S is not 0) the slot of `ring` filled in; `index` below N.
    """
    x_t, out, x0, x0_previous, z = buffers.x_t, buffers.out, buffers.x0, buffers.x0_previous, buffers.z
    torch.index_select(buffers.rows, 0, buffers.index, out=buffers.row)  # gathered on the device: no sync
    t, P, Q, A, B, C, S = buffers.row.unbind(1)  # views, [1] each
    buffers.t.copy_(t)
    torch.remainder(buffers.index, len(buffers.ring), out=buffers.slot)
    torch.index_select(buffers.ring, 0, buffers.slot, out=z.unsqueeze(0))

    runner.denoise(x_t, buffers.cxr, buffers.t, out)
    torch.mul(x_t, P, out=x0).addcmul_(out, Q).clamp_(-1.0, 1.0)  # x0 = clamp(P x_t + Q out)
    x0.add_(out, alpha=0)  # of a finite output nothing; of an infinite one NaN, which no clamp may pass off as white
    x_t.mul_(A).addcmul_(x0, B).addcmul_(x0_previous, C).addcmul_(z, S)  # A x_t + B x0 + C x0_previous + S z

    x0_previous.copy_(x0)
    buffers.index.add_(1)


class CapturedSampler:
    """`sample`, with its step recorded once per shape in a CUDA graph and replayed; a context manager.

    Everything a step touches stays in place on the device between calls; a call copies images and table in, sends the
    noise ahead on a stream of its own, replays, and copies the result out. On the CPU, which has no graphs, the step is
    called instead: the same buffers, the same order, the same numbers as `sample`.

    One sampler serves one runner and one thread. A recording is known by what it was made for: batch, height, width,
    dtype and number of steps (the runner is fixed, its memory format with it). The least recently used is released when
    there are more than `graphs`. On CUDA, use it under a stream that is not the default one, and always the same.

    Args:
        runner: runs the denoiser; not closed with the sampler.
        graphs: how many recordings are kept; each holds its buffers and the runner's working memory.
    """

    def __init__(self, runner: Runner, graphs: int = 4) -> None:
        self._runner = runner
        self._limit = graphs
        self._recordings: OrderedDict[tuple[object, ...], _Recording] = OrderedDict()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Release every recording and its device memory; the sampler can be used again."""
        while self._recordings:
            self._recordings.popitem()[1].release()

    @torch.no_grad()
    def sample(self, cxr: torch.Tensor, table: Table, draw: Draw) -> torch.Tensor:
        """Stage 1, as `sampler.sample`: same arguments, same result, to the bit on one runner.

        Raises:
            SettingsError: the noise is not of the images' shape.
            EngineError: from the runner; or the step cannot be recorded, which is never replaced by a slower way.
        """
        recording = self._recording(cxr, table)
        buffers = recording.buffers
        buffers.rows.copy_(_rows(table).to(buffers.rows.dtype), non_blocking=True)
        buffers.cxr.copy_(cxr)
        buffers.start(draw(0))
        adds_noise = (table.S != 0.0).tolist()
        for k in range(table.steps):
            if adds_noise[k]:
                recording.send(k, draw)
            recording.replay(k)
        return buffers.x0.clone()

    def _recording(self, cxr: torch.Tensor, table: Table) -> _Recording:
        key = (*cxr.shape, cxr.dtype, table.steps)
        if key not in self._recordings:
            while len(self._recordings) >= self._limit:  # before recording: its memory may be needed
                self._recordings.popitem(last=False)[1].release()
            kind = _Graph if cxr.is_cuda else _Recording
            self._recordings[key] = kind(self._runner, cxr, table)
        self._recordings.move_to_end(key)
        return self._recordings[key]


class _Recording:
    """A step and its buffers; here, on the CPU, the step is called each time."""

    def __init__(self, runner: Runner, cxr: torch.Tensor, table: Table) -> None:
        self.buffers = StepBuffers.allocate(torch.empty_like(cxr), table, RING_SLOTS)
        self._runner = runner

    def send(self, k: int, draw: Draw) -> None:
        """Put step k's z into its slot of the ring."""
        self.buffers.ring[k % RING_SLOTS].copy_(draw(k + 1))

    def replay(self, k: int) -> None:
        """Do step k, the next one."""
        step(self._runner, self.buffers)

    def release(self) -> None:
        """Wait until nothing uses the buffers any more."""


class _Graph(_Recording):
    """A step recorded in a CUDA graph. Noise is copied by a second stream while earlier steps run."""

    def __init__(self, runner: Runner, cxr: torch.Tensor, table: Table) -> None:
        super().__init__(runner, cxr, table)
        self._copies = torch.cuda.Stream(cxr.device)
        # Slot k mod R has been read by step k.
        self._used = [torch.cuda.Event() for _ in range(RING_SLOTS)]
        self._graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        side, current = torch.cuda.Stream(cxr.device), torch.cuda.current_stream(cxr.device)
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                self.buffers.cxr.zero_()
                for _ in range(WARM_UP_STEPS):
                    self.buffers.index.zero_()
                    step(runner, self.buffers)
            # cuBLAS keeps one workspace per stream, and the graph its address. Cleared before, it is made anew in the
            # graph's own memory; cleared after, nobody else computes in it (torch/_inductor/cudagraph_trees.py).
            torch._C._cuda_clearCublasWorkspaces()
            # Other threads go on allocating pinned memory meanwhile: only this thread's calls are checked.
            with torch.cuda.graph(self._graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                step(runner, self.buffers)
            torch._C._cuda_clearCublasWorkspaces()
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # torch leaves the side stream current when a recording breaks off
            # ... and, as of 2.11, the graph's pool open: every later `empty_cache` of the process would fail (pytorch
            # pull request 180395). Later versions have closed it and say so; then its memory is theirs to give back,
            # which some do at the end of the process alone (pull request 190348).
            with suppress(RuntimeError):
                device = torch.cuda.current_device() if cxr.device.index is None else cxr.device.index
                torch._C._cuda_endAllocateToPool(device, pool)
                torch._C._cuda_releasePool(device, pool)
            if out_of_memory(error):
                raise  # the caller may try a smaller batch
            raise EngineError(
                f"the step of runner {runner.name} cannot be recorded in a CUDA graph: {one_line(error)}; "
                "use another --runner, and please report it"
            ) from error
        current.wait_stream(side)

    def send(self, k: int, draw: Draw) -> None:
        """As above, on the copy stream, once step k - R has read the slot; the step waits for it."""
        slot = k % RING_SLOTS
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._used[slot])
            self.buffers.ring[slot].copy_(draw(k + 1), non_blocking=True)
            sent = self._copies.record_event()
        torch.cuda.current_stream(self.buffers.cxr.device).wait_event(sent)

    def replay(self, k: int) -> None:
        """Replay the graph on the current stream."""
        self._graph.replay()
        self._used[k % RING_SLOTS].record()

    def release(self) -> None:
        """Give the graph's memory back once the device has finished with it."""
        torch.cuda.synchronize(self.buffers.cxr.device)
        self._graph.reset()
