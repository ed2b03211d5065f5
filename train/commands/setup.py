"""What the training commands resolve before they train: preset, recipe, samples, options and validation groups."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bsdiff_rt.config import PRESETS, Preset
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.formats.raster import find_pairs
from train.augment import Augmentation
from train.commands.options import SharedOptions
from train.data import (
    NO_PAIRS,
    STORED_PX,
    Batches,
    Pair,
    load_dataset,
    load_pair,
    load_projected,
    read_dataset_settings,
)
from train.loop import TrainOptions, choose_bf16, make_accelerator
from train.phantom_pool import draw_held_out_phantoms, load_phantom_pool
from train.phantoms import SMALLEST_PX
from train.recipe import CHECK_EPOCHS, RECIPES, Recipe

logger = logging.getLogger(__name__)

HELD_OUT_PHANTOMS = 8  # drawn to judge checkpoints on


@dataclass(frozen=True)
class Samples:
    """The samples of a run.

    Attributes:
        recipe: the recipe, with phantoms, share of real samples and augmentation as the command line says.
        train: real pairs to train on.
        held_out: real pairs to validate on, at the model's size.
        dataset: folder written by `prepare` that they come from, if any.
        drrs: folder of pairs projected from CTs, if any.
    """

    recipe: Recipe
    train: list[Pair]
    held_out: list[Pair]
    dataset: Path | None
    drrs: Path | None = None

    @classmethod
    def load(cls, shared: SharedOptions, size: int) -> Samples:
        """Read the real pairs that the options name, for a model of `size` px.

        Raises:
            SettingsError: unknown recipe or augmentation, or pairs that cannot be used.
        """
        recipe = override_recipe(find_recipe(shared.recipe), shared)
        train, held_out = load_real_pairs(shared.pairs, shared.hold_out, shared.dataset, size)
        return cls(recipe, train, held_out, shared.dataset, shared.drrs)

    def make_batches(self, folder: Path, size: int, seed: int) -> Batches:
        """Return the source of training batches. The phantoms are drawn by one process and kept in `folder`.

        Raises:
            SettingsError: nothing to train on, or images smaller than a phantom can be.
        """
        if self.recipe.phantoms and size < SMALLEST_PX:
            raise SettingsError(f"--size {size}: phantoms need at least {SMALLEST_PX} px. Give --phantoms 0.")
        _, clahe = read_dataset_settings(self.dataset) if self.dataset else (0, None)
        with make_accelerator().main_process_first():
            pool = load_phantom_pool(folder, self.recipe.phantoms, size)
        projected = NO_PAIRS if self.drrs is None else load_projected(self.drrs, find_stored_size(size))
        recipe = self.recipe
        return Batches(
            self.train, pool, recipe.real_share, recipe.augmentation, seed, clahe, projected, recipe.drr_share
        )

    def choose_groups(self, size: int, patience: int) -> dict[str, list[Pair]]:
        """Return the groups of images to validate on, by name.

        Phantoms are among them if the model trains on phantoms, or if no pair is held out.

        Args:
            size: side of the images, px.
            patience: see `TrainOptions`. If not 0, validation decides when training ends.

        Raises:
            SettingsError: no pair is held out and `patience` needs one, or the size is too small for phantoms.
        """
        if not self.held_out and not self.recipe.phantoms:
            if patience:
                raise SettingsError(
                    "no pair is held out, so early stopping has nothing to watch. Give --hold-out, or a data set with "
                    "pairs in its val part."
                )
            logger.warning("no pair is held out: checkpoints are validated on drawn phantoms")
            if size < SMALLEST_PX:
                raise SettingsError(f"--size {size}: phantoms need at least {SMALLEST_PX} px. Give --hold-out.")
        groups: dict[str, list[Pair]] = {}
        if self.recipe.phantoms or not self.held_out:
            groups["phantoms"] = draw_held_out_phantoms(HELD_OUT_PHANTOMS, size)
        return groups | ({"pairs": self.held_out} if self.held_out else {})


def find_preset(name: str) -> Preset:
    """Return the preset of that name.

    Raises:
        SettingsError: there is none.
    """
    if name not in PRESETS:
        raise SettingsError(f"preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def find_recipe(name: str) -> Recipe:
    """Return the recipe of that name.

    Raises:
        SettingsError: there is none.
    """
    if name not in RECIPES:
        raise SettingsError(f"--recipe {name}: choose one of {', '.join(RECIPES)}")
    return RECIPES[name]


def drop_none(**options: Any) -> dict[str, Any]:
    """Return the options that have a value."""
    return {name: value for name, value in options.items() if value is not None}


def override_recipe(recipe: Recipe, shared: SharedOptions) -> Recipe:
    """Return the recipe with the phantoms, share of real samples and augmentation of the command line.

    Raises:
        SettingsError: unknown augmentation.
    """
    augmentation = None if shared.augment is None else Augmentation.of(shared.augment)
    changes = drop_none(phantoms=shared.phantoms, real_share=shared.real_share, augmentation=augmentation)
    return replace(recipe, **changes, **drop_none(drr_share=shared.drr_share))


def resolve_options(
    recipe: Recipe, stage: TrainOptions, pairs: int, shared: SharedOptions, crops: tuple[tuple[float, ...], ...] | None
) -> TrainOptions:
    """Return a stage's options: those of the recipe, changed by the command line.

    If the recipe counts epochs, `--steps` stands for all of them and checkpoints keep their share of the run. With
    `--save-every` checkpoints come more often, so early stopping waits for as many more of them.

    Args:
        recipe: of the run.
        stage: the recipe's options of this stage.
        pairs: number of real pairs to train on.
        shared: the command line.
        crops: see `TrainOptions`; None leaves the recipe's.

    Raises:
        SettingsError: the recipe counts epochs over real pairs, and there are none.
    """
    if shared.steps and recipe.epochs:
        counted = replace(stage, save_every=max(1, shared.steps * CHECK_EPOCHS // recipe.epochs))
    else:
        counted = stage if shared.steps else recipe.options(stage, pairs, make_accelerator().num_processes)
    if shared.save_every:
        counted = replace(counted, patience=math.ceil(counted.patience * counted.save_every / shared.save_every))
    changes = drop_none(
        steps=shared.steps, learning_rate=shared.learning_rate, save_every=shared.save_every, crops=crops
    )
    bf16 = choose_bf16(shared.bf16)
    return replace(counted, accumulate=shared.accumulate, seed=shared.seed, bf16=bf16, **changes)


def find_stored_size(size: int) -> int:
    """Return the side in px at which pairs are kept for a model of `size` px: room to zoom in."""
    return max(STORED_PX, size * 3 // 2)


def split_pairs(folder: Path | None, hold_out: list[str], size: int) -> tuple[list[Pair], list[Pair]]:
    """Read a folder of pairs: those to train on, and those held out, the latter at `size` px.

    Raises:
        SettingsError: a name in `hold_out` that is not in the folder, or a pair that cannot be used.
    """
    if folder is None:
        return [], []
    found = find_pairs(folder)
    unknown = set(hold_out) - {name for name, _, _ in found}
    if unknown:
        raise SettingsError(f"--hold-out {', '.join(sorted(unknown))}: no such pair in {folder}")
    stored = find_stored_size(size)
    train = [load_pair(*entry, size=stored) for entry in found if entry[0] not in hold_out]
    held_out = [load_pair(*entry, size=size) for entry in found if entry[0] in hold_out]
    return train, held_out


def load_real_pairs(
    pairs: Path | None, hold_out: list[str] | None, dataset: Path | None, size: int
) -> tuple[list[Pair], list[Pair]]:
    """Read the pairs to train on and to validate on, from a folder of pairs or from a data set.

    Raises:
        SettingsError: both are given, or the data set has no train part, or its images are smaller than `size` px.
    """
    if dataset is None:
        return split_pairs(pairs, hold_out or [], size)
    if pairs or hold_out:
        raise SettingsError("--dataset has its own parts. Give it without --pairs and --hold-out.")
    stored, _ = read_dataset_settings(dataset)
    if stored < size:
        raise SettingsError(
            f"--size {size}: {dataset} holds images of {stored} px. Prepare it again at {size} or more."
        )
    train = load_dataset(dataset, "train")
    if not train:
        raise SettingsError(f"{dataset}: its train part is empty")
    return train, load_dataset(dataset, "val", size)
