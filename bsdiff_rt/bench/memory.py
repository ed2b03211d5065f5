"""Memory that loading or running something takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Memory:
    """Memory taken, in bytes.

    Attributes:
        most: the largest amount at any moment, temporary copies included.
        held: the amount still held at the end.
    """

    most: int
    held: int


def start_memory_watch(device: torch.device) -> int | None:
    """Return the memory in use now, in bytes, and watch it from here on. None if it cannot be measured.

    On CUDA it is the memory of the whole device, because engines allocate without torch. On Linux it is the resident
    memory of this process. Other systems are not supported.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    try:
        _CLEAR_REFS.write_text("5")  # proc(5): resets the high-water mark VmHWM
    except OSError:  # not Linux, or not allowed
        return None
    return _read_status_bytes("VmRSS")


def measure_memory(device: torch.device, start: int | None) -> Memory | None:
    """Return the memory taken since `start_memory_watch` returned `start`. None if `start` is None.

    On CUDA, memory that torch keeps in reserve counts as held, so `most` and `held` are equal.
    """
    if start is None:
        return None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        taken = max(0, total - free - start)
        return Memory(taken, taken)
    return Memory(*(max(0, _read_status_bytes(field) - start) for field in ("VmHWM", "VmRSS")))


def _read_status_bytes(field: str) -> int:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
