"""Choosing and loading a runner. What was asked for by name is used, or the run stops."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import nn

from bsdiff_rt.bundle import Bundle
from bsdiff_rt.config import Precision, RunnerName
from bsdiff_rt.errors import BundleError, EngineError, SettingsError, one_line
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.eager import EagerRunner

logger = logging.getLogger(__name__)

C = TypeVar("C")
N = TypeVar("N", bound=nn.Module)


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device that exists.

    Raises:
        SettingsError: not a device name, or a device this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(f"--device {name}: not a device; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda") or name.startswith("cpu:"):
        raise SettingsError(f"--device {name}: not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise SettingsError(f"--device {name}: this machine has {count} CUDA devices; use --device cpu")
    return device


def unavailable(name: RunnerName, device: torch.device) -> str | None:
    """Why a runner cannot be used on `device`; None when it can."""
    if name == "onnxruntime":
        if find_spec("onnxruntime") is None:
            return "the package onnxruntime is not installed"
        if device.type != "cpu":
            return f"it runs on the CPU, not yet on {device}"
    if name in ("aoti", "tensorrt"):
        return "no engine of this kind can be built by this version"
    return None


def choose(name: str, device: torch.device) -> tuple[RunnerName, str]:
    """The runner to use for `--runner name`, and why, in words for the log.

    Raises:
        EngineError: a runner asked for by name that cannot be used here.
    """
    if name != "auto":
        if reason := unavailable(name, device):  # type: ignore[arg-type]  # the command line checks the names
            raise EngineError(f"--runner {name} cannot be used on {device}: {reason}; use --runner auto or eager")
        return name, "asked for"  # type: ignore[return-value]
    reasons: list[str] = []
    for candidate in ("tensorrt", "aoti", "onnxruntime"):
        reason = unavailable(candidate, device)
        if reason is None:
            return candidate, "; ".join(reasons) or "fastest available"
        reasons.append(f"not {candidate}: {reason}")
    return "eager", "; ".join(reasons)


def resolve_precision(runner: RunnerName, precision: str) -> Precision:
    """The precision a runner will compute in.

    Raises:
        EngineError: one asked for by name that this runner does not have.
    """
    if precision not in ("auto", "fp32"):
        raise EngineError(f"--precision {precision}: runner {runner} computes in fp32; use --precision auto")
    return "fp32"


def load_runner(bundle: Bundle, name: str, device: torch.device, precision: str = "auto") -> Runner:
    """Load `bundle` into a runner on `device`.

    Raises:
        EngineError: the runner cannot be used here, or not in this precision.
        BundleError: weights that do not fit the bundle's networks.
    """
    chosen, why = choose(name, device)
    resolve_precision(chosen, precision)
    logger.info("runner %s on %s (%s)", chosen, device, why)
    if chosen == "onnxruntime":
        from bsdiff_rt.runners.onnxruntime import OnnxRuntimeRunner  # optional: another runner may be the one

        return OnnxRuntimeRunner(
            bundle.file("denoiser.onnx"), bundle.file("enhancer.onnx"), bundle.manifest.preprocessing.size
        )
    denoiser, enhancer = load_networks(bundle)
    return EagerRunner(denoiser, enhancer, bundle.manifest.preprocessing.size, device)


def load_networks(bundle: Bundle) -> tuple[Denoiser, Enhancer]:
    """Both networks of a bundle with their weights, fp32, on the CPU, in evaluation mode.

    Raises:
        BundleError: weights that do not fit the manifest's network shapes.
    """
    manifest = bundle.manifest
    return (
        _load(Denoiser, manifest.denoiser, bundle.file("denoiser.safetensors")),
        _load(Enhancer, manifest.enhancer, bundle.file("enhancer.safetensors")),
    )


def _load(network_type: Callable[[C], N], config: C, weights: Path) -> N:
    try:
        network = network_type(config)
        network.load_state_dict(load_file(weights))
    except Exception as error:  # torch layers and safetensors raise anything for numbers that fit no network
        raise BundleError(f"{weights}: weights do not fit the manifest's network: {one_line(error)}") from error
    return network.eval()
