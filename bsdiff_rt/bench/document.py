"""One run of a benchmark: from settings to a document of conditions and rows."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bsdiff_rt.bench.busy import check_load, check_rates, check_tail, write_warning
from bsdiff_rt.bench.candidates import Candidate, Missing, Wanted, load_candidates
from bsdiff_rt.bench.conditions import describe_conditions, name_device, read_clocks
from bsdiff_rt.bench.flops import (
    count_denoiser_parts,
    count_denoiser_work,
    count_enhancer_work,
    measure_copy_rate,
    measure_matmul_rates,
)
from bsdiff_rt.bench.measure import Row, measure_batches
from bsdiff_rt.bench.networks import BenchModel, open_bench_model
from bsdiff_rt.bench.plan import Plan, choose_steps
from bsdiff_rt.bench.profile import write_profile
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.runners.devices import resolve_device

logger = logging.getLogger(__name__)

BATCHES = {"cpu": (1,), "cuda": (1, 4, 8)}  # a CPU gains little from a batch
REPEATS = {"cpu": 5, "cuda": 20}
STEPS_PER_IMAGE_REPEAT = 5  # whole images are measured in a fifth of the rounds

# Loads more candidates, given the model, the device and the baseline; returns what is missing, too.
LoadMore = Callable[[BenchModel, torch.device, Candidate], tuple[list[Candidate], list[Missing]]]


@dataclass(frozen=True)
class BenchSettings:
    """Settings of `bench`; None is resolved for the model and the device.

    Attributes:
        bundle: `demo`, `paper` (random weights) or a bundle's folder.
        wanted: runners, precisions, engines.
        device: auto, cpu, cuda or cuda:N.
        batches: batch sizes.
        steps: denoiser calls of one image.
        repeats: measured rounds of steps.
    """

    bundle: str = "demo"
    wanted: Wanted = field(default_factory=Wanted)
    device: str = "auto"
    batches: tuple[int, ...] | None = None
    steps: int | None = None
    repeats: int | None = None


@dataclass
class Document:
    """Result of a benchmark; `to_dict` is the content of its JSON file.

    Attributes:
        head: device, conditions, model, rates of the device.
        rows: what was measured.
        not_measured: what could not be measured, and why.
    """

    head: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    not_measured: list[Missing] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """Exit code of the first thing that was asked for by name and could not be measured; otherwise 0."""
        return next((missing.exit_code for missing in self.not_measured if missing.exit_code), 0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: the head, "rows" and "not_measured"."""
        rows, absent = ([asdict(entry) for entry in entries] for entries in (self.rows, self.not_measured))
        return self.head | {"rows": rows, "not_measured": absent}

    def to_json(self) -> str:
        """Return the text of the JSON file."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"


def run_benchmark(
    settings: BenchSettings,
    on_batch: Callable[[Document], None] = lambda _: None,
    load_more: LoadMore | None = None,
    profile: Path | None = None,
) -> Document:
    """Measure every runner asked for, at every batch size.

    Args:
        settings: the user's settings.
        on_batch: called with the unfinished document after each batch size, and with the finished one at the end.
        load_more: loads candidates besides this package's runners.
        profile: path for a trace of each candidate's step; None for no trace.

    Raises:
        SettingsError: a setting cannot be used.
        BundleError: the bundle is refused.
    """
    device = resolve_device(settings.device)
    batches = BATCHES[device.type] if settings.batches is None else settings.batches
    if not batches or min(batches) < 1:
        raise SettingsError(f"{','.join(map(str, batches))}: give whole numbers above 0", setting="batch")
    model = open_bench_model(settings.bundle, settings.wanted.runners)
    plan = make_plan(model, device, settings.steps, settings.repeats)
    document = Document(describe_run(plan))
    candidates, document.not_measured = load_candidates(model, settings.wanted, device)
    if load_more is not None:
        more, absent = load_more(model, device, candidates[0])
        candidates += more
        document.not_measured += absent
    for rows, absent in measure_batches(plan, candidates, batches):
        document.rows += rows
        document.not_measured += absent
        document.head["conditions"]["clocks_after"] = read_clocks(device)
        on_batch(document)
    if profile is not None:
        write_profile(plan, candidates, profile)
    for candidate in candidates:
        candidate.runner.close()
    document.head["conditions"]["busy"] = signs = _find_signs_of_load(plan, document)
    if signs:
        logger.warning("%s", write_warning(signs))
    on_batch(document)
    return document


def make_plan(model: BenchModel, device: torch.device, steps: int | None = None, repeats: int | None = None) -> Plan:
    """Return the plan of a benchmark, with the matrix product rates of this device, which are measured here.

    Args:
        model: what to measure.
        device: where.
        steps: denoiser calls of one image; None for the model's own number, or a few if it takes hundreds.
        repeats: measured rounds of steps; None for the device's default.

    Raises:
        SettingsError: fewer than 1 repeat, or more steps than the model was trained with.
    """
    repeats = REPEATS[device.type] if repeats is None else repeats
    if repeats < 1:
        raise SettingsError(f"{repeats}: give 1 or more", setting="repeats")
    steps = choose_steps(model) if steps is None else steps
    plan = Plan(model, device, steps, repeats, math.ceil(repeats / STEPS_PER_IMAGE_REPEAT))
    plan.make_table()  # refuses a wrong number of steps before anything is measured
    logger.info("measuring the rates of the device")
    plan.ceilings.update(measure_matmul_rates(device))
    return plan


def describe_run(plan: Plan) -> dict[str, Any]:
    """Return the document without its rows: what is measured, where, and under which conditions."""
    model = plan.model
    denoiser = count_denoiser_work(model.denoiser, model.size)
    enhancer = count_enhancer_work(model.enhancer, model.size)
    return {
        "device": name_device(plan.device),
        "conditions": describe_conditions(plan.device),
        "bundle": model.bundle.identity if model.bundle else {"name": model.name, "sha256": None},
        "size_px": model.size,
        "sampler": model.sampler.name,
        "steps": plan.steps,
        "train_steps": model.schedule.train_steps,
        "enhance": model.enhance,
        "mirror": model.mirror,
        "repeats": plan.repeats,
        "image_repeats": plan.image_repeats,
        "work_per_image": {"denoiser": asdict(denoiser), "enhancer": asdict(enhancer)},
        "work_parts": {kind: asdict(part) for kind, part in count_denoiser_parts(model.denoiser, model.size).items()},
        "matmul_tflops": {name: rate / 1e12 for name, rate in plan.ceilings.items()},
        "copy_gb_s": measure_copy_rate(plan.device) / 1e9,
    }


def _find_signs_of_load(plan: Plan, document: Document) -> list[str]:
    """Measure a rate again, and return every sign that the machine was busy."""
    signs = check_load(document.head["conditions"]["load_average"])
    signs += check_rates(plan.ceilings, measure_matmul_rates(plan.device, ("fp32",)))
    for row in document.rows:
        signs += check_tail(f"{row.name}, batch {row.batch}", row.step_ms, row.step_ms_p95)
    return signs
