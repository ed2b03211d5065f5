"""Which engine and runner `auto` takes, and that what is asked for by name is used or refused."""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import fates, pixels, png, report_of
from stand_in import CPU, VERSIONS, WEIGHTS, change, timed, write_bundle

from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.engines import manifest as identity
from bsdiff_rt.engines import select as choice
from bsdiff_rt.engines.manifest import MANIFEST, Backend
from bsdiff_rt.engines.select import choose, engines_in_cache, find_engine, load, load_first
from bsdiff_rt.errors import EngineError, SettingsError
from bsdiff_rt.files import file_sha256


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
    assert engines_in_cache() == [three[1], three[0], three[2]]
    assert find_engine(small, CPU, "auto", "aoti").folder == three[1]
    assert find_engine(small, CPU, "fp32", "aoti").folder == three[0]
    change(three[0], device="another")
    aged(three[0], 2000)
    assert find_engine(small, CPU, "fp32", "aoti").folder == three[2]


def test_auto_passes_over_an_engine_slower_than_what_runs_without_it(three, small):
    change(three[1], speed=timed(0.9))
    aged(three[1], 3000)
    assert choose(small, "auto", CPU).engine.folder == three[0]  # the newest of those that were faster
    for folder, age in ((three[0], 2000), (three[2], 1000)):
        change(folder, speed=timed(0.8))
        aged(folder, age)
    chosen = choose(small, "auto", CPU)
    assert (chosen.runner, chosen.engine) == ("onnxruntime", None)
    assert "; not aoti: no faster engine built for this bundle and device (" in chosen.why
    assert (
        f"{three[1].name} took 100 ms a step, 0.90 times as fast as onnxruntime (90 ms) when it was built; "
        "--runner aoti uses it all the same; "
    ) in chosen.why
    change(three[1], device="another")  # one that does not fit anyway is not said to be slow
    assert f"{three[1].name} took" not in choose(small, "auto", CPU).why


def test_a_slow_engine_is_taken_by_name_or_where_nothing_else_has_the_precision(three, small):
    for folder, age in zip(three, (2000, 3000, 1000), strict=True):
        change(folder, speed=timed(0.5))
        aged(folder, age)
    for runner, precision in (("aoti", "auto"), ("auto", "bf16")):
        chosen = choose(small, runner, CPU, precision)
        assert chosen.engine.folder == three[1]
        assert "times as fast" not in chosen.why
    assert choose(small, "auto", CPU, engine=three[2]).engine.folder == three[2]
    assert choose(small, "auto", CPU, "fp32").runner == "onnxruntime"
    assert choose(small, "auto", CPU, not_loaded={"onnxruntime": "it does not load"}).runner == "eager"
    assert choose(small, "auto", CPU, not_loaded=dict.fromkeys(("onnxruntime", "eager"), "no")).runner == "aoti"


def test_a_damaged_engine_is_passed_over(three, small):
    (three[1] / WEIGHTS[0]).write_bytes(b"")
    assert find_engine(small, CPU, "auto", "aoti").folder == three[0]


def test_an_engine_removed_while_it_is_looked_at_is_no_engine(three, monkeypatch):
    real = Path.stat

    def stat(path, **options):
        if path.parent == three[0] and path.name == MANIFEST:
            raise FileNotFoundError(2, "No such file or directory")
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    assert engines_in_cache() == [three[1], three[2]]


def test_auto_takes_an_engine_of_the_batch_asked_for_or_says_why_not(three, small):
    for folder, most, age in zip(three, (4, 1, 2), (2000, 3000, 1000), strict=True):
        change(folder, batch_min=1, batch_max=most)
        aged(folder, age)
    assert choose(small, "auto", CPU, batch=1).engine.folder == three[1]
    assert choose(small, "auto", CPU, batch=3).engine.folder == three[0]
    chosen = choose(small, "auto", CPU, batch=8)
    assert (chosen.runner, chosen.engine) == ("onnxruntime", None)
    assert f"{three[1].name} takes at most 1 at once, not 8" in chosen.why
    with pytest.raises(EngineError, match=rf"build-engine {small.folder} --runner aoti --precision fp32 --batch 1:8$"):
        find_engine(small, CPU, "fp32", "aoti", 8)


def test_half_built_engines_are_not_looked_at(three, small, cache):
    shutil.copytree(three[0], cache / ".building-x" / "engine")
    shutil.copytree(three[0], cache / ".building-y")
    assert len(engines_in_cache()) == 3


def test_none_fits(three, small, tmp_path):
    with pytest.raises(EngineError) as caught:
        find_engine(small, CPU, "fp16", "aoti")
    assert str(caught.value) == (
        f"no engine built for this bundle and device in fp16 ({three[1].name} is in bf16, not fp16; {three[0].name} is "
        f"in fp32, not fp16; {three[2].name} is in fp32, not fp16): "
        f"bsdiff-rt build-engine {small.folder} --runner aoti --precision fp16"
    )
    other = write_bundle(tmp_path / "other", seed=2)
    with pytest.raises(EngineError, match=r"no engine built for this bundle and device: bsdiff-rt build-.*/other"):
        find_engine(other, CPU, "auto", "aoti")
    for folder in three:
        change(folder, versions={"torch": "2.12.0", "cuda": "none"})
    with pytest.raises(EngineError, match=r"and device \(.*torch: built for 2\.12\.0, this is 2\.13\.0.*\): bsdiff-rt"):
        find_engine(small, CPU, "auto", "aoti")


def test_without_a_cache(small, cache):
    assert engines_in_cache() == []
    with pytest.raises(EngineError, match="no engine built"):
        find_engine(small, CPU, "auto", "aoti")
    assert not cache.exists()  # looking makes nothing: a home may be read-only


def test_a_bundle_of_the_package_is_called_by_its_name(cache):
    with pytest.raises(EngineError, match=r"build-engine demo --runner aoti --device cuda:1$"):
        find_engine(open_bundle("demo"), torch.device("cuda", 1), "auto", "aoti")


def test_auto_takes_an_engine_that_was_built(three, small):
    chosen = choose(small, "auto", CPU)
    assert (chosen.runner, chosen.precision, chosen.engine.folder) == ("aoti", "bf16", three[1])
    assert chosen.why == "not tensorrt: it runs on NVIDIA GPUs, not on cpu"
    assert choose(small, "auto", CPU, "fp32").engine.folder == three[0]


def test_auto_without_engines_says_how_to_build_one(small, cache):
    chosen = choose(small, "auto", CPU)
    assert (chosen.runner, chosen.precision, chosen.engine) == ("onnxruntime", "fp32", None)
    assert f"not aoti: no engine built for this bundle and device: bsdiff-rt build-engine {small.folder}" in chosen.why


def test_auto_passes_over_an_engine_that_does_not_fit_and_says_why(built, small):
    change(built, driver="CUDA 12.8")
    chosen = choose(small, "auto", CPU)
    assert chosen.runner == "onnxruntime"
    assert "driver: built for CUDA 12.8, this is none" in chosen.why


def test_a_precision_nobody_has(built, small):
    with pytest.raises(
        EngineError, match=r"--precision fp16: no runner has it here: not tensorrt: .*; not aoti: no en"
    ):
        choose(small, "auto", CPU, "fp16")


def test_by_name_without_an_engine(small, cache):
    with pytest.raises(
        EngineError, match="--runner aoti cannot be used on cpu: no engine built for this bundle and device: bsdiff-rt"
    ):
        choose(small, "aoti", CPU)


def test_by_name_with_an_engine(built, small):
    chosen = choose(small, "aoti", CPU)
    assert (chosen.engine.folder, chosen.why) == (built, "asked for")
    assert choose(small, "eager", CPU).engine is None


def test_by_folder(built, small, tmp_path):
    elsewhere = built.rename(tmp_path / "elsewhere")
    for runner, precision in (("auto", "auto"), ("aoti", "auto"), ("auto", "fp32"), ("aoti", "fp32")):
        assert choose(small, runner, CPU, precision, elsewhere).engine.folder == elsewhere
    with pytest.raises(SettingsError, match=r"--runner eager: the engine .* is aoti; leave one of the two out"):
        choose(small, "eager", CPU, "auto", elsewhere)
    with pytest.raises(SettingsError, match=r"--precision bf16: the engine .* is fp32; leave one of the two out"):
        choose(small, "auto", CPU, "bf16", elsewhere)
    change(elsewhere, driver="CUDA 12.8")
    with pytest.raises(EngineError, match="driver"):
        choose(small, "auto", CPU, "auto", elsewhere)  # no other one is taken in its place


def test_loading_says_what_and_why(built, small, stand_in, caplog):
    with caplog.at_level(logging.INFO), load(small, "auto", CPU) as runner:
        assert runner.name == "aoti"
    assert f"runner aoti in fp32 on cpu, engine {built} (not tensorrt: it runs on NVIDIA GPUs" in caplog.text
    assert stand_in.loaded == [built]


def fail_to_load(monkeypatch, failures: dict[str, Exception]) -> None:
    """Runners that load as by default but for the ones named."""
    load_runner = choice.load_runner

    def loading(bundle, name, device, precision="fp32"):
        if name in failures:
            raise failures[name]
        return load_runner(bundle, name, device, precision)

    monkeypatch.setattr(choice, "load_runner", loading)


def test_auto_takes_the_next_where_the_first_does_not_load(built, small, stand_in, monkeypatch, caplog):
    def broken(*_, **__):
        raise EngineError("denoiser.pt2: no kernel image")

    monkeypatch.setattr(stand_in, "load", broken)
    monkeypatch.setattr(identity, "backend", lambda _: Backend(stand_in.build, broken, lambda: VERSIONS))
    fail_to_load(monkeypatch, {"onnxruntime": EngineError("not a graph")})
    chosen, runner = load_first(small, "auto", CPU)
    assert (chosen.runner, chosen.engine, runner.name) == ("eager", None, "eager")
    assert chosen.why == (
        "not tensorrt: it runs on NVIDIA GPUs, not on cpu; not aoti: it does not load (denoiser.pt2: no kernel image); "
        "not onnxruntime: it does not load (not a graph)"
    )
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        "runner aoti passed over: it does not load (denoiser.pt2: no kernel image)",
        "runner onnxruntime passed over: it does not load (not a graph)",
    ]
    fail_to_load(monkeypatch, {"eager": EngineError("nor this")})
    with pytest.raises(EngineError, match=r"no runner has it here: .*; not eager: it does not load \(nor this\)"):
        load(small, "auto", CPU)


def test_by_name_or_folder_nothing_else_is_taken(built, small, stand_in, monkeypatch):
    fail_to_load(monkeypatch, {"onnxruntime": EngineError("not a graph")})
    with pytest.raises(EngineError, match=r"^not a graph$"):
        load(small, "onnxruntime", CPU)

    def broken(*_, **__):
        raise EngineError("no kernel image")

    monkeypatch.setattr(identity, "backend", lambda _: Backend(stand_in.build, broken, lambda: VERSIONS))
    with pytest.raises(EngineError, match=r"^no kernel image$"):
        load(small, "auto", CPU, engine=built)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError()])
def test_without_the_memory_to_load(small, monkeypatch, error):
    fail_to_load(monkeypatch, {"eager": error})
    with pytest.raises(EngineError, match=r"cpu has not the memory to load runner eager \(.+\); free some, or"):
        load(small, "eager", CPU)
    fail_to_load(monkeypatch, {"eager": RuntimeError("a bug")})
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        load(small, "eager", CPU)


# --- a real engine, through the command line --------------------------------------------------------------------------


def picture(folder: Path) -> np.ndarray:
    return pixels(folder / "a.png").astype(float)


@pytest.mark.slow
def test_infer_with_an_engine_draws_eagers_picture(infer, tiny_engine, tmp_path, cache):
    png(tmp_path / "in" / "a.png")
    assert infer("--runner", "eager").code == 0
    expected = picture(tmp_path / "out")
    done = infer("--engine", tiny_engine, "--overwrite")
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
    done = infer("--engine", in_cache)
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
        (["--runner", "onnxruntime"], 2, "--runner onnxruntime: the engine .* is aoti"),
        (["--precision", "bf16"], 2, "--precision bf16: the engine .* is fp32"),
        (["--batch", "4"], 2, "--batch 4"),
    ],
)
def test_infer_refuses_what_contradicts_the_engine(infer, tiny_engine, tmp_path, arguments, code, message):
    png(tmp_path / "in" / "a.png")
    done = infer("--engine", tiny_engine, *arguments)
    assert done.code == code
    assert re.search(message, done.err)
    assert not list(tmp_path.glob("out/*.png"))
