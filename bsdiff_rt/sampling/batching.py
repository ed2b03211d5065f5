"""Batches on their way to the device and back: pinned buffers, copies and noise beside the computation.

On a GPU three streams work at the same time. One computes a batch, one copies the next X-rays to the device, and one
copies the last results back. The host only gives orders, up to `BATCHES_IN_FLIGHT` batches ahead. Pinned (page-locked)
memory makes the copies asynchronous. Threads draw the noise ahead. On the CPU the same code runs without streams, one
batch after the other.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from bsdiff_rt.errors import forget_frames, out_of_memory
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.devices import FULL_BATCH
from bsdiff_rt.sampling.cuda_graph import CapturedSampler
from bsdiff_rt.sampling.noise import ImageNoise, batch_noise
from bsdiff_rt.sampling.sampler import sample
from bsdiff_rt.sampling.schedule import Table

logger = logging.getLogger(__name__)

MEMORY_SHARE = 0.8  # of the free device memory; recordings and fragments need the rest
BATCHES_IN_FLIGHT = 3  # one is copied to the device, one is computed, one is copied back
NOISE_THREADS = 2
NOISE_AHEAD = 8  # draws; so a thread may be late by some milliseconds while the device goes on


Taken = tuple[NDArray[np.float32], float]  # one result, [S, S], and its share of the seconds of its batch


class HostBatch:
    """Pinned memory for one batch: X-rays and results. Each result is taken once.

    Attributes:
        cxr: [B, 1, S, S] float32.
        soft_tissue: [B, 1, S, S] float32, valid when the device is done.
    """

    def __init__(self, shape: tuple[int, ...], pin: bool, released: Callable[[HostBatch, float], None]) -> None:
        self.cxr, self.soft_tissue = (torch.empty(shape, pin_memory=pin) for _ in range(2))
        self._released = released
        self._lock = threading.Lock()
        self._left = self._count = 0
        self._clock: _Clock = _Clock()

    def order(self, count: int, clock: _Clock) -> None:
        """Expect that `count` results are taken. `clock` waits for the device."""
        self._left = self._count = count
        self._clock = clock

    def take(self, number: int) -> Taken:
        """Wait for the device and copy one result. After the last result the memory can be used again.

        Args:
            number: place of the image in the batch.

        Returns:
            The result, [S, S] float32, and its share of the seconds that the batch took.

        Raises:
            RuntimeError: the device failed after the batch was ordered.
        """
        try:
            self._clock.wait()
            image: NDArray[np.float32] = self.soft_tissue[number, 0].numpy().copy()
            return image, self._clock.busy_s / self._count
        finally:
            with self._lock:
                self._left -= 1
                last = self._left == 0
            if last:
                self._released(self, self._clock.busy_s)


class Suppressor:
    """Run both stages on batch after batch. A context manager that holds buffers, streams, threads and recordings.

    Args:
        runner: both networks. It is not closed here.
        table: the sampler.
        enhance: whether stage 2 runs.
        batch: the largest batch.
        cache_every: compute deep features in every Nth step only (deep_cache.py); 1 is exact.
        step_down: whether a step that cannot be recorded in a CUDA graph is called each time, with a warning.

    Attributes:
        smallest: the runner's smallest batch. Smaller ones are filled up.
        busy_s: seconds that the device or CPU took for all batches whose results have been taken. It includes what the
            networks wait for between steps, such as noise.
    """

    def __init__(
        self,
        runner: Runner,
        table: Table,
        *,
        enhance: bool,
        batch: int,
        cache_every: int = 1,
        step_down: bool = False,
    ) -> None:
        self._runner, self._table, self._enhance = runner, table, enhance
        self.smallest = runner.batch_range[0]
        self._cuda = runner.device.type == "cuda"
        self._size = (runner.image_size, runner.image_size)
        self._sampler = CapturedSampler(runner, cache_every=cache_every, step_down=step_down)
        self._draws = ThreadPoolExecutor(NOISE_THREADS)
        self._free: queue.SimpleQueue[HostBatch] = queue.SimpleQueue()
        shape = (max(batch, self.smallest), 1, *self._size)
        for _ in range(BATCHES_IN_FLIGHT):
            self._free.put(HostBatch(shape, self._cuda, self._release))
        self._streams = [torch.cuda.Stream(runner.device) for _ in range(3)] if self._cuda else []
        self._lock = threading.Lock()
        self.busy_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._sampler.close()
        self._draws.shutdown(cancel_futures=True)

    @torch.no_grad()
    def submit(self, cxr: Sequence[NDArray[np.float32]], noise: Sequence[ImageNoise]) -> HostBatch:
        """Order both stages on one batch. On a GPU this returns before they are done.

        Waits while `BATCHES_IN_FLIGHT` batches have results that were not taken. A batch that is too small for the
        runner is filled up with copies of its last image, whose results are dropped.

        Args:
            cxr: B images, [S, S] float32, in [-1, 1].
            noise: one stream per image.

        Returns:
            The batch, from which each result is taken: [S, S] float32, in [-1, 1], or NaN if the model failed.

        Raises:
            EngineError: the runner does not take this batch or image size.
            RuntimeError: the backend failed, for example for lack of memory. Recordings and unused device memory were
                released.
        """
        host = self._free.get()
        missing = max(0, self.smallest - len(cxr))
        try:
            clock = self._order(host, [*cxr, *[cxr[-1]] * missing], [*noise, *[noise[-1]] * missing])
        except BaseException as error:
            try:
                if self._cuda:  # copies already ordered may still use the batch's memory
                    torch.cuda.synchronize(self._runner.device)
                forget_frames(error)
                self._sampler.close()
                if self._cuda:
                    torch.cuda.empty_cache()
            finally:  # also after a lasting device error: without its memory a later call would wait for ever
                self._free.put(host)
            raise
        host.order(len(cxr), clock)
        return host

    def _order(self, host: HostBatch, cxr: Sequence[NDArray[np.float32]], noise: Sequence[ImageNoise]) -> _Clock:
        count = len(cxr)
        np.stack(cxr, out=host.cxr[:count, 0].numpy())
        clock = _DeviceClock() if self._cuda else _Clock()
        with self._on("upload"):
            x = host.cxr[:count].to(self._runner.device, non_blocking=True)
        draw = NoiseAhead(noise, self._size, self._table, self._draws, pin=self._cuda)
        with self._on("compute", after="upload", using=x):
            clock.start()
            x_0 = self._sampler.sample(x, self._table, draw)
            if self._enhance:
                x_0 = run_enhancer(self._runner, x_0)
            clock.stop()
        with self._on("download", after="compute", using=x_0):
            host.soft_tissue[:count].copy_(x_0, non_blocking=True)
            clock.arrive()
        return clock

    def _release(self, host: HostBatch, busy_s: float) -> None:
        with self._lock:
            self.busy_s += busy_s
        self._free.put(host)

    def _on(
        self, name: str, after: str | None = None, using: torch.Tensor | None = None
    ) -> AbstractContextManager[object]:
        """Give the work of this block to a stream. On the CPU nothing happens.

        Args:
            name: upload, compute or download.
            after: the stream whose work so far comes first.
            using: a tensor of another stream, which is kept until this stream has used it.
        """
        if not self._cuda:
            return nullcontext()
        order = ("upload", "compute", "download")
        stream = self._streams[order.index(name)]
        if after is not None:
            stream.wait_stream(self._streams[order.index(after)])
        if using is not None:
            using.record_stream(stream)
        return torch.cuda.stream(stream)


class _Clock:
    """Clock of a batch on the CPU, where work is done when it is ordered."""

    def __init__(self) -> None:
        self.busy_s = 0.0

    def start(self) -> None:
        """Note that the model begins."""
        self.busy_s = -time.perf_counter()

    def stop(self) -> None:
        """Note that the model ends."""
        self.busy_s += time.perf_counter()

    def arrive(self) -> None:
        """Note that the results are on the host."""

    def wait(self) -> None:
        """Wait until the results are on the host."""


class _DeviceClock(_Clock):
    """Clock of a batch on a GPU, based on CUDA events of the current stream."""

    def __init__(self) -> None:
        super().__init__()
        self._began, self._ended, self._arrived = (torch.cuda.Event(enable_timing=True) for _ in range(3))

    def start(self) -> None:
        self._began.record()

    def stop(self) -> None:
        self._ended.record()

    def arrive(self) -> None:
        self._arrived.record()

    def wait(self) -> None:
        self._arrived.synchronize()
        self.busy_s = self._began.elapsed_time(self._ended) / 1e3


def choose_batch(runner: Runner) -> int:
    """Return how many images to run at once: as many as fill the device and fit into its free memory.

    A CPU gains nothing from a batch. `FULL_BATCH` images fill a GPU. One denoiser call at the runner's smallest batch
    shows how much memory an image needs. If even that call fails, the smallest batch is returned, and the run will
    report the failure for each file.
    """
    low, high = runner.batch_range
    if runner.device.type == "cpu":
        return low
    full = FULL_BATCH if high is None else min(FULL_BATCH, high)
    free_before, _ = torch.cuda.mem_get_info(runner.device)
    torch.cuda.reset_peak_memory_stats(runner.device)
    in_use = torch.cuda.memory_allocated(runner.device)
    try:
        image, t = torch.zeros(low, 1, runner.image_size, runner.image_size, device=runner.device), torch.zeros(low)
        runner.denoise(image, torch.zeros_like(image), t.to(runner.device), torch.empty_like(image))
        torch.cuda.synchronize(runner.device)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        logger.warning("Out of memory with %d images at once. %.0f MB were free.", low, free_before / 1e6)
        forget_frames(error)
        torch.cuda.empty_cache()
        return low
    free, _ = torch.cuda.mem_get_info(runner.device)
    per_image = max(torch.cuda.max_memory_allocated(runner.device) - in_use, free_before - free, 1) / low
    fits = int(MEMORY_SHARE * free_before / per_image)
    batch = max(low, min(full, fits))
    logger.info("batch %d: %.0f MB per image, %.0f MB free", batch, per_image / 1e6, free_before / 1e6)
    return batch


def suppress(
    runner: Runner, cxr: NDArray[np.float32], table: Table, noise: list[ImageNoise], *, enhance: bool
) -> NDArray[np.float32]:
    """Run both stages on one batch. They chain in device memory, in float32.

    Args:
        runner: both networks.
        cxr: [B, 1, S, S] float32, in [-1, 1].
        table: the sampler.
        noise: one stream per image.
        enhance: whether stage 2 runs.

    Returns:
        [B, 1, S, S] float32, in [-1, 1], or NaN if the model failed; on the host.
    """
    size = (cxr.shape[-2], cxr.shape[-1])
    x_0 = sample(
        runner,
        torch.from_numpy(cxr).to(runner.device),
        table,
        lambda number: torch.from_numpy(batch_noise(noise, number, size)),
    )
    if enhance:
        x_0 = run_enhancer(runner, x_0)
    return np.asarray(x_0.cpu().numpy(), dtype=np.float32)


def run_enhancer(runner: Runner, x_0: torch.Tensor) -> torch.Tensor:
    """Run stage 2.

    Args:
        runner: runs the enhancer.
        x_0: [B, 1, S, S] float32, in [-1, 1].

    Returns:
        [B, 1, S, S] float32, in [-1, 1]; NaN where the enhancer returned NaN or an infinity.
    """
    out = torch.empty_like(x_0)
    runner.enhance(x_0, out)
    zero = out * 0  # NaN where `out` is infinite: the clamp alone would make a white or black pixel of it
    return out.clamp_(-1.0, 1.0).add_(zero)


class NoiseAhead:
    """Noise of one batch for `sampler.sample`, drawn ahead by threads into a ring of host memory.

    Args:
        streams: one per image.
        size: (height, width), in px.
        table: the sampler. It determines which draws are requested.
        threads: draw the noise.
        pin: whether the memory is pinned, so that the device copies it while the host goes on.
    """

    def __init__(
        self,
        streams: Sequence[ImageNoise],
        size: tuple[int, int],
        table: Table,
        threads: ThreadPoolExecutor,
        *,
        pin: bool,
    ) -> None:
        self._streams, self._size, self._threads, self._pin = streams, size, threads, pin
        self._waiting = deque([0, *(k + 1 for k, S in enumerate(table.S) if S != 0.0)])
        self._drawn: deque[tuple[int, Future[torch.Tensor]]] = deque()
        self._last: torch.Tensor | None = None
        self._last_stream: torch.cuda.Stream | None = None
        for _ in range(min(NOISE_AHEAD, len(self._waiting))):
            self._start_draw(torch.empty(len(streams), 1, *size, pin_memory=pin), None)

    def __call__(self, number: int) -> torch.Tensor:
        """Return draw `number`, [B, 1, H, W] float32, valid until the next call.

        Copies that the current stream was given before the next call are safe. The next call may come from another
        stream: the computing stream copies x_T, a second one copies z.

        Raises:
            ValueError: this is not the next draw of the table.
        """
        if self._last is not None and self._waiting:
            # The device may still copy the last draw. Its memory is filled again after the copies that its stream has
            # been given so far.
            self._start_draw(self._last, self._last_stream.record_event() if self._last_stream else None)
        expected, draw = self._drawn.popleft() if self._drawn else (None, None)
        if draw is None or expected != number:
            raise ValueError(f"draw {number} was requested, but the next one of this table is {expected}")
        self._last = draw.result()
        self._last_stream = torch.cuda.current_stream() if self._pin else None
        return self._last

    def _start_draw(self, memory: torch.Tensor, copied: torch.cuda.Event | None) -> None:
        number = self._waiting.popleft()

        def fill() -> torch.Tensor:
            if copied is not None:
                copied.synchronize()
            batch_noise(self._streams, number, self._size, out=memory.numpy())
            return memory

        self._drawn.append((number, self._threads.submit(fill)))
