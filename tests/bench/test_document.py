"""The command `bench`: its settings, its document, its table, its options."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from bench_toys import CONTRACT, CPU, make_model, make_plan, make_toys

from bsdiff_rt.bench import conditions, plot
from bsdiff_rt.bench import document as bench_document
from bsdiff_rt.bench.conditions import describe_conditions, read_commit, run_command
from bsdiff_rt.bench.document import BenchSettings, run_benchmark
from bsdiff_rt.bench.measure import measure_batches
from bsdiff_rt.bench.networks import BASELINE
from bsdiff_rt.bench.report import build_table, write_notes
from bsdiff_rt.errors import SettingsError


@pytest.fixture
def rates(monkeypatch):
    """Takes the place of the device's own rates, which cost seconds."""
    monkeypatch.setattr(bench_document, "measure_matmul_rates", lambda *_: {"fp32": 1e12})
    monkeypatch.setattr(bench_document, "measure_copy_rate", lambda _: 1e10)


def test_run_closes_its_runners_and_tells_after_each_batch(rates, clock, monkeypatch):
    candidates = make_toys(BASELINE)
    monkeypatch.setattr(bench_document, "open_bench_model", lambda *_: make_model())
    monkeypatch.setattr(bench_document, "load_candidates", lambda *_: (candidates, []))
    rows = []
    run_benchmark(BenchSettings(device="cpu", batches=(1, 2)), lambda document: rows.append(len(document.rows)))
    assert rows == [1, 2, 2]  # after each batch size, and the finished document
    assert candidates[0].runner.closed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": (4, 0)}, "4,0: give whole numbers above 0"),
        ({"batches": ()}, ": give"),
        ({"repeats": 0}, "0: give 1 or more"),
        ({"steps": 0}, "0 sampling steps requested"),
        ({"steps": 1001}, "1001 sampling steps requested"),
        ({"device": "gpu"}, "gpu"),
    ],
)
def test_settings_are_refused_before_anything_is_measured(changes, message, monkeypatch):
    monkeypatch.setattr(bench_document, "measure_matmul_rates", lambda *_: pytest.fail("measured"))
    settings = replace(BenchSettings(bundle="paper", device="cpu"), **changes)
    with pytest.raises(SettingsError, match=message):
        run_benchmark(settings)


def test_conditions_and_commit(tmp_path):
    found = describe_conditions(CPU)
    assert found["packages"]["torch"] == version("torch")  # without the "+cu130" of torch's own text
    assert found["fp32_matmul"] == torch.get_float32_matmul_precision()
    assert found["started"]
    assert read_commit(tmp_path) is None
    if found["git"] is not None:
        assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?", found["git"])
    assert run_command("no-such-program-here") is None
    assert run_command("false") is None


def test_the_table_says_what_is_extrapolated_and_what_is_missing(clock):
    document = bench_document.Document({"train_steps": 1000})
    ((document.rows, _),) = measure_batches(make_plan(), [*make_toys(BASELINE), *make_toys("twin")], [1])
    header, (first, second) = build_table(document.to_dict())
    assert "1000 steps s, extrapolated" in header
    cells = dict(zip(header, second, strict=True))
    assert (cells["runner"], cells["PSNR image dB"], cells["PSNR step dB"]) == ("twin", "equal", "equal")
    assert dict(zip(header, first, strict=True))["PSNR image dB"] == "-"
    assert "same bits" not in header
    found = document.to_dict()
    found["rows"][0] |= {"image_s_uncaptured": 2.5, "captured_equals_uncaptured": False}
    header, (first, second) = build_table(found)
    assert (first[-2:], second[-2:]) == (["2.5", "NO"], ["-", "-"])
    found["rows"][0] |= {"step_ms_uncaptured": 7.5, "step_ms": 10.0}
    found |= {"matmul_tflops": {"fp32": 1.0}, "copy_gb_s": 1.0}
    found |= {"work_parts": {"rest": {"flop": 4e9, "weights": 1, "values": 1}}}
    header, (first, second) = build_table(found)
    cells = dict(zip(header, first, strict=True))
    assert (cells["uncaptured step ms"], cells["floor ms"], cells["step / floor"]) == ("7.5", "4", "2.50")


def test_bench(cli, tiny_bundle, tmp_path, rates):
    written, drawn = tmp_path / "b.json", tmp_path / "b.png"
    shared = ("bench", "--bundle", tiny_bundle, "--device", "cpu", "--repeats", 2)
    done = cli(
        *shared, "--runner", "onnxruntime", "--batch", "1,2", "--steps", 2, "--json-file", written, "--plot", drawn
    )
    assert (done.code, "measuring the rates of the device" in done.err) == (0, True)
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
    assert "image: ddim, 2 steps" in lines[6]


def test_what_was_asked_for_and_is_missing_ends_with_its_exit_code(cli, tiny_bundle, tmp_path, rates):
    written = tmp_path / "b.json"
    arguments = ("--bundle", tiny_bundle, "--device", "cpu", "--batch", 1, "--steps", 1, "--repeats", 1)
    done = cli("bench", *arguments, "--runner", "tensorrt,eager", "--json-file", written)
    assert done.code == 4
    assert re.search(r"^not measured: tensorrt: runner tensorrt cannot be used on cpu", done.out, re.MULTILINE)
    early, late = "tensorrt cannot be measured: runner tensorrt cannot", "warming up"
    assert done.err.index(early) < done.err.index(late)
    found = json.loads(written.read_text())
    assert [row["name"] for row in found["rows"]] == ["eager"]
    assert [entry["name"] for entry in found["not_measured"]] == ["tensorrt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "0"), "'0' is not a whole number above 0"),
        (("--batch", "1,x"), "'x' is not a whole number above 0"),
        (("--runner", "eager,pycuda"), "--runner: pycuda is not known"),
        (("--precision", "int8"), "--precision: int8 is not known"),
        (("--json-file", "nowhere/b.json"), "there is no folder nowhere"),
        (("--profile", "nowhere/b.json"), "--profile: nowhere/b.json: there is no folder nowhere"),
        (("--profile", "b.txt"), "--profile: b.txt: name a .json file"),
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
        plot.draw_plot({"rows": []}, tmp_path / "b.png")


def test_json_and_a_profile(cli, tiny_bundle, tmp_path, rates):
    trace = tmp_path / "trace.json"
    arguments = ("--bundle", tiny_bundle, "--device", "cpu", "--batch", 1, "--steps", 1, "--repeats", 1)
    done = cli("bench", *arguments, "--runner", "eager", "--json", "--profile", trace)
    assert done.code == 0
    assert [row["name"] for row in json.loads(done.out)["rows"]] == ["eager"]
    assert any(event.get("name") == "eager" for event in json.loads(trace.read_text())["traceEvents"])


def test_a_busy_machine_is_reported(clock, monkeypatch, caplog):
    rates = iter([{"fp32": 1e12}, {"fp32": 0.6e12}])
    monkeypatch.setattr(bench_document, "measure_matmul_rates", lambda *_: next(rates))
    monkeypatch.setattr(bench_document, "measure_copy_rate", lambda _: 1e10)
    monkeypatch.setattr(bench_document, "open_bench_model", lambda *_: make_model())
    monkeypatch.setattr(bench_document, "load_candidates", lambda *_: (make_toys(BASELINE), []))
    monkeypatch.setattr(conditions, "read_load", lambda: 1000.0)
    clock += [1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 3.5]
    document = run_benchmark(BenchSettings(device="cpu"))
    signs = document.head["conditions"]["busy"]
    assert [re.sub("[0-9]+ cores", "N cores", sign) for sign in signs] == [
        "load average 1000.0 on N cores at the start",
        "fp32 matrix products ran at 60% of their first rate at the end",
        "eager, batch 1: p95 is 1.8 times the median",
    ]
    assert "the machine was busy (load average 1000.0" in caplog.text


def test_help_names_every_default(cli):
    shown = cli("bench", "--help")
    assert shown.code == 0
    for text in ("default: demo", "default: auto", "1,4,8; 1 on a CPU", "20; 5 on a CPU", "all that can be used"):
        assert text in " ".join(shown.out.split())


def test_notes():
    found = {"device": "D", "bundle": {"name": "b"}, "size_px": 8, "sampler": "ddim", "steps": 2, "enhance": False}
    found |= {"repeats": 5, "image_repeats": 1, "matmul_tflops": {"fp32": 0.5}, "copy_gb_s": 12.0, "mirror": False}
    found |= {"work_per_image": {"denoiser": {"flop": 3e9}}, "rows": [{"outside_network_s": 0.1}]}
    found["not_measured"] = [{"name": "aoti", "batch": 4, "reason": "why"}, {"name": "x", "batch": None, "reason": "w"}]
    assert write_notes(found) == [
        "device: D",
        "model: b, 8 px; image: ddim, 2 steps, without stage 2",
        "times: medians of 5 steps and 1 images, measured in turn",
        "work: 3 GFLOP a step and image; matrix products reach fp32 0.5 TFLOP/s; copies reach 12 GB/s",
        "not measured: aoti, batch 4: why",
        "not measured: x: w",
    ]
    found["work_parts"] = {
        "attention": {"flop": 1e9, "weights": 0, "values": 1},
        "rest": {"flop": 2e9, "weights": 0, "values": 6e6},
    }
    assert write_notes(found)[4:7] == [
        "attention: 1 GFLOP (33%), at batch 1 at least fp32 2 ms",
        "rest: 2 GFLOP (67%), at batch 1 at least fp32 4 ms",
        "floor: the sum of these, each for the arithmetic or the memory traffic, whichever takes longer",
    ]
    assert "without stage 2, one pass (infer also runs" in write_notes(found | {"mirror": True})[1]
    unresolved = write_notes(found | {"rows": [{"outside_network_s": None}]})
    assert "outside network: - means too small to measure in this run" in unresolved
