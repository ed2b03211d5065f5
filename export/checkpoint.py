"""Read what `python -m train` wrote; the two workshops share this file format, not code."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from bsdiff_rt.errors import SettingsError

# Besides preset, step and size: the diffusion, the digest of the stage 1 that stage 2 learned from, that of the bundle
# training started from, CLAHE clip limit of the data set, digests of the X-rays trained on.
HEADER = ("schedule", "stage_one", "start", "clahe", "trained_on")


def averaged_weights(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A checkpoint's header (preset, step, size; `HEADER`, None where it does not say) and averaged (EMA) weights.

    Raises:
        SettingsError: no such file, or not a checkpoint. Nothing in it is executed.
    """
    if not path.is_file():
        raise SettingsError(f"{path}: no such checkpoint; `python -m train` writes it")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        header = {key: state[key] for key in ("preset", "step", "size")} | {key: state.get(key) for key in HEADER}
        return header, state["averaged"]
    except Exception as error:  # a pickle of anything else raises anything
        raise SettingsError(f"{path}: not a checkpoint of `python -m train` ({type(error).__name__})") from error


def weights_digest(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the averaged weights of stage 1, by which stage 2's checkpoint names what it learned from."""
    digest = hashlib.sha256()
    for tensor in state.values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
