"""The registry: which runner runs where, loading those without engines, and adding a new runner."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bsdiff_rt import cli, open_model
from bsdiff_rt.bundle import MANIFEST, Bundle, Manifest, open_bundle, to_signed_json
from bsdiff_rt.config import NO_ENHANCER, PRESETS, Preprocessing
from bsdiff_rt.engines.select import RunnerRequest, choose, load_first
from bsdiff_rt.errors import BundleError, EngineError, SettingsError
from bsdiff_rt.info import describe_runners
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.blocks import join_projections
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.runners import onnxruntime
from bsdiff_rt.runners import registry as runners
from bsdiff_rt.runners.eager import EagerRunner, load_networks
from bsdiff_rt.runners.onnxruntime import OnnxRuntimeRunner
from bsdiff_rt.runners.registry import (
    RUNNERS,
    RunnerEntry,
    find_batch_limit,
    find_entry,
    list_bundle_runners,
    list_engine_runners,
    load_runner,
    resolve_precision,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "device", "reason"),
    [
        ("eager", CPU, None),
        ("eager", GPU, None),
        ("aoti", CPU, None),
        ("aoti", GPU, None),
        ("onnxruntime", CPU, None),
        ("tensorrt", CPU, "it runs on NVIDIA GPUs, not on cpu"),
        ("openvino", GPU, "it runs on CPUs, not on cuda:0"),
    ],
)
def test_what_runs_where(name, device, reason):
    assert RUNNERS[name].find_problem(device) == reason


def test_names():
    assert list(RUNNERS) == [
        "tensorrt",
        "tensorrt-rtx",
        "openvino",
        "aoti",
        "onnxruntime",
        "eager",
    ]  # `auto` takes them in this order
    assert [name for name, entry in RUNNERS.items() if entry.optional_engine] == ["openvino"]
    assert list_engine_runners() == ("tensorrt", "tensorrt-rtx", "openvino", "aoti")
    assert list_bundle_runners() == ("onnxruntime", "eager")
    with pytest.raises(SettingsError, match=r"^'abacus' is not a runner\. Use one of tensorrt, tensorrt-rtx, o"):
        find_entry("abacus")


def test_help_and_api_name_every_runner(capsys):
    with pytest.raises(SystemExit):
        cli.app(["infer", "--help"])
    for text in (capsys.readouterr().out, open_model.__doc__):
        assert not [name for name in RUNNERS if name not in text]


def test_packages_that_are_missing(monkeypatch):
    monkeypatch.setattr(runners, "find_spec", lambda _: None)
    assert RUNNERS["eager"].find_problem(CPU) is None
    expected = "the package onnxruntime is not installed (pip install 'bsdiff-rt[cpu]', or 'bsdiff-rt[cuda]' for"
    assert RUNNERS["onnxruntime"].find_problem(CPU).startswith(expected)
    expected = "the package tensorrt is not installed (pip install 'bsdiff-rt[tensorrt]')"
    assert RUNNERS["tensorrt"].find_problem(GPU) == expected
    monkeypatch.setattr(runners, "find_spec", lambda _: object())
    assert RUNNERS["tensorrt"].find_problem(GPU) is None


def test_tensorrt_for_rtx_runs_on_rtx_cards_alone(monkeypatch):
    monkeypatch.setattr(runners, "find_spec", lambda _: object())
    find_problem = RUNNERS["tensorrt-rtx"].find_problem
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    assert find_problem(GPU) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert find_problem(GPU) == ("it runs on compute capability 7.5, 8.0, 8.6, 8.9, 12.0, 12.1, and cuda:0 has 9.0")
    assert find_problem(CPU) == "it runs on NVIDIA GPUs, not on cpu"


def test_an_onnxruntime_that_cannot_be_imported_is_passed_over(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # its import raises ImportError
    monkeypatch.setattr(runners, "find_spec", lambda _: object())
    for device in (CPU, GPU):
        assert RUNNERS["onnxruntime"].find_problem(device).startswith("the installed onnxruntime cannot be loaded (")


def test_onnxruntime_on_a_gpu_needs_its_provider(monkeypatch):
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: providers)
    monkeypatch.setattr("onnxruntime.cuda_version", "13.0")
    monkeypatch.setattr("torch.version.cuda", "13.2")
    find_problem = RUNNERS["onnxruntime"].find_problem
    assert find_problem(GPU) is None
    monkeypatch.setattr("torch.version.cuda", "12.8")  # its libraries are those that torch loads
    assert find_problem(GPU).startswith("the installed onnxruntime is built for CUDA 13, torch for CUDA 12")
    providers.pop(0)
    assert find_problem(GPU).endswith("has no CUDA provider. Install onnxruntime-gpu instead")
    assert find_problem(CPU) is None


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize("runner", ["eager", "onnxruntime"])
def test_precision(runner, device):
    assert resolve_precision(runner, "auto", device) == resolve_precision(runner, "fp32", device) == "fp32"
    for precision in ("fp16", "bf16"):
        if (runner, precision, device) == ("onnxruntime", "fp16", GPU):
            assert resolve_precision(runner, precision, device) == "fp16"
            continue
        with pytest.raises(EngineError, match=f"it computes in fp32.* on {device}, not in {precision}"):
            resolve_precision(runner, precision, device)


@pytest.mark.parametrize(("name", "kind"), [("onnxruntime", OnnxRuntimeRunner), ("eager", EagerRunner)])
def test_load(name, kind):
    with load_runner(open_bundle("demo"), name, CPU) as runner:
        assert type(runner) is kind
        assert (runner.name, runner.image_size) == (name, 256)


def test_what_cannot_be_loaded_is_never_substituted(monkeypatch):
    bundle = open_bundle("demo")
    with pytest.raises(EngineError, match="runner tensorrt cannot be used on cpu: it runs on NVIDIA GPUs"):
        load_runner(bundle, "tensorrt", CPU)
    with pytest.raises(EngineError, match="it computes in fp32 on cpu, not in bf16"):
        load_runner(bundle, "eager", CPU, "bf16")
    with pytest.raises(EngineError, match=r"runner aoti needs an engine\. Build one with bsdiff-rt build-engine"):
        load_runner(bundle, "aoti", CPU)
    monkeypatch.setattr(runners, "find_spec", lambda _: None)
    with pytest.raises(EngineError, match=r"the package onnxruntime is not installed \(.*\)\. Use runner"):
        load_runner(bundle, "onnxruntime", CPU)


def test_networks_have_the_bundles_weights(tiny_bundle):
    for network, name in zip(load_networks(open_bundle(tiny_bundle)), ("denoiser", "enhancer"), strict=True):
        stored = load_file(tiny_bundle / f"{name}.safetensors")
        state = network.state_dict()
        assert set(state) == set(stored)
        assert all(torch.equal(state[key], stored[key]) for key in state)
        assert not network.training
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def opened(folder, **changes) -> Bundle:
    """The bundle with a changed manifest; what its files hash to is another test's business."""
    content = json.loads((folder / MANIFEST).read_text())
    for path, value in changes.items():
        section, key = path.split("__")
        content[section][key] = value
    return Bundle(folder, Manifest.from_json(to_signed_json(content)), "0" * 64)


@pytest.mark.parametrize(
    "changes",
    [
        {"denoiser__channels": [8, 32]},
        {"denoiser__res_blocks": [2, 1]},
        {"denoiser__channels": [8, 16, 32]},
        {"denoiser__channels": []},
        {"denoiser__norm_groups": 3},
        {"denoiser__norm_groups": 0},
        {"enhancer__latent_channels": 8},
        {"enhancer__middle_attention": False},
        {"enhancer__attention": [True]},
        {"enhancer__channels": [-8, 16]},
    ],
    ids=str,
)
def test_weights_that_do_not_fit_the_manifest(bundle_copy, changes):
    name = next(iter(changes)).split("__")[0]
    with pytest.raises(
        BundleError, match=rf"{name}\.safetensors: weights do not fit the manifest's network: "
    ) as caught:
        load_networks(opened(bundle_copy, **changes))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600  # not the list of every weight


def test_a_weight_that_is_missing(bundle_copy):
    path = bundle_copy / "denoiser.safetensors"
    weights = load_file(path)
    weights.pop("conv_in.bias")
    save_file(weights, path)
    with pytest.raises(BundleError, match=r"denoiser\.safetensors: .*conv_in\.bias"):
        load_networks(opened(bundle_copy))


def test_weights_that_are_no_safetensors(bundle_copy):
    (bundle_copy / "enhancer.safetensors").write_bytes(b"not weights")
    with pytest.raises(BundleError, match=r"enhancer\.safetensors: weights do not fit"):
        load_networks(opened(bundle_copy))


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation makes."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.most = max([self.most, *(part.numel() for part in tree_leaves(out) if isinstance(part, torch.Tensor))])
        return out


def find_largest_tensor(denoiser, enhancer, size):
    """Return the most elements of a tensor for one image, attention's scores included; without memory or arithmetic."""
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), LargestTensor() as largest:
        image = torch.empty(1, 1, size, size)
        join_projections(Denoiser(denoiser))(image, image, torch.zeros(1))
        join_projections(Enhancer(enhancer))(image)
    return largest.most


PAPER, DEMO, TINY = (PRESETS[name] for name in ("paper", "demo", "tiny"))


@pytest.mark.parametrize(
    ("denoiser", "enhancer", "size", "limit"),
    [
        (PAPER.denoiser, PAPER.enhancer, 256, 7),  # 128 x 128 tokens: 8 images have 2^31 scores
        (PAPER.denoiser, PAPER.enhancer, 512, 1),  # one image has 2^32: no batch is safe, the smallest is
        (DEMO.denoiser, DEMO.enhancer, 256, 511),  # 64 channels of 256 x 256 px, from the second level of stage 2
        (DEMO.denoiser, NO_ENHANCER, 256, 682),  # 48 channels of 256 x 256 px, at the top of stage 1
        (TINY.denoiser, TINY.enhancer, 64, 2047),  # 32 x 32 tokens
    ],
)
def test_a_batch_whose_tensors_are_below_2_31(denoiser, enhancer, size, limit):
    manifest = replace(
        open_bundle("demo").manifest, denoiser=denoiser, enhancer=enhancer, preprocessing=Preprocessing(size)
    )
    assert find_batch_limit("tensorrt", manifest) == find_batch_limit("onnxruntime", manifest) == limit
    assert find_batch_limit("aoti", manifest) is None
    if limit > 1:
        assert limit * find_largest_tensor(denoiser, enhancer, size) < 2**31


@pytest.mark.parametrize(("device", "most"), [(CPU, None), (GPU, 682)])
def test_onnxruntime_on_a_gpu_takes_no_more(monkeypatch, device, most):
    limits = []
    monkeypatch.setattr(onnxruntime, "OnnxRuntimeRunner", lambda *_, **options: limits.append(options["batch_max"]))
    onnxruntime.load_bundle(open_bundle("demo"), device, "fp32")
    assert limits == [most]


# --- a new runner: one module and one entry ---------------------------------------------------------------------------


TOY = """
from bsdiff_rt.runners.base import Runner

class ToyRunner(Runner):
    name = "toy"

    def denoise(self, x_t, cxr, t, out):
        out.copy_(cxr / 2)

    def enhance(self, x, out):
        out.copy_(x)

def load_bundle(bundle, device, precision):
    size = bundle.manifest.preprocessing.size
    return ToyRunner(device=device, precision=precision, batch_range=(1, None), image_size=size)
"""


@pytest.fixture
def toy_entry(tmp_path, monkeypatch):
    """Add a runner: one module, and one entry."""
    (tmp_path / "toy_runner.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    entry = RunnerEntry("toy", "toy_runner")
    monkeypatch.setitem(RUNNERS, "toy", entry)
    yield entry
    sys.modules.pop("toy_runner", None)


def test_a_new_runner_is_chosen_loaded_and_listed(toy_entry, tiny_bundle, cache):
    request = RunnerRequest(open_bundle(tiny_bundle), "toy", CPU)
    assert choose(request).runner == "toy"
    choice, runner = load_first(request)
    with runner:
        assert (choice.runner, runner.name, runner.precision) == ("toy", "toy", "fp32")
    assert describe_runners()["toy"] == "usable"
    with pytest.raises(EngineError, match="runner toy cannot be used on cpu: it computes in fp32 on cpu, not in bf16"):
        choose(RunnerRequest(open_bundle(tiny_bundle), "toy", CPU, "bf16"))


def test_a_new_runner_makes_pictures(toy_entry, tiny_bundle):
    cxr = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    with open_model(tiny_bundle, runner="toy", device="cpu", detail="model", raw_view=True, mirror=False) as model:
        soft_tissue = model.suppress(cxr).soft_tissue
    # The toy halves values in [-1, 1]: 0 becomes 0.25, 1 becomes 0.75.
    assert np.allclose(soft_tissue, 0.25 + cxr / 2, atol=2e-3)
