"""CUDA work on another stream than the caller's, in order with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def in_order(stream: torch.cuda.Stream, device: torch.device) -> Iterator[None]:
    """What `stream` is given inside comes after the current stream's work so far, and before what it is given next.

    Nothing waits on the host, and nothing happens at all where `stream` is the current stream of `device`.
    """
    current = torch.cuda.current_stream(device)
    if stream == current:
        yield
        return
    stream.wait_stream(current)
    yield
    current.wait_stream(stream)
