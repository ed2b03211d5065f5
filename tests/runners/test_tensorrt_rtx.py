"""Real plans: TensorRT for RTX builds them without a GPU. What runs them is not here.

The memory that a plan needs shows whether attention is fused: unfused, the score of every pair of pixels is stored.
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys

import onnx
import pytest
import torch
from helpers import put_channels_first
from onnx import TensorProto, helper

from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.config import PRESETS, EngineOptions
from bsdiff_rt.errors import EngineError
from bsdiff_rt.networks.blocks import SelfAttention
from bsdiff_rt.runners.onnx_precision import reduce_precision

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed", exc_type=ImportError)

from bsdiff_rt.runners import tensorrt, tensorrt_rtx
from bsdiff_rt.runners.tensorrt_builder import _plan, make_monitor
from bsdiff_rt.runners.tensorrt_library import RTX

CPU = torch.device("cpu")
MIB = 2**20
CARD = ("8.9",)
WIDTHS = PRESETS["paper"].denoiser.channels[1:]  # attention at all levels but the first


def ignore(phase, share):
    """A progress that nobody reads."""


def build_graph(graph, batch, progress=ignore, precision="fp16"):
    """Build the plan of a graph for one kind of card."""
    options = EngineOptions("tensorrt-rtx", precision, batch, CARD)
    return _plan(RTX, graph, options, True, CPU, make_monitor(RTX.trt, "block", progress))


@pytest.fixture
def measure(caplog):
    """Build a graph, and return the working memory of its plan in bytes."""

    def measure(graph, batch):
        caplog.clear()
        caplog.set_level(logging.DEBUG, "bsdiff_rt")
        build_graph(graph, batch)
        (found,) = re.findall(r"Max Scratch Memory: (\d+) bytes", caplog.text)
        return int(found)

    return measure


@pytest.fixture(scope="module")
def export_block(tmp_path_factory):
    """Write one attention block of the paper's network as a bundle holds it."""
    from export.graphs import export_graph

    def export(width):
        folder = tmp_path_factory.mktemp("block")
        side = 256 >> PRESETS["paper"].denoiser.channels.index(width)
        network, image = SelfAttention(width, 32).eval(), torch.zeros(2, width, side, side)
        export_graph(network, {"x": image}, folder / "net.safetensors", folder / "net.onnx")
        return folder / "net.onnx"

    return export


@pytest.mark.slow
@pytest.mark.parametrize(("width", "one", "four"), list(zip(WIDTHS, (26, 17, 20, 12), (130, 66, 46, 22), strict=True)))
def test_attention_is_fused_at_every_width(export_block, measure, tmp_path, width, one, four):
    """`one` and `four` are the most MiB at batches of 1 and 4. Unfused, a width of 128 takes 1045 and 4170."""
    graph = export_block(width)
    graphs = {kind: tmp_path / f"{kind}.onnx" for kind in ("plain", "softmax_fp32", "old")}
    reduce_precision(graph, graphs["plain"], "fp16")
    reduce_precision(graph, graphs["softmax_fp32"], "fp16", softmax_fp32=True)
    for reduced in (graphs["plain"], graphs["softmax_fp32"]):
        assert measure(reduced, (1, 1)) <= one * MIB
        assert measure(reduced, (1, 4)) <= four * MIB
    old = onnx.load(graph, load_external_data=False)  # a bundle of before: the channels move first
    assert put_channels_first(old) == 1
    onnx.save(old, graph.with_name("old.onnx"))
    reduce_precision(graph.with_name("old.onnx"), graphs["old"], "fp16")
    assert measure(graphs["old"], (1, 1)) <= one * MIB


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS[:1])
def test_attention_alone_in_fp16_is_fused(export_block, measure, tmp_path, width):
    """The enhancer is like this."""
    reduce_precision(export_block(width), tmp_path / "out.onnx", "fp16", softmax_fp32=True, attention_only=True)
    assert measure(tmp_path / "out.onnx", (1, 1)) <= 100 * MIB  # in fp32 2.2 GB


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_demo_model(tmp_path, precision):
    heard = []
    options = EngineOptions("tensorrt-rtx", precision, (1, 4), ("8.9", "12.0"))
    bundle = open_bundle("demo")
    used = tensorrt_rtx.build(bundle, options, CPU, tmp_path, lambda *phase: heard.append(phase))
    assert used["softmax_fp32"] == (precision == "fp16")
    stored = {name: (bundle.folder / f"{name}.safetensors").stat().st_size for name in ("denoiser", "enhancer")}  # fp32
    weights = {"fp32": 1, "fp16": 0.5, "bf16": 0.5}[precision] * 0.96 * stored["denoiser"]  # with names and padding
    assert weights < (tmp_path / "denoiser.plan").stat().st_size < 6 * weights
    assert (tmp_path / "enhancer.plan").stat().st_size > 0.96 * stored["enhancer"]
    assert all(share is None or 0 <= share <= 1 for _, share in heard)
    names = [phase.split(":")[0] for phase, _ in heard]
    assert names == sorted(names)  # denoiser, then enhancer
    assert max(share for phase, share in heard if share is not None and phase.startswith("enhancer")) == 1.0


def save(path, nodes, weights=()):
    """Write a graph x -> out of 1 channel and 64 px."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1, 64, 64]) for name in ("x", "out")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializer=list(weights))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    return path


def test_an_operator_that_it_does_not_know(tmp_path):
    graph = save(tmp_path / "g.onnx", [helper.make_node("Abacus", ["x"], ["out"], name="count")])
    with pytest.raises(EngineError, match=r"^g\.onnx: TensorRT-RTX 1\S+ cannot read it: Abacus count: ") as refused:
        build_graph(graph, (1, 1))
    assert "\n" not in str(refused.value)


def test_types_that_do_not_fit(tmp_path):
    """Nothing is converted silently."""
    half = helper.make_tensor("half", TensorProto.FLOAT16, [1], [1.0])
    graph = save(tmp_path / "g.onnx", [helper.make_node("Add", ["x", "half"], ["out"], name="sum")], [half])
    with pytest.raises(EngineError, match=r"^g\.onnx: TensorRT-RTX 1\S+ cannot (read it|build an engine)") as refused:
        build_graph(graph, (1, 1))
    assert "\n" not in str(refused.value)


def test_batches_that_the_graph_does_not_take(tmp_path):
    graph = save(tmp_path / "g.onnx", [helper.make_node("Relu", ["x"], ["out"])])
    with pytest.raises(EngineError, match=r"^g\.onnx: TensorRT-RTX refuses batches of 4 to 1"):
        build_graph(graph, (4, 1))


def test_what_progress_raises_ends_the_build(tmp_path):
    def stop(phase, share):
        raise KeyboardInterrupt

    graph = save(tmp_path / "g.onnx", [helper.make_node("Relu", ["x"], ["out"])])
    with pytest.raises(KeyboardInterrupt):
        build_graph(graph, (1, 1), stop)


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.config import EngineOptions
import torch
from bsdiff_rt.runners import tensorrt_rtx
heard = []

def progress(phase, share):
    heard.append(phase)
    if len(heard) == 2:
        os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start with it ignored
folder = Path(sys.argv[1])
try:
    tensorrt_rtx.build(
        open_bundle("demo"),
        EngineOptions("tensorrt-rtx", "fp32", (1, 1), ("8.9",)),
        torch.device("cpu"),
        folder,
        progress,
    )
except KeyboardInterrupt:
    print("interrupted", {phase.split(":")[0] for phase in heard}, list(folder.iterdir()))
"""


@pytest.mark.slow
def test_an_interruption_ends_the_build(tmp_path):
    """In a process of its own: the signal comes while the builder works, and TensorRT is told at its next step."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["interrupted {'denoiser'} []"], done.stdout + done.stderr


def test_cards_that_it_does_not_build_for(tmp_path):
    options = EngineOptions("tensorrt-rtx", "fp16", (1, 1), ("9.0",))
    expected = r"TensorRT-RTX does not build for compute capability 9\.0\. It builds for 7\.5, 8\.0, 8\.6, 8\.9, 12\.0"
    with pytest.raises(EngineError, match=expected):
        tensorrt_rtx.build(open_bundle("demo"), options, CPU, tmp_path, ignore)
    with pytest.raises(
        EngineError, match=r"TensorRT does not build for .* 8\.9\. It builds only for this machine's GPU"
    ):
        tensorrt.build(open_bundle("demo"), EngineOptions("tensorrt", "fp16", (1, 1), CARD), CPU, tmp_path, ignore)


def test_versions():
    assert set(tensorrt_rtx.list_versions()) == {"tensorrt-rtx", "torch", "cuda"}
    assert str(RTX) == f"TensorRT-RTX {RTX.trt.__version__}"
