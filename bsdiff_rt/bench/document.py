"""The command `bench` as a whole: settings in, a document of rows and conditions out, and its table."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bsdiff_rt.bench.candidates import Candidate, Missing, Model, Wanted, load_candidates, open_model
from bsdiff_rt.bench.flops import copy_bandwidth, denoiser_work, enhancer_work, matmul_ceilings
from bsdiff_rt.bench.measure import Plan, Row, default_steps, measure
from bsdiff_rt.config import step_count
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.folder.report import describe_environment, now
from bsdiff_rt.runners.devices import describe_processor, resolve_device

logger = logging.getLogger(__name__)

BATCHES = {"cpu": (1,), "cuda": (1, 4, 8)}  # a CPU gains little from a batch
REPEATS = {"cpu": 5, "cuda": 20}
STEPS_PER_IMAGE_REPEAT = 5  # whole images are measured in a fifth of the rounds

_CLONE = Path(__file__).parents[2]


@dataclass(frozen=True)
class BenchSettings:
    """What `bench` was asked for; None is resolved against the model and the device.

    Attributes:
        bundle: demo, paper (random weights) or a bundle's folder.
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
    """What `bench` found; `as_dict` is what --json writes.

    Attributes:
        head: device, conditions, model, ceilings.
        rows: what was measured.
        not_measured: what was not, and why.
    """

    head: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    not_measured: list[Missing] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0, or that of the first thing that was asked for and could not be measured."""
        return next((missing.exit_code for missing in self.not_measured if missing.exit_code), 0)

    def as_dict(self) -> dict[str, Any]:
        """Plain values: the head, "rows" and "not_measured"."""
        rows, absent = ([asdict(entry) for entry in entries] for entries in (self.rows, self.not_measured))
        return self.head | {"rows": rows, "not_measured": absent}

    def to_json(self) -> str:
        """The text of the JSON file."""
        return json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n"


def run(
    settings: BenchSettings,
    on_batch: Callable[[Document], None] = lambda _: None,
    also: Callable[[Model, torch.device, Candidate], tuple[list[Candidate], list[Missing]]] | None = None,
) -> Document:
    """Measure every runner asked for, at every batch size.

    Args:
        settings: what the user asked for.
        on_batch: given the document as it stands after each batch size.
        also: gives more to measure, and what is missing of it; told the model, the device and the baseline.

    Raises:
        SettingsError: settings that cannot be used.
        BundleError: the bundle is refused.
    """
    device = resolve_device(settings.device)
    model = open_model(settings.bundle)
    batches = BATCHES[device.type] if settings.batches is None else settings.batches
    if not batches or min(batches) < 1:
        raise SettingsError(f"--batch {','.join(map(str, batches))}: give whole numbers above 0")
    plan = make_plan(model, device, settings.steps, settings.repeats)
    document = Document(head(plan))
    candidates, document.not_measured = load_candidates(model, settings.wanted, device)
    if also is not None:
        more, absent = also(model, device, candidates[0])
        candidates += more
        document.not_measured += absent
    for rows, absent in measure(plan, candidates, batches):
        document.rows += rows
        document.not_measured += absent
        document.head["conditions"]["clocks_after"] = clocks(device)
        on_batch(document)
    for candidate in candidates:
        candidate.runner.close()
    return document


def make_plan(model: Model, device: torch.device, steps: int | None = None, repeats: int | None = None) -> Plan:
    """What to measure, with the ceilings of this device, which are measured here.

    Raises:
        SettingsError: fewer than 1 repeat, or steps the model does not have.
    """
    repeats = REPEATS[device.type] if repeats is None else repeats
    if repeats < 1:
        raise SettingsError(f"--repeats {repeats}: give 1 or more")
    steps = default_steps(model) if steps is None else steps
    plan = Plan(model, device, steps, repeats, math.ceil(repeats / STEPS_PER_IMAGE_REPEAT))
    plan.table()  # refuses steps the model does not have before anything is measured
    logger.info("measuring the device's own rates")
    plan.ceilings.update(matmul_ceilings(device))
    return plan


def head(plan: Plan) -> dict[str, Any]:
    """Everything of the document but its rows: what was measured, where, under what conditions."""
    model = plan.model
    denoiser, enhancer = denoiser_work(model.denoiser, model.size), enhancer_work(model.enhancer, model.size)
    return {
        "device": device_name(plan.device),
        "conditions": conditions(plan.device),
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
        "matmul_tflops": {name: rate / 1e12 for name, rate in plan.ceilings.items()},
        "copy_gb_s": copy_bandwidth(plan.device) / 1e9,
    }


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{describe_processor()[0]}, {torch.get_num_threads()} threads"


def conditions(device: torch.device) -> dict[str, Any]:
    """What else decides how fast things are: versions, clocks, load, precision switches, commit."""
    found = describe_environment(str(device)) | {
        "started": now(),
        "clocks": clocks(device),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "fp32_matmul": torch.get_float32_matmul_precision(),
        "git": git_commit(_CLONE),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "cuda": torch.version.cuda,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        }
    return found


def clocks(device: torch.device) -> str | None:
    """Clocks as the system tells them now; None where it does not."""
    if device.type != "cuda":
        mhz = _cpu_info("cpu MHz")
        return f"{float(mhz):.0f} MHz" if mhz else None
    fields = "clocks.sm,clocks.mem,power.draw,power.limit,driver_version"
    return _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={device.index or 0}")


def git_commit(folder: Path) -> str | None:
    """The commit of a clone, marked -dirty where files differ from it; None where there is no clone."""
    if not (folder / ".git").exists():
        return None
    return _output("git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _cpu_info(name: str) -> str | None:
    """The first processor's entry in /proc/cpuinfo; None where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def table(found: dict[str, Any]) -> list[list[str]]:
    """The rows as text, the header first.

    Args:
        found: `Document.as_dict()`, or what was read from a JSON file of it.
    """
    columns = _columns(found)
    return [list(columns), *([shown(row) for shown in columns.values()] for row in found["rows"])]


def aligned(rows: list[list[str]]) -> list[str]:
    """One line per row; the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))])
        for first, *rest in rows
    ]


def notes(found: dict[str, Any]) -> list[str]:
    """What the table does not say: conditions, ceilings, and what was not measured."""
    rates = ", ".join(f"{name} {rate:.3g}" for name, rate in found["matmul_tflops"].items())
    work = found["work_per_image"]["denoiser"]["flop"]
    stage_2 = "stage 2 included" if found["enhance"] else "without stage 2"
    mirror = ", one of the two passes that infer makes of it (--mirror)" if found["mirror"] else ""
    lines = [
        f"{found['device']}; {found['bundle']['name']}, {found['size_px']} px; image: {found['sampler']}, "
        f"{step_count(found['steps'])}, {stage_2}{mirror}; medians of {found['repeats']} steps and "
        f"{found['image_repeats']} images, measured in turn",
        f"one step is {work / 1e9:.4g} GFLOP per image; matrix products here reach, in TFLOP/s: {rates}; "
        f"copies {found['copy_gb_s']:.3g} GB/s",
    ]
    for missing in found["not_measured"]:
        batch = f", batch {missing['batch']}" if missing["batch"] else ""
        lines.append(f"not measured: {missing['name']}{batch}: {missing['reason']}")
    return lines


def _columns(found: dict[str, Any]) -> dict[str, Callable[[dict[str, Any]], str]]:
    def number(name: str, form: str, scale: float = 1.0) -> Callable[[dict[str, Any]], str]:
        return lambda row: "-" if row.get(name) is None else format(row[name] * scale, form)

    def decibel(name: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: (
            "equal" if row["equals_eager"] is not None and row[name] is None else number(name, ".1f")(row)
        )

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "runner": lambda row: str(row["name"]),
        "precision": lambda row: str(row["precision"]),
        "batch": lambda row: str(row["batch"]),
        "step ms": number("step_ms", ".4g"),
        "p95": number("step_ms_p95", ".4g"),
        "eager / this": number("eager_over_this", ".2f"),
        "TFLOP/s": number("tflops", ".3g"),
        "of ceiling": number("share_of_ceiling", ".0%"),
        "image s": number("image_s", ".4g"),
        "images/s": number("images_per_second", ".4g"),
        "outside network s": number("outside_network_s", ".3g"),
        f"{found['train_steps']} x step s, extrapolated": number("full_image_s_extrapolated", ".4g"),
        "peak MiB": number("peak_bytes", ".0f", 2.0**-20),
        "PSNR step dB": decibel("psnr_step_vs_eager"),
        "PSNR image dB": decibel("psnr_vs_eager"),
    }
    if any(row.get("published_over_this") is not None for row in found["rows"]):
        columns["published / this"] = number("published_over_this", ".2f")
    if any(row["image_s_uncaptured"] is not None for row in found["rows"]):
        columns["uncaptured s"] = number("image_s_uncaptured", ".4g")
        columns["same bits"] = lambda row: {True: "yes", False: "NO", None: "-"}[row["captured_equals_uncaptured"]]
    return columns
