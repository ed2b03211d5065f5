"""Signs that other programs used the machine while something was timed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

LARGEST_TAIL = 1.5  # p95 over median
LARGEST_RATE_CHANGE = 0.15


def read_load() -> float | None:
    """Return the load average of the last minute: processes that run or wait. None if the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def check_load(load: float | None) -> list[str]:
    """Return a sign if more processes wanted to run than the machine has cores.

    Args:
        load: of `read_load`, read before the measurement.
    """
    cores = os.cpu_count() or 1
    return [f"load average {load:.1f} on {cores} cores at the start"] if load is not None and load > cores else []


def check_rates(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Return a sign for each rate that changed by more than 15 % during the measurement.

    Args:
        before: FLOP/s by precision.
        after: the same, measured at the end. Only precisions in both are compared.
    """
    return [
        f"{name} matrix products ran at {after[name] / rate:.0%} of their first rate at the end"
        for name, rate in before.items()
        if name in after and abs(after[name] / rate - 1) > LARGEST_RATE_CHANGE
    ]


def check_tail(name: str, median: float, p95: float) -> list[str]:
    """Return a sign if the 95th percentile of a time exceeds 1.5 times its median.

    Args:
        name: what was timed.
        median: in any unit.
        p95: in the same unit.
    """
    return [f"{name}: p95 is {p95 / median:.1f} times the median"] if p95 > LARGEST_TAIL * median else []


def write_warning(signs: Sequence[str]) -> str:
    """Return the warning for the signs; there must be at least one."""
    return f"warning: the machine was busy ({'; '.join(signs)}). Repeat the measurement when it is idle."
