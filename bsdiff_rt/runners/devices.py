"""The devices of this machine: names, processor features, number of threads."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from bsdiff_rt.errors import SettingsError

# Compute capabilities of GeForce RTX 20 to 50 and of RTX PRO cards.
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
FULL_BATCH = 8  # about so many images fill a GPU's arithmetic

_threads: int | None = None  # what `set_threads` was called with


def resolve_device(name: str) -> torch.device:
    """Return the device of a name: `auto`, `cpu`, `cuda` or `cuda:N`. `auto` is the first GPU, or the CPU.

    Raises:
        SettingsError: the name is not a device name, or this machine lacks the device.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(f"{name!r} is not a device. Use auto, cpu, cuda or cuda:N.", setting="device") from error
    if device.type not in ("cpu", "cuda") or name.startswith("cpu:"):
        raise SettingsError(f"{name!r} is not supported. Use auto, cpu, cuda or cuda:N.", setting="device")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise SettingsError(
                f"{name} does not exist: this machine has {count} CUDA devices. Use cpu or another number.",
                setting="device",
            )
    return device


def make_current(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` the current one in this block. Code without a device index uses the current one."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def describe_capability(device: torch.device) -> str:
    """Return the compute capability of a CUDA device, such as "8.9"."""
    return ".".join(map(str, torch.cuda.get_device_capability(device)))


def computes_bf16(device: torch.device) -> bool:
    """Return whether a device has bf16 instructions. A CPU without them emulates bf16, slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def set_threads(count: int) -> None:
    """Let the runners of this process use `count` processor threads. Call it before a runner is loaded.

    Args:
        count: number of threads, at least 1.

    Raises:
        SettingsError: the count is below 1.
    """
    global _threads
    if count < 1:
        raise SettingsError(f"{count} is too few. Use 1 or more.", setting="threads")
    _threads = count
    torch.set_num_threads(count)


def count_threads() -> int:
    """Return how many threads a runner on the CPU uses: what `set_threads` set, or all processors of this process.

    macOS and Windows do not report the processors of one process. There it is all processors of the machine.
    """
    if _threads is not None:
        return _threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_processor() -> tuple[str, str]:
    """Return the processor's name, and eight hexadecimal digits that identify its features.

    Compiled code may use any of the features. The name alone is not enough: virtual machines show the same name for
    different processors.
    """
    name, features = _find_processor_field("model name"), _find_processor_field("flags|Features")
    digest = hashlib.sha256(" ".join(sorted(features.split())).encode()).hexdigest()[:8] if features else "unknown"
    return name or platform.processor() or platform.machine(), digest


def read_processor_clock() -> float | None:
    """Return the first processor's clock now, in MHz; None if the system does not report it."""
    clock = _find_processor_field("cpu MHz")
    return float(clock) if clock else None


def _find_processor_field(name: str) -> str | None:
    """Return the first value of a field that Linux reports for its processors.

    Args:
        name: of the field, as a regular expression.

    Returns:
        The value; None if there is no such field, or the system is not Linux.
    """
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    found = re.search(rf"^(?:{name})\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else None
