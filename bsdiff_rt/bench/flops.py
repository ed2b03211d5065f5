"""How much work a network is, and how fast this device can work: what a benchmark's figures are held against."""

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

# A matrix product of n x n; each device is swept upwards until one product takes longer than its share of the time.
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
    """One call of a network for one image; a batch of B is B times the arithmetic and the values, but not the weights.

    Attributes:
        flop: multiplications and additions, counted apart, of convolutions, linear layers and attention.
        weights: number of parameters, each read once per call.
        values: numbers that convolutions, linear layers and norms read and write, each once. What lies between them
            (activations, sums, attention) is not counted: a good kernel keeps it on the chip.
    """

    flop: float
    weights: int
    values: int

    def intensity(self, batch: int, value_bytes: int) -> float:
        """Arithmetic per byte of memory traffic, in FLOP/byte, at a batch size and a size of one number."""
        return self.flop * batch / ((self.weights + self.values * batch) * value_bytes)


def denoiser_work(config: DenoiserConfig, size: int) -> Work:
    """One denoiser call on one image of `size` px a side."""
    with torch.device("meta"):
        image = torch.empty(1, 1, size, size)
        return _work(Denoiser(config), image, image, torch.empty(1))


def enhancer_work(config: EnhancerConfig, size: int) -> Work:
    """One enhancer call on one image of `size` px a side."""
    with torch.device("meta"):
        return _work(Enhancer(config), torch.empty(1, 1, size, size))


def _work(network: nn.Module, *inputs: Tensor) -> Work:
    """Count on the meta device: shapes without memory, so that the largest network takes a second."""
    values = 0

    def count(_: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        nonlocal values
        values += sum(tensor.numel() for tensor in (*given, made))

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.GroupNorm):
            module.register_forward_hook(count)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*inputs)
    return Work(float(counter.get_total_flops()), sum(p.numel() for p in network.parameters()), values)


def matmul_ceilings(device: torch.device, budget_s: float = 0.4) -> dict[str, float]:
    """The best rate at which this device was seen to multiply matrices, in FLOP/s, by precision.

    Random square matrices of rising size, each a few times; the fastest single product counts. `tf32` (float32 in
    memory, rounded to 10 bits of mantissa by the units) exists on CUDA alone. A precision without a kernel is left out.

    Args:
        device: where.
        budget_s: time for each precision, about.
    """
    rates = {}
    before = torch.get_float32_matmul_precision()
    for name, dtype in PRECISIONS.items():
        if name == "tf32" and device.type != "cuda":
            continue
        try:
            torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
            rates[name] = _matmul_rate(device, dtype, budget_s)
        except RuntimeError:  # no kernel for this type here, or no memory for it
            continue
        finally:
            torch.set_float32_matmul_precision(before)
    return rates


def _matmul_rate(device: torch.device, dtype: torch.dtype, budget_s: float) -> float:
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


def copy_bandwidth(device: torch.device) -> float:
    """The best rate at which this device was seen to copy within its memory, in bytes/s, read plus written."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [time_call(lambda: target.copy_(source), device) for _ in range(6)]
    return 2.0 * source.numel() / min(times[1:])
