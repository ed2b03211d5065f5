"""A trace of each candidate's denoiser step, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bsdiff_rt.bench.candidates import Candidate
from bsdiff_rt.bench.plan import Plan
from bsdiff_rt.bench.trial import Trial
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.runners.timing import time_call

PROFILED_STEPS = 3


def check_profile(path: Path) -> None:
    """Check a path for a trace before anything is measured.

    Raises:
        SettingsError: the name does not end in .json, or the folder does not exist.
    """
    if path.suffix != ".json":
        raise SettingsError(f"{path}: name a .json file", setting="profile")
    if not path.absolute().parent.is_dir():
        raise SettingsError(f"{path}: there is no folder {path.parent}", setting="profile")


def write_profile(plan: Plan, candidates: Sequence[Candidate], path: Path) -> None:
    """Write one trace with three steps of every candidate at batch size 1, each under the candidate's name.

    Args:
        plan: the model and the device.
        candidates: a candidate that cannot take one image is left out.
        path: a .json file.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if plan.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    able = [candidate for candidate in candidates if candidate.runner.batch_range[0] <= 1]
    with ThreadPoolExecutor(1) as threads, torch.profiler.profile(activities=activities) as profiler:
        for candidate in able:
            with Trial(candidate, plan, 1, threads) as trial:
                time_call(trial.step, plan.device)  # warms up
                with torch.profiler.record_function(candidate.name):
                    for _ in range(PROFILED_STEPS):
                        time_call(trial.step, plan.device)
    profiler.export_chrome_trace(str(path))
