"""The parity check: does a runner compute what the eager networks compute in fp32?

Compared are single denoiser calls at the first, middle and last timestep at batch 1 and 2, one call at the largest
batch, the enhancer, and a whole trajectory with fixed noise. Both runners use the same device.

A single call is judged by the network's own output, not by the x0 that follows from it. With objective `eps`, x0 is a
small difference of large numbers near t = T - 1, and fp32 itself is off by 4e-3 there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bsdiff_rt.bundle import Manifest
from bsdiff_rt.config import Schedule, step_count
from bsdiff_rt.errors import EngineError
from bsdiff_rt.imaging.metrics import psnr
from bsdiff_rt.runners.base import Progress, Runner
from bsdiff_rt.sampling.batching import run_enhancer
from bsdiff_rt.sampling.cuda_graph import CapturedSampler
from bsdiff_rt.sampling.noise import ImageNoise, batch_noise
from bsdiff_rt.sampling.sampler import sample
from bsdiff_rt.sampling.schedule import Table, alpha_bar, sampler_table

MAX_STEPS = 50  # of the trajectory; a bundle's own thousand would take longer than building the engine
EQUAL_DB = 200.0  # stands for the PSNR of equal pictures, which is infinite
PICTURE_RANGE = 2.0  # from -1 to 1
DIFFERENCE, PSNR = "largest difference, share of the largest output", "PSNR in dB"
TAKEN = "difference, share of what is removed from the X-ray"


@dataclass(frozen=True)
class Tolerance:
    """How far an engine may differ from eager.

    Attributes:
        call: most difference of a single network call, as a share of the largest output.
        psnr_db: least PSNR of a whole trajectory's picture, in dB.
        taken: most RMS difference of that picture, as a share of the RMS difference between X-ray and eager's picture.
    """

    call: float
    psnr_db: float
    taken: float


# By the precision of the engine's products. `tf32` is fp32 on a GPU, whose tensor cores keep 11 significant bits.
#
# call: in fp32 only the order of sums differs: 3e-6 in the tiny networks, about 1e-5 in the paper's few hundred layers.
# fp16 (11 bits) differed by 5e-3 and bf16 (8 bits) by 4e-2 in the tiny networks with random weights. The error grows
# with the square root of the number of layers. Ten times that is a broken kernel, not rounding.
#
# psnr_db: 45 dB is an RMS error of 1.4 of 255 grey levels, less than the noise of an X-ray. 80 dB is 0.03.
#
# taken: bones are a small part of a picture, so a picture that keeps half of them may be within 45 dB. A tenth is 0.01
# of the bone's energy, the unit of BSR. With the demo model bf16 differs by 0.005.
TOLERANCES = {
    "fp32": Tolerance(1e-4, 80.0, 0.01),
    "tf32": Tolerance(5e-2, 45.0, 0.1),
    "fp16": Tolerance(5e-2, 45.0, 0.1),
    "bf16": Tolerance(3e-1, 45.0, 0.1),
}
LEAST_TAKEN = 2 / 255  # one grey level; a smaller RMS difference from the X-ray counts as this


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        what: which call, with t and batch.
        figure: what `value` and `limit` measure: DIFFERENCE or TAKEN (at most `limit`), or PSNR (at least `limit`).
        value: NaN if an output was not finite. Never NaN in a published engine.
        limit: the tolerance.
        passed: whether the value is within the limit.
        note: the reason if the value is NaN, else "".
    """

    what: str
    figure: str
    value: float
    limit: float
    passed: bool
    note: str = ""

    def __str__(self) -> str:
        bound = "at least" if self.figure == PSNR else "at most"
        found = f"{self.value:.3g}" if isfinite(self.value) else self.note
        return f"{self.what}: {self.figure}: {found}, {bound} {self.limit:g} is needed"


@dataclass(frozen=True)
class Parity:
    """Result of the parity check.

    Attributes:
        reference: what the engine was compared with.
        tolerance: name of the row of TOLERANCES.
        sampler: of the trajectory.
        steps: of the trajectory: the bundle's own, at most MAX_STEPS.
        checks: every comparison, in order.
    """

    reference: str
    tolerance: str
    sampler: str
    steps: int
    checks: tuple[Check, ...]

    @property
    def failed(self) -> list[Check]:
        """Return the comparisons outside tolerance."""
        return [check for check in self.checks if not check.passed]

    @property
    def worst_call(self) -> float:
        """Largest difference of any single call, as a share of the largest output."""
        return max(check.value for check in self.checks if check.figure == DIFFERENCE)

    @property
    def psnr_db(self) -> float:
        """Smallest PSNR of any picture."""
        return min(check.value for check in self.checks if check.figure == PSNR)

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON, with null in place of NaN."""
        checks = [asdict(check) | {"value": check.value if isfinite(check.value) else None} for check in self.checks]
        return asdict(self) | {"checks": checks}


def compare(reference: Runner, candidate: Runner, manifest: Manifest, progress: Progress) -> Parity:
    """Compare an engine with eager: single calls and a whole trajectory.

    Args:
        reference: the bundle's networks, eager, fp32.
        candidate: the engine, on the same device.
        manifest: the bundle's manifest, with schedule and sampler.
        progress: called with each phase.

    Returns:
        Every comparison. `Parity.failed` lists those outside tolerance.

    Raises:
        EngineError: the devices differ, or the engine cannot use the buffers.
    """
    on_gpu = candidate.device.type == "cuda"
    name = "tf32" if candidate.precision == "fp32" and on_gpu else candidate.precision
    sampler, steps = manifest.sampler.name, min(manifest.sampler.steps, MAX_STEPS)
    table = sampler_table(manifest.schedule, sampler, steps)
    pair = _Pair(reference, candidate, TOLERANCES[name], TOLERANCES["tf32" if on_gpu else "fp32"])
    progress("comparing single calls with eager fp32", None)
    checks = [*pair.compare_denoiser(alpha_bar(manifest.schedule)), *pair.compare_enhancer()]
    progress(f"comparing {step_count(steps)} of {sampler} with eager fp32", None)
    checks += pair.compare_trajectory(table)
    return Parity(f"eager fp32 on {reference.device.type}", name, sampler, steps, tuple(checks))


def compare_calls(reference: Runner, candidate: Runner, schedule: Schedule) -> list[Check]:
    """Compare single calls of a runner in fp32 on the CPU with eager.

    Args:
        reference: the model in eager fp32.
        candidate: the runner, on the same device.
        schedule: the diffusion that the denoiser was trained for.

    Returns:
        Every comparison, those of the denoiser first.
    """
    pair = _Pair(reference, candidate, TOLERANCES["fp32"], TOLERANCES["fp32"])
    return [*pair.compare_denoiser(alpha_bar(schedule)), *pair.compare_enhancer()]


class _Pair:
    """The two runners, their inputs and the tolerances.

    Raises:
        EngineError: the devices differ.
    """

    def __init__(self, reference: Runner, candidate: Runner, tolerance: Tolerance, enhancer: Tolerance) -> None:
        if reference.device != candidate.device:
            raise EngineError(f"an engine on {candidate.device} cannot be compared with eager on {reference.device}")
        self._reference, self._candidate = reference, candidate
        self._tolerance, self._enhancer_tolerance = tolerance, enhancer
        smallest, largest = candidate.batch_range
        self._batches = sorted({min(max(batch, smallest), largest or batch) for batch in (1, 2)})
        self._largest = largest if largest and largest > self._batches[-1] else None
        self._size = (candidate.image_size, candidate.image_size)

    def compare_denoiser(self, abar: np.ndarray[Any, np.dtype[np.float64]]) -> Iterator[Check]:
        """Compare calls at the first, middle and last timestep, and one at the last timestep with the largest batch.

        The inputs are what a sampler would give to the denoiser at that timestep.
        """
        calls = [(batch, t) for batch in self._batches for t in (0, len(abar) // 2, len(abar) - 1)]
        if self._largest:
            calls.append((self._largest, len(abar) - 1))
        for batch, t in calls:
            cxr = self._draw_ribs(batch)
            x_t = abar[t] ** 0.5 * cxr + (1 - abar[t]) ** 0.5 * self._draw_noise(0, batch)
            times = torch.full((batch,), float(t), device=cxr.device)
            expected, actual = torch.empty_like(cxr), torch.empty_like(cxr)
            with _exact():
                for part in self._parts(batch):
                    self._reference.denoise(x_t[part], cxr[part], times[part], expected[part])
            self._candidate.denoise(x_t, cxr, times, actual)
            yield _measure_difference(f"denoiser, t = {t}, batch {batch}", expected, actual, self._tolerance)

    def compare_enhancer(self) -> Iterator[Check]:
        """Compare calls of the enhancer on X-rays, which look much like soft-tissue images."""
        for batch in [*self._batches, *([self._largest] if self._largest else [])]:
            cxr = self._draw_ribs(batch)
            expected, actual = torch.empty_like(cxr), torch.empty_like(cxr)
            with _exact():
                for part in self._parts(batch):
                    self._reference.enhance(cxr[part], expected[part])
            self._candidate.enhance(cxr, actual)
            yield _measure_difference(f"enhancer, batch {batch}", expected, actual, self._enhancer_tolerance)

    def _parts(self, batch: int) -> list[slice]:
        """Return a batch in small parts for the reference, which may lack the memory for all of it."""
        step = self._batches[-1]
        return [slice(start, start + step) for start in range(0, batch, step)]

    def compare_trajectory(self, table: Table) -> Iterator[Check]:
        """Compare pictures after both stages; on a GPU also that of the step recorded in a CUDA graph."""
        batch = self._batches[-1]
        cxr = self._draw_ribs(batch)
        with _exact():
            expected, _ = _make_pictures(self._reference, cxr, table, lambda k: self._draw_noise(k, batch))
        actual, broken = _make_pictures(self._candidate, cxr, table, lambda k: self._draw_noise(k, batch))
        for stage, (theirs, ours) in enumerate(zip(expected, actual, strict=True), start=1):
            what = f"picture after stage {stage}, batch {batch}"
            yield _measure_psnr(what, theirs, ours, self._tolerance.psnr_db, broken)
            yield _measure_taken(what, cxr, theirs, ours, self._tolerance.taken)
        if cxr.is_cuda:
            yield self._compare_recorded(cxr, table, actual[0])

    def _compare_recorded(self, cxr: torch.Tensor, table: Table, plain: torch.Tensor) -> Check:
        """Compare the engine's step, recorded and replayed, with the engine itself."""
        side = torch.cuda.Stream(cxr.device)  # the default stream cannot be recorded
        side.wait_stream(torch.cuda.current_stream(cxr.device))
        with torch.cuda.stream(side), CapturedSampler(self._candidate) as sampler:
            x_0 = sampler.sample(cxr, table, lambda k: self._draw_noise(k, len(cxr)))
        side.synchronize()
        return _measure_psnr(f"recorded step, batch {len(cxr)}", plain, x_0, self._tolerance.psnr_db, None)

    def _draw_ribs(self, batch: int) -> torch.Tensor:
        """Return seeded smooth images with bands like ribs, [B, 1, H, W], in [-1, 1].

        X-rays are smooth, and a network that removes bones must find some.
        """
        coarse = np.random.Generator(np.random.Philox(0)).uniform(-1, 1, (batch, 1, 8, 8)).astype(np.float32)
        smooth = F.interpolate(torch.from_numpy(coarse), self._size, mode="bilinear")
        return (0.7 * smooth + 0.3 * _ribs(self._size)).to(self._candidate.device)

    def _draw_noise(self, number: int, batch: int) -> torch.Tensor:
        streams = [ImageNoise(0, bytes([index])) for index in range(batch)]
        return torch.from_numpy(batch_noise(streams, number, self._size)).to(self._candidate.device)


def _ribs(size: tuple[int, int]) -> torch.Tensor:
    """Return ten bands with brighter rims, bent down to both sides: [H, W], in [-1, 1]."""
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in size), indexing="ij")
    wave = 3 * torch.cos(10 * np.pi * (y - 0.5 * x.abs() ** 1.5))
    marrow, cortex = wave.clamp(-1, 1), (1 - wave.abs()).clamp(0, 1)
    return (0.8 * marrow + cortex).clamp(-1, 1)


class _Watched(Runner):
    """Pass every call on, and remember which denoiser outputs were finite.

    One infinity makes the whole picture NaN; this tells at which step it arose.
    """

    name = "watched"

    def __init__(self, runner: Runner) -> None:
        super().__init__(
            device=runner.device,
            precision=runner.precision,
            batch_range=runner.batch_range,
            image_size=runner.image_size,
        )
        self._runner = runner
        self.finite: list[torch.Tensor] = []

    def denoise(self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
        self._runner.denoise(x_t, cxr, t, out)
        self.finite.append(torch.isfinite(out).all())

    def enhance(self, x: torch.Tensor, out: torch.Tensor) -> None:
        self._runner.enhance(x, out)


def _make_pictures(
    runner: Runner, cxr: torch.Tensor, table: Table, draw: Any
) -> tuple[tuple[torch.Tensor, torch.Tensor], int | None]:
    """Return the pictures of both stages, [B, 1, H, W], in [-1, 1] or NaN.

    Also returns the first step at which the denoiser's output was not finite, or None.
    """
    watched = _Watched(runner)
    x_0 = sample(watched, cxr, table, draw)
    broken = next((k for k, finite in enumerate(watched.finite) if not finite), None)
    return (x_0, run_enhancer(watched, x_0)), broken


def _measure_difference(what: str, expected: torch.Tensor, actual: torch.Tensor, tolerance: Tolerance) -> Check:
    if note := _find_not_finite(expected, actual):
        return Check(what, DIFFERENCE, float("nan"), tolerance.call, False, note)
    largest = max(float(expected.abs().max()), 1e-12)
    value = float((expected - actual).abs().max()) / largest
    return Check(what, DIFFERENCE, value, tolerance.call, value <= tolerance.call)


def _measure_psnr(what: str, expected: torch.Tensor, actual: torch.Tensor, limit: float, broken: int | None) -> Check:
    note = "" if broken is None else f"the denoiser's output at step {broken} is NaN or infinite"
    if note := note or _find_not_finite(expected, actual):
        return Check(what, PSNR, float("nan"), limit, False, note)
    value = min(psnr(expected.cpu().numpy(), actual.cpu().numpy(), PICTURE_RANGE), EQUAL_DB)
    return Check(what, PSNR, value, limit, value >= limit)


def _measure_taken(what: str, cxr: torch.Tensor, expected: torch.Tensor, actual: torch.Tensor, limit: float) -> Check:
    if note := _find_not_finite(expected, actual):
        return Check(what, TAKEN, float("nan"), limit, False, note)
    value = _rms(actual - expected) / max(_rms(expected - cxr), LEAST_TAKEN)
    return Check(what, TAKEN, value, limit, value <= limit)


def _rms(difference: torch.Tensor) -> float:
    return float(difference.double().square().mean().sqrt())


def _find_not_finite(expected: torch.Tensor, actual: torch.Tensor) -> str:
    if not torch.isfinite(expected).all():
        return "eager fp32 itself returned NaN or infinity: the bundle is broken"
    return "" if torch.isfinite(actual).all() else "the output is NaN or infinite"


@contextmanager
def _exact() -> Iterator[None]:
    """Compute convolutions in full fp32 in this block. By default torch lets a GPU round their inputs to TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
