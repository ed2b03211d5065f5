"""Devices, what can run on them, and loading the runners that need no built engine (engine.py chooses among all)."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import nn

from bsdiff_rt.bundle import Bundle, Manifest
from bsdiff_rt.config import Precision, RunnerName
from bsdiff_rt.errors import BundleError, EngineError, SettingsError, one_line
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.eager import EagerRunner

C = TypeVar("C")
N = TypeVar("N", bound=nn.Module)

FULL_BATCH = 8  # about so many images fill a GPU's arithmetic


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


def computes_bf16(device: torch.device) -> bool:
    """Whether `device` has instructions for bf16; a processor without emulates it, many times slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def batch_limit(runner: RunnerName, manifest: Manifest) -> int | None:
    """How many images a runner of these networks can safely take at once on a GPU; None: any number.

    Attention's scores are one for each pair of tokens: 8 images of the paper's networks have 2^31. A tensor of
    TensorRT's has to have less (NvInfer.h, ITensor; whether the newest versions still insist is reported both ways),
    and ONNX Runtime's CUDA kernels count elements in 32 bits in places. The other two never hold all scores.
    """
    if runner not in ("tensorrt", "onnxruntime"):
        return None
    levels = [
        level
        for network in (manifest.denoiser, manifest.enhancer)
        for level, present in enumerate((*network.attention[:-1], True))  # the lowest has one in any case
        if present
    ]
    tokens = (manifest.preprocessing.size >> min(levels)) ** 2
    return max(1, (2**31 - 1) // tokens**2)


def unavailable(name: RunnerName, device: torch.device) -> str | None:
    """Why a runner cannot be used on `device`, whatever engines are built; None when it can."""
    if name == "onnxruntime":
        if find_spec("onnxruntime") is None:
            return "the package onnxruntime is not installed"
        try:
            import onnxruntime
        except (ImportError, OSError) as error:  # a library of it is missing, say
            return f"the onnxruntime installed cannot be loaded ({one_line(error)})"
        if device.type == "cuda":
            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                return "the onnxruntime installed has no CUDA provider; install onnxruntime-gpu in its place"
            # It has no CUDA libraries of its own: it finds those that torch has loaded.
            theirs, ours = (str(version).split(".")[0] for version in (onnxruntime.cuda_version, torch.version.cuda))
            if theirs != ours:
                return f"the onnxruntime installed is built for CUDA {theirs}, torch for {ours}; install a matching one"
    if name == "tensorrt":
        if device.type != "cuda":
            return f"it runs on NVIDIA GPUs, not on {device}"
        if find_spec("tensorrt") is None:
            return "the package tensorrt is not installed (pip install 'bsdiff-rt[tensorrt]')"
    return None


def resolve_precision(runner: RunnerName, precision: str, device: torch.device) -> Precision:
    """The precision a runner without engines will compute in; fp32 unless another is asked for.

    Raises:
        EngineError: one asked for by name that this runner does not have.
    """
    if precision in ("auto", "fp32"):
        return "fp32"
    if precision == "fp16" and runner == "onnxruntime" and device.type == "cuda":
        return "fp16"
    raise EngineError(f"it computes in fp32 on {device}, not in {precision}; use --precision auto")


def load_runner(bundle: Bundle, name: RunnerName, device: torch.device, precision: Precision = "fp32") -> Runner:
    """Load `bundle` into a runner that needs no engine: eager or onnxruntime. For the others there is engine.py.

    Raises:
        EngineError: the runner cannot be used here, or not in this precision.
        BundleError: weights that do not fit the bundle's networks.
    """
    if reason := unavailable(name, device):
        raise EngineError(f"--runner {name} cannot be used on {device}: {reason}; use --runner auto or eager")
    if name == "onnxruntime":
        from bsdiff_rt.runners.onnxruntime import OnnxRuntimeRunner  # optional: another runner may be the one

        return OnnxRuntimeRunner(
            bundle.file("denoiser.onnx"),
            bundle.file("enhancer.onnx"),
            bundle.manifest.preprocessing.size,
            device=device,
            precision=precision,
            batch_max=None if device.type == "cpu" else batch_limit(name, bundle.manifest),
        )
    if name != "eager":
        raise EngineError(f"runner {name} needs a built engine; bsdiff-rt build-engine makes one")
    resolve_precision(name, precision, device)
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
