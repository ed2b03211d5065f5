"""Reuse of deep features between steps (Ma et al. 2024, "DeepCache", arXiv 2312.00858): faster, and not exact.

A U-Net's levels below the first one change little from one step to the next. With `cache_every` N, step k computes them
where k is a multiple of N. The steps in between compute the first level alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bsdiff_rt.config import step_count
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.sampling.fused_step import Denoises

LEAST_STEPS = 20  # with fewer, one step differs too much from the next


@dataclass(frozen=True)
class _WithDeep:
    """A denoiser that writes or reads deep features.

    Attributes:
        call: the runner's `denoise_and_keep`, which writes them, or `denoise_top`, which reads them.
        deep: the features.
    """

    call: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
    deep: torch.Tensor

    def denoise(self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
        self.call(x_t, cxr, t, out, self.deep)


def list_denoisers(runner: Runner, batch: int, cache_every: int) -> Sequence[Denoises]:
    """Return what denoises in each of `cache_every` steps in a row: step k takes number k modulo `cache_every`.

    Args:
        runner: runs the denoiser.
        batch: number of images.
        cache_every: N above; 1 computes every step in full.

    Raises:
        EngineError: N is above 1, and the runner cannot reuse deep features.
    """
    if cache_every == 1:
        return [runner]
    deep = runner.make_deep(batch)
    return [_WithDeep(runner.denoise_and_keep, deep), *[_WithDeep(runner.denoise_top, deep)] * (cache_every - 1)]


def check_cache(cache_every: int, steps: int) -> None:
    """Refuse reuse where it cannot work, before anything is loaded.

    Args:
        cache_every: N above.
        steps: of the sampler.

    Raises:
        SettingsError: N is out of range, or there are too few steps.
    """
    if cache_every == 1:
        return
    if not 1 <= cache_every <= steps:
        raise SettingsError(
            f"deep features every {cache_every} steps do not fit a sampler of {step_count(steps)}. Give 1 to {steps}.",
            setting="steps",
        )
    if steps < LEAST_STEPS:
        raise SettingsError(
            f"deep features can be reused from {LEAST_STEPS} steps on, not with {step_count(steps)}, which differ too "
            "much. Compute all of them.",
            setting="steps",
        )
