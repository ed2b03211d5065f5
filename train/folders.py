"""Folders that a command writes: new or empty ones, or those of an earlier call that it continues."""

from __future__ import annotations

import json
from pathlib import Path

from bsdiff_rt import __version__
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.files import write_atomically
from train.checkpoint import load_checkpoint

RUN_FILE = "run.json"  # marks the folder of a training run


def require_empty(folder: Path) -> None:
    """Check that a folder is new or empty, so that no file of the user is mixed with new ones or replaced.

    Raises:
        SettingsError: it is a file, or a folder that is not empty.
    """
    if not _is_empty(folder):
        raise SettingsError(f"{folder}: exists and is not empty. Choose a new or an empty folder.")


def claim_run_folder(folder: Path) -> None:
    """Make the folder of a training run and mark it as such, or check that it is the folder of an earlier one.

    The mark is a file run.json. A checkpoint of this program proves the same.

    Raises:
        SettingsError: the folder is not empty and nothing in it shows that a training run wrote it.
    """
    if _is_empty(folder):
        folder.mkdir(parents=True, exist_ok=True)
        mark = {"kind": "bsdiff-rt training run", "bsdiff_rt": __version__}
        write_atomically(folder / RUN_FILE, (json.dumps(mark) + "\n").encode())
    elif folder.is_file() or not ((folder / RUN_FILE).is_file() or _holds_checkpoint(folder)):
        raise SettingsError(f"{folder}: exists and is no folder of a training run. Choose a new or an empty folder.")


def _is_empty(folder: Path) -> bool:
    return not folder.is_file() and not (folder.is_dir() and any(folder.iterdir()))


def _holds_checkpoint(folder: Path) -> bool:
    for path in sorted(folder.glob("*.pt")):
        try:
            load_checkpoint(path)
        except SettingsError:
            continue
        return True
    return False
