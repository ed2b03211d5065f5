"""The peers' table: rows of the contract, each peer the same network, and the reason for every one that is not here."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from helpers import ToyRunner
from typer.testing import CliRunner

from benchmarks import peers
from benchmarks.peers import (
    COMPILED,
    DIFFUSERS,
    PUBLISHED,
    add_ratios,
    app,
    build_published_networks,
    load_peers,
)
from bsdiff_rt.bench import document as bench_document
from bsdiff_rt.bench.candidates import Candidate
from bsdiff_rt.bench.measure import measure_batches
from bsdiff_rt.bench.networks import make_random_model
from bsdiff_rt.bench.plan import Plan
from bsdiff_rt.config import SAMPLERS, SamplerSettings, Schedule

CPU = torch.device("cpu")


@pytest.fixture
def rates(monkeypatch):
    """Takes the place of the device's own rates, which cost seconds."""
    monkeypatch.setattr(bench_document, "measure_matmul_rates", lambda *_: {"fp32": 1e12})
    monkeypatch.setattr(bench_document, "measure_copy_rate", lambda _: 1e10)


@pytest.fixture
def quick(monkeypatch):
    """Every call is done, and takes 1 s."""
    for module in ("bench.trial", "runners.timing"):
        monkeypatch.setattr(f"bsdiff_rt.{module}.time_call", lambda call, device: (call(), 1.0)[1])


def test_rows_follow_the_contract(tiny_bundle, tmp_path, rates):
    path = tmp_path / "p.json"
    arguments = ["--bundle", str(tiny_bundle), "--device", "cpu", "--batch", "2", "--repeats", "2", "--json", str(path)]
    arguments += ["--steps", "2", "--peer", PUBLISHED, "--peer", DIFFUSERS, "--runner", "onnxruntime"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    written = json.loads(path.read_text())
    assert [row["name"] for row in written["rows"]] == ["eager", "onnxruntime", PUBLISHED, DIFFUSERS]
    for row in written["rows"]:
        assert row["batch"] == 2
        assert 0 < row["step_ms"] <= row["step_ms_p95"]
        assert row["published_over_this"] > 0
        # The same weights and noise in fp32, sums in another order; an error of 1e-4 would be 86 dB.
        assert row["name"] == "eager" or row["psnr_vs_eager"] > 90
    assert written["rows"][2]["published_over_this"] == 1.0
    assert written["device"].endswith("threads")
    assert "published / this" in result.stdout.splitlines()[0]


@pytest.mark.parametrize("preset", ["tiny", "demo"])
def test_the_published_networks_are_ours(preset):
    """With our weights, in the presets' shapes; the demo's adds the X-ray to its output."""
    model = make_random_model(preset, 32)
    generator = torch.Generator().manual_seed(0)
    x_t, cxr = (torch.randn(2, 1, 32, 32, generator=generator) for _ in range(2))
    t = torch.tensor([3.0, 900.0])
    with torch.no_grad():
        for ours, theirs, inputs in zip(
            model.load_networks(), build_published_networks(model), ((x_t, cxr, t), (cxr,)), strict=True
        ):
            expected = ours(*inputs)
            torch.testing.assert_close(theirs.eval()(*inputs), expected, rtol=1e-4, atol=1e-4)  # fp32, other order
            assert expected.std() > 0.01


@pytest.mark.parametrize(
    ("name", "objective"),
    # Theirs of dpmpp-2m does not clamp x0, which the toy's eps and v leave outside [-1, 1].
    [*((name, objective) for name in ("ddpm", "ddim") for objective in ("eps", "v", "x0")), ("dpmpp-2m", "x0")],
)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers and NumPy 2
def test_diffusers_loop_makes_our_picture(name, objective, quick):
    tiny = make_random_model("tiny", 16)
    sampler = SamplerSettings(name, 5)
    model = replace(tiny, schedule=Schedule(objective=objective), sampler=sampler, enhance=False)
    eager = Candidate("eager", ToyRunner(16))
    (loop,), absent = load_peers((DIFFUSERS,), model, CPU, eager)
    assert absent == []
    ((rows, failed),) = measure_batches(Plan(model, CPU, 5, 1, 1), [eager, loop], [2])
    assert failed == []
    assert rows[1].equals_eager or rows[1].psnr_vs_eager > 60  # float32 on both sides, 1/alpha of the noisiest step


def test_every_other_sampler_is_named(quick):
    (other,) = set(SAMPLERS) - {"ddpm", "ddim", "dpmpp-2m"}
    model = replace(make_random_model("tiny", 16), sampler=SamplerSettings(other, 5))
    _, (absent,) = load_peers((DIFFUSERS,), model, CPU, Candidate("eager", ToyRunner(16)))
    assert (absent.reason, absent.exit_code) == ("diffusers has no sampler release", 4)


def test_what_is_not_asked_for_and_not_here_has_its_reason(monkeypatch):
    for package in ("generative.networks.nets", "diffusers"):
        monkeypatch.setitem(sys.modules, package, None)
    model = make_random_model("tiny", 16)
    found, absent = load_peers((), model, CPU, Candidate("eager", ToyRunner(16)))
    assert found == []
    reasons = {entry.name: entry.reason for entry in absent}
    assert {entry.exit_code for entry in absent} == {0}
    assert reasons[PUBLISHED] == (
        "the package generative.networks.nets is not installed; `pip install 'bsdiff-rt[peers]'`"
    )
    assert reasons[DIFFUSERS] == "the package diffusers is not installed; `pip install 'bsdiff-rt[peers]'`"
    assert reasons[COMPILED].startswith("compiling takes minutes on a CPU; request it with --peer")


def test_a_peer_that_breaks_is_no_reason_to_stop(monkeypatch):
    def broken(*_):
        raise RuntimeError("no")

    monkeypatch.setitem(peers.PEERS, PUBLISHED, broken)
    found, absent = load_peers(
        (PUBLISHED, DIFFUSERS), make_random_model("tiny", 16), CPU, Candidate("eager", ToyRunner(16))
    )
    assert [candidate.name for candidate in found] == [DIFFUSERS]
    assert [(entry.name, entry.reason, entry.exit_code) for entry in absent] == [(PUBLISHED, "RuntimeError: no", 1)]


def test_compiled_is_the_published_network_under_the_compiler(monkeypatch):
    """The compiler itself takes minutes; that it is given the networks, in this precision and mode, is what counts."""
    given = []
    monkeypatch.setattr(torch, "compile", lambda network, mode: given.append((network, mode)) or network)
    candidate = peers.load_compiled(make_random_model("tiny", 16), CPU, Candidate("eager", ToyRunner(16)))
    assert [type(network).__name__ for network, _ in given] == ["PublishedDenoiser", "PublishedEnhancer"]
    assert {mode for _, mode in given} == {"max-autotune"}
    assert (candidate.name, candidate.runner.precision) == (COMPILED, "fp32")


def test_ratios_are_to_the_published_row_of_the_same_batch():
    rows = [
        {"name": "a", "batch": 1, "step_times_ms": [1.0, 2.0, 1.0]},
        {"name": PUBLISHED, "batch": 1, "step_times_ms": [3.0, 6.0, 4.0]},
        {"name": "a", "batch": 2, "step_times_ms": [1.0]},
    ]
    assert [row["published_over_this"] for row in add_ratios(rows)] == [3.0, 1.0, None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peer", "nobody"], "'nobody' is not known"),
        (["--batch", "0"], "'0' is not a list of whole numbers above 0"),
        (["--batch", "1,"], "'1,' is not a list"),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.output


def test_errors_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peers", "--plot", "x.txt"])
    with pytest.raises(SystemExit) as end:
        peers.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == "plot x.txt: name a .png, .pdf or .svg file\n"
