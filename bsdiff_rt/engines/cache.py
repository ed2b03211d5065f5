"""Where engines lie: the cache folder, the engines in it, and their names."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import platformdirs
import torch

from bsdiff_rt.bundle import Bundle
from bsdiff_rt.config import EngineOptions
from bsdiff_rt.engines.manifest import MANIFEST, identify


def locate_cache() -> Path:
    """Return the folder of built engines, in the user's cache directory. `build_engine` creates it, with mode 0700."""
    return platformdirs.user_cache_path("bsdiff-rt", appauthor=False) / "engines"


def list_engines() -> list[Path]:
    """Return the folders of all engines in the cache, newest first, whether they can be used here or not."""
    found: dict[Path, float] = {}
    for path in locate_cache().glob(f"[!.]*/{MANIFEST}"):
        with suppress(OSError):  # it has just been removed, or replaced by a build
            found[path.parent] = path.stat().st_mtime
    return sorted(found, key=found.__getitem__, reverse=True)


def name_engine(bundle: Bundle, options: EngineOptions, device: torch.device) -> str:
    """Return an engine's folder name in the cache. A new engine replaces an old one of the same request."""
    low, high = options.batch
    parts = (
        bundle.manifest.name,
        bundle.sha256[:8],
        options.runner,
        options.precision,
        f"b{low}" if low == high else f"b{low}-{high}",
        *(["tuned"] if options.max_autotune else []),
        f"for_{'_'.join(options.capabilities)}" if options.capabilities else identify(device)["device"],
    )
    return "-".join(re.sub(r"[^A-Za-z0-9.-]+", "_", part).strip("_.") for part in parts)
