"""Wall-clock time of calls, alone or in turn. Used by `bench` and by `build-engine`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from bsdiff_rt.errors import forget_frames

K = TypeVar("K")


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, with all work it starts on the device. Work started earlier is not counted."""
    synchronise(device)
    started = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - started


def synchronise(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turn(
    calls: Mapping[K, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warm_up: int = 1,
) -> tuple[dict[K, list[float]], dict[K, Exception]]:
    """Time several calls in turn (A B C A B C ...).

    Args:
        calls: what to time, by key.
        rounds: how often each call is timed.
        device: the device that the calls use.
        warm_up: rounds before, which are not counted.

    Returns:
        Seconds of each call, one for each round; and the error of each call that raised. Such a call is not made again.
    """
    times: dict[K, list[float]] = {key: [] for key in calls}
    failed: dict[K, Exception] = {}
    for number in range(-warm_up, rounds):
        for key, call in calls.items():
            if key in failed:
                continue
            try:
                seconds = time_call(call, device)
            except Exception as error:  # backends raise what they like; the others are still measured
                forget_frames(error)
                failed[key] = error
                continue
            if number >= 0:
                times[key].append(seconds)
    return {key: values for key, values in times.items() if key not in failed}, failed


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median of the ratios of values that were measured in the same round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
