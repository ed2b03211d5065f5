"""The model that a benchmark times: a bundle, or a preset's networks with random weights."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bsdiff_rt import __version__
from bsdiff_rt.bundle import MANIFEST, Bundle, list_bundles, open_bundle
from bsdiff_rt.config import PRESETS, DenoiserConfig, EnhancerConfig, SamplerSettings, Schedule
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.runners.eager import load_networks

logger = logging.getLogger(__name__)

BASELINE = "eager"  # the runner that all others are compared with
PAPER_SIZE_PX = 256
CLONE = Path(__file__).parents[2]


@dataclass(frozen=True)
class BenchModel:
    """Both networks and how an image is sampled with them.

    Attributes:
        name: for the report.
        denoiser: shape of stage 1.
        enhancer: shape of stage 2.
        schedule: the diffusion.
        sampler: the model's own sampler and number of steps.
        size: side of its images, px.
        enhance: whether stage 2 is part of an image.
        mirror: whether `infer` also runs the mirrored X-ray. The benchmark times one pass.
        bundle: where the weights are; None for random weights in memory.
    """

    name: str
    denoiser: DenoiserConfig
    enhancer: EnhancerConfig
    schedule: Schedule
    sampler: SamplerSettings
    size: int
    enhance: bool
    mirror: bool = False
    bundle: Bundle | None = None

    def load_networks(self) -> tuple[Denoiser, Enhancer]:
        """Return both networks with their weights: fp32, on the CPU, in evaluation mode.

        Raises:
            BundleError: the weights do not fit the model.
        """
        if self.bundle is not None:
            return load_networks(self.bundle)
        denoiser, enhancer = Denoiser(self.denoiser), Enhancer(self.enhancer)
        generator = torch.Generator().manual_seed(0)
        fill_randomly(denoiser, generator)
        fill_randomly(enhancer, generator)
        return denoiser.eval(), enhancer.eval()


def open_bench_model(name_or_folder: str, runners: tuple[str, ...] = ()) -> BenchModel:
    """Open a bundle, or a preset with random weights.

    Args:
        name_or_folder: a bundle's name or folder, or a preset's name such as `paper`.
        runners: the runners asked for by name. If one of them needs a bundle on disk, a preset's bundle is made in
            the user's cache.

    Raises:
        BundleError: there is no such bundle, or it is refused.
        SettingsError: a preset's bundle cannot be made here.
    """
    if name_or_folder not in PRESETS or name_or_folder in list_bundles():
        return describe_bundle(open_bundle(name_or_folder))
    reads_bundle = [runner for runner in runners if runner != BASELINE]
    if not reads_bundle:
        return make_random_model(name_or_folder)
    return describe_bundle(open_bundle(str(provide_random_bundle(name_or_folder, reads_bundle[0]))))


def describe_bundle(bundle: Bundle) -> BenchModel:
    """Return a bundle's networks and sampling settings."""
    manifest = bundle.manifest
    return BenchModel(
        manifest.name,
        manifest.denoiser,
        manifest.enhancer,
        manifest.schedule,
        manifest.sampler,
        manifest.preprocessing.size,
        manifest.enhance,
        manifest.mirror,
        bundle,
    )


def make_random_model(preset: str, size: int = PAPER_SIZE_PX) -> BenchModel:
    """Return a preset's networks with random weights, the paper's schedule and its sampler (`ddpm`, 1000 steps).

    Args:
        preset: a key of `PRESETS`.
        size: side of the images, px.
    """
    shape = PRESETS[preset]
    name = f"{preset}, random weights"
    return BenchModel(name, shape.denoiser, shape.enhancer, Schedule(), SamplerSettings(), size, True)


def find_random_bundle(preset: str) -> Path:
    """Return the folder in the user's cache for a preset's bundle with random weights, whether or not it exists."""
    import platformdirs  # here: a bare GPU machine may lack it

    return platformdirs.user_cache_path("bsdiff-rt", appauthor=False) / "bundles" / f"{preset}-random-{__version__}"


def provide_random_bundle(preset: str, runner: str) -> Path:
    """Return the folder of a preset's bundle with random weights, and export it first if it is not there.

    Args:
        preset: a key of `PRESETS`.
        runner: the runner that needs it, for the message.

    Raises:
        SettingsError: the exporter is missing, or it failed.
    """
    folder = find_random_bundle(preset)
    if (folder / MANIFEST).is_file():
        return folder
    if not (CLONE / "export" / "__main__.py").is_file():
        raise SettingsError(
            f"{preset}: runner {runner} needs a bundle on disk, and the exporter is not installed here. "
            f"Run `python -m export random {preset} -o DIR` in a clone of the project, then give DIR.",
            setting="bundle",
        )
    logger.info("exporting %s with random weights to %s; for the paper's size this takes minutes", preset, folder)
    command = [sys.executable, "-m", "export", "random", preset, "--output", str(folder)]
    exported = subprocess.run(command, cwd=CLONE, capture_output=True, text=True, check=False)
    if exported.returncode:
        reason = (exported.stderr.strip().splitlines() or [f"exit code {exported.returncode}"])[-1]
        raise SettingsError(
            f"{preset}: the bundle for runner {runner} could not be exported ({reason}). Run "
            f"`python -m export random {preset} -o DIR` in {CLONE} to see why, or use runner {BASELINE}.",
            setting="bundle",
        )
    return folder


def fill_randomly(network: nn.Module, generator: torch.Generator) -> None:
    """Fill every parameter with noise that keeps activations near 1, including parameters that start at zero."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
            elif "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.1, generator=generator)
            else:
                parameter.normal_(0.0, 0.1, generator=generator)
