"""Engines for runner `openvino`: both networks as OpenVINO compiled them. They need no compiler, and seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bsdiff_rt.bundle import Bundle
from bsdiff_rt.config import EngineOptions
from bsdiff_rt.errors import EngineError, one_line
from bsdiff_rt.runners.base import Progress
from bsdiff_rt.runners.openvino import DENOISER, ENHANCER, choose_device, compile_bundle


def build(
    bundle: Bundle, options: EngineOptions, device: torch.device, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Compile both networks of `bundle` into `folder`.

    Args:
        bundle: an opened bundle.
        options: precision of the denoiser, and batch range.
        device: the CPU, where the buffers lie. OpenVINO computes on `choose_device`.
        folder: exists and is empty.
        progress: called with each phase.

    Returns:
        The options used, for the engine's manifest.

    Raises:
        EngineError: OpenVINO cannot load a graph or save it, lacks the device, or the device lacks the precision.
    """
    progress("compiling both networks", 0.0)
    compiled = compile_bundle(bundle, options.precision, {}, options.batch)
    for model, file in zip(compiled, (DENOISER, ENHANCER), strict=True):
        try:
            (folder / file).write_bytes(model.export_model().getvalue())
        except RuntimeError as error:  # some devices cannot
            raise EngineError(
                f"OpenVINO cannot save a model that it compiled for {choose_device()} ({one_line(error)}). Use runner "
                "openvino without an engine."
            ) from error
    return {"openvino_device": choose_device(), "enhancer_precision": "fp32"}
