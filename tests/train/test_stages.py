"""Both stages: an interrupted run ends as an uninterrupted one, with its losses; stage 1's cached outputs."""

import csv
import errno
from typing import ClassVar

import numpy as np
import pytest
import torch

from bsdiff_rt.config import PRESETS, SamplerSettings, Schedule
from bsdiff_rt.errors import SettingsError
from train.augment import Augmentation
from train.checkpoint import load_checkpoint
from train.data import Batches, Pair
from train.denoiser import train_denoiser
from train.enhancer import StageOne, make_stage_one_outputs, train_enhancer
from train.loop import TrainOptions
from train.losses import LossWeights
from train.perceptual import VGG16
from train.validation import Validation

SIZE, TINY, SCHEDULE = 32, PRESETS["tiny"], Schedule(objective="eps")
OPTIONS = TrainOptions(steps=6, warmup=0, crops=((1.0,),), images=1, bf16=False, save_every=1)
TWO_STEPS = SamplerSettings("ddim", 2)


class Judge:
    """A validation that costs nothing, and interrupts the run at a chosen call."""

    groups: ClassVar = {}

    def __init__(self, interrupt_at=None, judged_on="nothing"):
        self.calls, self.interrupt_at, self.judged_on = 0, interrupt_at, judged_on

    def description(self):
        return {"judged_on": self.judged_on}

    def denoiser(self, network, picture):
        self.calls += 1
        if self.calls == self.interrupt_at:
            raise KeyboardInterrupt
        return {"pairs_psnr": 1.0}

    def both(self, denoiser, network, picture):
        return self.denoiser(network, picture)


@pytest.fixture(scope="module")
def batches():
    pool = np.random.default_rng(0).integers(0, 256, (3, 2, SIZE, SIZE), dtype=np.uint8)
    return Batches([], pool, 0.0, Augmentation(), 0)


@pytest.fixture(scope="module")
def stage(batches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage")
    return StageOne.load(train_denoiser(folder, TINY, SCHEDULE, batches, Judge(), OPTIONS, SIZE), TINY)


def losses_of(path):
    with path.open() as file:
        return {
            row["step"]: [float(row[name]) for name in row if name not in ("time", "step")]
            for row in csv.DictReader(file)
        }


def assert_same_end(whole, parts, name):
    expected, found = losses_of(whole / f"{name}.csv"), losses_of(parts / f"{name}.csv")
    assert set(found) == set(expected)
    for step in found:
        assert found[step] == pytest.approx(expected[step], abs=1e-6)
    one, other = (load_checkpoint(folder / f"{name}.pt") for folder in (whole, parts))
    assert one["step"] == other["step"] == OPTIONS.steps
    for key in ("network", "averaged", "critic") if "critic" in one else ("network", "averaged"):
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-6)


def test_no_stage_resumes_on_other_data_or_another_loss(batches, stage, tmp_path):
    other = Batches([], 255 - batches.phantoms, 0.0, Augmentation(), 0)
    train_denoiser(tmp_path, TINY, SCHEDULE, batches, Judge(), OPTIONS, SIZE)
    with pytest.raises(SettingsError, match=r"denoiser\.pt: trained with data \w+, not \w+\. Give the same"):
        train_denoiser(tmp_path, TINY, SCHEDULE, other, Judge(), OPTIONS, SIZE)
    outputs = np.random.default_rng(0).random((3, 2, SIZE, SIZE)).astype(np.float16)
    what = (Judge(), OPTIONS, LossWeights(mae=1.0, ms_ssim=0.0))
    train_enhancer(tmp_path, stage, outputs, *what)
    with pytest.raises(SettingsError, match=r"enhancer\.pt: trained with data \w+, not"):
        train_enhancer(tmp_path, stage, outputs[:2], *what)
    with pytest.raises(SettingsError, match=r"enhancer\.pt: trained with losses \{.*'mae': 1.0.*, not \{.*'mae': 2.0"):
        train_enhancer(tmp_path, stage, outputs, Judge(), OPTIONS, LossWeights(mae=2.0, ms_ssim=0.0))


def test_no_stage_resumes_judged_on_something_else(batches, stage, tmp_path):
    """Early stopping compares figures: the best of easier images would be kept for good."""
    train_denoiser(tmp_path, TINY, SCHEDULE, batches, Judge(), OPTIONS, SIZE)
    with pytest.raises(SettingsError, match=r"denoiser\.pt: trained with judged_on nothing, not 2 pairs\. Give"):
        train_denoiser(tmp_path, TINY, SCHEDULE, batches, Judge(judged_on="2 pairs"), OPTIONS, SIZE)
    outputs = np.zeros((1, 2, SIZE, SIZE), np.float16)
    train_enhancer(tmp_path, stage, outputs, Judge(), OPTIONS, LossWeights())
    with pytest.raises(SettingsError, match=r"enhancer\.pt: trained with judged_on nothing, not 2 pairs"):
        train_enhancer(tmp_path, stage, outputs, Judge(judged_on="2 pairs"), OPTIONS, LossWeights())


def test_what_is_judged_on_is_known_by_its_pairs():
    flat = np.zeros((SIZE, SIZE), np.float32)
    one, other = (Pair(name, flat, flat, flat, digest) for name, digest in (("a", "1234"), ("b", "5678")))
    drawn = [Pair("p", flat, flat, flat)] * 3

    def said(**groups):
        return Validation(groups, SCHEDULE).description()["judged_on"]

    assert said(phantoms=drawn, pairs=[one, other]) == said(phantoms=drawn, pairs=[other, one])
    assert said(phantoms=drawn, pairs=[one]).startswith("3 phantoms, 1 pairs (")
    assert said(pairs=[one]) != said(pairs=[other])
    assert said(phantoms=drawn) == "3 phantoms"


def test_stage_1_resumes_exactly(batches, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    train_denoiser(whole, TINY, SCHEDULE, batches, Judge(), OPTIONS, SIZE)
    with pytest.raises(KeyboardInterrupt):
        train_denoiser(parts, TINY, SCHEDULE, batches, Judge(interrupt_at=3), OPTIONS, SIZE)
    train_denoiser(parts, TINY, SCHEDULE, batches, Judge(), OPTIONS, SIZE)
    assert_same_end(whole, parts, "denoiser")


def test_stage_2_resumes_exactly_with_all_four_terms(stage, tmp_path, monkeypatch):
    monkeypatch.setattr("train.perceptual.STAGES", ((4, 4), (4,), (4,), (4,), (4,)))
    monkeypatch.setattr("train.discriminator.CHANNELS", 8)
    torch.manual_seed(5)
    vgg = VGG16().eval().requires_grad_(False)
    outputs = np.random.default_rng(1).uniform(-1, 1, (3, 2, SIZE, SIZE)).astype(np.float16)
    weights = LossWeights(perceptual=0.001, adversarial=0.01)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    arguments = (OPTIONS, weights, vgg, 0.25)
    train_enhancer(whole, stage, outputs, Judge(), *arguments)
    with pytest.raises(KeyboardInterrupt):
        train_enhancer(parts, stage, outputs, Judge(interrupt_at=3), *arguments)
    train_enhancer(parts, stage, outputs, Judge(), *arguments)
    assert_same_end(whole, parts, "enhancer")
    header = next(csv.reader((whole / "enhancer.csv").open()))
    assert header[2:8] == ["loss", "mae", "ms_ssim", "perceptual", "adversarial", "critic"]


def test_stage_2_refuses_to_go_on_with_another_stage_1(stage, tmp_path):
    outputs = np.zeros((1, 2, SIZE, SIZE), np.float16)
    train_enhancer(tmp_path, stage, outputs, Judge(), OPTIONS, LossWeights())
    other = StageOne(stage.network, stage.preset, stage.schedule, "0" * 64)
    with pytest.raises(SettingsError, match=r"enhancer\.pt: trained with stage_one .*, not 0000"):
        train_enhancer(tmp_path, other, outputs, Judge(), OPTIONS, LossWeights())


def test_stage_1_outputs_are_made_once_and_an_interrupted_making_goes_on(stage, batches, tmp_path, monkeypatch):
    made = make_stage_one_outputs(tmp_path, stage, batches, 3, SIZE, TWO_STEPS)
    assert made.shape == (3, 2, SIZE, SIZE)
    np.testing.assert_allclose(made[1, 1], batches.batch(1, 1, SIZE, SIZE)[0, 1], atol=1e-3)  # float16
    assert np.abs(made[:, 0]).max() <= 1
    (path,) = tmp_path.glob("*.npy")
    assert stage.sha256[:16] in path.name

    asked = []
    monkeypatch.setattr("train.enhancer.run_stage_one", lambda _, schedule, cxr, sampler: asked.append(1) or cxr)
    np.testing.assert_array_equal(make_stage_one_outputs(tmp_path, stage, batches, 3, SIZE, TWO_STEPS), made)
    assert not asked
    half = np.lib.format.open_memmap(path, "r+")
    half[2, 0, :8] = np.nan  # in part on the disk when the machine lost its power
    half.flush()
    again = make_stage_one_outputs(tmp_path, stage, batches, 3, SIZE, TWO_STEPS)
    assert len(asked) == 1
    np.testing.assert_array_equal(again[:2], made[:2])
    assert not np.isnan(again).any()


@pytest.mark.parametrize("length", [0, 5000])  # of 12,416 bytes
def test_a_cache_that_was_cut_off_is_named(stage, batches, tmp_path, length):
    make_stage_one_outputs(tmp_path, stage, batches, 3, SIZE, TWO_STEPS)
    (path,) = tmp_path.glob("*.npy")
    cut = path.read_bytes()[:length]
    path.write_bytes(cut)
    with pytest.raises(SettingsError, match=rf"{path.name}: damaged \(.*\)\. Remove it, and it is made again"):
        make_stage_one_outputs(tmp_path, stage, batches, 3, SIZE, TWO_STEPS)
    assert path.read_bytes() == cut


def test_a_full_disk_is_said_before_stage_1_runs(stage, batches, tmp_path, monkeypatch):
    """Written through memory, a file that has only its length would end the process with a bus error."""

    def full(file, start, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(SettingsError, match=r"stage 1's outputs take 0 MB, which cannot be written \(No space left"):
        make_stage_one_outputs(tmp_path, stage, batches, 3, SIZE, TWO_STEPS)
    assert list(tmp_path.iterdir()) == []


def test_what_stage_1_makes_must_be_finite(stage, batches, tmp_path, monkeypatch):
    monkeypatch.setattr("train.enhancer.run_stage_one", lambda _, schedule, cxr, sampler: cxr * np.float32(np.nan))
    with pytest.raises(
        SettingsError, match=r"denoiser\.pt: its result for sample 0 is not finite\. Train stage 1 again"
    ):
        make_stage_one_outputs(tmp_path, stage, batches, 3, SIZE, TWO_STEPS)


@pytest.mark.parametrize(
    "change", ["sampler", "seed", "weights", "count", "one phantom", "augmentation", "share of projected pairs"]
)
def test_other_data_weights_or_sampler_make_new_outputs(stage, batches, tmp_path, monkeypatch, change):
    monkeypatch.setattr("train.enhancer.run_stage_one", lambda _, schedule, cxr, sampler: cxr)
    if change == "share of projected pairs":
        batches, other = (
            Batches([], batches.phantoms, 0.0, Augmentation(), 0, projected=batches.phantoms, projected_share=share)
            for share in (0.1, 0.9)
        )
        make_stage_one_outputs(tmp_path, stage, other, 1, SIZE, TWO_STEPS)
    else:
        make_stage_one_outputs(tmp_path, stage, batches, 1, SIZE, TWO_STEPS)
    if change == "weights":
        stage = StageOne(stage.network, stage.preset, stage.schedule, "0" * 64)
    sampler = SamplerSettings("ddim", 3) if change == "sampler" else TWO_STEPS
    if change == "seed":
        batches = Batches([], batches.phantoms, 0.0, Augmentation(), 1)
    if change == "one phantom":  # not the one the first sample shows, perhaps
        phantoms = batches.phantoms.copy()
        phantoms[-1, 1, 0, 0] += 1
        batches = Batches([], phantoms, 0.0, Augmentation(), 0)
    if change == "augmentation":
        batches = Batches([], batches.phantoms, 0.0, Augmentation(blur_noise=0.31), 0)
    make_stage_one_outputs(tmp_path, stage, batches, 2 if change == "count" else 1, SIZE, sampler)
    assert len(list(tmp_path.glob("*.npy"))) == 2
