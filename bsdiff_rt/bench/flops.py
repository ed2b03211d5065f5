"""Arithmetic of a network, and the rates of this device that measured times are compared with."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bsdiff_rt.config import DenoiserConfig, EnhancerConfig
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.runners.timing import time_call

# Sides of square matrices, in rising order; a device stops where the time for a precision is used up.
MATRIX_SIZES = (256, 512, 1024, 2048, 4096, 8192)
COPY_BYTES = {"cpu": 2**26, "cuda": 2**29}  # far larger than any cache
PRECISIONS: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class Work:
    """Arithmetic and memory traffic of one call of a network for one image.

    A batch of B images takes B times the arithmetic and the values, but reads the weights once.

    Attributes:
        flop: multiplications and additions, each counted, of convolutions, linear layers and attention.
        weights: number of parameters, each read once per call.
        values: numbers that convolutions, linear layers and norms read and write. Activations, sums and attention in
            between are not counted, because a good kernel keeps them on the chip.
    """

    flop: float
    weights: int
    values: int

    def intensity(self, batch: int, value_bytes: int) -> float:
        """Return the arithmetic per byte of memory traffic, in FLOP/byte.

        Args:
            batch: number of images.
            value_bytes: size of one number.
        """
        return self.flop * batch / ((self.weights + self.values * batch) * value_bytes)


def count_denoiser_work(config: DenoiserConfig, size: int) -> Work:
    """Return the work of one denoiser call on one image of `size` x `size` px."""
    with torch.device("meta"):
        image = torch.empty(1, 1, size, size)
        return _count_work(Denoiser(config), image, image, torch.empty(1))


def count_enhancer_work(config: EnhancerConfig, size: int) -> Work:
    """Return the work of one enhancer call on one image of `size` x `size` px."""
    with torch.device("meta"):
        return _count_work(Enhancer(config), torch.empty(1, 1, size, size))


def _count_work(network: nn.Module, *inputs: Tensor) -> Work:
    """Count on the meta device: it has shapes but no memory, so the largest network takes a second."""
    values = 0

    def count(_: nn.Module, arguments: tuple[Tensor, ...], result: Tensor) -> None:
        nonlocal values
        values += sum(tensor.numel() for tensor in (*arguments, result))

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.GroupNorm):
            module.register_forward_hook(count)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*inputs)
    return Work(float(counter.get_total_flops()), sum(p.numel() for p in network.parameters()), values)


def measure_matmul_rates(
    device: torch.device, names: tuple[str, ...] = tuple(PRECISIONS), budget_s: float = 0.4
) -> dict[str, float]:
    """Return the best rate at which this device multiplies matrices, in FLOP/s by precision.

    Random square matrices of rising size are multiplied a few times each; the fastest single product counts. `tf32`
    exists on CUDA alone: float32 in memory, rounded to 10 bits of mantissa by the units. `fp16` is left out on a CPU,
    where no runner computes in it. A precision without a kernel is left out, too.

    Args:
        device: where to measure.
        names: keys of `PRECISIONS`.
        budget_s: approximate time for each precision, in seconds.
    """
    rates = {}
    before = torch.get_float32_matmul_precision()
    for name in names:
        if name in ("tf32", "fp16") and device.type != "cuda":
            continue
        try:
            torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
            rates[name] = _measure_matmul_rate(device, PRECISIONS[name], budget_s)
        except RuntimeError:  # no kernel for this type here, or not enough memory
            continue
        finally:
            torch.set_float32_matmul_precision(before)
    return rates


def _measure_matmul_rate(device: torch.device, dtype: torch.dtype, budget_s: float) -> float:
    generator = torch.Generator(device).manual_seed(0)
    deadline = time.perf_counter() + budget_s
    best = 0.0
    for n in MATRIX_SIZES:
        a, b = (torch.randn(n, n, generator=generator, device=device).to(dtype) for _ in range(2))
        product = partial(torch.mm, a, b, out=torch.empty(n, n, device=device, dtype=dtype))
        time_call(product, device)  # warms up
        for _ in range(5):
            best = max(best, 2.0 * n**3 / time_call(product, device))
            if time.perf_counter() > deadline:
                return best
    return best


def measure_copy_rate(device: torch.device) -> float:
    """Return the best rate at which this device copies within its memory: bytes/s, reads and writes both counted."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [time_call(lambda: target.copy_(source), device) for _ in range(6)]
    return 2.0 * source.numel() / min(times[1:])
