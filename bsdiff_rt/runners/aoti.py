"""Runner `aoti`: both networks exported with torch.export and compiled ahead of time by AOTInductor.

The engine needs nothing but torch to run. Building it needs a C++ compiler, for a GPU also the CUDA toolkit.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from bsdiff_rt.runners.base import Progress, Runner
from bsdiff_rt.runners.registry import computes_bf16, load_networks
from bsdiff_rt.runners.timing import interleaved

logger = logging.getLogger(__name__)

DENOISER, ENHANCER = "denoiser.pt2", "enhancer.pt2"
QUERIES = 512  # whose scores, against all keys, stay in the processor's cache
# Wider heads have no flash or cuDNN kernel; the one left takes 32 queries a block, which occupy a few of a GPU's many
# multiprocessors where the image is small (aten/src/ATen/native/transformers/cuda/mem_eff_attention).
FUSED_WIDTH = 256
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# cuDNN's is on Hopper up to twice as fast as flash (pytorch issue 142132), where it takes the shapes.
WITH_CUDNN = [SDPBackend.CUDNN_ATTENTION, *WITHOUT_CUDNN]
ATTENTION_CALLS = 3
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class AotiRunner(Runner):
    """Both AOTInductor packages of an engine, which somebody has verified: they are native code.

    Args:
        folder: the engine; holds denoiser.pt2 and enhancer.pt2.
        device: what it was built for.
        precision: of the denoiser's weights and activations; the enhancer's are fp32.
        batch_range: smallest and largest batch.
        image_size: side of the square images, in px.

    Raises:
        EngineError: torch cannot load a package.
    """

    name = "aoti"

    def __init__(
        self,
        folder: Path,
        *,
        device: torch.device,
        precision: Precision,
        batch_range: tuple[int, int | None],
        image_size: int,
    ) -> None:
        super().__init__(device=device, precision=precision, batch_range=batch_range, image_size=image_size)
        self._ooms = _ooms(self.device)
        self._denoiser: Any = _load(folder / DENOISER, self.device)
        self._enhancer: Any = _load(folder / ENHANCER, self.device)

    @torch.no_grad()
    def denoise(self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
        """Stage 1; see `Runner.denoise`."""
        self.check(x_t, cxr, out, t=t)  # the compiled code checks neither size nor batch: it would read past the end
        self._run(self._denoiser, (x_t, cxr, t), out)

    @torch.no_grad()
    def enhance(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Stage 2; see `Runner.enhance`."""
        self.check(x, out)
        self._run(self._enhancer, (x,), out)

    def close(self) -> None:
        """Release both packages and their weights."""
        self._denoiser = self._enhancer = None

    def _run(self, package: Any, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        # The package runs on the current stream of the current device, wherever its buffers are: torch's
        # model_container_runner_cuda.cpp asks getCurrentCUDAStream(), without a device index, for each run.
        with _on(self.device):
            try:
                out.copy_(package(*inputs))
            except RuntimeError as error:
                # Its text is a source line of the package's; the allocator's count tells what kind of failure it was.
                before, self._ooms = self._ooms, _ooms(self.device)
                if self._ooms > before:
                    raise torch.OutOfMemoryError(f"out of memory in an aoti engine ({one_line(error)})") from error
                raise


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Work in this block finds `device` the current one, which code without a device index takes."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def _ooms(device: torch.device) -> int:
    """How often torch's allocator has found no memory on a device."""
    return 0 if device.type == "cpu" else int(torch.cuda.memory_stats(device).get("num_ooms", 0))


def versions() -> dict[str, str]:
    """What an engine is tied to: the package calls into torch's own libraries."""
    return {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}


def build(
    bundle: Bundle, options: EngineOptions, device: torch.device, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Compile both networks of `bundle` into `folder`.

    Args:
        bundle: an opened bundle.
        options: precision of the denoiser, batch range. One batch size compiles for exactly that size.
        device: what to compile for; the code also depends on the processor or GPU at hand.
        folder: exists and is empty.
        progress: told each phase.

    Returns:
        The options used, for the engine's manifest.

    Raises:
        EngineError: a precision the device lacks, no C++ compiler or CUDA toolkit, or torch cannot compile a network.
    """
    if options.precision == "fp16" and device.type == "cpu":
        raise EngineError(
            "an aoti engine in fp16 for the CPU: processors convolve in fp32 and bf16; use --precision bf16 or fp32"
        )
    if options.precision == "bf16" and not computes_bf16(device):
        logger.warning("%s does not compute bf16, it emulates it: the engine will be slower than one in fp32", device)
    _check_compiler(device)
    denoiser, enhancer = load_networks(bundle)
    size = bundle.manifest.preprocessing.size
    # Tensor cores read half precision channels-last, and so does oneDNN on a CPU, in both precisions: left to itself
    # the compiler reorders around each convolution (docs/experiments.md). On a GPU in fp32 it decides.
    channels_last = device.type == "cpu" or options.precision != "fp32"
    lower_precision(denoiser, DTYPES[options.precision])
    choose_attention(denoiser, options.precision, device)
    if channels_last:
        denoiser = denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub

    # Export takes an example of 1 for a constant; a range is exported at 2.
    batch = options.batch[0] if options.batch[0] == options.batch[1] else max(2, options.batch[0])
    made: dict[str, Any] = {"memory_format": "channels_last" if channels_last else "contiguous"}
    with _on(device):
        image = torch.zeros(batch, 1, size, size, device=device)
        example = (image, image.clone(), torch.zeros(batch, device=device))
        denoiser, enhancer = denoiser.to(device), enhancer.to(device)
        kernels = WITH_CUDNN
        if device.type == "cuda" and options.precision != "fp32":
            progress("choosing the attention kernel", 0.0)
            kernels = fastest_attention(partial(denoiser.eval(), *example), device)
            made["attention"] = "cudnn" if kernels is WITH_CUDNN else "flash"
        _compile(denoiser, example, options.batch, folder / DENOISER, progress, 0.0, kernels)
        _compile(enhancer, (image,), options.batch, folder / ENHANCER, progress, 0.5, WITH_CUDNN)
    return made | {"enhancer_precision": "fp32"}


def fastest_attention(call: Callable[[], object], device: torch.device) -> list[SDPBackend]:
    """The order of attention kernels with which a network's call is fastest on `device`.

    A kernel that says it takes the shapes and then fails is found here: compiled in, it would fail in every run.

    Raises:
        RuntimeError: no order works, or there is not the memory.
    """
    took: list[tuple[float, list[SDPBackend]]] = []
    for kernels in (WITH_CUDNN, WITHOUT_CUDNN):
        with torch.no_grad(), sdpa_kernel(kernels, set_priority=True):
            times, failed = interleaved({"": call}, ATTENTION_CALLS, device)
        if not failed:
            took.append((min(times[""]), kernels))
        elif out_of_memory(failed[""]) or kernels is WITHOUT_CUDNN:
            raise failed[""]
        else:
            logger.warning("cuDNN's attention does not work here (%s); flash attention is used", one_line(failed[""]))
    return min(took, key=lambda entry: entry[0])[1]


def lower_precision(network: nn.Module, dtype: torch.dtype) -> None:
    """Weights and activations of a denoiser in `dtype`, in place; float32 tensors in and out.

    GroupNorm, the time embedding and the first and last convolution stay in float32: the norm's sums overflow or lose
    what it divides by, bf16 rounds neighbouring timesteps to one, and the two convolutions, next to no arithmetic, are
    where x_t comes in and the prediction goes out. (The denoiser gives its time embedding the dtype of `conv_in`.) The
    softmax of scaled_dot_product_attention is computed in float32 by torch's kernels.
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
    """Have each head of a denoiser computed in the form that is fastest on `device`, in place."""
    for block in network.modules():
        if not isinstance(block, SelfAttention) or precision == "fp32":
            continue
        if device.type == "cpu":
            block.attend = attention_in_parts
        elif block.to_q.in_features > FUSED_WIDTH:
            block.attend = attention_as_products


def attention_in_parts(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Scaled dot-product attention of one head, `QUERIES` of its queries at a time; [B, 1, N, C] each, and returned.

    For bf16 on a CPU: torch's fused kernel is no faster there than in fp32, plain matrix products are twice as fast.
    Scores are rounded to bf16 between the two products, which the fused kernel's are not; the parity gate judges that.
    """
    query, value = (query * query.shape[-1] ** -0.5).squeeze(1), value.squeeze(1)
    keys = key.squeeze(1).transpose(1, 2)  # once: of a transpose in each part the compiler makes the fused kernel again
    parts = [torch.bmm(torch.softmax(torch.bmm(part, keys), -1), value) for part in query.split(QUERIES, 1)]
    return torch.cat(parts, 1).unsqueeze(1)


def attention_as_products(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Scaled dot-product attention of one wide head as two matrix products; [B, 1, N, C] each, and returned.

    For half precision on a GPU (`FUSED_WIDTH`), where wide heads belong to small images, so that the scores are small,
    too. The scale is within the product: of one beside it the compiler makes the slow kernel again.
    """
    query, key, value = (tensor.squeeze(1) for tensor in (query, key, value))
    nothing = query.new_zeros(1, 1, 1)
    scores = torch.baddbmm(nothing, query, key.transpose(1, 2), beta=0, alpha=query.shape[-1] ** -0.5)
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
            f"building an aoti engine needs a C++ compiler, and none was found ({one_line(error)}); "
            "install one (Debian, Ubuntu: apt install g++) or name it in the environment variable CXX"
        ) from error
    # The wrapper around the kernels includes the toolkit's headers; torch's wheels bring its libraries alone.
    if device.type == "cuda" and not (CUDA_HOME and Path(CUDA_HOME, "include", "cuda_runtime_api.h").is_file()):
        raise EngineError(
            f"building an aoti engine for a GPU needs the headers of the CUDA toolkit, found none in {CUDA_HOME}; "
            f"install the toolkit of CUDA {torch.version.cuda} and name its folder in the variable CUDA_HOME"
        )


def _compile(
    network: Denoiser | Enhancer,
    example: tuple[torch.Tensor, ...],
    batch: tuple[int, int],
    package: Path,
    progress: Progress,
    done: float,
    kernels: list[SDPBackend],
) -> None:
    """Export `network` and write its package; attention is compiled to the first of `kernels` that takes it.

    Raises:
        EngineError: torch cannot.
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
    # A cache of its own: torch would leave sources and weights in the temporary folder of the machine. Dynamic threads:
    # an engine built where there is one core, in a batch job say, would use one for good.
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        fresh_cache(dir=str(package.parent)),
        config.patch("cpp.dynamic_threads", True),
        _for_gpu(kernels) if device.type == "cuda" else nullcontext(),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its own functions
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
    """What a build for a GPU wants to know besides: which attention comes first, and where the toolkit is.

    torch hands the linker its stand-in for the driver's library only where CUDA_HOME is set, not where it found the
    toolkit by itself; the driver's own may lie where no linker looks.
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


def _load(package: Path, device: torch.device) -> Any:
    from torch._inductor import aoti_load_package

    try:
        # Single-threaded, which a runner is anyway: the other way asks CUDA events whether an earlier call has ended,
        # which is not permitted while a graph is recorded (pytorch pull request 148601).
        with _on(device):  # loading makes its device the current one for good (model_base.h)
            return aoti_load_package(
                str(package), run_single_threaded=True, device_index=-1 if device.index is None else device.index
            )
    except Exception as error:
        raise EngineError(f"{package}: torch {torch.__version__} cannot load it: {one_line(error)}") from error
