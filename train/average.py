"""Average the weights of several trainings of one network. Runs that began alike often gain from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bsdiff_rt.errors import SettingsError
from train.checkpoint import load_checkpoint, write_checkpoint

SAME = ("preset", "schedule", "size", "clahe")  # what the checkpoints must agree on


def average_checkpoints(parts: Sequence[tuple[Path, float]], output: Path) -> None:
    """Write a checkpoint whose weights are the weighted mean of the averaged (EMA) weights of others.

    The header is that of the first one, with the X-rays that any of them was trained on. Training cannot be resumed
    from it: it holds no optimiser.

    Args:
        parts: stage 1's checkpoints and their weights, which are divided by their sum.
        output: file to write.

    Raises:
        SettingsError: a checkpoint cannot be read or is of another network, a weight is not positive, or `output`
            exists.
    """
    if output.exists():
        raise SettingsError(f"{output}: exists. Choose another folder.")
    if not parts or min(weight for _, weight in parts) <= 0:
        raise SettingsError("give checkpoints with weights above 0")
    total = sum(weight for _, weight in parts)
    first: dict[str, Any] = {}
    mean: dict[str, Any] = {}
    trained_on: set[str] = set()
    for path, weight in parts:
        state = load_checkpoint(path)
        first = first or state
        _check_same(path, state, parts[0][0], first)
        trained_on |= set(state.get("trained_on") or ())
        for name, tensor in state["averaged"].items():
            mean[name] = mean.get(name, 0.0) + tensor.double() * (weight / total)
    averaged = {name: tensor.to(first["averaged"][name].dtype) for name, tensor in mean.items()}
    kept = {name: part for name, part in first.items() if name not in ("network", "averaged", "optimizer")}
    kept |= {"trained_on": sorted(trained_on), "averaged": averaged}
    output.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(kept, output, None)


def _check_same(path: Path, state: dict[str, Any], first_path: Path, first: dict[str, Any]) -> None:
    """Refuse checkpoints that are not of one network and task."""
    for name in SAME:
        if state.get(name) != first.get(name):
            raise SettingsError(f"{path}: {name} is {state.get(name)}, in {first_path} it is {first.get(name)}")
    shapes, asked = ({name: t.shape for name, t in one["averaged"].items()} for one in (state, first))
    if shapes != asked:
        raise SettingsError(f"{path}: another network than {first_path}")
