"""A training that starts from a bundle: the same picture before its first step, also with residual blocks added."""

import json
import shutil
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from bsdiff_rt.bundle import open_bundle, to_signed_json
from bsdiff_rt.config import PRESETS, Schedule
from bsdiff_rt.errors import BundleError, SettingsError
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.eager import EagerRunner
from bsdiff_rt.runners.registry import load_runner
from train.augment import Augmentation
from train.checkpoint import load_checkpoint
from train.data import Batches, Pair
from train.denoiser import train_denoiser
from train.loop import TrainOptions
from train.start import start_from

SCHEDULE = Schedule(objective="x0")  # the tiny bundle's
TINY = PRESETS["tiny"].denoiser


def output(runner: Runner, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x_t, cxr = (torch.randn(2, 1, size, size, generator=generator) for _ in range(2))
    out = torch.empty_like(x_t)
    runner.denoise(x_t, cxr, torch.tensor([0.0, 999.0]), out)
    return out


@pytest.mark.parametrize("first_level", [1, 2, 4])
def test_it_computes_what_the_bundle_computes(tiny_bundle, first_level):
    bundle = open_bundle(tiny_bundle)
    torch.manual_seed(first_level)
    denoiser = Denoiser(replace(TINY, res_blocks=(first_level, 1)))
    assert start_from(denoiser, SCHEDULE, str(tiny_bundle)).sha256 == bundle.sha256
    size = bundle.manifest.preprocessing.size
    expected = output(load_runner(bundle, "eager", torch.device("cpu")), size)
    found = output(EagerRunner(denoiser.eval(), torch.nn.Identity(), size, torch.device("cpu")), size)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=0)  # added blocks add exact zeros


def test_added_blocks_learn(tiny_bundle):
    """All but what a zero last convolution holds back in the first step."""
    denoiser = Denoiser(replace(TINY, res_blocks=(2, 1)))
    start_from(denoiser, SCHEDULE, str(tiny_bundle))
    image = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    denoiser(image, image, torch.tensor([500])).square().mean().backward()
    for block in (denoiser.down_blocks[0].resnets[1], denoiser.up_blocks[-1].resnets[1]):
        assert block.conv2.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("config", "schedule", "message"),
    [
        (replace(TINY, channels=(8, 24)), SCHEDULE, r"its denoiser is .*channels=\(8, 16\).*not .*\(8, 24\)"),
        (TINY, Schedule(objective="eps"), "trained for .*objective='x0'.*not .*objective='eps'"),
        (replace(TINY, res_blocks=(1, 2)), SCHEDULE, "1 residual blocks at level 2, 2 in .*without attention"),
    ],
)
def test_what_cannot_be_started_from(tiny_bundle, config, schedule, message):
    with pytest.raises(SettingsError, match=message):
        start_from(Denoiser(config), schedule, str(tiny_bundle))


def test_fewer_blocks_are_refused():
    config = replace(PRESETS["demo"].denoiser, res_blocks=(1, 1, 1, 1, 1))
    with pytest.raises(SettingsError, match=r"residual blocks at level 1, 1 in this preset\. Blocks can only be added"):
        start_from(Denoiser(config), SCHEDULE, "demo")


def test_no_such_bundle():
    with pytest.raises(BundleError, match="no bundle 'nowhere'"):
        start_from(Denoiser(TINY), SCHEDULE, "nowhere")


class Judge:
    groups: ClassVar = {}

    def description(self):
        return {}

    def denoiser(self, network, picture):
        return {"phantoms_psnr": 1.0}


def train(folder, steps, start=None, judge=None):
    pool = np.random.default_rng(0).integers(0, 256, (2, 2, 32, 32), dtype=np.uint8)
    batches = Batches([], pool, 0.0, Augmentation(), 0)
    options = TrainOptions(steps=steps, warmup=0, crops=((1.0,),), images=1, bf16=False, save_every=1)
    return train_denoiser(folder, PRESETS["tiny"], SCHEDULE, batches, judge or Judge(), options, 32, start)


def test_the_checkpoint_knows_its_start_which_resuming_does_not_need(bundle_copy, tmp_path):
    sha256 = open_bundle(bundle_copy).sha256
    path = train(tmp_path, 1, str(bundle_copy))
    assert load_checkpoint(path)["start"] == sha256
    shutil.rmtree(bundle_copy)
    assert train(tmp_path, 2, str(bundle_copy)) == path
    kept = load_checkpoint(path)
    assert (kept["step"], kept["start"]) == (2, sha256)


def test_what_the_start_was_trained_on_is_not_forgotten(bundle_copy, tmp_path):
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    manifest["training"]["trained_on"] = ["ab" * 8]
    (bundle_copy / "manifest.json").write_text(to_signed_json(manifest))
    for steps in (1, 2):  # the second resumes
        assert load_checkpoint(train(tmp_path, steps, str(bundle_copy)))["trained_on"] == ["ab" * 8]


def test_a_run_is_resumed_with_a_start_or_without_as_it_began(tiny_bundle, tmp_path):
    for folder in ("with", "without"):
        (tmp_path / folder).mkdir()
    train(tmp_path / "with", 1, str(tiny_bundle))
    with pytest.raises(SettingsError, match=r"trained with start [0-9a-f]{64}, not None\. Give the same"):
        train(tmp_path / "with", 1)
    train(tmp_path / "without", 1)
    with pytest.raises(SettingsError, match=r"denoiser\.pt: trained with start None, not .*tiny\. Give the same"):
        train(tmp_path / "without", 1, str(tiny_bundle))


def test_a_run_is_not_resumed_with_another_start(bundle_copy, tiny_bundle, tmp_path, caplog):
    train(tmp_path / "run", 1, str(tiny_bundle))
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    (bundle_copy / "manifest.json").write_text(to_signed_json(manifest | {"name": "another"}))
    with pytest.raises(SettingsError, match=r"trained with start [0-9a-f]{64}, not .*Give the same"):
        train(tmp_path / "run", 2, str(bundle_copy))
    train(tmp_path / "run", 2, str(tmp_path / "gone"))
    assert "The run goes on from its checkpoint" in caplog.text


def test_what_the_start_was_trained_on_cannot_be_held_out(bundle_copy, tmp_path):
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    manifest["training"]["trained_on"] = ["ab" * 8]
    (bundle_copy / "manifest.json").write_text(to_signed_json(manifest))
    image = np.zeros((32, 32), np.float32)
    held_out = [Pair("phantom", image, image, image), Pair("known", image, image, image, "ab" * 8)]
    judge = Judge()
    judge.groups = {"pairs": held_out}
    with pytest.raises(SettingsError, match=r"held out, but trained on, .* it starts from: known\. Hold"):
        train(tmp_path, 1, str(bundle_copy), judge)
    judge.groups = {"pairs": held_out[:1]}
    train(tmp_path, 1, str(bundle_copy), judge)
