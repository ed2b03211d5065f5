"""Engines for runner `aoti`: both networks exported with torch.export and compiled ahead of time by AOTInductor.

Building needs a C++ compiler, and for a GPU also the CUDA toolkit.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bsdiff_rt.bundle import Bundle
from bsdiff_rt.config import EngineOptions, Precision
from bsdiff_rt.errors import EngineError, one_line, out_of_memory
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.blocks import SelfAttention
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.runners.aoti import DENOISER, ENHANCER
from bsdiff_rt.runners.base import Progress
from bsdiff_rt.runners.devices import computes_bf16, make_current
from bsdiff_rt.runners.eager import load_networks
from bsdiff_rt.runners.timing import time_in_turn

logger = logging.getLogger(__name__)

QUERIES = 512  # the scores of so many queries against all keys stay in the processor's cache
# Wider heads have no flash or cuDNN kernel. The remaining kernel takes 32 queries a block, which occupy only a few of a
# GPU's multiprocessors if the image is small (aten/src/ATen/native/transformers/cuda/mem_eff_attention).
FUSED_WIDTH = 256
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# On Hopper cuDNN's attention is up to twice as fast as flash (pytorch issue 142132), where it takes the shapes.
WITH_CUDNN = [SDPBackend.CUDNN_ATTENTION, *WITHOUT_CUDNN]
ATTENTION_CALLS = 3
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build(
    bundle: Bundle, options: EngineOptions, device: torch.device, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Compile both networks of `bundle` into `folder`.

    Args:
        bundle: an opened bundle.
        options: precision of the denoiser, and batch range. If both ends are equal, the engine takes only that batch.
        device: what to compile for. The code also depends on the processor or GPU of this machine.
        folder: exists and is empty.
        progress: called with each phase.

    Returns:
        The options used, for the engine's manifest.

    Raises:
        EngineError: the device lacks the precision, the C++ compiler or the CUDA toolkit is missing, or torch cannot
            compile a network.
    """
    if options.precision == "fp16" and device.type == "cpu":
        raise EngineError(
            "an aoti engine for the CPU cannot be in fp16: processors convolve in fp32 and bf16. Use bf16 or fp32."
        )
    if options.precision == "bf16" and not computes_bf16(device):
        logger.warning("%s emulates bf16. The engine will be slower than one in fp32.", device)
    _check_compiler(device)
    _find_instructions(device)
    denoiser, enhancer = load_networks(bundle)
    size = bundle.manifest.preprocessing.size
    # Tensor cores read half precision channels-last. So does oneDNN on a CPU, in both precisions. Otherwise the
    # compiler reorders around each convolution (docs/experiments.md). On a GPU in fp32 the compiler decides.
    channels_last = device.type == "cpu" or options.precision != "fp32"
    lower_precision(denoiser, DTYPES[options.precision])
    choose_attention(denoiser, options.precision, device)
    if channels_last:
        denoiser = denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub

    # torch.export treats a batch of 1 in the example as a constant, so a range is exported with 2.
    batch = options.batch[0] if options.batch[0] == options.batch[1] else max(2, options.batch[0])
    used: dict[str, Any] = {"memory_format": "channels_last" if channels_last else "contiguous"}
    with make_current(device):
        image = torch.zeros(batch, 1, size, size, device=device)
        example = (image, image.clone(), torch.zeros(batch, device=device))
        denoiser, enhancer = denoiser.to(device), enhancer.to(device)
        kernels = WITH_CUDNN
        if device.type == "cuda" and options.precision != "fp32":
            progress("choosing the attention kernel", 0.0)
            kernels = find_fastest_attention(partial(denoiser.eval(), *example), device)
            used["attention"] = "cudnn" if kernels is WITH_CUDNN else "flash"
        _compile(denoiser, example, options.batch, folder / DENOISER, progress, 0.0, kernels)
        _compile(enhancer, (image,), options.batch, folder / ENHANCER, progress, 0.5, WITH_CUDNN)
    return used | {"enhancer_precision": "fp32"}


def find_fastest_attention(call: Callable[[], object], device: torch.device) -> list[SDPBackend]:
    """Return the order of attention kernels with which a call is fastest on a device.

    A kernel may accept the shapes and then fail. Compiled in, it would fail in every run; here it is left out.

    Args:
        call: runs a network once.
        device: where it runs.

    Raises:
        RuntimeError: no order works, or there is not enough memory.
    """
    took: list[tuple[float, list[SDPBackend]]] = []
    for kernels in (WITH_CUDNN, WITHOUT_CUDNN):
        with torch.no_grad(), sdpa_kernel(kernels, set_priority=True):
            times, failed = time_in_turn({"": call}, ATTENTION_CALLS, device)
        if not failed:
            took.append((min(times[""]), kernels))
        elif out_of_memory(failed[""]) or kernels is WITHOUT_CUDNN:
            raise failed[""]
        else:
            logger.warning("cuDNN's attention does not work here (%s). Flash attention is used.", one_line(failed[""]))
    return min(took, key=lambda entry: entry[0])[1]


def lower_precision(network: nn.Module, dtype: torch.dtype) -> None:
    """Change weights and activations of a denoiser to `dtype`, in place. Its inputs and output stay float32.

    These parts stay in float32:
    - GroupNorm: its sums overflow, or lose the digits of the variance.
    - the time embedding: bf16 rounds neighbouring timesteps to the same number.
    - the first and the last convolution: x_t enters and the prediction leaves there, and they cost little.

    The denoiser casts its time embedding to the dtype of `conv_in`. torch's attention kernels compute the softmax in
    float32.
    """
    if dtype == torch.float32:
        return
    network.to(dtype)
    for name, module in network.named_modules():
        if isinstance(module, nn.GroupNorm) or name in ("time_embed", "conv_in"):
            _float32_island(module, dtype)
        elif name == "conv_out":
            _float32_island(module, torch.float32)


def choose_attention(network: nn.Module, precision: Precision, device: torch.device) -> None:
    """Let each attention of a denoiser use the form that is fastest on a device, in place."""
    for block in network.modules():
        if not isinstance(block, SelfAttention) or precision == "fp32":
            continue
        if device.type == "cpu":
            block.attend = attention_in_parts
        elif block.to_q.in_features > FUSED_WIDTH:
            block.attend = attention_as_products


def attention_in_parts(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Compute scaled dot-product attention of one head, `QUERIES` queries at a time, for bf16 on a CPU.

    There torch's fused kernel is no faster than in fp32, while plain matrix products are twice as fast. Unlike in the
    fused kernel, scores are rounded to bf16 between the two products; the parity check judges the result.

    Args:
        query, key, value: [B, 1, N, C] each.

    Returns:
        [B, 1, N, C].
    """
    query, value = (query * query.shape[-1] ** -0.5).squeeze(1), value.squeeze(1)
    keys = key.squeeze(1).transpose(1, 2)  # once: with one in each part the compiler returns to the fused kernel
    parts = [torch.bmm(torch.softmax(torch.bmm(part, keys), -1), value) for part in query.split(QUERIES, 1)]
    return torch.cat(parts, 1).unsqueeze(1)


def attention_as_products(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Compute scaled dot-product attention of one wide head as two matrix products, for half precision on a GPU.

    Heads wider than `FUSED_WIDTH` belong to small images, so the scores are small, too. The scale is part of the
    product: with a separate one the compiler returns to the slow kernel.

    Args:
        query, key, value: [B, 1, N, C] each.

    Returns:
        [B, 1, N, C].
    """
    query, key, value = (tensor.squeeze(1) for tensor in (query, key, value))
    ignored = query.new_zeros(1, 1, 1)  # beta is 0
    scores = torch.baddbmm(ignored, query, key.transpose(1, 2), beta=0, alpha=query.shape[-1] ** -0.5)
    return torch.bmm(torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype), value).unsqueeze(1)


def _float32_island(module: nn.Module, dtype_out: torch.dtype) -> None:
    module.float()
    module.register_forward_pre_hook(lambda _, inputs: tuple(value.float() for value in inputs))
    module.register_forward_hook(lambda _, __, out: out.to(dtype_out))


def _check_compiler(device: torch.device) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils.cpp_extension import CUDA_HOME

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise EngineError(
            f"building an aoti engine needs a C++ compiler, and none was found ({one_line(error)}). "
            "Install one (Debian, Ubuntu: apt install g++), or name it in the environment variable CXX."
        ) from error
    # The wrapper around the kernels includes the toolkit's headers. torch's wheels bring only its libraries.
    if device.type == "cuda" and not (CUDA_HOME and Path(CUDA_HOME, "include", "cuda_runtime_api.h").is_file()):
        raise EngineError(
            f"building an aoti engine for a GPU needs the headers of the CUDA toolkit, found none in {CUDA_HOME}. "
            f"Install the toolkit of CUDA {torch.version.cuda} and name its folder in the variable CUDA_HOME."
        )


def _find_instructions(device: torch.device) -> None:
    """Let torch find the vector instructions of this processor, for a build on a CPU.

    It compiles a few programs for that. Called outside of fresh_cache, it keeps them for the next build.
    """
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list

    if device.type == "cpu":
        valid_vec_isa_list()


def _compile(
    network: Denoiser | Enhancer,
    example: tuple[torch.Tensor, ...],
    batch: tuple[int, int],
    package: Path,
    progress: Progress,
    done: float,
    kernels: list[SDPBackend],
) -> None:
    """Export a network and write its package.

    Args:
        network: the denoiser or the enhancer.
        example: its inputs, on the device to compile for.
        batch: smallest and largest batch.
        package: the file to write. Its stem names the network in messages.
        progress: called with each phase.
        done: the share of the whole build that is done before, in [0, 1].
        kernels: attention kernels. On a GPU the first one that takes the shapes is compiled in.

    Raises:
        EngineError: torch cannot export or compile the network.
    """
    from torch._inductor import aoti_compile_and_package, config
    from torch._inductor.utils import fresh_cache

    what = package.stem
    shapes = None
    if batch[0] != batch[1]:
        dynamic = torch.export.Dim("batch", min=batch[0], max=batch[1])
        shapes = tuple({0: dynamic} for _ in example)
    failure: Exception | None = None
    device = example[0].device
    # fresh_cache: otherwise torch leaves sources and weights in the machine's temporary folder. Dynamic threads:
    # otherwise an engine built with one core, in a batch job for example, would always use one.
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        fresh_cache(dir=str(package.parent)),
        config.patch("cpp.dynamic_threads", True),
        _for_gpu(kernels) if device.type == "cuda" else nullcontext(),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # torch warns of its own functions
        try:
            progress(f"exporting the {what}", done)
            exported = torch.export.export(network.eval(), example, dynamic_shapes=shapes)
            progress(f"compiling the {what}", done + 0.05)
            aoti_compile_and_package(exported, package_path=str(package))
        except Exception as error:  # raised below: fresh_cache keeps its folder when an exception passes through
            failure = error
    if failure is not None:
        raise EngineError(
            f"torch {torch.__version__} cannot compile the {what} for {device}: {one_line(failure)}"
        ) from failure


@contextmanager
def _for_gpu(kernels: list[SDPBackend]) -> Iterator[None]:
    """Set the order of attention kernels and the place of the CUDA toolkit for a build in this block.

    torch gives the linker its stand-in for the driver's library only if CUDA_HOME is set, not if it found the toolkit
    by itself. The driver's own library may lie where no linker looks.
    """
    from torch.utils.cpp_extension import CUDA_HOME

    before = {name: os.environ.get(name) for name in ("CUDA_HOME", "LIBRARY_PATH")}
    os.environ["CUDA_HOME"] = str(CUDA_HOME)
    os.environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, (f"{CUDA_HOME}/lib64/stubs", before["LIBRARY_PATH"])))
    try:
        with sdpa_kernel(kernels, set_priority=True):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
