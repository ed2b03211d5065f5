"""What a benchmark measures, and how often."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from bsdiff_rt.bench.flops import count_denoiser_work
from bsdiff_rt.bench.networks import BenchModel
from bsdiff_rt.sampling.schedule import Table, sampler_table

FEW_STEPS = 10  # for a model whose own sampler takes hundreds: a whole image of those takes too long by default
FEW_STEPS_FROM = 100


@dataclass(frozen=True)
class Plan:
    """What is measured, and how often.

    Attributes:
        model: both networks and their sampler.
        device: where they run.
        steps: denoiser calls of one image.
        repeats: measured rounds of steps.
        image_repeats: measured rounds of whole images.
        ceilings: matrix product rates of the device, FLOP/s by precision (`flops.measure_matmul_rates`).
    """

    model: BenchModel
    device: torch.device
    steps: int
    repeats: int
    image_repeats: int
    ceilings: dict[str, float] = field(default_factory=dict)

    @cached_property
    def flop(self) -> float:
        """Arithmetic of one denoiser call on one image, in FLOP."""
        return count_denoiser_work(self.model.denoiser, self.model.size).flop

    def make_table(self) -> Table:
        """Return the sampler's coefficients.

        Raises:
            SettingsError: more steps than the model was trained with.
        """
        return sampler_table(self.model.schedule, self.model.sampler.name, self.steps)


def choose_steps(model: BenchModel) -> int:
    """Return the model's own number of steps, or a few if it takes 100 or more."""
    return model.sampler.steps if model.sampler.steps < FEW_STEPS_FROM else FEW_STEPS
