"""Arithmetic of a network, and the rates of this device that measured times are compared with."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bsdiff_rt.config import DenoiserConfig, EnhancerConfig
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.blocks import SelfAttention
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
VALUE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


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
        return self.flop * batch / self._count_bytes(batch, value_bytes)

    def compute_floor_s(self, batch: int, value_bytes: int, flop_per_s: float, bytes_per_s: float) -> float:
        """Return the least seconds that a device can take: for the arithmetic or for the memory traffic.

        Args:
            batch: number of images.
            value_bytes: size of one number.
            flop_per_s: rate of the device's matrix products.
            bytes_per_s: rate of the device's memory, reads and writes together.
        """
        return max(self.flop * batch / flop_per_s, self._count_bytes(batch, value_bytes) / bytes_per_s)

    def _count_bytes(self, batch: int, value_bytes: int) -> int:
        return (self.weights + self.values * batch) * value_bytes


def count_denoiser_work(config: DenoiserConfig, size: int) -> Work:
    """Return the work of one denoiser call on one image of `size` x `size` px."""
    with torch.device("meta"):
        image = torch.empty(1, 1, size, size)
        return _count_work(Denoiser(config), image, image, torch.empty(1))


def count_denoiser_parts(config: DenoiserConfig, size: int) -> dict[str, Work]:
    """Return the work of one denoiser call on one image of `size` x `size` px by kind.

    Returns:
        "attention": the products of scores and values. Its values are queries, keys, values and results, as a fused
        kernel reads and writes them. "convolutions". "rest": linear layers and norms.
    """
    with torch.device("meta"):
        network = Denoiser(config)
        image = torch.empty(1, 1, size, size)
        values = dict.fromkeys(("attention", "convolutions", "rest"), 0)
        weights = dict(values)

        def count(kind: str, times: int, module: nn.Module, arguments: tuple[Tensor, ...], result: Tensor) -> None:
            values[kind] += times * sum(tensor.numel() for tensor in (*arguments, result))
            weights[kind] += sum(parameter.numel() for parameter in module.parameters(recurse=False))

        for module in network.modules():
            if isinstance(module, SelfAttention):
                module.register_forward_hook(partial(count, "attention", 2))
            elif isinstance(module, nn.Conv2d):
                module.register_forward_hook(partial(count, "convolutions", 1))
            elif isinstance(module, nn.Linear | nn.GroupNorm):
                module.register_forward_hook(partial(count, "rest", 1))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(image, image, torch.empty(1))
    flop = dict.fromkeys(values, 0.0)
    for operator, number in counter.get_flop_counts()["Global"].items():
        flop[_name_kind(str(operator))] += number
    return {kind: Work(flop[kind], weights[kind], values[kind]) for kind in values}


def _name_kind(operator: str) -> str:
    """Return the kind of work of an operator of torch, a key of `count_denoiser_parts`."""
    if "convolution" in operator:
        return "convolutions"
    return "attention" if "bmm" in operator or "attention" in operator else "rest"


def compute_floor_ms(document: dict[str, Any], row: dict[str, Any]) -> float | None:
    """Return the least milliseconds of a row's step on its device, kind by kind; None if a rate is not known.

    Args:
        document: `Document.to_dict()`, or the content of its JSON file.
        row: one of its rows.
    """
    if "work_parts" not in document or row["ceiling"] is None:
        return None
    rate = document["matmul_tflops"][row["ceiling"]]
    of_device = VALUE_BYTES[row["precision"]], rate * 1e12, document["copy_gb_s"] * 1e9
    parts = [Work(**part) for part in document["work_parts"].values()]
    return 1e3 * sum(part.compute_floor_s(row["batch"], *of_device) for part in parts)


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
