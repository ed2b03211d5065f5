"""Times of every candidate, and how far its images are from those of the eager baseline.

Everything that is compared is measured in turn (A B C A B C ...). If the machine slows down for a while, it slows down
all candidates, and each ratio is the median of ratios within one round. Every measured call starts and ends with an
idle device. Loading, compiling and recording a CUDA graph happen before the first measured round.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bsdiff_rt.bench.candidates import Candidate, Missing, describe_missing
from bsdiff_rt.bench.networks import BASELINE
from bsdiff_rt.bench.plan import Plan
from bsdiff_rt.bench.trial import Trial
from bsdiff_rt.errors import forget_frames
from bsdiff_rt.imaging.metrics import psnr
from bsdiff_rt.runners.timing import median_ratio, time_in_turn
from bsdiff_rt.sampling.batching import NOISE_THREADS

logger = logging.getLogger(__name__)

PICTURE_RANGE = 2.0  # from -1 to 1


@dataclass(frozen=True)
class Row:
    """One candidate at one batch size. Times are medians of wall-clock time for the whole batch.

    Attributes:
        name: unique at one batch size.
        runner: its runner, or the peer's package.
        precision: of weights and activations.
        batch: images at once.
        step_ms: one denoiser call; on CUDA replayed from a recording, as `infer` does.
        step_ms_uncaptured: on CUDA one denoiser call without a recording; None elsewhere.
        step_ms_p95: 95th percentile of the same.
        step_times_ms: all denoiser calls, in the order they were measured.
        enhance_ms: one enhancer call; None if stage 2 is no part of the image.
        steps: denoiser calls of one image.
        image_s: noise, `steps` denoiser calls and, if the model has it on, stage 2. On CUDA the step is recorded in a
            CUDA graph.
        image_s_p95: 95th percentile of the same.
        image_s_uncaptured: the same without a CUDA graph; None if there is no graph.
        captured_equals_uncaptured: whether both have the same bits; None if there is no graph.
        images_per_second: batch / image_s.
        outside_network_s: image_s minus the medians of its network calls; None if that is below 0, which means it is
            too small to measure, or that the CUDA graph saves more than the loop costs.
        full_image_s_extrapolated: not measured: `step_ms` times all training steps, plus stage 2. None if image_s is
            that measurement.
        peak_bytes: the most memory of loading and the first image, of the device on CUDA and of the process on Linux;
            None elsewhere.
        psnr_step_vs_eager: one denoiser call at the middle timestep against the baseline, in dB, with the range of the
            baseline's output as peak; None if equal or without a baseline.
        psnr_vs_eager: the final image against the baseline's with the same noise, in dB, peak 2; None as above.
        equals_eager: whether the final image has the baseline's bits; None without a baseline.
        tflops: arithmetic of one denoiser call over step_ms.
        ceiling: the precision whose measured matrix product rate is used for `share_of_ceiling`.
        share_of_ceiling: tflops over that rate.
        eager_over_this: median ratio of step times within one round.
        warm_up_s: seconds of the first step and images, recording of graphs included.
    """

    name: str
    runner: str
    precision: str
    batch: int
    step_ms: float
    step_ms_uncaptured: float | None
    step_ms_p95: float
    step_times_ms: tuple[float, ...]
    enhance_ms: float | None
    steps: int
    image_s: float
    image_s_p95: float
    image_s_uncaptured: float | None
    captured_equals_uncaptured: bool | None
    images_per_second: float
    outside_network_s: float | None
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


def measure_batches(
    plan: Plan, candidates: Sequence[Candidate], batches: Iterable[int]
) -> Iterator[tuple[list[Row], list[Missing]]]:
    """Yield the rows of each batch size when it is done, and what could not be measured there.

    Args:
        plan: what to measure, and how often.
        candidates: the one named `eager` is the baseline of all others.
        batches: batch sizes.

    Raises:
        SettingsError: more steps than the model was trained with.
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
        logger.info("batch %d: warming up %s", batch, candidate.name)
        try:
            trial = stack.enter_context(Trial(candidate, plan, batch, threads))
            trial.rehearse()
            trials[candidate.name] = trial
        except Exception as error:  # backends raise any type; the others are still measured
            logger.debug("%s failed", candidate.name, exc_info=True)
            forget_frames(error)
            failed[candidate.name] = error
    logger.info("batch %d: measuring %d rounds of steps and %d of images", batch, plan.repeats, plan.image_repeats)
    calls = {(name, what): call for name, trial in trials.items() for what, call in trial.list_step_calls().items()}
    images = {(name, what): call for name, trial in trials.items() for what, call in trial.list_whole_calls().items()}
    times, broken = time_in_turn(calls, plan.repeats, plan.device)
    image_times, broken_images = time_in_turn(images, plan.image_repeats, plan.device, warm_up=0)  # rehearsed
    failed |= {name: error for (name, _), error in (broken | broken_images).items()}
    measured = {name: trial for name, trial in trials.items() if name not in failed}
    rows = [_make_row(trial, plan, times | image_times, measured.get(BASELINE)) for trial in measured.values()]
    return rows, [
        describe_missing(c.name, c.runner.name, c.runner.precision, batch, failed[c.name])
        for c in candidates
        if c.name in failed
    ]


def compute_p95(values: Sequence[float]) -> float:
    """Return the smallest of the values that 95 % of them do not exceed."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def compute_psnr(reference: Tensor, other: Tensor, data_range: float) -> float | None:
    """Return the peak signal-to-noise ratio in dB; None for equal tensors, because JSON has no infinity.

    Args:
        reference: any shape.
        other: of the same shape.
        data_range: the largest value minus the smallest one that the tensors can have.
    """
    value = psnr(reference.cpu().numpy(), other.cpu().numpy(), data_range)
    return value if math.isfinite(value) else None


def _make_row(trial: Trial, plan: Plan, times: Mapping[tuple[str, str], list[float]], eager: Trial | None) -> Row:
    model, runner, name = plan.model, trial.candidate.runner, trial.candidate.name
    steps_s, images_s, uncaptured_s = (times.get((name, what), []) for what in ("step", "image", "uncaptured"))
    plain_steps_s = times.get((name, "uncaptured step"), [])
    step, image = statistics.median(steps_s), statistics.median(images_s)
    stage_2 = statistics.median(times[name, "enhance"]) if model.enhance else 0.0
    outside = image - plan.steps * step - stage_2
    full = model.schedule.train_steps
    eager_s = times.get((BASELINE, "step")) if eager else None
    return Row(
        name=name,
        runner=runner.name,
        precision=runner.precision,
        batch=trial.batch,
        step_ms=step * 1e3,
        step_ms_uncaptured=statistics.median(plain_steps_s) * 1e3 if plain_steps_s else None,
        step_ms_p95=compute_p95(steps_s) * 1e3,
        step_times_ms=tuple(seconds * 1e3 for seconds in steps_s),
        enhance_ms=stage_2 * 1e3 if model.enhance else None,
        steps=plan.steps,
        image_s=image,
        image_s_p95=compute_p95(images_s),
        image_s_uncaptured=statistics.median(uncaptured_s) if uncaptured_s else None,
        captured_equals_uncaptured=trial.captured_equals_uncaptured,
        images_per_second=trial.batch / image,
        outside_network_s=outside if outside >= 0 else None,
        full_image_s_extrapolated=None if plan.steps == full else full * step + stage_2,
        peak_bytes=trial.peak_bytes,
        eager_over_this=median_ratio(eager_s, steps_s) if eager_s else None,
        warm_up_s=trial.warm_up_s,
        **_compare(trial, eager),
        **_relate_to_ceiling(plan, runner.precision, plan.flop * trial.batch / step),
    )


def _compare(trial: Trial, eager: Trial | None) -> dict[str, Any]:
    """Return the figures against the baseline; None for the baseline itself."""
    if eager is None or eager is trial:
        return {"psnr_step_vs_eager": None, "psnr_vs_eager": None, "equals_eager": None}
    peak = float(eager.step_out.max() - eager.step_out.min())
    return {
        "psnr_step_vs_eager": compute_psnr(eager.step_out, trial.step_out, peak),
        "psnr_vs_eager": compute_psnr(eager.picture, trial.picture, PICTURE_RANGE),
        "equals_eager": torch.equal(eager.picture, trial.picture),
    }


def _relate_to_ceiling(plan: Plan, precision: str, flop_per_s: float) -> dict[str, Any]:
    """Return the rate of a network, and its share of the device's matrix product rate.

    On CUDA torch's fp32 convolutions use TF32 units by default, so an fp32 row is compared with the TF32 rate there.
    """
    ceiling = "tf32" if precision == "fp32" and "tf32" in plan.ceilings else precision
    known = plan.ceilings.get(ceiling)
    return {
        "tflops": flop_per_s / 1e12,
        "ceiling": ceiling if known else None,
        "share_of_ceiling": flop_per_s / known if known else None,
    }
