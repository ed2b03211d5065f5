"""Checkpoints become a bundle, once ONNX Runtime agrees with eager."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bsdiff_rt.bundle import FILES, FORMAT, MANIFEST, NOTICE, Manifest
from bsdiff_rt.config import Preprocessing, Preset, SamplerSettings, Schedule
from bsdiff_rt.errors import BundleError, SettingsError
from bsdiff_rt.files import file_sha256, put_in_place
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.eager import EagerRunner
from bsdiff_rt.runners.onnxruntime import OnnxRuntimeRunner
from bsdiff_rt.sampling.schedule import sampler_table
from export.graphs import export_graph

# Largest difference allowed between eager and ONNX Runtime, relative to the largest output. Both compute in fp32 with
# sums in another order; over the few hundred layers of the paper's networks that leaves about 1e-5.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class BundleOptions:
    """What the manifest says besides what the weights are.

    Attributes:
        name: of the model.
        sampler: default sampler and steps.
        preprocessing: what training used.
        enhance, mirror: defaults of `infer`.
        licence: of the weights.
        training: provenance, free-form.
    """

    name: str
    sampler: SamplerSettings
    preprocessing: Preprocessing = dataclasses.field(default_factory=Preprocessing)
    enhance: bool = True
    mirror: bool = False
    licence: str = "MIT"
    training: dict[str, Any] = dataclasses.field(default_factory=dict)


def write_bundle(
    folder: Path, preset: Preset, schedule: Schedule, denoiser: Denoiser, enhancer: Enhancer, options: BundleOptions
) -> Manifest:
    """Write a bundle into `folder`, which must not exist yet or hold a bundle to be replaced.

    Nothing is written unless both graphs agree with eager.

    Raises:
        BundleError: they do not agree.
        SettingsError: `folder` is or holds something that is no bundle, the default sampler cannot be run, or the
            networks do not take images of this size.
    """
    size = options.preprocessing.size
    multiple = 2 ** (max(len(preset.denoiser.channels), len(preset.enhancer.channels)) - 1)  # each level halves it
    if size % multiple:
        raise SettingsError(f"size {size} px: the {preset.name} networks take multiples of {multiple} px")
    sampler_table(schedule, options.sampler.name, options.sampler.steps)
    if folder.is_file() or (folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file()):
        raise SettingsError(f"{folder}: not empty and not a bundle; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    image = torch.zeros(2, 1, size, size)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".bundle-") as temporary:
        work = Path(temporary) / "work"
        work.mkdir()
        denoiser, enhancer = denoiser.eval(), enhancer.eval()
        export_graph(
            denoiser,
            {"x_t": image, "cxr": image, "t": torch.zeros(2)},
            work / "denoiser.safetensors",
            work / "denoiser.onnx",
        )
        export_graph(enhancer, {"x": image}, work / "enhancer.safetensors", work / "enhancer.onnx")
        agreement = check_agreement(
            EagerRunner(denoiser, enhancer, size, torch.device("cpu")),
            OnnxRuntimeRunner(work / "denoiser.onnx", work / "enhancer.onnx", size),
            schedule.train_steps,
        )
        manifest = _manifest(preset, schedule, options, agreement, work)
        made = Path(temporary) / "made"
        made.mkdir()
        (work / MANIFEST).write_text(manifest.to_json())
        for name in (*FILES, MANIFEST):
            (work / name).chmod(0o644)  # safetensors writes for the owner alone
            (work / name).rename(made / name)
        previous = Path(temporary) / "previous"
        put_in_place(made, folder, previous)
        for other in [path for path in previous.glob("*") if path.name not in (*FILES, MANIFEST)]:  # somebody's notes
            other.rename(folder / other.name)
    return manifest


def _manifest(
    preset: Preset, schedule: Schedule, options: BundleOptions, agreement: dict[str, float], work: Path
) -> Manifest:
    """The manifest of the files in `work`."""
    return Manifest(
        format=FORMAT,
        name=options.name,
        preset=preset.name,
        denoiser=preset.denoiser,
        enhancer=preset.enhancer,
        schedule=schedule,
        sampler=options.sampler,
        preprocessing=options.preprocessing,
        enhance=options.enhance,
        mirror=options.mirror,
        training=options.training,
        agreement=agreement,
        licence=options.licence,
        notice=NOTICE,
        files={name: file_sha256(work / name) for name in FILES},
    )


def check_agreement(reference: Runner, candidate: Runner, train_steps: int) -> dict[str, float]:
    """Largest difference of single calls, relative to the largest output: first, middle and last t, batch 1 and 2.

    Raises:
        BundleError: it exceeds TOLERANCE, or an output is not finite.
    """
    generator = torch.Generator().manual_seed(0)
    worst = {"denoiser": 0.0, "enhancer": 0.0, "tolerance": TOLERANCE}
    for batch in (1, 2):
        shape = (batch, 1, reference.image_size, reference.image_size)
        cxr = torch.rand(shape, generator=generator) * 2 - 1
        x_t = torch.randn(shape, generator=generator)
        expected, actual = torch.empty(shape), torch.empty(shape)
        for time in (0, train_steps // 2, train_steps - 1):
            t = torch.full((batch,), float(time))
            reference.denoise(x_t, cxr, t, expected)
            candidate.denoise(x_t, cxr, t, actual)
            worst["denoiser"] = max(worst["denoiser"], _difference(expected, actual, f"denoiser at t = {time}"))
        reference.enhance(cxr, expected)
        candidate.enhance(cxr, actual)
        worst["enhancer"] = max(worst["enhancer"], _difference(expected, actual, "enhancer"))
    return worst


def _difference(expected: torch.Tensor, actual: torch.Tensor, what: str) -> float:
    largest = float(expected.abs().max())
    difference = float((expected - actual).abs().max()) / max(largest, 1e-12)
    if not np.isfinite(difference) or difference > TOLERANCE:
        raise BundleError(
            f"{what}, batch {len(expected)}: ONNX Runtime differs from eager by {difference:.2e} of the largest "
            f"output, {TOLERANCE:.0e} is allowed; no bundle was written"
        )
    return difference
