"""The sampling step with everything behind the denoiser in one kernel, for a GPU.

`sampler.step` is the plain version. Its nine small operations each take longer to start than to compute, because an
image has only 65,536 pixels. `choose_step` takes the kernel if it agrees with the plain version on this device. On a
CPU there is nothing to gain (docs/benchmarks.md).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache
from typing import Protocol

import numpy as np
import torch

from bsdiff_rt.errors import one_line, out_of_memory
from bsdiff_rt.runners.devices import make_current
from bsdiff_rt.sampling.buffers import StepBuffers
from bsdiff_rt.sampling.schedule import Table

logger = logging.getLogger(__name__)

BLOCK = 1024  # pixels that one program of the kernel works on
TOLERANCE = 1e-6  # of numbers about 1: the kernel rounds a product and a sum once, the plain version twice
CHECKED_PX = 37  # not a multiple of BLOCK


class Denoises(Protocol):
    """What a step needs of a runner (`runners.base.Runner`)."""

    def denoise(self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
        """Write the denoiser's prediction into `out`."""


Step = Callable[[Denoises, StepBuffers], None]


def fused_step(runner: Denoises, buffers: StepBuffers) -> None:
    """Do `sampler.step` with one kernel behind the denoiser. The arguments are the same."""
    from bsdiff_rt.sampling.tail_kernel import finish

    buffers.load_row()
    runner.denoise(buffers.x_t, buffers.cxr, buffers.t, buffers.out)
    images = (buffers.x_t, buffers.out, buffers.x0, buffers.x0_previous, buffers.z)
    pixels = buffers.x_t.numel()
    with make_current(buffers.x_t.device):  # Triton starts kernels on the current device
        finish[(-(-pixels // BLOCK),)](*images, buffers.row, pixels, BLOCK=BLOCK)
    buffers.index.add_(1)


def choose_step(device: torch.device, plain: Step) -> Step:
    """Return the step to use on a device.

    Args:
        device: where the buffers lie.
        plain: `sampler.step`.

    Returns:
        `fused_step` on a GPU where its kernel agrees with the plain version, otherwise `plain`.
    """
    return fused_step if device.type == "cuda" and _agrees(device, plain) else plain


@cache
def _agrees(device: torch.device, plain: Step) -> bool:
    """Return whether the kernel runs on a device and agrees with the plain version. The reason why not is logged."""
    try:
        difference = measure_difference(device, plain)
    except Exception as error:  # Triton needs a C compiler and a driver that fits; its errors share no base class
        if out_of_memory(error):
            raise
        logger.info(
            "The step's kernel does not work on %s (%s). Its operations run one by one.", device, one_line(error)
        )
        return False
    if not difference <= TOLERANCE:  # also NaN
        logger.warning(
            "The step's kernel differs by %.2g from the plain version on %s. Its operations run one by one.",
            difference,
            device,
        )
    return difference <= TOLERANCE


@torch.no_grad()
def measure_difference(device: torch.device, plain: Step) -> float:
    """Return the largest difference between both versions of a step, on random images and coefficients.

    One pixel of the prediction is infinite and one is NaN. The difference is infinite if both versions do not make NaN
    of the same pixels.

    Args:
        device: where to compare.
        plain: `sampler.step`.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 2, 1, CHECKED_PX, CHECKED_PX, generator=generator)
    images[1, 0, 0, 3, 5], images[1, 1, 0, 0, 0] = torch.inf, torch.nan
    row = np.random.default_rng(0).uniform(-1.0, 1.0, (6, 1))
    cxr, out, x_t, x0_previous, z = images.to(device)
    found = []
    for version in (plain, fused_step):
        buffers = StepBuffers.allocate(cxr, Table(np.array([0]), *row))
        buffers.start(x_t)
        buffers.x0_previous.copy_(x0_previous)
        buffers.ring.copy_(z)
        version(_Prediction(out), buffers)
        found.append(torch.cat((buffers.x_t, buffers.x0, buffers.x0_previous)))
    plain_result, fused_result = found
    if not torch.equal(plain_result.isnan(), fused_result.isnan()):
        return math.inf
    return float((plain_result - fused_result).nan_to_num().abs().max())


class _Prediction:
    """Stands for a runner whose denoiser always predicts the same."""

    def __init__(self, prediction: torch.Tensor) -> None:
        self._prediction = prediction

    def denoise(self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
        """Write the prediction into `out`."""
        out.copy_(self._prediction)
