"""Which engine and runner `auto` takes. What is requested by name or folder is used or refused."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ToyRunner, fates, pixels, png, report_of
from stand_in import CPU, GPU, SIZE, WEIGHTS, change, timed, write_bundle

from bsdiff_rt.bundle import Bundle, open_bundle
from bsdiff_rt.engines import select as choice
from bsdiff_rt.engines.cache import list_engines
from bsdiff_rt.engines.manifest import MANIFEST, Engine
from bsdiff_rt.engines.select import Choice, RunnerRequest, load_first
from bsdiff_rt.errors import EngineError, SettingsError, describe_error
from bsdiff_rt.files import file_sha256
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.registry import RUNNERS

NO_GPU = [f"not {name}: it runs on NVIDIA GPUs, not on cpu" for name in ("tensorrt", "tensorrt-rtx")]
NO_OPENVINO = RUNNERS["openvino"].find_problem(CPU) or "no engine for this bundle and device. Build one."
NO_OTHERS = "; ".join([*NO_GPU, f"not openvino: {NO_OPENVINO}"])


def choose(bundle: Bundle, runner: str = "auto", precision: str = "auto", **others: Any) -> Choice:
    batch, device = others.pop("batch", None), others.pop("device", CPU)
    return choice.choose(RunnerRequest(bundle, runner, device, precision, batch), **others)


def find(bundle: Bundle, precision: str = "auto", batch: int | None = None, device: torch.device = CPU) -> Engine:
    return choice.find_engine(RunnerRequest(bundle, "auto", device, precision, batch), "aoti")


def load(bundle: Bundle, runner: str | Path) -> Runner:
    return choice.load(bundle, str(runner), CPU)


def aged(folder: Path, seconds: int) -> Path:
    os.utime(folder / MANIFEST, (seconds, seconds))
    return folder


@pytest.fixture
def three(built, cache) -> list[Path]:
    """Engines of one bundle: fp32, then bf16 (the newest), then an old fp32 one of another batch."""
    others = [Path(shutil.copytree(built, cache / name)) for name in ("lower", "static")]
    change(others[0], precision="bf16")
    change(others[1], batch_min=2, batch_max=2)
    return [aged(folder, age) for folder, age in zip((built, *others), (2000, 3000, 1000), strict=True)]


def test_the_newest_that_fits_is_found(three, small):
    assert list_engines() == [three[1], three[0], three[2]]
    assert find(small, "auto").folder == three[1]
    assert find(small, "fp32").folder == three[0]
    change(three[0], device="another")
    aged(three[0], 2000)
    assert find(small, "fp32").folder == three[2]


def test_auto_passes_over_an_engine_slower_than_what_runs_without_it(three, small):
    change(three[1], speed=timed(0.9))
    aged(three[1], 3000)
    assert choose(small, "auto").engine.folder == three[0]  # the newest of those that were faster
    for folder, age in ((three[0], 2000), (three[2], 1000)):
        change(folder, speed=timed(0.8))
        aged(folder, age)
    chosen = choose(small, "auto")
    assert (chosen.runner, chosen.engine) == ("onnxruntime", None)
    assert "; not aoti: no faster engine for this bundle and device (" in chosen.why
    assert (
        f"{three[1].name} took 100 ms a step, 0.90 times as fast as onnxruntime (90 ms) when it was built; "
        "runner aoti still uses it; "
    ) in chosen.why
    change(three[1], device="another")  # one that does not fit anyway is not said to be slow
    assert f"{three[1].name} took" not in choose(small, "auto").why


def test_a_slow_engine_is_taken_by_name_or_where_nothing_else_has_the_precision(three, small):
    for folder, age in zip(three, (2000, 3000, 1000), strict=True):
        change(folder, speed=timed(0.5))
        aged(folder, age)
    for runner, precision in (("aoti", "auto"), ("auto", "bf16")):
        chosen = choose(small, runner, precision)
        assert chosen.engine.folder == three[1]
        assert "times as fast" not in chosen.why
    assert choose(small, str(three[2])).engine.folder == three[2]
    assert choose(small, "auto", "fp32").runner == "onnxruntime"
    assert choose(small, "auto", not_loaded={"onnxruntime": "it does not load"}).runner == "eager"
    assert choose(small, "auto", not_loaded=dict.fromkeys(("onnxruntime", "eager"), "no")).runner == "aoti"


def test_an_engine_that_cannot_be_read_is_passed_over(three, small, unreadable):
    unreadable(three[1] / MANIFEST)
    assert choose(small, "aoti").engine.folder in (three[0], three[2])


def test_a_damaged_engine_is_passed_over(three, small):
    (three[1] / WEIGHTS[0]).write_bytes(b"")
    assert find(small, "auto").folder == three[0]


def test_an_engine_removed_while_it_is_looked_at_is_no_engine(three, monkeypatch):
    real = Path.stat

    def stat(path, **options):
        if path.parent == three[0] and path.name == MANIFEST:
            raise FileNotFoundError(2, "No such file or directory")
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    assert list_engines() == [three[1], three[2]]


def test_auto_takes_an_engine_of_the_batch_asked_for_or_says_why_not(three, small):
    for folder, most, age in zip(three, (4, 1, 2), (2000, 3000, 1000), strict=True):
        change(folder, batch_min=1, batch_max=most)
        aged(folder, age)
    assert choose(small, "auto", batch=1).engine.folder == three[1]
    assert choose(small, "auto", batch=3).engine.folder == three[0]
    chosen = choose(small, "auto", batch=8)
    assert (chosen.runner, chosen.engine) == ("onnxruntime", None)
    assert f"{three[1].name} takes at most 1 images at once, not 8" in chosen.why
    with pytest.raises(EngineError) as caught:
        find(small, "fp32", 8)
    assert "--" not in str(caught.value)
    assert describe_error(caught.value).endswith(
        f"Build one. Run: bsdiff-rt build-engine {small.folder} --runner aoti --precision fp32 --batch 1:8"
    )


def test_half_built_engines_are_not_looked_at(three, small, cache):
    shutil.copytree(three[0], cache / ".building-x" / "engine")
    shutil.copytree(three[0], cache / ".building-y")
    assert len(list_engines()) == 3


def test_none_fits(three, small, tmp_path):
    with pytest.raises(EngineError) as caught:
        find(small, "fp16")
    assert str(caught.value) == (
        f"no engine for this bundle and device in fp16 ({three[1].name} is in bf16, not fp16; {three[0].name} is "
        f"in fp32, not fp16; {three[2].name} is in fp32, not fp16). Build one."
    )
    assert caught.value.build == {"bundle": str(small.folder), "runner": "aoti", "precision": "fp16"}
    other = write_bundle(tmp_path / "other", seed=2)
    with pytest.raises(EngineError, match=r"^no engine for this bundle and device\. Build one\.$") as caught:
        find(other, "auto")
    assert caught.value.build["bundle"].endswith("/other")
    for folder in three:
        change(folder, versions={"torch": "2.12.0", "cuda": "none"})
    with pytest.raises(EngineError, match=r"device \(.*torch: built for 2\.12\.0, this is 2\.13\.0.*\)\. Build one"):
        find(small, "auto")


def test_without_a_cache(small, cache):
    assert list_engines() == []
    with pytest.raises(EngineError, match="no engine for this"):
        find(small, "auto")
    assert not cache.exists()  # looking makes nothing: a home may be read-only


def test_a_bundle_of_the_package_is_called_by_its_name(cache):
    with pytest.raises(EngineError) as caught:
        find(open_bundle("demo"), device=torch.device("cuda", 1))
    assert describe_error(caught.value).endswith("build-engine demo --runner aoti --device cuda:1")


def test_auto_takes_an_engine_that_was_built(three, small):
    chosen = choose(small, "auto")
    assert (chosen.runner, chosen.precision, chosen.engine.folder) == ("aoti", "bf16", three[1])
    assert chosen.why == NO_OTHERS
    assert choose(small, "auto", "fp32").engine.folder == three[0]


def test_auto_without_engines_says_how_to_build_one(small, cache):
    chosen = choose(small, "auto")
    assert (chosen.runner, chosen.precision, chosen.engine) == ("onnxruntime", "fp32", None)
    assert "not aoti: no engine for this bundle and device. Build one." in chosen.why


def test_auto_passes_over_an_engine_that_does_not_fit_and_says_why(built, small):
    change(built, driver="CUDA 12.8")
    chosen = choose(small, "auto")
    assert chosen.runner == "onnxruntime"
    assert "driver: built for CUDA 12.8, this is none" in chosen.why


def test_a_precision_nobody_has(built, small):
    reason = r"no runner can be used in precision fp16 here: not tensorrt: .*; not aoti: .*\. Use precision auto\.$"
    with pytest.raises(EngineError, match=reason):
        choose(small, "auto", "fp16")


def test_by_name_without_an_engine(small, cache):
    with pytest.raises(
        EngineError,
        match=r"runner aoti cannot be used on cpu: no engine for this bundle and device\. Build one",
    ):
        choose(small, "aoti")


def test_by_name_with_an_engine(built, small):
    chosen = choose(small, "aoti")
    assert (chosen.engine.folder, chosen.why) == (built, "requested")
    assert choose(small, "eager").engine is None


def test_by_folder(built, small, tmp_path):
    elsewhere = built.rename(tmp_path / "elsewhere")
    for precision in ("auto", "fp32"):
        chosen = choose(small, str(elsewhere), precision)
        assert (chosen.runner, chosen.engine.folder) == ("aoti", elsewhere)
    with pytest.raises(SettingsError, match=r"^bf16 was requested, but the engine .* is in fp32\. Use") as caught:
        choose(small, str(elsewhere), "bf16")
    assert caught.value.setting == "precision"
    change(elsewhere, driver="CUDA 12.8")
    with pytest.raises(EngineError, match="driver"):
        choose(small, str(elsewhere))  # no other one is taken in its place


def test_loading_says_what_and_why(built, small, stand_in, caplog):
    with caplog.at_level(logging.DEBUG, "bsdiff_rt.engines"), load(small, "auto") as runner:
        assert runner.name == "aoti"
    assert [record.getMessage() for record in caplog.records if record.levelname == "INFO"] == [
        f"runner aoti in fp32 on cpu, engine {built}"
    ]
    assert f"reason for runner aoti: {NO_OTHERS}" in caplog.text
    assert stand_in.loaded == [built]


def fail_to_load(monkeypatch, name: str, error: Exception) -> None:
    """Let a runner raise an error when it is loaded."""

    def fail(*_, **__):
        raise error

    monkeypatch.setitem(sys.modules, f"broken_{name}", SimpleNamespace(load_bundle=fail, load_engine=fail))
    monkeypatch.setitem(RUNNERS, name, replace(RUNNERS[name], module=f"broken_{name}"))


def test_auto_takes_the_next_where_the_first_does_not_load(built, small, stand_in, monkeypatch, caplog):
    def fail(*_, **__):
        raise EngineError("denoiser.pt2: no kernel image")

    monkeypatch.setattr(stand_in, "load_engine", fail)
    fail_to_load(monkeypatch, "onnxruntime", EngineError("not a graph"))
    chosen, runner = load_first(RunnerRequest(small, "auto", CPU))
    assert (chosen.runner, chosen.engine, runner.name) == ("eager", None, "eager")
    assert chosen.why == (
        f"{NO_OTHERS}; not aoti: it does not load (denoiser.pt2: no kernel image); "
        "not onnxruntime: it does not load (not a graph)"
    )
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        "Runner aoti does not load (denoiser.pt2: no kernel image). Trying the next.",
        "Runner onnxruntime does not load (not a graph). Trying the next.",
    ]
    fail_to_load(monkeypatch, "eager", EngineError("nor this"))
    with pytest.raises(EngineError, match=r"no runner can be used .*; not eager: it does not load \(nor this\)"):
        load(small, "auto")


def test_by_name_or_folder_nothing_else_is_taken(built, small, stand_in, monkeypatch):
    fail_to_load(monkeypatch, "onnxruntime", EngineError("not a graph"))
    with pytest.raises(EngineError, match=r"^not a graph$"):
        load(small, "onnxruntime")

    def fail(*_, **__):
        raise EngineError("no kernel image")

    monkeypatch.setattr(stand_in, "load_engine", fail)
    with pytest.raises(EngineError, match=r"^no kernel image$"):
        load(small, built)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError()])
def test_without_the_memory_to_load(small, monkeypatch, error):
    fail_to_load(monkeypatch, "eager", error)
    with pytest.raises(EngineError, match=r"cpu has too little memory to load runner eager \(.+\)\. Free some, or"):
        load(small, "eager")
    fail_to_load(monkeypatch, "eager", RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        load(small, "eager")


@pytest.mark.parametrize("runner", ["abacus", "Eager", "", "nowhere/engine"])
def test_neither_a_runner_nor_an_engine(small, tmp_path, monkeypatch, runner):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "abacus").mkdir()
    with pytest.raises(SettingsError, match=rf"^'{runner}' is neither a runner \(auto, .*\) nor the fol") as caught:
        choose(small, runner)
    assert caught.value.setting == "runner"


def test_a_runners_name_comes_before_a_folder_of_that_name(built, small, tmp_path, monkeypatch):
    built.rename(tmp_path / "eager")
    monkeypatch.chdir(tmp_path)
    assert choose(small, "eager").engine is None
    assert choose(small, "./eager").engine.folder == Path("eager")


# --- a real engine, through the command line --------------------------------------------------------------------------


def picture(folder: Path) -> np.ndarray:
    return pixels(folder / "a.png").astype(float)


@pytest.mark.slow
def test_infer_with_an_engine_draws_eagers_picture(infer, tiny_engine, tmp_path, cache):
    png(tmp_path / "in" / "a.png")
    assert infer("--runner", "eager").code == 0
    expected = picture(tmp_path / "out")
    done = infer("--runner", tiny_engine, "--overwrite")
    assert done.code == 0, done.err
    settings = report_of(tmp_path / "out")["settings"]
    assert (settings["runner"], settings["precision"]) == ("aoti", "fp32")
    assert report_of(tmp_path / "out")["environment"]["engine"] == file_sha256(tiny_engine / MANIFEST)
    assert fates(tmp_path / "out") == {"a.png": "ok"}
    # fp32 within 1e-4 of each call: at most one grey level of 255 falls on the other side of its rounding.
    assert np.abs(picture(tmp_path / "out") - expected).max() <= 1
    assert expected.std() > 1  # of a picture, not of nothing


@pytest.mark.slow
def test_infer_auto_finds_the_engine_and_says_so(infer, in_cache, tmp_path):
    png(tmp_path / "in" / "a.png")
    done = infer()
    assert done.code == 0, done.err
    assert f"runner aoti in fp32 on cpu, engine {in_cache}" in done.err
    assert report_of(tmp_path / "out")["settings"]["runner"] == "aoti"


@pytest.mark.slow
def test_infer_refuses_an_engine_that_does_not_fit(infer, in_cache, tmp_path):
    png(tmp_path / "in" / "a.png")
    change(in_cache, device="NVIDIA H100")
    done = infer("--runner", in_cache)
    assert done.code == 4
    assert "device: built for NVIDIA H100, this is " in done.err
    assert infer("--runner", "aoti").code == 4
    assert not (tmp_path / "out").exists()
    assert infer().code == 0
    assert report_of(tmp_path / "out")["settings"]["runner"] == "onnxruntime"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--precision", "bf16"], 2, "bf16 was requested, but the engine .* is in fp32"),
        (["--batch", "4"], 2, "--batch: 4 is more than the aoti runner's 3"),
    ],
)
def test_infer_refuses_what_contradicts_the_engine(infer, tiny_engine, tmp_path, arguments, code, message):
    png(tmp_path / "in" / "a.png")
    done = infer("--runner", tiny_engine, *arguments)
    assert done.code == code
    assert re.search(message, done.err)
    assert not list(tmp_path.glob("out/*.png"))


class Broken(ToyRunner):
    """Loads, and cannot run."""

    error: Exception = RuntimeError("no kernel image is available")

    def denoise(self, *_):
        raise self.error


def test_on_a_gpu_auto_passes_over_what_loads_and_does_not_run(small, monkeypatch, caplog):
    runners = {"broken": Broken(SIZE), "good": ToyRunner(SIZE)}  # the processor does their work

    def choose_first(request, not_loaded):
        names = runners if request.runner == "auto" else [request.runner]
        return Choice(next(name for name in names if name not in not_loaded), "fp32", "")

    monkeypatch.setattr(choice, "choose", choose_first)
    monkeypatch.setattr(choice, "_load", lambda _, chosen: runners[chosen.runner])
    broken, good = runners.values()
    assert load_first(RunnerRequest(small, "auto", GPU))[1] is good
    assert broken.closed
    assert "Runner broken does not load (it does not run: RuntimeError: no kernel image is available)" in caplog.text
    assert load_first(RunnerRequest(small, "broken", GPU))[1] is broken  # named, it is used as it is
    broken.error = torch.OutOfMemoryError("out of memory")  # another runner would need as much
    with pytest.raises(torch.OutOfMemoryError):
        load_first(RunnerRequest(small, "auto", GPU))
