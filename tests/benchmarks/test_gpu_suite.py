"""The GPU suite on a machine without a GPU: every part runs or says why not, whatever becomes of a part."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import cv2
import pytest
import torch

from benchmarks import gpu_attention, gpu_common, gpu_parts, gpu_suite
from benchmarks.gpu_common import ENGINES, Part, Skipped, make_model, make_rated_plan
from bsdiff_rt.bench import document as bench_document
from bsdiff_rt.bench.candidates import Missing
from bsdiff_rt.config import PRESETS, Preprocessing
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.runners.eager import load_networks

ROOT = Path(__file__).parents[2]


@pytest.fixture
def part(tmp_path):
    """A part on the CPU with the tiny networks at 16 px, and more time than it can need beside other work."""
    given = ["--device", "cpu", "--preset", "tiny", "--size", "16", "--output", str(tmp_path), "--batches", "1,2"]
    options = gpu_suite.parse_arguments([*given, "--repeats", "1", "--full-steps", "2"])
    (tmp_path / "work").mkdir()
    return Part("steps", options, tmp_path / "work", time.monotonic() + 600.0)


def test_every_part_on_a_cpu(tmp_path, monkeypatch, capsys):
    """Run the suite's parts as forks of this process: it has imported everything and measured the device already."""
    for module in (gpu_parts, bench_document):
        monkeypatch.setattr(module, "measure_matmul_rates", lambda *_: {"fp32": 1e12})
    monkeypatch.setattr(bench_document, "measure_copy_rate", lambda _: 1e10)
    command = ["--device", "cpu", "--preset", "tiny", "--size", "16", "--output", str(tmp_path / "out")]
    command += ["--batches", "1", "--repeats", "1", "--full-steps", "2", "--images", "1", "--image-px", "64"]
    assert gpu_suite.main(command) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "gpu_suite.json").read_text())
    parts = {part["name"]: part for part in found["parts"]}
    assert list(parts) == list(gpu_suite.BUDGETS_S) == list(gpu_parts.PARTS)
    assert {name for name, part in parts.items() if part["status"] == "skipped"} == {"tests", "engines"}
    assert {part["status"] for part in parts.values()} == {"done", "skipped"}
    assert parts["tests"]["reason"] == parts["engines"]["reason"] == "needs CUDA, this is cpu"
    assert found["device"].endswith("threads")
    assert found["matmul_tflops"]["fp32"] == 1.0
    assert [(row["part"], row["name"]) for row in found["rows"]] == [
        ("steps", "eager"),
        ("peers", "eager"),
        ("peers", "published eager"),
        ("peers", "diffusers loop"),
    ]
    absent = {entry["name"]: entry["reason"] for entry in found["not_measured"]}
    assert absent == dict.fromkeys(ENGINES, "Skipped: needs CUDA, this is cpu")
    assert [image["name"] for image in parts["full"]["images"]] == ["eager"]
    assert parts["profile"]["kernels"]["eager"][0]["share"] > 0
    assert [image["name"] for image in parts["half"]["images"]] == ["eager fp16", "eager"]
    assert parts["half"]["images"][0]["psnr_vs_eager"] > 40  # random weights in fp16
    rows = {(row["batch"], row["form"]): row for row in parts["attention"]["rows"]}
    assert list(rows) == [(b, f) for b in (1, 8) for f in ("torch", "cudnn", "flash", "products", "cudnn fp8")]
    assert {row["tokens"] for row in rows.values()} == {64}
    for batch in (1, 8):
        for form in ("torch", "products"):
            assert 0 < rows[batch, form]["error"] < 0.01
            assert rows[batch, form]["tflops"] > 0
        assert rows[batch, "cudnn"]["reason"]
        assert rows[batch, "cudnn fp8"]["reason"] == "the package nvidia-cudnn-frontend is not installed"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu_suite.json"}
    assert parts["folder"]["counts"] == {"ok": 1}
    large = parts["folder"]["large"]
    assert (large["counts"], large["candidate"], large["steps"]) == ({"ok": 1}, "eager", 2)
    assert large["images_per_second"] > 0
    assert "published / this" in printed


# --- supervision ---


def supervised(part, monkeypatch, action, seconds=20.0):
    monkeypatch.setitem(gpu_suite.PARTS, "steps", action)
    part.deadline = time.monotonic() + seconds
    return gpu_suite.supervise(part)


def test_a_part_that_hangs_is_ended_and_what_it_had_is_kept(part, monkeypatch, tmp_path):
    def hangs(part):
        child = subprocess.Popen(["sleep", "600"])
        part.save(rows=[{"name": "kept"}], child=child.pid)
        time.sleep(600)

    found = supervised(part, monkeypatch, hangs, seconds=2.0)
    assert (found["status"], found["reason"]) == ("out of time", "out of time; its results are kept")
    assert found["rows"] == [{"name": "kept"}]
    assert json.loads((tmp_path / "steps.json").read_text()) == found
    for _ in range(50):  # what it started ended with it; until somebody has waited for it, it is a zombie
        status = Path(f"/proc/{found['child']}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the part started still runs")


def test_a_part_that_crashes_costs_no_other(part, monkeypatch):
    found = supervised(part, monkeypatch, lambda _: os._exit(7))
    assert (found["status"], found["reason"]) == ("failed", "the process died (exit code 7)")


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (Skipped("no GPU"), "skipped", "no GPU"),
        (ModuleNotFoundError("x", name="pydicom"), "skipped", "the package pydicom is not installed"),
        (SettingsError("--device x: no"), "failed", "--device x: no"),
        (ZeroDivisionError("zero"), "failed", "ZeroDivisionError: zero"),
    ],
)
def test_how_a_part_may_end(part, monkeypatch, error, status, reason):
    def raises(_):
        raise error

    found = supervised(part, monkeypatch, raises)
    assert (found["status"], found["reason"]) == (status, reason)
    assert found["seconds"] >= 0


def test_a_part_without_time_is_said_to_be_skipped(part, monkeypatch, tmp_path):
    found = supervised(part, monkeypatch, lambda _: pytest.fail("began"), seconds=-1.0)
    assert (found["status"], found["reason"]) == ("skipped", "not enough time")
    assert json.loads((tmp_path / "steps.json").read_text()) == found


def test_time_that_is_not_used_is_the_later_parts(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        gpu_suite, "supervise", lambda part: seen.append(part.left()) or {"name": part.name, "status": "done"}
    )
    assert gpu_suite.main(["--output", str(tmp_path), "--minutes", "0.8", "--parts", "steps,engines"]) == 0
    assert seen == pytest.approx([3.0, 3.0 + 10.5, 3.0 + 16.0], abs=0.5)  # machine, engines, steps: in their own order


def test_a_failed_part_fails_the_suite(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_suite, "supervise", lambda part: {"name": part.name, "status": "failed", "reason": "why"})
    (tmp_path / "engines.json").write_text('{"built": {"aoti fp16": 1}}')  # of an earlier run
    assert gpu_suite.main(["--output", str(tmp_path), "--parts", "machine"]) == 1
    assert "machine   failed          0.0 s  why" in capsys.readouterr().out
    assert not (tmp_path / "engines.json").exists()


def test_without_the_device_it_is_said_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpu_suite.main(["--output", str(tmp_path)]) == 1
    found = json.loads((tmp_path / gpu_suite.SUMMARY).read_text())["parts"]
    assert [(part["name"], part["status"]) for part in found] == [("machine", "no device")]
    assert found[0]["reason"].startswith("cuda does not exist: this machine has 0 CUDA devices")
    assert "tests (" not in capsys.readouterr().out


def test_the_budget_is_eight_minutes():
    assert sum(gpu_suite.BUDGETS_S.values()) <= 480


def test_the_widths_of_the_papers_network():
    shapes = gpu_attention.list_shapes(PRESETS["paper"].denoiser, 256)
    assert shapes == [(16384, 128), (4096, 256), (1024, 512), (256, 768)]
    assert gpu_attention.list_shapes(PRESETS["demo"].denoiser, 256) == [(256, 128)]  # in the middle alone


def test_attention_in_fp8_is_asked_of_cudnn(monkeypatch):
    """A stand-in: what the graph is given, and that every operand has its memory."""
    made = SimpleNamespace(options=None, executed=None, largest=[])

    class Node:
        def set(self, *_):
            return self

        set_output = set_dim = set_stride = set_data_type = set

    class Graph:
        def tensor(self, **_):
            return Node()

        def sdpa_fp8(self, **options):
            made.options = options
            return Node(), None, Node(), Node()

        def execute(self, memory, workspace, handle):
            made.executed = memory

        def get_workspace_size(self):
            return 16

        validate = build_operation_graph = check_support = build_plans = lambda self: None

        def create_execution_plans(self, modes):
            assert modes == ["A", "FALLBACK"]

    fake = ModuleType("cudnn")
    fake.create_handle, fake.set_stream, fake.pygraph = lambda: "handle", lambda **_: None, lambda **_: Graph()
    fake.data_type = SimpleNamespace(FP8_E4M3="fp8", FLOAT="fp32")
    fake.heur_mode = SimpleNamespace(A="A", FALLBACK="FALLBACK")
    monkeypatch.setitem(sys.modules, "cudnn", fake)
    monkeypatch.setattr(gpu_attention, "find_spec", lambda _: "installed")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=7))
    half = [torch.randn(1, 1, 8, 16).half() for _ in range(3)]
    out = gpu_attention.make_fp8_call(half)()
    assert (out.shape, out.dtype) == (half[0].shape, torch.float8_e4m3fn)
    assert made.options["attn_scale"] == 0.25
    assert len(made.executed) == 3 + 6 + 1 + 2
    assert torch.equal(made.executed[made.options["q"]].float(), half[0].to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize(
    ("given", "message"),
    [(["--parts", "steps,x"], "--parts x: choose from machine"), (["--batches", "1,0"], "--batches 1,0: give whole")],
)
def test_arguments_that_are_refused(given, message, capsys):
    with pytest.raises(SystemExit) as end:
        gpu_suite.parse_arguments(given)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


# --- parts ---


def test_the_weights_are_written_once_and_are_the_models(part):
    model = make_model(part)
    again = make_model(part)
    assert model.bundle is not None
    assert model.bundle.sha256 == again.bundle.sha256
    for ours, theirs in zip(load_networks(model.bundle), model.load_networks(), strict=True):
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name])
    assert [path.name for path in part.work.iterdir()] == ["model"]


def test_batches_for_which_no_time_is_left_are_said(part, monkeypatch):
    monkeypatch.setattr(gpu_parts, "measure_batches", lambda *_: time.sleep(0.05) or iter([([], [])]))
    part.deadline = time.monotonic() + 0.1
    absent = [Missing("x", "x", "fp16", None, "why", 0)]
    gpu_parts.measure_rows(part, None, [], absent)
    assert part.found["notes"][0] == "batch 1: step: "
    assert part.found["notes"][1].startswith("batch 2: skipped, not enough time (0 s left, about 0 s needed)")
    assert part.found["not_measured"][0]["reason"] == "why"


def test_rows_measured_before_are_kept_and_not_repeated(part):
    plan = make_rated_plan(part)
    found, _ = gpu_common.load_all(part, plan.model)
    before = [{"name": "eager", "batch": 1, "step_ms": 1.0}]
    twin = [*found, gpu_common.Candidate("twin", found[0].runner)]
    rows = gpu_parts.measure_rows(part, plan, twin, [], before, lambda rows: [row | {"seen": True} for row in rows])
    assert [(row["name"], row["batch"], row.get("seen")) for row in part.found["rows"]] == [
        ("eager", 1, None),
        ("twin", 1, True),
        ("twin", 2, True),
    ]
    assert len(rows) == 4


def test_engines_that_cannot_be_built_have_their_reason(part, monkeypatch):
    batches = []

    def build(bundle, options, device, folder, progress):
        batches.append(options.batch)
        if options.precision == "bf16":
            raise RuntimeError("no\nkernel")
        (folder / "denoiser.pt2").write_bytes(b"")

    monkeypatch.setattr(gpu_parts, "_require_cuda", lambda _: None)
    real, entry = gpu_parts.find_backend, SimpleNamespace(build=build)
    monkeypatch.setattr(
        gpu_parts, "find_backend", lambda runner, bundle: entry if runner == "aoti" else real(runner, bundle)
    )
    monkeypatch.setattr(gpu_common, "find_spec", lambda _: None)
    monkeypatch.setattr(gpu_parts, "DEMO_ENGINE_S", 1e9)
    gpu_parts.build_engines(part)
    assert part.found["notes"][1].startswith("the demo model's engine: skipped, not enough time")
    assert list(part.found["built"]) == ["aoti fp16, batch 1", "aoti fp16"]
    assert batches == [(1, 1), (1, 2), (1, 2)]
    assert part.found["not_built"] == {
        "aoti bf16": "RuntimeError: no kernel",
        "tensorrt fp16, batch 1": "the package tensorrt is not installed",
        "tensorrt fp16": "the package tensorrt is not installed",
    }
    monkeypatch.setattr(gpu_common, "find_spec", lambda _: "installed")
    with pytest.raises(Skipped, match=r"needs graphs: `python -m export random paper -o DIR`, then --bundle DIR"):
        real("tensorrt", make_model(part).bundle)


def test_no_engine_is_begun_that_will_not_be_done(part, monkeypatch):
    made, now = [], [0.0]

    def build(bundle, options, device, folder, progress):
        made.append(options.batch)
        now[0] += 40.0

    monkeypatch.setattr(gpu_parts, "_require_cuda", lambda _: None)
    monkeypatch.setattr(gpu_parts, "find_backend", lambda *_: SimpleNamespace(build=build))
    monkeypatch.setattr(gpu_parts, "_build_demo_engine", lambda _: made.append("demo"))
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    part.deadline = 110.0
    gpu_parts.build_engines(part)
    assert made == [(1, 1), "demo", (1, 1)]
    assert part.found["not_built"] == dict.fromkeys(["aoti fp16", "tensorrt fp16", "aoti bf16"], "out of time")


def test_tests_that_take_too_long_tell_what_failed_so_far(part, monkeypatch, tmp_path):
    (tmp_path / "tests" / "sampling").mkdir(parents=True)
    (tmp_path / "tests" / "test_slow.py").write_text(
        "import pytest, time\n\n\n@pytest.mark.gpu\ndef test_a():\n    assert 1 == 2, 'the picture differs'\n\n\n"
        "@pytest.mark.gpu\ndef test_b():\n    open('begun', 'w').close()\n    time.sleep(300)\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    for path in gpu_parts.FIRST_TESTS:
        assert (gpu_parts.ROOT / path).is_file()
        (tmp_path / path).write_text("")
    monkeypatch.setattr(gpu_parts, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_parts, "_require_cuda", lambda _: None)
    monkeypatch.setattr(gpu_parts, "TELLING_S", 120.0)

    def left(_: Part) -> float:
        """The time is over when the second test has begun."""
        for _ in range(1200):
            if (tmp_path / "begun").exists():
                return 120.0
            time.sleep(0.1)
        raise AssertionError("the second test did not begin")

    monkeypatch.setattr(Part, "left", left)
    with pytest.raises(RuntimeError, match=r"pytest ended with 2: .*1 failed.*; see tests\.log"):
        gpu_parts.run_tests(part)
    said = "\n".join(part.found["tail"])
    assert "the picture differs" in said
    assert "FAILED tests/test_slow.py::test_a" in said


def test_an_engine_takes_the_batches_that_its_runner_can(part):
    part.options.batches = (1, 16)
    bundle = make_model(part).bundle
    manifest = replace(bundle.manifest, preprocessing=Preprocessing(256), denoiser=PRESETS["paper"].denoiser)
    paper = replace(bundle, manifest=manifest)
    assert {name: kind.choose_options(part, paper).batch for name, kind in ENGINES.items()} == {
        "aoti fp16, batch 1": (1, 1),
        "tensorrt fp16, batch 1": (1, 1),
        "aoti fp16": (1, 16),
        "tensorrt fp16": (1, 7),
        "aoti bf16": (1, 16),
    }


class Quick:
    """A candidate's trial whose pictures are ready."""

    def __init__(self, candidate, plan, batch, threads):
        self.name = candidate.name

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def step(self):
        pass

    def list_image_calls(self):
        def picture():
            made.append(self.name)
            return torch.full((1, 1, 4, 4), 0.5 if self.name == "eager" else 0.25)

        return {"image": picture, "uncaptured": picture}


made: list[str] = []


def test_full_images_are_made_in_the_order_of_what_they_tell(part, monkeypatch):
    """The fastest engine, eager to judge it by, the others; what is quick twice; then without the recording."""
    made.clear()
    part.name = "full"
    names = ["eager", "eager tf32", "slow", "fast"]
    runners = [SimpleNamespace(name=name) for name in names]
    monkeypatch.setattr(gpu_parts, "load_all", lambda *_: (runners, []))
    monkeypatch.setattr(gpu_parts, "Trial", Quick)
    monkeypatch.setattr(gpu_parts, "time_call", lambda call, _: call() or (20.0 if made[-1:] == ["eager"] else 1.0))
    (part.options.output / "steps.json").write_text(
        json.dumps(
            {"rows": [{"name": n, "batch": 1, "step_ms": ms} for n, ms in zip(names, (9, 8, 2, 1), strict=True)]}
        )
    )
    gpu_parts.make_full_images(part)
    assert made == ["fast", "fast", "eager", "slow", "slow", "fast", "fast", "slow", "slow"]
    images = {image["name"]: image for image in part.found["images"]}
    assert list(images) == ["fast", "eager", "slow", "fast, uncaptured", "slow, uncaptured"]
    assert images["fast"]["psnr_vs_eager"] == pytest.approx(18.06, abs=0.01)
    assert images["fast, uncaptured"]["equals_captured"] is True


def test_an_engine_is_measured_at_the_batches_it_takes(part, monkeypatch):
    asked = []
    monkeypatch.setattr(
        gpu_parts, "measure_batches", lambda _, found, batches: asked.append((batches, found)) or iter([([], [])])
    )
    one, some = (SimpleNamespace(runner=SimpleNamespace(batch_range=(1, most))) for most in (1, None))
    gpu_parts.measure_rows(part, None, [one, some], [])
    assert asked == [([1], [one, some]), ([2], [some])]


def test_the_tests_need_their_packages(part, monkeypatch):
    monkeypatch.setattr(gpu_parts, "_require_cuda", lambda _: None)
    monkeypatch.setattr(gpu_parts, "find_spec", lambda name: None if name in ("pytest", "pydicom") else "found")
    with pytest.raises(Skipped, match="the tests need pytest, pydicom; not installed"):
        gpu_parts.run_tests(part)


def test_pictures_are_pictures(tmp_path):
    gpu_parts.draw_pictures(tmp_path, 2, 48)
    first, second = (cv2.imread(str(tmp_path / f"000{n}.png"), cv2.IMREAD_UNCHANGED) for n in range(2))
    assert (first.shape, str(first.dtype)) == ((48, 48), "uint16")
    assert first.std() > 1000
    assert (first != second).any()
