"""What the training loops share: options, learning rate, averaged weights, several processes, batches made ahead.

accelerate chooses the device and, with `accelerate launch`, spreads a run over several GPUs. Mixed precision is an
explicit autocast in each loop, and accumulation is a plain sum of gradients, so that a continued run gives the same
numbers.
"""

from __future__ import annotations

import copy
import gc
import importlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from numpy.typing import NDArray
from torch import distributed, nn

from bsdiff_rt.errors import SettingsError
from bsdiff_rt.runners.devices import computes_bf16, resolve_device
from train.checkpoint import list_tensors, load_checkpoint, write_checkpoint
from train.group_norm import use_fast_group_norm

USUAL_DECAY = 0.97  # of the running mean of the gradient's norm, per step
USUAL_LIMIT = 3.0  # a norm counts in that mean as at most so many times the mean
CROP_MULTIPLE_PX = 16  # four levels of halving, as in the presets
# Processes wait while one of them validates or draws phantoms; NCCL's default of ten minutes would end the run.
LONGEST_WAIT = timedelta(days=1)
DIVERGED = "Lower --learning-rate or give --no-bf16, and run again: training continues from the last checkpoint."


@dataclass(frozen=True)
class TrainOptions:
    """One training run. Saved inside every checkpoint.

    Attributes:
        steps: optimiser steps in all.
        learning_rate: peak of a linear warm-up over `warmup` steps and a cosine decay to a hundredth.
        weight_decay: AdamW's.
        ema: decay of the averaged weights; the average starts young and reaches this decay after 9 / (1 - ema) steps.
        images: batch size in whole images, per process; a batch of crops holds as many pixels.
        crops: crop sides as shares of the image's, one after another over equal parts of the run; several in one part
            are alternated. Crops show more patients per step; whole images, last, what the network will be given.
        seed: of everything random.
        bf16: run the network under bf16 autocast.
        save_every: steps between checkpoints and sample grids.
        drops: shares of the run, in [0, 1], after each of which the learning rate is a tenth; given any, they replace
            the cosine decay.
        clip: largest norm of the gradient; 0 leaves it as it is.
        clip_to_usual: largest norm of the gradient, as a multiple of its running mean; 0 leaves it as it is. A batch
            whose few samples have an unusual error does not throw the weights about.
        accumulate: pieces a batch is computed in, one after another: less memory, the same gradient but for the
            adversarial term, whose batch norm sees the pieces.
        patience: checkpoints without a better figure after which training stops and the best one is kept; 0 never.
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
    drops: tuple[float, ...] = ()
    clip: float = 1.0
    clip_to_usual: float = 0.0
    accumulate: int = 1
    patience: int = 0

    def crop(self, step: int, size: int) -> tuple[int, int]:
        """Return the number of crops and their side in px for `step`, from images of side `size`."""
        part = self.crops[min(step * len(self.crops) // self.steps, len(self.crops) - 1)]
        if size % CROP_MULTIPLE_PX:
            raise SettingsError(f"--size {size}: give a multiple of {CROP_MULTIPLE_PX} px")
        side = max(CROP_MULTIPLE_PX, round(part[step % len(part)] * size / CROP_MULTIPLE_PX) * CROP_MULTIPLE_PX)
        return max(1, round(self.images * size**2 / side**2)), side

    def rate(self, step: int) -> float:
        """Return the learning rate of `step`."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.drops:
            return self.learning_rate * 0.1 ** sum(step >= share * self.steps for share in self.drops)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0))))


def fix_crop(side: int, size: int) -> tuple[tuple[float, ...], ...]:
    """Return the `TrainOptions.crops` that keep one side throughout the run.

    Args:
        side: of the crops, px.
        size: side of the images, px.

    Raises:
        SettingsError: the crop is larger than the image, or no multiple of 16 px.
    """
    if side > size:
        raise SettingsError(f"--crop {side} is more than --size {size}. Choose at most that.")
    if side % CROP_MULTIPLE_PX:
        raise SettingsError(f"--crop {side}: give a multiple of {CROP_MULTIPLE_PX} px")
    return ((side / size,),)


def make_accelerator() -> Accelerator:
    """Return the accelerator of this process. The first one decides how long processes wait for each other.

    Raises:
        SettingsError: several processes were launched and none of them has a GPU of its own.
    """
    # Spreading a model imports this. Imported after the process group, it would keep it alive (`leave_processes`).
    importlib.import_module("torch._dynamo")
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > accelerator.num_processes:
        raise SettingsError(
            f"{launched} processes were launched, but there is no GPU to spread the training over. Run "
            "`python -m train` without a launcher, or set ACCELERATE_USE_CPU=true to train on the CPU in several "
            "processes."
        )
    return accelerator


def leave_processes(*_: object, **__: object) -> None:
    """End the connection to other processes after a run. With one process, do nothing.

    gloo's threads sometimes abort the interpreter at its end, and a finished run would count as failed. They end with
    the last reference to the process group, which a reference cycle may hold.
    """
    if distributed.is_initialized():
        gc.collect()
        distributed.destroy_process_group()


class Trainee:
    """A network in training: weights, averaged weights, optimiser, number of steps done; saved and restored as one.

    `network` holds the weights, `model` is what a loop calls: the same, or its wrapper that averages gradients over
    the processes. Both, and `averaged`, are on `accelerator.device`. `saved_step` is the last checkpoint's.
    `channels_last` asks for that memory format on a CPU, where the denoiser's steps are a fifth faster in it.
    """

    def __init__(self, network: nn.Module, options: TrainOptions, *, channels_last: bool = False) -> None:
        self.accelerator = make_accelerator()
        device = self.accelerator.device
        # Tensor cores want channels last; on a CPU the gradients of ResNet-BS are slower in it (docs/experiments.md).
        layout = torch.channels_last if channels_last or device.type == "cuda" else torch.contiguous_format
        self.network = network.to(device).to(memory_format=layout)  # type: ignore[call-overload]  # torch has it
        self.averaged = copy.deepcopy(network).eval().requires_grad_(False)
        if device.type == "cpu":
            use_fast_group_norm(self.network)
        self.options = options
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
        )
        self.model: nn.Module = self.accelerator.prepare_model(self.network)
        self.usual_norm = 0.0  # running mean of the gradient's norm
        self.step = 0
        self.saved_step: int | None = None

    def sample_index(self, step: int) -> int:
        """Return the seed of this process's batch and noise of `step`. With one process it is `step` itself."""
        return step * self.accelerator.num_processes + self.accelerator.process_index

    def update(self, losses: Iterable[torch.Tensor]) -> float:
        """Make one optimiser step down the gradient of the sum of `losses`, then update the averaged weights.

        Args:
            losses: scalars. Each one is requested after the graph of the previous one is freed, so a generator saves
                memory.

        Returns:
            The sum.

        Raises:
            SettingsError: the sum or its gradient is not finite. The weights are unchanged.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for loss in losses:
            self.accelerator.backward(loss)
            total += float(loss.detach())
        if not math.isfinite(total):
            raise SettingsError(f"the loss of step {self.step} is {total}. {DIVERGED}")
        limits = [limit for limit in (self.options.clip, self.options.clip_to_usual * self.usual_norm) if limit]
        norm = float(nn.utils.clip_grad_norm_(self.network.parameters(), min(limits, default=math.inf)))
        if not math.isfinite(norm):
            raise SettingsError(f"the norm of the gradient of step {self.step} is {norm}. {DIVERGED}")
        share = 1 - USUAL_DECAY if self.usual_norm else 1.0
        self.usual_norm += share * (min(norm, USUAL_LIMIT * self.usual_norm or norm) - self.usual_norm)
        self.optimizer.step()
        self.step += 1
        decay = min(self.options.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            averaged: list[torch.Tensor] = list(self.averaged.parameters())
            current: list[torch.Tensor] = list(self.network.parameters())
            torch._foreach_lerp_(averaged, current, 1.0 - decay)
            for kept, buffer in zip(self.averaged.buffers(), self.network.buffers(), strict=True):
                kept.copy_(buffer)  # statistics of batch norms are averages already
        return total

    def save(self, path: Path, **extra: Any) -> None:
        """Write a checkpoint, whole or not at all.

        Args:
            path: the file to write.
            **extra: tensors and plain values to store with it.

        Raises:
            SettingsError: a value is not finite, or the file cannot be written. A file that was at `path` is unchanged.
        """
        state = {
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "usual_norm": self.usual_norm,
            "options": asdict(self.options),
            **extra,
        }
        broken = [name for name, part in state.items() if not all(bool(t.isfinite().all()) for t in list_tensors(part))]
        if broken:
            raise SettingsError(f"not finite after step {self.step}, and not saved: {', '.join(broken)}. {DIVERGED}")
        write_checkpoint(state, path, self.saved_step)
        self.saved_step = self.step

    def restore(self, path: Path) -> dict[str, Any]:
        """Continue from a checkpoint written by `save`, with this run's options.

        Returns:
            The rest of the checkpoint, without weights and optimiser.

        Raises:
            SettingsError: the checkpoint is of another network, or a mean of several.
        """
        state = load_checkpoint(path)
        if "network" not in state:  # `average` keeps no optimiser
            raise SettingsError(f"{path}: a mean of runs cannot be continued. Export it, then give it as --start.")
        try:
            self.network.load_state_dict(state["network"])
            self.averaged.load_state_dict(state["averaged"])
        except RuntimeError as error:
            raise SettingsError(f"{path}: checkpoint of another network. Choose another folder or preset.") from error
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.options.weight_decay  # the rate is set by each step
        self.step = self.saved_step = state["step"]
        self.usual_norm = state.get("usual_norm", 0.0)
        return {name: part for name, part in state.items() if name not in ("network", "averaged", "optimizer")}


def choose_bf16(asked: bool | None) -> bool:
    """Return whether to train in bf16: as asked for, else if the device computes it. Emulated, it is slower."""
    if asked is not None:
        return asked
    return computes_bf16(resolve_device("auto"))


def split_batch(count: int, *batches: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Split batches alike into `count` parts along their first axis, or fewer if they hold fewer samples."""
    return zip(*(batch.tensor_split(min(count, len(batch))) for batch in batches), strict=True)


def prefetch(
    make: Callable[[int], NDArray[Any]], first: int, last: int, depth: int = 4
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield `(step, make(step))` for first <= step < last. A worker thread makes up to `depth` batches ahead."""
    with ThreadPoolExecutor(1) as worker:
        pending = [worker.submit(make, step) for step in range(first, min(first + depth, last))]
        for step in range(first, last):
            batch = pending.pop(0).result()
            if step + depth < last:
                pending.append(worker.submit(make, step + depth))
            yield step, torch.from_numpy(batch)
