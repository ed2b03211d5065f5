"""Folders that a command writes."""

from __future__ import annotations

from pathlib import Path

from bsdiff_rt.errors import SettingsError


def require_empty(folder: Path) -> None:
    """Check that a folder is new or empty, so that no file of the user is mixed with new ones or replaced.

    Raises:
        SettingsError: it is a file, or a folder that is not empty.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise SettingsError(f"{folder}: exists and is not empty. Choose a new or an empty folder.")
