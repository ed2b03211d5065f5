"""One candidate at one batch size, with its buffers and its sampling loop."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import torch
from torch import Tensor

from bsdiff_rt.bench.candidates import Candidate
from bsdiff_rt.bench.memory import measure_memory, start_memory_watch
from bsdiff_rt.bench.plan import Plan
from bsdiff_rt.errors import EngineError
from bsdiff_rt.runners.timing import time_call
from bsdiff_rt.sampling.batching import NoiseAhead, run_enhancer
from bsdiff_rt.sampling.cuda_graph import CapturedSampler, record_call
from bsdiff_rt.sampling.noise import ImageNoise
from bsdiff_rt.sampling.sampler import sample
from bsdiff_rt.sampling.schedule import Table


class Trial:
    """One candidate at one batch size: its buffers, its loop, and its results. A context manager.

    Every trial of a batch size has the same X-rays and the same noise.

    Attributes:
        step: runs one denoiser call, into `step_out`; on CUDA from a recording, once `rehearse` has made it.
        step_out: output of the latest denoiser call, [B, 1, S, S].
        picture: the first whole image, [B, 1, S, S] in [-1, 1].
        captured_equals_uncaptured: whether the image has the same bits without a CUDA graph; None if there is one way.
        peak_bytes: the most memory of loading and the first image; None if it cannot be measured.
        warm_up_s: seconds of everything before the first measured round.
    """

    def __init__(self, candidate: Candidate, plan: Plan, batch: int, threads: ThreadPoolExecutor) -> None:
        self.candidate, self.batch = candidate, batch
        self._plan, self._table, self._threads = plan, plan.make_table(), threads
        size = plan.model.size
        self._size = (size, size)
        generator = torch.Generator().manual_seed(0)
        self._cxr = (torch.rand(batch, 1, size, size, generator=generator) * 2 - 1).to(plan.device)
        self._x_t = torch.randn(batch, 1, size, size, generator=generator).to(plan.device)
        self._t = torch.full((batch,), float(plan.model.schedule.train_steps // 2), device=plan.device)
        self._noise = [ImageNoise(0, hashlib.sha256(bytes([number])).digest()) for number in range(batch)]
        self._enhancer_out = torch.empty_like(self._x_t)
        self._sampler = CapturedSampler(candidate.runner) if candidate.loop is None else None
        self.step: Callable[[], object] = self.call_step
        self.step_out = torch.empty_like(self._x_t)
        self.picture = torch.empty_like(self._x_t)
        self.captured_equals_uncaptured: bool | None = None
        self.peak_bytes: int | None = None
        self.warm_up_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._sampler is not None:
            self._sampler.close()

    def rehearse(self) -> None:
        """Do everything once and fill the attributes.

        Raises:
            EngineError: an output has a NaN or an infinity.
            Exception: the runner failed.
        """
        device = self._plan.device
        start = start_memory_watch(device)
        started = time.perf_counter()
        time_call(self.call_step, device)
        first, *others = self.list_image_calls().values()
        pictures = [first()]
        memory = measure_memory(device, start)  # before the uncaptured loop, which has buffers that infer never has
        pictures += [call() for call in others]
        self.step = self._record_step()
        self.warm_up_s = time.perf_counter() - started
        self.picture = pictures[0]
        if not (self.step_out.isfinite().all() and self.picture.isfinite().all()):
            raise EngineError(f"{self.candidate.name}, batch {self.batch}: the output has a NaN or an infinity")
        if len(pictures) > 1:
            self.captured_equals_uncaptured = torch.equal(pictures[0], pictures[1])
        loading = self.candidate.loading
        if memory is not None and loading is not None:
            self.peak_bytes = max(loading.most, loading.held + memory.most)

    def list_step_calls(self) -> dict[str, Callable[[], object]]:
        """Return the ways to make a denoiser call, by name; the first one is what `infer` does."""
        if self._plan.device.type == "cuda" and self._sampler is not None:
            return {"step": self.step, "uncaptured step": self.call_step}
        return {"step": self.step}

    def list_image_calls(self) -> dict[str, Callable[[], Tensor]]:
        """Return the ways to make a whole image, by name; the first one is what `infer` does."""
        runner, own = self.candidate.runner, self.candidate.loop
        if own is not None:
            return {"image": lambda: self._make_image(lambda *rest: own(runner, *rest))}
        assert self._sampler is not None
        captured = self._sampler.sample
        calls = {"image": lambda: self._make_image(captured)}
        if self._plan.device.type == "cuda":  # elsewhere the captured sampler runs the same step uncaptured
            calls["uncaptured"] = lambda: self._make_image(lambda *rest: sample(runner, *rest))
        return calls

    def list_whole_calls(self) -> dict[str, Callable[[], object]]:
        """Return the image calls and the enhancer call, which at paper size takes longer than a step."""
        return {**self.list_image_calls(), **({"enhance": self.enhance} if self._plan.model.enhance else {})}

    def _record_step(self) -> Callable[[], object]:
        """Return the denoiser call as `infer` makes it: on CUDA replayed from a CUDA graph.

        Called, some 700 kernels would be started one by one, and the processor would be timed. A peer with a loop of
        its own is called.
        """
        if self._sampler is None:
            return self.call_step
        self.call_step()  # a runner may insist that its latest call was the one that is recorded
        return record_call(self.call_step, self._plan.device)

    def call_step(self) -> None:
        """Run one denoiser call, into `step_out`."""
        self.candidate.runner.denoise(self._x_t, self._cxr, self._t, self.step_out)

    def enhance(self) -> None:
        """Run one enhancer call."""
        self.candidate.runner.enhance(self._cxr, self._enhancer_out)

    @torch.no_grad()
    def _make_image(self, loop: Callable[[Tensor, Table, Callable[[int], Tensor]], Tensor]) -> Tensor:
        """Return the final images as a folder run makes them, [B, 1, S, S] in [-1, 1]; NaN where a network failed."""
        pin = self._plan.device.type == "cuda"
        draw = NoiseAhead(self._noise, self._size, self._table, self._threads, pin=pin)
        x_0 = loop(self._cxr, self._table, draw)
        return run_enhancer(self.candidate.runner, x_0) if self._plan.model.enhance else x_0
