"""The compiled networks against eager, what is built, and what is said when nothing can be."""

from __future__ import annotations

import copy
import operator
import os
import shutil
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import randomise
from torch.nn.attention import _cur_sdpa_kernel_backends

from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.config import PRESETS, EngineOptions
from bsdiff_rt.engines.build import build_engine
from bsdiff_rt.errors import EngineError
from bsdiff_rt.networks.blocks import ResBlock, SelfAttention
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.runners import aoti, aoti_builder, timing
from bsdiff_rt.runners.aoti import AotiRunner
from bsdiff_rt.runners.aoti_builder import (
    attention_as_products,
    attention_in_parts,
    choose_attention,
    lower_precision,
)
from bsdiff_rt.runners.registry import load_runner
from bsdiff_rt.sampling.cuda_graph import CapturedSampler
from bsdiff_rt.sampling.sampler import sample
from bsdiff_rt.sampling.schedule import sampler_table

CPU = torch.device("cpu")
SIZE = 64
# Of the largest output. Both compute in fp32 with sums in another order; seen: 3e-6 over the tiny networks.
TOLERANCE = 1e-4


def opened(folder, image_size: int = SIZE) -> AotiRunner:
    return AotiRunner(folder, device=CPU, precision="fp32", batch_range=(1, 3), image_size=image_size)


@pytest.fixture(scope="module")
def runners(tiny_bundle, tiny_engine):
    with load_runner(open_bundle(tiny_bundle), "eager", CPU) as eager, opened(tiny_engine) as candidate:
        yield eager, candidate


def images(count, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, batch, 1, SIZE, SIZE, generator=generator).clamp(-1, 1)


def assert_equal(actual, expected):
    assert expected.abs().max() > 0.01  # a comparison of zeros proves nothing
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("time", [0, 500, 999])
def test_denoiser_equals_eager(runners, batch, time):
    x_t, cxr, expected, actual = images(4, batch)
    t = torch.full((batch,), float(time))
    for runner, out in zip(runners, (expected, actual), strict=True):
        out.fill_(float("nan"))
        runner.denoise(3 * x_t, cxr, t, out)
    assert_equal(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_enhancer_equals_eager(runners, batch):
    x, expected, actual = images(3, batch)
    for runner, out in zip(runners, (expected, actual), strict=True):
        out.fill_(float("nan"))
        runner.enhance(x, out)
    assert_equal(actual, expected)


@pytest.mark.slow
def test_timesteps_may_differ_within_a_batch(runners):
    x_t, cxr, expected, actual = images(4, 3)
    t = torch.tensor([0.0, 400.0, 999.0])
    for runner, out in zip(runners, (expected, actual), strict=True):
        runner.denoise(x_t, cxr, t, out)
    assert_equal(actual, expected)


@pytest.mark.slow
def test_the_callers_buffers_are_filled_and_inputs_stay(runners):
    cxr, *_ = images(1, 3)
    before, large = cxr.clone(), torch.full((5, 1, SIZE, SIZE), 7.0)
    runners[1].enhance(cxr, large[1:4])
    assert torch.equal(cxr, before)
    assert (large[[0, 4]] == 7).all()
    assert not (large[1:4] == 7).any()


@pytest.mark.slow
@pytest.mark.parametrize("time", [0.0, 999.0])
def test_the_same_call_gives_the_same_bits_and_no_gradient(runners, time):
    x_t, cxr, first, second = images(4, 2)
    for out in (first, second):
        runners[1].denoise(x_t.requires_grad_(), cxr, torch.full((2,), time), out)
    assert torch.equal(first, second)
    assert not first.requires_grad


@pytest.mark.slow
def test_a_trajectory(runners, tiny_bundle):
    """Both loops; the recorded one steps through the same buffers again and again."""
    table = sampler_table(open_bundle(tiny_bundle).manifest.schedule, "ddpm", 5)
    cxr, *draws = images(7, 2)
    expected = sample(runners[0], cxr, table, lambda number: draws[number])
    assert_equal(sample(runners[1], cxr, table, lambda number: draws[number]), expected)
    with CapturedSampler(runners[1]) as sampler:
        assert_equal(sampler.sample(cxr, table, lambda number: draws[number]), expected)


@pytest.mark.slow
def test_buffers_it_cannot_use(runners):
    """The compiled code itself checks nothing: a batch or size it was not built for would read past the end."""
    good, small, large = torch.zeros(1, 1, SIZE, SIZE), torch.zeros(1, 1, 32, 32), torch.zeros(4, 1, SIZE, SIZE)
    for wrong in (small, good.double()):
        with pytest.raises(EngineError, match="given to the aoti runner"):
            runners[1].enhance(wrong, good)
        with pytest.raises(EngineError, match="given to the aoti runner"):
            runners[1].denoise(good, wrong, torch.zeros(1), good.clone())
    with pytest.raises(EngineError, match="batch of 4 given to the aoti runner, which takes 1 to 3"):
        runners[1].enhance(large, large.clone())


@pytest.mark.slow
def test_what_it_says_of_itself_and_closing(tiny_engine):
    runner = opened(tiny_engine)
    assert (runner.name, runner.precision, runner.image_size, runner.batch_range) == ("aoti", "fp32", SIZE, (1, 3))
    runner.close()
    runner.close()
    with pytest.raises(TypeError):
        runner.enhance(*torch.zeros(2, 1, 1, SIZE, SIZE))


@pytest.mark.slow
def test_what_was_built(tiny_engine):
    assert set(os.listdir(tiny_engine)) == {"denoiser.pt2", "enhancer.pt2", "engine.json"}  # no compiler's cache


@pytest.mark.slow
def test_the_compiled_code_takes_the_threads_of_the_day(tiny_engine):
    """Not those of the machine, or the batch job, that built it."""
    pragmas = set()
    for package in tiny_engine.glob("*.pt2"):
        with zipfile.ZipFile(package) as content:
            sources = [content.read(name).decode() for name in content.namelist() if name.endswith(".cpp")]
        pragmas |= {line.strip() for source in sources for line in source.splitlines() if "omp parallel" in line}
    assert pragmas == {"#pragma omp parallel"}


@pytest.mark.slow
@pytest.mark.parametrize("content", [None, b"", b"no package"])
def test_a_package_it_cannot_load(tiny_engine, tmp_path, content):
    folder = shutil.copytree(tiny_engine, tmp_path / "engine")
    package = folder / "enhancer.pt2"
    package.unlink() if content is None else package.write_bytes(content)
    with pytest.raises(EngineError, match=r"enhancer\.pt2: torch [\d.]+\S* cannot load it: "):
        opened(folder)


def test_versions():
    assert aoti.list_versions() == {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}


def try_to_build(tmp_path, precision="fp32", batch=(1, 3), **more):
    told = []
    options = EngineOptions("aoti", precision, batch, **more)
    try:
        return aoti_builder.build(open_bundle("demo"), options, CPU, tmp_path, lambda *phase: told.append(phase))
    finally:
        assert not [name for name in os.listdir(tmp_path) if not name.endswith(".pt2")]


def test_fp16_on_a_processor_is_refused(tmp_path):
    options = EngineOptions("aoti", "fp16", (1, 1))
    with pytest.raises(EngineError, match="it computes in fp32 or bf16 on cpu, not in fp16"):
        build_engine(open_bundle("demo"), options, CPU, tmp_path / "engine", lambda *_: None)
    assert not list(tmp_path.iterdir())


def test_without_a_compiler(tmp_path):
    from torch._inductor import config

    with (
        config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(EngineError, match=r"needs a C\+\+ compiler, and none was found .* apt install g\+\+\), or name"),
    ):
        try_to_build(tmp_path)


@pytest.mark.parametrize("home", [None, "/no/such/toolkit"])
def test_without_the_cuda_toolkit(tmp_path, monkeypatch, home):
    """torch's wheels bring CUDA's libraries, not the headers that the package's wrapper includes."""
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", home)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    expected = rf"headers of the CUDA toolkit, found none in {home or tmp_path}\. Install .* CUDA_HOME"
    with pytest.raises(EngineError, match=expected):
        aoti_builder.find_toolkit(tmp_path)
    (tmp_path / "cuda-13.0").mkdir()  # without headers
    with pytest.raises(EngineError, match=r"found none in .*cuda-13\.0\. Install"):
        aoti_builder.find_toolkit(tmp_path)


def make_toolkit(folder, stubs=False):
    (folder / "include").mkdir(parents=True)
    (folder / "include" / "cuda_runtime_api.h").touch()
    if stubs:
        (folder / "lib64" / "stubs").mkdir(parents=True)
        (folder / "lib64" / "stubs" / "libcuda.so").touch()
    return folder


def test_a_program_named_nvcc_elsewhere_does_not_hide_the_toolkit(tmp_path, monkeypatch):
    """A wrapper in /usr/local/bin lets torch take /usr/local for the toolkit."""
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    make_toolkit(tmp_path / "cuda-9.2")
    newest = make_toolkit(tmp_path / "cuda-13.0")
    assert aoti_builder.find_toolkit(tmp_path) == newest
    named = make_toolkit(tmp_path / "elsewhere")
    monkeypatch.setenv("CUDA_HOME", str(named))
    assert aoti_builder.find_toolkit(tmp_path) == named


@pytest.mark.parametrize(("ooms", "error"), [([3, 4], torch.OutOfMemoryError), ([3, 3], RuntimeError)])
def test_no_memory_is_told_as_such_although_the_package_hides_it(tiny_engine, monkeypatch, ooms, error):
    counts = iter(ooms)
    monkeypatch.setattr(aoti, "_count_ooms", lambda _: next(counts))
    with opened(tiny_engine) as runner:

        def fail(*_):
            raise RuntimeError("aoti_torch_empty_strided(...) API call failed at model.h, line 12")

        runner._denoiser = fail
        x_t, cxr, out = images(3, 1)
        with pytest.raises(RuntimeError, match="API call failed") as caught:
            runner.denoise(x_t, cxr, torch.zeros(1), out)
    assert type(caught.value) is error


def test_a_compiler_that_fails(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("C++ compile error\n  line 1")

    monkeypatch.setattr("torch.export.export", fail)
    monkeypatch.setattr(aoti_builder, "_find_instructions", lambda _: None)  # it compiles for seconds
    with pytest.raises(
        EngineError, match=r"torch \S+ cannot compile the denoiser for cpu: RuntimeError: C\+\+ compile er"
    ):
        try_to_build(tmp_path)


@pytest.mark.parametrize("asked", [False, True])
def test_more_kernels_are_tried_on_request(exported, tmp_path, monkeypatch, asked):
    from torch._inductor import config, select_algorithm

    seen = []

    def note(*_, **__):
        seen.append((config.max_autotune, select_algorithm.PRINT_AUTOTUNE))

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", note)
    used = try_to_build(tmp_path, max_autotune=asked)
    assert seen == [(asked, not asked)] * 2
    assert select_algorithm.PRINT_AUTOTUNE
    assert used.get("max_autotune", False) == asked


@pytest.fixture
def exported(monkeypatch):
    """Records what would be compiled: networks, examples and dynamic shapes."""
    seen = []

    def export(network, example, dynamic_shapes):
        seen.append((network, example, dynamic_shapes))
        return network

    monkeypatch.setattr("torch.export.export", export)
    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", lambda *_, **__: None)
    monkeypatch.setattr(aoti_builder, "_find_instructions", lambda _: None)
    return seen


def test_a_range_of_batches_is_exported_at_two(exported, tmp_path):
    options = try_to_build(tmp_path, "fp32", (1, 8))
    assert options == {"memory_format": "channels_last", "enhancer_precision": "fp32"}
    assert [[len(tensor) for tensor in example] for _, example, _ in exported] == [[2, 2, 2], [2]]
    for _, _, shapes in exported:
        assert {(shape[0].min, shape[0].max) for shape in shapes} == {(1, 8)}


@pytest.mark.parametrize("batch", [1, 4])
def test_one_batch_is_exported_as_a_constant(exported, tmp_path, batch):
    try_to_build(tmp_path, "fp32", (batch, batch))
    assert [[len(tensor) for tensor in example] for _, example, _ in exported] == [[batch] * 3, [batch]]
    assert [shapes for _, _, shapes in exported] == [None, None]


def test_only_the_denoiser_gets_the_lower_precision(exported, tmp_path):
    try_to_build(tmp_path, "bf16")
    denoiser, enhancer = (network for network, _, _ in exported)
    assert {p.dtype for p in enhancer.parameters()} == {torch.float32}
    dtypes = {name: parameter.dtype for name, parameter in denoiser.named_parameters()}
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept == {
        name for name in dtypes if "norm" in name or name.split(".")[0] in ("time_embed", "conv_in", "conv_out")
    }
    assert {dtypes[name] for name in set(dtypes) - kept} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("precision", "computes", "warned"), [("bf16", False, 1), ("bf16", True, 0), ("fp32", False, 0)]
)
def test_bf16_on_a_processor_without_it_is_said_to_be_slow(
    exported, tmp_path, monkeypatch, caplog, precision, computes, warned
):
    monkeypatch.setattr(aoti_builder, "computes_bf16", lambda _: computes)
    try_to_build(tmp_path, precision)
    assert sum("emulates bf16" in message for message in caplog.messages) == warned


def test_what_is_built_computes_attention_in_the_form_chosen(exported, tmp_path):
    try_to_build(tmp_path, "bf16")
    network, _ = (network for network, _, _ in exported)
    assert {block.attend for block in network.modules() if isinstance(block, SelfAttention)} == {attention_in_parts}


@pytest.mark.parametrize("tokens", [16, 512, 1100])
def test_attention_in_parts_is_attention(tokens):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (3 * torch.randn(2, 1, tokens, 24, generator=generator) for _ in range(3))
    expected = F.scaled_dot_product_attention(query, key, value)
    in_parts = attention_in_parts(query, key, value)
    torch.testing.assert_close(in_parts, expected, rtol=1e-4, atol=2e-4)  # seen: 4e-5, of up to 10
    lower = attention_in_parts(*(tensor.bfloat16() for tensor in (query, key, value)))
    assert lower.dtype == torch.bfloat16
    # Scores of up to 40 are rounded to 8 bits, 0.08 of one, which is what their weights are then off by.
    assert (lower - expected).abs().max() < 0.15 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_as_products_is_attention(dtype):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 1, 256, 768, generator=generator) for _ in range(3))
    expected = F.scaled_dot_product_attention(query, key, value)
    products = attention_as_products(*(tensor.to(dtype) for tensor in (query, key, value)))
    assert products.dtype == dtype
    assert products.shape == expected.shape
    # Rounding of inputs, scores and weights; seen: 1e-6, 6e-4 and 5e-3 of the largest.
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    assert (products.float() - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize(
    ("precision", "device", "narrow", "wide"),
    [
        ("fp32", "cpu", F.scaled_dot_product_attention, F.scaled_dot_product_attention),
        ("bf16", "cpu", attention_in_parts, attention_in_parts),
        ("fp32", "cuda", F.scaled_dot_product_attention, F.scaled_dot_product_attention),
        ("fp16", "cuda", F.scaled_dot_product_attention, attention_as_products),
        ("bf16", "cuda", F.scaled_dot_product_attention, attention_as_products),
    ],
)
def test_the_form_of_attention_depends_on_device_precision_and_width(precision, device, narrow, wide):
    blocks = torch.nn.ModuleList(SelfAttention(width, 8) for width in (256, 512))
    choose_attention(blocks, precision, torch.device(device))
    assert [block.attend for block in blocks] == [narrow, wide]


@pytest.mark.parametrize("home", [None, "/before"])
def test_a_build_for_a_gpu_tells_compiler_and_linker_where_the_toolkit_is(tmp_path, monkeypatch, home):
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", "/wrong")
    if home:
        monkeypatch.setenv("CUDA_HOME", home)
    else:
        monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("LIBRARY_PATH", "/more")
    toolkit = make_toolkit(tmp_path / "cuda", stubs=True)
    with aoti_builder._for_gpu(toolkit, tmp_path):
        assert os.environ["CUDA_HOME"] == torch.utils.cpp_extension.CUDA_HOME == str(toolkit)
        assert os.environ["LIBRARY_PATH"] == f"{toolkit}/lib64/stubs:/more"
        assert _cur_sdpa_kernel_backends(with_priority=True) == aoti_builder.KERNELS
    assert os.environ.get("CUDA_HOME") == home
    assert os.environ["LIBRARY_PATH"] == "/more"
    assert torch.utils.cpp_extension.CUDA_HOME == "/wrong"


def test_a_toolkit_without_a_stand_in_for_the_driver(tmp_path, monkeypatch):
    """The linker then gets the driver's own library. An empty one would be dropped, and the package not load."""
    toolkit, work = make_toolkit(tmp_path / "cuda"), tmp_path / "work"
    work.mkdir()
    real = Path.read_text
    maps = "7f00-7f01 r-xp 00 08:01 42   /usr/lib/x86_64-linux-gnu/libcuda.so.580.95\n"
    monkeypatch.setattr(Path, "read_text", lambda path: maps if str(path) == "/proc/self/maps" else real(path))
    assert aoti_builder._find_driver_stub(toolkit, work) == work
    assert os.readlink(work / "libcuda.so") == "/usr/lib/x86_64-linux-gnu/libcuda.so.580.95"


@pytest.fixture
def forms(monkeypatch):
    """Forms of attention by name, each with the seconds it takes for a width, or what it raises."""
    took = {}

    def make(name):
        def form(query, key, value):
            seconds = took[name][query.shape[-1]]
            if isinstance(seconds, Exception):
                raise seconds
            forms.last = seconds
            return query

        return form

    forms = SimpleNamespace(took=took, last=0.0)
    made = {name: make(name) for name in ("torch", "cudnn", "products")}
    monkeypatch.setattr(aoti_builder, "ATTENTION_FORMS", made)
    monkeypatch.setattr(timing, "time_call", lambda call, device: call() or forms.last)
    forms.made = made
    return forms


def test_each_width_gets_the_form_of_attention_that_was_fastest(forms):
    forms.took |= {
        "torch": {16: 2.0, 32: 3.0},
        "cudnn": {16: 1.0, 32: RuntimeError("No valid execution plans built.")},
        "products": {16: 3.0, 32: 1.0},
    }
    network = torch.nn.Sequential(SelfAttention(16, 8), torch.nn.Conv2d(16, 32, 1), SelfAttention(32, 8))
    network.append(SelfAttention(32, 8))
    before = [block.attend for block in (network[0], network[2])]
    chosen = aoti_builder.pin_attention(network, lambda: network(torch.ones(2, 16, 4, 4)), CPU)
    assert chosen == {"16 x 16": "cudnn", "16 x 32": "products"}
    assert network[0].attend is forms.made["cudnn"]
    assert network[2].attend is network[3].attend is forms.made["products"]
    assert before == [F.scaled_dot_product_attention] * 2


@pytest.mark.parametrize("error", [RuntimeError("bad kernel"), torch.OutOfMemoryError("CUDA out of memory")])
def test_where_no_form_of_attention_works(forms, error):
    forms.took |= {name: {16: error} for name in ("torch", "cudnn", "products")}
    block = SelfAttention(16, 8)
    with pytest.raises(RuntimeError) as caught:
        aoti_builder.pin_attention(torch.nn.Sequential(block), lambda: block(torch.ones(1, 16, 4, 4)), CPU)
    assert caught.value is error


@pytest.mark.gpu
@pytest.mark.parametrize("width", [128, 256, 512, 768])
def test_every_form_of_attention_agrees_on_a_gpu(width):
    """At the tokens of the paper's network. A form that does not take a width is not chosen for it."""
    side = {128: 128, 256: 64, 512: 32, 768: 16}[width]
    generator = torch.Generator("cuda").manual_seed(0)
    tokens = [torch.randn(1, 1, side * side, width, generator=generator, device="cuda") for _ in range(3)]
    expected = F.scaled_dot_product_attention(*tokens)
    agreed = []
    for name, form in aoti_builder.ATTENTION_FORMS.items():
        try:
            actual = form(*(tensor.half() for tensor in tokens)).float()
        except RuntimeError:
            continue
        assert (actual - expected).abs().max() <= 2e-2 * expected.abs().max(), name
        agreed.append(name)
    assert {"torch", "products"} <= set(agreed)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128, 256, 512, 768])
def test_a_block_of_each_width_in_fp16_on_a_gpu(width):
    """fp16 against fp32, and recorded in a CUDA graph against called: the same bits."""
    side = {64: 256, 128: 128, 256: 64, 512: 32, 768: 16}[width]
    exact = torch.nn.Sequential(
        ResBlock(width, width, 32), SelfAttention(width, 32) if width > 64 else torch.nn.Identity()
    )
    randomise(exact, 1)
    exact, lower = exact.eval().cuda(), copy.deepcopy(exact).eval().cuda()
    lower_precision(lower, torch.float16)
    image = torch.randn(1, width, side, side, device="cuda")
    with torch.no_grad():
        expected, actual = exact(image), lower(image.half())
        assert (actual.float() - expected).abs().max() <= 2e-2 * expected.abs().max()
        half, graph = image.half(), torch.cuda.CUDAGraph()
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            lower(half)
        with torch.cuda.graph(graph, stream=side_stream):
            recorded = lower(half)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(recorded, actual)


@pytest.mark.slow
@pytest.mark.parametrize("attend", [attention_in_parts, attention_as_products])
def test_the_compiler_leaves_attention_as_it_is_written(tmp_path, attend):
    """It knows attention when it sees it, and puts the fused kernel in its place."""

    class Attention(torch.nn.Module):
        def forward(self, tokens):
            return attend(tokens, tokens, tokens)

    aoti_builder._find_instructions(CPU)  # takes a minute, and other builds of this machine keep its result
    tokens = torch.zeros(1, 1, 1100, 32).bfloat16()
    with torch._inductor.config.patch({"aot_inductor.package_cpp_only": True}):  # the C++ compiler takes most of it
        aoti_builder._compile(
            Attention(), (tokens,), batch=(1, 1), package=tmp_path / "a.pt2", progress=lambda *_: None
        )
    with zipfile.ZipFile(tmp_path / "a.pt2") as content:
        sources = [content.read(name).decode() for name in content.namelist() if name.endswith(".cpp")]
    assert any("bmm" in source for source in sources)
    assert not any("scaled_dot_product" in source for source in sources)


def denoiser():
    network = Denoiser(PRESETS["tiny"].denoiser).eval()
    randomise(network, 1)
    return network


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
def test_lower_precision_stays_near_and_float32_at_the_edges(dtype, tolerance):
    """Four times what was seen: 5e-3 in fp16, 4e-2 in bf16."""
    exact, lower = denoiser(), denoiser()
    lower_precision(lower, dtype)
    x_t, cxr, *_ = images(2, 1)[..., :32, :32]
    for time in (0.0, 999.0):
        with torch.no_grad():
            expected, actual = (network(x_t, cxr, torch.tensor([time])) for network in (exact, lower))
        assert actual.dtype == torch.float32
        difference = (actual - expected).abs().max() / expected.abs().max()
        assert 1e-5 < difference < tolerance  # not zero: it was computed in `dtype`


def test_large_activations_do_not_overflow_the_norms():
    """fp16 ends at 65504: a sum of squares of activations of 300 would not fit."""
    network = denoiser()
    lower_precision(network, torch.float16)
    norm = network.down_blocks[0].resnets[0].norm1
    x = torch.full((1, 8, 16, 16), 300.0).half()
    x[:, ::2] = -300.0
    with torch.no_grad():
        out = norm(x)
    assert out.dtype == torch.float16
    expected = norm.weight[:, None, None] * x.float()[0].sign() + norm.bias[:, None, None]
    torch.testing.assert_close(out[0].float(), expected, rtol=2e-3, atol=2e-3)  # rounding of the result to fp16


def test_timesteps_stay_apart_in_bf16():
    """The embedding of neighbouring timesteps: bf16 would round 998 and 999 to the same number."""
    network = denoiser()
    lower_precision(network, torch.bfloat16)
    seen = []
    network.time_embed[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x_t, cxr, *_ = images(2, 1)[..., :32, :32]
    with torch.no_grad():
        for time in (998.0, 999.0):
            network(x_t, cxr, torch.tensor([time]))
    assert {embedding.dtype for embedding in seen} == {torch.float32}
    assert (seen[0] - seen[1]).abs().max() > 0.1


def test_fp32_is_left_alone():
    network = denoiser()
    lower_precision(network, torch.float32)
    assert not any(module._forward_hooks for module in network.modules())


def test_torchs_own_warnings_are_not_the_users_business(exported, tmp_path, monkeypatch):
    def warn(*_, **__):
        warnings.warn("of torch's own functions", FutureWarning, stacklevel=1)

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", warn)
    with warnings.catch_warnings(record=True) as caught:
        try_to_build(tmp_path)
    assert caught == []


@pytest.mark.parametrize(
    "name",
    [
        "loop_reindexing_after_fusion",  # makes upsampling six times slower (pytorch issue 189488)
        "aot_inductor.precompile_headers",  # leaves files in the machine's temporary folder
    ],
)
def test_what_the_compiler_must_not_do(exported, tmp_path, monkeypatch, name):
    from torch._inductor import config

    try:
        operator.attrgetter(name)(config)
    except AttributeError:
        pytest.skip(f"this torch has no {name}")
    seen = []
    monkeypatch.setattr(
        "torch._inductor.aoti_compile_and_package", lambda *_, **__: seen.append(operator.attrgetter(name)(config))
    )
    try_to_build(tmp_path)
    assert seen == [False, False]
