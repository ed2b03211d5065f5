"""ONNX Runtime against eager, and what it says when it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.errors import EngineError
from bsdiff_rt.runners import devices
from bsdiff_rt.runners.onnxruntime import OnnxRuntimeRunner
from bsdiff_rt.runners.registry import load_runner
from bsdiff_rt.sampling.cuda_graph import CapturedSampler
from bsdiff_rt.sampling.sampler import sample
from bsdiff_rt.sampling.schedule import sampler_table

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
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda graph, options, **more: seen.append(options.intra_op_num_threads) or real(graph, options, **more),
    )
    monkeypatch.setattr(devices, "_threads", None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    OnnxRuntimeRunner(bundle_copy / "denoiser.onnx", bundle_copy / "enhancer.onnx", SIZE, given)
    assert seen == [expected, expected]


def test_its_threads_rest_after_a_call(tiny_bundle):
    """Left alone they spin for some 30 ms, on the processors that whatever comes next runs on."""
    files = (tiny_bundle / f"{name}.onnx" for name in ("denoiser", "enhancer"))
    with OnnxRuntimeRunner(*files, SIZE, threads=3) as runner:
        x, out = images(2, 3)
        for _ in range(2):
            runner.enhance(x, out)
            before = time.process_time()
            time.sleep(0.1)
            assert time.process_time() - before < 0.01  # seen: 0.0002, and 0.05 when they spin


def test_threads_where_no_affinity_is_known(bundle_copy, monkeypatch):
    monkeypatch.setattr(devices, "_threads", None)
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS, Windows
    OnnxRuntimeRunner(bundle_copy / "denoiser.onnx", bundle_copy / "enhancer.onnx", SIZE)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_precisions_the_cpu_has_not(tiny_bundle, precision):
    with pytest.raises(EngineError, match=rf"runner onnxruntime computes in fp32 on cpu, not in {precision}"):
        OnnxRuntimeRunner(tiny_bundle / "denoiser.onnx", tiny_bundle / "enhancer.onnx", SIZE, precision=precision)


# --- CUDA, on a stand-in: what ONNX Runtime is asked for, with the CPU doing the work ---

CUDA = torch.device("cuda", 1)


class FakeStream:
    def __init__(self, handle):
        self.cuda_stream, self.waited = handle, []

    def wait_stream(self, other):
        self.waited.append(other)


class FakeSession:
    """A session that says it uses CUDA and uses the CPU; notes what it was made with and what was bound."""

    made: list  # of those of one test
    providers = ("CUDAExecutionProvider", "CPUExecutionProvider")
    real = onnxruntime.InferenceSession

    def __init__(self, graph, options, providers):
        self.asked, self.bound, self.run_options = providers, [], None
        self.graph = onnx.load(graph).graph
        self.session = FakeSession.real(graph, options, providers=["CPUExecutionProvider"])
        FakeSession.made.append(self)

    def get_providers(self):
        return list(self.providers)

    def io_binding(self):
        binding = self.session.io_binding()
        outer = self

        class Binding:
            def bind_input(self, name, device, index, *more):
                outer.bound.append((name, device, index))
                binding.bind_input(name, "cpu", 0, *more)

            def bind_output(self, name, device, index, *more):
                outer.bound.append((name, device, index))
                binding.bind_output(name, "cpu", 0, *more)

        Binding.real = binding
        return Binding()

    def run_with_iobinding(self, binding, run_options):
        self.run_options = run_options
        self.session.run_with_iobinding(binding.real, run_options)


@pytest.fixture
def fake_cuda(monkeypatch):
    """Makes torch and ONNX Runtime accept CUDA; `current` is the current stream, `own` one that is made."""

    class Fake:
        current, own = FakeStream(7), FakeStream(99)

    monkeypatch.setattr(FakeSession, "made", [], raising=False)
    monkeypatch.setattr(onnxruntime, "InferenceSession", FakeSession)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Fake.current)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Fake.own)
    return Fake


@pytest.fixture
def on_cuda(fake_cuda, tiny_bundle):
    """A runner on the stand-in, and its sessions; it takes buffers on the CPU after all."""

    def on_cuda(precision="fp32"):
        paths = tiny_bundle / "denoiser.onnx", tiny_bundle / "enhancer.onnx"
        runner = OnnxRuntimeRunner(*paths, SIZE, device=CUDA, precision=precision)
        assert (runner.device, runner.precision) == (CUDA, precision)
        runner.check = lambda *images, t=None: None
        return runner, FakeSession.made

    return on_cuda


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", "0"), ("fp16", "1")])
def test_what_a_cuda_session_is_asked_for(on_cuda, precision, tf32):
    _, sessions = on_cuda(precision)
    options = {"device_id": "1", "user_compute_stream": "7", "use_tf32": tf32, "enable_cuda_graph": "0"}
    assert [session.asked for session in sessions] == [[("CUDAExecutionProvider", options)]] * 2


def test_buffers_are_bound_on_the_device_and_nothing_waits(on_cuda, runners):
    runner, (denoiser, enhancer) = on_cuda()
    x_t, cxr, expected, actual = images(4, 2)
    t = torch.tensor([3.0, 999.0])
    runners[0].denoise(x_t, cxr, t, expected)
    runner.denoise(x_t, cxr, t, actual)
    assert_equal(actual, expected)
    assert denoiser.bound == [(name, "cuda", 1) for name in ("x_t", "cxr", "t", "out")]
    assert denoiser.run_options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
    runners[0].enhance(cxr, expected)
    runner.enhance(cxr, actual)
    assert_equal(actual, expected)
    assert enhancer.bound == [("x", "cuda", 1), ("out", "cuda", 1)]


def test_fp16_is_in_the_denoisers_graph(on_cuda, runners):
    runner, (denoiser, enhancer) = on_cuda("fp16")
    kinds = {tensor.name: tensor.data_type for tensor in denoiser.graph.initializer}
    assert kinds["down_blocks.0.downsampler.weight.fp16"] == onnx.TensorProto.FLOAT16
    assert onnx.TensorProto.FLOAT16 not in {tensor.data_type for tensor in enhancer.graph.initializer}
    x_t, cxr, expected, actual = images(4, 2)
    t = torch.tensor([3.0, 999.0])
    runners[0].denoise(x_t, cxr, t, expected)
    runner.denoise(x_t, cxr, t, actual)
    difference = float((actual - expected).abs().max() / expected.abs().max())
    assert 1e-5 < difference < 1e-2  # fp16 has 3.3 digits; see tests/test_onnx_precision.py


def test_streams_are_kept_in_order(on_cuda, fake_cuda):
    runner, _ = on_cuda()
    x, out = images(2, 1)
    built_on = fake_cuda.current
    runner.enhance(x, out)
    assert built_on.waited == []
    fake_cuda.current = later = FakeStream(8)
    runner.enhance(x, out)
    assert (built_on.waited, later.waited) == ([later], [built_on])


def test_on_the_default_stream_it_uses_its_own(on_cuda, fake_cuda, monkeypatch):
    monkeypatch.setattr(fake_cuda, "current", FakeStream(0))
    runner, sessions = on_cuda()
    assert sessions[0].asked[0][1]["user_compute_stream"] == "99"
    x, out = images(2, 1)
    runner.enhance(x, out)
    assert (fake_cuda.own.waited, fake_cuda.current.waited) == ([fake_cuda.current], [fake_cuda.own])


def test_bf16_on_cuda(on_cuda):
    with pytest.raises(EngineError, match=r"runner onnxruntime computes in fp32 or fp16 on cuda, not in bf16"):
        on_cuda("bf16")


def test_a_provider_that_was_not_used(on_cuda, monkeypatch):
    """What ONNX Runtime does without CUDA's libraries: it logs, and would compute on the CPU."""
    monkeypatch.setattr(FakeSession, "providers", ("CPUExecutionProvider",))
    with pytest.raises(EngineError, match=r"ONNX Runtime [\d.]+ cannot use CUDAExecutionProvider, only CPUExecution"):
        on_cuda()


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_without_cuda_nothing_falls_back(fake_cuda, tiny_bundle, monkeypatch):
    """The same with the real ONNX Runtime, on a machine without GPU."""
    monkeypatch.setattr(onnxruntime, "InferenceSession", FakeSession.real)
    paths = tiny_bundle / "denoiser.onnx", tiny_bundle / "enhancer.onnx"
    with pytest.raises(EngineError, match=r"cannot (use CUDAExecutionProvider, only CPUExecutionProvider|load it)"):
        OnnxRuntimeRunner(*paths, SIZE, device=CUDA)


@pytest.mark.slow
def test_nothing_is_sent_to_anybody(tmp_path):
    """ONNX Runtime's own packages queue what they run, and an identifier, in the user's cache, and send it."""
    code = "import sys; from bsdiff_rt.runners.onnxruntime import OnnxRuntimeRunner as R; from pathlib import Path; "
    code += "folder = Path(sys.argv[1]); R(folder / 'denoiser.onnx', folder / 'enhancer.onnx', 256).close()"
    asks_not = {"CI", "TF_BUILD", "GITHUB_ACTIONS", "ORT_DISABLE_TELEMETRY"}  # where the packages send nothing anyway
    environment = {name: value for name, value in os.environ.items() if name not in asks_not}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code, open_bundle("demo").folder], env=environment, check=True)
    assert not list(tmp_path.rglob("*"))


# --- CUDA itself ---


needs_cuda_provider = pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="this ONNX Runtime is for CPUs"
)


@pytest.mark.gpu
@needs_cuda_provider
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("fp16", 2e-2)])
def test_cuda_equals_eager(tiny_bundle, runners, precision, tolerance):
    """fp32: convolutions by other algorithms (Winograd) than on the CPU; fp16 as in tests/test_onnx_precision.py."""
    paths = tiny_bundle / "denoiser.onnx", tiny_bundle / "enhancer.onnx"
    x_t, cxr, expected, out = images(4, 2)
    t = torch.tensor([3.0, 999.0])
    side = torch.cuda.Stream()
    with OnnxRuntimeRunner(*paths, SIZE, device=torch.device("cuda"), precision=precision) as runner:
        for stream in (torch.cuda.current_stream(), side):
            with torch.cuda.stream(stream):
                results = [out.cuda().fill_(float("nan")) for _ in range(2)]
                runner.denoise(x_t.cuda(), cxr.cuda(), t.cuda(), results[0])
                runner.enhance(cxr.cuda(), results[1])
                actual = [result.cpu() for result in results]
            for result, call in zip(actual, ("denoise", "enhance"), strict=True):
                if call == "denoise":
                    runners[0].denoise(x_t, cxr, t, expected)
                else:
                    runners[0].enhance(cxr, expected)
                assert np.isfinite(result.numpy()).all()
                assert (result - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.gpu
@needs_cuda_provider
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_recorded_it_equals_the_plain_loop_bit_for_bit_on_a_gpu(tiny_bundle, precision):
    paths = tiny_bundle / "denoiser.onnx", tiny_bundle / "enhancer.onnx"
    table = sampler_table(open_bundle(tiny_bundle).manifest.schedule, "ddim", 20)
    device = torch.device("cuda", 0)
    cxr, other = images(1, 2)[0].to(device), images(1, 3)[0].to(device)

    def draw(number):
        return images(1, 2, seed=number)[0].pin_memory()

    with (
        torch.cuda.stream(torch.cuda.Stream(device)),
        OnnxRuntimeRunner(*paths, SIZE, device=device, precision=precision) as runner,
        CapturedSampler(runner) as captured,
    ):
        expected = sample(runner, cxr, table, draw)
        for _ in range(3):
            assert torch.equal(captured.sample(cxr, table, draw), expected)
            # Another batch on the same session between the replays: the recording keeps its memory.
            runner.denoise(other, other, torch.zeros(3, device=device), torch.empty_like(other))
