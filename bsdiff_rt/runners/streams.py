"""CUDA work on another stream, in order with the caller's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def in_order(stream: torch.cuda.Stream, device: torch.device) -> Iterator[None]:
    """Order the work that this block gives to `stream` with the current stream of `device`.

    It starts after the work that the current stream has now, and ends before the work that comes next. The host does
    not wait. If `stream` is the current stream, nothing happens.
    """
    current = torch.cuda.current_stream(device)
    if stream == current:
        yield
        return
    stream.wait_stream(current)
    yield
    current.wait_stream(stream)
