"""Devices, which runner runs where, and loading those without engines: nothing asked for is substituted."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from bsdiff_rt.bundle import MANIFEST, Bundle, Manifest, open_bundle, signed
from bsdiff_rt.config import PRESETS, Preprocessing
from bsdiff_rt.errors import BundleError, EngineError, SettingsError
from bsdiff_rt.runners import onnxruntime
from bsdiff_rt.runners import registry as runners
from bsdiff_rt.runners.eager import EagerRunner
from bsdiff_rt.runners.onnxruntime import OnnxRuntimeRunner
from bsdiff_rt.runners.registry import (
    batch_limit,
    load_networks,
    load_runner,
    resolve_device,
    resolve_precision,
    unavailable,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(params=[0, 2])
def gpus(request, monkeypatch):
    """A machine with so many CUDA devices, as far as torch.cuda says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    return request.param


def test_device_auto(gpus):
    assert resolve_device("auto") == (GPU if gpus else CPU)
    assert resolve_device("cpu") == CPU


@pytest.mark.parametrize(("name", "needed"), [("cuda", 1), ("cuda:0", 1), ("cuda:1", 2), ("cuda:2", 3)])
def test_device_by_name(gpus, name, needed):
    if gpus >= needed:
        assert resolve_device(name) == torch.device(name)
    else:
        with pytest.raises(SettingsError, match=f"--device {name}: this machine has {gpus} CUDA devices; use --device"):
            resolve_device(name)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cuda:-1", "meta", "mps", "cpu:1", "CPU", "cuda:0:1"])
def test_no_device(gpus, name):
    with pytest.raises(SettingsError, match=f"--device {name}: not .*use auto, cpu, cuda or cuda:N"):
        resolve_device(name)


@pytest.mark.parametrize(
    ("name", "device", "reason"),
    [
        ("eager", CPU, None),
        ("eager", GPU, None),
        ("aoti", CPU, None),
        ("aoti", GPU, None),
        ("onnxruntime", CPU, None),
        ("tensorrt", CPU, "it runs on NVIDIA GPUs, not on cpu"),
    ],
)
def test_what_runs_where(name, device, reason):
    assert unavailable(name, device) == reason


def test_packages_that_are_missing(monkeypatch):
    monkeypatch.setattr(runners, "find_spec", lambda _: None)
    assert unavailable("eager", CPU) is None
    assert unavailable("onnxruntime", CPU) == "the package onnxruntime is not installed"
    expected = "the package tensorrt is not installed (pip install 'bsdiff-rt[tensorrt]')"
    assert unavailable("tensorrt", GPU) == expected
    monkeypatch.setattr(runners, "find_spec", lambda _: object())
    assert unavailable("tensorrt", GPU) is None


def test_an_onnxruntime_that_cannot_be_imported_is_passed_over(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # its import raises ImportError
    monkeypatch.setattr(runners, "find_spec", lambda _: object())
    for device in (CPU, GPU):
        assert unavailable("onnxruntime", device).startswith("the onnxruntime installed cannot be loaded (")


def test_onnxruntime_on_a_gpu_needs_its_provider(monkeypatch):
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: providers)
    monkeypatch.setattr("onnxruntime.cuda_version", "13.0")
    monkeypatch.setattr("torch.version.cuda", "13.2")
    assert unavailable("onnxruntime", GPU) is None
    monkeypatch.setattr("torch.version.cuda", "12.8")  # its libraries are those that torch loads
    assert unavailable("onnxruntime", GPU).startswith("the onnxruntime installed is built for CUDA 13, torch for 12")
    providers.pop(0)
    assert unavailable("onnxruntime", GPU).endswith("has no CUDA provider; install onnxruntime-gpu in its place")
    assert unavailable("onnxruntime", CPU) is None


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize("runner", ["eager", "onnxruntime"])
def test_precision(runner, device):
    assert resolve_precision(runner, "auto", device) == resolve_precision(runner, "fp32", device) == "fp32"
    for precision in ("fp16", "bf16"):
        if (runner, precision, device) == ("onnxruntime", "fp16", GPU):
            assert resolve_precision(runner, precision, device) == "fp16"
            continue
        with pytest.raises(
            EngineError, match=f"it computes in fp32 on {device}, not in {precision}; use --precision auto"
        ):
            resolve_precision(runner, precision, device)


@pytest.mark.parametrize(("name", "kind"), [("onnxruntime", OnnxRuntimeRunner), ("eager", EagerRunner)])
def test_load(name, kind):
    with load_runner(open_bundle("demo"), name, CPU) as runner:
        assert type(runner) is kind
        assert (runner.name, runner.image_size) == (name, 256)


def test_what_cannot_be_loaded_is_never_substituted(monkeypatch):
    bundle = open_bundle("demo")
    with pytest.raises(EngineError, match="--runner tensorrt cannot be used on cpu: it runs on NVIDIA GPUs"):
        load_runner(bundle, "tensorrt", CPU)
    with pytest.raises(EngineError, match="it computes in fp32 on cpu, not in bf16"):
        load_runner(bundle, "eager", CPU, "bf16")
    with pytest.raises(EngineError, match="runner aoti needs a built engine; bsdiff-rt build-engine makes one"):
        load_runner(bundle, "aoti", CPU)
    monkeypatch.setattr(runners, "find_spec", lambda _: None)
    with pytest.raises(EngineError, match="the package onnxruntime is not installed; use --runner auto or eager"):
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
    return Bundle(folder, Manifest.from_json(signed(content)), "0" * 64)


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


@pytest.mark.parametrize(
    ("preset", "size", "limit"),
    [
        ("paper", 256, 7),  # 128 x 128 tokens: 8 images have 2^31 scores
        ("paper", 512, 1),  # one image has 2^32: no batch is safe, the smallest is
        ("demo", 256, 127),  # 64 x 64 tokens, in the enhancer
    ],
)
def test_a_batch_whose_scores_are_below_2_31(preset, size, limit):
    networks = PRESETS[preset]
    manifest = replace(
        open_bundle("demo").manifest,
        denoiser=networks.denoiser,
        enhancer=networks.enhancer,
        preprocessing=Preprocessing(size),
    )
    assert batch_limit("tensorrt", manifest) == batch_limit("onnxruntime", manifest) == limit
    assert batch_limit("aoti", manifest) is None


@pytest.mark.parametrize(("device", "most"), [(CPU, None), (GPU, 127)])
def test_onnxruntime_on_a_gpu_takes_no_more(monkeypatch, device, most):
    asked = []
    monkeypatch.setattr(runners, "unavailable", lambda *_: None)
    monkeypatch.setattr(onnxruntime, "OnnxRuntimeRunner", lambda *_, **options: asked.append(options["batch_max"]))
    load_runner(open_bundle("demo"), "onnxruntime", device)
    assert asked == [most]
