"""Read what `python -m train` wrote; the two workshops share this file format, not code."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from bsdiff_rt.errors import SettingsError


def averaged_weights(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A checkpoint's header (preset, schedule, size, step, start, stage 1's digest) and averaged (EMA) weights.

    Raises:
        SettingsError: no such file, or not a checkpoint. Nothing in it is executed.
    """
    if not path.is_file():
        raise SettingsError(f"{path}: no such checkpoint; `python -m train` writes it")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        header = {key: state[key] for key in ("preset", "step", "size")}
        header |= {key: state.get(key) for key in ("schedule", "stage_one", "start")}
        return header, state["averaged"]
    except Exception as error:  # a pickle of anything else raises anything
        raise SettingsError(f"{path}: not a checkpoint of `python -m train` ({type(error).__name__})") from error


def weights_digest(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the averaged weights of stage 1, by which stage 2's checkpoint names what it learned from."""
    digest = hashlib.sha256()
    for tensor in state.values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
