"""`python -m export`: make a bundle from trained weights.

`python -m export CHECKPOINTS -o BUNDLE` takes the checkpoints of `python -m train`.
`python -m export published --denoiser X.pth --enhancer Y.pth -o BUNDLE` takes the published BS-Diff checkpoints.
`python -m export random PRESET -o BUNDLE` makes random weights, to time a network without a checkpoint.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bsdiff_rt.bench.networks import fill_randomly
from bsdiff_rt.bundle import Manifest, open_bundle
from bsdiff_rt.config import (
    NO_ENHANCER,
    PRESETS,
    Objective,
    Precision,
    Preprocessing,
    Preset,
    SamplerName,
    SamplerSettings,
    Schedule,
)
from bsdiff_rt.engines.onnx_files import save_graphs
from bsdiff_rt.errors import SettingsError, run_command
from bsdiff_rt.files import file_sha256
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.published import denoiser_state, enhancer_state
from bsdiff_rt.networks.unet import Denoiser
from export.bundle import UNSTATED, BundleOptions, check_folder, write_bundle
from export.checkpoint import hash_weights, read_averaged_weights
from export.published import WeightsName, read_published_weights
from export.speed import measure_speed


@dataclass(frozen=True)
class Target:
    """Where to write, and what.

    Attributes:
        folder: of the bundle or of the graphs.
        overwrite: whether a bundle in the folder is replaced.
        onnx_only: whether only the graphs are written.
        precision: of the graphs; fp32 for a bundle, which always holds fp32.
    """

    folder: Path
    overwrite: bool
    onnx_only: bool
    precision: Precision

    def check(self) -> None:
        """Raise SettingsError, before anything is computed, if the folder cannot be used or the options contradict."""
        if self.onnx_only and self.overwrite:
            raise SettingsError("--onnx-only replaces no files. Leave --overwrite out and give a new folder.")
        if not self.onnx_only and self.precision != "fp32":
            raise SettingsError(
                f"--precision {self.precision}: a bundle holds fp32. Give --onnx-only, or choose the precision of an "
                "engine when you build it."
            )
        check_folder(self.folder, self.overwrite)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# Default sampler and mirror by objective. A model of x0 or v finds the image in a few steps; eps needs them all.
FEW_STEPS, ALL_STEPS = SamplerSettings("ddim", 3), SamplerSettings("ddpm", 1000)

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the new bundle. Must be new or empty.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the bundle in the output folder.")]
OnnxOnly = Annotated[bool, typer.Option("--onnx-only", help="Write only the graphs, for other tools, and no bundle.")]
GraphPrecision = Annotated[Precision, typer.Option(help="Precision of the graphs that --onnx-only writes.")]
Licence = Annotated[str, typer.Option(help="Licence of the weights.")]


@app.command("random")
def export_random(
    preset: Annotated[str, typer.Argument(help=f"Network shape: {', '.join(PRESETS)}.")],
    output: Output,
    size: Annotated[int, typer.Option(min=16, help="Side of the images, px.")] = 256,
    enhance: Annotated[bool, typer.Option("--enhance/--no-enhance", help="Run stage 2 by default.")] = True,
    objective: Annotated[Objective, typer.Option(help="What the model predicts.")] = "eps",
    sampler: Annotated[
        SamplerName | None, typer.Option(help="Default sampler.", show_default="ddpm for eps, else ddim")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Default number of steps.", show_default="1000 for eps, else 3")
    ] = None,
    overwrite: Overwrite = False,
    onnx_only: OnnxOnly = False,
    precision: GraphPrecision = "fp32",
) -> None:
    """Make a bundle with random weights, to time a network without a checkpoint."""
    if preset not in PRESETS:
        raise SettingsError(f"preset {preset!r}: choose one of {', '.join(PRESETS)}")
    Target(output, overwrite, onnx_only, precision).check()
    generator = torch.Generator().manual_seed(0)
    shape = PRESETS[preset]
    settings = choose_sampler(objective, sampler, steps)
    options = BundleOptions(f"{preset}-random", settings, Preprocessing(size=size), enhance=enhance)
    denoiser, enhancer = Denoiser(shape.denoiser), Enhancer(shape.enhancer)
    for network in (denoiser, enhancer):  # a new network's last layers are zero; zeros would always agree
        fill_randomly(network, generator)
    schedule = Schedule(objective=objective)
    write(Target(output, overwrite, onnx_only, precision), shape, schedule, (denoiser, enhancer), options)


@app.command("published")
def export_published(
    denoiser: Annotated[Path, typer.Option(help="Checkpoint of stage 1 (.pth).")],
    enhancer: Annotated[Path, typer.Option(help="Checkpoint of stage 2 (.pth).")],
    output: Output,
    name: Annotated[str, typer.Option(help="Name of the model.")] = "bs-diff",
    weights: Annotated[
        WeightsName,
        typer.Option(help="Weights of stage 1: those the published test loads, the averages, or the optimiser's."),
    ] = "model",
    preset: Annotated[str, typer.Option(help="Network shape. The published one is `paper`.")] = "paper",
    size: Annotated[int, typer.Option(min=16, help="Side of the images, px.")] = 256,
    clahe: Annotated[
        float, typer.Option(min=0, help="CLAHE clip limit. 0: no CLAHE, for images that are equalised already.")
    ] = 0.0,
    licence: Licence = UNSTATED,
    overwrite: Overwrite = False,
    onnx_only: OnnxOnly = False,
    precision: GraphPrecision = "fp32",
) -> None:
    """Make a bundle of the published checkpoints. Nothing in them is executed (docs/published-checkpoints.md)."""
    shapes = {key: shape for key, shape in PRESETS.items() if not shape.denoiser.residual}  # as published
    if preset not in shapes:
        raise SettingsError(f"preset {preset!r}: choose one of {', '.join(shapes)}")
    Target(output, overwrite, onnx_only, precision).check()
    shape = shapes[preset]
    first = denoiser_state(read_published_weights(denoiser, weights), shape.denoiser)
    second = enhancer_state(read_published_weights(enhancer), shape.enhancer)
    with torch.device("meta"):  # the weights are read already: no second copy with random numbers
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
    schedule = Schedule("squaredcos_cap_v2")
    write(Target(output, overwrite, onnx_only, precision), shape, schedule, networks, options)


@app.command("checkpoints")
def export_checkpoints(
    checkpoints: Annotated[Path, typer.Argument(help="Folder of `python -m train`: denoiser.pt, perhaps enhancer.pt.")],
    output: Output,
    name: Annotated[str, typer.Option(help="Name of the model.")] = "model",
    sampler: Annotated[
        SamplerName | None, typer.Option(help="Default sampler.", show_default="ddpm for eps, else ddim")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Default number of steps.", show_default="1000 for eps, else 3")
    ] = None,
    enhance: Annotated[
        bool | None,
        typer.Option(
            "--enhance/--no-enhance", help="Run stage 2 by default.", show_default="on if enhancer.pt is there"
        ),
    ] = None,
    mirror: Annotated[
        bool | None,
        typer.Option(
            "--mirror/--no-mirror",
            help="Average with the result for the mirrored image by default.",
            show_default="off for eps, else on",
        ),
    ] = None,
    clahe: Annotated[
        float | None,
        typer.Option(
            min=0, help="CLAHE clip limit of the training data. 0: no CLAHE.", show_default="as in the checkpoint, or 0"
        ),
    ] = None,
    least_span: Annotated[
        float, typer.Option(min=0, max=1, help="Stretch X-rays whose grey levels span less than this. 0: never.")
    ] = Preprocessing.least_span,
    licence: Licence = UNSTATED,
    training: Annotated[Path | None, typer.Option(help="JSON file that says where the weights come from.")] = None,
    overwrite: Overwrite = False,
    onnx_only: OnnxOnly = False,
    precision: GraphPrecision = "fp32",
) -> None:
    """Make a bundle of the checkpoints of `python -m train`, if ONNX Runtime agrees with the eager networks."""
    Target(output, overwrite, onnx_only, precision).check()
    provenance = {} if training is None else read_provenance(training)
    first, state = read_averaged_weights(checkpoints / "denoiser.pt")
    enhance = (checkpoints / "enhancer.pt").exists() if enhance is None else enhance
    second, enhancer_weights = read_stage_two(checkpoints, first, needed=enhance)
    check_stages(checkpoints, first, second, stage_one=hash_weights(state) if enhance else None)
    preset = PRESETS[first["preset"]]
    if enhancer_weights is None:
        preset = replace(preset, enhancer=NO_ENHANCER)
    schedule, denoiser, enhancer = build_networks(checkpoints, preset, first, state, enhancer_weights)
    options = BundleOptions(
        name=name,
        sampler=choose_sampler(schedule.objective, sampler, steps),
        preprocessing=Preprocessing(first["size"], resolve_clahe(first, clahe), least_span=least_span),
        enhance=enhance,
        mirror=schedule.objective != "eps" if mirror is None else mirror,
        licence=licence,
        training=provenance | collect_provenance(first, second),
    )
    write(Target(output, overwrite, onnx_only, precision), preset, schedule, (denoiser, enhancer), options)


def write(
    target: Target, preset: Preset, schedule: Schedule, networks: tuple[Denoiser, Enhancer], options: BundleOptions
) -> None:
    """Write the bundle, or only its graphs, and print what was written."""
    if not target.onnx_only:
        made = write_bundle(target.folder, preset, schedule, *networks, options, overwrite=target.overwrite)
        describe_bundle(target.folder, made)
        return
    with tempfile.TemporaryDirectory() as work:
        write_bundle(Path(work) / options.name, preset, schedule, *networks, options)
        files = save_graphs(open_bundle(str(Path(work) / options.name)), target.precision, target.folder)
    for file in files:
        typer.echo(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)")


def describe_bundle(folder: Path, manifest: Manifest) -> None:
    """Print what was written and how long an image takes with it."""
    agreement = max(manifest.agreement[network] for network in ("denoiser", "enhancer"))
    typer.echo(f"{folder}: wrote bundle {manifest.name}. Licence: {manifest.licence}.")
    typer.echo(f"largest difference between ONNX Runtime and eager: {agreement:.1e} of the largest output")
    typer.echo(measure_speed(folder, manifest))


def choose_sampler(objective: Objective, name: SamplerName | None, steps: int | None) -> SamplerSettings:
    """Return the default sampler of a bundle: as asked for, else what suits the objective."""
    default = ALL_STEPS if objective == "eps" else FEW_STEPS
    return SamplerSettings(name or default.name, steps or default.steps)


def build_networks(
    checkpoints: Path,
    preset: Preset,
    first: dict[str, Any],
    denoiser_weights: dict[str, torch.Tensor],
    enhancer_weights: dict[str, torch.Tensor] | None,
) -> tuple[Schedule, Denoiser, Enhancer]:
    """Return the diffusion and both networks with their weights.

    Args:
        checkpoints: folder, for the message.
        preset: shape of both networks.
        first: header of stage 1's checkpoint.
        denoiser_weights: of stage 1.
        enhancer_weights: of stage 2; None leaves it as it is made.

    Raises:
        SettingsError: the weights or the diffusion do not fit the preset of this version.
    """
    denoiser, enhancer = Denoiser(preset.denoiser), Enhancer(preset.enhancer)
    try:
        schedule = Schedule(**first["schedule"])
        denoiser.load_state_dict(denoiser_weights)
        if enhancer_weights is not None:
            enhancer.load_state_dict(enhancer_weights)
    except (RuntimeError, TypeError) as error:
        raise SettingsError(
            f"{checkpoints}: the weights do not fit preset {preset.name} of this version. Train them again."
        ) from error
    return schedule, denoiser, enhancer


def read_stage_two(
    checkpoints: Path, first: dict[str, Any], *, needed: bool
) -> tuple[dict[str, Any], dict[str, torch.Tensor] | None]:
    """Return header and weights of stage 2; no weights, and say so, if it is not there and not needed.

    Args:
        checkpoints: folder.
        first: header of stage 1's checkpoint.
        needed: whether stage 2 must be there.

    Raises:
        SettingsError: it is not there, or cannot be read.
    """
    if needed or (checkpoints / "enhancer.pt").exists():
        return read_averaged_weights(checkpoints / "enhancer.pt")
    typer.echo(f"{checkpoints} has no enhancer.pt: a bundle without stage 2")
    header = {"preset": first["preset"], "step": 0, "size": first["size"], "stage_one": None, "trained_on": None}
    return header, None


def check_stages(checkpoints: Path, first: dict[str, Any], second: dict[str, Any], *, stage_one: str | None) -> None:
    """Check that the checkpoints of both stages belong together.

    Args:
        checkpoints: folder, for the message.
        first: header of stage 1's checkpoint.
        second: header of stage 2's checkpoint.
        stage_one: SHA-256 of the stage 1 that stage 2 must have been trained on; None: not checked.

    Raises:
        SettingsError: they do not, or one is no checkpoint of its stage.
    """
    if first["preset"] != second["preset"]:
        raise SettingsError(f"{checkpoints}: denoiser is {first['preset']}, enhancer is {second['preset']}")
    if first["size"] != second["size"]:
        raise SettingsError(f"{checkpoints}: denoiser is for {first['size']} px, enhancer for {second['size']} px")
    if stage_one is not None and second["stage_one"] not in (None, stage_one):
        raise SettingsError(
            f"{checkpoints}: the enhancer was trained on another stage 1 than this denoiser. Train the enhancer again, "
            "or leave it off with --no-enhance."
        )
    if first["preset"] not in PRESETS:
        raise SettingsError(f"{checkpoints}: preset {first['preset']!r} is not one of {', '.join(PRESETS)}")
    if not first["schedule"]:
        raise SettingsError(f"{checkpoints / 'denoiser.pt'}: has no schedule, so it is not a checkpoint of stage 1")


def resolve_clahe(first: dict[str, Any], requested: float | None) -> float:
    """Return the CLAHE clip limit of the model's input: what stage 1 was trained on, if its checkpoint says so.

    Raises:
        SettingsError: another one is requested.
    """
    known = first["clahe"]
    if None not in (known, requested) and known != requested:
        raise SettingsError(f"--clahe {requested:g}: the model was trained on {known:g}. Leave the option out.")
    return float((requested if known is None else known) or 0.0)


def collect_provenance(first: dict[str, Any], second: dict[str, Any]) -> dict[str, object]:
    """Return what the checkpoints' headers say about the training.

    Args:
        first: header of stage 1's checkpoint.
        second: header of stage 2's checkpoint.

    Returns:
        Steps of both stages; SHA-256 of the bundle that stage 1 started from; digests of the X-rays trained on.
    """
    found: dict[str, object] = {"denoiser_steps": first["step"], "enhancer_steps": second["step"]}
    found |= {"denoiser_start": first["start"]} if first["start"] else {}
    trained_on = {*(first["trained_on"] or ()), *(second["trained_on"] or ())}
    return found | ({"trained_on": sorted(trained_on)} if trained_on else {})


def read_provenance(path: Path) -> dict[str, object]:
    """Return the JSON object in the file `path`.

    Raises:
        SettingsError: it cannot be read, or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(f"--training {path}: not a readable JSON file ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise SettingsError(f"--training {path}: it must hold a JSON object")
    return content


def main() -> None:
    """Run the command line. An error of this package becomes one line on stderr and an exit code."""
    # `python -m export CHECKPOINTS` is the plain form: a first word that is no command is the folder or an option.
    if len(sys.argv) > 1 and sys.argv[1] not in ("random", "published", "checkpoints", "--help"):
        sys.argv.insert(1, "checkpoints")
    run_command(app)


if __name__ == "__main__":
    main()
