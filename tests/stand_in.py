"""A stand-in for a runner with engines. It "builds" by copying weights and runs them eagerly, in milliseconds.

It is also loaded where not all packages are installed, so what builds engines is imported where it is used.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomise
from safetensors.torch import save_file

from bsdiff_rt import bundle as bundles
from bsdiff_rt.bundle import Bundle, open_bundle
from bsdiff_rt.config import PRESETS, EngineOptions, Preprocessing, SamplerSettings, Schedule
from bsdiff_rt.engines.manifest import MANIFEST
from bsdiff_rt.files import file_sha256
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.runners.eager import EagerRunner, load_networks
from bsdiff_rt.runners.registry import RUNNERS

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SIZE = 16
FP32 = EngineOptions("aoti", "fp32", (1, 4))
WEIGHTS = ("denoiser.pt2", "enhancer.pt2")
VERSIONS = {"torch": "2.13.0", "cuda": "none"}


def write_bundle(folder: Path, seed: int = 1) -> Bundle:
    """A bundle of tiny networks at 16 px, without graphs."""
    preset = PRESETS["tiny"]
    folder.mkdir()
    for name, network in (("denoiser", Denoiser(preset.denoiser)), ("enhancer", Enhancer(preset.enhancer))):
        randomise(network, seed)
        save_file(network.state_dict(), folder / f"{name}.safetensors")
        (folder / f"{name}.onnx").write_bytes(b"")
    manifest = dataclasses.replace(
        open_bundle("demo").manifest,
        name="small net",
        denoiser=preset.denoiser,
        enhancer=preset.enhancer,
        schedule=Schedule(objective="x0"),
        sampler=SamplerSettings("ddim", 2),
        preprocessing=Preprocessing(SIZE),
        files={name: file_sha256(folder / name) for name in bundles.FILES},
    )
    (folder / bundles.MANIFEST).write_text(manifest.to_json())
    return open_bundle(folder)


class StandIn:
    """Takes the place of the modules of runner `aoti`. A test may change each part."""

    def __init__(self) -> None:
        self.during: Callable[[Path], None] = lambda folder: None
        self.distort: Callable[[torch.Tensor], None] = lambda out: None
        self.versions = VERSIONS
        self.loaded: list[Path] = []
        self.closed = 0
        self.bundle: Bundle | None = None

    def build(self, bundle, options, device, folder, progress) -> dict[str, Any]:
        self.bundle = bundle
        progress("standing in", 0.5)
        for name in WEIGHTS:
            shutil.copy(bundle.file(name.replace("pt2", "safetensors")), folder / name)
            self.during(folder)
        return {"option": 1}

    def list_versions(self) -> dict[str, str]:
        return self.versions

    def load_engine(self, folder, *, device, precision, batch_range, image_size) -> EagerRunner:
        stand_in = self
        self.loaded.append(folder)

        class Runner(EagerRunner):
            name = "aoti"

            def denoise(self, x_t, cxr, t, out):
                super().denoise(x_t, cxr, t, out)
                stand_in.distort(out)

            def close(self):
                stand_in.closed += 1

        assert self.bundle is not None
        runner = Runner(*load_networks(self.bundle), image_size, device)
        runner.precision, runner.batch_range = precision, batch_range
        return runner


def install_stand_in(patch: pytest.MonkeyPatch) -> StandIn:
    """Let a stand-in build and load the engines of runner `aoti`."""
    stand_in, module = StandIn(), "stand_in_runner"
    patch.setitem(sys.modules, module, stand_in)
    patch.setitem(RUNNERS, "aoti", dataclasses.replace(RUNNERS["aoti"], module=module, builder=module))
    return stand_in


def build(bundle: Bundle, output: Path | None = None, options: EngineOptions = FP32) -> Path:
    """Build an engine on the CPU, in the cache by default."""
    from bsdiff_rt.engines.build import build_engine

    return build_engine(bundle, options, CPU, output, lambda *_: None)


def change(folder: Path, **fields: Any) -> None:
    """Rewrite fields of an engine's manifest."""
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def timed(ratio: float, instead: str = "onnxruntime") -> dict[str, Any]:
    """The manifest's `speed` of an engine that was that many times as fast as what it was timed beside."""
    return {"batch": 1, "step_ms": 100.0, "instead": instead, "instead_ms": 100.0 * ratio, "ratio": ratio}
