"""Write the graphs that engines are built from, for other tools and runtimes: trtexec, Polygraphy, Triton."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx

from bsdiff_rt.bundle import Bundle
from bsdiff_rt.config import Precision
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.runners.onnx_attention import simplify_attention
from bsdiff_rt.runners.onnx_precision import reduce_precision
from bsdiff_rt.runners.onnx_step import add_step
from bsdiff_rt.sampling.buffers import table_rows
from bsdiff_rt.sampling.schedule import sampler_table

ROWS = "rows.csv"


def save_graphs(bundle: Bundle, precision: Precision, folder: Path) -> list[Path]:
    """Write denoiser, enhancer and whole step as ONNX files with their weights, and the rows of the sampler.

    The step takes one row of rows.csv at a time: the bundle's own sampler, with columns t, P, Q, A, B, C, S.

    Args:
        bundle: the model.
        precision: of the denoiser. The enhancer stays fp32; its attention is fp16 unless the precision is fp32.
        folder: where to write. It is created.

    Returns:
        The files.

    Raises:
        SettingsError: the folder cannot be written, or one of the files exists.
        EngineError: a graph has an operator without a rule for the precision.
    """
    names = ("denoiser.onnx", "enhancer.onnx", "step.onnx", ROWS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            if (folder / name).exists():
                raise SettingsError(f"{folder / name} exists. Choose another folder.", setting="save_onnx")
        with tempfile.TemporaryDirectory(dir=folder) as work:
            for network in ("denoiser", "enhancer"):
                _convert(bundle.file(f"{network}.onnx"), Path(work) / f"{network}.onnx", precision)
            step = onnx.load(Path(work) / "denoiser.onnx")
            add_step(step)
            onnx.save(step, Path(work) / "step.onnx")
            manifest = bundle.manifest
            rows = table_rows(sampler_table(manifest.schedule, manifest.sampler.name, manifest.sampler.steps))
            np.savetxt(Path(work) / ROWS, rows.numpy(), delimiter=",", header="t,P,Q,A,B,C,S", comments="")
            for name in names:
                (Path(work) / name).rename(folder / name)
    except OSError as error:
        raise SettingsError(f"{folder} cannot be written ({error.strerror})", setting="save_onnx") from error
    return [folder / name for name in names]


def _convert(graph: Path, destination: Path, precision: Precision) -> None:
    if precision == "fp32":
        model = onnx.load(graph)
        simplify_attention(model)
        onnx.save(model, destination)
    elif graph.stem == "denoiser":
        reduce_precision(graph, destination, precision, softmax_fp32=precision == "fp16")
    else:
        reduce_precision(graph, destination, "fp16", softmax_fp32=True, attention_only=True)
