"""What the parts of `python -m benchmarks.gpu_suite` share: where results go, the model, what is measured."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bsdiff_rt.bench.candidates import Candidate, Missing, Model, baseline, loaded, missing, open_model, random_model
from bsdiff_rt.bench.measure import Plan
from bsdiff_rt.bundle import FORMAT, MANIFEST, NOTICE, Bundle, Manifest
from bsdiff_rt.config import EngineOptions, Precision, Preprocessing
from bsdiff_rt.files import file_sha256
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.devices import resolve_device
from bsdiff_rt.runners.eager import EagerRunner
from bsdiff_rt.runners.registry import RUNNERS, find_batch_limit, load_runner

FEW_STEPS = 4
TF32 = "eager tf32"
DEMO = "demo"  # the demo bundle's engine, in the folder for work


class Skipped(Exception):
    """A part, or some of it, that cannot be done here; the text says why."""


@dataclass
class Part:
    """What one part does with, and where it leaves what it finds.

    Attributes:
        name: of the part.
        options: the command line.
        work: folder for what need not be kept: weights, engines, pictures.
        deadline: of the part, by `time.monotonic`.
        found: what DIR/PART.json holds: "status", "reason", "seconds", "notes", and the part's own.
    """

    name: str
    options: argparse.Namespace
    work: Path
    deadline: float
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where to run."""
        return resolve_device(self.options.device)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def save(self, **more: Any) -> None:
        """Add to what was found, and write it."""
        self.found |= more
        path = self.options.output / f"{self.name}.json"
        written = path.with_suffix(".part")
        written.write_text(json.dumps(self.found, indent=1) + "\n")
        written.replace(path)

    def note(self, line: str) -> None:
        """Say something, now and in the file."""
        print(f"  {line}", flush=True)
        self.save(notes=[*self.found.get("notes", []), line])

    def enough_time(self, seconds: float, what: str) -> bool:
        """Whether `what`, which takes about `seconds`, fits before the deadline; if not, that is noted."""
        if self.left() > seconds:
            return True
        self.note(f"{what}: skipped: out of time ({self.left():.0f} s left, about {seconds:.0f} s needed)")
        return False

    def other(self, name: str) -> dict[str, Any]:
        """What an earlier part found."""
        return read(self.options.output / f"{name}.json")


@dataclass(frozen=True)
class EngineKind:
    """An engine to build; `one` for batch 1 alone, else for every batch that is measured and that the runner takes."""

    runner: str
    precision: Precision
    one: bool = False

    def options(self, part: Part, bundle: Bundle) -> EngineOptions:
        """What a build is asked for."""
        largest = 1 if self.one else max(part.options.batches)
        limit = find_batch_limit(self.runner, bundle.manifest)
        return EngineOptions(self.runner, self.precision, (1, min(largest, limit or largest)))


ENGINES = {
    # What is asked of one image comes first: an engine of one batch size is the fastest for it.
    "aoti fp16, batch 1": EngineKind("aoti", "fp16", one=True),
    "tensorrt fp16, batch 1": EngineKind("tensorrt", "fp16", one=True),
    "aoti fp16": EngineKind("aoti", "fp16"),
    "tensorrt fp16": EngineKind("tensorrt", "fp16"),
    "aoti bf16": EngineKind("aoti", "bf16"),
}


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


def make_model(part: Part) -> Model:
    """The bundle given, or the preset with random weights, which are written as far as engines need them."""
    if part.options.bundle:
        return open_model(part.options.bundle)
    model = random_model(part.options.preset, part.options.size)
    folder = part.work / "model"
    if not folder.is_dir():
        _write_weights(model, part.options.preset, folder)
    text = (folder / MANIFEST).read_text()
    return replace(model, bundle=Bundle(folder, Manifest.from_json(text), file_sha256(folder / MANIFEST)))


def _write_weights(model: Model, preset: str, folder: Path) -> None:
    """A bundle without graphs, whole or not at all."""
    unfinished = folder.with_name(f"{folder.name}-{os.getpid()}")
    unfinished.mkdir()
    for name, network in zip(("denoiser", "enhancer"), model.networks(), strict=True):
        save_file(network.state_dict(), unfinished / f"{name}.safetensors")
    manifest = Manifest(
        format=FORMAT,
        name=model.name,
        preset=preset,
        denoiser=model.denoiser,
        enhancer=model.enhancer,
        schedule=model.schedule,
        sampler=model.sampler,
        preprocessing=Preprocessing(size=model.size),
        enhance=model.enhance,
        mirror=model.mirror,
        training={},
        agreement={},
        licence="none",
        notice=NOTICE,
        files={path.name: file_sha256(path) for path in sorted(unfinished.iterdir())},
    )
    (unfinished / MANIFEST).write_text(manifest.to_json())
    unfinished.rename(folder)


def make_plan(part: Part, model: Model, ceilings: dict[str, float], steps: int = FEW_STEPS) -> Plan:
    """A plan of few rounds."""
    return Plan(model, part.device, steps, part.options.repeats, 1, ceilings)


def plan_of(part: Part, steps: int = FEW_STEPS) -> Plan:
    """A plan with the ceilings the first part measured."""
    rates = part.other("machine").get("head", {}).get("matmul_tflops", {})
    return make_plan(part, make_model(part), {name: rate * 1e12 for name, rate in rates.items()}, steps)


def backend(runner: str, bundle: Bundle) -> tuple[Callable[..., Any], Callable[..., Runner]]:
    """Return the functions that build and load an engine."""
    entry = RUNNERS[runner]
    if runner == "tensorrt":
        if find_spec("tensorrt") is None:
            raise Skipped("the package tensorrt is not installed")
        if "denoiser.onnx" not in bundle.manifest.files:
            raise Skipped("needs graphs: `python -m export random paper -o DIR`, then --bundle DIR")
    return entry.build, entry.load_engine


def candidates(part: Part, model: Model) -> tuple[list[Candidate], list[Missing]]:
    """Eager in fp32, on CUDA also with TF32 matrix products and ONNX Runtime on graphs, and the engines built."""
    found: list[Candidate] = [baseline(model, part.device)]
    absent: list[Missing] = []
    if part.device.type == "cuda":
        tf32 = loaded(TF32, lambda: Tf32Runner(*model.networks(), model.size, part.device), part.device)
        found.append(tf32)
    if part.device.type == "cuda" and model.bundle is not None and "denoiser.onnx" in model.bundle.manifest.files:
        for precision in ("fp32", "fp16"):
            name = f"onnxruntime {precision}"
            try:
                load = partial(load_runner, model.bundle, "onnxruntime", part.device, precision)
                found.append(loaded(name, load, part.device))
            except Exception as error:  # as below
                absent.append(missing(name, "onnxruntime", precision, None, error))
    built, not_built = (part.other("engines").get(key, {}) for key in ("built", "not_built"))
    for name, asked in ENGINES.items():
        runner, precision = asked.runner, asked.precision
        if name not in built:
            reason = not_built.get(name) or part.other("engines").get("reason") or "was not built"
            absent.append(missing(name, runner, precision, None, Skipped(reason), asked=False))
            continue
        try:
            assert model.bundle is not None
            _, kind = backend(runner, model.bundle)
            load = partial(
                kind,
                part.work / folder_of(name),
                device=part.device,
                precision=precision,
                batch_range=asked.options(part, model.bundle).batch,
                image_size=model.size,
            )
            found.append(loaded(name, load, part.device))
        except Exception as error:  # of a backend; the others are still measured
            absent.append(missing(name, runner, precision, None, error))
    return found, absent


def folder_of(name: str) -> str:
    """The engine's folder in the folder for work."""
    return name.replace(",", "").replace(" ", "-")


class Tf32Runner(EagerRunner):
    """Eager with matrix products, too, in TF32; torch's convolutions use it anyway."""

    name = "eager"

    def denoise(self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
        """Stage 1; see `Runner.denoise`."""
        with _tf32():
            super().denoise(x_t, cxr, t, out)

    def enhance(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Stage 2; see `Runner.enhance`."""
        with _tf32():
            super().enhance(x, out)


@contextmanager
def _tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
