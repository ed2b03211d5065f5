"""Estimate what a training would take, without training: memory and arithmetic from shapes, speed from a few layers.

One pass over fake tensors, which have shapes but no memory, gives parameters, kept activations and FLOP. The layers
that hold most of the arithmetic are then run one at a time on this machine to measure its rate.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from train.loop import TrainOptions

GIB = 2**30
COPIES = 5  # of the trained parameters, float32: weights, averaged weights, gradients, AdamW's two moments
BACKWARD = 3  # forward and backward pass of a layer are three times the arithmetic of the forward pass
MEASURE_S = 2.5  # time spent on measuring layers
ATTENTION_SHAPE = (1, 1, 2048, 64)  # batch, heads, pixels, channels of the attention that is measured

Shape = tuple[int, ...]
Layer = tuple[bool, int, int, Shape, Shape, Shape, Shape]


@dataclass(frozen=True)
class Part:
    """A network that takes part in an optimiser step.

    Attributes:
        build: makes it.
        inputs: makes its inputs, for a number of samples.
        passes: arithmetic of it in one step, in forward passes.
        copies: float32 copies of its parameters in memory.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    passes: int = BACKWARD
    copies: int = COPIES


@dataclass(frozen=True)
class Work:
    """What one forward pass of a network holds and does.

    Attributes:
        parameters: number of them.
        kept_bytes: what the pass keeps for the backward pass.
        flop: multiplications and additions, counted apart.
        attention_flop: the part of `flop` that is attention.
        layers: convolutions by shape, with the number of them in the network.
    """

    parameters: int
    kept_bytes: int
    flop: float
    attention_flop: float
    layers: Counter[Layer]


@dataclass(frozen=True)
class Estimate:
    """What a training would take on this machine.

    Attributes:
        device: it would run on.
        parameters: of the trained network.
        state_bytes: weights, averaged weights, gradients, optimiser.
        activation_bytes: what the forward passes keep for the backward pass, for one part of a batch.
        free_bytes: free memory of the device, now.
        steps: optimiser steps.
        step_flop: arithmetic of one step.
        step_s: estimated seconds per step.
    """

    device: str
    parameters: int
    state_bytes: int
    activation_bytes: int
    free_bytes: int
    steps: int
    step_flop: float
    step_s: float

    @property
    def fits(self) -> bool:
        """Return whether the free memory holds it."""
        return self.state_bytes + self.activation_bytes <= self.free_bytes

    def __str__(self) -> str:
        state, activations = self.state_bytes / GIB, self.activation_bytes / GIB
        rate = self.step_flop / self.step_s
        lines = [
            f"{self.parameters:,} parameters, {self.steps:,} steps on {self.device}",
            f"memory: at least {state + activations:.2f} GiB ({state:.2f} GiB weights and optimiser, "
            f"{activations:.2f} GiB activations); {self.free_bytes / GIB:.2f} GiB are free",
            f"time: about {format_seconds(self.step_s)} per step, {format_seconds(self.step_s * self.steps)} in all "
            f"({self.step_flop / 1e9:,.1f} GFLOP per step at {rate / 1e9:,.1f} GFLOP/s)",
        ]
        if not self.fits:
            lines.insert(2, "the memory does not suffice. Try a larger --accumulate, or --bf16.")
        return "\n".join(lines)


def format_seconds(seconds: float) -> str:
    """Return a duration with two significant digits in the unit that suits it: `0.21 s`, `35 min`, `4.1 h`, `12 d`."""
    unit, size = "s", 1.0
    for name, length in (("min", 60.0), ("h", 3600.0), ("d", 86400.0)):
        if seconds >= 2 * length:
            unit, size = name, length
    value = seconds / size
    digits = f"{value:.2g}" if value < 100 else f"{value:.0f}"
    return f"{digits} {unit}"


def estimate(parts: list[Part], options: TrainOptions) -> Estimate:
    """Estimate memory and time of a training. Writes nothing and takes seconds, however large the network.

    Args:
        parts: networks of a step, the trained one first.
        options: of the run.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    piece = -(-options.images // options.accumulate)
    works = [count_work(part.build, partial(part.inputs, piece), device, options.bf16) for part in parts]
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    batches = options.images / piece
    step_flop = sum(work.flop * part.passes * batches for work, part in zip(works, parts, strict=True))
    attention_flop = sum(work.attention_flop * part.passes * batches for work, part in zip(works, parts, strict=True))
    layers: Counter[Layer] = Counter()
    for work, part in zip(works, parts, strict=True):
        for layer, count in work.layers.items():
            layers[layer] += count * part.passes
    step_s = (step_flop - attention_flop) / measure_rate(layers, device, options.bf16)
    if attention_flop:
        step_s += attention_flop / measure_attention_rate(device, options.bf16)
    return Estimate(
        str(device),
        works[0].parameters,
        sum(4 * part.copies * work.parameters for work, part in zip(works, parts, strict=True)),
        sum(work.kept_bytes for work in works),
        free,
        options.steps,
        step_flop,
        step_s,
    )


def count_work(
    build: Callable[[], nn.Module], inputs: Callable[[], tuple[Tensor, ...]], device: torch.device, bf16: bool
) -> Work:
    """Count one forward pass of a network on fake tensors. Nothing is computed."""
    kept: dict[int, Tensor] = {}  # by storage; holding the tensor keeps the storage's address its own
    layers: Counter[Layer] = Counter()

    def count(module: nn.Module, arguments: tuple[Tensor, ...], _: Tensor) -> None:
        layers[_describe_layer(module, arguments[0])] += len(arguments[0])

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with FakeTensorMode(), torch.device(device):
        network = build()
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.register_forward_hook(count)
        own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
        with hooks, counter, torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            network(*inputs())
        stored = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)
        parameters = sum(parameter.numel() for parameter in network.parameters())
    attention = sum(flop for name, flop in counter.get_flop_counts()["Global"].items() if "attention" in str(name))
    return Work(parameters, stored, float(counter.get_total_flops()), float(attention), layers)


def measure_rate(layers: Counter[Layer], device: torch.device, bf16: bool, budget_s: float = MEASURE_S) -> float:
    """Measure how fast this machine trains convolutions: FLOP/s of forward and backward passes.

    Args:
        layers: shapes and how often each is run. The ones with most arithmetic are measured first.
        device: where to run them.
        bf16: run them under bf16 autocast.
        budget_s: stop after this many seconds. At least one layer is measured.
    """
    ordered = sorted(layers, key=lambda layer: -layers[layer] * _flop(layer))
    flop = seconds = 0.0
    started = time.monotonic()
    for layer in ordered:
        flop += layers[layer] * _flop(layer)
        seconds += layers[layer] * _time_layer(layer, device, bf16)
        if time.monotonic() - started > budget_s:
            break
    return flop / seconds


def measure_attention_rate(device: torch.device, bf16: bool) -> float:
    """Measure how fast this machine trains attention: FLOP/s of forward and backward pass."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    q = torch.rand(ATTENTION_SHAPE, device=device, dtype=dtype, requires_grad=True)
    seconds = min(_time(lambda: scaled_dot_product_attention(q, q, q), device) for _ in range(2))
    return BACKWARD * sdpa_flop_count(ATTENTION_SHAPE, ATTENTION_SHAPE, ATTENTION_SHAPE) / seconds


def _count_attention(q: Shape, k: Shape, v: Shape, *_: object, **__: object) -> int:
    return sdpa_flop_count(q, k, v)


# torch counts the attention of every device but the CPU's.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention}


def _describe_layer(module: nn.Module, x: Tensor) -> Layer:
    assert isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    transposed = isinstance(module, nn.ConvTranspose2d)
    padding = module.padding if isinstance(module.padding, tuple) else (0, 0)
    sides = (module.in_channels, module.out_channels)
    return transposed, *sides, module.kernel_size, module.stride, padding, tuple(x.shape[-2:])


def _flop(layer: Layer) -> float:
    """Return the FLOP of a layer's forward and backward pass for one sample."""
    transposed, before, after, kernel, stride, _, (height, width) = layer
    positions = height * width if transposed else -(-height // stride[0]) * -(-width // stride[1])
    return BACKWARD * 2.0 * before * after * kernel[0] * kernel[1] * positions


def _time_layer(layer: Layer, device: torch.device, bf16: bool) -> float:
    """Return the seconds that a layer's forward and backward pass take for one sample: the faster of two runs."""
    transposed, before, after, kernel, stride, padding, (height, width) = layer
    build = nn.ConvTranspose2d if transposed else nn.Conv2d
    module = build(before, after, kernel, stride, padding, device=device)  # type: ignore[arg-type]
    x = torch.rand(1, before, height, width, device=device, requires_grad=True)

    def run() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            y: Tensor = module(x)
        return y

    return min(_time(run, device) for _ in range(2))


def _time(forward: Callable[[], Tensor], device: torch.device) -> float:
    """Return the seconds of a forward and a backward pass."""
    _wait(device)
    started = time.monotonic()
    y = forward()
    y.backward(torch.ones_like(y))
    _wait(device)
    return time.monotonic() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
