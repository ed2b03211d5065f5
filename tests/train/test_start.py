"""A training that starts from a bundle: the same picture before its first step, also with residual blocks added."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.config import PRESETS, Schedule
from bsdiff_rt.errors import BundleError, SettingsError
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.runners import load_runner
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.eager import EagerRunner
from train.data import Augmentation, Batches
from train.denoiser import train_denoiser
from train.loop import TrainOptions, load_checkpoint
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
    assert start_from(denoiser, SCHEDULE, str(tiny_bundle)) == bundle.sha256
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
        (replace(TINY, channels=(8, 24)), SCHEDULE, r"its denoiser is .*channels=\(8, 16\).*asked for is .*\(8, 24\)"),
        (TINY, Schedule(objective="eps"), "trained for .*objective='x0'.*asked for is .*objective='eps'"),
        (replace(TINY, res_blocks=(1, 2)), SCHEDULE, "1 residual blocks at level 2, 2 in this preset; .*no attention"),
    ],
)
def test_what_cannot_be_started_from(tiny_bundle, config, schedule, message):
    with pytest.raises(SettingsError, match=message):
        start_from(Denoiser(config), schedule, str(tiny_bundle))


def test_fewer_blocks_are_refused():
    config = replace(PRESETS["demo"].denoiser, res_blocks=(1, 1, 1, 1, 1))
    with pytest.raises(SettingsError, match="residual blocks at level 1, 1 in this preset; they can only be added"):
        start_from(Denoiser(config), SCHEDULE, "demo")


def test_no_such_bundle():
    with pytest.raises(BundleError, match="no bundle 'nowhere'"):
        start_from(Denoiser(TINY), SCHEDULE, "nowhere")


def test_the_checkpoint_knows_its_start_and_resumes_with_no_other(tiny_bundle, tmp_path):
    class Judge:
        def denoiser(self, network, picture):
            return {"phantoms_psnr": 1.0}

    pool = np.random.default_rng(0).integers(0, 256, (2, 2, 32, 32), dtype=np.uint8)
    batches = Batches([], pool, 0.0, Augmentation(), 0)
    options = TrainOptions(steps=1, warmup=0, crops=((1.0,),), images=1, bf16=False, save_every=1)
    what = (tmp_path, PRESETS["tiny"], SCHEDULE, batches, Judge(), options, 32)
    path = train_denoiser(*what, str(tiny_bundle))
    assert load_checkpoint(path)["start"] == open_bundle(tiny_bundle).sha256
    assert train_denoiser(*what, str(tiny_bundle)) == path
    with pytest.raises(SettingsError, match=r"trained with start [0-9a-f]{64}, not None; give the same"):
        train_denoiser(*what)
