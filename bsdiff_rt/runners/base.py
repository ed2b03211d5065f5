"""The contract of every runner: load on construction, fill the caller's buffers, release on close."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import ClassVar, Self

import torch

from bsdiff_rt.config import Precision
from bsdiff_rt.errors import EngineError

# Called with each phase of a long task: its name, and the share done in [0, 1], or None where that is unknown.
Progress = Callable[[str, float | None], None]


class Runner(ABC):
    """Both networks of one bundle, ready to run on one device. A context manager.

    A runner is loaded when it is constructed, and holds what it needs until `close`. Its two methods fill buffers of
    the caller, on the caller's current stream. They return before the device has finished. They neither synchronise
    nor allocate their results, so a CUDA graph can record them after warm-up. All buffers are float32; `precision` is
    used inside. One thread at a time may use a runner.

    Attributes:
        name: the runner's name in settings and reports.
        device: where its buffers lie. A CUDA device always has its index.
        precision: of weights and activations inside.
        batch_range: smallest and largest batch. The largest is None for no limit.
        image_size: side of the square images, in px.
    """

    name: ClassVar[str]

    def __init__(
        self, *, device: torch.device, precision: Precision, batch_range: tuple[int, int | None], image_size: int
    ) -> None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.precision = precision
        self.batch_range = batch_range
        self.image_size = image_size

    @abstractmethod
    def denoise(self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
        """Run stage 1: write one prediction of the denoiser (eps, v or x0: `Schedule.objective`) into `out`.

        Args:
            x_t: [B, 1, H, W] float32, the noisy soft tissue at timestep t, unbounded.
            cxr: [B, 1, H, W] float32, in [-1, 1].
            t: [B] float32, whole numbers from 0 to T - 1. They are float because the denoiser first multiplies them by
                frequencies, and because graphs and engines then need no conversion.
            out: [B, 1, H, W] float32, overwritten. Must not be one of the inputs.

        Raises:
            EngineError: a buffer has another batch, image size, dtype, device or memory layout (`check`).
            RuntimeError: the backend failed on this batch, for example for lack of memory.
        """

    @abstractmethod
    def enhance(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Run stage 2: write the sharpened soft tissue into `out`.

        Args:
            x: [B, 1, H, W] float32, in [-1, 1]: the sampler's result.
            out: [B, 1, H, W] float32, overwritten. About [-1, 1], not clamped. Must not be `x`.

        Raises:
            EngineError: a buffer has another batch, image size, dtype, device or memory layout (`check`).
            RuntimeError: the backend failed on this batch, for example for lack of memory.
        """

    def make_deep(self, batch: int) -> torch.Tensor:
        """Return memory for the deep features of a batch, for the two methods below.

        Deep features are what the denoiser computes below its first level. They change little from one step to the
        next (Ma et al. 2024, DeepCache). Most runners have a graph of the whole denoiser, and cannot return them.

        Args:
            batch: number of images.

        Raises:
            EngineError: this runner cannot reuse deep features.
        """
        raise EngineError(f"runner {self.name} cannot reuse deep features. Use runner eager, or compute every step.")

    def denoise_and_keep(
        self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor, deep: torch.Tensor
    ) -> None:
        """Do what `denoise` does, and write the deep features into `deep`, the memory of `make_deep`."""
        raise NotImplementedError

    def denoise_top(
        self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor, deep: torch.Tensor
    ) -> None:
        """Run the denoiser's first level alone, with the deep features of an earlier step in `deep`."""
        raise NotImplementedError

    def close(self) -> None:  # noqa: B027 - most runners hold nothing that garbage collection does not release
        """Release what the runner holds. It cannot be used afterwards. A second call does nothing."""

    def check(self, *images: torch.Tensor, t: torch.Tensor | None = None) -> None:
        """Refuse buffers that this runner cannot use. Only metadata is checked, so the device is not synchronised.

        Args:
            images: all [B, 1, H, W] buffers of one call.
            t: its timesteps, [B], if it has any.

        Raises:
            EngineError: names what is wrong, its value and what would be right.
        """
        batch = images[0].shape[0]
        smallest, largest = self.batch_range
        if batch < smallest or (largest is not None and batch > largest):
            accepted = f"{smallest} or more" if largest is None else f"{smallest} to {largest}"
            raise EngineError(
                f"batch of {batch} given to the {self.name} runner, which takes {accepted}. "
                f"Change the batch size, or build an engine for it."
            )
        for image in images:
            self._check_buffer("buffer", image, (batch, 1, self.image_size, self.image_size))
        if t is not None:
            self._check_buffer("t", t, (batch,))

    def _check_buffer(self, what: str, buffer: torch.Tensor, shape: tuple[int, ...]) -> None:
        runner = f"given to the {self.name} runner"
        if tuple(buffer.shape) != shape:
            raise EngineError(f"{what} of shape {tuple(buffer.shape)} {runner}; give {shape}")
        if buffer.dtype != torch.float32:
            raise EngineError(f"{buffer.dtype} {what} {runner}; give torch.float32")
        if buffer.device != self.device:
            raise EngineError(f"{what} on {buffer.device} {runner} on {self.device}; move it")
        if not buffer.is_contiguous():
            raise EngineError(f"{what} with strides {buffer.stride()} {runner}; make it contiguous")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
