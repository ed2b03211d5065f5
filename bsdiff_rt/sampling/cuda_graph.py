"""The sampling step recorded once in a CUDA graph and replayed for every step of every batch."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import torch

from bsdiff_rt.errors import EngineError, one_line, out_of_memory
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.sampling.buffers import StepBuffers, table_rows
from bsdiff_rt.sampling.deep_cache import list_denoisers
from bsdiff_rt.sampling.fused_step import choose_step
from bsdiff_rt.sampling.sampler import Draw, step
from bsdiff_rt.sampling.schedule import Table

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 3  # libraries choose algorithms and allocate workspaces in the first calls, which cannot be recorded
RING_SLOTS = 4  # noise fields on the device: the copy of one overlaps the steps that use those before it


class CapturedSampler:
    """Sample like `sampler.sample`, with the step recorded once per shape in a CUDA graph. A context manager.

    The buffers stay in place between calls. A call copies images and table in, sends the noise ahead on a second
    stream, replays the graph once per step, and copies the result out. The CPU has no graphs: there the step is called
    instead, with the same buffers in the same order.

    One sampler serves one runner and one thread. The key of a recording is batch, height, width, dtype and number of
    steps. If there are more than `graphs` recordings, the least recently used one is released. On CUDA, always use the
    sampler under the same stream, which must not be the default stream.

    Args:
        runner: runs the denoiser. `close` does not close it.
        graphs: how many recordings are kept. Each holds its buffers and the runner's working memory.
        cache_every: compute deep features in every Nth step only (deep_cache.py); 1 is exact. Above 1 a recording has
            two graphs: one of a whole step, one of a step with the first level alone.
        step_down: whether a step that cannot be recorded is called each time, with a warning. Otherwise it is an error.
    """

    def __init__(self, runner: Runner, graphs: int = 4, *, cache_every: int = 1, step_down: bool = False) -> None:
        self._runner = runner
        self._cache_every = cache_every
        self._limit = graphs
        self._step_down = step_down
        self._recordings: OrderedDict[tuple[object, ...], _Recording] = OrderedDict()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Release every recording and its device memory. The sampler can be used again."""
        while self._recordings:
            self._recordings.popitem()[1].release()

    @torch.no_grad()
    def sample(self, cxr: torch.Tensor, table: Table, draw: Draw) -> torch.Tensor:
        """Run stage 1 with the arguments of `sampler.sample`. The result has the same bits on the same runner.

        Raises:
            SettingsError: the noise has another shape than the images.
            EngineError: the runner cannot use the buffers or reuse deep features, or the step cannot be recorded and
                `step_down` is off.
        """
        recording = self._recording(cxr, table)
        buffers = recording.buffers
        buffers.rows.copy_(table_rows(table).to(buffers.rows.dtype), non_blocking=True)
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
            self._recordings[key] = self._record(cxr, table)
        self._recordings.move_to_end(key)
        return self._recordings[key]

    def _record(self, cxr: torch.Tensor, table: Table) -> _Recording:
        kind = _Graph if cxr.is_cuda else _Recording
        try:
            return kind(self._runner, cxr, table, self._cache_every)
        except EngineError as error:
            if not self._step_down:
                raise
            logger.warning("%s The step is called each time instead, which is slower.", error)
            return _Plain(self._runner, cxr, table, self._cache_every)


class _Recording:
    """A step and its buffers on the CPU, where the step is called each time."""

    def __init__(self, runner: Runner, cxr: torch.Tensor, table: Table, cache_every: int) -> None:
        self.buffers = StepBuffers.allocate(torch.empty_like(cxr), table, RING_SLOTS)
        self._denoisers = list_denoisers(runner, len(cxr), cache_every)

    def send(self, k: int, draw: Draw) -> None:
        """Put the noise of step k into its slot of the ring."""
        self.buffers.ring[k % RING_SLOTS].copy_(draw(k + 1))

    def replay(self, k: int) -> None:
        """Do step k, the next one."""
        self._do_step(k)

    def release(self) -> None:
        """Wait until nothing uses the buffers any more."""

    def _do_step(self, k: int) -> None:
        denoiser = self._denoisers[k % len(self._denoisers)]
        choose_step(self.buffers.cxr.device, step)(denoiser, self.buffers)


class _Plain(_Recording):
    """A step on a GPU that cannot be recorded, and is called each time."""


class _Graph(_Recording):
    """A step recorded in a CUDA graph. A second stream copies noise while earlier steps run."""

    def __init__(self, runner: Runner, cxr: torch.Tensor, table: Table, cache_every: int) -> None:
        super().__init__(runner, cxr, table, cache_every)
        self._copies = torch.cuda.Stream(cxr.device)
        # Slot k mod R has been read by step k.
        self._used = [torch.cuda.Event() for _ in range(RING_SLOTS)]
        # The first is of a whole step. A second one, of the first level alone, serves all steps in between.
        self._graphs = [torch.cuda.CUDAGraph() for _ in self._denoisers[:2]]
        pool = torch.cuda.graph_pool_handle()
        side, current = torch.cuda.Stream(cxr.device), torch.cuda.current_stream(cxr.device)
        side.wait_stream(current)
        try:
            self._record(side, pool)
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # torch leaves the side stream current when a recording fails
            _close_pool(cxr.device, pool)
            if out_of_memory(error):
                raise  # the caller may try a smaller batch
            raise EngineError(
                f"runner {runner.name}: its step cannot be recorded in a CUDA graph ({one_line(error)}). "
                "Use another runner, and please report this."
            ) from error
        current.wait_stream(side)

    def _record(self, side: torch.cuda.Stream, pool: Any) -> None:
        """Warm up and record the steps on the stream `side`, with memory from `pool`.

        Graphs may share a pool: they run one after the other, and what lasts lies outside of it.
        """
        with torch.cuda.stream(side):
            self.buffers.cxr.zero_()
            for k in range(WARM_UP_STEPS * len(self._graphs)):
                self.buffers.index.zero_()
                self._do_step(k // WARM_UP_STEPS)
        # cuBLAS keeps one workspace per stream, and the graph keeps its address. Cleared before, the workspace is made
        # anew in the graph's own memory. Cleared after, nobody else uses it (torch/_inductor/cudagraph_trees.py).
        torch._C._cuda_clearCublasWorkspaces()
        # Other threads go on allocating pinned memory meanwhile: only this thread's calls are checked.
        for k, graph in enumerate(self._graphs):
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                self._do_step(k)
        torch._C._cuda_clearCublasWorkspaces()

    def send(self, k: int, draw: Draw) -> None:
        """Copy the noise of step k on the copy stream after step k - R has read the slot. Step k waits for the copy."""
        slot = k % RING_SLOTS
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._used[slot])
            self.buffers.ring[slot].copy_(draw(k + 1), non_blocking=True)
            sent = self._copies.record_event()
        torch.cuda.current_stream(self.buffers.cxr.device).wait_event(sent)

    def replay(self, k: int) -> None:
        """Replay the graph of step k on the current stream."""
        self._graphs[min(k % len(self._denoisers), 1)].replay()
        self._used[k % RING_SLOTS].record()

    def release(self) -> None:
        """Wait for the device, then return the graphs' memory."""
        torch.cuda.synchronize(self.buffers.cxr.device)
        for graph in self._graphs:
            graph.reset()


def record_call(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return a function that does a call's work on a device without the time to start each kernel.

    On CUDA the call is recorded in a CUDA graph, which the function replays. It must have been made before, so that
    nothing is set up while it is recorded, and the current stream must not be the default one. On a CPU the call itself
    is returned.

    Args:
        call: uses the same buffers each time, on the current stream.
        device: where it works.

    Raises:
        RuntimeError: the call cannot be recorded.
    """
    if device.type == "cpu":
        return call
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream(device)
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        call()
    return graph.replay


def _close_pool(device: torch.device, pool: Any) -> None:
    """Close the memory pool of a recording that failed.

    torch 2.11 leaves it open, and every later `empty_cache` of the process would fail (pytorch pull request 180395).
    Later versions close it themselves and raise here. Some of those return the memory only when the process ends (pull
    request 190348).
    """
    with suppress(RuntimeError):
        index = torch.cuda.current_device() if device.index is None else device.index
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
