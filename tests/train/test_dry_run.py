"""The dry run: activations as counted by hand, time where the memory suffices, and the reason where it does not."""

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from bsdiff_rt.config import PRESETS, Schedule
from train.data import Augmentation, Batches
from train.denoiser import dry_run_denoiser
from train.dry_run import count_memory
from train.enhancer import dry_run_enhancer
from train.loop import TrainOptions
from train.losses import LossWeights

CPU = torch.device("cpu")
TINY, SIZE = PRESETS["tiny"], 32
OPTIONS = TrainOptions(steps=720, images=2, bf16=False)


def test_activations_of_a_known_network():
    """A convolution keeps its input, a sigmoid its output: 2 * (1 + 4) * 8 * 8 float32."""
    parameters, kept = count_memory(
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Sigmoid()),
        lambda: (torch.zeros(2, 1, 8, 8),),
        CPU,
        bf16=False,
    )
    assert parameters == 4 * 9 + 4
    assert kept == 2 * (1 + 4) * 64 * 4


def test_an_input_kept_twice_counts_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return self.one(x) + self.two(x)

    assert count_memory(Twice, lambda: (torch.zeros(1, 1, 8, 8),), CPU, bf16=False)[1] == 64 * 4


@pytest.fixture
def batches():
    pool = np.random.default_rng(0).integers(0, 256, (2, 2, SIZE, SIZE), dtype=np.uint8)
    return Batches([], pool, 0.0, Augmentation(), 0)


def test_memory_and_time_of_stage_1(batches):
    whole = dry_run_denoiser(TINY, Schedule(), batches, OPTIONS, SIZE)
    assert whole.fits
    assert whole.state_bytes == 20 * whole.parameters
    assert whole.steps == 720
    assert f"{whole.step_s:.2f} s per step, {whole.step_s / 5:.1f} h in all" in str(whole)
    halves = dry_run_denoiser(TINY, Schedule(), batches, TrainOptions(images=2, accumulate=2, bf16=False), SIZE)
    assert halves.activation_bytes == pytest.approx(whole.activation_bytes / 2, rel=0.1)


def test_memory_and_time_of_stage_2_with_its_critic():
    estimate = dry_run_enhancer(TINY, OPTIONS, SIZE, LossWeights(adversarial=0.01), None)
    assert estimate.step_s > 0
    assert estimate.activation_bytes > 2 * SIZE**2 * 4


def test_nothing_is_run_where_the_memory_does_not_suffice(batches, monkeypatch):
    small = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: small)
    estimate = dry_run_denoiser(TINY, Schedule(), batches, OPTIONS, SIZE)
    assert estimate.step_s is None
    assert not estimate.fits
    assert "not measured" in str(estimate)
