"""The frozen recipes: the paper's numbers, its epochs in steps, and the demo's as they were."""

from dataclasses import asdict

import pytest

from bsdiff_rt.config import PRESETS, Schedule
from bsdiff_rt.errors import SettingsError
from train.augment import Augmentation
from train.commands.options import SharedOptions
from train.commands.setup import resolve_options
from train.loop import TrainOptions
from train.losses import LossWeights
from train.recipe import RECIPES


def test_the_papers_numbers():
    """Chen et al. 2024, section 3: 84 training patients of 120, 7 versions of each, batch 2, 200 epochs."""
    paper = RECIPES["paper"]
    assert PRESETS[paper.preset].name == "paper"
    assert paper.schedule == Schedule("cosine", 1000, 0.0015, 0.0205, "eps")
    assert asdict(paper.losses) == {"mae": 1.0, "mse": 0.0, "ms_ssim": 1.0, "perceptual": 0.001, "adversarial": 0.01}
    for stage in (paper.denoiser, paper.enhancer):
        options = paper.options(stage, 84, 1)
        epoch = 84 * 7 // 2
        assert options.steps == 200 * epoch == 58_800
        assert options.save_every == 10 * epoch
        assert (options.images, options.ema, options.patience, options.clip) == (2, 0.995, 5, 0.0)
        rates = [options.rate(number * epoch) for number in (0, 24, 25, 40, 70, 199)]
        assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-6, 1e-7, 1e-7])
        assert options.crop(0, 256) == (2, 256)
    assert (paper.stage_one.name, paper.stage_one.steps, paper.clean_share) == ("ddpm", 1000, 0.0)
    assert paper.augmentation == Augmentation.of("paper")


def test_several_processes_share_an_epoch():
    paper = RECIPES["paper"]
    assert paper.options(paper.denoiser, 84, 4).steps == 200 * round(84 * 7 / 8)
    with pytest.raises(SettingsError, match="counts epochs over real pairs"):
        paper.options(paper.denoiser, 0, 1)


def test_steps_given_for_a_recipe_of_epochs_keep_its_share_between_checkpoints():
    """Five checks without a better one must not come before the first drop of the learning rate."""

    def resolve(recipe, pairs=84, **shared):
        return resolve_options(recipe, recipe.denoiser, pairs, SharedOptions(**shared), None)

    paper = RECIPES["paper"]
    assert resolve(paper, steps=58_800).save_every == 10 * 294
    assert resolve(paper, steps=7).save_every == 1
    assert resolve(paper, steps=600, save_every=50).save_every == 50
    often = resolve(paper, steps=58_800, save_every=100)
    assert (often.save_every, often.patience) == (100, 147)  # 14,700 steps in all, as without --save-every
    assert resolve(RECIPES["demo"], pairs=0, steps=600).save_every == 250


def test_the_settings_of_the_demo_recipe():
    """The model card names figures of a model that was trained with these."""
    demo = RECIPES["demo"]
    crops = ((0.5,), (1.0,), (1.0,), (1.0,))
    assert demo.options(demo.denoiser, 3, 1) == TrainOptions(steps=5000, clip_to_usual=1.5, crops=crops)
    assert demo.enhancer == TrainOptions(steps=1500)
    assert (demo.phantoms, demo.real_share, demo.samples, demo.clean_share) == (400, 0.35, 600, 0.25)
    assert (demo.drr_share, demo.response, demo.augmentation.inserts) == (0.45, 0.02, 0.8)
    assert demo.losses == LossWeights(mae=1.0, ms_ssim=1.0)
    assert demo.schedule.objective == "x0"
