"""`python -m train`: phantoms, the denoiser (stage 1), the enhancer (stage 2), or the whole demo model.

Longer than other modules: most of it is options, and what each does.
"""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import cv2
import typer

from bsdiff_rt.config import PRESETS, Objective, Preset, ScheduleName
from bsdiff_rt.errors import SettingsError, run_command
from bsdiff_rt.formats.raster import find_pairs
from train.checkpoint import load_checkpoint
from train.comparator import crop_of, dry_run_comparator, train_comparator
from train.comparators import COMPARATORS
from train.data import (
    AUGMENTATION_SETS,
    STORED_PX,
    Augmentation,
    Batches,
    Pair,
    dataset_settings,
    load_dataset,
    load_pair,
)
from train.denoiser import dry_run_denoiser, train_denoiser
from train.enhancer import StageOne, dry_run_enhancer, stage_one_outputs, train_enhancer
from train.loop import TrainOptions, crops_of, leave_processes, mixed_precision, new_accelerator
from train.perceptual import WEIGHTS_FILE, load_vgg16
from train.phantom_dicom import write_cr
from train.phantom_pool import HELD_OUT_PHANTOM_SEED, held_out_phantoms, phantom_pool
from train.phantoms import SMALLEST_PX, phantom, write_pairs
from train.prepare import PrepareOptions, parse_split, prepare, read_exclusions
from train.recipe import CHECK_EPOCHS, RECIPES, VERSIONS_PER_PAIR, Recipe
from train.validation import Validation

logger = logging.getLogger(__name__)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help=(__doc__ or "").split("\n")[0],
    result_callback=leave_processes,
)


def preset_of(name: str) -> Preset:
    """The preset of that name.

    Raises:
        SettingsError: there is none.
    """
    if name not in PRESETS:
        raise SettingsError(f"preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def split_pairs(folder: Path | None, hold_out: list[str], size: int) -> tuple[list[Pair], list[Pair]]:
    """Training pairs, and held-out pairs at the network's size."""
    if folder is None:
        return [], []
    found = find_pairs(folder)
    unknown = set(hold_out) - {name for name, _, _ in found}
    if unknown:
        raise SettingsError(f"--hold-out {', '.join(sorted(unknown))}: no such pair in {folder}")
    stored = max(STORED_PX, size * 3 // 2)  # room to zoom in
    train = [load_pair(*entry, size=stored) for entry in found if entry[0] not in hold_out]
    held_out = [load_pair(*entry, size=size) for entry in found if entry[0] in hold_out]
    return train, held_out


def real_pairs(
    pairs: Path | None, hold_out: list[str] | None, dataset: Path | None, size: int
) -> tuple[list[Pair], list[Pair]]:
    """Training pairs, and pairs to validate on at the network's size: of a folder of pairs, or of a data set.

    Raises:
        SettingsError: both are given, or the data set's train part is empty, or smaller than the network's size.
    """
    if dataset is None:
        return split_pairs(pairs, hold_out or [], size)
    if pairs or hold_out:
        raise SettingsError("--dataset brings its own parts: give it without --pairs and --hold-out")
    made, _ = dataset_settings(dataset)
    if made < size:
        raise SettingsError(f"--size {size}: {dataset} was prepared at {made} px; prepare it anew, at {size} or more")
    train = load_dataset(dataset, "train")
    if not train:
        raise SettingsError(f"{dataset}: its train part is empty")
    return train, load_dataset(dataset, "val", size)


# Options that several commands share. An option left out takes the recipe's value.
Pairs = Annotated[Path | None, typer.Option(help="Folder of NAME_cxr.* and NAME_soft_tissue.*.")]
HoldOut = Annotated[list[str] | None, typer.Option(help="Pair kept for validation; repeatable.")]
DatasetFolder = Annotated[
    Path | None, typer.Option("--dataset", help="Folder made by `prepare`: train on train, validate on val.")
]
Augment = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(AUGMENTATION_SETS)}, or some of: {', '.join(sorted(AUGMENTATION_SETS['demo']))}.",
        show_default="the recipe's",
    ),
]
RecipeName = Annotated[str, typer.Option("--recipe", help=f"Settings: {', '.join(RECIPES)} (train/recipe.py).")]
Phantoms = Annotated[int | None, typer.Option(min=0, help="Phantoms to train on.", show_default="the recipe's")]
Steps = Annotated[int | None, typer.Option(min=1, help="Optimiser steps.", show_default="the recipe's")]
Rate = Annotated[float | None, typer.Option(min=0.0, help="Peak learning rate.", show_default="the recipe's")]
RealShare = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Share of real samples in a batch.", show_default="the recipe's")
]
SaveEvery = Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints.", show_default="the recipe's")]
Accumulate = Annotated[int, typer.Option(min=1, help="Pieces a batch is computed in: less memory, same gradient.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Bf16 = Annotated[
    bool | None,
    typer.Option("--bf16/--no-bf16", show_default="where the device computes it", help="Mixed precision."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the memory and time it would take; train nothing.")]


def recipe_of(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        SettingsError: there is none.
    """
    if name not in RECIPES:
        raise SettingsError(f"--recipe {name}: choose one of {', '.join(RECIPES)}")
    return RECIPES[name]


def given(**options: Any) -> dict[str, Any]:
    """Those options that were given on the command line."""
    return {name: value for name, value in options.items() if value is not None}


def options_of(recipe: Recipe, stage: TrainOptions, pairs: int, **options: Any) -> TrainOptions:
    """A stage's options: the recipe's for that number of training pairs, and what was given on the command line.

    Where the recipe counts epochs, given steps stand for all of them: checkpoints keep their share of the run. More
    checkpoints, each judged, do not end a training sooner: as many more go by without a better one.
    """
    steps, save_every = options["steps"], options["save_every"]
    if steps and recipe.epochs:
        counted = replace(stage, save_every=max(1, steps * CHECK_EPOCHS // recipe.epochs))
    else:
        counted = stage if steps else recipe.options(stage, pairs, new_accelerator().num_processes)
    if save_every:
        counted = replace(counted, patience=math.ceil(counted.patience * counted.save_every / save_every))
    return replace(counted, **given(**options))


def source_of(recipe: Recipe, phantoms: int | None, real_share: float | None, augment: str | None) -> Recipe:
    """The recipe with the phantoms, share of real samples and augmentation that were given on the command line."""
    augmentation = None if augment is None else Augmentation.of(augment)
    return replace(recipe, **given(phantoms=phantoms, real_share=real_share, augmentation=augmentation))


def batches_of(
    recipe: Recipe, real: list[Pair], dataset: Path | None, folder: Path, size: int, seed: int, keep: bool = True
) -> Batches:
    """The training samples of a recipe; its phantoms are made by one process and kept in `folder` (`phantom_pool`).

    Raises:
        SettingsError: see `Batches`; or images smaller than phantoms can be.
    """
    if recipe.phantoms and size < SMALLEST_PX:
        raise SettingsError(f"--size {size}: phantoms are drawn from {SMALLEST_PX} px on; give --phantoms 0")
    _, clahe = dataset_settings(dataset) if dataset else (0, None)
    with new_accelerator().main_process_first():
        pool = phantom_pool(folder, recipe.phantoms, size, keep)
    return Batches(real, pool, recipe.real_share, recipe.augmentation, seed, clahe)


def groups_of(held_out: list[Pair], phantoms: int, size: int, patience: int) -> dict[str, list[Pair]]:
    """What is validated on: held-out pairs, and phantoms where phantoms are trained on or there are no such pairs.

    Raises:
        SettingsError: nothing is held out, and what is validated on decides when training ends, or is too small to
            be drawn.
    """
    if not held_out and not phantoms:
        if patience:
            raise SettingsError(
                "no pair is held out to say when to stop: give --hold-out, or a data set with pairs in its val part"
            )
        logger.warning("no pair is held out: progress is judged on drawn phantoms")
        if size < SMALLEST_PX:
            raise SettingsError(f"--size {size}: phantoms are drawn from {SMALLEST_PX} px on; give --hold-out")
    drawn = {"phantoms": held_out_phantoms(8, size)} if phantoms or not held_out else {}
    return drawn | ({"pairs": held_out} if held_out else {})


@app.command()
def denoiser(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoints, log and sample grids.")],
    pairs: Pairs = None,
    recipe: RecipeName = "demo",
    phantoms: Phantoms = None,
    hold_out: HoldOut = None,
    dataset: DatasetFolder = None,
    augment: Augment = None,
    preset: Annotated[
        str | None, typer.Option(help=f"Network shape: {', '.join(PRESETS)}.", show_default="the recipe's")
    ] = None,
    objective: Annotated[
        Objective | None, typer.Option(help="What the network predicts.", show_default="the recipe's")
    ] = None,
    schedule: Annotated[ScheduleName | None, typer.Option(help="Noise schedule.", show_default="the recipe's")] = None,
    size: Annotated[int, typer.Option(min=16, help="Side of the images, px.")] = 256,
    crop: Annotated[
        int | None, typer.Option(min=16, help="Side of the crops trained on, px.", show_default="the recipe's, growing")
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="Bundle whose denoiser training starts from, `demo` or a folder.")
    ] = None,
    steps: Steps = None,
    learning_rate: Rate = None,
    real_share: RealShare = None,
    save_every: SaveEvery = None,
    accumulate: Accumulate = 1,
    seed: Seed = 0,
    bf16: Bf16 = None,
    dry_run: DryRun = False,
) -> None:
    """Train stage 1; resumes where the folder holds a checkpoint."""
    chosen = recipe_of(recipe)
    real, held_out = real_pairs(pairs, hold_out, dataset, size)
    fixed = {"accumulate": accumulate, "seed": seed, "bf16": mixed_precision(bf16)}
    of_run = {"steps": steps, "learning_rate": learning_rate, "save_every": save_every}
    crops = None if crop is None else crops_of(crop, size)
    options = options_of(chosen, chosen.denoiser, len(real), **of_run, **fixed, crops=crops)
    options.crop(0, size)  # refuses a side the networks do not take, before phantoms are drawn
    diffusion = replace(chosen.schedule, **given(name=schedule, objective=objective))
    shape = preset_of(preset or chosen.preset)
    source = source_of(chosen, phantoms, real_share, augment)
    batches = batches_of(source, real, dataset, output, size, seed, keep=not dry_run)
    if dry_run:
        typer.echo(dry_run_denoiser(shape, diffusion, batches, options, size))
        return
    output.mkdir(parents=True, exist_ok=True)
    validation = Validation(groups_of(held_out, source.phantoms, size, options.patience), diffusion, chosen.validation)
    train_denoiser(output, shape, diffusion, batches, validation, options, size, start)


@app.command()
def enhancer(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder that holds denoiser.pt; results go there.")],
    pairs: Pairs = None,
    recipe: RecipeName = "demo",
    phantoms: Phantoms = None,
    hold_out: HoldOut = None,
    dataset: DatasetFolder = None,
    augment: Augment = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Augmented samples stage 1 is run on.", show_default="the recipe's")
    ] = None,
    stage_one_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of stage 1 on each of them.", show_default="the recipe's")
    ] = None,
    perceptual: Annotated[
        float | None, typer.Option(min=0.0, help="Weight of the perceptual term.", show_default="the recipe's")
    ] = None,
    adversarial: Annotated[
        float | None, typer.Option(min=0.0, help="Weight of the adversarial term.", show_default="the recipe's")
    ] = None,
    vgg16: Annotated[
        Path | None, typer.Option(help=f"{WEIGHTS_FILE} of torchvision.", show_default="torch.hub's cache")
    ] = None,
    steps: Steps = None,
    learning_rate: Rate = None,
    real_share: RealShare = None,
    save_every: SaveEvery = None,
    accumulate: Accumulate = 1,
    seed: Seed = 0,
    bf16: Bf16 = None,
    dry_run: DryRun = False,
) -> None:
    """Train stage 2 on what the stage 1 in the same folder makes; resumes where the folder holds a checkpoint."""
    chosen = recipe_of(recipe)
    weights = replace(chosen.losses, **given(perceptual=perceptual, adversarial=adversarial))
    vgg = load_vgg16(vgg16) if weights.perceptual else None  # first: a missing file should not show after hours
    header = load_checkpoint(output / "denoiser.pt")
    if not {"preset", "size", "schedule"} <= header.keys():
        raise SettingsError(f"{output / 'denoiser.pt'}: not stage 1's checkpoint; `python -m train denoiser` writes it")
    shape, size = preset_of(header["preset"]), header["size"]
    real, held_out = real_pairs(pairs, hold_out, dataset, size)
    fixed = {"accumulate": accumulate, "seed": seed, "bf16": mixed_precision(bf16)}
    of_run = {"steps": steps, "learning_rate": learning_rate, "save_every": save_every}
    options = options_of(chosen, chosen.enhancer, len(real), **of_run, **fixed)
    if dry_run:
        typer.echo(dry_run_enhancer(shape, options, size, weights, vgg))
        return
    stage = StageOne.load(output / "denoiser.pt", shape)
    stage.check_held_out(held_out)
    source = source_of(chosen, phantoms, real_share, augment)
    batches = batches_of(source, real, dataset, output, size, seed + 1)
    if None not in (header.get("clahe"), batches.clahe) and header["clahe"] != batches.clahe:
        raise SettingsError(
            f"{output / 'denoiser.pt'}: trained on CLAHE {header['clahe']:g}, this data set has "
            f"{batches.clahe:g}; give both stages the same --dataset"
        )
    sampler = replace(chosen.stage_one, steps=stage_one_steps or chosen.stage_one.steps)
    samples = samples or chosen.samples or VERSIONS_PER_PAIR * len(real)
    outputs = stage_one_outputs(output, stage, batches, samples, size, sampler)
    validation = Validation(
        groups_of(held_out, source.phantoms, size, options.patience), stage.schedule, chosen.validation
    )
    train_enhancer(output, stage, outputs, validation, options, weights, vgg, chosen.clean_share, batches.description())


@app.command("prepare")
def make_dataset(
    cxr: Annotated[Path, typer.Argument(help="Folder of X-rays: DICOM, PNG, JPEG or TIFF; searched recursively.")],
    soft_tissue: Annotated[Path, typer.Argument(help="Folder of soft-tissue images; may be the same.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the data set; new or empty.")],
    size: Annotated[int, typer.Option(min=16, help="Side of the images, px.")] = PrepareOptions.size,
    split: Annotated[str, typer.Option(help="Shares of train, val and test patients.")] = "7:2:1",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split.")] = PrepareOptions.seed,
    clahe: Annotated[
        float, typer.Option(min=0.0, help="CLAHE clip limit; 0: none. Export the model with the same.")
    ] = PrepareOptions.clahe,
    register: Annotated[
        bool, typer.Option("--register/--no-register", help="Move the soft tissue onto its X-ray.")
    ] = PrepareOptions.register,
    trim: Annotated[
        bool, typer.Option("--trim/--no-trim", help="Leave out uniform borders, as infer does.")
    ] = PrepareOptions.trim,
    min_correlation: Annotated[
        float,
        typer.Option(
            min=-1.0, max=1.0, help="Correlation of edges below which a pair is bad; -1: no pair is, by its look."
        ),
    ] = PrepareOptions.min_correlation,
    exclude: Annotated[
        Path | None,
        typer.Option(help="Text file of pairs to leave out: one name or stem a line, `# reason` behind it."),
    ] = None,
    patient_pattern: Annotated[
        str | None, typer.Option(help="Regular expression whose group 1 is the patient, before PatientID.")
    ] = None,
    cxr_suffix: Annotated[str, typer.Option(help="End of X-rays' stems, no part of the name.")] = "_cxr",
    soft_suffix: Annotated[str, typer.Option(help="The same of soft-tissue images.")] = "_soft_tissue",
) -> None:
    """Make a data set of pairs: matched, registered, resized, split by patient; look at its contact sheet."""
    options = PrepareOptions(
        size=size,
        clahe=clahe,
        register=register,
        trim=trim,
        min_correlation=min_correlation,
        split=parse_split(split),
        seed=seed,
        cxr_suffix=cxr_suffix,
        soft_tissue_suffix=soft_suffix,
        patient_pattern=patient_pattern,
    )
    made = prepare(cxr, soft_tissue, output, options, read_exclusions(exclude) if exclude else {})
    typer.echo(made.summary())
    if not made.complete:
        raise typer.Exit(3)


@app.command()
def comparator(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(COMPARATORS)}.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoint, log and NAME.onnx.")],
    pairs: Pairs = None,
    recipe: RecipeName = "demo",
    phantoms: Phantoms = None,
    hold_out: HoldOut = None,
    dataset: DatasetFolder = None,
    augment: Augment = None,
    size: Annotated[int, typer.Option(min=32, help="Side of the images, px.")] = 256,
    crop: Annotated[
        int | None, typer.Option(min=32, help="Side of the crops trained on, px.", show_default="whole images")
    ] = None,
    steps: Steps = None,
    learning_rate: Rate = None,
    real_share: RealShare = None,
    save_every: SaveEvery = None,
    accumulate: Accumulate = 1,
    seed: Seed = 0,
    bf16: Bf16 = None,
    dry_run: DryRun = False,
) -> None:
    """Train a network of the paper's Table 1 on the same pairs, as long as stage 1; for `benchmarks.table1`."""
    if name not in COMPARATORS:
        raise SettingsError(f"comparator {name!r}: choose one of {', '.join(COMPARATORS)}")
    chosen, side = recipe_of(recipe), crop_of(name, size, crop)
    real, held_out = real_pairs(pairs, hold_out, dataset, size)
    fixed = {"accumulate": accumulate, "seed": seed, "bf16": mixed_precision(bf16)}
    of_run = {"steps": steps, "learning_rate": learning_rate, "save_every": save_every}
    options = options_of(chosen, chosen.denoiser, len(real), **of_run, **fixed)
    if dry_run:
        typer.echo(dry_run_comparator(name, options, size, side))
        return
    output.mkdir(parents=True, exist_ok=True)
    source = source_of(chosen, phantoms, real_share, augment)
    batches = batches_of(source, real, dataset, output, size, seed)
    validation = Validation(groups_of(held_out, source.phantoms, size, options.patience), chosen.schedule)
    typer.echo(train_comparator(output, name, batches, validation, options, size, side))


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything; an interrupted run resumes.")],
    pairs: Annotated[Path | None, typer.Option(help="Folder of real pairs; without it, phantoms alone.")] = None,
) -> None:
    """Train both stages as the bundled demo model was trained (docs/model-card.md); hours on two cores."""
    denoiser(output, pairs)
    enhancer(output, pairs)


@app.command("phantoms")
def make_phantoms(
    folder: Annotated[Path, typer.Argument(help="Where NAME_cxr.png and NAME_soft_tissue.png are written.")],
    count: Annotated[int, typer.Option(min=1, help="Number of pairs.")] = 10,
    size: Annotated[int, typer.Option(min=SMALLEST_PX, help="Side of the images, px.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first one; the rest follow.")] = HELD_OUT_PHANTOM_SEED,
    dicom: Annotated[bool, typer.Option("--dicom", help="Also NAME_cxr.dcm: CR, 14 bits, MONOCHROME1.")] = False,
) -> None:
    """Write phantom pairs; by default those that no training sees."""
    for i, name in enumerate(write_pairs(folder, count, seed, size)):
        if dicom:
            write_cr(folder / f"{name}_cxr.dcm", phantom(seed + i, size).cxr, name)


def main() -> None:
    """Entry point: library errors become one line and their exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    cv2.setNumThreads(1)
    run_command(app)


if __name__ == "__main__":
    main()
