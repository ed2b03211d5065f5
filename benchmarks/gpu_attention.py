"""Part `attention` of `python -m benchmarks.gpu_suite`: every form of attention at every width of the network.

Each form is timed for one block of each width, captured in a CUDA graph, and compared with fp32. FP8 needs the package
nvidia-cudnn-frontend. Its operands are rounded to FP8 as they are, without scales: random values are about 1.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.gpu_common import Part, Skipped, make_model
from bsdiff_rt.config import DenoiserConfig
from bsdiff_rt.errors import BsdiffError, one_line
from bsdiff_rt.runners.aoti_builder import ATTENTION_FORMS
from bsdiff_rt.runners.timing import time_call
from bsdiff_rt.sampling.cuda_graph import record_call

FP8 = "cudnn fp8"
BATCHES = (1, 8)
REPEATS, ROUNDS = {"cuda": 10, "cpu": 1}, 5
SHAPE_S = 4.0  # of one width and batch size, in all forms

Call = Callable[[], torch.Tensor]


def measure_attention(part: Part) -> None:
    """Time every form of attention, and compare it with fp32."""
    shapes = list_shapes(make_model(part).denoiser, part.options.size)
    part.save(rows=[])
    with _open_stream(part.device):
        for batch in BATCHES:
            for tokens, width in shapes:
                if part.has_time(SHAPE_S, f"{tokens} x {width}, batch {batch}"):
                    rows = [_measure(part.device, form, batch, tokens, width) for form in (*ATTENTION_FORMS, FP8)]
                    part.save(rows=part.found["rows"] + rows)
                    times = ", ".join(
                        f"{row['form']} {row['ms']:.3g} ms" if row["ms"] else f"{row['form']} -" for row in rows
                    )
                    part.note(f"{tokens} x {width}, batch {batch}: {times}")


def list_shapes(config: DenoiserConfig, size: int) -> list[tuple[int, int]]:
    """Return tokens and width of each level with attention, the largest image first. The lowest level always has it."""
    present = (*config.attention[:-1], True)
    levels = enumerate(zip(config.channels, present, strict=True))
    return [((size >> level) ** 2, width) for level, (width, attention) in levels if attention]


def _open_stream(device: torch.device) -> Any:
    """Return a stream of its own on CUDA: a graph cannot be recorded on the default one."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


@torch.no_grad()
def _measure(device: torch.device, form: str, batch: int, tokens: int, width: int) -> dict[str, Any]:
    """Return a row: milliseconds of one attention, TFLOP/s, largest error over the largest value; or the reason."""
    row: dict[str, Any] = {"tokens": tokens, "width": width, "batch": batch, "form": form}
    generator = torch.Generator(device).manual_seed(0)
    operands = [torch.randn(batch, 1, tokens, width, generator=generator, device=device) for _ in range(3)]
    half = [operand.half() for operand in operands]
    try:
        call: Call = make_fp8_call(half) if form == FP8 else partial(ATTENTION_FORMS[form], *half)
        found = call()
        expected = ATTENTION_FORMS["torch"](*operands)
        error = float((found.float() - expected).abs().max() / expected.abs().max())
        times = _time(call, device)
    except Exception as failure:  # a form may raise anything for a shape that it does not take
        reason = str(failure) if isinstance(failure, Skipped | BsdiffError) else one_line(failure)
        return row | {"ms": None, "tflops": None, "error": None, "reason": reason}
    seconds = statistics.median(times)
    flop = 4.0 * batch * tokens**2 * width
    return row | {"ms": seconds * 1e3, "tflops": flop / seconds / 1e12, "error": error, "reason": None}


def _time(call: Call, device: torch.device) -> list[float]:
    """Return the seconds of one call in each round: several in a row, on CUDA replayed from a recording."""
    count = REPEATS[device.type]

    def repeat() -> None:
        for _ in range(count):
            call()

    repeat()
    replay = record_call(repeat, device)
    return [time_call(replay, device) / count for _ in range(ROUNDS)]


def make_fp8_call(half: list[torch.Tensor]) -> Call:
    """Return a call that computes attention in FP8 with cuDNN's graph interface.

    Args:
        half: queries, keys and values, [B, 1, N, C], float16, on a GPU.

    Raises:
        Skipped: the package nvidia-cudnn-frontend is missing.
        Exception: cuDNN does not take these shapes.
    """
    if find_spec("cudnn") is None:
        raise Skipped("the package nvidia-cudnn-frontend is not installed")
    import cudnn  # type: ignore[import-not-found, unused-ignore]

    inputs = [tensor.to(torch.float8_e4m3fn).contiguous() for tensor in half]
    shape, strides = inputs[0].shape, inputs[0].stride()
    one = torch.ones(1, 1, 1, 1, device=half[0].device)
    handle = cudnn.create_handle()
    fp8, fp32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=fp8, intermediate_data_type=fp32, compute_data_type=fp32, handle=handle)
    nodes = [graph.tensor(dim=tuple(shape), stride=tuple(strides), data_type=fp8) for _ in inputs]
    names = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
    scales = {name: graph.tensor(dim=(1, 1, 1, 1), stride=(1, 1, 1, 1), data_type=fp32) for name in names}
    operands = dict(zip(("q", "k", "v"), nodes, strict=True))
    options = {"attn_scale": 1.0 / math.sqrt(shape[-1]), "use_causal_mask": False, "generate_stats": False}
    result, _, *largest = graph.sdpa_fp8(**operands, **scales, **options)
    result.set_output(True).set_dim(tuple(shape)).set_stride(tuple(strides)).set_data_type(fp8)
    for each in largest:
        each.set_output(True).set_dim((1, 1, 1, 1)).set_stride((1, 1, 1, 1)).set_data_type(fp32)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    out, unused = torch.empty_like(inputs[0]), [torch.empty_like(one) for _ in largest]
    memory = dict(zip(nodes, inputs, strict=True)) | dict.fromkeys(scales.values(), one)
    memory |= {result: out, **dict(zip(largest, unused, strict=True))}
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=one.device)

    def call() -> torch.Tensor:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(one.device).cuda_stream)
        graph.execute(memory, workspace, handle=handle)
        return out

    return call
