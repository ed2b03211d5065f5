"""The baseline runner, and what every runner refuses (`Runner.check`)."""

from __future__ import annotations

import pytest
import torch
from helpers import randomise

from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.config import PRESETS
from bsdiff_rt.errors import EngineError
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.runners.eager import EagerRunner, load_networks
from bsdiff_rt.runners.registry import load_runner

SIZE = 32
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def networks():
    preset = PRESETS["tiny"]
    denoiser, enhancer = Denoiser(preset.denoiser), Enhancer(preset.enhancer)
    randomise(denoiser, 1)
    randomise(enhancer, 2)
    return denoiser, enhancer


@pytest.fixture
def runner(networks):
    return EagerRunner(*networks, SIZE, CPU)


def images(count, batch=2, seed=0):
    return torch.rand(count, batch, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def test_it_is_the_networks(runner, networks):
    x_t, cxr, out = images(3)
    t = torch.tensor([0.0, 999.0])
    runner.denoise(x_t, cxr, t, out)
    assert torch.equal(out, networks[0](x_t, cxr, t))
    runner.enhance(cxr, out)
    assert torch.equal(out, networks[1](cxr))


def test_inputs_stay_and_nothing_is_recorded(runner):
    x_t, cxr, out = images(3)
    before = x_t.clone(), cxr.clone()
    runner.denoise(x_t, cxr, torch.zeros(2), out)
    assert torch.equal(x_t, before[0])
    assert torch.equal(cxr, before[1])
    assert not out.requires_grad


def test_what_it_says_of_itself(runner):
    assert (runner.name, runner.precision, runner.image_size) == ("eager", "fp32", SIZE)
    assert (runner.device, runner.batch_range) == (CPU, (1, None))


def test_networks_are_put_into_evaluation_mode(networks):
    for network in networks:
        network.train()
    EagerRunner(*networks, SIZE, CPU)
    assert not any(module.training for network in networks for module in network.modules())


def test_close_may_be_called_twice(networks):
    with EagerRunner(*networks, SIZE, CPU) as runner:
        runner.close()


def test_from_a_bundle(tiny_bundle):
    bundle = open_bundle(tiny_bundle)
    with load_runner(bundle, "eager", CPU) as runner:
        assert isinstance(runner, EagerRunner)
        x_t, cxr, out = torch.rand(3, 1, 1, 64, 64)
        runner.denoise(x_t, cxr, torch.zeros(1), out)
        denoiser, _ = load_networks(bundle)
        with torch.no_grad():
            assert torch.equal(out, denoiser(x_t, cxr, torch.zeros(1)))
        assert out.abs().max() > 0.01


WRONG = {
    "size": (torch.zeros(2, 1, SIZE, SIZE // 2), r"shape \(2, 1, 32, 16\) given to the eager runner; give \(2, 1, 32,"),
    "channels": (torch.zeros(2, 3, SIZE, SIZE), r"shape \(2, 3, 32, 32\)"),
    "batch": (torch.zeros(3, 1, SIZE, SIZE), r"shape \(3, 1, 32, 32\)"),
    "dtype": (torch.zeros(2, 1, SIZE, SIZE, dtype=torch.float64), r"torch\.float64 buffer .* give torch\.float32"),
    "half": (torch.zeros(2, 1, SIZE, SIZE, dtype=torch.float16), r"torch\.float16 buffer"),
    "device": (torch.zeros(2, 1, SIZE, SIZE, device="meta"), "buffer on meta .* on cpu; move it"),
    "layout": (torch.zeros(2, 1, SIZE, SIZE).transpose(2, 3), "strides .* make it contiguous"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_buffers_it_cannot_use(runner, kind, position):
    wrong, message = WRONG[kind]
    buffers = [torch.zeros(2, 1, SIZE, SIZE) for _ in range(3)]
    buffers[position] = wrong
    if kind == "batch" and position == 0:
        message = r"shape \(2, 1, 32, 32\) given to the eager runner; give \(3, 1, 32, 32\)"
    with pytest.raises(EngineError, match=message):
        runner.denoise(buffers[0], buffers[1], torch.zeros(2), buffers[2])
    if position < 2:
        buffers = [torch.zeros(2, 1, SIZE, SIZE) for _ in range(2)]
        buffers[position] = wrong
        with pytest.raises(EngineError, match=message):
            runner.enhance(*buffers)


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (torch.zeros(1), r"t of shape \(1,\) given to the eager runner; give \(2,\)"),
        (torch.zeros(2, 1), r"t of shape \(2, 1\)"),
        (torch.zeros(2, dtype=torch.int64), r"torch\.int64 t .* give torch\.float32"),
        (torch.zeros(2, dtype=torch.float64), r"torch\.float64 t"),
        (torch.zeros(2, device="meta"), "t on meta"),
        (torch.zeros(4)[::2], "t with strides"),
    ],
)
def test_timesteps_it_cannot_use(runner, t, message):
    """A runner that binds by address would read what is not there."""
    x_t, cxr, out = images(3)
    with pytest.raises(EngineError, match=message):
        runner.denoise(x_t, cxr, t, out)


@pytest.mark.parametrize(
    ("batch_range", "batch", "message"),
    [
        ((1, None), 0, "batch of 0 .* takes 1 or more"),
        ((2, 4), 1, "batch of 1 .* takes 2 to 4"),
        ((2, 4), 5, "batch of 5 .* takes 2 to 4. Change the batch size, or build an engine for it"),
        ((4, 4), 3, "takes 4 to 4"),
    ],
)
def test_batches_outside_the_range(runner, batch_range, batch, message):
    runner.batch_range = batch_range
    x, out = torch.zeros(2, batch, 1, SIZE, SIZE)
    with pytest.raises(EngineError, match=message):
        runner.enhance(x, out)


@pytest.mark.gpu
def test_on_a_gpu(networks):
    import copy

    runner = EagerRunner(*copy.deepcopy(networks), SIZE, torch.device("cuda"))
    assert runner.device.index is not None
    x_t, cxr, out = images(3)
    EagerRunner(*networks, SIZE, CPU).denoise(x_t, cxr, torch.zeros(2), out)
    on_gpu = torch.empty_like(out, device=runner.device)
    runner.denoise(x_t.to(runner.device), cxr.to(runner.device), torch.zeros(2, device=runner.device), on_gpu)
    # Convolutions in TF32 keep 10 bits of the mantissa.
    assert (on_gpu.cpu() - out).abs().max() < 1e-2 * out.abs().max()
