"""How fast each runner is on this machine, and whether it still makes the eager network's picture: the command `bench`.

Everything that is compared is measured in turn (A B C A B C ...), so that a machine that slows down for a while slows
all of it; every ratio is the median of ratios within one round. The device is waited for at both ends of every measured
call, and what happens only once (loading, compiling, recording a CUDA graph) lies before the first measured round.
"""

from __future__ import annotations

import hashlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from bsdiff_rt.bench.candidates import BASELINE, Candidate, Missing, Model, memory_mark, memory_since, missing
from bsdiff_rt.bench.flops import denoiser_work
from bsdiff_rt.errors import EngineError, forget_frames
from bsdiff_rt.runners.timing import median_ratio, time_call, time_in_turn
from bsdiff_rt.sampling.batching import NOISE_THREADS, NoiseAhead, run_enhancer
from bsdiff_rt.sampling.cuda_graph import CapturedSampler
from bsdiff_rt.sampling.noise import ImageNoise
from bsdiff_rt.sampling.sampler import sample
from bsdiff_rt.sampling.schedule import Table, sampler_table

logger = logging.getLogger(__name__)

FEW_STEPS = 10  # of a model whose own sampler takes hundreds; a whole image of those is measured when asked for
FEW_STEPS_FROM = 100
PICTURE_RANGE = 2.0  # from -1 to 1


@dataclass(frozen=True)
class Row:
    """One runner at one batch size. Times are medians of wall-clock seconds or milliseconds for the whole batch.

    Attributes:
        name: what was measured; unique at one batch size.
        runner: its runner, or the peer's package.
        precision: of weights and activations.
        batch: images at once.
        step_ms, step_ms_p95: one denoiser call.
        step_times_ms: all of them, in the order they were measured.
        enhance_ms: one enhancer call, as often as an image; None where it is no part of the image.
        steps: denoiser calls of one image.
        image_s, image_s_p95: noise, `steps` steps and, where the model has it on, stage 2; on CUDA with the step
            recorded in a CUDA graph.
        image_s_uncaptured: the same without the graph; None where there is none to leave out.
        captured_equals_uncaptured: whether both made the same bits; None where there is one way only.
        images_per_second: batch / image_s.
        outside_network_s: image_s less the measured times of its network calls; below 0 where a graph saves more than
            the loop costs.
        full_image_s_extrapolated: all training steps, NOT measured: that many times step_ms, and stage 2. None when
            image_s is that measurement.
        peak_bytes: the most memory it took, in loading or in the first image on top of what loading left behind; on
            CUDA of the device, on Linux's CPU of the process; None elsewhere.
        psnr_step_vs_eager, psnr_vs_eager: one denoiser call at the middle timestep (peak: the eager output's range),
            and the final image (peak: 2, from -1 to 1), in dB, same noise; None when equal or without a baseline.
        equals_eager: whether the final image has the eager one's bits; None without a baseline.
        tflops: arithmetic of one denoiser call over step_ms.
        ceiling: the precision whose measured matrix product rate `share_of_ceiling` refers to.
        share_of_ceiling: tflops over that rate.
        eager_over_this: median ratio of step times within one round.
        warm_up_s: everything before the first measured round: the first step and images, graphs recorded.
    """

    name: str
    runner: str
    precision: str
    batch: int
    step_ms: float
    step_ms_p95: float
    step_times_ms: tuple[float, ...]
    enhance_ms: float | None
    steps: int
    image_s: float
    image_s_p95: float
    image_s_uncaptured: float | None
    captured_equals_uncaptured: bool | None
    images_per_second: float
    outside_network_s: float
    full_image_s_extrapolated: float | None
    peak_bytes: int | None
    psnr_step_vs_eager: float | None
    psnr_vs_eager: float | None
    equals_eager: bool | None
    tflops: float
    ceiling: str | None
    share_of_ceiling: float | None
    eager_over_this: float | None
    warm_up_s: float


@dataclass(frozen=True)
class Plan:
    """What is measured, and how often.

    Attributes:
        model: the networks and their sampler.
        device: where.
        steps: denoiser calls per image.
        repeats: measured rounds of steps.
        image_repeats: measured rounds of whole images.
        ceilings: measured matrix product rates, FLOP/s by precision (`flops.matmul_ceilings`).
    """

    model: Model
    device: torch.device
    steps: int
    repeats: int
    image_repeats: int
    ceilings: dict[str, float] = field(default_factory=dict)

    @cached_property
    def flop(self) -> float:
        """Arithmetic of one denoiser call on one image."""
        return denoiser_work(self.model.denoiser, self.model.size).flop

    def table(self) -> Table:
        """The sampler's coefficients.

        Raises:
            SettingsError: more steps than the model was trained with.
        """
        return sampler_table(self.model.schedule, self.model.sampler.name, self.steps)


def default_steps(model: Model) -> int:
    """The model's own number of steps, or a few of them where it takes hundreds."""
    return model.sampler.steps if model.sampler.steps < FEW_STEPS_FROM else FEW_STEPS


def measure(
    plan: Plan, candidates: Sequence[Candidate], batches: Iterable[int]
) -> Iterator[tuple[list[Row], list[Missing]]]:
    """Rows of each batch size, as soon as it is done, and what could not be measured there.

    Args:
        plan: what and how often.
        candidates: the one named `eager` is the baseline of all others, and comes first.
        batches: batch sizes.

    Raises:
        SettingsError: steps the model does not have.
    """
    for batch in batches:
        with ExitStack() as stack:
            if plan.device.type == "cuda":  # a graph cannot be recorded on the default stream
                stack.enter_context(torch.cuda.stream(torch.cuda.Stream(plan.device)))
            threads = stack.enter_context(ThreadPoolExecutor(NOISE_THREADS))
            rows, absent = _measure_batch(plan, candidates, batch, threads, stack)
        yield rows, absent


def _measure_batch(
    plan: Plan, candidates: Sequence[Candidate], batch: int, threads: ThreadPoolExecutor, stack: ExitStack
) -> tuple[list[Row], list[Missing]]:
    trials: dict[str, Trial] = {}
    failed: dict[str, Exception] = {}
    for candidate in candidates:
        logger.info("batch %d: %s, warming up", batch, candidate.name)
        try:
            trial = stack.enter_context(Trial(candidate, plan, batch, threads))
            trial.rehearse()
            trials[candidate.name] = trial
        except Exception as error:  # backends raise what they like; the others are still measured
            logger.debug("%s failed", candidate.name, exc_info=True)
            forget_frames(error)
            failed[candidate.name] = error
    logger.info("batch %d: %d rounds of steps, %d of images", batch, plan.repeats, plan.image_repeats)
    calls: dict[tuple[str, str], Callable[[], object]] = {(name, "step"): trial.step for name, trial in trials.items()}
    images = {(name, what): call for name, trial in trials.items() for what, call in trial.whole_calls().items()}
    times, broken = time_in_turn(calls, plan.repeats, plan.device)
    image_times, broken_images = time_in_turn(images, plan.image_repeats, plan.device, warm_up=0)  # see `rehearse`
    failed |= {name: error for (name, _), error in (broken | broken_images).items()}
    measured = {name: trial for name, trial in trials.items() if name not in failed}
    rows = [_row(trial, plan, times | image_times, measured.get(BASELINE)) for trial in measured.values()]
    return rows, [
        missing(c.name, c.runner.name, c.runner.precision, batch, failed[c.name])
        for c in candidates
        if c.name in failed
    ]


def percentile_95(seconds: Sequence[float]) -> float:
    """The smallest measured value that 95 % of them do not exceed."""
    return sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1]


def psnr_db(reference: Tensor, other: Tensor, peak: float) -> float | None:
    """Peak signal-to-noise ratio in dB; None (for infinity, which JSON does not have) when they are equal."""
    error = float((reference.double() - other.double()).square().mean())
    return 10.0 * math.log10(peak**2 / error) if error > 0.0 else None


class Trial:
    """One candidate at one batch size: its buffers, its loop, and what it made. A context manager.

    Every trial of a batch size is given the same X-rays and the same noise.
    """

    def __init__(self, candidate: Candidate, plan: Plan, batch: int, threads: ThreadPoolExecutor) -> None:
        self.candidate, self.batch = candidate, batch
        self._plan, self._table, self._threads = plan, plan.table(), threads
        size = plan.model.size
        self._size = (size, size)
        generator = torch.Generator().manual_seed(0)
        self._cxr = (torch.rand(batch, 1, size, size, generator=generator) * 2 - 1).to(plan.device)
        self._x_t = torch.randn(batch, 1, size, size, generator=generator).to(plan.device)
        self._t = torch.full((batch,), float(plan.model.schedule.train_steps // 2), device=plan.device)
        self._noise = [ImageNoise(0, hashlib.sha256(bytes([number])).digest()) for number in range(batch)]
        self._enhanced = torch.empty_like(self._x_t)
        self._sampler = CapturedSampler(candidate.runner) if candidate.loop is None else None
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
        """Do everything once: fills `step_out`, `picture`, `captured_equals_uncaptured`, `peak_bytes`, `warm_up_s`.

        Raises:
            EngineError: NaN or infinity came out.
            Exception: from the runner.
        """
        device = self._plan.device
        mark = memory_mark(device)
        started = time.perf_counter()
        time_call(self.step, device)
        first, *others = self.image_calls().values()
        pictures = [first()]
        taken = memory_since(device, mark)  # of what `infer` does: the uncaptured loop holds buffers of its own
        pictures += [call() for call in others]
        self.warm_up_s = time.perf_counter() - started
        self.picture = pictures[0]
        if not (self.step_out.isfinite().all() and self.picture.isfinite().all()):
            raise EngineError(f"{self.candidate.name}, batch {self.batch}: NaN or infinity came out of the networks")
        if len(pictures) > 1:
            self.captured_equals_uncaptured = torch.equal(pictures[0], pictures[1])
        loading = self.candidate.loading
        if taken is not None and loading is not None:
            self.peak_bytes = max(loading.most, loading.held + taken.most)

    def image_calls(self) -> dict[str, Callable[[], Tensor]]:
        """Whole images to time, by name; the first is the one that counts."""
        runner, own = self.candidate.runner, self.candidate.loop
        if own is not None:
            return {"image": lambda: self._image(lambda *rest: own(runner, *rest))}
        assert self._sampler is not None
        captured = self._sampler.sample
        calls = {"image": lambda: self._image(captured)}
        if self._plan.device.type == "cuda":  # elsewhere the captured sampler runs the same step uncaptured
            calls["uncaptured"] = lambda: self._image(lambda *rest: sample(runner, *rest))
        return calls

    def whole_calls(self) -> dict[str, Callable[[], object]]:
        """What an image takes once: itself, and stage 2, which at paper size outweighs a step."""
        return {**self.image_calls(), **({"enhance": self.enhance} if self._plan.model.enhance else {})}

    def step(self) -> None:
        """One denoiser call, into `step_out`."""
        self.candidate.runner.denoise(self._x_t, self._cxr, self._t, self.step_out)

    def enhance(self) -> None:
        """One enhancer call."""
        self.candidate.runner.enhance(self._cxr, self._enhanced)

    @torch.no_grad()
    def _image(self, loop: Callable[[Tensor, Table, Callable[[int], Tensor]], Tensor]) -> Tensor:
        """From noise to the final image, as the pipeline does it; [B, 1, S, S] in [-1, 1]."""
        pin = self._plan.device.type == "cuda"
        draw = NoiseAhead(self._noise, self._size, self._table, self._threads, pin=pin)
        x_0 = loop(self._cxr, self._table, draw)
        if not self._plan.model.enhance:
            return x_0
        return run_enhancer(self.candidate.runner, x_0)


def _row(trial: Trial, plan: Plan, times: Mapping[tuple[str, str], list[float]], eager: Trial | None) -> Row:
    model, runner, name = plan.model, trial.candidate.runner, trial.candidate.name
    steps_s, images_s, uncaptured_s = (times.get((name, what), []) for what in ("step", "image", "uncaptured"))
    step, image = statistics.median(steps_s), statistics.median(images_s)
    stage_2 = statistics.median(times[name, "enhance"]) if model.enhance else 0.0
    full = model.schedule.train_steps
    eager_s = times.get((BASELINE, "step")) if eager else None
    return Row(
        name=name,
        runner=runner.name,
        precision=runner.precision,
        batch=trial.batch,
        step_ms=step * 1e3,
        step_ms_p95=percentile_95(steps_s) * 1e3,
        step_times_ms=tuple(seconds * 1e3 for seconds in steps_s),
        enhance_ms=stage_2 * 1e3 if model.enhance else None,
        steps=plan.steps,
        image_s=image,
        image_s_p95=percentile_95(images_s),
        image_s_uncaptured=statistics.median(uncaptured_s) if uncaptured_s else None,
        captured_equals_uncaptured=trial.captured_equals_uncaptured,
        images_per_second=trial.batch / image,
        outside_network_s=image - plan.steps * step - stage_2,
        full_image_s_extrapolated=None if plan.steps == full else full * step + stage_2,
        peak_bytes=trial.peak_bytes,
        eager_over_this=median_ratio(eager_s, steps_s) if eager_s else None,
        warm_up_s=trial.warm_up_s,
        **_parity(trial, eager),
        **_share(plan, runner.precision, plan.flop * trial.batch / step),
    )


def _parity(trial: Trial, eager: Trial | None) -> dict[str, Any]:
    """Figures against the baseline; the baseline has none."""
    if eager is None or eager is trial:
        return {"psnr_step_vs_eager": None, "psnr_vs_eager": None, "equals_eager": None}
    peak = float(eager.step_out.max() - eager.step_out.min())
    return {
        "psnr_step_vs_eager": psnr_db(eager.step_out, trial.step_out, peak),
        "psnr_vs_eager": psnr_db(eager.picture, trial.picture, PICTURE_RANGE),
        "equals_eager": torch.equal(eager.picture, trial.picture),
    }


def _share(plan: Plan, precision: str, flop_per_s: float) -> dict[str, Any]:
    """What share of the device's own rate a network reaches.

    torch's fp32 convolutions use TF32 units on CUDA unless told not to, so there an fp32 row is held against TF32.
    """
    ceiling = "tf32" if precision == "fp32" and "tf32" in plan.ceilings else precision
    known = plan.ceilings.get(ceiling)
    return {
        "tflops": flop_per_s / 1e12,
        "ceiling": ceiling if known else None,
        "share_of_ceiling": flop_per_s / known if known else None,
    }
