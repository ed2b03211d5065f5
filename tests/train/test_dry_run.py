"""The dry run: activations and arithmetic as counted by hand, a measured rate, and what it says about memory."""

import time
from collections import Counter

import psutil
import pytest
import torch
from torch import nn

from bsdiff_rt.config import PRESETS
from train.denoiser import dry_run_denoiser
from train.dry_run import Estimate, count_work, format_seconds, measure_rate
from train.enhancer import dry_run_enhancer
from train.loop import TrainOptions
from train.losses import LossWeights

CPU = torch.device("cpu")
TINY, SIZE = PRESETS["tiny"], 32
OPTIONS = TrainOptions(steps=720, images=2, bf16=False)


def test_work_of_a_known_network():
    """A convolution keeps its input, a sigmoid its output: 2 * (1 + 4) * 8 * 8 float32."""
    work = count_work(
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Sigmoid()),
        lambda: (torch.zeros(2, 1, 8, 8),),
        CPU,
        bf16=False,
    )
    assert work.parameters == 4 * 9 + 4
    assert work.kept_bytes == 2 * (1 + 4) * 64 * 4
    assert work.flop == 2 * 2 * 9 * 4 * 64
    assert work.layers == Counter({(False, 1, 4, (3, 3), (1, 1), (1, 1), (8, 8)): 2})


def test_the_arithmetic_of_attention_is_counted_on_the_cpu():
    """Two products of 64 x 64 with 16 channels, for each of two samples."""

    class Attention(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    work = count_work(Attention, lambda: (torch.zeros(2, 1, 64, 16, requires_grad=True),), CPU, bf16=False)
    assert work.flop == work.attention_flop == 2 * (2 * 2 * 64 * 64 * 16)


def test_an_input_kept_twice_counts_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return self.one(x) + self.two(x)

    assert count_work(Twice, lambda: (torch.zeros(1, 1, 8, 8),), CPU, bf16=False).kept_bytes == 64 * 4


def test_the_rate_is_measured_on_the_heaviest_layer_first(monkeypatch):
    small, large = ((False, 1, 4, (3, 3), (1, 1), (1, 1), (side, side)) for side in (8, 32))
    measured = []
    monkeypatch.setattr("train.dry_run._time_layer", lambda layer, *_: measured.append(layer) or 0.5)
    rate = measure_rate(Counter({small: 3, large: 1}), CPU, False, budget_s=0.0)
    assert measured == [large]
    assert rate == 3 * 2 * 4 * 9 * 32 * 32 / 0.5
    measured.clear()
    measure_rate(Counter({small: 3, large: 1}), CPU, False, budget_s=60.0)
    assert measured == [large, small]


def test_memory_and_time_of_stage_1():
    whole = dry_run_denoiser(TINY, OPTIONS, SIZE)
    assert whole.fits
    assert whole.state_bytes == 20 * whole.parameters
    assert whole.steps == 720
    halves = dry_run_denoiser(TINY, TrainOptions(images=2, accumulate=2, bf16=False), SIZE)
    assert halves.activation_bytes == pytest.approx(whole.activation_bytes / 2, rel=0.1)
    assert halves.step_flop == pytest.approx(whole.step_flop)


def test_the_estimated_time_is_of_the_order_of_the_true_one():
    from bsdiff_rt.networks.unet import Denoiser

    options = TrainOptions(images=2, bf16=False)
    network, x = Denoiser(PRESETS["demo"].denoiser), torch.rand(2, 1, 64, 64)
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        network(x, x, torch.zeros(2)).sum().backward()
        seconds.append(time.monotonic() - started)
    estimated = dry_run_denoiser(PRESETS["demo"], options, 64).step_s
    assert min(seconds) / 6 < estimated < min(seconds) * 6  # the machine may be busy


def test_stage_2_counts_its_critic():
    with_critic, alone = (dry_run_enhancer(TINY, OPTIONS, SIZE, LossWeights(adversarial=w), None) for w in (0.01, 0))
    assert with_critic.parameters == alone.parameters
    assert with_critic.step_flop > alone.step_flop
    assert with_critic.activation_bytes > alone.activation_bytes > 2 * SIZE**2 * 4


def test_what_does_not_fit_is_said_with_the_time(monkeypatch):
    small = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: small)
    estimate = dry_run_denoiser(TINY, OPTIONS, SIZE)
    assert not estimate.fits
    assert "the memory does not suffice. Try a larger --accumulate, or --bf16." in str(estimate)
    assert "per step" in str(estimate)


def test_an_estimate_in_words():
    estimate = Estimate("cpu", 1234567, 2**30, 2**29, 2**32, 6000, 1e12, 2.0)
    assert str(estimate) == (
        "1,234,567 parameters, 6,000 steps on cpu\n"
        "memory: at least 1.50 GiB (1.00 GiB weights and optimiser, 0.50 GiB activations); 4.00 GiB are free\n"
        "time: about 2 s per step, 3.3 h in all (1,000.0 GFLOP per step at 500.0 GFLOP/s)"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2134, "0.21 s"), (45, "45 s"), (200, "3.3 min"), (7300, "2 h"), (86400 * 2.5, "2.5 d"), (86400 * 150, "150 d")],
)
def test_durations(seconds, text):
    assert format_seconds(seconds) == text
