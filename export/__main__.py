"""`python -m export CHECKPOINTS -o BUNDLE`: trained weights become a bundle.

`python -m export published --denoiser X.pth --enhancer Y.pth -o BUNDLE` takes the published BS-Diff checkpoints.
`python -m export random PRESET -o BUNDLE` makes one with random weights: to time networks, no checkpoint is needed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bsdiff_rt.config import (
    PRESETS,
    Objective,
    Preprocessing,
    SamplerName,
    SamplerSettings,
    Schedule,
)
from bsdiff_rt.errors import SettingsError, run_command
from bsdiff_rt.files import file_sha256
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.published import denoiser_state, enhancer_state
from bsdiff_rt.networks.unet import Denoiser
from export.bundle import BundleOptions, write_bundle
from export.checkpoint import averaged_weights, weights_digest
from export.published import WeightsName, published_weights

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command("random")
def export_random(
    preset: Annotated[str, typer.Argument(help=f"Network shape: {', '.join(PRESETS)}.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new bundle.")],
    size: Annotated[int, typer.Option(min=16, help="Side of the images, px.")] = 256,
    enhance: Annotated[bool, typer.Option("--enhance/--no-enhance", help="Default of infer --enhance.")] = True,
    objective: Annotated[
        Objective, typer.Option(help="What it predicts: few steps of an untrained eps are no picture to compare.")
    ] = "eps",
    sampler: Annotated[SamplerName, typer.Option(help="Default sampler; build-engine compares with it.")] = "ddpm",
    steps: Annotated[int, typer.Option(min=1, help="Default number of steps.")] = 1000,
) -> None:
    """Make a bundle with random weights, for timing; without stage 2 an image costs its denoiser steps alone."""
    if preset not in PRESETS:
        raise SettingsError(f"preset {preset!r}: choose one of {', '.join(PRESETS)}")
    torch.manual_seed(0)
    shape = PRESETS[preset]
    settings = SamplerSettings(sampler, steps)
    options = BundleOptions(f"{preset}-random", settings, Preprocessing(size=size), enhance=enhance)
    denoiser, enhancer = Denoiser(shape.denoiser), Enhancer(shape.enhancer)
    for parameter in denoiser.parameters():
        if not parameter.any():  # zero at the start of training: the graph's agreement would compare zeros
            torch.nn.init.normal_(parameter, std=0.02)
    write_bundle(output, shape, Schedule(objective=objective), denoiser, enhancer, options)


@app.command("published")
def export_published(
    denoiser: Annotated[Path, typer.Option(help="Checkpoint of stage 1 (.pth).")],
    enhancer: Annotated[Path, typer.Option(help="Checkpoint of stage 2 (.pth).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new bundle.")],
    name: Annotated[str, typer.Option(help="Name of the model.")] = "bs-diff",
    weights: Annotated[
        WeightsName, typer.Option(help="Of stage 1: what the published test loads, the averages, or the optimiser's.")
    ] = "model",
    preset: Annotated[str, typer.Option(help="Network shape; the published one is `paper`.")] = "paper",
    size: Annotated[int, typer.Option(min=16, help="Side of the images, px.")] = 256,
    clahe: Annotated[float, typer.Option(min=0, help="CLAHE clip limit; 0: images are equalised already.")] = 0.0,
    licence: Annotated[str, typer.Option(help="Licence of the weights.")] = "unknown: ask the authors",
) -> None:
    """Make a bundle of the published checkpoints; nothing in them is run (docs/published-checkpoints.md)."""
    shapes = {key: shape for key, shape in PRESETS.items() if not shape.denoiser.residual}  # no published one adds cxr
    if preset not in shapes:
        raise SettingsError(f"preset {preset!r}: choose one of {', '.join(shapes)}")
    shape = shapes[preset]
    first = denoiser_state(published_weights(denoiser, weights), shape.denoiser)
    second = enhancer_state(published_weights(enhancer), shape.enhancer)
    with torch.device("meta"):  # the weights are there: no second copy to fill with random numbers
        networks = Denoiser(shape.denoiser), Enhancer(shape.enhancer)
    networks[0].load_state_dict(first, assign=True)
    networks[1].load_state_dict(second, assign=True)
    options = BundleOptions(
        name=name,
        sampler=SamplerSettings("release", 1000),
        preprocessing=Preprocessing(size=size, clahe_clip_limit=clahe),
        licence=licence,
        training={
            "source": "published checkpoints",
            "denoiser": {"file": denoiser.name, "sha256": file_sha256(denoiser), "weights": weights},
            "enhancer": {"file": enhancer.name, "sha256": file_sha256(enhancer)},
        },
    )
    manifest = write_bundle(output, shape, Schedule("squaredcos_cap_v2"), *networks, options)
    typer.echo(f"{output}: {manifest.name}, agreement with eager {manifest.agreement}")


@app.command("checkpoints")
def export_checkpoints(
    checkpoints: Annotated[Path, typer.Argument(help="Folder with denoiser.pt and enhancer.pt of `python -m train`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new bundle.")],
    name: Annotated[str, typer.Option(help="Name of the model.")] = "model",
    sampler: Annotated[SamplerName, typer.Option(help="Default sampler.")] = "ddpm",
    steps: Annotated[int, typer.Option(min=1, help="Default number of steps.")] = 1000,
    enhance: Annotated[bool, typer.Option("--enhance/--no-enhance", help="Default of infer --enhance.")] = True,
    mirror: Annotated[bool, typer.Option("--mirror/--no-mirror", help="Default of infer --mirror.")] = False,
    clahe: Annotated[
        float | None,
        typer.Option(
            min=0, help="CLAHE clip limit of the training data; 0: none.", show_default="the data set's, else 0"
        ),
    ] = None,
    least_span: Annotated[
        float, typer.Option(min=0, max=1, help="infer spreads X-rays whose grey levels span less; 0: none.")
    ] = Preprocessing.least_span,
    licence: Annotated[str, typer.Option(help="Licence of the weights.")] = "MIT",
    training: Annotated[Path | None, typer.Option(help="JSON file with the provenance of the weights.")] = None,
) -> None:
    """Make a bundle; refused unless ONNX Runtime agrees with eager."""
    provenance = {} if training is None else read_provenance(training)
    first, state = averaged_weights(checkpoints / "denoiser.pt")
    if enhance or (checkpoints / "enhancer.pt").exists():
        second, enhancer_state = averaged_weights(checkpoints / "enhancer.pt")
    else:
        second, enhancer_state = untrained_enhancer(checkpoints, first)
    check_stages(checkpoints, first, second, stage_one=weights_digest(state) if enhance else None)
    preset = PRESETS[first["preset"]]
    preprocessing = Preprocessing(first["size"], clahe_of(first, clahe), least_span=least_span)
    denoiser, enhancer = Denoiser(preset.denoiser), Enhancer(preset.enhancer)
    try:
        schedule = Schedule(**first["schedule"])
        denoiser.load_state_dict(state)
        enhancer.load_state_dict(enhancer_state)
    except (RuntimeError, TypeError) as error:  # a preset, or the schedule's fields, changed between versions
        raise SettingsError(
            f"{checkpoints}: the weights do not fit preset {preset.name} of this version; train them anew"
        ) from error
    options = BundleOptions(
        name=name,
        sampler=SamplerSettings(sampler, steps),
        preprocessing=preprocessing,
        enhance=enhance,
        mirror=mirror,
        licence=licence,
        training=provenance | told_by(first, second),
    )
    manifest = write_bundle(output, preset, schedule, denoiser, enhancer, options)
    typer.echo(f"{output}: {manifest.name}, agreement with eager {manifest.agreement}")


def check_stages(checkpoints: Path, first: dict[str, Any], second: dict[str, Any], *, stage_one: str | None) -> None:
    """Whether both stages' checkpoints belong together; `stage_one` is the digest stage 2 must have learned from.

    Raises:
        SettingsError: they do not, or one is no checkpoint of its stage.
    """
    if first["preset"] != second["preset"]:
        raise SettingsError(f"{checkpoints}: denoiser is {first['preset']}, enhancer is {second['preset']}")
    if first["size"] != second["size"]:
        raise SettingsError(f"{checkpoints}: denoiser is for {first['size']} px, enhancer for {second['size']} px")
    if stage_one is not None and second["stage_one"] not in (None, stage_one):
        raise SettingsError(
            f"{checkpoints}: the enhancer learned from another stage 1 than this denoiser; train the enhancer anew, or "
            "leave it off with --no-enhance"
        )
    if first["preset"] not in PRESETS:
        raise SettingsError(f"{checkpoints}: preset {first['preset']!r} is not one of {', '.join(PRESETS)}")
    if not first["schedule"]:
        raise SettingsError(f"{checkpoints / 'denoiser.pt'}: no schedule in it; it is not stage 1's checkpoint")


def untrained_enhancer(checkpoints: Path, first: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header and weights of a stage 2 that returns its input, for a bundle that leaves it off.

    Raises:
        SettingsError: the preset's stage 2 does not begin as that.
    """
    preset = PRESETS.get(first["preset"])
    if preset is None or not preset.enhancer.residual:
        raise SettingsError(f"{checkpoints / 'enhancer.pt'}: no such checkpoint; `python -m train enhancer` writes it")
    header = {"preset": first["preset"], "step": 0, "size": first["size"], "stage_one": None, "trained_on": None}
    return header, Enhancer(preset.enhancer).state_dict()


def clahe_of(first: dict[str, Any], asked: float | None) -> float:
    """CLAHE clip limit of the networks' input: what stage 1 was trained on, where its checkpoint says so.

    Raises:
        SettingsError: another one is asked for.
    """
    known = first["clahe"]
    if None not in (known, asked) and known != asked:
        raise SettingsError(
            f"--clahe {asked:g}: the data set was prepared with {known:g}; leave the option out, or train anew"
        )
    return float((asked if known is None else known) or 0.0)


def told_by(first: dict[str, Any], second: dict[str, Any]) -> dict[str, object]:
    """What the two checkpoints' headers say of their training: steps, the bundle that stage 1 started from, and the
    digests of the X-rays that either learned from."""
    told: dict[str, object] = {"denoiser_steps": first["step"], "enhancer_steps": second["step"]}
    told |= {"denoiser_start": first["start"]} if first["start"] else {}
    trained_on = {*(first["trained_on"] or ()), *(second["trained_on"] or ())}
    return told | ({"trained_on": sorted(trained_on)} if trained_on else {})


def read_provenance(path: Path) -> dict[str, object]:
    """The JSON object in `path`.

    Raises:
        SettingsError: not readable, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(f"--training {path}: not a readable JSON file ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise SettingsError(f"--training {path}: should hold a JSON object")
    return content


def main() -> None:
    """Entry point: our errors become one line and their exit code."""
    # `export CHECKPOINTS` is the plain form; a first word that is no command is its folder, or one of its options.
    if len(sys.argv) > 1 and sys.argv[1] not in ("random", "published", "checkpoints", "--help"):
        sys.argv.insert(1, "checkpoints")
    run_command(app)


if __name__ == "__main__":
    main()
