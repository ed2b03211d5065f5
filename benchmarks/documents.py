"""JSON files of benchmarks: what was judged, where, when."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from bsdiff_rt import __version__
from bsdiff_rt.bench.conditions import name_device
from bsdiff_rt.bundle import Bundle
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.files import write_atomically


def describe_run(bundle: Bundle, device: torch.device) -> dict[str, Any]:
    """Return the head of a document: version, date, bundle, machine, device."""
    return {
        "bsdiff_rt": __version__,
        "date": time.strftime("%Y-%m-%d"),
        "bundle": bundle.identity,
        "torch": torch.__version__,
        "machine": name_device(device),
        "device": str(device),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, completely or not at all.

    Args:
        path: the file; its folder exists.
        content: finite numbers, text, lists and dictionaries.

    Raises:
        SettingsError: the file cannot be written.
    """
    try:
        write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise SettingsError(f"{path} cannot be written ({error.strerror})", setting="json") from error
