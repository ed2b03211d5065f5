"""Write a bundle from trained networks, if ONNX Runtime agrees with the eager networks."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bsdiff_rt.bundle import FILES, FORMAT, MANIFEST, NOTICE, Manifest
from bsdiff_rt.config import Preprocessing, Preset, SamplerSettings, Schedule
from bsdiff_rt.engines.parity import TOLERANCES, compare_calls
from bsdiff_rt.errors import BundleError, SettingsError
from bsdiff_rt.files import file_sha256, put_in_place
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.eager import EagerRunner
from bsdiff_rt.runners.onnxruntime import OnnxRuntimeRunner
from bsdiff_rt.sampling.schedule import sampler_table
from export.graphs import export_graph

UNSTATED = "unstated"  # licence of weights that nobody stated one for


@dataclass(frozen=True)
class BundleOptions:
    """What the manifest says besides the weights.

    Attributes:
        name: of the model.
        sampler: default sampler and number of steps.
        preprocessing: as in training.
        enhance: whether `infer` runs stage 2 by default.
        mirror: whether `infer` averages the model's results for the image and its mirror image by default.
        licence: of the weights.
        training: where the weights come from, free-form.
    """

    name: str
    sampler: SamplerSettings
    preprocessing: Preprocessing = dataclasses.field(default_factory=Preprocessing)
    enhance: bool = True
    mirror: bool = False
    licence: str = UNSTATED
    training: dict[str, Any] = dataclasses.field(default_factory=dict)


def write_bundle(
    folder: Path,
    preset: Preset,
    schedule: Schedule,
    denoiser: Denoiser,
    enhancer: Enhancer,
    options: BundleOptions,
    *,
    overwrite: bool = False,
) -> Manifest:
    """Write a bundle if both of its graphs agree with the eager networks. It appears whole or not at all.

    Args:
        folder: must be new or empty, or hold a bundle if `overwrite` is given. Other files in it are kept.
        preset: shape of both networks.
        schedule: the diffusion that the denoiser was trained for.
        denoiser: stage 1, fp32, on the CPU.
        enhancer: stage 2, fp32, on the CPU.
        options: the rest of the manifest.
        overwrite: replace the bundle that is in `folder`.

    Returns:
        The manifest as written.

    Raises:
        BundleError: the graphs do not agree with eager.
        SettingsError: `folder` cannot be used, the default sampler cannot be run, or the model does not take images
            of this size.
    """
    check_settings(preset, schedule, options)
    check_folder(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".bundle-") as temporary:
        work, finished, previous = (Path(temporary) / name for name in ("work", "finished", "previous"))
        work.mkdir()
        finished.mkdir()
        agreement = _export(work, schedule, denoiser.eval(), enhancer.eval(), options.preprocessing.size)
        manifest = _describe_bundle(preset, schedule, options, agreement, work)
        (work / MANIFEST).write_bytes(manifest.to_json().encode())  # no CRLF on Windows: the text is hashed
        for name in (*FILES, MANIFEST):
            (work / name).chmod(0o644)  # safetensors writes for the owner alone
            (work / name).rename(finished / name)
        put_in_place(finished, folder, previous)
        for other in [path for path in previous.glob("*") if path.name not in (*FILES, MANIFEST)]:  # the user's notes
            other.rename(folder / other.name)
    return manifest


def check_settings(preset: Preset, schedule: Schedule, options: BundleOptions) -> None:
    """Raise SettingsError if the default sampler cannot be run or the model does not take images of this size."""
    size = options.preprocessing.size
    multiple = 2 ** (max(len(preset.denoiser.channels), len(preset.enhancer.channels)) - 1)  # each level halves it
    if size % multiple:
        raise SettingsError(f"size {size} px: the {preset.name} networks take multiples of {multiple} px")
    sampler_table(schedule, options.sampler.name, options.sampler.steps)


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raise SettingsError unless `folder` is new or empty, or holds a bundle and `overwrite` is given."""
    if not folder.is_file() and not (folder.is_dir() and any(folder.iterdir())):
        return
    if not (folder / MANIFEST).is_file():
        raise SettingsError(f"{folder}: exists and is not a bundle. Choose a new or an empty folder.")
    if not overwrite:
        raise SettingsError(f"{folder}: holds a bundle. Choose another folder, or give --overwrite to replace it.")


def _export(work: Path, schedule: Schedule, denoiser: Denoiser, enhancer: Enhancer, size: int) -> dict[str, float]:
    """Write weights and graphs into `work` and return how well they agree with eager."""
    image = torch.zeros(2, 1, size, size)
    inputs = {"x_t": image, "cxr": image, "t": torch.zeros(2)}
    export_graph(denoiser, inputs, work / "denoiser.safetensors", work / "denoiser.onnx")
    export_graph(enhancer, {"x": image}, work / "enhancer.safetensors", work / "enhancer.onnx")
    eager = EagerRunner(denoiser, enhancer, size, torch.device("cpu"))
    candidate = OnnxRuntimeRunner(work / "denoiser.onnx", work / "enhancer.onnx", size)
    return check_agreement(eager, candidate, schedule)


def _describe_bundle(
    preset: Preset, schedule: Schedule, options: BundleOptions, agreement: dict[str, float], work: Path
) -> Manifest:
    """Return the manifest of the files in `work`."""
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


def check_agreement(reference: Runner, candidate: Runner, schedule: Schedule) -> dict[str, float]:
    """Compare the exported graphs with the eager networks, call by call.

    Args:
        reference: the eager networks.
        candidate: ONNX Runtime with the exported graphs.
        schedule: the diffusion that the denoiser was trained for.

    Returns:
        The largest difference of either network as a share of its largest output, and the tolerance.

    Raises:
        BundleError: a difference exceeds the tolerance, or an output is not finite.
    """
    checks = compare_calls(reference, candidate, schedule)
    for check in checks:
        if not check.passed:
            raise BundleError(f"ONNX Runtime differs from eager. {check}. No bundle was written.")
    worst = {
        network: max(check.value for check in checks if check.what.startswith(network))
        for network in ("denoiser", "enhancer")
    }
    return worst | {"tolerance": TOLERANCES["fp32"].call}
