"""What is kept of inserts: all of it by results that are the X-ray, a share by results of less contrast."""

import json

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import retention
from benchmarks.retention_cases import PLAN, Xray, find_places, place_inserts
from benchmarks.retention_report import Kept, summarise
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.formats.raster import read_raster, write_png
from train.phantoms import draw_phantom, write_pairs

FEW = PLAN[::4]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    write_pairs(folder, 2, first_seed=3, size=128)
    return folder


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(retention, "PLAN", FEW)


def run(*arguments):
    result = CliRunner().invoke(retention.app, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_files_of_one_name_are_refused(phantoms, tmp_path):
    """A PNG and a DICOM file of one X-ray would be written into one picture, and compared with each other."""
    for name in ("a_cxr.png", "a_cxr.tif"):
        (tmp_path / name).write_bytes(next(phantoms.glob("*_cxr.png")).read_bytes())
    with pytest.raises(SettingsError, match=r"a_cxr\.tif and .*a_cxr\.png have the same stem"):
        retention.read_subjects("x", tmp_path, 128, 400.0, FEW, 0)


def test_figures_of_a_bundle_and_of_other_results(phantoms, tiny_bundle, tmp_path, few):
    """Results at 0.6 of the X-ray's contrast keep 0.6; the X-ray itself keeps all of everything."""
    common = (f"drawn={phantoms}", "--size", 128, "--seed", 1)
    run(*common, "--write-inputs", tmp_path / "inputs")
    for source in (tmp_path / "inputs").rglob("*.png"):
        target = tmp_path / "flat" / source.relative_to(tmp_path / "inputs")
        target.parent.mkdir(parents=True, exist_ok=True)
        write_png(target, 0.2 + 0.6 * read_raster(source).cxr, 16)
    files = ("--json", tmp_path / "r.json", "--picture", tmp_path / "worst.png")
    result = run(*common, "--bundle", tiny_bundle, "--method", f"flat={tmp_path / 'flat'}", *files)
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"X-ray", "tiny", "flat"}
    assert {row["set"] for row in rows} == {"drawn"}
    for row in rows:
        if row["method"] == "X-ray":
            assert row["kept"] == pytest.approx(1.0, abs=0.01)
            assert row["contrast_to_noise_gain"] == pytest.approx(1.0, abs=0.01)
        if row["method"] == "flat":
            assert row["kept"] == pytest.approx(0.6, abs=0.01)
            assert row["lost_half"] == 0.0
            assert row["contrast_to_noise_gain"] == pytest.approx(1.0, abs=0.02)
    assert "nodules, all" in result.output
    assert cv2.imread(str(tmp_path / "worst.png")).shape[1] == 4 * 160


def test_a_missing_result_is_named(phantoms, tmp_path, few):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match=r"empty/drawn/phantom000003\.png: .*--write-inputs"):
        retention.judge("x", tmp_path / "empty", retention.read_subjects("drawn", phantoms, 128, 400.0, FEW, 0))


def test_a_set_that_is_none_is_refused(tmp_path):
    for wrong in ("folder", "=folder", f"a={tmp_path}/none", f"../a={tmp_path}"):
        with pytest.raises(SettingsError):
            retention.split_name(wrong)
    with pytest.raises(SettingsError, match="no X-ray there"):
        retention.read_subjects("a", tmp_path, 128, 400.0, FEW, 0)


def test_inserts_of_one_picture_do_not_touch_and_lie_where_they_are_said_to():
    pair = draw_phantom(12, 256)
    xray = Xray("p", pair.cxr, pair.soft_tissue, 400 / 256)
    cases = place_inserts(xray, PLAN, np.random.default_rng(0))
    assert len(cases) > 0.8 * len(PLAN)
    places = find_places(pair.cxr, pair.soft_tissue)
    assert {case.place for case in cases} <= set(places)
    for number in {case.round for case in cases}:
        used = np.zeros(pair.cxr.shape, int)
        for case in (case for case in cases if case.round == number):
            assert case.insert.shape == used[case.rows, case.columns].shape
            used[case.rows, case.columns] += 1
        assert used.max() == 1
    again = place_inserts(xray, PLAN, np.random.default_rng(0))
    np.testing.assert_array_equal(cases[3].insert, again[3].insert)


def test_places_follow_the_bone_layer():
    pair = draw_phantom(12, 256)
    places = find_places(pair.cxr, pair.soft_tissue)
    assert set(places) == {"heart", "clavicle", "rib", "between ribs"}
    bone = pair.cxr - pair.soft_tissue
    assert bone[places["rib"]].mean() > 3 * max(bone[places["between ribs"]].mean(), 1e-3)
    rows = {name: np.flatnonzero(mask.any(1)) for name, mask in places.items()}
    assert rows["clavicle"].max() < rows["rib"].min() + 3
    assert set(find_places(pair.cxr, None)) == {"heart", "lung"}
    assert set(find_places(np.full((64, 64), 0.5, np.float32), None)) == {"not known"}


@pytest.mark.parametrize("seed", [4, 5, 6])
def test_no_nodule_of_the_lungs_lies_above_the_shoulders(seed):
    """Dark soft tissue beside the neck was taken for lung, joined to it above the clavicle."""
    pair = draw_phantom(seed, 256)
    cxr = pair.cxr.copy()
    top = int(np.flatnonzero(find_places(pair.cxr, None)["lung"].any(1))[0])
    cxr[max(top - 45, 0) : top + 10, 40:216] = np.quantile(cxr, 0.15)  # as dark as lung, down to the apices
    above = find_places(cxr, None)["lung"][: top - 10]
    assert above.mean() < 0.02


def test_rows_count_what_lost_half_and_give_intervals_over_images():
    kept = [
        Kept("m", "s", image, PLAN[0], "rib", value, value) for image, value in (("a", 0.4), ("a", 0.8), ("b", 0.9))
    ]
    row = next(row for row in summarise(kept, 0) if row["part"] == "nodules, all")
    assert row["kept"] == pytest.approx(0.7)
    assert row["lost_half"] == pytest.approx(1 / 3)
    low, high = row["kept_interval"]
    assert low < 0.7 < high
    assert row["inserts"] == 3
