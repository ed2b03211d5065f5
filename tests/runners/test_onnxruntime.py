"""ONNX Runtime against eager, and what it says when it cannot."""

from __future__ import annotations

import os

import pytest
import torch

from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.errors import EngineError
from bsdiff_rt.runners import load_runner
from bsdiff_rt.runners.onnxruntime import OnnxRuntimeRunner

SIZE = 64
CPU = torch.device("cpu")
# Of the largest output. Both compute in fp32 with sums in another order; seen: 3e-6 over the tiny networks.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def runners(tiny_bundle):
    bundle = open_bundle(tiny_bundle)
    with load_runner(bundle, "eager", CPU) as eager, load_runner(bundle, "onnxruntime", CPU) as candidate:
        yield eager, candidate


def images(count, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, batch, 1, SIZE, SIZE, generator=generator).clamp(-1, 1)


def assert_equal(actual, expected):
    assert expected.abs().max() > 0.01  # a comparison of zeros proves nothing
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("time", [0, 1, 500, 999])
def test_denoiser_equals_eager(runners, batch, time):
    x_t, cxr, expected, actual = images(4, batch)
    t = torch.full((batch,), float(time))
    for runner, out in zip(runners, (expected, actual), strict=True):
        out.fill_(float("nan"))
        runner.denoise(3 * x_t, cxr, t, out)
    assert_equal(actual, expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_enhancer_equals_eager(runners, batch):
    x, expected, actual = images(3, batch)
    for runner, out in zip(runners, (expected, actual), strict=True):
        out.fill_(float("nan"))
        runner.enhance(x, out)
    assert_equal(actual, expected)


def test_timesteps_may_differ_within_a_batch(runners):
    x_t, cxr, expected, actual = images(4, 3)
    t = torch.tensor([0.0, 400.0, 999.0])
    for runner, out in zip(runners, (expected, actual), strict=True):
        runner.denoise(x_t, cxr, t, out)
    assert_equal(actual, expected)
    other = torch.empty_like(actual)
    runners[1].denoise(x_t, cxr, torch.zeros(3), other)
    assert torch.equal(other[0], actual[0])
    assert not torch.equal(other[1:], actual[1:])


def test_the_callers_buffers_are_used(runners):
    """Nothing is copied: a slice of a larger buffer is filled where it lies, and inputs stay."""
    cxr, *_ = images(1, 3)
    before, large = cxr.clone(), torch.full((5, 1, SIZE, SIZE), 7.0)
    runners[1].enhance(cxr, large[1:4])
    assert torch.equal(cxr, before)
    assert (large[0] == 7).all()
    assert (large[4] == 7).all()
    assert not (large[1:4] == 7).any()


def test_the_same_call_gives_the_same_bits(runners):
    x, first, second = images(3, 3)
    runners[1].enhance(x, first)
    runners[1].enhance(x, second)
    assert torch.equal(first, second)


def test_what_it_says_of_itself(runners):
    runner = runners[1]
    assert isinstance(runner, OnnxRuntimeRunner)
    assert (runner.name, runner.precision, runner.image_size) == ("onnxruntime", "fp32", SIZE)
    assert (runner.device, runner.batch_range) == (CPU, (1, None))


@pytest.mark.parametrize("wrong", [torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, SIZE, SIZE).double()])
def test_buffers_it_cannot_use(runners, wrong):
    good = torch.zeros(1, 1, SIZE, SIZE)
    with pytest.raises(EngineError, match="given to the onnxruntime runner"):
        runners[1].enhance(wrong, good)
    with pytest.raises(EngineError, match="given to the onnxruntime runner"):
        runners[1].enhance(good, wrong)
    with pytest.raises(EngineError, match="given to the onnxruntime runner"):
        runners[1].denoise(good, wrong, torch.zeros(1), good.clone())


@pytest.mark.parametrize("t", [torch.zeros(1).double(), torch.zeros(2), torch.zeros(1, 1)])
def test_timesteps_it_cannot_use(runners, t):
    good = torch.zeros(1, 1, SIZE, SIZE)
    with pytest.raises(EngineError, match=r"t (of .* )?given to the onnxruntime runner"):
        runners[1].denoise(good, good, t, good.clone())


@pytest.mark.parametrize("content", [None, b"", b"no graph"])
def test_a_graph_it_cannot_load(bundle_copy, content):
    graph = bundle_copy / "enhancer.onnx"
    graph.unlink() if content is None else graph.write_bytes(content)
    with pytest.raises(EngineError, match=r"enhancer\.onnx: ONNX Runtime [\d.]+ cannot load it: "):
        OnnxRuntimeRunner(bundle_copy / "denoiser.onnx", graph, SIZE)


def test_weights_that_are_missing(bundle_copy):
    (bundle_copy / "denoiser.safetensors").unlink()
    with pytest.raises(EngineError, match=r"denoiser\.onnx: ONNX Runtime [\d.]+ cannot load it: "):
        OnnxRuntimeRunner(bundle_copy / "denoiser.onnx", bundle_copy / "enhancer.onnx", SIZE)


def test_a_failure_inside_is_a_runtime_error(bundle_copy):
    runner = OnnxRuntimeRunner(bundle_copy / "denoiser.onnx", bundle_copy / "enhancer.onnx", 32)
    with pytest.raises(RuntimeError, match="invalid dimensions"):
        runner.enhance(*torch.zeros(2, 1, 1, 32, 32))  # the graph is for 64 px


@pytest.mark.parametrize(("given", "expected"), [(None, 3), (2, 2), (1, 1)])
def test_threads(bundle_copy, monkeypatch, given, expected):
    seen = []
    import onnxruntime

    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda graph, options, **more: seen.append(options.intra_op_num_threads) or real(graph, options, **more),
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    OnnxRuntimeRunner(bundle_copy / "denoiser.onnx", bundle_copy / "enhancer.onnx", SIZE, given)
    assert seen == [expected, expected]


def test_threads_where_no_affinity_is_known(bundle_copy, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS, Windows
    OnnxRuntimeRunner(bundle_copy / "denoiser.onnx", bundle_copy / "enhancer.onnx", SIZE)
