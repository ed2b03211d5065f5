"""Remove the bones from chest X-rays with a conditional diffusion model. Not for diagnostic use.

import bsdiff_rt

with bsdiff_rt.open_model("demo") as model:
    result = model.suppress(cxr)
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bsdiff_rt.model import Model, Result, open_model

__version__ = "0.1.0"
__all__ = ["Model", "Result", "__version__", "open_model"]

# ONNX Runtime's packages from 1.29 on send Microsoft what they run, and where, with an identifier kept in the user's
# cache (its docs/Privacy.md). Nothing leaves a hospital by default. A user who sets the variable decides.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# Importing openvino sends Google Analytics an event, with an identifier kept in the user's home folder. If its package
# for that cannot be imported, openvino takes a stand-in that sends nothing.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None is documented to block an import


def __getattr__(name: str) -> object:
    """Load the public API when it is first used: it imports torch, which --help and --version need not wait for."""
    if name in ("Model", "Result", "open_model"):
        from bsdiff_rt import model

        return getattr(model, name)
    raise AttributeError(f"module 'bsdiff_rt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
