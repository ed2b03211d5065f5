"""Reuse of deep features: exact where nothing is reused, close where features change little, refused elsewhere."""

from __future__ import annotations

import pytest
import torch
from helpers import randomise
from toy import SCHEDULES, ToyRunner, draws, images

from bsdiff_rt.config import PRESETS, DenoiserConfig, Schedule
from bsdiff_rt.errors import EngineError, SettingsError
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.runners.eager import EagerRunner
from bsdiff_rt.sampling.cuda_graph import CapturedSampler
from bsdiff_rt.sampling.deep_cache import LEAST_STEPS, check_cache, list_denoisers
from bsdiff_rt.sampling.sampler import sample
from bsdiff_rt.sampling.schedule import sampler_table

CPU = torch.device("cpu")
SIZE = 32
THREE_LEVELS = DenoiserConfig((8, 16, 24), (2, 1, 2), (False, True, True), norm_groups=4)


def make_runner(config=PRESETS["tiny"].denoiser, seed=0):
    """An eager runner with random weights, and a count of what its denoiser was asked for."""
    denoiser = Denoiser(config).eval()
    randomise(denoiser, seed)
    return EagerRunner(denoiser, torch.nn.Identity(), SIZE, CPU)


def make_inputs(batch=2):
    cxr, noise = torch.randn(2, batch, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return cxr.clamp(-1, 1), lambda k: noise.roll(k, -1)


@pytest.mark.parametrize("config", [PRESETS["tiny"].denoiser, THREE_LEVELS, DenoiserConfig((8,), (1,), (True,), 4)])
@torch.no_grad()
def test_the_first_level_with_its_own_deep_features_is_the_whole_network(config):
    denoiser = Denoiser(config).eval()
    randomise(denoiser, 3)
    cxr, draw = make_inputs()
    t = torch.tensor([5.0, 900.0])
    out, deep = denoiser.compute(draw(0), cxr, t)
    assert torch.equal(out, denoiser(draw(0), cxr, t))
    assert tuple(deep.shape) == denoiser.shape_deep(2, SIZE)
    assert torch.equal(denoiser.compute(draw(0), cxr, t, deep)[0], out)
    other = denoiser.compute(draw(0), cxr, t - 4, deep)[0]  # x_t and t still reach it
    assert not torch.equal(other, out)


@torch.no_grad()
def test_the_levels_below_are_not_computed():
    denoiser = Denoiser(THREE_LEVELS).eval()
    cxr, draw = make_inputs()
    _, deep = denoiser.compute(draw(0), cxr, torch.zeros(2))
    called = []
    for name, module in denoiser.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    denoiser.compute(draw(0), cxr, torch.zeros(2), deep)
    allowed = ("time_embed", "conv_in", "down_blocks.0.", "up_blocks.2", "norm_out", "conv_out")
    assert called
    assert [name for name in called if not name.startswith(allowed)] == []
    assert "down_blocks.0.downsampler" not in called


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_which_steps_compute_deep_features(name):
    """Steps 0, 3, 6, ... in every image, also where the steps are no multiple of 3."""
    runner = make_runner()
    asked = []
    for kind in ("denoise_and_keep", "denoise_top", "denoise"):
        original = getattr(runner, kind)
        setattr(runner, kind, lambda *args, kind=kind, original=original: asked.append(kind) or original(*args))
    cxr, draw = make_inputs()
    table = sampler_table(Schedule(objective="x0"), name, 20)
    expected = ["denoise_top" if k % 3 else "denoise_and_keep" for k in range(20)]
    with CapturedSampler(runner, cache_every=3) as captured:
        found = [captured.sample(cxr, table, draw) for _ in range(2)]
    assert asked == expected * 2
    assert torch.equal(*found)
    asked.clear()
    assert torch.equal(sample(runner, cxr, table, draw, 3), found[0])
    assert asked == expected
    asked.clear()
    sample(runner, cxr, table, draw)
    assert asked == ["denoise"] * 20


def test_the_picture_is_near_the_exact_one():
    """Features of a random network change with x_t, so the picture changes; with more reuse, by more."""
    runner, (cxr, draw) = make_runner(), make_inputs()
    table = sampler_table(Schedule(objective="v"), "ddim", 20)
    exact = sample(runner, cxr, table, draw)
    differences = [float((sample(runner, cxr, table, draw, n) - exact).abs().mean()) for n in (2, 5, 20)]
    assert 0 < differences[0] < differences[1] < differences[2]
    assert differences[0] < 0.02  # seen: 0.012, 0.051, 0.11; the picture itself varies by 0.76


def test_a_runner_that_has_only_whole_graphs():
    message = r"runner toy cannot reuse deep features\. Use runner eager, or compute every step\."
    with pytest.raises(EngineError, match=message):
        sample(ToyRunner(SCHEDULES[0]), images(), sampler_table(SCHEDULES[0], "ddim", 20), draws(), 2)
    runner = ToyRunner(SCHEDULES[0])
    assert list_denoisers(runner, 2, 1) == [runner]
    with pytest.raises(EngineError, match="runner eager cannot reuse deep features"):  # of a network without levels
        EagerRunner(torch.nn.Identity(), torch.nn.Identity(), SIZE, CPU).make_deep(1)


@pytest.mark.parametrize(
    ("every", "steps", "message"),
    [
        (2, LEAST_STEPS - 1, "deep features can be reused from 20 steps on, not with 19 steps, which differ too much"),
        (0, 50, "deep features every 0 steps do not fit a sampler of 50 steps. Give 1 to 50."),
        (51, 50, "deep features every 51 steps do not fit a sampler of 50 steps. Give 1 to 50."),
        (2, 1, "deep features every 2 steps do not fit a sampler of 1 step. Give 1 to 1."),
    ],
)
def test_reuse_that_is_refused(every, steps, message):
    with pytest.raises(SettingsError) as refused:
        check_cache(every, steps)
    assert message in str(refused.value)
    assert refused.value.setting == "steps"


def test_reuse_that_is_accepted():
    check_cache(1, 1)
    check_cache(2, LEAST_STEPS)
    check_cache(50, 50)


@pytest.mark.gpu
def test_a_recorded_run_equals_the_plain_loop_bit_for_bit_on_a_gpu():
    device = torch.device("cuda", 0)
    denoiser = Denoiser(PRESETS["tiny"].denoiser).eval()
    randomise(denoiser, 0)
    cxr, draw = make_inputs()
    table = sampler_table(Schedule(objective="v"), "ddpm", 23)
    stream = torch.cuda.Stream(device)
    with EagerRunner(denoiser, torch.nn.Identity(), SIZE, device) as runner, torch.cuda.stream(stream):
        expected = sample(runner, cxr.to(device), table, draw, 3)
        with CapturedSampler(runner, cache_every=3) as captured:
            for _ in range(3):
                assert torch.equal(captured.sample(cxr.to(device), table, draw), expected)


def test_memory_and_buffers_are_checked():
    runner, (cxr, _) = make_runner(), make_inputs()
    deep = runner.make_deep(2)
    assert tuple(deep.shape) == (2, 16, SIZE, SIZE)
    for method in (runner.denoise_and_keep, runner.denoise_top):
        with pytest.raises(EngineError, match=r"buffer of shape \(1, 1, 32, 32\) given to the eager runner"):
            method(cxr, cxr, torch.zeros(2), torch.empty_like(cxr[:1]), deep)
