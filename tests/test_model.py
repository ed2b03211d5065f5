"""The Python API makes the pictures that `infer`, benchmarks.quality and benchmarks.table1 make."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from helpers import SHAPE, dicom, png
from pydicom import dcmread
from synthetic import chest

import bsdiff_rt
from benchmarks import quality, table1
from bsdiff_rt import formats
from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.config import NO_ENHANCER, InferSettings, ModelSettings
from bsdiff_rt.errors import BundleError, EngineError, InputFailed, InputRefused, SettingsError
from bsdiff_rt.folder.pipeline import Inference
from bsdiff_rt.imaging.chest_guard import NO_CHEST
from bsdiff_rt.imaging.one_image import finish, prepare
from bsdiff_rt.imaging.result_guard import TOO_DIFFERENT
from bsdiff_rt.model import Model, list_decisive, make_table, resolve_settings
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.sampling.noise import ImageNoise


@pytest.fixture
def model(tiny_bundle):
    with bsdiff_rt.open_model(tiny_bundle, runner="eager") as opened:
        yield opened


def clean() -> np.ndarray:
    return np.rint(255 * chest(*SHAPE)).astype(np.uint8)


def lettered() -> np.ndarray:
    """In a white frame, with burned-in text."""
    picture = np.full((112, 96), 255, np.uint8)
    picture[8:-8, 8:-8] = 0.85 * np.rint(255 * chest(96, 80))
    cv2.putText(picture, "L", (14, 26), cv2.FONT_HERSHEY_SIMPLEX, 0.5, 255, 2)
    return picture


def faint() -> np.ndarray:
    return np.rint(255 * (0.4 + 0.25 * chest(*SHAPE))).astype(np.uint8)


def deep() -> np.ndarray:
    """16 bits, 12 of them used."""
    picture = np.rint(4095 * chest(150, 130)).astype(np.uint16)
    picture.ravel()[::200] = 4095  # single pixels: every depth's largest value occurs, and nothing looks like text
    return picture


@pytest.fixture
def written(monkeypatch):
    """What a folder run hands to the writer, by file name: before it is rounded to integers."""
    pictures: dict[str, np.ndarray] = {}
    real = formats.write

    def write(path, picture, **arguments):
        pictures[path.name] = picture
        real(path, picture, **arguments)

    monkeypatch.setattr(formats, "write", write)
    return pictures


@pytest.mark.parametrize("make", [clean, lettered, faint, deep])
def test_one_picture_in_four_ways(make, tiny_bundle, tmp_path, written):
    pixels = make()
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in" / "a_cxr.png"), pixels)
    cv2.imwrite(str(tmp_path / "in" / "a_soft_tissue.png"), pixels)
    settings = InferSettings(output=tmp_path / "out", bundle=str(tiny_bundle), runner="eager")
    run = Inference(settings)
    run.run(run.find_tasks([tmp_path / "in" / "a_cxr.png"]))
    expected = written["a_cxr.png"]

    with bsdiff_rt.open_model(tiny_bundle, runner="eager") as model:
        result = model.suppress(pixels)
        np.testing.assert_allclose(result.soft_tissue, expected, atol=1e-6)

        bundle = open_bundle(tiny_bundle)
        resolved = resolve_settings(ModelSettings(), bundle.manifest)
        runner, table = model._runner, make_table(resolved, bundle.manifest)
        mirror = bool(resolved.mirror)
        (pair,) = quality.load_pairs(tmp_path / "in")
        prepared = prepare(pair.cxr, bundle.manifest.preprocessing)
        assert (prepared.view.mark_pixels > 0) == (make is lettered)
        _, (passes, _) = quality.run_stages(runner, table, prepared, ImageNoise(0, pair.digest), mirror)
        judged = finish(prepared, passes, mirror=mirror).soft_tissue
        np.testing.assert_allclose(judged, expected, atol=1e-6)

        (case,) = table1.read_cases(tmp_path / "in", "test", bundle.manifest.preprocessing)
        compared = table1.make_bs_diff(runner, table, 0, mirror=mirror)(case)[table1.BOTH]
        np.testing.assert_allclose(compared.soft_tissue, expected, atol=1e-6)


def test_a_list_gives_the_results_of_its_arrays(model):
    pictures = [clean(), deep(), chest(*SHAPE)]
    together = model.suppress(pictures)
    for pixels, result in zip(pictures, together, strict=True):
        alone = model.suppress(pixels)
        np.testing.assert_allclose(result.soft_tissue, alone.soft_tissue, atol=1e-6)
        assert result.soft_tissue.shape == result.bone.shape == pixels.shape
        assert result.soft_tissue.dtype == result.bone.dtype == np.float32
    assert model.suppress([]) == []


def test_bone_is_what_was_taken_away(model):
    pixels = clean()
    result = model.suppress(pixels)
    np.testing.assert_allclose(result.bone, np.clip(pixels / 255 - result.soft_tissue, 0, 1), atol=1e-6)
    assert result.uncertainty is None


def test_batches_and_samples(tiny_bundle):
    with bsdiff_rt.open_model(tiny_bundle, runner="eager", batch=3, samples=2, mirror=True) as model:
        results = model.suppress([clean(), faint()])
    with bsdiff_rt.open_model(tiny_bundle, runner="eager", batch=1, samples=2, mirror=True) as model:
        expected = [model.suppress(pixels) for pixels in (clean(), faint())]
    for result, other in zip(results, expected, strict=True):
        assert result.uncertainty is not None
        np.testing.assert_allclose(result.soft_tissue, other.soft_tissue, atol=1e-5)  # sums in another order
        np.testing.assert_allclose(result.uncertainty, other.uncertainty, atol=1e-5)
        assert result.uncertainty.max() > 1e-4


@pytest.mark.parametrize("name", ["a.png", "a.dcm"])
def test_a_file_is_what_infer_writes(model, tiny_bundle, tmp_path, name):
    (png if name == "a.png" else dicom)(tmp_path / "in" / name, 12)
    run = Inference(InferSettings(output=tmp_path / "out", bundle=str(tiny_bundle), runner="eager"))
    run.run(run.find_tasks([tmp_path / "in"]))
    result = model.suppress_file(tmp_path / "in" / name, tmp_path / name)
    if name == "a.png":
        assert (tmp_path / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    else:
        ours, theirs = dcmread(tmp_path / name), dcmread(tmp_path / "out" / name)
        assert ours.SOPInstanceUID == theirs.SOPInstanceUID
        assert ours.DerivationDescription == theirs.DerivationDescription
        assert result.warnings  # the random weights of the tiny model make no chest
        assert ours.ImageComments == theirs.ImageComments
        assert all(warning in ours.ImageComments for warning in result.warnings)
        np.testing.assert_array_equal(ours.pixel_array, theirs.pixel_array)
    assert result.soft_tissue.shape == SHAPE


def test_a_file_that_is_refused_writes_nothing(model, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputRefused):
        model.suppress_file(tmp_path / "text.png", tmp_path / "out.png")
    png(tmp_path / "a.png")
    with pytest.raises(InputRefused, match="DICOM"):
        model.suppress_file(tmp_path / "a.png", tmp_path / "out.dcm", format="dicom")
    with pytest.raises(SettingsError, match="would replace the X-ray"):
        model.suppress_file(tmp_path / "a.png", tmp_path / "a.png")
    with pytest.raises(SettingsError, match=r"out\.dcm: the result would be a \.png file"):
        model.suppress_file(tmp_path / "a.png", tmp_path / "out.dcm")
    with pytest.raises(SettingsError, match=r"out\.png: the result would be a \.dcm file"):
        model.suppress_file(dicom(tmp_path / "a.dcm"), tmp_path / "out.png")
    with pytest.raises(FileNotFoundError) as missing:
        model.suppress_file(tmp_path / "a.png", tmp_path / "absent" / "out.png")
    assert missing.value.filename == str(tmp_path / "absent")
    with pytest.raises(InputFailed, match=r"none\.png: cannot be read"):
        model.suppress_file(tmp_path / "none.png", tmp_path / "out.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.dcm", "a.png", "text.png"]


def test_a_name_without_a_known_suffix_is_taken(model, tmp_path):
    model.suppress_file(dicom(tmp_path / "a.dcm"), tmp_path / "IM0001")
    assert dcmread(tmp_path / "IM0001").Modality == "CR"


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((64, 64, 3), np.uint8), r"\[H, W\]; this one has shape \(64, 64, 3\)"),
        (np.zeros((64, 64), np.int16), "uint8, uint16 or float, not int16"),
        (np.full((64, 64), 2.0), r"these lie in \[2, 2\]"),
        (np.full((64, 64), np.nan), "holds NaN or infinity"),
        (np.full((64, 64), np.inf), "holds NaN or infinity"),
        ("a.png", r"\[H, W\], not str. For a file, use suppress_file"),
        (None, "not NoneType"),
        ([clean(), "a.png"], "not str"),
        (np.zeros((8, 64), np.uint8), "at least 32 px"),
        (np.zeros((64, 64), np.uint8), "the image is empty"),
    ],
)
def test_an_array_that_is_no_x_ray_is_refused(model, pixels, message):
    with pytest.raises(InputRefused, match=message):
        model.suppress(pixels)


def test_what_numpy_can_read_is_an_array(model):
    """A tensor, for example, is one X-ray, not a list of rows."""
    found = model.suppress(torch.from_numpy(clean())).soft_tissue
    np.testing.assert_array_equal(found, model.suppress(clean()).soft_tissue)


def test_a_result_is_printed_in_a_line(model):
    assert "array" not in repr(model.suppress(clean()))


def test_a_closed_model_says_so(tiny_bundle):
    model = bsdiff_rt.open_model(tiny_bundle, runner="eager")
    model.close()
    with pytest.raises(RuntimeError, match="closed"):
        model.suppress(clean())


def test_a_warning_is_in_the_result(model):
    assert model.suppress(255 - clean()).warnings == (NO_CHEST, TOO_DIFFERENT)  # the toy's air is grey
    assert model.suppress(clean()).warnings == (TOO_DIFFERENT,)


def test_a_runner_that_fails_says_so(tiny_bundle, toy):
    def broken(x_t, cxr, t, out):
        out.fill_(float("nan"))

    toy.denoise = broken
    with Model(open_bundle(tiny_bundle), toy, ModelSettings()) as model, pytest.raises(InputFailed, match="NaN"):
        model.suppress(clean())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bundle": "absent"}, BundleError, "absent"),
        ({"stepps": 3}, SettingsError, "unknown option 'stepps'; use one of bundle, runner"),
        ({"steps": 5000}, SettingsError, "5000 sampling steps"),
        ({"steps": "a"}, SettingsError, "'a' is not a whole number"),
        ({"batch": 1.5}, SettingsError, "1.5 is not a whole number"),
        ({"samples": 0}, SettingsError, "0 is out of range. Give 1 or more"),
        ({"batch": 0}, SettingsError, "0 is out of range. Give 1 or more"),
        ({"samples": None}, SettingsError, "None is not a whole number"),
        ({"sampler": "euler"}, SettingsError, "'euler' is not one of ddpm, ddim"),
        ({"detail": "some"}, SettingsError, "'some' is not one of full, model"),
        ({"precision": "fp8"}, SettingsError, "'fp8' is not one of auto, fp32"),
        ({"seed": -1}, SettingsError, "-1 is out of range"),
        ({"precision": "fp16", "runner": "eager"}, EngineError, "fp16"),
        ({"device": "tpu"}, SettingsError, "tpu"),
        ({"cache_every": 2}, SettingsError, "from 20 steps on, not with 3 steps"),
        ({"cache_every": 2, "steps": 20, "runner": "onnxruntime"}, EngineError, "onnxruntime cannot reuse deep"),
    ],
)
def test_options_that_cannot_be_used_are_refused(tiny_bundle, options, error, message):
    with pytest.raises(error, match=message):
        bsdiff_rt.open_model(**({"bundle": tiny_bundle} | options))


def test_the_steps_of_another_sampler(tiny_bundle, caplog):
    """The bundle's number of steps holds for samplers of its kind; the others run in full, and say so."""
    manifest = open_bundle(tiny_bundle).manifest
    assert manifest.sampler.name == "ddim"
    steps = manifest.sampler.steps
    for sampler, expected in {None: steps, "dpmpp-2m": steps, "ddpm": 1000, "release": 1000}.items():
        assert resolve_settings(ModelSettings(sampler=sampler), manifest).steps == expected
    assert [record.getMessage() for record in caplog.records] == [
        "sampler ddpm runs all 1000 steps. Set steps for fewer.",
        "sampler release runs all 1000 steps. Set steps for fewer.",
    ]
    caplog.clear()
    assert resolve_settings(ModelSettings(sampler="ddpm", steps=7), manifest).steps == 7
    assert not caplog.records


def test_a_bundle_without_stage_2_runs_none(tiny_bundle):
    manifest = replace(open_bundle(tiny_bundle).manifest, enhancer=NO_ENHANCER, enhance=False)
    assert resolve_settings(ModelSettings(), manifest).enhance is False
    with pytest.raises(SettingsError, match="has no stage 2"):
        resolve_settings(ModelSettings(enhance=True), manifest)


def test_library_messages_name_no_command_line_option(tiny_bundle):
    with bsdiff_rt.open_model(tiny_bundle, runner="eager") as model:
        runner = model._runner
        runner.batch_range = (1, 2)
        with pytest.raises(SettingsError) as refused:
            Model(model.bundle, runner, ModelSettings(batch=3))
    assert "--" not in str(refused.value)


def test_a_closed_model_has_released_its_runner(tiny_bundle, toy):
    closed = []
    toy.close = lambda: closed.append(True)
    Model(open_bundle(tiny_bundle), toy, ModelSettings()).close()
    assert closed == [True]
    assert isinstance(toy, Runner)


def test_importing_the_package_loads_no_torch():
    code = "import sys, bsdiff_rt; dir(bsdiff_rt); assert 'torch' not in sys.modules; bsdiff_rt.open_model"
    subprocess.run([sys.executable, "-c", code + "; assert 'torch' in sys.modules"], check=True)


def test_reused_deep_features_are_named_and_exact_runs_keep_their_digest(tiny_bundle):
    with bsdiff_rt.open_model(tiny_bundle, runner="eager", sampler="ddim", steps=20, cache_every=3) as model:
        described = model.describe(model.prepare(chest(*SHAPE).astype(np.float32)))
        assert "20 steps, deep features every 3 steps, seed 0" in described.description
    exact = list_decisive(replace(model.settings, cache_every=1), "eager", "fp32")
    assert "cache_every" not in exact  # so that UIDs and finished files of earlier versions stay valid
    assert list_decisive(model.settings, "eager", "fp32") == exact | {"cache_every": 3}
