"""A denoiser that is a formula, with images and noise for it: the sampling loop without networks."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from bsdiff_rt.config import Schedule
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.sampling.noise import ImageNoise
from bsdiff_rt.sampling.schedule import alpha_bar

SIZE = (8, 16)
SCHEDULES = (Schedule(name="cosine"), Schedule(name="squaredcos_cap_v2"))


class ToyRunner(Runner):
    """A fixed smooth function of x_t, cxr and t as denoiser, one pixel at a time, in whatever dtype it is given.

    `inside` is the x0 it believes in, within (-0.9, 0.9), turned into what `schedule.objective` asks for. With
    `clamped`, that function is returned as it is instead, so that the x0 of most steps is far outside [-1, 1].
    """

    name = "toy"

    def __init__(self, schedule: Schedule, clamped: bool = False) -> None:
        super().__init__(device=torch.device("cpu"), precision="fp32", batch_range=(1, None), image_size=SIZE[0])
        self.objective = schedule.objective
        self.clamped = clamped
        self.alpha_bar = torch.from_numpy(alpha_bar(schedule))
        self.asked: list[list[float]] = []
        self.closed = False

    def denoise(self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
        self.asked.append(t.tolist())
        out.copy_(self.predict(x_t, cxr, t))

    def predict(self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t.to(x_t).view(-1, 1, 1, 1)
        x0 = 0.9 * torch.tanh(0.5 * x_t + 0.8 * cxr + torch.sin(t / 200))
        if self.clamped or self.objective == "x0":
            return 3 * x0 if self.clamped else x0
        abar = self.alpha_bar.to(x_t)[t.long()]
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        return (x_t - alpha * x0) / sigma if self.objective == "eps" else (alpha * x_t - x0) / sigma

    def enhance(self, x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(x)

    def close(self) -> None:
        self.closed = True


def images(batch: int = 2, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """[B, 1, H, W], in [-1, 1]."""
    return (
        torch.rand(batch, 1, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype) * 2 - 1
    )


@functools.cache
def field(image: int, number: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Kept, because some 40 trajectories of 1000 steps take the same draws."""
    return ImageNoise(0, hashlib.sha256(bytes([image])).digest()).draw(number, SIZE)


def draws(batch: int | Sequence[int] = 2) -> Callable[[int], torch.Tensor]:
    """Draws of images 0 to B - 1, or of the images listed."""
    numbers = range(batch) if isinstance(batch, int) else batch
    return lambda number: torch.from_numpy(np.stack([field(i, number)[None] for i in numbers]))
