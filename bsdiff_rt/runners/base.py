"""The contract every backend keeps: load on construction, fill buffers it is given, release on close."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import ClassVar, Self

import torch

from bsdiff_rt.config import Precision
from bsdiff_rt.errors import EngineError

# Told what a long task is doing: the phase in words, and the share done in [0, 1], None where it is not known.
Progress = Callable[[str, float | None], None]


class Runner(ABC):
    """Both networks of one bundle, ready to run on one device; a context manager.

    A runner is loaded when it is constructed and holds what it needs until `close`. Its two methods fill buffers their
    caller owns, on the caller's current stream, and return before the device has finished: they neither synchronise nor
    allocate what they return, so a CUDA graph can record them (after warm-up). Outside, everything is float32;
    `precision` is what the weights and activations use inside. One runner serves one thread at a time.

    Attributes:
        name: the runner's name on the command line.
        device: where its buffers live; a CUDA device always with its index.
        precision: of weights and activations inside.
        batch_range: smallest and largest batch, largest None for no limit; equal for a static engine.
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
        """Stage 1: one denoiser call, its prediction (eps, v or x0: `Schedule.objective`) written into `out`.

        Args:
            x_t: [B, 1, H, W] float32, the noisy soft tissue at timestep t; unbounded.
            cxr: [B, 1, H, W] float32, in [-1, 1].
            t: [B] float32, whole numbers from 0 to T - 1. Float, because the first thing a denoiser does with them is
                multiply by frequencies, and graph formats and engines take float inputs without a conversion.
            out: [B, 1, H, W] float32, overwritten; none of the inputs.

        Raises:
            EngineError: a batch outside `batch_range`, another image size, dtype, device or memory layout (`check`).
            RuntimeError: the backend failed on this batch: out of memory, say.
        """

    @abstractmethod
    def enhance(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Stage 2: the sharpened soft tissue, written into `out`.

        Args:
            x: [B, 1, H, W] float32, in [-1, 1]: what the sampler returned.
            out: [B, 1, H, W] float32, overwritten; nominally in [-1, 1] but not clamped; not `x`.

        Raises:
            EngineError: as for `denoise`.
        """

    def close(self) -> None:  # noqa: B027 - most runners hold nothing that garbage collection does not release
        """Release what the runner holds; it cannot be used afterwards. May be called twice."""

    def check(self, *images: torch.Tensor, t: torch.Tensor | None = None) -> None:
        """Refuse buffers this runner cannot use; looks at metadata only, so it costs microseconds and no sync.

        Args:
            images: all the [B, 1, H, W] buffers of one call.
            t: its timesteps, [B], if it has any.

        Raises:
            EngineError: naming what is wrong, the value and what would be right.
        """
        batch = images[0].shape[0]
        smallest, largest = self.batch_range
        if batch < smallest or (largest is not None and batch > largest):
            accepted = f"{smallest} or more" if largest is None else f"{smallest} to {largest}"
            raise EngineError(
                f"batch of {batch} given to the {self.name} runner, which takes {accepted}; "
                f"change the batch size or build an engine for it"
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
