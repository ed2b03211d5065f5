"""The parts of `python -m benchmarks.gpu_suite`. Each writes its results to one JSON file."""

from __future__ import annotations

import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_attention import measure_attention
from benchmarks.gpu_common import (
    DEMO,
    ENGINES,
    TF32,
    HalfRunner,
    Part,
    Skipped,
    find_backend,
    load_all,
    make_model,
    make_plan,
    make_rated_plan,
    name_folder,
)
from bsdiff_rt.bench.candidates import Candidate, Missing
from bsdiff_rt.bench.document import describe_run
from bsdiff_rt.bench.flops import measure_matmul_rates
from bsdiff_rt.bench.measure import PICTURE_RANGE, compute_psnr, measure_batches
from bsdiff_rt.bench.networks import BASELINE
from bsdiff_rt.bench.plan import Plan
from bsdiff_rt.bench.trial import Trial
from bsdiff_rt.bundle import MANIFEST, Bundle, open_bundle
from bsdiff_rt.config import EngineOptions, InferSettings
from bsdiff_rt.errors import BsdiffError, one_line
from bsdiff_rt.files import file_sha256
from bsdiff_rt.runners.eager import EagerRunner
from bsdiff_rt.runners.timing import time_call

ROOT = Path(__file__).parents[1]
FIRST_TESTS = ("tests/sampling/test_cuda_graph.py", "tests/sampling/test_batching.py")
LONG_TESTS = ("tests/engines/test_build.py",)  # it builds an engine, and the part `engines` has built some
HALF = "eager fp16"
TELLING_S = 10.0  # for pytest to report failures when time runs out
COMPILING_S = 60.0  # torch.compile starts only if this much time is left
DEMO_ENGINE_S = 60.0  # the demo model's engine likewise
DEMO_BATCH = 8
LARGE_IMAGES = 8  # of the folder that the large network does with all steps
TWICE_S = 15.0  # an image that takes less is made twice; the second time its step is recorded already


def measure_machine(part: Part) -> None:
    """Record device, conditions and rates, and write the weights that all parts share."""
    model = make_model(part)
    ceilings = measure_matmul_rates(part.device)
    part.save(head=describe_run(make_plan(part, model, ceilings)))
    rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in ceilings.items())
    part.note(f"{part.found['head']['device']}: matrix products in TFLOP/s: {rates}")


def run_tests(part: Part) -> None:
    """Run `pytest -m gpu`, the tests of the captured loop first, and without those that build engines."""
    _require_cuda(part)
    absent = [name for name in ("pytest", "typer", "pydicom", "platformdirs") if find_spec(name) is None]
    if absent:
        raise Skipped(f"the tests need {', '.join(absent)}; not installed")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-v", "-rfE", "--tb=short"]
    # Other test files are not even imported: they need packages that a bare GPU machine may lack.
    first = [ROOT / path for path in FIRST_TESTS]
    marked = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text())
    left_out = [ROOT / path for path in LONG_TESTS]
    files = [*first, *(path for path in marked if path not in first + left_out)]
    log = part.options.output / "tests.log"
    with log.open("w") as output:
        running = subprocess.Popen(
            [*command, "--continue-on-collection-errors", *files],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            preexec_fn=None if sys.platform == "win32" else _heed_interrupts,
        )
        for patience in (max(part.left() - TELLING_S, 0.0), TELLING_S / 2):
            try:
                running.wait(patience)
                break
            except subprocess.TimeoutExpired:
                running.send_signal(signal.SIGINT)  # pytest reports what has failed so far, and ends
    lines = log.read_text().splitlines() or ["no output"]
    part.save(tail=lines[-30:])
    part.note(lines[-1])
    if running.poll() != 0:
        raise RuntimeError(f"pytest ended with {running.poll()}: {lines[-1]}; see tests.log")


def _heed_interrupts() -> None:
    """Let SIGINT end this process. Shells ignore it in what they start in the background, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _require_cuda(part: Part) -> None:
    """Raise Skipped if the device is not a GPU."""
    if part.device.type != "cuda":
        raise Skipped(f"needs CUDA, this is {part.device}")


def measure_half(part: Part) -> None:
    """Make one image with all steps in eager fp16, then in eager fp32: known even if no engine can be built."""
    plan = make_rated_plan(part, part.options.full_steps)
    part.save(steps=plan.steps, images=[], step_ms={})
    pictures: dict[str, torch.Tensor] = {}
    with ThreadPoolExecutor(2) as threads, _open_stream(part.device):
        for name, make in ((HALF, HalfRunner), (BASELINE, EagerRunner)):
            runner = make(*plan.model.load_networks(), plan.model.size, part.device)
            with Trial(Candidate(name, runner), plan, 1, threads) as trial:
                seconds = min(time_call(trial.step, part.device) for _ in range(3))
                part.save(step_ms=part.found["step_ms"] | {name: seconds * 1e3})
                if part.has_time(1.2 * seconds * plan.steps, name):
                    _make_full_image(part, name, trial.list_image_calls()["image"], pictures)


def build_engines(part: Part) -> None:
    """Build the engines that the other parts use. Their parity is measured together with their speed."""
    _require_cuda(part)
    model = make_model(part)
    assert model.bundle is not None
    part.save(built={}, not_built={})
    last_s = 0.0
    for number, (name, asked) in enumerate(ENGINES.items()):
        if number == 1 and part.has_time(DEMO_ENGINE_S, "the demo model's engine"):
            _build_demo_engine(part)  # early: the part `folder` needs it
        if not part.has_time(last_s, name):
            part.save(not_built=part.found["not_built"] | {name: "out of time"})
            continue
        try:
            entry = find_backend(asked.runner, model.bundle)
            folder = part.work / name_folder(name)
            folder.mkdir()
            started = time.monotonic()
            entry.build(model.bundle, asked.choose_options(part, model.bundle), part.device, folder, lambda *_: None)
        except Exception as error:  # compilers raise any type; the next engine may work
            reason = str(error) if isinstance(error, Skipped | BsdiffError) else one_line(error)
            part.save(not_built=part.found["not_built"] | {name: reason})
            part.note(f"{name}: not built: {reason}")
            continue
        last_s = time.monotonic() - started
        part.save(built=part.found["built"] | {name: round(last_s, 1)})
        part.note(f"{name}: built in {last_s:.0f} s")


def _build_demo_engine(part: Part) -> None:
    """Build the demo model's engine as `build-engine` does, with its parity gate, for the part `folder`."""
    try:
        from bsdiff_rt.engines.build import build_engine  # needs platformdirs

        options = EngineOptions("aoti", "fp16", (1, DEMO_BATCH))
        build_engine(open_bundle(DEMO), options, part.device, part.work / DEMO, lambda *_: None)
    except Exception as error:  # as above
        part.note(f"the demo model's engine: not built: {one_line(error)}")
        return
    part.note("the demo model's engine: built, passed the gate")


def measure_steps(part: Part) -> None:
    """Measure steps and short images of every candidate in turn, one batch size after the other."""
    plan = make_rated_plan(part)
    found, absent = load_all(part, plan.model)
    measure_rows(part, plan, found, absent)


Rows = list[dict[str, Any]]


def measure_rows(
    part: Part,
    plan: Plan,
    found: list[Candidate],
    absent: list[Missing],
    before: Rows | None = None,
    finish: Callable[[Rows], Rows] = list,
) -> Rows:
    """Measure batch by batch while there is time, and save the rows of each batch.

    Args:
        part: receives the rows.
        plan: what to measure, and how often.
        found: the candidates.
        absent: what is missing already.
        before: rows measured earlier, saved in front. A candidate with a row there is not saved again.
        finish: changes the rows of a batch before they are saved.
    """
    before = before or []
    rows: Rows = []
    absent = [*absent]
    names = {row["name"] for row in before}
    part.save(rows=before, not_measured=[asdict(entry) for entry in absent])
    seconds_per_image = once = 0.0
    for batch in part.options.batches:
        if not part.has_time(once + 1.3 * seconds_per_image * batch, f"batch {batch}"):
            continue
        started = time.monotonic()
        able = [candidate for candidate in found if batch <= (candidate.runner.batch_range[1] or batch)]
        once = 0.0  # loading and recording, which hardly depend on the batch size
        for measured, failed in measure_batches(plan, able, [batch]):
            rows += finish([asdict(row) for row in measured])
            absent += failed
            once += sum(row.warm_up_s for row in measured)
        seconds_per_image = max(time.monotonic() - started - once, 0.0) / batch
        part.save(
            rows=before + [row for row in rows if row["name"] not in names],
            not_measured=[asdict(entry) for entry in absent],
        )
        steps = ", ".join(f"{row['name']} {row['step_ms']:.4g} ms" for row in rows if row["batch"] == batch)
        part.note(f"batch {batch}: step: {steps}")
    return rows


def make_full_images(part: Part) -> None:
    """Make one image with all steps: the fastest engine, eager, the other engines; then all of them uncaptured.

    An image that takes less than TWICE_S is made twice and the second time counts, when the step is recorded already.
    Eager with TF32 is left out: it takes as long as eager.
    """
    plan = make_rated_plan(part, part.options.full_steps)
    found, absent = load_all(part, plan.model)
    part.save(steps=plan.steps, images=[], not_measured=[asdict(entry) for entry in absent])
    step_s = {
        row["name"]: row["step_ms"] / 1e3 for row in part.read_other("steps").get("rows", []) if row["batch"] == 1
    }
    pictures: dict[str, torch.Tensor] = {}
    eager, *engines = [candidate for candidate in found if candidate.name != TF32]
    engines.sort(key=lambda candidate: step_s.get(candidate.name, 0.0))
    with ThreadPoolExecutor(2) as threads, _open_stream(part.device):
        for what, order in (("image", [*engines[:1], eager, *engines[1:]]), ("uncaptured", engines)):
            for candidate in order:
                name = candidate.name + ("" if what == "image" else ", uncaptured")
                needed = 1.2 * step_s.get(candidate.name, 0.0) * plan.steps
                if not part.has_time(needed, name):
                    continue
                with Trial(candidate, plan, 1, threads) as trial:
                    time_call(trial.step, part.device)
                    calls = trial.list_image_calls()
                    if what in calls:
                        _make_full_image(part, name, calls[what], pictures)


def _make_full_image(
    part: Part, name: str, call: Callable[[], torch.Tensor], pictures: dict[str, torch.Tensor]
) -> None:
    def keep() -> None:
        pictures[name] = call()

    first = seconds = time_call(keep, part.device)
    if first < TWICE_S and part.has_time(1.2 * first, f"{name}, again"):
        seconds = time_call(keep, part.device)
    picture, captured = pictures[name], pictures.get(name.removesuffix(", uncaptured"))
    same = bool(torch.equal(picture, captured)) if captured is not None and captured is not picture else None
    row = {"name": name, "seconds": seconds, "seconds_first": first, "equals_captured": same, "psnr_vs_eager": None}
    images = [*part.found["images"], row]
    if "eager" in pictures:
        for image in images:
            image["psnr_vs_eager"] = compute_psnr(pictures["eager"], pictures[image["name"]], PICTURE_RANGE)
    part.save(images=images)
    part.note(f"{name}: {seconds:.2f} s" + ("" if same is None else f", same bits as captured: {same}"))


def _open_stream(device: torch.device) -> Any:
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def profile_kernels(part: Part) -> None:
    """Record which kernels take the time of three steps at batch size 1."""
    plan = make_rated_plan(part)
    found, _ = load_all(part, plan.model)
    cuda = part.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    part.save(kernels={})
    with ThreadPoolExecutor(1) as threads:
        for candidate in found:
            trial = Trial(candidate, plan, 1, threads)
            time_call(trial.step, part.device)
            with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if cuda else [])]) as profiler:
                for _ in range(3):
                    time_call(trial.step, part.device)
            rows = _list_kernels(profiler, cuda)
            part.save(kernels=part.found["kernels"] | {candidate.name: rows})
            top = ", ".join(f"{row['share']:.0%} {row['name'][:60]}" for row in rows[:3])
            part.note(f"{candidate.name}: {top}")


def _list_kernels(profiler: Any, cuda: bool) -> list[dict[str, Any]]:
    """Return the 15 kernels that take most: name, calls, milliseconds of all three steps, share."""
    unit = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: getattr(event, unit), reverse=True)
    if cuda:
        events = [event for event in events if event.device_type == torch.profiler.DeviceType.CUDA]
    total = sum(getattr(event, unit) for event in events) or 1.0
    return [
        {"name": e.key, "calls": e.count, "ms": getattr(e, unit) / 1e3, "share": getattr(e, unit) / total}
        for e in events[:15]
    ]


def run_folder(part: Part) -> None:
    """Run the demo bundle on a folder of random pictures, then the large network, reading and writing included."""
    from bsdiff_rt.folder.pipeline import Inference  # here: it needs the packages that read files

    source = part.work / "pictures"
    source.mkdir()
    draw_pictures(source, part.options.images, part.options.image_px)
    runner = str(part.work / DEMO) if (part.work / DEMO).is_dir() else "auto"
    settings = InferSettings(output=part.work / "results", device=part.options.device, runner=runner)
    part.save(**_time_folder(part, Inference(settings), sorted(source.iterdir()), "demo"))
    _run_large_folder(part, source)


def _run_large_folder(part: Part, source: Path) -> None:
    """Run the large network, with all its steps, on as many pictures as time allows."""
    from bsdiff_rt.folder.pipeline import Inference

    model = make_model(part)
    assert model.bundle is not None
    steps = {row["name"]: row["step_ms"] / 1e3 for row in part.read_other("steps").get("rows", []) if row["batch"] == 1}
    loaded, _ = load_all(part, model)
    fastest = min(loaded, key=lambda candidate: steps.get(candidate.name, math.inf))
    image_s = 1.2 * steps.get(fastest.name, 0.0) * part.options.full_steps
    count = min(part.options.images, LARGE_IMAGES, int(part.left() / max(image_s, 1e-9)))
    if not count:
        part.note(f"{model.name}: skipped, an image takes about {image_s:.0f} s and {part.left():.0f} s are left")
        return
    settings = InferSettings(
        output=part.work / "large results",
        device=part.options.device,
        bundle=str(_name_graphs(model.bundle, part.work / "large")),
        steps=part.options.full_steps,
        batch=1,
        mirror=False,
    )
    found = _time_folder(part, Inference(settings, fastest.runner), sorted(source.iterdir())[:count], fastest.name)
    part.save(large=found | {"candidate": fastest.name, "steps": part.options.full_steps})


def _name_graphs(bundle: Bundle, folder: Path) -> Path:
    """Copy a bundle that may have no graphs, and give it empty ones. A run with a loaded runner does not read them."""
    shutil.copytree(bundle.folder, folder)
    for name in ("denoiser.onnx", "enhancer.onnx"):
        (folder / name).touch()
    files = {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    (folder / MANIFEST).write_text(replace(bundle.manifest, files=files).to_json())
    return folder


def _time_folder(part: Part, inference: Any, pictures: list[Path], name: str) -> dict[str, Any]:
    """Run a folder. Return the seconds with loading, the counts and the rate.

    Raises:
        RuntimeError: not every picture has a result.
    """
    started = time.monotonic()
    report = inference.run(inference.find_tasks(pictures))
    seconds = time.monotonic() - started
    counts = dict(report.counts())
    rate = counts.get("ok", 0) / seconds
    part.note(
        f"{name}: {counts} of {len(pictures)} images of {part.options.image_px} px in {seconds:.1f} s with loading: "
        f"{rate:.3g} images/s, runner {report.settings['runner']}"
    )
    if counts.get("ok", 0) != len(pictures):
        raise RuntimeError(f"some images failed: {counts}")
    return {
        "seconds_whole": seconds,
        "counts": counts,
        "settings": report.settings,
        "images_per_second": rate,
    }


def draw_pictures(target: Path, count: int, size: int) -> None:
    """Write 16-bit PNG files of smooth random fields with noise.

    Args:
        target: an existing folder.
        count: number of files.
        size: side of each, px.
    """
    import cv2

    generator = np.random.default_rng(0)
    for number in range(count):
        smooth = cv2.resize(generator.random((8, 8), dtype=np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
        grain = generator.standard_normal((size, size), dtype=np.float32)
        values = np.clip((smooth * 0.8 + 0.1 + 0.01 * grain) * 65535, 0, 65535).astype(np.uint16)
        content = cv2.imencode(".png", values, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
        (target / f"{number:04d}.png").write_bytes(content.tobytes())


def measure_peers(part: Part) -> None:
    """Measure other projects' code for the same network; last the one that takes minutes to compile."""
    from benchmarks.peers import COMPILED, DIFFUSERS, PUBLISHED, add_ratios, load_peers

    plan = make_rated_plan(part)
    ours, absent = load_all(part, plan.model)
    more, without = load_peers((PUBLISHED, DIFFUSERS), plan.model, part.device, ours[0])
    rows = measure_rows(part, plan, ours + more, absent + without, finish=add_ratios)
    if part.device.type == "cuda" and part.has_time(COMPILING_S, COMPILED):
        last, failed = load_peers((COMPILED,), plan.model, part.device, ours[0])
        if last:
            measure_rows(part, plan, [ours[0], *more[:1], *last], absent + without + failed, rows, add_ratios)


PARTS: dict[str, Callable[[Part], None]] = {
    "machine": measure_machine,
    "attention": measure_attention,
    "half": measure_half,
    "engines": build_engines,
    "steps": measure_steps,
    "full": make_full_images,
    "profile": profile_kernels,
    "folder": run_folder,
    "peers": measure_peers,
    "tests": run_tests,
}
