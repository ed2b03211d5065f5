"""How long calls take, one or several beside each other: for `bench`, and for an engine that was just built."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from bsdiff_rt.errors import forget_frames

K = TypeVar("K")


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call with everything it orders on the device; nothing older is counted."""
    synchronise(device)
    started = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - started


def synchronise(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    calls: Mapping[K, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warm_up: int = 1,
) -> tuple[dict[K, list[float]], dict[K, Exception]]:
    """Seconds of each call, taken in turn (A B C A B C ...), after `warm_up` rounds that are not counted.

    A call that raises is left out from then on, and its error is returned in its place.
    """
    times: dict[K, list[float]] = {key: [] for key in calls}
    failed: dict[K, Exception] = {}
    for number in range(-warm_up, rounds):
        for key, call in calls.items():
            if key in failed:
                continue
            try:
                seconds = seconds_of(call, device)
            except Exception as error:  # backends raise what they like; the others are still measured
                forget_frames(error)
                failed[key] = error
                continue
            if number >= 0:
                times[key].append(seconds)
    return {key: values for key, values in times.items() if key not in failed}, failed


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the ratios of values measured in the same round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
