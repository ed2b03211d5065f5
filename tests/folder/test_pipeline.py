"""Folder to folder: what is written, that settings do what they say, resuming, interruptions, networks that fail."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import SHAPE, dicom, fates, pixels, png, report_of, tree
from pydicom import dcmread
from synthetic import chest, dataset, save

from bsdiff_rt import model
from bsdiff_rt.bundle import MANIFEST, open_bundle, to_signed_json
from bsdiff_rt.config import InferSettings, Schedule
from bsdiff_rt.engines import select as choice
from bsdiff_rt.errors import BundleError, EngineError, SettingsError
from bsdiff_rt.files import file_sha256
from bsdiff_rt.folder import ledger, preview, reading, worker, writing
from bsdiff_rt.folder.ledger import only_run
from bsdiff_rt.folder.pipeline import Inference
from bsdiff_rt.folder.report import digest_path
from bsdiff_rt.folder.tasks import find_tasks
from bsdiff_rt.formats import raster
from bsdiff_rt.formats.raster import read_raster
from bsdiff_rt.imaging.chest_guard import INVERTED
from bsdiff_rt.imaging.network_input import resize, to_network
from bsdiff_rt.imaging.result_guard import BRIGHTER
from bsdiff_rt.imaging.view import SPREAD_TO
from bsdiff_rt.sampling import batching
from bsdiff_rt.sampling.noise import ImageNoise
from bsdiff_rt.sampling.schedule import sampler_table
from train.phantoms import draw_phantom

# Results of two runs that compute the same in another order (batch size, runner) may fall on either side of a rounding:
# one grey level of 255. Seen: 0 or 1.
LEVELS = 1


@pytest.fixture
def run(tiny_bundle, tmp_path, request):
    """Does tmp_path/in into tmp_path/out; returns this run's entries by input file name.

    A test that asks for `toy` runs it in place of the bundle's networks.
    """
    runner = request.getfixturevalue("toy") if "toy" in request.fixturenames else None

    def do(*inputs, **settings):
        settings = {"output": tmp_path / "out", "bundle": str(tiny_bundle)} | settings
        inference = Inference(InferSettings(**settings), runner)
        report = inference.run(inference.find_tasks(inputs or [tmp_path / "in"]))
        return {Path(entry.input).name: entry for entry in report.files}

    return do


@pytest.fixture
def one(run, tmp_path):
    """Does one PNG with the given settings into a folder of its own; returns the stored values of the result."""

    def do(name="a.png", **settings):
        output = tmp_path / f"out {len(list(tmp_path.glob('out *')))}"
        entry = run(output=output, **settings)[name]
        assert entry.status == "ok", entry
        return pixels(output / entry.output)

    png(tmp_path / "in" / "a.png")
    return do


def statuses(entries):
    return {name: entry.status for name, entry in entries.items()}


# --- what is written ---


def test_a_tree_is_mirrored(run, toy, tmp_path):
    for name in ("a.png", "sub/b.png", "sub/deeper/a.png", "no suffix", "1.2.840.99"):
        path = tmp_path / "in" / name
        (png if path.suffix == ".png" else dicom)(path, seed=len(name))
    assert set(statuses(run()).values()) == {"ok"}
    assert tree(tmp_path / "out") == {
        "a.png",
        "sub/b.png",
        "sub/deeper/a.png",
        "no suffix.dcm",
        "1.2.840.99.dcm",
        "report.json",
    }
    assert toy.closed


@pytest.mark.parametrize(
    ("source", "bits", "file_format", "suffix"),
    [
        ("png", 8, "auto", ".png"),
        ("png", 12, "auto", ".png"),
        ("png", 16, "auto", ".png"),
        ("dicom", 8, "auto", ".dcm"),
        ("dicom", 12, "auto", ".dcm"),
        ("dicom", 16, "dicom", ".dcm"),
        ("dicom", 8, "png", ".png"),
        ("dicom", 12, "png", ".png"),
        ("png", 8, "png", ".png"),
    ],
)
def test_format_depth_and_matrix(run, toy, tmp_path, source, bits, file_format, suffix):
    if source == "dicom":
        dicom(tmp_path / "in" / "a", bits)
    else:
        png(tmp_path / "in" / "a.png", bits)
    (entry,) = run(format=file_format).values()
    assert entry.output == f"a{suffix}"
    rows, columns = SHAPE
    if suffix == ".png":
        result = pixels(tmp_path / "out" / entry.output)
        assert result.dtype == (np.uint8 if bits == 8 else np.uint16)
    else:
        derived = dcmread(tmp_path / "out" / entry.output)
        result = derived.pixel_array
        assert (derived.BitsStored, derived.BitsAllocated) == (bits, 8 if bits == 8 else 16)
        assert "BONE_SUPPRESSED" in derived.ImageType
        assert "ddim, 3 steps, seed 0, stage 2 on, model input" in derived.DerivationDescription
    assert result.shape == (rows, columns)
    # The picture the toy makes: 0.9 (0.7 cxr +- 0.2) in [-1, 1], at every depth on the same scale.
    shown = result / (2**bits - 1)
    expected = cv2.resize(chest(*SHAPE), (columns, rows), interpolation=cv2.INTER_AREA)
    assert np.abs(shown - (0.5 + 0.63 * (expected - 0.5))).mean() < 0.07


def test_the_report_and_the_files_agree(run, toy, tmp_path):
    png(tmp_path / "in" / "a.png")
    dicom(tmp_path / "in" / "b.dcm")
    (tmp_path / "in" / "c.png").write_bytes(b"text")
    run(seed=7)
    report = report_of(tmp_path / "out")
    files = {Path(entry["input"]).name: entry for entry in report["files"]}
    for name in ("a.png", "b.dcm"):
        assert files[name]["status"] == "ok"
        assert files[name]["sha256"] == file_sha256(tmp_path / "out" / name)
        assert files[name]["input_sha256"] == file_sha256(tmp_path / "in" / name)
        assert files[name]["seconds"] > 0
    assert files["c.png"] | {"seconds": 0, "input": ""} == {
        "input": "",
        "output": None,
        "status": "refused",
        "reason": "not a PNG, JPEG or TIFF file",
        "seconds": 0,
        "sha256": None,
        "input_sha256": file_sha256(tmp_path / "in" / "c.png"),
        "path_sha256": digest_path(tmp_path / "in" / "c.png"),
        "maps": {},
        "retention": None,
        "view": None,
        "warnings": [],
    }
    assert report["settings"] == {
        "sampler": "ddim",
        "steps": 3,
        "seed": 7,
        "samples": 1,
        "enhance": True,
        "mirror": False,
        "detail": "full",
        "raw_view": False,
        "format": "auto",
        "runner": "toy",
        "precision": "fp32",
    }
    assert report["images_per_second"] > 0


def test_png_for_dicom_refuses_dicom_for_png(run, toy, tmp_path):
    png(tmp_path / "in" / "a.png")
    dicom(tmp_path / "in" / "b.dcm")
    entries = run(format="dicom")
    assert statuses(entries) == {"a.png": "refused", "b.dcm": "ok"}
    assert "needs a DICOM X-ray" in entries["a.png"].reason


# --- settings do what they say ---


def test_settings_change_the_picture(one):
    """Each of these with the real networks; two that gave the same picture would mean that one is ignored."""
    pictures = {
        "default": one(),
        "seed": one(seed=1),  # ddim adds no noise, but x_T is drawn from the seed
        "steps": one(steps=2),
        "ddpm": one(sampler="ddpm", steps=3),
        "dpmpp-2m": one(sampler="dpmpp-2m", steps=3),
        "release": one(sampler="release", steps=3),
        "enhance": one(enhance=False),
        "detail model": one(detail="model"),
    }
    for first in pictures:
        for second in pictures:
            different = np.mean(pictures[first] != pictures[second])
            assert (different > 0.02) == (first != second), (first, second)


@pytest.mark.parametrize("runner", ["onnxruntime", "eager"])
def test_the_same_seed_gives_the_same_bytes(run, tmp_path, runner):
    png(tmp_path / "in" / "a.png")
    for name in ("first", "second"):
        run(output=tmp_path / name, seed=3, sampler="ddpm", steps=3, runner=runner)
    first, second = ((tmp_path / name / "a.png").read_bytes() for name in ("first", "second"))
    assert first == second


def test_both_runners_make_the_same_picture(one):
    first, second = one(runner="onnxruntime").astype(int), one(runner="eager").astype(int)
    assert np.abs(first - second).max() <= LEVELS


@pytest.mark.parametrize("runner", ["onnxruntime", "eager"])
def test_the_batch_size_does_not_matter(run, tmp_path, runner):
    """Nor do neighbours and their order: five images in batches of 1, 2 (the last one short) and 5."""
    for seed in range(5):
        png(tmp_path / "in" / f"{seed}.png", seed=seed)
    settings = {"sampler": "ddpm", "steps": 3, "runner": runner}
    for batch in (1, 2, 5):
        run(output=tmp_path / str(batch), batch=batch, **settings)
    run(*sorted((tmp_path / "in").iterdir(), reverse=True), output=tmp_path / "reversed", batch=5, **settings)
    for seed in range(5):
        alone = pixels(tmp_path / "1" / f"{seed}.png").astype(int)
        for other in ("2", "5", "reversed"):
            assert np.abs(pixels(tmp_path / other / f"{seed}.png") - alone).max() <= LEVELS


def test_batches_are_filled_and_the_bits_do_not_depend_on_them(run, toy, tmp_path):
    for seed in range(5):
        png(tmp_path / "in" / f"{seed}.png", 16, seed=seed)
    (tmp_path / "in" / "2 bad.png").write_bytes(b"text")
    for batch in (1, 2, 5):
        toy.batches.clear()
        run(output=tmp_path / str(batch), batch=batch, sampler="ddpm", steps=3)
        assert toy.batches == {1: [1] * 5, 2: [2, 2, 1], 5: [5]}[batch]
    for seed in range(5):  # the toy is pixelwise, so what is left to differ is the pipeline's own
        assert len({(tmp_path / str(batch) / f"{seed}.png").read_bytes() for batch in (1, 2, 5)}) == 1


def test_the_number_of_steps_is_the_number_of_calls(run, toy, tmp_path):
    png(tmp_path / "in" / "a.png")
    for settings, calls in (({}, 3), ({"steps": 5}, 5), ({"sampler": "release"}, 1000), ({"sampler": "ddim"}, 3)):
        toy.denoised = 0
        run(overwrite=True, **settings)
        assert toy.denoised == calls, settings  # another sampler than the bundle's own runs in full


@pytest.fixture
def darker(toy, monkeypatch):
    """A network that changes the tone and nothing else."""
    monkeypatch.setattr(toy, "denoise", lambda _, cxr, __, out: torch.sub(cxr, 0.2, out=out))
    monkeypatch.setattr(toy, "enhance", lambda x, out: out.copy_(x))


def equalise(bundle: Path, clip_limit: float) -> None:
    content = json.loads((bundle / MANIFEST).read_text())
    content["preprocessing"]["clahe_clip_limit"] = clip_limit
    (bundle / MANIFEST).write_text(to_signed_json(content))


def test_detail_from_both_has_the_networks_tone_and_the_sources_sharpness(one, darker):
    cxr, both, network = chest(*SHAPE), one() / 255, one(detail="model") / 255
    fine = cxr - resize(resize(cxr, (64, 58)), SHAPE)
    added = (both - network)[cxr > 0.25]  # darker, black is clipped
    assert np.corrcoef(added, fine[cxr > 0.25])[0, 1] > 0.97
    assert added.std() == pytest.approx(fine[cxr > 0.25].std(), rel=0.05)


@pytest.mark.parametrize(("detail", "said"), [("model", "detail model, "), ("full", "detail full, ")])
def test_the_derivation_says_where_detail_is_from(run, toy, tmp_path, detail, said):
    dicom(tmp_path / "in" / "a.dcm")
    run(detail=detail)
    assert said in dcmread(tmp_path / "out" / "a.dcm").DerivationDescription


def test_force_takes_what_the_header_speaks_against(run, toy, tmp_path):
    dicom(tmp_path / "in" / "a.dcm", ViewPosition="LL")
    assert "not a frontal view" in run()["a.dcm"].reason
    assert run(any_view=True, preview=True)["a.dcm"].status == "ok"
    assert (tmp_path / "out" / "preview.png").is_file()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"steps": 0}, SettingsError, "0 sampling steps requested.* Use 1 to 1000"),
        ({"steps": 1001}, SettingsError, "1001 sampling steps requested"),
        ({"steps": -5}, SettingsError, "-5 sampling steps"),
        ({"sampler": "euler", "steps": 3}, SettingsError, "unknown sampler 'euler'"),
        ({"seed": -1}, SettingsError, "-1 is out of range"),
        ({"seed": 2**64}, SettingsError, "18446744073709551616 is out of range"),
        ({"device": "tpu"}, SettingsError, "'tpu' is not a device"),
        ({"runner": "tensorrt"}, EngineError, "runner tensorrt cannot be used"),
        ({"precision": "fp16"}, EngineError, "no runner can be used in precision fp16 here"),
        ({"bundle": "/nowhere"}, BundleError, "no bundle '/nowhere'"),
    ],
)
def test_settings_that_cannot_be_used_stop_before_any_work(run, tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        run(**settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("enhance", [True, False])
def test_both_stages_stay_in_range(toy, enhance):
    """What comes out is in [-1, 1], whatever the enhancer returns."""
    toy.after = lambda _, out: out.mul_(5)
    cxr = np.linspace(-1, 1, 2 * 64 * 64, dtype=np.float32).reshape(2, 1, 64, 64)
    noise = [ImageNoise(0, bytes([number])) for number in range(2)]
    table = sampler_table(Schedule(objective="x0"), "ddim", 3)
    result = batching.suppress(toy, cxr, table, noise, enhance=enhance)
    assert (result.shape, result.dtype) == (cxr.shape, np.float32)
    assert np.abs(result).max() == 1 if enhance else 0.5 < np.abs(result).max() <= 1
    assert toy.enhanced == enhance


# --- preview ---


def test_preview(run, toy, tmp_path):
    for seed in range(3):
        png(tmp_path / "in" / f"{seed}.png", seed=seed)
    (tmp_path / "in" / "bad.png").write_bytes(b"text")
    run(preview=True)
    assert tree(tmp_path / "out") == {"0.png", "1.png", "2.png", "preview.png", "report.json"}
    picture = pixels(tmp_path / "out" / "preview.png")
    assert picture.shape[0] == preview.TITLE_PX + 3 * (preview.NAME_PX + preview.SIDE_PX)
    assert fates(tmp_path / "out") == {"0.png": "ok", "1.png": "ok", "2.png": "ok", "bad.png": "refused"}


def test_no_preview_unless_asked(run, toy, tmp_path):
    png(tmp_path / "in" / "a.png")
    run()
    assert tree(tmp_path / "out") == {"a.png", "report.json"}
    (tmp_path / "empty").mkdir()
    run(tmp_path / "empty", output=tmp_path / "none", preview=True)
    assert tree(tmp_path / "none") == {"report.json"}


def test_the_preview_shows_finished_files_too(run, toy, tmp_path):
    """A run that is resumed, or that only adds the preview, shows every image of the run, in its order."""
    for seed, bits in ((0, 8), (1, 12), (2, 16)):
        png(tmp_path / "in" / f"{seed}.png", bits, seed=seed)
    dicom(tmp_path / "in" / "3.dcm", seed=3)
    run(preview=True)
    expected = (tmp_path / "out" / "preview.png").read_bytes()
    (tmp_path / "out" / "preview.png").unlink()
    assert set(statuses(run(preview=True)).values()) == {"skipped"}
    assert (tmp_path / "out" / "preview.png").read_bytes() == expected
    (tmp_path / "out" / "0.png").unlink()
    run(preview=True)
    assert (tmp_path / "out" / "preview.png").read_bytes() == expected


def test_the_preview_shows_pictures_on_one_scale(run, toy, monkeypatch, tmp_path):
    """A 12-bit result that stays below 2048 looks like 11 bits to a reader who does not know its source."""
    dark = np.rint(chest(80, 72) * 0.4 * 4095).astype(np.uint16)
    dark[0, :8] = 2300  # more than stray pixels
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in" / "a.png"), dark)
    monkeypatch.setattr(toy, "denoise", lambda _, cxr, __, out: torch.clamp(cxr, max=-0.2, out=out))  # those pixels go
    run(preview=True, enhance=False, raw_view=True)  # they look like a mark
    picture = pixels(tmp_path / "out" / "preview.png")[preview.TITLE_PX + preview.NAME_PX :] / 255
    cxr, soft_tissue = picture[:, :320], picture[:, 324:644]
    assert pixels(tmp_path / "out" / "a.png").max() < 2048
    assert soft_tissue[:, 32:288].mean() == pytest.approx(cxr[:, 32:288].mean(), abs=0.01)


def test_a_preview_that_cannot_be_written_is_said(run, toy, monkeypatch, tmp_path, caplog):
    png(tmp_path / "in" / "a.png")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.Preview, "write", full)
    assert statuses(run(preview=True)) == {"a.png": "ok"}
    assert "preview.png cannot be written (No space left on device). The results are complete." in caplog.text


def test_a_result_is_not_replaced_by_the_preview(run, toy, tmp_path):
    png(tmp_path / "in" / "preview.png")
    assert run(preview=True)["preview.png"].status == "refused"
    assert run()["preview.png"].status == "ok"


# --- resuming ---


@pytest.fixture
def finished(run, toy, tmp_path):
    """A folder of three, done; counts calls from here."""
    for name in ("a", "b", "c"):
        png(tmp_path / "in" / f"{name}.png", seed=ord(name))
    run()
    toy.enhanced = 0
    return tmp_path / "out"


SKIPPED = {"a.png": "skipped", "b.png": "skipped", "c.png": "skipped"}


def test_a_second_run_skips(run, toy, finished):
    before = {path.name: path.stat().st_mtime_ns for path in finished.glob("*.png")}
    first = report_of(finished)
    assert statuses(run()) == SKIPPED
    assert toy.enhanced == 0
    assert {path.name: path.stat().st_mtime_ns for path in finished.glob("*.png")} == before
    again = report_of(finished)
    assert fates(finished) == SKIPPED
    for old, new in zip(first["files"], again["files"], strict=True):
        assert new == old | {"status": "skipped"}
        assert new["seconds"] > 0
    for key in ("images_per_second", "model_busy"):  # a run that skips everything has no rate of its own
        assert again[key] == first[key] > 0
    assert first["started"] <= first["ended"] <= again["started"] <= again["ended"]
    assert statuses(run()) == SKIPPED  # skipped counts as finished


def test_a_changed_input_is_done_again(run, finished, tmp_path):
    png(tmp_path / "in" / "b.png", seed=99)
    before = (finished / "b.png").read_bytes()
    assert statuses(run()) == SKIPPED | {"b.png": "ok"}
    assert (finished / "b.png").read_bytes() != before


def test_a_new_input_is_done(run, finished, tmp_path):
    png(tmp_path / "in" / "sub" / "d.png", seed=99)
    assert statuses(run()) == SKIPPED | {"d.png": "ok"}


def test_an_input_that_moved_is_known(run, finished, tmp_path):
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    entries = run(tmp_path / "elsewhere")
    assert statuses(entries) == SKIPPED
    assert entries["a.png"].input == str(tmp_path / "elsewhere" / "a.png")
    assert fates(finished) == SKIPPED


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 1},
        {"steps": 4},
        {"sampler": "dpmpp-2m", "steps": 3},
        {"enhance": False},
        {"detail": "model"},
        {"overwrite": True},
    ],
    ids=str,
)
def test_a_changed_setting_does_everything_again(run, finished, settings):
    assert statuses(run(**settings)) == dict.fromkeys(SKIPPED, "ok")


@pytest.mark.parametrize("settings", [{"batch": 3}, {"device": "cpu"}, {"precision": "fp32"}, {"steps": 3}], ids=str)
def test_a_setting_that_decides_no_pixel_does_nothing_again(run, finished, settings):
    assert statuses(run(**settings)) == SKIPPED


def test_another_runner_does_everything_again(run, finished, toy):
    toy.name = "another"
    assert statuses(run()) == dict.fromkeys(SKIPPED, "ok")


def test_another_bundle_does_everything_again(run, finished, bundle_copy):
    content = json.loads((bundle_copy / MANIFEST).read_text())
    (bundle_copy / MANIFEST).write_text(to_signed_json(content | {"name": "other"}))
    assert statuses(run(bundle=str(bundle_copy))) == dict.fromkeys(SKIPPED, "ok")


def test_a_deleted_or_changed_output_is_done_again(run, finished):
    whole = (finished / "b.png").read_bytes()
    (finished / "a.png").unlink()
    (finished / "b.png").write_bytes(whole + b"\0")
    assert statuses(run()) == {"a.png": "ok", "b.png": "ok", "c.png": "skipped"}
    assert (finished / "b.png").read_bytes() == whole


def test_a_killed_runs_results_are_done_again_and_nobody_elses(run, toy, tmp_path, monkeypatch):
    """Its report names what it was to write; two of them lie there, one is whole. An original of another name stays."""
    for name in ("a.png", "b.png", "mine.png"):
        png(tmp_path / "in" / name)
    png(tmp_path / "out" / "mine.png", seed=7)
    original = (tmp_path / "out" / "mine.png").read_bytes()
    with monkeypatch.context() as killed:
        killed.setattr(ledger.Ledger, "save", lambda *_, **__: None)  # as if it never came to that
        killed.setattr(ledger.Ledger, "begin", ledger.Ledger._save)
        run()
    assert report_of(tmp_path / "out")["files"] == []
    assert report_of(tmp_path / "out")["planned"] == ["a.png", "b.png"]
    (tmp_path / "out" / "b.png").write_bytes(b"half")
    entries = run()
    assert statuses(entries) == {"a.png": "ok", "b.png": "ok", "mine.png": "refused"}
    assert "which this program did not write" in entries["mine.png"].reason
    assert (tmp_path / "out" / "mine.png").read_bytes() == original
    assert report_of(tmp_path / "out")["planned"] == []
    assert statuses(run(overwrite=True)) == {"a.png": "ok", "b.png": "ok", "mine.png": "refused"}
    assert (tmp_path / "out" / "mine.png").read_bytes() == original


def test_a_damaged_report_is_not_replaced(run, finished):
    """Whose the files beside it are is not known."""
    before = (finished / "a.png").read_bytes()
    (finished / "report.json").write_bytes(b"{")
    for overwrite in (False, True):
        with pytest.raises(SettingsError, match=r"report\.json: not a report of bsdiff-rt, or damaged"):
            run(overwrite=overwrite)
    assert ((finished / "report.json").read_bytes(), (finished / "a.png").read_bytes()) == (b"{", before)
    (finished / "report.json").unlink()
    assert statuses(run(overwrite=True)) == dict.fromkeys(SKIPPED, "refused")  # no report names them
    assert (finished / "a.png").read_bytes() == before


def test_a_new_version_does_nothing_again(run, finished):
    text = (finished / "report.json").read_text()
    (finished / "report.json").write_text(text.replace('"bsdiff_rt": "', '"bsdiff_rt": "9.'))
    assert statuses(run()) == SKIPPED


def test_another_folder_into_the_same_output_forgets_nothing(run, finished, tmp_path):
    png(tmp_path / "more" / "d.png", seed=9)
    assert statuses(run(tmp_path / "more")) == {"d.png": "ok"}
    assert statuses(run()) == SKIPPED
    assert fates(finished) == SKIPPED | {"d.png": "skipped"}


def test_another_folder_with_other_settings_into_the_same_output_leaves_results_results(run, finished, tmp_path):
    png(tmp_path / "more" / "d.png", seed=9)
    assert statuses(run(tmp_path / "more", seed=5)) == {"d.png": "ok"}
    found = find_tasks([tmp_path], tmp_path / "elsewhere", "auto")
    assert {task.input.parent.name for task in found} == {"in", "more"}
    assert len(found) == len(SKIPPED) + 1


def test_an_input_that_fails_now_is_not_also_skipped(run, finished, tmp_path):
    path = tmp_path / "in" / "b.png"
    path.write_bytes(path.read_bytes()[:-30])
    assert statuses(run()) == SKIPPED | {"b.png": "failed"}
    assert fates(finished) == SKIPPED | {"b.png": "failed"}


@pytest.mark.parametrize("settings", [{}, {"seed": 5}])
def test_no_older_result_stays_for_an_input_that_gives_none(run, finished, tmp_path, settings):
    """Another patient's file may have taken the input's name."""
    out, kept = tmp_path / "out", sorted(SKIPPED)
    path = tmp_path / "in" / "b.png"
    path.write_bytes(path.read_bytes()[:-30])
    assert run(**settings)["b.png"].status == "failed"
    assert sorted(each.name for each in out.glob("*.png")) == [name for name in kept if name != "b.png"]


@pytest.mark.parametrize("settings", [{}, {"seed": 5}])
def test_another_folders_file_of_the_same_name_replaces_no_result(run, finished, tmp_path, settings):
    """The next patient's study, into the same output folder."""
    png(tmp_path / "next" / "b.png", seed=99)
    before = (finished / "b.png").read_bytes()
    assert run(tmp_path / "next", **settings)["b.png"].status == "refused"
    assert (finished / "b.png").read_bytes() == before
    assert report_of(finished)["files"][0]["reason"].endswith("Choose another output folder, or allow overwriting.")
    assert statuses(run(**settings)) == (dict.fromkeys(SKIPPED, "ok") if settings else SKIPPED)
    assert statuses(run(tmp_path / "next", overwrite=True, **settings)) == {"b.png": "ok"}
    assert (finished / "b.png").read_bytes() != before


def test_a_network_that_fails_destroys_no_result_of_other_settings(run, toy, finished):
    def broken(_):
        raise RuntimeError("no more memory")

    before = {path.name: path.read_bytes() for path in finished.glob("*.png")}
    toy.before = broken
    assert statuses(run(seed=5)) == dict.fromkeys(SKIPPED, "failed")
    assert {path.name: path.read_bytes() for path in finished.glob("*.png")} == before


def test_two_runs_into_one_folder(run, toy, finished, tmp_path):
    with only_run(finished), pytest.raises(SettingsError, match="another run is writing into it"):
        run()
    assert statuses(run()) == SKIPPED


def test_a_file_that_no_run_wrote_stays(run, finished, tmp_path):
    (tmp_path / "out" / "b.png").write_bytes(b"mine")
    path = tmp_path / "in" / "b.png"
    path.write_bytes(path.read_bytes()[:-30])
    assert run()["b.png"].status == "failed"
    assert (tmp_path / "out" / "b.png").read_bytes() == b"mine"


# --- interruptions ---


class Stop(BaseException):
    """As Ctrl-C: not an error of a file."""


def stop_at(number):
    def before(call):
        if call == number:
            raise Stop

    return before


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_interruption_keeps_what_is_done_and_resumes(run, toy, tmp_path, batch, call):
    for seed in range(8):
        png(tmp_path / "in" / f"{seed}.png", seed=seed)
    toy.before = stop_at(call)
    with pytest.raises(Stop):
        run(batch=batch)
    done = (call - 1) * batch
    assert toy.closed
    assert fates(tmp_path / "out") == {f"{seed}.png": "ok" for seed in range(done)}
    assert tree(tmp_path / "out") == {"report.json", *(f"{seed}.png" for seed in range(done))}
    for entry in report_of(tmp_path / "out")["files"]:
        assert read_raster(tmp_path / "out" / entry["output"]).cxr.shape == SHAPE
        assert entry["sha256"] == file_sha256(tmp_path / "out" / entry["output"])
    toy.before = stop_at(toy.enhanced + 2)  # once more: what the first run did must not be forgotten
    with pytest.raises(Stop):
        run(batch=batch)
    known = fates(tmp_path / "out")
    assert len(known) == done + batch
    toy.before = lambda _: None
    entries = run(batch=batch)
    assert [entry.status for entry in entries.values()] == ["skipped"] * len(known) + ["ok"] * (8 - len(known))


def test_an_interruption_before_anything_is_done_keeps_the_earlier_report(run, toy, finished, tmp_path):
    (finished / "a.png").unlink()
    toy.before = stop_at(1)
    with pytest.raises(Stop):
        run()
    toy.before = lambda _: None
    assert statuses(run()) == SKIPPED | {"a.png": "ok"}


def test_an_interruption_while_the_last_files_are_written(run, toy, tmp_path, monkeypatch):
    """The networks are done and the main thread waits for the writers: the likeliest moment on a fast device."""
    for seed in range(3):
        png(tmp_path / "in" / f"{seed}.png", seed=seed)
    real_write, real_result = raster.write_png, Future.result
    networks_done = threading.Event()
    toy.after = lambda call, _: networks_done.set() if call == 3 else None

    def slow_write(*arguments):
        networks_done.wait(10)
        time.sleep(0.05)
        real_write(*arguments)

    def interrupted_result(future, *arguments):
        if networks_done.is_set() and threading.current_thread() is threading.main_thread():
            raise Stop
        return real_result(future, *arguments)

    monkeypatch.setattr(raster, "write_png", slow_write)
    monkeypatch.setattr(Future, "result", interrupted_result)
    with pytest.raises(Stop):
        run(batch=1)
    assert fates(tmp_path / "out") == dict.fromkeys(("0.png", "1.png", "2.png"), "ok")


def test_an_interruption_right_after_a_result_was_handed_over(run, toy, tmp_path, monkeypatch):
    """The writer has it, the main thread does not know yet: a file must not lie there without its entry."""
    for seed in range(3):
        png(tmp_path / "in" / f"{seed}.png", seed=seed)
    handed_over = []

    class Interrupted(ThreadPoolExecutor):
        def submit(self, work, /, *arguments):
            future = super().submit(work, *arguments)
            handed_over.extend([work] if getattr(work, "__name__", "") == "_finish" else [])
            if len(handed_over) == 2:
                raise Stop
            return future

    monkeypatch.setattr(worker, "ThreadPoolExecutor", Interrupted)
    with pytest.raises(Stop):
        run(batch=1)
    assert fates(tmp_path / "out") == {"0.png": "ok", "1.png": "ok"}
    assert tree(tmp_path / "out") == {"0.png", "1.png", "report.json"}


# --- networks and disks that fail ---


def spoil(how, index=0):
    """Changes image `index` of the second batch."""

    def after(call, out):
        if call == 2:
            out[index] = how(out[index])

    return after


SPOILT = {
    "nan": (lambda image: image * float("nan"), "the model returned NaN or infinity"),
    "one nan": (lambda image: image.index_fill(1, torch.tensor([5]), float("nan")), "the model returned NaN"),
    "one infinity": (lambda image: image.index_fill(1, torch.tensor([5]), float("inf")), "the model returned NaN"),
    "constant": (lambda image: torch.zeros_like(image), "the model returned one grey level"),
    "black": (lambda image: torch.full_like(image, -9.0), "the model returned one grey level"),
    "nearly constant": (lambda image: image * 1e-5, "the model returned one grey level"),
}


@pytest.mark.parametrize("kind", SPOILT)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_result_that_is_no_image_is_not_written(run, toy, tmp_path, kind, batch):
    for seed in range(5):
        png(tmp_path / "in" / f"{seed}.png", seed=seed)
    how, reason = SPOILT[kind]
    toy.after = spoil(how)
    entries = run(batch=batch)
    spoilt = f"{batch}.png"  # the first image of the second batch
    assert statuses(entries) == dict.fromkeys((f"{seed}.png" for seed in range(5)), "ok") | {spoilt: "failed"}
    assert entries[spoilt].reason.startswith(reason)
    assert entries[spoilt].output is None
    assert tree(tmp_path / "out") == {"report.json", *(f"{seed}.png" for seed in range(5))} - {spoilt}
    toy.after = lambda *_: None
    assert statuses(run(batch=batch)) == dict.fromkeys(entries, "skipped") | {spoilt: "ok"}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("no kernel:\n  for this device"), "RuntimeError: no kernel: for this device"),
        (RuntimeError("CUDA error: an illegal memory access"), "RuntimeError: CUDA error: an illegal memory access"),
    ],
)
def test_a_batch_that_fails_fails_its_files_and_the_run_goes_on(run, toy, tmp_path, error, reason):
    for seed in range(5):
        png(tmp_path / "in" / f"{seed}.png", seed=seed)

    def before(call):
        if call == 2:
            raise error

    toy.before = before
    entries = run(batch=2)
    assert statuses(entries) == {"0.png": "ok", "1.png": "ok", "2.png": "failed", "3.png": "failed", "4.png": "ok"}
    for name in ("2.png", "3.png"):
        assert entries[name].reason.startswith(f"the model failed ({reason}")
        assert "\n" not in entries[name].reason
    assert tree(tmp_path / "out") == {"report.json", "0.png", "1.png", "4.png"}
    assert fates(tmp_path / "out") == statuses(entries)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("Failed to allocate memory for node")],
)
def test_without_the_memory_for_a_batch_the_folder_is_finished_in_smaller_ones(run, toy, tmp_path, error, caplog):
    for seed in range(9):
        png(tmp_path / "in" / f"{seed}.png", seed=seed)

    def before(_):
        if toy.batches[-1] > 2:
            raise error

    toy.before = before
    assert set(statuses(run(batch=8)).values()) == {"ok"}
    assert toy.batches == [8, 4, 2, 2, 2, 2, 1]  # the first eight files in parts, then batches of two
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [message for message in told if not message.endswith(BRIGHTER)] == [  # the toy's air is grey
        "out of memory with 8 images at once; going on with 4",
        "out of memory with 4 images at once; going on with 2",
    ]
    for seed in (0, 5, 8):
        expected = pixels(tmp_path / "out" / f"{seed}.png")
        run(batch=1, overwrite=True)
        assert np.array_equal(pixels(tmp_path / "out" / f"{seed}.png"), expected)


def test_without_the_memory_for_one_image_it_fails(run, toy, tmp_path):
    png(tmp_path / "in" / "a.png")
    toy.before = lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    (entry,) = run(batch=4).values()
    assert entry.status == "failed"
    assert entry.reason == "the model failed (OutOfMemoryError: CUDA out of memory); nothing was written"


def test_the_report_names_the_runner_that_loaded(run, tmp_path, monkeypatch):
    png(tmp_path / "in" / "a.png")
    load_runner = choice.load_runner

    def loading(bundle, name, device, precision):
        if name == "onnxruntime":
            raise EngineError("not a graph")
        return load_runner(bundle, name, device, precision)

    monkeypatch.setattr(choice, "load_runner", loading)
    assert statuses(run(steps=1)) == {"a.png": "ok"}
    assert report_of(tmp_path / "out")["settings"]["runner"] == "eager"
    assert statuses(run(steps=1)) == {"a.png": "skipped"}  # what is finished is told by the runner that loads
    monkeypatch.undo()
    assert statuses(run(steps=1)) == {"a.png": "ok"}


def test_a_batch_larger_than_the_engine_is_refused(run, toy, tmp_path):
    png(tmp_path / "in" / "a.png")
    toy.batch_range = (2, 4)
    with pytest.raises(SettingsError, match=r"5 is more than the toy runner's 4\. Use 4, or build"):
        run(batch=5)


def test_an_engine_of_one_batch_size_is_filled_up(run, toy, tmp_path):
    for seed in range(3):
        png(tmp_path / "in" / f"{seed}.png", seed=seed)
    run(batch=1)
    expected = {seed: pixels(tmp_path / "out" / f"{seed}.png") for seed in range(3)}
    toy.batch_range, toy.batches = (2, 2), []
    assert set(statuses(run(overwrite=True)).values()) == {"ok"}  # auto: two at a time
    assert toy.batches == [2, 2]
    for seed in range(3):
        assert np.array_equal(pixels(tmp_path / "out" / f"{seed}.png"), expected[seed])


def test_a_device_that_fails_after_the_order_was_given_fails_the_file(run, toy, tmp_path, monkeypatch):
    png(tmp_path / "in" / "a.png")

    def failed(_):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(batching._Clock, "wait", failed)
    (entry,) = run().values()
    assert entry.reason.startswith("the model failed (RuntimeError: CUDA error: unspecified launch failure)")


# --- several samples ---


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_samples_are_averaged_and_their_deviation_is_written(run, toy, tmp_path, batch):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for seed in range(2):  # at the model's matrix: enlarging would smooth the noise
        picture = np.rint(chest(64, 58, seed) * 65535).astype(np.uint16)
        cv2.imwrite(str(tmp_path / "in" / "sub" / f"{seed}.png"), picture)
    single = []
    for number in range(3):  # sample k is what seed + k gives
        run(seed=7 + number, overwrite=True, batch=1)
        single.append([pixels(tmp_path / "out" / "sub" / f"{seed}.png").astype(float) for seed in range(2)])
    entries = run(seed=7, samples=3, batch=batch, preview=True, overwrite=True)
    assert set(statuses(entries).values()) == {"ok"}
    assert report_of(tmp_path / "out")["settings"]["samples"] == 3
    for seed in range(2):
        stack = np.stack([sample[seed] for sample in single])
        # Each of the three files was rounded, and so is the mean.
        assert np.abs(pixels(tmp_path / "out" / "sub" / f"{seed}.png") - stack.mean(0)).max() <= 1
        deviation = pixels(tmp_path / "out" / "uncertainty" / "sub" / f"{seed}.png").astype(float)
        assert np.abs(deviation - stack.std(0)).max() <= 1
        assert deviation.mean() > 100
    preview_picture = cv2.imread(str(tmp_path / "out" / "preview.png"))
    assert preview_picture.shape[1] == 4 * preview.SIDE_PX + 3 * preview.GAP_PX
    again = run(seed=7, samples=3, preview=True)
    assert [entry.status for entry in again.values()] == ["skipped"] * 2


def test_a_derived_image_says_what_it_is_the_mean_of(run, toy, tmp_path):
    dicom(tmp_path / "in" / "a.dcm", 12)
    run(seed=7, samples=3)
    said = dcmread(tmp_path / "out" / "a.dcm").DerivationDescription
    assert "ddim, 3 steps, mean of 3 samples, seeds 7 to 9, stage 2 on" in said


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_the_mirrored_result_is_averaged_in(run, toy, tmp_path, monkeypatch, batch):
    """With a network that leans: it adds something to the left half, whatever is shown there."""

    def lean(x_t, cxr, _, out):
        torch.add(0.7 * cxr, torch.tanh(x_t), alpha=0.1, out=out)
        out[..., : out.shape[-1] // 2] += 0.1

    monkeypatch.setattr(toy, "denoise", lean)
    for seed in range(2):
        (tmp_path / "in").mkdir(exist_ok=True)
        picture = np.rint(chest(64, 64, seed) * 65535).astype(np.uint16)
        cv2.imwrite(str(tmp_path / "in" / f"{seed}.png"), picture)
    settings = {"sampler": "ddim", "steps": 1, "samples": 2, "enhance": False, "overwrite": True, "batch": batch}
    results = []
    for mirror in (None, True):
        run(**settings, mirror=mirror)
        assert report_of(tmp_path / "out")["settings"]["mirror"] is bool(mirror)  # the bundle's default is without
        results.append([pixels(tmp_path / "out" / f"{seed}.png").astype(float) for seed in range(2)])
        # Still a deviation between two seeds, not between an image and its mirror image.
        deviation = [pixels(tmp_path / "out" / "uncertainty" / f"{seed}.png") for seed in range(2)]
        assert all(0.01 < plane.mean() / 65535 < 0.04 for plane in deviation)
    for alone, both in zip(*results, strict=True):
        left, right = np.split(both - alone, 2, axis=1)
        share = 0.1 / 2 / 2 * 65535  # in [0, 1] and on both halves: half of what leans; the noise averages out
        assert left.mean() == pytest.approx(-share, rel=0.1)
        assert right.mean() == pytest.approx(share, rel=0.1)


def test_a_derived_object_says_that_mirror_images_are_in_it(run, toy, tmp_path):
    dicom(tmp_path / "in" / "a.dcm")
    run(mirror=True)
    described = dcmread(tmp_path / "out" / "a.dcm").DerivationDescription
    assert "averaged with the mirrored image, model input" in described


def test_a_lost_deviation_map_is_made_again(run, toy, tmp_path):
    png(tmp_path / "in" / "a.png")
    run(samples=2)
    (tmp_path / "out" / "uncertainty" / "a.png").unlink()
    assert statuses(run(samples=2)) == {"a.png": "ok"}
    assert (tmp_path / "out" / "uncertainty" / "a.png").is_file()


def test_a_deviation_map_that_is_not_what_was_written_is_made_again(run, toy, tmp_path):
    png(tmp_path / "in" / "a.png")
    entry = run(samples=2)["a.png"]
    written = tmp_path / "out" / "uncertainty" / "a.png"
    assert entry.maps["uncertainty"] == file_sha256(written)
    assert statuses(run(samples=2)) == {"a.png": "skipped"}
    png(written, seed=3)
    assert statuses(run(samples=2)) == {"a.png": "ok"}
    assert file_sha256(written) == entry.maps["uncertainty"]


@pytest.fixture
def read_aheads(monkeypatch):
    """How many files each run reads ahead, and with how many threads."""
    asked = []
    real = reading.Reader.read_ahead

    def read_ahead(self, tasks, depth, threads):
        asked.append((depth, threads))
        return real(self, tasks, depth, threads)

    monkeypatch.setattr(reading.Reader, "read_ahead", read_ahead)
    return asked


@pytest.mark.parametrize(("batch", "samples", "ahead"), [(1, 1, 2), (8, 1, 16), (8, 4, 4), (4, 16, 2)])
def test_files_held_ahead_are_two_batches_of_passes(run, toy, tmp_path, read_aheads, batch, samples, ahead):
    png(tmp_path / "in" / "a.png")
    run(batch=batch, samples=samples, mirror=False)
    assert [depth for depth, _ in read_aheads] == [ahead]


@pytest.mark.parametrize(("processors", "threads"), [(1, 2), (2, 2), (7, 7), (64, 16)])
def test_as_many_threads_read_as_there_are_processors(
    run, toy, tmp_path, monkeypatch, read_aheads, processors, threads
):
    monkeypatch.setattr("bsdiff_rt.folder.worker.count_threads", lambda: processors)
    png(tmp_path / "in" / "a.png")
    run()
    assert [count for _, count in read_aheads] == [threads]


def test_a_files_seconds_are_not_those_it_waited_for_others(run, toy, tmp_path, monkeypatch):
    """Six files of one batch, 0.4 s each to write, by two writers: the last waits for two others, 1.2 s in all."""
    for seed in range(6):
        png(tmp_path / "in" / f"{seed}.png", seed=seed)
    real = raster.write_png

    def slowly(*arguments):
        time.sleep(0.4)
        real(*arguments)

    monkeypatch.setattr(raster, "write_png", slowly)
    seconds = [entry.seconds for entry in run(batch=6).values()]
    assert min(seconds) > 0.4
    assert max(seconds) < 0.8


def test_no_deviation_map_of_another_picture_stays(run, toy, tmp_path):
    png(tmp_path / "in" / "a.png")
    png(tmp_path / "in" / "b.png", seed=1)
    run(samples=2)
    run(tmp_path / "in" / "a.png", samples=1)
    maps = {"uncertainty/a.png.stale", "uncertainty/b.png"}
    assert tree(tmp_path / "out") == {"a.png", "b.png", "report.json", *maps}


def test_a_result_in_the_place_of_a_deviation_map_stays(run, toy, tmp_path):
    png(tmp_path / "in" / "a.png")
    run(samples=2)
    png(tmp_path / "in" / "uncertainty" / "a.png", seed=1)
    assert set(statuses(run(samples=1)).values()) == {"ok"}
    assert tree(tmp_path / "out") == {"a.png", "report.json", "uncertainty/a.png"}


def test_one_bad_sample_fails_its_file(run, toy, tmp_path):
    png(tmp_path / "in" / "a.png")
    toy.after = lambda call, out: out.fill_(float("nan")) if call == 2 else None
    (entry,) = run(samples=3, batch=1).values()
    assert entry.reason.startswith("the model returned NaN")
    assert tree(tmp_path / "out") == {"report.json"}


def test_the_deviations_folder_is_nobody_elses(run, toy, tmp_path):
    png(tmp_path / "in" / "uncertainty" / "b.png")
    png(tmp_path / "in" / "a.png", seed=1)
    entries = run(samples=2)
    assert statuses(entries) == {"a.png": "ok", "b.png": "refused"}
    assert entries["b.png"].reason == "its result uncertainty/b.png would replace a file of the run itself. Rename it."
    assert tree(tmp_path / "out") == {"report.json", "a.png", "uncertainty/a.png"}


def test_the_last_sample_needs_a_seed_too(run, toy, tmp_path):
    png(tmp_path / "in" / "a.png")
    with pytest.raises(SettingsError, match="out of range"):
        run(seed=2**64 - 2, samples=3)


# --- the run itself ---


@pytest.mark.parametrize("error", [EngineError("batch of 2 given to the toy runner"), TypeError("a bug")])
def test_what_is_wrong_with_the_run_ends_it(run, toy, tmp_path, error):
    """A runner that does not fit, or a bug: every further batch would fail in the same way."""
    for seed in range(3):
        png(tmp_path / "in" / f"{seed}.png", seed=seed)

    def before(call):
        if call == 2:
            raise error

    toy.before = before
    with pytest.raises(type(error)):
        run(batch=1)
    assert fates(tmp_path / "out") == {"0.png": "ok"}
    assert toy.closed


def test_a_file_that_cannot_be_written(run, toy, tmp_path):
    """out/b.png is a folder; out/sub is a file."""
    for name in ("a.png", "b.png", "sub/c.png"):
        png(tmp_path / "in" / name)
    (tmp_path / "out" / "b.png").mkdir(parents=True)
    (tmp_path / "out" / "sub").write_text("")
    entries = run(overwrite=True)
    assert statuses(entries) == {"a.png": "ok", "b.png": "failed", "c.png": "failed"}
    assert entries["b.png"].reason.startswith("cannot be written: ")
    assert entries["c.png"].reason.startswith("cannot be written: ")
    assert tree(tmp_path / "out") == {"a.png", "sub", "report.json"}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "cannot be written: No space left on device"),
        (OSError("something"), "cannot be written: OSError"),
        (MemoryError(), "too large for this machine's memory"),
        (ValueError("SECRET"), "a bug (ValueError in raster.py, line "),
    ],
)
def test_a_write_that_fails(run, toy, tmp_path, monkeypatch, error, reason):
    png(tmp_path / "in" / "a.png")
    png(tmp_path / "in" / "b.png")
    real = raster.write_png

    def write(path, *arguments):
        if path.name == "a.png":
            raise error
        real(path, *arguments)

    monkeypatch.setattr(raster, "write_png", write)
    entries = run()
    assert statuses(entries) == {"a.png": "failed", "b.png": "ok"}
    assert entries["a.png"].reason.startswith(reason)
    assert "SECRET" not in entries["a.png"].reason


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(13, "Permission denied"), "cannot be read: Permission denied"),
        (OSError("something"), "cannot be read: OSError"),
        (MemoryError(), "too large for this machine's memory"),
        (ValueError("SECRET"), "a bug (ValueError in reading.py, line "),
    ],
)
def test_a_file_that_cannot_be_read(run, toy, tmp_path, monkeypatch, error, reason):
    png(tmp_path / "in" / "a.png")
    png(tmp_path / "in" / "b.png")
    real = reading.file_sha256

    def read(path):  # permissions do not stop root, who may run this test
        if path == tmp_path / "in" / "a.png":
            raise error
        return real(path)

    monkeypatch.setattr(reading, "file_sha256", read)
    entries = run()
    assert statuses(entries) == {"a.png": "failed", "b.png": "ok"}
    assert entries["a.png"].reason.startswith(reason)
    assert "SECRET" not in entries["a.png"].reason


@pytest.mark.parametrize("shape", [(33, 20000), (20000, 33), (32, 70000)])
@pytest.mark.parametrize("detail", ["model", "full"])
def test_very_long_pictures(run, toy, tmp_path, shape, detail):
    """Nobody's chest, but what a strip of a stitched image looks like; the run must end with a word on it."""
    png(tmp_path / "in" / "a.png", shape=shape)
    png(tmp_path / "in" / "b.png")
    entries = run(detail=detail, preview=True)
    assert entries["b.png"].status == "ok"
    if entries["a.png"].status == "ok":
        assert pixels(tmp_path / "out" / "a.png").shape == shape
    else:
        assert entries["a.png"].reason


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_folder_that_cannot_be(run, toy, tmp_path, place):
    png(tmp_path / "in" / "a.png")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SettingsError, match=f"^{tmp_path / place}: cannot be written .*Choose another folder"):
        run(output=tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"
    assert toy.enhanced == 0


def test_the_x_ray_is_never_replaced(run, toy, tmp_path):
    path = png(tmp_path / "in" / "a.png")
    before = path.read_bytes()
    assert run(path, output=tmp_path / "in")["a.png"].status == "refused"
    before_run = tree(tmp_path / "in")
    with pytest.raises(SettingsError, match="this is the output folder, too"):
        run(output=tmp_path / "in")
    assert tree(tmp_path / "in") == before_run
    assert path.read_bytes() == before


# --- the plan ---


def test_the_plan_is_what_a_run_does(run, toy, tiny_bundle, tmp_path):
    png(tmp_path / "in" / "a.png")
    png(tmp_path / "in" / "b.png")
    run()
    png(tmp_path / "in" / "b.png", seed=5)
    png(tmp_path / "in" / "c.jpg")
    png(tmp_path / "in" / "c.png")
    (tmp_path / "in" / "d.png").write_bytes(b"text")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    inference = Inference(InferSettings(output=tmp_path / "out", bundle=str(tiny_bundle)), toy)
    inputs = [tmp_path / "in"]
    tasks = inference.find_tasks(inputs)
    plan = sorted((entry.input, entry.status, entry.output, entry.reason) for entry in inference.plan(tasks))
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    done = run(*inputs)
    assert plan == sorted((entry.input, entry.status, entry.output, entry.reason) for entry in done.values())
    assert [status for _, status, _, _ in plan] == ["skipped", "ok", "ok", "refused", "refused"]


def test_nothing_to_do(run, toy, tmp_path):
    (tmp_path / "in").mkdir()
    assert run() == {}
    assert report_of(tmp_path / "out")["files"] == []


def test_what_is_said_along_the_way(run, toy, tmp_path, caplog):
    png(tmp_path / "in" / "a.png")
    with caplog.at_level(logging.INFO):
        run(preview=True)
    assert f"wrote {tmp_path / 'out' / 'preview.png'} with 1 of 1 images" in caplog.text


def test_the_networks_see_what_training_saw(run, toy, tiny_bundle, tmp_path):
    """The runner is handed the X-ray as `intensity.to_network` makes it, and noise of its own pixels."""
    path = png(tmp_path / "in" / "a.png")
    seen = []
    real = toy.denoise
    toy.denoise = lambda x_t, cxr, t, out: (seen.append((x_t.clone(), cxr.clone())), real(x_t, cxr, t, out))
    run(seed=5)
    radiograph = read_raster(path)
    expected, _ = to_network(radiograph.cxr, open_bundle(tiny_bundle).manifest.preprocessing)
    assert torch.equal(seen[0][1][0, 0], torch.from_numpy(expected))
    noise = ImageNoise(5, radiograph.pixel_digest).draw(0, (64, 64))
    assert torch.equal(seen[0][0][0, 0], torch.from_numpy(noise))


def test_a_copy_of_a_folder_gives_the_same_files(run, toy, tmp_path):
    """Neither the path nor the name of an input is in the noise."""
    png(tmp_path / "in" / "a.png")
    shutil.copytree(tmp_path / "in", tmp_path / "copy" / "sub")
    os.rename(tmp_path / "copy" / "sub" / "a.png", tmp_path / "copy" / "sub" / "b.png")
    run(output=tmp_path / "first")
    run(tmp_path / "copy", output=tmp_path / "second")
    assert (tmp_path / "first" / "a.png").read_bytes() == (tmp_path / "second" / "sub" / "b.png").read_bytes()


@pytest.mark.parametrize("detail", ["model", "full"])
def test_a_frame_stays_and_what_is_in_it_is_as_without_it(run, toy, tmp_path, bundle_copy, monkeypatch, detail):
    """And a faint picture comes out as faint: the networks see both as they see the picture alone."""
    manifest = json.loads((bundle_copy / MANIFEST).read_text())
    manifest["preprocessing"]["least_span"] = 0.3  # the picture's is 0.5
    (bundle_copy / MANIFEST).write_text(to_signed_json(manifest))
    monkeypatch.setattr(model, "ImageNoise", lambda seed, _: ImageNoise(seed, b"the same for all"))
    values = np.rint(chest(*SHAPE) * 65535)
    faint = np.rint(40000 + 0.25 * values)
    framed = np.pad(values, ((20, 30), (40, 0)), constant_values=65535)
    for name, picture in (("a", values), ("faint", faint), ("framed", framed)):
        (tmp_path / "in").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / "in" / f"{name}.png"), picture.astype(np.uint16))
    entries = run(detail=detail, bundle=str(bundle_copy), samples=2)
    results = {name: pixels(tmp_path / "out" / f"{name}.png").astype(float) for name in ("a", "faint", "framed")}
    around = np.ones(framed.shape, bool)
    around[20:-30, 40:] = False
    assert (results["framed"][around] == 65535).all()
    assert np.array_equal(results["framed"][20:-30, 40:], results["a"])
    deviation = pixels(tmp_path / "out" / "uncertainty" / "framed.png")
    assert not deviation[around].any()
    assert np.array_equal(deviation[20:-30, 40:], pixels(tmp_path / "out" / "uncertainty" / "a.png"))
    place = {"top": 20, "bottom": 20 + SHAPE[0], "left": 40, "right": 40 + SHAPE[1]}
    assert entries["framed.png"].view == place | {"gain": 1.0, "offset": 0.0, "mark_pixels": 0}
    assert entries["a.png"].view is None
    assert entries["faint.png"].view["gain"] == pytest.approx(SPREAD_TO / (0.25 * 0.5), rel=0.2)
    assert np.abs(results["faint"] - faint).max() < 0.25 * 65535  # neither clipped nor spread

    assert statuses(run(detail=detail, bundle=str(bundle_copy), raw_view=True))["framed.png"] == "ok"
    whole = pixels(tmp_path / "out" / "framed.png").astype(float)
    assert (whole[around] != 65535).any()


def test_a_derived_object_says_what_the_networks_were_shown(run, toy, tmp_path):
    values = np.pad(np.rint(chest(*SHAPE) * 4095), ((20, 30), (40, 0)), constant_values=4095).astype(np.int32)
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / "a.dcm", dataset(values, 12))
    run()
    described = dcmread(tmp_path / "out" / "a.dcm").DerivationDescription
    assert f"rows 21-{20 + SHAPE[0]} and columns 41-{40 + SHAPE[1]}, model input" in described
    run(raw_view=True)
    assert "rows" not in dcmread(tmp_path / "out" / "a.dcm").DerivationDescription


def test_one_result_has_one_uid_in_every_encoding_and_format_name(run, toy, tmp_path):
    """A node writes `dicom`, `infer` writes `auto`: an archive must not get the same result twice."""
    dicom(tmp_path / "in" / "a.dcm")
    uids = {}
    for kind in ("auto", "dicom", "dicom-j2k", "dicom-sc"):
        run(format=kind, overwrite=True)
        uids[kind] = dcmread(tmp_path / "out" / "a.dcm").SOPInstanceUID
    assert uids["auto"] == uids["dicom"] == uids["dicom-j2k"] != uids["dicom-sc"]


def test_a_negative_is_done_and_said(run, toy, tmp_path, caplog):
    (tmp_path / "in").mkdir()
    cxr = draw_phantom(0, 128).cxr
    for name, picture in (("plain", cxr), ("negative", 1 - cxr)):
        cv2.imwrite(str(tmp_path / "in" / f"{name}.png"), np.rint(picture * 255).astype(np.uint8))
    assert statuses(run()) == {"plain.png": "ok", "negative.png": "ok"}
    told = [record.getMessage() for record in caplog.records if "negative.png" in record.getMessage()]
    assert told == [f"{tmp_path / 'in' / 'negative.png'}: {warning}" for warning in (INVERTED, BRIGHTER)]


def test_a_probe_mixes_no_two_files_of_a_batch(run, toy, tmp_path):
    """Every file of a batch has its passes of the probe, too; a wrong count would average several patients."""
    for seed in range(4):
        png(tmp_path / "in" / f"{seed}.png", seed=seed)
    run(batch=40)
    expected = [pixels(tmp_path / "out" / f"{seed}.png") for seed in range(4)]
    entries = run(batch=40, probe=True, overwrite=True)
    assert set(statuses(entries).values()) == {"ok"}
    for seed in range(4):
        assert np.array_equal(pixels(tmp_path / "out" / f"{seed}.png"), expected[seed])


def test_a_probe_writes_its_picture_and_figures_and_is_made_up_for(run, toy, tmp_path):
    """A run with --probe does files again that were finished without it, and those whose picture was lost."""
    png(tmp_path / "in" / "sub" / "a.png", seed=1)
    run()
    assert tree(tmp_path / "out") == {"report.json", "sub/a.png"}
    picture = tmp_path / "out" / "retention" / "sub" / "a.png"
    (entry,) = run(probe=True).values()
    assert entry.status == "ok"
    assert entry.maps == {"retention": file_sha256(picture)}
    assert entry.retention is not None
    assert entry.retention["count"] > 0
    (again,) = run(probe=True).values()
    assert (again.status, again.retention) == ("skipped", entry.retention)
    picture.unlink()
    (again,) = run(probe=True).values()
    assert again.status == "ok"
    assert picture.is_file()
    assert statuses(run(overwrite=True)) == {"a.png": "ok"}
    assert tree(tmp_path / "out") == {"report.json", "sub/a.png", "retention/sub/a.png.stale"}
