"""Models and runners that a benchmark loads, and the reasons for those it cannot load."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_toys import CPU, make_model
from helpers import ToyRunner

from bsdiff_rt.bench import networks
from bsdiff_rt.bench.candidates import Wanted, describe_missing, load_candidates, parse_wanted
from bsdiff_rt.bench.networks import BASELINE, make_random_model, open_bench_model
from bsdiff_rt.bench.plan import choose_steps
from bsdiff_rt.config import PRESETS, SamplerSettings
from bsdiff_rt.engines import select as choice
from bsdiff_rt.errors import BundleError, EngineError, SettingsError


def test_random_weights_keep_activations_near_one():
    networks = make_random_model("tiny", 32).load_networks()
    again = make_random_model("tiny", 32).load_networks()
    x = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for network, other, inputs in zip(networks, again, ((x, x, torch.tensor([500.0])), (x,)), strict=True):
            out = network(*inputs)
            assert 0.01 < float(out.std()) < 10
            assert torch.equal(out, other(*inputs))  # seeded


def test_open_bench_model(tiny_bundle, tmp_path, monkeypatch):
    opened = open_bench_model(str(tiny_bundle))
    assert (opened.name, opened.size, opened.sampler.steps) == ("tiny", 64, 3)
    assert opened.bundle is not None
    paper = open_bench_model("paper")
    assert (paper.size, paper.bundle, paper.sampler) == (256, None, SamplerSettings("ddpm", 1000))
    assert paper.denoiser == PRESETS["paper"].denoiser
    assert open_bench_model("demo").bundle is not None
    with pytest.raises(BundleError, match="no bundle 'nothing'"):
        open_bench_model("nothing")


def test_default_steps():
    assert choose_steps(make_model()) == 3
    assert choose_steps(make_random_model("paper")) == 10


def test_without_a_bundle_only_eager_runs():
    found, absent = load_candidates(make_random_model("tiny", 16), Wanted(), CPU)
    assert [candidate.name for candidate in found] == [BASELINE]
    names = ("onnxruntime", "aoti", "openvino", "tensorrt-rtx", "tensorrt")
    assert [(entry.name, entry.exit_code) for entry in absent] == [(name, 0) for name in names]
    assert all(f"ask for runner {entry.runner} by name" in entry.reason for entry in absent)
    _, absent = load_candidates(make_random_model("tiny", 16), Wanted(("tensorrt",)), CPU)
    assert [(entry.name, entry.precision, entry.exit_code) for entry in absent] == [("tensorrt", "auto", 4)]


def test_a_preset_gets_a_bundle_for_a_runner_that_reads_one(tiny_bundle, tmp_path, monkeypatch):
    """`--bundle paper --runner onnxruntime`: made once, in the cache."""
    monkeypatch.setattr(networks, "find_random_bundle", lambda preset: tmp_path / preset)
    commands = []

    def export(command, **_):
        commands.append(command[1:5])
        shutil.copytree(tiny_bundle, command[-1])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(networks.subprocess, "run", export)
    for _ in range(2):
        opened = open_bench_model("paper", ("eager", "onnxruntime"))
        assert opened.bundle is not None
    assert commands == [["-m", "export", "random", "paper"]]
    assert open_bench_model("paper", ("eager",)).bundle is None
    found, absent = load_candidates(opened, Wanted(("onnxruntime",)), CPU)
    assert ([candidate.name for candidate in found], absent) == ([BASELINE, "onnxruntime"], [])


def test_a_preset_without_the_exporter_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "find_random_bundle", lambda preset: tmp_path / preset)
    monkeypatch.setattr(networks, "CLONE", tmp_path)
    with pytest.raises(SettingsError, match="paper: runner aoti needs a bundle on disk, and the exporter is not"):
        open_bench_model("paper", ("aoti",))
    monkeypatch.undo()
    monkeypatch.setattr(networks, "find_random_bundle", lambda preset: tmp_path / preset)
    failed = SimpleNamespace(returncode=1, stderr="Traceback\nOSError: no space left")
    monkeypatch.setattr(networks.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SettingsError, match=r"could not be exported \(OSError: no space left\)"):
        open_bench_model("paper", ("aoti",))


def test_the_folder_of_an_engine_among_the_runners(tmp_path):
    assert parse_wanted(["onnxruntime", str(tmp_path)]) == Wanted(("onnxruntime",), (), (tmp_path,))
    assert parse_wanted([str(tmp_path)]).runners == (BASELINE,)  # nothing that was not asked for
    with pytest.raises(SettingsError, match="nowhere is not known"):
        parse_wanted([str(tmp_path / "nowhere")])


@pytest.fixture
def fake_engines(monkeypatch):
    """aoti in fp16 and bf16 is built, nothing else."""

    def load(bundle, runner, device, precision="auto"):
        if runner in ("onnxruntime", "x/mine") or (runner == "aoti" and precision in ("fp16", "bf16")):
            return ToyRunner(64)
        raise EngineError(f"no {runner} in {precision}")

    monkeypatch.setattr(choice, "load", load)


def test_every_engine_that_is_built_is_a_candidate(fake_engines, tiny_bundle):
    found, absent = load_candidates(open_bench_model(str(tiny_bundle)), Wanted(), CPU)
    assert [candidate.name for candidate in found] == [BASELINE, "onnxruntime", "aoti bf16", "aoti fp16"]
    reasons = [(name, f"no {name} in fp32", 0) for name in ("openvino", "tensorrt-rtx", "tensorrt")]
    assert [(entry.name, entry.reason, entry.exit_code) for entry in absent] == reasons


def test_one_runner_in_two_precisions_has_two_names(fake_engines, tiny_bundle):
    """Rows are told apart by their names: of two with one name, only the second was measured."""
    wanted = Wanted(("onnxruntime",), ("fp32", "bf16"))
    found, _ = load_candidates(open_bench_model(str(tiny_bundle)), wanted, CPU)
    assert [candidate.name for candidate in found] == [BASELINE, "onnxruntime fp32", "onnxruntime bf16"]


def test_what_is_asked_for_by_name_and_missing_fails_the_run(fake_engines, tiny_bundle):
    opened = open_bench_model(str(tiny_bundle))
    found, absent = load_candidates(opened, Wanted(("aoti", "tensorrt"), ("fp16", "fp32")), CPU)
    assert [candidate.name for candidate in found] == [BASELINE, "aoti fp16"]
    assert [(entry.name, entry.exit_code) for entry in absent] == [
        ("aoti fp32", 4),
        ("tensorrt fp16", 4),
        ("tensorrt fp32", 4),
    ]
    _, absent = load_candidates(opened, Wanted(("eager",), ("fp16",)), CPU)
    assert [entry.reason for entry in absent] == [
        "runner eager computes in fp32 alone, not in fp16: it is the baseline"
    ]


def test_a_missing_engine_comes_with_the_command_that_builds_it():
    error = EngineError("no engine. Build one.", build={"bundle": "demo", "runner": "aoti"})
    entry = describe_missing("aoti fp32", "aoti", "fp32", None, error)
    assert (entry.reason, entry.exit_code) == (
        "no engine. Build one. Run: bsdiff-rt build-engine demo --runner aoti",
        4,
    )


def test_an_engines_folder(fake_engines, tiny_bundle):
    found, _ = load_candidates(open_bench_model(str(tiny_bundle)), Wanted(("eager",), (), (Path("x/mine"),)), CPU)
    assert [candidate.name for candidate in found] == [BASELINE, "engine mine"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"runners": ("pycuda",)}, "pycuda is not known; choose from tensorrt, tensorrt-rtx, openvino, "),
        ({"precisions": ("int8",)}, "int8 is not known; choose from fp32, bf16, fp16"),
    ],
)
def test_unknown_names(names, message):
    with pytest.raises(SettingsError, match=message):
        Wanted(**names)
