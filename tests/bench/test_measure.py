"""Times and comparisons: what is measured in which order, what the figures are, what happens to what fails."""

from __future__ import annotations

import math
import mmap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from bench_toys import CONTRACT, CPU, SIZE_PX, make_model, make_plan, make_toys
from helpers import ToyRunner

from bsdiff_rt.bench import measure as bench
from bsdiff_rt.bench import memory, trial
from bsdiff_rt.bench.candidates import Candidate, Wanted, load_candidates
from bsdiff_rt.bench.measure import compute_p95, compute_psnr, measure_batches
from bsdiff_rt.bench.memory import Memory
from bsdiff_rt.bench.networks import BASELINE, make_random_model
from bsdiff_rt.bench.plan import Plan
from bsdiff_rt.bench.report import build_table
from bsdiff_rt.bench.trial import Trial
from bsdiff_rt.config import Schedule

# --- statistics ---


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (5, 5), (19, 19), (20, 19), (100, 95), (101, 96)])
def test_the_95th_percentile_is_a_measured_value(count, expected):
    assert compute_p95([float(value) for value in range(count, 0, -1)]) == expected


def test_psnr():
    zero = torch.zeros(4, 4)
    assert compute_psnr(zero, zero + 0.2, 2.0) == pytest.approx(20.0, abs=1e-5)
    assert compute_psnr(zero, zero, 2.0) is None


# --- rows ---


def test_the_figures_of_a_row(clock):
    """In seconds: rehearsal 1 call; then a step to warm up and 5 that count; 2 rounds of image and enhance."""
    clock += [1.0]  # the first step, in the rehearsal
    clock += [50.0, 2.0, 4.0, 6.0, 8.0, 10.0, 20.0, 0.5, 24.0, 0.5]
    ((rows, absent),) = measure_batches(make_plan(), make_toys(BASELINE), [2])
    (row,) = rows
    assert absent == []
    assert (row.name, row.runner, row.precision, row.batch, row.steps) == (BASELINE, "toy", "fp32", 2, 3)
    assert (row.step_ms, row.step_ms_p95, row.enhance_ms) == (6000.0, 10000.0, 500.0)
    assert row.step_times_ms == (2000.0, 4000.0, 6000.0, 8000.0, 10000.0)
    assert (row.image_s, row.image_s_p95, row.images_per_second) == (22.0, 24.0, 2 / 22.0)
    assert row.outside_network_s == 22.0 - 3 * 6.0 - 0.5
    assert row.full_image_s_extrapolated == 1000 * 6.0 + 0.5
    assert row.tflops == pytest.approx(make_plan().flop * 2 / 6.0 / 1e12)
    assert row.ceiling == "fp32"
    assert row.share_of_ceiling == pytest.approx(row.tflops)  # of 1 TFLOP/s
    assert (row.psnr_vs_eager, row.psnr_step_vs_eager, row.equals_eager) == (None, None, None)  # it is the baseline
    assert (row.image_s_uncaptured, row.captured_equals_uncaptured) == (None, None)  # no graphs on a CPU
    assert row.step_ms_uncaptured is None
    assert row.eager_over_this == 1.0
    assert set(asdict(row)) >= CONTRACT


def test_a_step_without_its_recording_is_measured_apart(clock, monkeypatch):
    """As on CUDA: the recording and the plain call in turn."""
    calls = {"step": lambda: None, "uncaptured step": lambda: None}
    monkeypatch.setattr(Trial, "list_step_calls", lambda _: calls)
    clock += [1.0]
    clock += [50.0, 50.0, *[2.0, 3.0] * 5]  # both warm up, then five rounds in turn
    ((rows, _),) = measure_batches(make_plan(), make_toys(BASELINE), [1])
    assert (rows[0].step_ms, rows[0].step_ms_uncaptured) == (2000.0, 3000.0)


def test_which_steps_are_measured(clock):
    plan = make_plan()
    (candidate,) = make_toys(BASELINE)
    with ThreadPoolExecutor(1) as threads, Trial(candidate, plan, 1, threads) as trial:
        assert list(trial.list_step_calls()) == ["step"]
        trial._plan = SimpleNamespace(device=torch.device("cuda"))
        assert list(trial.list_step_calls()) == ["step", "uncaptured step"]
        trial._sampler = None  # a peer with a loop of its own is never recorded
        assert list(trial.list_step_calls()) == ["step"]


def test_all_steps_are_a_measurement_and_not_extrapolated(clock):
    full = make_plan(model=make_model(schedule=Schedule(train_steps=5, objective="x0")), steps=5)
    ((rows, _),) = measure_batches(full, make_toys(BASELINE), [1])
    assert rows[0].full_image_s_extrapolated is None


def test_stage_2_is_measured_only_where_the_model_has_it(clock):
    candidates = make_toys(BASELINE)
    ((rows, _),) = measure_batches(make_plan(model=make_model(enhance=False)), candidates, [1])
    assert rows[0].enhance_ms is None
    assert rows[0].full_image_s_extrapolated == 1000.0
    assert candidates[0].runner.enhanced == 0


def test_parity_is_measured_with_the_same_noise(clock):
    same, other = ToyRunner(SIZE_PX), ToyRunner(SIZE_PX)
    other.denoise = lambda x_t, cxr, t, out: out.copy_(0.7 * cxr + 0.2 * torch.tanh(x_t) + 0.001)
    candidates = [*make_toys(BASELINE), Candidate("same", same), Candidate("other", other)]
    ((rows, _),) = measure_batches(make_plan(), candidates, [2])
    _, first, second = rows
    assert (first.equals_eager, first.psnr_vs_eager, first.psnr_step_vs_eager) == (True, None, None)
    assert second.equals_eager is False
    assert second.psnr_vs_eager == pytest.approx(20 * math.log10(2.0 / 0.0009), abs=1)  # stage 2 is 0.9 x; x_t drifts
    assert 60 < second.psnr_step_vs_eager < 66  # 0.001 of a range of 1.4 to 1.8
    assert first.peak_bytes is None  # what its loading took is not known


def test_memory_is_that_of_loading_and_of_the_first_image(clock, monkeypatch):
    monkeypatch.setattr(trial, "start_memory_watch", lambda _: 5)
    monkeypatch.setattr(trial, "measure_memory", lambda _, mark: Memory(200 + mark, 100))
    (toy,) = make_toys(BASELINE)
    for loading, most in ((Memory(1000, 900), 900 + 205), (Memory(3000, 900), 3000)):  # copies that loading let go of
        ((rows, _),) = measure_batches(make_plan(), [replace(toy, loading=loading)], [1])
        assert rows[0].peak_bytes == most


def test_memory_is_read_before_the_image_is_made_a_second_way(clock, monkeypatch):
    """`infer` never holds the recorded loop's buffers and the plain loop's at once."""
    order = []
    picture = torch.zeros(1, 1, SIZE_PX, SIZE_PX)
    ways = {name: lambda name=name: order.append(name) or picture for name in ("image", "uncaptured")}
    monkeypatch.setattr(trial.Trial, "list_image_calls", lambda _: ways)
    monkeypatch.setattr(trial, "start_memory_watch", lambda _: 5)
    monkeypatch.setattr(trial, "measure_memory", lambda *_: order.append("memory") or Memory(1, 1))
    ((rows, _),) = measure_batches(make_plan(), make_toys(BASELINE), [1])
    assert order[:3] == ["image", "memory", "uncaptured"]
    assert rows[0].captured_equals_uncaptured is True


def test_memory_of_a_process_rises_with_what_it_takes():
    mark = memory.start_memory_watch(CPU)
    if mark is None:
        pytest.skip("not Linux")
    with mmap.mmap(-1, 50_000_000) as block:  # not a tensor: malloc may keep what it is given back
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
    taken = memory.measure_memory(CPU, mark)
    assert 45e6 < taken.most < 200e6
    assert taken.held < taken.most - 45e6
    assert memory.measure_memory(CPU, None) is None


def test_where_memory_cannot_be_told(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "no such folder" / "clear_refs")
    assert memory.start_memory_watch(CPU) is None


def test_ceilings_by_precision(clock):
    on_cuda = make_plan(ceilings={"fp32": 1e12, "tf32": 4e12, "bf16": 8e12})
    found = [bench._relate_to_ceiling(on_cuda, precision, 2e12) for precision in ("fp32", "bf16", "fp16")]
    assert [share["ceiling"] for share in found] == ["tf32", "bf16", None]
    assert [share["share_of_ceiling"] for share in found] == [0.5, 0.25, None]


def test_a_loop_of_its_own_is_measured_in_place_of_ours(clock):
    calls = []

    def loop(runner, cxr, table, draw):
        calls.append(runner)
        return draw(0).clamp(-1, 1)

    candidate = replace(make_toys("peer")[0], loop=loop)
    ((rows, absent),) = measure_batches(make_plan(), [*make_toys(BASELINE), candidate], [1])
    assert absent == []
    assert len(calls) == 3  # the rehearsal, two rounds
    assert rows[1].equals_eager is False


def test_a_time_is_never_negative(clock):
    clock += [1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 5.0, 0.5, 5.0, 0.5]  # an image in less time than its three steps
    ((rows, _),) = measure_batches(make_plan(), make_toys(BASELINE), [1])
    assert rows[0].outside_network_s is None
    header, (cells,) = build_table({"train_steps": 1000, "rows": [asdict(rows[0])]})
    assert dict(zip(header, cells, strict=True))["outside network s"] == "-"


def test_an_infinity_of_stage_2_is_no_white_pixel(clock):
    (candidate,) = make_toys("broken")

    def enhance(x, out):
        out.copy_(x)[0, 0, 0, 0] = math.inf

    candidate.runner.enhance = enhance
    ((rows, absent),) = measure_batches(make_plan(), [candidate], [1])
    assert rows == []
    assert absent[0].reason == "broken, batch 1: the output has a NaN or an infinity"


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
    candidates = [
        *make_toys(BASELINE),
        *(Candidate(n, r) for n, r in (("broken", broken), ("nan", nan), ("small", small))),
    ]
    (one, absent_one), (two, absent_two) = measure_batches(make_plan(), candidates, [1, 2])
    assert [row.name for row in one] == [BASELINE, "small"]
    assert [row.name for row in two] == [BASELINE]
    assert [(m.name, m.batch, m.exit_code, m.reason) for m in absent_one] == [
        ("broken", 1, 1, "RuntimeError: out of memory"),
        ("nan", 1, 4, "nan, batch 1: the output has a NaN or an infinity"),
    ]
    assert absent_two[2].reason.startswith("batch of 2 given to the toy runner, which takes 1 to 1")


def test_without_a_baseline_nothing_is_compared(clock):
    broken = Candidate(BASELINE, ToyRunner(SIZE_PX))
    broken.runner.after = lambda _, out: out.fill_(math.nan)
    ((rows, absent),) = measure_batches(make_plan(), [broken, *make_toys("other")], [1])
    assert (rows[0].name, rows[0].psnr_vs_eager, rows[0].equals_eager, rows[0].eager_over_this) == (
        "other",
        None,
        None,
        None,
    )
    assert absent[0].name == BASELINE


@pytest.mark.gpu
def test_captured_images_are_the_uncaptured_ones_to_the_bit():
    device = torch.device("cuda", 0)
    tiny = make_random_model("tiny", 64)
    found, _ = load_candidates(tiny, Wanted(("eager",)), device)
    ((rows, absent),) = measure_batches(Plan(tiny, device, 5, 3, 2), found, [2])
    assert absent == []
    assert rows[0].captured_equals_uncaptured is True
    assert rows[0].image_s_uncaptured > 0
    assert rows[0].peak_bytes > 0
