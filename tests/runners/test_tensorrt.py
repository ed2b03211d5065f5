"""What the TensorRT runner does with TensorRT's answers, on a stand-in (tensorrt_contract/fake.py).

TensorRT itself is not here: these tests say nothing about its engines. Those marked `tensorrt` do. What the builder of
TensorRT for RTX, which runs here, can be made to do is tested there (test_tensorrt_rtx.py).
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import sys
from pathlib import Path

import onnx
import platformdirs
import pytest
import tensorrt_contract
import torch
from tensorrt_contract import fake

from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.config import EngineOptions
from bsdiff_rt.errors import EngineError

SIZE = 64
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
MODULES = tuple(f"bsdiff_rt.runners.tensorrt{part}" for part in ("_library", "_builder", "_kernels", ""))


class FakeStream:
    """A CUDA stream that notes whom it waits for."""

    def __init__(self, handle):
        self.cuda_stream, self.waited = handle, []

    def wait_stream(self, other):
        self.waited.append(other)


class FakeCuda:
    """What the runner asks of torch.cuda."""

    def __init__(self, monkeypatch):
        self.current, self.own, self.recording, self.synchronised = FakeStream(7), FakeStream(99), False, 0
        monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self.current)
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: self.own)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.recording)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronise)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Some/GPU 1")
        self.free, self.reserved, self.allocated = 10**9, 0, 0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (self.free, 2 * 10**9))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: self.reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: self.allocated)

    def synchronise(self, _):
        self.synchronised += 1


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


@pytest.fixture
def load(monkeypatch, cuda, tmp_path):
    """Imports the runner's module with a stand-in for TensorRT of the given version; gives both and the recorder."""

    def load(version="11.4.0.106"):
        module, recorder = fake.make(version)
        for name in MODULES:
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        monkeypatch.setattr(platformdirs, "user_cache_path", lambda name, appauthor: tmp_path / "cache")
        runner = importlib.import_module(MODULES[-1])
        assert isinstance(runner.TENSORRT.logger, module.ILogger)
        return runner, recorder

    yield load
    for name in MODULES:  # bound to the stand-in
        sys.modules.pop(name, None)
        if hasattr(sys.modules["bsdiff_rt.runners"], name.rpartition(".")[2]):
            delattr(sys.modules["bsdiff_rt.runners"], name.rpartition(".")[2])


@pytest.fixture
def build(load, tiny_bundle, tmp_path):
    """Builds the tiny bundle; gives options, recorder and what progress was told."""

    def build(precision="fp16", batch=(1, 4), version="11.4.0.106", fails=(), progress=None, device=CUDA):
        _, recorder = load(version)
        recorder.fails = set(fails)
        folder, heard = tmp_path / "engine", []
        folder.mkdir(exist_ok=True)
        options = EngineOptions("tensorrt", precision, batch)
        tell = progress or (lambda phase, share: heard.append((phase, share)))
        return sys.modules[MODULES[-1]].build(open_bundle(tiny_bundle), options, device, folder, tell), recorder, heard

    return build


@pytest.fixture
def runner(load, tmp_path):
    """A runner on two plans, and the recorder."""

    def runner(fails=(), names=(["x_t", "cxr", "t", "out"], ["x", "out"]), batch_range=(1, 4), compiles_later=False):
        module, recorder = load()
        module.TENSORRT.compiles_later = compiles_later
        for name, tensors in zip(("denoiser", "enhancer"), names, strict=True):
            if tensors is not None:
                (tmp_path / f"{name}.plan").write_text(str(tensors).replace("'", '"'))
        recorder.fails = set(fails)
        made = module.load_engine(tmp_path, device=CPU, precision="fp16", batch_range=batch_range, image_size=SIZE)
        return made, recorder

    return runner


def aligned(*shape, fill=None, offset=0):
    """A float32 buffer at a multiple of 256 bytes, as torch gives on CUDA, or `offset` floats after one."""
    count = int(torch.Size(shape).numel())
    room = torch.zeros(count + 128)
    first = -room.data_ptr() // 4 % 64 + offset
    buffer = room[first : first + count].view(shape)
    assert buffer.data_ptr() % 256 == 4 * offset
    return buffer if fill is None else buffer.fill_(fill)


def images(batch):
    """x_t, cxr, t, out."""
    shape = (batch, 1, SIZE, SIZE)
    return aligned(*shape, fill=1.0), aligned(*shape, fill=2.0), aligned(batch, fill=300.0), aligned(*shape)


# --- the stand-in is no wider than the bindings ---


def test_the_stand_in_has_nothing_that_the_bindings_have_not():
    (recorded,) = Path(next(iter(tensorrt_contract.__path__))).glob("declarations-10.*.txt")
    declared = {
        node.name: {getattr(item, "name", None) or ast.unparse(getattr(item, "target", item)) for item in node.body}
        for node in ast.parse(recorded.read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    module, _ = fake.make()
    ours = {"names", "shapes", "addresses", "inputs", "content", "network", "ready"}  # the stand-in's own state
    checked = 0
    for name, kind in vars(module).items():
        if isinstance(kind, type):
            members = {member for member in vars(kind) if not member.startswith("_")} - ours
            assert members <= declared[name], f"{name}: {members - declared[name]}"
            checked += len(members)
    assert checked > 40


# --- build ---


def test_build(build, tiny_bundle, tmp_path):
    options, recorder, heard = build()
    assert options == {
        "conversion": 3,
        "enhancer": "tf32 with fp16 attention",
        "max_aux_streams": 0,
        "optimization_level": 3,
        "softmax_fp32": True,
    }
    assert (tmp_path / "engine/denoiser.plan").read_bytes() == b'["x_t", "cxr", "t", "out"]'
    assert (tmp_path / "engine/enhancer.plan").read_bytes() == b'["x", "out"]'
    # Kernels are chosen for the middle one of three shapes: batch 1, which is the common one, has a profile of its own.
    one, more = [(1, 1, SIZE, SIZE)] * 3, [(2, 1, SIZE, SIZE), (4, 1, SIZE, SIZE), (4, 1, SIZE, SIZE)]
    assert recorder.of("set_shape") == [
        ["x_t", *one],
        ["cxr", *one],
        ["t", (1,), (1,), (1,)],
        ["x_t", *more],
        ["cxr", *more],
        ["t", (2,), (4,), (4,)],
        ["x", *one],
        ["x", *more],
    ]
    assert recorder.of("options") == [[3, 0], [3, 0]]
    assert {logger for (logger,) in recorder.of("Builder")} == {recorder.logger}
    assert heard[:3] == [("denoiser: Building", 0.0), ("denoiser: Building", 0.5), ("denoiser: Building", 1.0)]
    assert heard[3:] == [(phase.replace("denoiser", "enhancer"), share) for phase, share in heard[:3]]


def test_one_batch_size_has_one_profile(build):
    _, recorder, _ = build(batch=(2, 2))
    assert recorder.of("set_shape")[3] == ["x", *[(2, 1, SIZE, SIZE)] * 3]


@pytest.mark.parametrize(("version", "flags"), [("10.16.1.11", 2), ("11.4.0.106", 1)])
def test_strongly_typed_in_both_majors(build, version, flags):
    _, recorder, _ = build(version=version)
    assert recorder.of("create_network") == [[flags], [flags]]


@pytest.mark.parametrize(
    ("precision", "kind"),
    [("fp32", onnx.TensorProto.FLOAT), ("fp16", onnx.TensorProto.FLOAT16), ("bf16", onnx.TensorProto.BFLOAT16)],
)
def test_precision_is_in_the_denoisers_graph(build, tiny_bundle, precision, kind):
    options, recorder, _ = build(precision)
    (denoiser_path, denoiser), (enhancer_path, enhancer) = recorder.of("parse_from_file")
    weights = {tensor.name.removesuffix(f".{precision}"): tensor.data_type for tensor in denoiser.graph.initializer}
    assert weights["down_blocks.0.downsampler.weight"] == kind
    assert {tensor.data_type for tensor in enhancer.graph.initializer} == {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.INT64,
    }
    # In float32 no attention is fused, and the scores of every pair of pixels take gigabytes.
    half = {node.attribute[0].i for node in enhancer.graph.node if node.op_type == "Cast"}
    assert half == (set() if precision == "fp32" else {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16})
    assert (enhancer_path == tiny_bundle / "enhancer.onnx") == (precision == "fp32")
    assert (denoiser_path == tiny_bundle / "denoiser.onnx") == (precision == "fp32")
    assert denoiser_path.exists() == (precision == "fp32")  # what was made for the build is gone
    # fp32 is fp32; next to an fp16 denoiser the enhancer's products may be TF32, which has as many digits.
    expected = ("clear_flag", "set_flag") if precision == "fp32" else ("set_flag", "clear_flag")
    assert [str(flag) for (flag,) in recorder.of(expected[0])] == ["BuilderFlag.TF32"] * 2
    assert recorder.of(expected[1]) == []
    assert options["enhancer"] == ("fp32" if precision == "fp32" else "tf32 with fp16 attention")


@pytest.mark.parametrize(
    ("version", "precision", "expected"),
    [
        ("10.16.1.11", "fp16", False),
        ("11.2.0.1", "fp16", False),
        ("11.3.0.9", "fp16", True),
        ("12.0.0.1", "fp16", True),
        ("11.4.0.106", "bf16", False),  # its kernel sums in float32 anyway
        ("11.4.0.106", "fp32", False),  # nothing to cast
    ],
)
def test_a_softmax_in_fp32_from_the_version_that_fuses_it(build, version, precision, expected):
    options, recorder, _ = build(precision, version=version)
    nodes = recorder.of("parse_from_file")[0][1].graph.node
    cast = {name for node in nodes if node.op_type == "Cast" for name in node.output}
    softmaxes = [node for node in nodes if node.op_type == "Softmax"]
    assert all((node.input[0] in cast) == expected for node in softmaxes)
    assert options["softmax_fp32"] == expected


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("Builder", r"TensorRT 11\.4\.0\.106 gives no builder: TypeError: factory .* nullptr; TensorRT says: Builder "),
        ("create_network", r"gives no network; TensorRT says: create_network failed for a reason$"),
        ("OnnxParser", r"gives no parser: TypeError: factory .*; TensorRT says: OnnxParser failed"),
        (
            "parse_from_file",
            r"^denoiser\.onnx: TensorRT 11\S+ cannot read it: Conv node_3: not supported; Conv node_3: not supported; "
            r"Conv node_3: not supported; TensorRT says: parse_from_file failed",
        ),
        ("create_builder_config", r"gives no builder configuration; TensorRT says: "),
        ("create_optimization_profile", r"gives no optimization profile; TensorRT says: "),
        ("add_optimization_profile", r"^denoiser\.onnx: TensorRT refuses batches of 1 to 4; TensorRT says: "),
        ("create_timing_cache", r"^TensorRT 11\S+ accepts no timing cache, not even an empty one$"),
        ("set_timing_cache", r"^TensorRT 11\S+ accepts no timing cache, not even an empty one$"),
        ("serialize", r"gives no timing cache to keep; TensorRT says: "),
        (
            "build_serialized_network",
            r"^denoiser\.onnx: TensorRT 11\S+ cannot build an engine; TensorRT says: build_serialized_network failed",
        ),
    ],
)
def test_each_failure_of_a_build(build, tmp_path, fails, message):
    with pytest.raises(EngineError, match=message):
        build(fails=[fails])
    assert not list((tmp_path / "engine").iterdir())


def test_a_build_on_the_cpu(build):
    with pytest.raises(EngineError, match=r"builds engines for CUDA devices, not for cpu\. Use device cuda"):
        build(device=CPU)


def test_the_timing_cache_is_used_again(build, tmp_path):
    _, recorder, _ = build()
    assert recorder.of("create_timing_cache") == [[b""], [b"timings"]]
    (file,) = (tmp_path / "cache/timing").iterdir()
    assert file.name == "tensorrt-11.4.0.106-NVIDIA-Some-GPU-1.cache"
    assert file.read_bytes() == b"timings"
    assert file.stat().st_mode & 0o077 == 0
    assert file.parent.stat().st_mode & 0o077 == 0
    _, recorder, _ = build(version="10.16.1.11")
    assert recorder.of("create_timing_cache")[0] == [b""]  # another version has its own


def test_a_timing_cache_that_does_not_fit(build, tmp_path, caplog):
    file = tmp_path / "cache/timing/tensorrt-11.4.0.106-NVIDIA-Some-GPU-1.cache"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"of another GPU")
    _, recorder, _ = build()
    assert recorder.of("create_timing_cache") == [[b"of another GPU"], [b""], [b"timings"]]
    assert f"TensorRT does not accept the timing cache {file}" in caplog.text


def test_progress_of_phases_without_steps_and_beyond_their_end(build, monkeypatch):
    module, recorder = fake.make()
    recorder.phases = [("Nothing", None, 0), ("Tactics", "Building", 1)]
    monkeypatch.setattr(fake, "make", lambda _: (module, recorder))
    _, _, heard = build()
    assert heard[:3] == [("denoiser: Nothing", None), ("denoiser: Tactics", 0.0), ("denoiser: Tactics", 1.0)]


# --- run ---


def test_each_buffer_reaches_its_tensor(runner, cuda):
    made, recorder = runner()
    x_t, cxr, t, out = images(2)
    t[1] = 400.0
    made.denoise(x_t, cxr, t, out)
    assert out[0].unique().tolist() == [1 + 20 + 300]
    assert out[1].unique().tolist() == [1 + 20 + 400]
    made.enhance(cxr, out)
    assert out.unique().tolist() == [1.0]
    assert [handle for _, handle in recorder.of("execute_async_v3")] == [7, 7]
    assert cuda.current.waited == cuda.own.waited == []
    assert (made.name, made.precision, made.batch_range, made.image_size) == ("tensorrt", "fp16", (1, 4), SIZE)


def test_both_networks_share_one_working_memory(runner):
    _, recorder = runner()
    (first, first_size), (second, second_size) = recorder.of("set_device_memory")
    assert first == second
    assert first_size == second_size == 4000  # the larger of the two
    assert [str(strategy) for (strategy,) in recorder.of("create_execution_context")] == ["Strategy.USER_MANAGED"] * 2


def test_shapes_and_addresses_are_set_only_where_they_change(runner):
    made, recorder = runner()
    x_t, cxr, t, out = images(2)

    def counts():
        made.denoise(x_t, cxr, t, out)
        found = len(recorder.of("set_input_shape")), len(recorder.of("set_tensor_address"))
        recorder.calls.clear()
        return found

    assert counts() == (3, 4)
    assert counts() == (0, 0)
    out = aligned(*out.shape)
    assert counts() == (0, 4)
    x_t, cxr, t, out = images(3)
    assert counts() == (3, 4)


def test_every_batch_has_its_profile(runner, monkeypatch):
    """The smallest batch the first, larger ones the second. It is set before the shapes, and only where it changes."""
    made, recorder = runner()
    for batch in (1, 2, 3, 1):
        made.denoise(*images(batch))
    names = [name for name, *_ in recorder.calls if name in ("set_optimization_profile_async", "set_input_shape")]
    assert (
        names
        == ["set_input_shape"] * 3
        + (["set_optimization_profile_async"] + ["set_input_shape"] * 3)
        + ["set_input_shape"] * 3
        + ["set_optimization_profile_async"]
        + ["set_input_shape"] * 3
    )
    assert [(index, stream) for _, index, stream in recorder.of("set_optimization_profile_async")] == [(1, 7), (0, 7)]


def test_on_the_default_stream_it_uses_its_own_in_order(runner, cuda):
    made, recorder = runner()
    cuda.current = FakeStream(0)
    made.denoise(*images(1))
    assert [handle for _, handle in recorder.of("execute_async_v3")] == [99]
    assert cuda.own.waited == [cuda.current]
    assert cuda.current.waited == [cuda.own]


def test_what_a_graph_recorded_is_never_changed(runner, cuda):
    made, recorder = runner()
    graph_buffers, others = images(2), images(3)
    made.denoise(*graph_buffers)
    cuda.recording = True
    made.denoise(*graph_buffers)
    cuda.recording = False
    (recorded,) = {context for context, _ in recorder.of("execute_async_v3")}
    recorder.calls.clear()
    made.denoise(*others)
    made.denoise(*graph_buffers)  # uses what was recorded, for it is set to just this
    first, second = (context for context, _ in recorder.of("execute_async_v3"))
    assert second is recorded
    assert first is not recorded
    assert all(context is first for context, *_ in recorder.of("set_input_shape") + recorder.of("set_tensor_address"))
    assert others[3].unique().tolist() == graph_buffers[3].unique().tolist() == [321.0]
    cuda.recording = True
    made.denoise(*others)  # a second graph, beside the first
    cuda.recording = False
    recorder.calls.clear()
    made.denoise(*graph_buffers)
    made.denoise(*others)
    assert [context for context, _ in recorder.of("execute_async_v3")] == [recorded, first]
    assert not recorder.of("set_tensor_address")


def test_recording_without_a_run_before(runner, cuda):
    made, _ = runner()
    made.denoise(*images(2))
    cuda.recording = True
    with pytest.raises(
        EngineError, match=r"the denoiser must run once on the same buffers before a CUDA graph records"
    ):
        made.denoise(*images(2))


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("Runtime", r"TensorRT 11\.4\.0\.106 gives no runtime: TypeError: factory .*; TensorRT says: Runtime failed"),
        (
            "deserialize_cuda_engine",
            r"denoiser\.plan: TensorRT 11\S+ cannot load it; TensorRT says: deserialize.*\. Build the engine again",
        ),
        ("half cxr", r"denoiser\.plan: its tensors are cxr, out, t, x_t, not the denoiser's\. Build the engine"),
        ("create_execution_context", r"gives no execution context; TensorRT says: create_execution_context failed"),
        ("set_device_memory", r"does not take its working memory; TensorRT says: set_device_memory failed"),
    ],
)
def test_each_failure_to_load(runner, fails, message):
    with pytest.raises(EngineError, match=message):
        runner(fails=[fails])


def test_too_little_memory_is_known_before_it_is_allocated(runner, cuda, monkeypatch):
    cuda.free, cuda.reserved, cuda.allocated = 3000, 1500, 501  # the larger plan works in 4000 bytes
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *_, **__: pytest.fail("allocated"))
        with pytest.raises(EngineError, match=r"works in 0 MB, and cpu has 0 MB free\. Free some, or "):
            runner()
    cuda.allocated = 500
    runner()


def test_kernels_that_are_compiled_later_are_kept(runner, tmp_path):
    """What TensorRT for RTX compiled in one run is there in the next."""
    made, recorder = runner(compiles_later=True)
    assert recorder.kernels == []  # none there yet
    strategies = [str(strategy) for (strategy,) in recorder.of("set_execution_context_allocation_strategy")]
    assert strategies == ["Strategy.USER_MANAGED"] * 2
    made.denoise(*images(1))
    made.close()
    kept = sorted((tmp_path / "cache" / "kernels").iterdir())
    assert [path.read_bytes() for path in kept] == [b"kernels"] * 2
    assert kept[0].parent.stat().st_mode & 0o777 == 0o700
    before = [path.stat().st_mtime_ns for path in kept]
    made, recorder = runner(compiles_later=True)
    assert recorder.kernels == [b"kernels"] * 2
    made.close()
    assert [path.stat().st_mtime_ns for path in kept] == before  # nothing new


def test_kernels_that_do_not_fit(runner, caplog):
    runner(compiles_later=True)[0].close()
    made, _ = runner(compiles_later=True, fails=["deserialize"])
    assert "TensorRT 11.4.0.106 does not accept the kernels" in caplog.text
    made.denoise(*images(1))
    with pytest.raises(EngineError, match=r"takes no runtime cache; TensorRT says: set_runtime_cache failed"):
        runner(compiles_later=True, fails=["set_runtime_cache"])


def test_a_plan_that_is_missing(runner):
    with pytest.raises(EngineError, match=r"enhancer\.plan: cannot be read \(FileNotFoundError\)\. Build the engine"):
        runner(names=(["x_t", "cxr", "t", "out"], None))


def test_a_plan_of_another_network(runner):
    with pytest.raises(
        EngineError, match=r"enhancer\.plan: its tensors are cxr, out, not the enhancer's\. Build the engine"
    ):
        runner(names=(["x_t", "cxr", "t", "out"], ["cxr", "out"]))


@pytest.mark.parametrize(
    ("fails", "kind", "message"),
    [
        (
            "set_optimization_profile_async",
            EngineError,
            "the denoiser's engine has no profile for batch 2; TensorRT says",
        ),
        ("set_input_shape", EngineError, "the denoiser's engine does not take batch 2; TensorRT says: set_input_shape"),
        (
            "infer_shapes raises",
            EngineError,
            r"the denoiser's engine cannot work out its shapes at batch 2; TensorRT says: tensor volume exceeds",
        ),
        ("infer_shapes", EngineError, "the denoiser's engine leaves x_t, t undefined; TensorRT says: infer_shapes"),
        ("set_tensor_address", EngineError, "the denoiser's engine does not take the buffer x_t; TensorRT says: "),
        ("execute_async_v3", RuntimeError, "TensorRT cannot run the denoiser at batch 2; TensorRT says: execute"),
    ],
)
def test_each_failure_to_run(runner, fails, kind, message):
    made, recorder = runner()
    buffers = images(2)
    recorder.fails = {fails}
    with pytest.raises(kind, match=message):
        made.denoise(*buffers)
    recorder.fails = set()
    made.denoise(*buffers)  # whatever was half set is set again
    assert buffers[3].unique().tolist() == [321.0]


@pytest.mark.parametrize("fails", ["set_input_shape", "set_tensor_address"])
def test_after_a_failure_the_buffers_before_are_set_again(runner, fails):
    made, recorder = runner()
    before, others = images(2), images(3)
    others[0].fill_(5.0)
    made.denoise(*before)
    recorder.fails = {fails}
    with pytest.raises(EngineError):
        made.denoise(*others)
    recorder.fails = set()
    before[3].zero_()
    made.denoise(*before)
    assert before[3].unique().tolist() == [321.0]
    context = recorder.of("execute_async_v3")[-1][0]
    assert context.shapes["x_t"] == (2, 1, SIZE, SIZE)
    assert context.addresses["x_t"] == before[0].data_ptr()


def test_a_buffer_that_is_not_aligned(runner):
    made, _ = runner()
    x_t, cxr, t, _ = images(2)
    out = aligned(2, 1, SIZE, SIZE, offset=4)
    with pytest.raises(EngineError, match=r"out: its address 0x\w+10 is not a multiple of 256\. Give the tensorrt"):
        made.denoise(x_t, cxr, t, out)


def test_a_batch_that_it_was_not_built_for(runner):
    made, recorder = runner(batch_range=(1, 2))
    with pytest.raises(EngineError, match=r"batch of 3 given to the tensorrt runner, which takes 1 to 2"):
        made.denoise(*images(3))
    assert not recorder.of("set_input_shape")


def test_close_waits_for_the_device(runner, cuda):
    made, _ = runner()
    with made:
        made.denoise(*images(1))
    assert cuda.synchronised == 1
    made.close()
    assert cuda.synchronised == 1


# --- TensorRT itself ---


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("fp16", 2e-2), ("bf16", 1e-1)])
def test_engines_equal_eager(tiny_bundle, tmp_path, precision, tolerance):
    """Of the largest output. fp16 as in tests/test_onnx_precision.py, bf16 has three bits less; fp32 has TF32 off."""
    from bsdiff_rt.runners.eager import EagerRunner, load_networks
    from bsdiff_rt.runners.tensorrt import build, load_engine

    bundle = open_bundle(tiny_bundle)
    build(bundle, EngineOptions("tensorrt", precision, (1, 4)), CUDA, tmp_path, lambda phase, share: None)
    eager = EagerRunner(*load_networks(bundle), SIZE, CPU)
    generator = torch.Generator().manual_seed(0)
    settings = {"device": CUDA, "precision": precision, "batch_range": (1, 4), "image_size": SIZE}
    with load_engine(tmp_path, **settings) as made:
        for batch in (1, 2, 4, 2):
            x_t, cxr = torch.randn(2, batch, 1, SIZE, SIZE, generator=generator).clamp(-2, 2)
            t, expected = torch.linspace(0, 999, batch).round(), torch.empty_like(x_t)
            on_gpu = [tensor.clone().cuda() for tensor in (x_t, cxr, t, expected)]
            for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    made.denoise(*on_gpu)
                    actual = on_gpu[3].cpu()
                    made.enhance(on_gpu[1], on_gpu[3])
                    sharpened = on_gpu[3].cpu()
                eager.denoise(x_t, cxr, t, expected)
                assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
                eager.enhance(cxr, expected)
                assert (sharpened - expected).abs().max() <= 1e-2 * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_a_recorded_run_equals_a_plain_one(tiny_bundle, tmp_path):
    """Two CUDA graphs of one runner, replayed in turn and after plain calls: no graph disturbs another."""
    from bsdiff_rt.runners.tensorrt import build, load_engine

    build(open_bundle(tiny_bundle), EngineOptions("tensorrt", "fp16", (1, 4)), CUDA, tmp_path, lambda *_: None)
    side = torch.cuda.Stream()
    settings = {"device": CUDA, "precision": "fp16", "batch_range": (1, 4), "image_size": SIZE}
    with load_engine(tmp_path, **settings) as made, torch.cuda.stream(side):
        graphs = []
        for batch in (1, 3):
            buffers = [torch.randn(batch, 1, SIZE, SIZE, device=CUDA) for _ in range(2)]
            buffers += [torch.full((batch,), 500.0, device=CUDA), torch.empty(batch, 1, SIZE, SIZE, device=CUDA)]
            made.denoise(*buffers)
            plain = buffers[3].clone()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                made.denoise(*buffers)
            graphs.append((graph, buffers, plain))
        for graph, buffers, plain in (*graphs, *reversed(graphs)):
            buffers[3].zero_()
            graph.replay()
            assert torch.equal(buffers[3], plain)
            other = torch.empty_like(buffers[3])
            made.denoise(*buffers[:3], other)
            assert torch.equal(other, plain)
        torch.cuda.synchronize()
