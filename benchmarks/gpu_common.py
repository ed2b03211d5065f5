"""Shared by the parts of `python -m benchmarks.gpu_suite`: the folder for results, the model, the candidates."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from bsdiff_rt.bench.candidates import Candidate, Missing, describe_missing, load_baseline, load_candidate
from bsdiff_rt.bench.networks import BenchModel, make_random_model, open_bench_model
from bsdiff_rt.bench.plan import Plan
from bsdiff_rt.bundle import FORMAT, MANIFEST, NOTICE, Bundle, Manifest
from bsdiff_rt.config import EngineOptions, Precision, Preprocessing
from bsdiff_rt.files import file_sha256
from bsdiff_rt.networks.blocks import join_projections
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.runners.aoti_builder import choose_attention, lower_precision
from bsdiff_rt.runners.devices import resolve_device
from bsdiff_rt.runners.eager import EagerRunner
from bsdiff_rt.runners.registry import RUNNERS, RunnerEntry, find_batch_limit, load_runner

FEW_STEPS = 4
TF32 = "eager tf32"
DEMO = "demo"  # the demo bundle's engine, in the folder for work


class Skipped(Exception):
    """A part, or some of it, cannot be done here. The text is the reason."""


@dataclass
class Part:
    """One part of the suite, with its settings and its results.

    Attributes:
        name: of the part.
        options: the command line.
        work: folder for temporary files: weights, engines, pictures.
        deadline: of the part, by `time.monotonic`.
        found: content of DIR/PART.json: "status", "reason", "seconds", "notes", and the part's own results.
    """

    name: str
    options: argparse.Namespace
    work: Path
    deadline: float
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Return the device to run on."""
        return resolve_device(self.options.device)

    def left(self) -> float:
        """Return the seconds until the deadline, at least 0."""
        return max(self.deadline - time.monotonic(), 0.0)

    def save(self, **more: Any) -> None:
        """Add to the results, and write them."""
        self.found |= more
        path = self.options.output / f"{self.name}.json"
        written = path.with_suffix(".part")
        written.write_text(json.dumps(self.found, indent=1) + "\n")
        written.replace(path)

    def note(self, line: str) -> None:
        """Print a line, and add it to the notes in the file."""
        print(f"  {line}", flush=True)
        self.save(notes=[*self.found.get("notes", []), line])

    def has_time(self, seconds: float, what: str) -> bool:
        """Return whether `what`, which takes about `seconds`, fits before the deadline. If not, note that."""
        if self.left() > seconds:
            return True
        self.note(f"{what}: skipped, not enough time ({self.left():.0f} s left, about {seconds:.0f} s needed)")
        return False

    def read_other(self, name: str) -> dict[str, Any]:
        """Return the results of an earlier part."""
        return read_json(self.options.output / f"{name}.json")


@dataclass(frozen=True)
class EngineKind:
    """An engine to build.

    Attributes:
        runner: runs it.
        precision: of weights and activations.
        one: build for batch size 1 alone, not for every measured batch size that the runner takes.
    """

    runner: str
    precision: Precision
    one: bool = False

    def choose_options(self, part: Part, bundle: Bundle) -> EngineOptions:
        """Return the options of the build."""
        largest = 1 if self.one else max(part.options.batches)
        limit = find_batch_limit(self.runner, bundle.manifest)
        return EngineOptions(self.runner, self.precision, (1, min(largest, limit or largest)))


ENGINES = {
    # For one image an engine of one batch size is the fastest, so these come first.
    "aoti fp16, batch 1": EngineKind("aoti", "fp16", one=True),
    "tensorrt fp16, batch 1": EngineKind("tensorrt", "fp16", one=True),
    "aoti fp16": EngineKind("aoti", "fp16"),
    "tensorrt fp16": EngineKind("tensorrt", "fp16"),
    "aoti bf16": EngineKind("aoti", "bf16"),
}


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if there is no file."""
    return json.loads(path.read_text()) if path.is_file() else {}


def make_model(part: Part) -> BenchModel:
    """Return the bundle of --bundle, or the preset with random weights, written to a bundle without graphs."""
    if part.options.bundle:
        return open_bench_model(part.options.bundle)
    model = make_random_model(part.options.preset, part.options.size)
    folder = part.work / "model"
    if not folder.is_dir():
        _write_weights(model, part.options.preset, folder)
    text = (folder / MANIFEST).read_text()
    return replace(model, bundle=Bundle(folder, Manifest.from_json(text), file_sha256(folder / MANIFEST)))


def _write_weights(model: BenchModel, preset: str, folder: Path) -> None:
    """Write a bundle without graphs, completely or not at all."""
    unfinished = folder.with_name(f"{folder.name}-{os.getpid()}")
    unfinished.mkdir()
    for name, network in zip(("denoiser", "enhancer"), model.load_networks(), strict=True):
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


def make_plan(part: Part, model: BenchModel, ceilings: dict[str, float], steps: int = FEW_STEPS) -> Plan:
    """Return a plan of few rounds."""
    return Plan(model, part.device, steps, part.options.repeats, 1, ceilings)


def make_rated_plan(part: Part, steps: int = FEW_STEPS) -> Plan:
    """Return a plan with the device's rates, which the part `machine` measured."""
    rates = part.read_other("machine").get("head", {}).get("matmul_tflops", {})
    return make_plan(part, make_model(part), {name: rate * 1e12 for name, rate in rates.items()}, steps)


def find_backend(runner: str, bundle: Bundle) -> RunnerEntry:
    """Return the registry's entry of a runner with engines.

    Raises:
        Skipped: a package or the bundle's graphs are missing.
    """
    if runner == "tensorrt":
        if find_spec("tensorrt") is None:
            raise Skipped("the package tensorrt is not installed")
        if "denoiser.onnx" not in bundle.manifest.files:
            raise Skipped("it needs graphs: `python -m export random paper -o DIR`, then --bundle DIR")
    return RUNNERS[runner]


def load_all(part: Part, model: BenchModel) -> tuple[list[Candidate], list[Missing]]:
    """Load eager fp32, on CUDA also eager with TF32 and ONNX Runtime, and the engines that were built.

    Returns: what was loaded, and what could not be loaded.
    """
    found: list[Candidate] = [load_baseline(model, part.device)]
    absent: list[Missing] = []
    if part.device.type == "cuda":
        tf32 = load_candidate(TF32, lambda: Tf32Runner(*model.load_networks(), model.size, part.device), part.device)
        found.append(tf32)
    if part.device.type == "cuda" and model.bundle is not None and "denoiser.onnx" in model.bundle.manifest.files:
        for precision in ("fp32", "fp16"):
            name = f"onnxruntime {precision}"
            try:
                load = partial(load_runner, model.bundle, "onnxruntime", part.device, precision)
                found.append(load_candidate(name, load, part.device))
            except Exception as error:  # as below
                absent.append(describe_missing(name, "onnxruntime", precision, None, error))
    built, not_built = (part.read_other("engines").get(key, {}) for key in ("built", "not_built"))
    for name, asked in ENGINES.items():
        runner, precision = asked.runner, asked.precision
        if name not in built:
            reason = not_built.get(name) or part.read_other("engines").get("reason") or "not built"
            absent.append(describe_missing(name, runner, precision, None, Skipped(reason), asked=False))
            continue
        try:
            assert model.bundle is not None
            entry = find_backend(runner, model.bundle)
            load = partial(
                entry.load_engine,
                part.work / name_folder(name),
                device=part.device,
                precision=precision,
                batch_range=asked.choose_options(part, model.bundle).batch,
                image_size=model.size,
            )
            found.append(load_candidate(name, load, part.device))
        except Exception as error:  # backends raise any type; the others are still measured
            absent.append(describe_missing(name, runner, precision, None, error))
    return found, absent


def name_folder(name: str) -> str:
    """Return the name of an engine's folder in the folder for temporary files."""
    return name.replace(",", "").replace(" ", "-")


class Tf32Runner(EagerRunner):
    """Eager with matrix products in TF32; torch's convolutions use TF32 by default."""

    name = "eager"

    def denoise(self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
        """Run stage 1 (see `Runner.denoise`)."""
        with _allow_tf32():
            super().denoise(x_t, cxr, t, out)

    def enhance(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Run stage 2 (see `Runner.enhance`)."""
        with _allow_tf32():
            super().enhance(x, out)


class HalfRunner(EagerRunner):
    """Eager with the denoiser in fp16, as it is compiled for an engine: attention, layout, layers that stay fp32."""

    def __init__(self, denoiser: Denoiser, enhancer: nn.Module, image_size: int, device: torch.device) -> None:
        lower_precision(join_projections(denoiser), torch.float16)
        choose_attention(denoiser, "fp16", device)
        super().__init__(denoiser, enhancer, image_size, device)
        self.precision = "fp16"
        self._denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub


@contextmanager
def _allow_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
