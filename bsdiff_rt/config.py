"""Frozen settings, one dataclass per concern, and the named network presets. Torch-free: the command line imports it.

Each default lives here and nowhere else. The resolved settings are saved in every report and every bundle.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

ScheduleName = Literal["cosine", "squaredcos_cap_v2"]
Objective = Literal["eps", "v", "x0"]
SamplerName = Literal["ddpm", "ddim", "dpmpp-2m", "release"]
DetailName = Literal["full", "model"]
FormatName = Literal["auto", "png", "dicom", "dicom-sc", "dicom-j2k"]
Precision = Literal["fp32", "bf16", "fp16"]
SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)
FEW_STEP_SAMPLERS = frozenset({"ddim", "dpmpp-2m"})  # a bundle's number of steps holds for both


@dataclass(frozen=True)
class DenoiserConfig:
    """Shape of the stage 1 U-Net: one entry per level, from full resolution down (docs/design.md, Networks).

    `residual` adds the radiograph to the output, so that a network that predicts x0 has only the bone to find and
    cannot smooth the rest; the published network has no such shortcut.
    """

    channels: tuple[int, ...]
    res_blocks: tuple[int, ...]
    attention: tuple[bool, ...]
    norm_groups: int = 32
    residual: bool = False

    in_channels: int = 2  # x_t and cxr, concatenated
    out_channels: int = 1


@dataclass(frozen=True)
class EnhancerConfig:
    """Shape of the stage 2 autoencoder: one entry per level, from full resolution down (docs/design.md, Networks).

    `residual` adds the input to the output: the network has only the correction to find, and starts with none. The
    published network has no such shortcut.
    """

    channels: tuple[int, ...]
    res_blocks: tuple[int, ...]
    attention: tuple[bool, ...]
    latent_channels: int
    middle_attention: bool = True
    norm_groups: int = 32
    residual: bool = False


# Stage 2 of a bundle without one: with new weights it returns its input, and it is not run.
NO_ENHANCER = EnhancerConfig(
    (8, 8, 8), (1, 1, 1), (False,) * 3, latent_channels=4, middle_attention=False, norm_groups=4, residual=True
)


@dataclass(frozen=True)
class Schedule:
    """The diffusion the denoiser was trained for; stored with the weights, never assumed.

    `cosine` runs beta along half a cosine from `beta_start` to `beta_end` (the paper's words); `squaredcos_cap_v2` is
    Nichol and Dhariwal's schedule as diffusers implements it (the published code), which ignores the two betas.
    """

    name: ScheduleName = "cosine"
    train_steps: int = 1000
    beta_start: float = 0.0015
    beta_end: float = 0.0205
    objective: Objective = "eps"


@dataclass(frozen=True)
class SamplerSettings:
    """How an image is sampled: name of the sampler, number of denoiser steps, seed."""

    name: SamplerName = "ddpm"
    steps: int = 1000
    seed: int = 0


def step_count(steps: int) -> str:
    """Return a number of steps as text: `1 step`, `20 steps`."""
    return f"{steps} step{'' if steps == 1 else 's'}"


@dataclass(frozen=True)
class Preprocessing:
    """From a radiograph in [0, 1] to the denoiser's input; shared by training and inference, recorded in the bundle.

    `size` is the side of the square the network sees, in px. `clahe_clip_limit` is OpenCV's clip limit, 0 for no CLAHE.
    At inference, a picture whose grey levels span less than `least_span` is spread first (`view.find_view`). 0 is for
    never.
    """

    size: int = 256
    clahe_clip_limit: float = 0.0
    clahe_tiles: int = 8
    least_span: float = 0.0


@dataclass(frozen=True)
class EngineOptions:
    """What `build-engine` was asked for.

    `batch` is the smallest and largest batch the engine takes; equal for an engine of one batch size. `capabilities`
    are the compute capabilities of the GPUs to build for, such as ("8.9",); () for the device of this machine.
    `max_autotune` lets torch's compiler try more kernels for each matrix product and convolution.
    """

    runner: str
    precision: Precision
    batch: tuple[int, int]
    capabilities: tuple[str, ...] = ()
    max_autotune: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model runs, how, and on what. None and "auto" are resolved against the bundle and the machine.

    Attributes:
        bundle: name of a shipped bundle, or a bundle's folder.
        runner: a runner's name, "auto", or the folder of a built engine.
        device: auto, cpu, cuda or cuda:N.
        precision: of weights and activations: auto, fp32, bf16 or fp16.
        batch: images per batch; None lets the runner decide.
        threads: CPU threads; None takes the library's default.
        sampler: None takes the bundle's.
        steps: denoiser steps per image; None takes the bundle's, or all with a sampler of another kind than its own.
        cache_every: compute the model's deep features in every Nth step only, from 20 steps on. 1 is exact.
        seed: of the noise. The same image and seed give the same result.
        samples: samples per image. Their mean is the result.
        enhance: whether stage 2 runs; None takes the bundle's choice.
        mirror: whether the result is averaged with that of the mirrored X-ray; None takes the bundle's choice.
        detail: full adds fine detail from the X-ray that is not bone; model keeps the model's picture alone.
        raw_view: show borders and burned-in text to the model, too.
        probe: measure how much of a small nodule would survive at each place. It takes five times as long.
    """

    bundle: str = "demo"
    runner: str = "auto"
    device: str = "auto"
    precision: str = "auto"
    batch: int | None = None
    threads: int | None = None
    sampler: SamplerName | None = None
    steps: int | None = None
    cache_every: int = 1
    seed: int = 0
    samples: int = 1
    enhance: bool | None = None
    mirror: bool | None = None
    detail: DetailName = "full"
    raw_view: bool = False
    probe: bool = False


@dataclass(frozen=True, kw_only=True)
class InferSettings(ModelSettings):
    """What `infer` was asked for: the model's settings, and what happens to files.

    Attributes:
        output: folder of the results and of report.json.
        format: of the results; auto writes DICOM for DICOM input and PNG otherwise.
        preview: whether preview.png is written.
        html: whether report.html is written.
        overwrite: whether finished files are done again.
        any_view: whether lateral views and other body parts are taken, too.
    """

    output: Path
    format: FormatName = "auto"
    preview: bool = False
    html: bool = False
    overwrite: bool = False
    any_view: bool = False


@dataclass(frozen=True)
class Preset:
    """A named pair of network shapes."""

    name: str
    denoiser: DenoiserConfig
    enhancer: EnhancerConfig


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        # The published networks: 220.2 M and 34.4 M parameters. Attention is single-head, head size = channels.
        Preset(
            "paper",
            DenoiserConfig((64, 128, 256, 512, 768), (3,) * 5, (False, True, True, True, True)),
            EnhancerConfig((128, 256, 384), (2,) * 3, (False, True, True), latent_channels=8),
        ),
        # Small enough for two CPU cores; five levels so that the attention in the middle sees the whole chest.
        Preset(
            "demo",
            DenoiserConfig((16, 32, 64, 96, 128), (8, 6, 5, 4, 2), (False,) * 5, norm_groups=8, residual=True),
            EnhancerConfig(
                (16, 48, 128),
                (1, 1, 3),
                (False,) * 3,
                latent_channels=16,
                middle_attention=False,
                norm_groups=8,
                residual=True,
            ),
        ),
        # For tests: every kind of block, in milliseconds.
        Preset(
            "tiny",
            DenoiserConfig((8, 16), (1, 1), (False, True), norm_groups=4),
            EnhancerConfig((8, 16), (1, 1), (False, True), latent_channels=4, norm_groups=4),
        ),
    )
}
