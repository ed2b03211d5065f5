"""Checkpoint files: written whole or not at all, and read without executing anything in them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bsdiff_rt.errors import SettingsError, one_line


def unjudged_path(folder: Path, name: str) -> Path:
    """Return the path of a stage's checkpoint that is not validated yet."""
    return folder / f"{name}_unjudged.pt"


def last_checkpoint(folder: Path, name: str) -> Path | None:
    """Return the file that a stage continues from, or None.

    This is the checkpoint that is not validated yet, if there is one, else NAME.pt.
    """
    return next((path for path in (unjudged_path(folder, name), folder / f"{name}.pt") if path.exists()), None)


def list_tensors(part: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of nested dictionaries."""
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, dict):
        for value in part.values():
            yield from list_tensors(value)


def write_checkpoint(state: dict[str, Any], path: Path, last_step: int | None) -> None:
    """Write a checkpoint. It appears whole or not at all.

    Args:
        state: content of the checkpoint.
        path: the file to write.
        last_step: step of the last checkpoint, for the message; None if there is none.

    Raises:
        SettingsError: it cannot be written. A file that was at `path` is unchanged.
    """
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # the name must not reach the disk before the content
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch's writer hides the first behind the second
        partial.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__ or error
        needed = sum(tensor.nbytes for tensor in list_tensors(state)) / 1e6
        free = shutil.disk_usage(path.parent).free / 1e6
        last = "there is no checkpoint yet" if last_step is None else f"the last checkpoint is of step {last_step}"
        raise SettingsError(
            f"{path}: cannot be written ({one_line(cause)}). It takes {needed:.1f} MB, "
            f"{free:.1f} MB are free. Make room and run again: {last}."
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint's content: tensors and plain values. Nothing in the file is executed.

    Raises:
        SettingsError: there is no such file, or it is not a checkpoint of this program.
    """
    if not path.is_file():
        raise SettingsError(f"{path}: no such checkpoint. Train first.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make it raise anything
        raise SettingsError(f"{path}: damaged, or no checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict) or "averaged" not in state:
        raise SettingsError(f"{path}: not a checkpoint written by `python -m train`")
    return state
