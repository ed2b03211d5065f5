"""Engines for runner `aoti`: both networks exported with torch.export and compiled ahead of time by AOTInductor.

Building needs a C++ compiler, and for a GPU also the CUDA toolkit.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bsdiff_rt.bundle import Bundle
from bsdiff_rt.config import EngineOptions, Precision
from bsdiff_rt.errors import EngineError, one_line, out_of_memory
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.blocks import SelfAttention, join_projections
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
# torch's own choice, where no form is pinned. On Hopper cuDNN's attention is up to twice as fast as flash, where it
# takes the shapes (pytorch issue 142132).
KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
ATTENTION_ROUNDS, ATTENTION_REPEATS = 3, 10
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build(
    bundle: Bundle, options: EngineOptions, device: torch.device, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Compile both networks of `bundle` into `folder`.

    Args:
        bundle: an opened bundle.
        options: precision of the denoiser, batch range, and whether to try more kernels. If both ends of the range are
            equal, the engine takes only that batch.
        device: what to compile for. The code also depends on the processor or GPU of this machine.
        folder: exists and is empty.
        progress: called with each phase.

    Returns:
        The options used, for the engine's manifest.

    Raises:
        EngineError: the C++ compiler or the CUDA toolkit is missing, or torch cannot
            compile a network.
    """
    if options.precision == "bf16" and not computes_bf16(device):
        logger.warning("%s emulates bf16. The engine will be slower than one in fp32.", device)
    _check_compiler()
    toolkit = find_toolkit() if device.type == "cuda" else None
    _find_instructions(device)
    denoiser, enhancer = (join_projections(network) for network in load_networks(bundle))
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
    if options.max_autotune:
        used["max_autotune"] = True
    compile_network = partial(
        _compile, batch=options.batch, progress=progress, toolkit=toolkit, max_autotune=options.max_autotune
    )
    with make_current(device):
        image = torch.zeros(batch, 1, size, size, device=device)
        example = (image, image.clone(), torch.zeros(batch, device=device))
        denoiser, enhancer = denoiser.to(device), enhancer.to(device)
        if device.type == "cuda" and options.precision != "fp32":
            progress("choosing the form of attention", 0.0)
            used["attention"] = pin_attention(denoiser, partial(denoiser.eval(), *example), device)
        compile_network(denoiser, example, package=folder / DENOISER, done=0.0)
        compile_network(enhancer, (image,), package=folder / ENHANCER, done=0.5)
    return used | {"enhancer_precision": "fp32"}


def pin_attention(network: nn.Module, run: Callable[[], object], device: torch.device) -> dict[str, str]:
    """Let each attention of a network in half precision use the form that is fastest on a GPU, in place.

    A form may accept the shapes and then fail. Compiled in, it would fail in every run; here it is left out.

    Args:
        network: on the device, in half precision.
        run: runs the network once.
        device: where it runs.

    Returns:
        Name of the form for each shape, such as {"4096 x 256": "cudnn"}.

    Raises:
        RuntimeError: there is not enough memory.
    """
    shapes = _find_attention_shapes(network, run)
    chosen: dict[torch.Size, str] = {}
    for block, shape in shapes.items():
        if shape not in chosen:
            chosen[shape] = _find_fastest_attention(shape, block.dtype, device)
        block.attend = ATTENTION_FORMS[chosen[shape]]
    return {f"{shape[-2]} x {shape[-1]}": name for shape, name in chosen.items()}


def _find_attention_shapes(network: nn.Module, run: Callable[[], object]) -> dict[SelfAttention, torch.Size]:
    """Return the shape of the queries of each attention, [B, 1, N, C]."""
    shapes: dict[SelfAttention, torch.Size] = {}

    def note(block: SelfAttention, inputs: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        batch, channels, height, width = inputs[0].shape
        shapes[block] = torch.Size((batch, 1, height * width, channels))

    hooks = [block.register_forward_hook(note) for block in network.modules() if isinstance(block, SelfAttention)]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def _find_fastest_attention(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> str:
    """Return the name of the fastest form for queries of a shape. Random values: zeros are faster to multiply."""
    tokens = [torch.randn(shape, dtype=dtype, device=device) for _ in range(3)]

    def repeat(form: Attend) -> None:
        for _ in range(ATTENTION_REPEATS):  # together longer than it takes to start them
            form(*tokens)

    calls = {name: partial(repeat, form) for name, form in ATTENTION_FORMS.items()}
    with torch.no_grad():
        times, failed = time_in_turn(calls, ATTENTION_ROUNDS, device)
    for name, error in failed.items():
        if out_of_memory(error):
            raise error
        logger.info("Attention as %s does not work for %s here (%s).", name, tuple(shape), one_line(error))
    if not times:
        raise next(iter(failed.values()))
    return min(times, key=lambda name: min(times[name]))


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
        elif block.norm.num_channels > FUSED_WIDTH:
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


def attention_by_cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Compute scaled dot-product attention with cuDNN's kernel alone: [B, 1, N, C] each -> [B, 1, N, C]."""
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, False)[0]
    return out


def attention_by_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Compute scaled dot-product attention with the flash kernel alone: [B, 1, N, C] each -> [B, 1, N, C]."""
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return out


# What an attention in half precision on a GPU may use. The first one is torch's own choice among its kernels.
ATTENTION_FORMS: dict[str, Attend] = {
    "torch": F.scaled_dot_product_attention,
    "cudnn": attention_by_cudnn,
    "flash": attention_by_flash,
    "products": attention_as_products,
}


def _float32_island(module: nn.Module, dtype_out: torch.dtype) -> None:
    module.float()
    module.register_forward_pre_hook(lambda _, inputs: tuple(value.float() for value in inputs))
    module.register_forward_hook(lambda _, __, out: out.to(dtype_out))


def _check_compiler() -> None:
    """Raise EngineError if there is no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise EngineError(
            f"building an aoti engine needs a C++ compiler, and none was found ({one_line(error)}). "
            "Install one (Debian, Ubuntu: apt install g++), or name it in the environment variable CXX."
        ) from error


def find_toolkit(local: Path = Path("/usr/local")) -> Path:
    """Return the folder of the CUDA toolkit.

    The wrapper around the kernels includes the toolkit's headers, and torch's wheels bring only its libraries. A
    program named nvcc outside the toolkit misleads torch, so its choice is not the only place to look at.

    Args:
        local: where toolkits are installed.

    Raises:
        EngineError: no place has the headers.
    """
    from torch.utils.cpp_extension import CUDA_HOME

    named = [place for place in (os.environ.get("CUDA_HOME"), CUDA_HOME) if place]
    versions = sorted(local.glob("cuda*"), key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)])
    places = [*map(Path, named), *reversed(versions)]
    for place in places:
        if (place / "include" / "cuda_runtime_api.h").is_file():
            return place
    raise EngineError(
        "building an aoti engine for a GPU needs the headers of the CUDA toolkit, found none in "
        f"{', '.join(map(str, places)) or local}. "
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
    *,
    batch: tuple[int, int],
    package: Path,
    progress: Progress,
    done: float = 0.0,
    toolkit: Path | None = None,
    max_autotune: bool = False,
) -> None:
    """Export a network and write its package.

    Args:
        network: the denoiser or the enhancer.
        example: its inputs, on the device to compile for.
        batch: smallest and largest batch.
        package: the file to write. Its stem names the network in messages.
        progress: called with each phase.
        done: the share of the whole build that is done before, in [0, 1].
        toolkit: folder of the CUDA toolkit; None on a CPU.
        max_autotune: time more kernels for each matrix product and convolution, and take the fastest.

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
    # fresh_cache: otherwise torch leaves sources and weights in the machine's temporary folder.
    with (
        torch.no_grad(),
        tempfile.TemporaryDirectory() as work,
        warnings.catch_warnings(),
        fresh_cache(dir=str(package.parent)),
        config.patch(_list_settings(max_autotune)),
        _without_tables() if max_autotune else nullcontext(),
        nullcontext() if toolkit is None else _for_gpu(toolkit, Path(work)),
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


def _list_settings(max_autotune: bool) -> dict[str, Any]:
    """Return the compiler's settings that differ from its defaults."""
    from torch._inductor import config

    # Dynamic threads: otherwise an engine built with one core, in a batch job for example, would always use one.
    settings: dict[str, Any] = {"cpp.dynamic_threads": True, "max_autotune": max_autotune}
    if hasattr(config, "loop_reindexing_after_fusion"):
        # It makes Upsample, convolution and GroupNorm in a row about six times slower (pytorch issue 189488).
        settings["loop_reindexing_after_fusion"] = False
    if hasattr(config.aot_inductor, "precompile_headers"):
        # It takes longer than it saves in two networks, and stays in the machine's temporary folder.
        settings["aot_inductor.precompile_headers"] = False
    return settings


@contextmanager
def _without_tables() -> Iterator[None]:
    """Keep the compiler from printing the times of all kernels that it tries. It has no setting for that."""
    from torch._inductor import select_algorithm

    before = select_algorithm.PRINT_AUTOTUNE
    select_algorithm.PRINT_AUTOTUNE = False
    try:
        yield
    finally:
        select_algorithm.PRINT_AUTOTUNE = before


@contextmanager
def _for_gpu(toolkit: Path, work: Path) -> Iterator[None]:
    """Set the order of attention kernels and the place of the CUDA toolkit for a build in this block.

    Args:
        toolkit: folder of the CUDA toolkit.
        work: a folder for temporary files.
    """
    from torch.utils import cpp_extension

    before = {name: os.environ.get(name) for name in ("CUDA_HOME", "LIBRARY_PATH")}
    home = cpp_extension.CUDA_HOME
    cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"] = str(toolkit)
    os.environ["LIBRARY_PATH"] = os.pathsep.join(
        filter(None, (str(_find_driver_stub(toolkit, work)), before["LIBRARY_PATH"]))
    )
    try:
        with sdpa_kernel(KERNELS, set_priority=True):
            yield
    finally:
        cpp_extension.CUDA_HOME = home
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _find_driver_stub(toolkit: Path, work: Path) -> Path:
    """Return a folder with a libcuda.so for the linker: the toolkit's stand-in, or a link to the driver's own.

    torch gives the linker the stand-in only if CUDA_HOME is set, and some toolkits come without it. The driver's
    library may lie where no linker looks, and under its full name only.
    """
    stubs = toolkit / "lib64" / "stubs"
    if (stubs / "libcuda.so").is_file():
        return stubs
    try:
        mapped = Path("/proc/self/maps").read_text().split()
    except OSError:  # not Linux
        mapped = []
    driver = next((path for path in mapped if "/libcuda.so" in path), None)  # torch has loaded it
    if driver is not None:
        (work / "libcuda.so").symlink_to(driver)
    return work
