"""OpenVINO against eager, its cache, its devices, and what it says when it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.config import EngineOptions
from bsdiff_rt.engines.build import build_engine, resolve_options
from bsdiff_rt.engines.manifest import Speed, read_engine
from bsdiff_rt.engines.select import RunnerRequest, choose
from bsdiff_rt.errors import EngineError
from bsdiff_rt.imaging.metrics import psnr
from bsdiff_rt.runners.registry import RUNNERS, load_runner
from bsdiff_rt.sampling.sampler import sample
from bsdiff_rt.sampling.schedule import sampler_table

ov = pytest.importorskip("openvino", reason="openvino is not installed")

from bsdiff_rt.runners import openvino as module  # noqa: E402 - it imports openvino
from bsdiff_rt.runners.openvino import OpenVinoRunner, locate_model_cache  # noqa: E402

SIZE = 64
CPU = torch.device("cpu")
TOLERANCE = 1e-4  # of the largest output; both compute in fp32 with sums in another order
CAPABILITIES = module.get_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
HALF = [
    pytest.param(
        precision,
        largest,
        marks=pytest.mark.skipif(capability not in CAPABILITIES, reason=f"no {precision} on this processor"),
    )
    for precision, capability, largest in (("bf16", "BF16", 5e-2), ("fp16", "FP16", 1e-2))
]


@pytest.fixture(scope="module")
def runners(tiny_bundle):
    bundle = open_bundle(tiny_bundle)
    with load_runner(bundle, "eager", CPU) as eager, load_runner(bundle, "openvino", CPU) as candidate:
        yield eager, candidate


@pytest.fixture
def load(bundle_copy):
    """Loads the copy of the tiny bundle."""
    bundle = open_bundle(bundle_copy)

    def load(precision="fp32", **options):
        return module.load_bundle(bundle, CPU, precision, **options)

    return load


def images(count, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, batch, 1, SIZE, SIZE, generator=generator).clamp(-1, 1)


def assert_equal(actual, expected, tolerance=TOLERANCE):
    assert expected.abs().max() > 0.01  # a comparison of zeros proves nothing
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("time", [0, 500, 999])
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


@pytest.mark.parametrize(("precision", "tolerance"), HALF)
def test_half_precision(runners, load, precision, tolerance):
    x_t, cxr, expected, actual, other = images(5, 2)
    t = torch.tensor([3.0, 998.0])
    runners[0].denoise(x_t, cxr, t, expected)
    with load(precision=precision) as runner:
        assert runner.precision == precision
        runner.denoise(x_t, cxr, t, actual)
        assert_equal(actual, expected, tolerance)
        assert not torch.equal(actual, expected)
        # Neighbouring timesteps: OpenVINO's own conversion rounds 998 and 999 to the same number.
        runner.denoise(x_t, cxr, t + 1, other)
        assert not torch.equal(other[1], actual[1])
        runners[0].enhance(cxr, expected)
        runner.enhance(cxr, actual)
        assert_equal(actual, expected)  # the enhancer stays fp32


PICTURES = [("fp32", 80), *(pytest.param(it.values[0], 45, marks=it.marks) for it in HALF)]


@pytest.mark.parametrize(("precision", "limit_db"), PICTURES)
def test_whole_pictures_pass_the_gates_limits(load, runners, bundle_copy, precision, limit_db):
    table = sampler_table(open_bundle(bundle_copy).manifest.schedule, "ddim", 10)
    cxr = images(1, 2)[0]

    def draw(number):
        return images(1, 2, seed=number)[0]

    with load(precision=precision) as runner:
        expected, actual = (sample(each, cxr, table, draw).numpy() for each in (runners[0], runner))
    assert psnr(expected, actual, 2.0) > limit_db


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
    assert isinstance(runner, OpenVinoRunner)
    assert (runner.name, runner.precision, runner.image_size) == ("openvino", "fp32", SIZE)
    assert (runner.device, runner.batch_range) == (CPU, (1, None))


@pytest.mark.parametrize("wrong", [torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, SIZE, SIZE).double()])
def test_buffers_it_cannot_use(runners, wrong):
    good = torch.zeros(1, 1, SIZE, SIZE)
    with pytest.raises(EngineError, match="given to the openvino runner"):
        runners[1].enhance(wrong, good)
    with pytest.raises(EngineError, match="given to the openvino runner"):
        runners[1].denoise(good, wrong, torch.zeros(1), good.clone())


@pytest.mark.parametrize("content", [None, b"", b"no graph"])
def test_a_graph_it_cannot_load(load, bundle_copy, content):
    graph = bundle_copy / "enhancer.onnx"
    graph.unlink() if content is None else graph.write_bytes(content)
    with pytest.raises(EngineError, match=r"enhancer\.onnx: OpenVINO [\d.]+\S* cannot load it: "):
        load()


def test_weights_that_are_missing(load, bundle_copy):
    (bundle_copy / "denoiser.safetensors").unlink()
    with pytest.raises(EngineError, match=r"denoiser\.onnx: OpenVINO [\d.]+\S* cannot load it: "):
        load()


def test_compiled_models_are_kept(load, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    x, first, second = images(3, 1)
    with load() as runner:
        runner.enhance(x, first)
    kept = {path: path.stat().st_mtime_ns for path in locate_model_cache().iterdir()}
    assert len(kept) == 2
    assert locate_model_cache().stat().st_mode & 0o777 == 0o700
    with load() as runner:
        runner.enhance(x, second)
    assert {path: path.stat().st_mtime_ns for path in locate_model_cache().iterdir()} == kept
    assert torch.equal(first, second)


def test_without_a_place_for_the_cache_it_runs_all_the_same(load, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "below"))
    x, out = images(2, 1)
    with load() as runner:
        runner.enhance(x, out)
    assert out.isfinite().all()


def test_other_weights_are_not_taken_from_the_cache(load, bundle_copy, monkeypatch, tmp_path):
    """The cache goes by content: the same graph with other weights beside it is compiled again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    x, first, second = images(3, 1)
    with load() as runner:
        runner.enhance(x, first)
    weights = bundle_copy / "enhancer.safetensors"
    content, status = bytearray(weights.read_bytes()), weights.stat()
    content[-400:] = bytes(400)
    weights.write_bytes(content)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    with load() as runner:
        runner.enhance(x, second)
    assert not torch.equal(first, second)


def test_a_device_that_is_not_here(load, monkeypatch):
    monkeypatch.setenv(module.DEVICE_VARIABLE, "GPU.7")
    problem = RUNNERS["openvino"].find_problem(CPU)
    assert problem is not None
    assert problem.startswith("OpenVINO has no device GPU.7 here, only CPU")
    assert problem.endswith("Change BSDIFF_RT_OPENVINO_DEVICE")
    with pytest.raises(EngineError, match=r"OpenVINO has no device GPU\.7 here"):
        load()


class FakeCore:
    """An OpenVINO with an Intel GPU, which computes in fp32 and fp16. The processor does its work."""

    available_devices = ("CPU", "GPU")
    options: list  # of every network compiled

    def __init__(self):
        self.real = ov.Core()

    def get_property(self, device, name):
        return {"OPTIMIZATION_CAPABILITIES": ["FP32", "FP16", "INT8"], "FULL_DEVICE_NAME": "Intel Arc"}[name]

    def read_model(self, graph):
        return self.real.read_model(graph)

    def compile_model(self, model, device, options):
        FakeCore.options.append((device, options))
        return self.real.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def test_an_intel_gpu(load, runners, monkeypatch, tmp_path):
    monkeypatch.setenv(module.DEVICE_VARIABLE, "GPU")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    core = FakeCore()
    monkeypatch.setattr(module, "get_core", lambda: core)
    monkeypatch.setattr(FakeCore, "options", [], raising=False)
    assert RUNNERS["openvino"].find_problem(CPU) is None
    x_t, cxr, expected, actual = images(4, 1)
    t = torch.tensor([999.0])
    with load(precision="fp16") as runner:
        runner.denoise(x_t, cxr, t, actual)
    runners[0].denoise(x_t, cxr, t, expected)
    assert_equal(actual, expected)
    common = {"PERFORMANCE_HINT": "LATENCY", "CACHE_DIR": str(tmp_path / "cache" / "bsdiff-rt" / "openvino")}
    hints = ("f16", "f32")  # the enhancer stays fp32
    assert core.options == [("GPU", common | {"INFERENCE_PRECISION_HINT": hint}) for hint in hints]
    with pytest.raises(EngineError, match="OpenVINO computes in fp32 or fp16 on this GPU, not in bf16"):
        load(precision="bf16")


SIGNAL_AFTER_TWO = """
import gc, signal, sys
from pathlib import Path
import torch
from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.runners.registry import RUNNERS, load_runner

signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
import faulthandler
faulthandler.enable()  # gives the thread a stack for signals, as a test run does
bundle, cpu = open_bundle(Path(sys.argv[1])), torch.device("cpu")
first = load_runner(bundle, "openvino", cpu)
second = load_runner(bundle, "openvino", cpu)
for each in (first, second):
    each.close()
del first, second, each
gc.collect()
signal.raise_signal(signal.SIGUSR1)
"""


def test_signals_are_handled_after_two_runners(tiny_bundle):
    done = subprocess.run(
        [sys.executable, "-c", SIGNAL_AFTER_TWO, str(tiny_bundle)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_threads(load, monkeypatch):
    seen = []
    real = module._list_options
    monkeypatch.setattr(module, "_list_options", lambda *given: seen.append(real(*given)) or seen[-1])
    load(threads=1)
    assert [options["INFERENCE_NUM_THREADS"] for options in seen] == [1, 1]


def test_its_threads_rest_after_a_call(load):
    with load(threads=3) as runner:
        x, out = images(2, 3)
        for _ in range(2):
            runner.enhance(x, out)
            before = time.process_time()
            time.sleep(0.1)
            assert time.process_time() - before < 0.03


def test_without_an_engine_auto_does_not_take_it(tiny_bundle):
    """No parity gate has compared it. A precision that only OpenVINO has here must be asked for with its name."""
    bundle = open_bundle(tiny_bundle)
    assert choose(RunnerRequest(bundle, "auto", CPU)).runner == "onnxruntime"
    with pytest.raises(EngineError, match="no runner can be used in precision bf16 here"):
        choose(RunnerRequest(bundle, "auto", CPU, "bf16"))
    named = choose(RunnerRequest(bundle, "openvino", CPU, "bf16"))
    assert (named.runner, named.precision, named.engine) == ("openvino", "bf16", None)


@pytest.fixture
def build(tiny_bundle, monkeypatch, cache):
    """Builds an engine of the tiny bundle into the cache; `ratio` is the speed that is measured."""

    def build(precision="fp32", batch=(1, 3), ratio=2.0):
        speed = Speed(batch[0], 1.0, "onnxruntime", ratio, ratio)
        monkeypatch.setattr("bsdiff_rt.engines.build._time_beside", lambda *_: speed)
        return build_engine(
            open_bundle(tiny_bundle), EngineOptions("openvino", precision, batch), CPU, None, lambda *_: None
        )

    return build


@pytest.mark.parametrize("batch", [(1, 3), (2, 2)])
def test_an_engine_equals_eager(runners, build, batch):
    engine = read_engine(build(batch=batch))
    assert set(engine.manifest.files) == {"denoiser.blob", "enhancer.blob"}
    x_t, cxr, expected, actual = images(4, 2)
    t = torch.tensor([0.0, 999.0])
    with engine.load(CPU) as runner:
        assert (runner.name, runner.precision, runner.batch_range) == ("openvino", "fp32", batch)
        for each, out in ((runners[0], expected), (runner, actual)):
            each.denoise(x_t, cxr, t, out)
        assert_equal(actual, expected)
        for each, out in ((runners[0], expected), (runner, actual)):
            each.enhance(cxr, out)
        assert_equal(actual, expected)


@pytest.mark.parametrize(("precision", "tolerance"), HALF)
def test_an_engine_in_half_precision(runners, build, precision, tolerance):
    engine = read_engine(build(precision))
    x_t, cxr, expected, actual = images(4, 2)
    t = torch.tensor([3.0, 998.0])
    with engine.load(CPU) as runner:
        runners[0].denoise(x_t, cxr, t, expected)
        runner.denoise(x_t, cxr, t, actual)
    assert_equal(actual, expected, tolerance)


@pytest.mark.parametrize(("ratio", "taken"), [(1.1, "openvino"), (0.9, "onnxruntime")])
def test_auto_takes_an_engine_that_is_faster(tiny_bundle, build, ratio, taken):
    folder = build(ratio=ratio)
    bundle = open_bundle(tiny_bundle)
    assert choose(RunnerRequest(bundle, "auto", CPU)).runner == taken
    assert choose(RunnerRequest(bundle, "openvino", CPU)).engine.folder == folder
    assert choose(RunnerRequest(bundle, "openvino", CPU, "fp16")).engine is None  # none in fp16: from the bundle


def test_an_engine_for_another_device_is_not_taken(tiny_bundle, build, monkeypatch):
    build()
    monkeypatch.setattr(module, "list_versions", lambda: {"openvino": ov.get_version(), "openvino device": "Intel Arc"})
    choice = choose(RunnerRequest(open_bundle(tiny_bundle), "auto", CPU))
    assert choice.runner == "onnxruntime"
    assert "version of openvino device: built for " in choice.why


@pytest.mark.parametrize("content", [b"", b"no model"])
def test_an_engine_it_cannot_load(build, content):
    engine = read_engine(build())
    (engine.folder / "enhancer.blob").write_bytes(content)
    with pytest.raises(EngineError, match=r"enhancer\.blob: OpenVINO [\d.]+\S* cannot load it"):
        engine.load(CPU)


def test_build_engine_takes_it_only_when_named(tiny_bundle):
    """It also runs without an engine, and in fp32, the default precision, an engine gains nothing."""
    assert resolve_options(open_bundle(tiny_bundle), CPU).runner == "aoti"
    assert resolve_options(open_bundle(tiny_bundle), CPU, "openvino", "bf16").runner == "openvino"


@pytest.mark.slow
def test_nothing_is_sent_to_anybody(tmp_path):
    """OpenVINO's package for telemetry would note an identifier in the home folder."""
    code = (
        "import torch; from bsdiff_rt.bundle import open_bundle; from bsdiff_rt.runners.openvino import load_bundle; "
    )
    code += "load_bundle(open_bundle('demo'), torch.device('cpu'), 'fp32').close()"
    environment = os.environ | {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"bsdiff-rt"}
