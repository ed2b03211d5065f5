"""What both training loops share: options, learning rate, averaged weights, checkpoints, batches made ahead."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from bsdiff_rt.errors import SettingsError

CROP_MULTIPLE_PX = 16  # four levels of halving, as in the presets


@dataclass(frozen=True)
class TrainOptions:
    """One training run. Saved inside every checkpoint.

    Attributes:
        steps: optimiser steps in all.
        learning_rate: peak of a linear warm-up over `warmup` steps and a cosine decay to a hundredth.
        weight_decay: AdamW's.
        ema: decay of the averaged weights; the average starts young and reaches this decay after 1 / (1 - ema) steps.
        images: batch size in whole images; a batch of crops holds as many pixels.
        crops: crop sides as shares of the image's, one after another over equal parts of the run; several in one part
            are alternated. Crops show more patients per step; whole images, last, what the network will be given.
        seed: of everything random.
        bf16: run the network under bf16 autocast.
        save_every: steps between checkpoints and sample grids.
    """

    steps: int = 6000
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 1e-4
    ema: float = 0.998
    images: int = 2
    crops: tuple[tuple[float, ...], ...] = ((0.5,), (0.5, 0.75), (0.75, 1.0), (1.0,))
    seed: int = 0
    bf16: bool = True
    save_every: int = 250

    def crop(self, step: int, size: int) -> tuple[int, int]:
        """Number of crops and their side in px for `step`, from images of side `size`."""
        part = self.crops[min(step * len(self.crops) // self.steps, len(self.crops) - 1)]
        side = max(CROP_MULTIPLE_PX, round(part[step % len(part)] * size / CROP_MULTIPLE_PX) * CROP_MULTIPLE_PX)
        return max(1, round(self.images * size**2 / side**2)), side

    def rate(self, step: int) -> float:
        """Learning rate of `step`."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0))))


class Trainee:
    """A network in training: weights, averaged weights, optimiser, number of steps done; saved and restored as one."""

    def __init__(self, network: nn.Module, options: TrainOptions) -> None:
        self.network = network.to(memory_format=torch.channels_last)
        self.averaged = copy.deepcopy(network).eval().requires_grad_(False)
        self.options = options
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
        )
        self.step = 0

    def update(self, loss: torch.Tensor) -> None:
        """One optimiser step down the gradient of `loss`, then the weights' running average."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(self.options.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            averaged, current = list(self.averaged.parameters()), list(self.network.parameters())
            torch._foreach_lerp_(averaged, current, 1.0 - decay)

    def save(self, path: Path, **extra: Any) -> None:
        """Write a checkpoint atomically; `extra` (plain values) travels with it."""
        state = {
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "options": asdict(self.options),
            **extra,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint written by `save`.

        Raises:
            SettingsError: the checkpoint is of another network.
        """
        state = load_checkpoint(path)
        try:
            self.network.load_state_dict(state["network"])
            self.averaged.load_state_dict(state["averaged"])
        except RuntimeError as error:
            raise SettingsError(f"{path}: checkpoint of another network; choose another folder or preset") from error
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content: tensors and plain values only, nothing in it can execute.

    Raises:
        SettingsError: there is no such file, or it is not a checkpoint of this program.
    """
    if not path.is_file():
        raise SettingsError(f"{path}: no such checkpoint; train first")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or "averaged" not in state:
        raise SettingsError(f"{path}: not a checkpoint written by `python -m train`")
    return state


def ahead(
    make: Callable[[int], NDArray[Any]], first: int, last: int, depth: int = 4
) -> Iterator[tuple[int, torch.Tensor]]:
    """`(step, make(step))` for first <= step < last, made by a worker thread up to `depth` steps ahead."""
    with ThreadPoolExecutor(1) as worker:
        pending = [worker.submit(make, step) for step in range(first, min(first + depth, last))]
        for step in range(first, last):
            batch = pending.pop(0).result()
            if step + depth < last:
                pending.append(worker.submit(make, step + depth))
            yield step, torch.from_numpy(batch)
