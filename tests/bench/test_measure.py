"""The command `bench`: what is measured in which order, what the figures are, what happens to what fails."""

from __future__ import annotations

import json
import math
import mmap
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from helpers import ToyRunner

from bsdiff_rt.bench import candidates as bench_model
from bsdiff_rt.bench import document as bench_report
from bsdiff_rt.bench import measure as bench
from bsdiff_rt.bench.candidates import (
    BASELINE,
    Candidate,
    Memory,
    Model,
    Wanted,
    load_candidates,
    open_model,
    random_model,
)
from bsdiff_rt.bench.document import BenchSettings, aligned, conditions, git_commit, notes, run, table
from bsdiff_rt.bench.measure import Plan, default_steps, measure, percentile_95, plot, psnr_db
from bsdiff_rt.config import PRESETS, SamplerSettings, Schedule
from bsdiff_rt.engines import select as choice
from bsdiff_rt.errors import BundleError, EngineError, SettingsError

CPU = torch.device("cpu")
SIZE_PX = 16
CONTRACT = {
    *("name", "runner", "precision", "batch", "step_ms", "step_ms_p95", "image_s", "images_per_second"),
    *("peak_bytes", "psnr_vs_eager"),
}


def model(**changes) -> Model:
    tiny = PRESETS["tiny"]
    made = Model(
        "toy", tiny.denoiser, tiny.enhancer, Schedule(objective="x0"), SamplerSettings("ddpm", 3), SIZE_PX, True
    )
    return replace(made, **changes)


def plan(**changes) -> Plan:
    return replace(Plan(model(), CPU, 3, 5, 2, {"fp32": 1e12}), **changes)


def toys(*names: str) -> list[Candidate]:
    return [Candidate(name, ToyRunner(SIZE_PX), Memory(1000, 900)) for name in names]


@pytest.fixture
def rates(monkeypatch):
    """Takes the place of the device's own rates, which cost seconds."""
    monkeypatch.setattr(bench_report, "matmul_ceilings", lambda _: {"fp32": 1e12})
    monkeypatch.setattr(bench_report, "copy_bandwidth", lambda _: 1e10)


# --- statistics ---


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (5, 5), (19, 19), (20, 19), (100, 95), (101, 96)])
def test_the_95th_percentile_is_a_measured_value(count, expected):
    assert percentile_95([float(value) for value in range(count, 0, -1)]) == expected


def test_psnr():
    zero = torch.zeros(4, 4)
    assert psnr_db(zero, zero + 0.2, 2.0) == pytest.approx(20.0, abs=1e-5)
    assert psnr_db(zero, zero, 2.0) is None


# --- rows ---


def test_the_figures_of_a_row(clock):
    """In seconds: rehearsal 1 call; then a step to warm up and 5 that count; 2 rounds of image and enhance."""
    clock += [1.0]  # the first step, in the rehearsal
    clock += [50.0, 2.0, 4.0, 6.0, 8.0, 10.0, 20.0, 0.5, 24.0, 0.5]
    ((rows, absent),) = measure(plan(), toys(BASELINE), [2])
    (row,) = rows
    assert absent == []
    assert (row.name, row.runner, row.precision, row.batch, row.steps) == (BASELINE, "toy", "fp32", 2, 3)
    assert (row.step_ms, row.step_ms_p95, row.enhance_ms) == (6000.0, 10000.0, 500.0)
    assert row.step_times_ms == (2000.0, 4000.0, 6000.0, 8000.0, 10000.0)
    assert (row.image_s, row.image_s_p95, row.images_per_second) == (22.0, 24.0, 2 / 22.0)
    assert row.outside_network_s == 22.0 - 3 * 6.0 - 0.5
    assert row.full_image_s_extrapolated == 1000 * 6.0 + 0.5
    assert row.tflops == pytest.approx(plan().flop * 2 / 6.0 / 1e12)
    assert row.ceiling == "fp32"
    assert row.share_of_ceiling == pytest.approx(row.tflops)  # of 1 TFLOP/s
    assert (row.psnr_vs_eager, row.psnr_step_vs_eager, row.equals_eager) == (None, None, None)  # it is the baseline
    assert (row.image_s_uncaptured, row.captured_equals_uncaptured) == (None, None)  # no graphs on a CPU
    assert row.eager_over_this == 1.0
    assert set(asdict(row)) >= CONTRACT


def test_all_steps_are_a_measurement_and_not_extrapolated(clock):
    full = plan(model=model(schedule=Schedule(train_steps=5, objective="x0")), steps=5)
    ((rows, _),) = measure(full, toys(BASELINE), [1])
    assert rows[0].full_image_s_extrapolated is None


def test_stage_2_is_measured_only_where_the_model_has_it(clock):
    candidates = toys(BASELINE)
    ((rows, _),) = measure(plan(model=model(enhance=False)), candidates, [1])
    assert rows[0].enhance_ms is None
    assert rows[0].full_image_s_extrapolated == 1000.0
    assert candidates[0].runner.enhanced == 0


def test_parity_is_measured_with_the_same_noise(clock):
    same, other = ToyRunner(SIZE_PX), ToyRunner(SIZE_PX)
    other.denoise = lambda x_t, cxr, t, out: out.copy_(0.7 * cxr + 0.2 * torch.tanh(x_t) + 0.001)
    candidates = [*toys(BASELINE), Candidate("same", same), Candidate("other", other)]
    ((rows, _),) = measure(plan(), candidates, [2])
    _, first, second = rows
    assert (first.equals_eager, first.psnr_vs_eager, first.psnr_step_vs_eager) == (True, None, None)
    assert second.equals_eager is False
    assert second.psnr_vs_eager == pytest.approx(20 * math.log10(2.0 / 0.0009), abs=1)  # stage 2 is 0.9 x; x_t drifts
    assert 60 < second.psnr_step_vs_eager < 66  # 0.001 of a range of 1.4 to 1.8
    assert first.peak_bytes is None  # what its loading took is not known


def test_memory_is_that_of_loading_and_of_the_first_image(clock, monkeypatch):
    monkeypatch.setattr(bench, "memory_mark", lambda _: 5)
    monkeypatch.setattr(bench, "memory_since", lambda _, mark: Memory(200 + mark, 100))
    (toy,) = toys(BASELINE)
    for loading, most in ((Memory(1000, 900), 900 + 205), (Memory(3000, 900), 3000)):  # copies that loading let go of
        ((rows, _),) = measure(plan(), [replace(toy, loading=loading)], [1])
        assert rows[0].peak_bytes == most


def test_memory_is_read_before_the_image_is_made_a_second_way(clock, monkeypatch):
    """`infer` never holds the recorded loop's buffers and the plain loop's at once."""
    order = []
    picture = torch.zeros(1, 1, SIZE_PX, SIZE_PX)
    ways = {name: lambda name=name: order.append(name) or picture for name in ("image", "uncaptured")}
    monkeypatch.setattr(bench.Trial, "image_calls", lambda _: ways)
    monkeypatch.setattr(bench, "memory_mark", lambda _: 5)
    monkeypatch.setattr(bench, "memory_since", lambda *_: order.append("memory") or Memory(1, 1))
    ((rows, _),) = measure(plan(), toys(BASELINE), [1])
    assert order[:3] == ["image", "memory", "uncaptured"]
    assert rows[0].captured_equals_uncaptured is True


def test_memory_of_a_process_rises_with_what_it_takes():
    mark = bench_model.memory_mark(CPU)
    if mark is None:
        pytest.skip("not Linux")
    with mmap.mmap(-1, 50_000_000) as block:  # not a tensor: malloc may keep what it is given back
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
    taken = bench_model.memory_since(CPU, mark)
    assert 45e6 < taken.most < 200e6
    assert taken.held < taken.most - 45e6
    assert bench_model.memory_since(CPU, None) is None


def test_where_memory_cannot_be_told(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_model, "_CLEAR_REFS", tmp_path / "no such folder" / "clear_refs")
    assert bench_model.memory_mark(CPU) is None


def test_ceilings_by_precision(clock):
    on_cuda = plan(ceilings={"fp32": 1e12, "tf32": 4e12, "bf16": 8e12})
    found = [bench._share(on_cuda, precision, 2e12) for precision in ("fp32", "bf16", "fp16")]
    assert [share["ceiling"] for share in found] == ["tf32", "bf16", None]
    assert [share["share_of_ceiling"] for share in found] == [0.5, 0.25, None]


def test_a_loop_of_its_own_is_measured_in_place_of_ours(clock):
    calls = []

    def loop(runner, cxr, table, draw):
        calls.append(runner)
        return draw(0).clamp(-1, 1)

    candidate = replace(toys("peer")[0], loop=loop)
    ((rows, absent),) = measure(plan(), [*toys(BASELINE), candidate], [1])
    assert absent == []
    assert len(calls) == 3  # the rehearsal, two rounds
    assert rows[1].equals_eager is False


# --- what fails ---


def test_what_fails_has_an_entry_and_the_others_their_rows(clock):
    broken, nan = ToyRunner(SIZE_PX), ToyRunner(SIZE_PX)

    def no_memory(_):
        raise RuntimeError("out of\nmemory")

    broken.before = no_memory
    nan.after = lambda _, out: out.fill_(math.nan)
    small = ToyRunner(SIZE_PX)
    small.batch_range = (1, 1)
    small.denoise = lambda x_t, cxr, t, out: (small.check(x_t), out.copy_(x_t))
    candidates = [*toys(BASELINE), *(Candidate(n, r) for n, r in (("broken", broken), ("nan", nan), ("small", small)))]
    (one, absent_one), (two, absent_two) = measure(plan(), candidates, [1, 2])
    assert [row.name for row in one] == [BASELINE, "small"]
    assert [row.name for row in two] == [BASELINE]
    assert [(m.name, m.batch, m.exit_code, m.reason) for m in absent_one] == [
        ("broken", 1, 1, "RuntimeError: out of memory"),
        ("nan", 1, 4, "nan, batch 1: NaN or infinity came out of the networks"),
    ]
    assert absent_two[2].reason.startswith("batch of 2 given to the toy runner, which takes 1 to 1")


def test_without_a_baseline_nothing_is_compared(clock):
    broken = Candidate(BASELINE, ToyRunner(SIZE_PX))
    broken.runner.after = lambda _, out: out.fill_(math.nan)
    ((rows, absent),) = measure(plan(), [broken, *toys("other")], [1])
    assert (rows[0].name, rows[0].psnr_vs_eager, rows[0].equals_eager, rows[0].eager_over_this) == (
        "other",
        None,
        None,
        None,
    )
    assert absent[0].name == BASELINE


# --- the model and its runners ---


def test_random_weights_keep_activations_near_one():
    networks = random_model("tiny", 32).networks()
    again = random_model("tiny", 32).networks()
    x = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for network, other, inputs in zip(networks, again, ((x, x, torch.tensor([500.0])), (x,)), strict=True):
            out = network(*inputs)
            assert 0.01 < float(out.std()) < 10
            assert torch.equal(out, other(*inputs))  # seeded


def test_open_model(tiny_bundle, tmp_path, monkeypatch):
    opened = open_model(str(tiny_bundle))
    assert (opened.name, opened.size, opened.sampler.steps) == ("tiny", 64, 3)
    assert opened.bundle is not None
    paper = open_model("paper")
    assert (paper.size, paper.bundle, paper.sampler) == (256, None, SamplerSettings("ddpm", 1000))
    assert paper.denoiser == PRESETS["paper"].denoiser
    assert open_model("demo").bundle is not None
    with pytest.raises(BundleError, match="no bundle 'nothing'"):
        open_model("nothing")


def test_default_steps():
    assert default_steps(model()) == 3
    assert default_steps(random_model("paper")) == 10


def test_without_a_bundle_only_eager_runs():
    found, absent = load_candidates(random_model("tiny", 16), Wanted(), CPU)
    assert [candidate.name for candidate in found] == [BASELINE]
    assert [(entry.name, entry.exit_code) for entry in absent] == [("onnxruntime", 0), ("aoti", 0), ("tensorrt", 0)]
    assert all("needs a bundle on disk: `python -m export random paper -o DIR`" in entry.reason for entry in absent)
    _, absent = load_candidates(random_model("tiny", 16), Wanted(("tensorrt",)), CPU)
    assert [(entry.name, entry.precision, entry.exit_code) for entry in absent] == [("tensorrt", "auto", 4)]


@pytest.fixture
def fake_engines(monkeypatch):
    """aoti in fp16 and bf16 is built, nothing else."""

    def load(bundle, runner, device, precision="auto", folder=None):
        if runner == "onnxruntime" or (runner == "aoti" and precision in ("fp16", "bf16")) or folder is not None:
            return ToyRunner(64)
        raise EngineError(f"no {runner} in {precision}")

    monkeypatch.setattr(choice, "load", load)


def test_every_engine_that_is_built_is_a_candidate(fake_engines, tiny_bundle):
    found, absent = load_candidates(open_model(str(tiny_bundle)), Wanted(), CPU)
    assert [candidate.name for candidate in found] == [BASELINE, "onnxruntime", "aoti bf16", "aoti fp16"]
    assert [(entry.name, entry.reason, entry.exit_code) for entry in absent] == [("tensorrt", "no tensorrt in fp32", 0)]


def test_what_is_asked_for_by_name_and_missing_fails_the_run(fake_engines, tiny_bundle):
    opened = open_model(str(tiny_bundle))
    found, absent = load_candidates(opened, Wanted(("aoti", "tensorrt"), ("fp16", "fp32")), CPU)
    assert [candidate.name for candidate in found] == [BASELINE, "aoti fp16"]
    assert [(entry.name, entry.exit_code) for entry in absent] == [
        ("aoti fp32", 4),
        ("tensorrt fp16", 4),
        ("tensorrt fp32", 4),
    ]
    _, absent = load_candidates(opened, Wanted(("eager",), ("fp16",)), CPU)
    assert [entry.reason for entry in absent] == [
        "--precision fp16: runner eager computes in fp32, the baseline of all others"
    ]


def test_an_engines_folder(fake_engines, tiny_bundle):
    found, _ = load_candidates(open_model(str(tiny_bundle)), Wanted(("eager",), (), (Path("x/mine"),)), CPU)
    assert [candidate.name for candidate in found] == [BASELINE, "engine mine"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"runners": ("pycuda",)}, "--runner pycuda: not known; choose from eager, onnxruntime, aoti, tensorrt"),
        ({"precisions": ("int8",)}, "--precision int8: not known; choose from fp32, bf16, fp16"),
    ],
)
def test_unknown_names(names, message):
    with pytest.raises(SettingsError, match=message):
        Wanted(**names)


# --- the document ---


def test_run_closes_its_runners_and_tells_after_each_batch(rates, clock, monkeypatch):
    candidates = toys(BASELINE)
    monkeypatch.setattr(bench_report, "open_model", lambda _: model())
    monkeypatch.setattr(bench_report, "load_candidates", lambda *_: (candidates, []))
    rows = []
    run(BenchSettings(device="cpu", batches=(1, 2)), lambda document: rows.append(len(document.rows)))
    assert rows == [1, 2]
    assert candidates[0].runner.closed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": (4, 0)}, "--batch 4,0: give whole numbers above 0"),
        ({"batches": ()}, "--batch : give"),
        ({"repeats": 0}, "--repeats 0: give 1 or more"),
        ({"steps": 0}, "0 sampling steps asked for"),
        ({"steps": 1001}, "1001 sampling steps asked for"),
        ({"device": "gpu"}, "--device gpu"),
    ],
)
def test_settings_are_refused_before_anything_is_measured(changes, message, monkeypatch):
    monkeypatch.setattr(bench_report, "matmul_ceilings", lambda _: pytest.fail("measured"))
    settings = replace(BenchSettings(bundle="paper", device="cpu"), **changes)
    with pytest.raises(SettingsError, match=message):
        run(settings)


def test_conditions_and_commit(tmp_path):
    found = conditions(CPU)
    assert found["packages"]["torch"] == torch.__version__
    assert found["fp32_matmul"] == torch.get_float32_matmul_precision()
    assert found["started"]
    assert git_commit(tmp_path) is None
    if found["git"] is not None:
        assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?", found["git"])
    assert bench_report._output("no-such-program-here") is None
    assert bench_report._output("false") is None


def test_the_table_says_what_is_extrapolated_and_what_is_missing(clock):
    document = bench_report.Document({"train_steps": 1000})
    ((document.rows, _),) = measure(plan(), [*toys(BASELINE), *toys("twin")], [1])
    header, first, second = table(document.as_dict())
    assert "1000 x step s, extrapolated" in header
    cells = dict(zip(header, second, strict=True))
    assert (cells["runner"], cells["PSNR image dB"], cells["PSNR step dB"]) == ("twin", "equal", "equal")
    assert dict(zip(header, first, strict=True))["PSNR image dB"] == "-"
    assert "same bits" not in header
    found = document.as_dict()
    found["rows"][0] |= {"image_s_uncaptured": 2.5, "captured_equals_uncaptured": False}
    header, first, second = table(found)
    assert (first[-2:], second[-2:]) == (["2.5", "NO"], ["-", "-"])
    assert len({len(line) for line in aligned(table(found))}) == 1


# --- the command ---


def test_bench(cli, tiny_bundle, tmp_path, rates):
    written, drawn = tmp_path / "b.json", tmp_path / "b.png"
    shared = ("bench", "--bundle", tiny_bundle, "--device", "cpu", "--repeats", 2)
    done = cli(
        *shared, "--runner", "onnxruntime", "--batch", "1,2", "--steps", 2, "--json-file", written, "--plot", drawn
    )
    assert (done.code, "measuring the device's own rates" in done.err) == (0, True)
    found = json.loads(written.read_text())
    assert [(row["name"], row["batch"]) for row in found["rows"]] == [
        ("eager", 1),
        ("onnxruntime", 1),
        ("eager", 2),
        ("onnxruntime", 2),
    ]
    for row in found["rows"]:
        assert set(row) >= CONTRACT
        assert 0 < row["step_ms"] <= row["step_ms_p95"]
        assert row["images_per_second"] == pytest.approx(row["batch"] / row["image_s"])
        assert row["steps"] == 2
        # fp32 on both sides, sums in another order; an error of 1e-4 would be 86 dB.
        assert row["name"] == "eager" or (row["psnr_vs_eager"] > 90 and row["psnr_step_vs_eager"] > 90)
    assert found["device"].endswith("threads")
    assert found["bundle"]["name"] == "tiny"
    assert found["matmul_tflops"] == {"fp32": 1.0}
    assert (found["sampler"], found["steps"], found["repeats"], found["image_repeats"]) == ("ddim", 2, 2, 1)
    assert found["not_measured"] == []
    assert drawn.read_bytes().startswith(b"\x89PNG")
    lines = done.out.splitlines()
    assert lines[0].startswith("runner")
    assert [line.split()[0] for line in lines[1:5]] == ["eager", "onnxruntime"] * 2
    assert "image: ddim, 2 steps" in lines[5]


def test_what_was_asked_for_and_is_missing_ends_with_its_exit_code(cli, tiny_bundle, tmp_path, rates):
    written = tmp_path / "b.json"
    arguments = ("--bundle", tiny_bundle, "--device", "cpu", "--batch", 1, "--steps", 1, "--repeats", 1)
    done = cli("bench", *arguments, "--runner", "tensorrt,eager", "--json-file", written)
    assert done.code == 4
    assert re.search(r"^not measured: tensorrt: --runner tensorrt cannot be used on cpu", done.out, re.MULTILINE)
    early, late = "tensorrt will not be measured: --runner tensorrt cannot", "warming up"
    assert done.err.index(early) < done.err.index(late)
    found = json.loads(written.read_text())
    assert [row["name"] for row in found["rows"]] == ["eager"]
    assert [entry["name"] for entry in found["not_measured"]] == ["tensorrt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "0"), "'0' is not a whole number above 0"),
        (("--batch", "1,x"), "'x' is not a whole number above 0"),
        (("--runner", "eager,pycuda"), "--runner pycuda: not known"),
        (("--precision", "int8"), "--precision int8: not known"),
        (("--json-file", "nowhere/b.json"), "there is no folder nowhere"),
        (("--plot", "nowhere/b.png"), "there is no folder nowhere"),
        (("--plot", "b.txt"), "name a .png, .pdf or .svg file"),
    ],
)
def test_arguments_that_are_refused(cli, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli("bench", *arguments)
    assert done.code == 2
    assert message in " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.err).split())


def test_a_plot_without_matplotlib(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(plot, "find_spec", lambda _: None)
    done = cli("bench", "--plot", tmp_path / "b.png")
    assert (done.code, done.out) == (2, "")
    assert "needs matplotlib, which is not installed; `pip install matplotlib`" in done.err


def test_nothing_measured_is_nothing_to_draw(tmp_path):
    with pytest.raises(SettingsError, match="nothing was measured, so there is nothing to draw"):
        plot.draw({"rows": []}, tmp_path / "b.png")


def test_help_names_every_default(cli):
    shown = cli("bench", "--help")
    assert shown.code == 0
    for text in ("default: demo", "default: auto", "1,4,8; 1 on a CPU", "20; 5 on a CPU", "all that can be used"):
        assert text in " ".join(shown.out.split())


def test_notes(clock):
    found = {"device": "D", "bundle": {"name": "b"}, "size_px": 8, "sampler": "ddim", "steps": 2, "enhance": False}
    found |= {"repeats": 5, "image_repeats": 1, "matmul_tflops": {"fp32": 0.5}, "copy_gb_s": 12.0, "mirror": False}
    found |= {"work_per_image": {"denoiser": {"flop": 3e9}}}
    found["not_measured"] = [{"name": "aoti", "batch": 4, "reason": "why"}, {"name": "x", "batch": None, "reason": "w"}]
    conditions_line, work, first, second = notes(found)
    assert (
        conditions_line
        == "D; b, 8 px; image: ddim, 2 steps, without stage 2; medians of 5 steps and 1 images, measured in turn"
    )
    assert "without stage 2, one of the two passes that infer makes" in notes(found | {"mirror": True})[0]
    assert work == "one step is 3 GFLOP per image; matrix products here reach, in TFLOP/s: fp32 0.5; copies 12 GB/s"
    assert (first, second) == ("not measured: aoti, batch 4: why", "not measured: x: w")


@pytest.mark.gpu
def test_captured_images_are_the_uncaptured_ones_to_the_bit():
    device = torch.device("cuda", 0)
    tiny = random_model("tiny", 64)
    found, _ = load_candidates(tiny, Wanted(("eager",)), device)
    ((rows, absent),) = measure(Plan(tiny, device, 5, 3, 2), found, [2])
    assert absent == []
    assert rows[0].captured_equals_uncaptured is True
    assert rows[0].image_s_uncaptured > 0
    assert rows[0].peak_bytes > 0
