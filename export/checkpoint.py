"""Read the checkpoints that `python -m train` writes. Both packages know the file format; they share no code."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from bsdiff_rt.errors import SettingsError

# Keys of a header besides preset, step and size, None where a checkpoint lacks them: the diffusion, SHA-256 of the
# stage 1 that stage 2 was trained on, SHA-256 of the bundle that training started from, CLAHE clip limit of the data,
# digests of the X-rays trained on.
HEADER = ("schedule", "stage_one", "start", "clahe", "trained_on")


def read_averaged_weights(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return a checkpoint's header (preset, step, size, and `HEADER`) and its averaged (EMA) weights.

    Raises:
        SettingsError: no such file, or not a checkpoint. Nothing in it is executed.
    """
    if not path.is_file():
        raise SettingsError(f"{path}: no such checkpoint. Write it with `python -m train`.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        header = {key: state[key] for key in ("preset", "step", "size")} | {key: state.get(key) for key in HEADER}
        return header, state["averaged"]
    except Exception as error:  # a pickle of anything else raises anything
        raise SettingsError(f"{path}: not a checkpoint of `python -m train` ({type(error).__name__})") from error


def hash_weights(state: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of stage 1's averaged weights, as stage 2's checkpoint names the stage 1 it was trained on."""
    digest = hashlib.sha256()
    for tensor in state.values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
