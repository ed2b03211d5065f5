"""The machine and the conditions under which a benchmark ran."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from bsdiff_rt.bench.busy import read_load
from bsdiff_rt.bench.networks import CLONE
from bsdiff_rt.folder.report import describe_environment, now
from bsdiff_rt.runners.devices import describe_processor, read_processor_clock


def name_device(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{describe_processor()[0]}, {torch.get_num_threads()} threads"


def describe_conditions(device: torch.device) -> dict[str, Any]:
    """Return versions, clocks, load, precision switches and commit, as plain values for JSON."""
    load = read_load()
    found = describe_environment(str(device)) | {
        "started": now(),
        "clocks": read_clocks(device),
        "load_average": None if load is None else round(load, 2),
        "threads": torch.get_num_threads(),
        "fp32_matmul": torch.get_float32_matmul_precision(),
        "git": read_commit(CLONE),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "cuda": torch.version.cuda,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        }
    return found


def read_clocks(device: torch.device) -> str | None:
    """Return the clocks that the system reports now; None if it reports none."""
    if device.type != "cuda":
        mhz = read_processor_clock()
        return f"{mhz:.0f} MHz" if mhz else None
    fields = "clocks.sm,clocks.mem,power.draw,power.limit,driver_version"
    return run_command("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={device.index or 0}")


def read_commit(folder: Path) -> str | None:
    """Return the commit of a clone, with -dirty if files differ from it; None if `folder` is no clone."""
    if not (folder / ".git").exists():
        return None
    return run_command("git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def run_command(*command: str) -> str | None:
    """Return the output of a command; None if it is not installed, fails, or prints nothing."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
