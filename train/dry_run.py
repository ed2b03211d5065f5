"""What a training would take: memory, counted without allocating it, and time, measured over one step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from train.loop import Trainee, TrainOptions

GIB = 2**30
COPIES = 5  # of the parameters, float32: weights, averaged weights, gradients, and AdamW's two moments


@dataclass(frozen=True)
class Estimate:
    """What a training would take on this machine.

    Attributes:
        device: where it would run.
        parameters: of the network.
        state_bytes: weights, averaged weights, gradients, optimiser.
        activation_bytes: what the network's forward pass keeps for the backward pass, for one piece of a batch.
        free_bytes: of the device's memory, now.
        steps: optimiser steps.
        step_s: seconds per step; None where the memory would not do, so that none was run.
    """

    device: str
    parameters: int
    state_bytes: int
    activation_bytes: int
    free_bytes: int
    steps: int
    step_s: float | None

    @property
    def fits(self) -> bool:
        """Whether the free memory holds it."""
        return self.state_bytes + self.activation_bytes <= self.free_bytes

    def __str__(self) -> str:
        state, activations = self.state_bytes / GIB, self.activation_bytes / GIB
        lines = [
            f"{self.parameters:,} parameters, {self.steps:,} steps on {self.device}",
            f"memory: at least {state + activations:.2f} GiB ({state:.2f} weights, averages, gradients and optimiser, "
            f"{activations:.2f} activations), {self.free_bytes / GIB:.2f} GiB free",
        ]
        if self.step_s is None:
            lines.append("time: not measured, the memory does not suffice; try a larger --accumulate, or --bf16")
        else:
            lines.append(f"time: {self.step_s:.2f} s per step, {self.step_s * self.steps / 3600:.1f} h in all")
        return "\n".join(lines)


def estimate(
    build: Callable[[], nn.Module],
    inputs: Callable[[int], tuple[Tensor, ...]],
    step: Callable[[Trainee], None],
    options: TrainOptions,
) -> Estimate:
    """Count the memory of a training, and time one step after one to warm up if it fits.

    Args:
        build: makes the network.
        inputs: its inputs for a number of samples.
        step: one optimiser step.
        options: of the run.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    piece = -(-options.images // options.accumulate)
    parameters, activation_bytes = count_memory(build, lambda: inputs(piece), device, options.bf16)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    state_bytes = COPIES * 4 * parameters
    step_s = None
    if state_bytes + activation_bytes <= free:
        trainee = Trainee(build(), options)
        step(trainee)
        _wait(device)
        started = time.monotonic()
        step(trainee)
        _wait(device)
        step_s = time.monotonic() - started
    return Estimate(str(device), parameters, state_bytes, activation_bytes, free, options.steps, step_s)


def count_memory(
    build: Callable[[], nn.Module], inputs: Callable[[], tuple[Tensor, ...]], device: torch.device, bf16: bool
) -> tuple[int, int]:
    """Number of parameters, and bytes that the forward pass keeps for the backward pass; nothing is computed."""
    kept: dict[int, Tensor] = {}  # by storage; holding the tensor keeps the storage's address its own
    with FakeTensorMode(), torch.device(device):
        network = build()
        own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            network(*inputs())
        stored = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)
        return sum(parameter.numel() for parameter in network.parameters()), stored


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
