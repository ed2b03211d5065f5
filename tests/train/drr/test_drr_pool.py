"""The pool: pairs with exact truth, the same for a seed, resumed, extended, recorded; CTs of no use are named."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from made_ct import SPACING, make_chest, write_nifti, write_npz, write_series
from typer.testing import CliRunner

from bsdiff_rt.errors import SettingsError
from bsdiff_rt.formats.raster import find_pairs
from train.__main__ import app
from train.commands.drr import parse_labels
from train.drr.framing import Anatomy, draw_framing
from train.drr.pool import DrrOptions, Labels, draw_pair, make_pool
from train.drr.prepare import coarsen, prepare_ct
from train.drr.processing import display, draw_display, draw_exposure, expose
from train.drr.volume import Volume, find_sources

TINY = DrrOptions(size=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cts")
    write_npz(folder / "one.npz", make_chest())
    write_npz(folder / "two.npz", make_chest(contrast=True))
    return folder


@pytest.fixture(scope="module")
def prepared(folder):
    return prepare_ct(find_sources([folder / "one.npz"])[0], 1.0)


def read(path):
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED).astype(np.float32) / 65535


def contents(pool):
    return {path.name: path.read_bytes() for path in pool.glob("*_*.png") if path.name != "contact_sheet.png"}


def pool_of(folder, output, count, options=TINY, labels=None, workers=1):
    return make_pool(find_sources([folder]), output, count, options, labels or Labels(), workers)


def test_a_pool_is_whole_and_the_same_for_any_number_of_workers(folder, tmp_path):
    entries = pool_of(folder, tmp_path / "a", 2)
    assert [(entry.name, entry.status, entry.pairs) for entry in entries] == [("one", "ok", 2), ("two", "ok", 2)]
    assert [name for name, _, _ in find_pairs(tmp_path / "a")] == ["one_0000", "one_0001", "two_0000", "two_0001"]
    record = json.loads((tmp_path / "a" / "pool.json").read_text())
    assert record["settings"]["size"] == 64
    one, two = record["volumes"]
    assert one["spacing_mm"] == pytest.approx(SPACING)
    assert one["contrast_ml"] == 0
    assert two["contrast_ml"] > 300
    assert cv2.imread(str(tmp_path / "a" / "contact_sheet.png")) is not None
    assert not (tmp_path / "a" / ".work").exists()
    pool_of(folder, tmp_path / "b", 2, workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    pool_of(folder, tmp_path / "c", 2, DrrOptions(size=64, seed=1))
    assert contents(tmp_path / "c")["one_0000_cxr.png"] != contents(tmp_path / "a")["one_0000_cxr.png"]


def test_the_record_keeps_what_earlier_calls_found(folder, tmp_path):
    pool_of(folder, tmp_path / "pool", 1)
    before = json.loads((tmp_path / "pool" / "pool.json").read_text())["volumes"]
    (entry,) = make_pool(find_sources([folder])[:1], tmp_path / "pool", 1, DrrOptions(size=64), Labels(), 1)
    assert json.loads((tmp_path / "pool" / "pool.json").read_text())["volumes"] == before
    assert (entry.name, entry.bone_ml > 0) == ("one", True)


def test_a_ct_that_failed_before_is_tried_again(folder, tmp_path):
    pool_of(folder, tmp_path / "pool", 1)
    record = json.loads((tmp_path / "pool" / "pool.json").read_text())
    record["volumes"][0] |= {"status": "failed", "reason": "not a CT"}
    (tmp_path / "pool" / "pool.json").write_text(json.dumps(record))
    for path in (tmp_path / "pool").glob("one_*"):
        path.unlink()
    entries = pool_of(folder, tmp_path / "pool", 1)
    assert [(entry.status, entry.reason, entry.pairs) for entry in entries] == [("ok", "", 1), ("ok", "", 1)]


def test_an_interrupted_pool_is_continued_and_extended(folder, tmp_path, monkeypatch):
    pool_of(folder, tmp_path / "whole", 3)
    pool = tmp_path / "pool"
    made = []

    def stop_after_two(*arguments):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(arguments)
        return draw_pair(*arguments)

    monkeypatch.setattr("train.drr.pool.draw_pair", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        pool_of(folder, pool, 2)
    monkeypatch.undo()
    assert len(find_pairs(pool)) == 2
    kept = {path: path.stat().st_mtime_ns for path in pool.glob("one_*.png")}
    pool_of(folder, pool, 2)
    assert len(find_pairs(pool)) == 4
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    (pool / "two_0001_cxr.png").unlink()  # as if stopped between the two files of a pair
    pool_of(folder, pool, 3)
    assert contents(pool) == contents(tmp_path / "whole")


def test_only_its_own_folder_is_continued(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SettingsError, match="not empty and not a pool"):
        pool_of(folder, tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    pool_of(folder, tmp_path / "pool", 1)
    with pytest.raises(SettingsError, match="made with other settings"):
        pool_of(folder, tmp_path / "pool", 1, DrrOptions(size=64, seed=5))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pool.json").write_text('{"kind": "something else"}')
    with pytest.raises(SettingsError, match="not the record of a pool"):
        pool_of(folder, tmp_path / "other", 1)


def test_without_bone_the_pair_is_one_picture(prepared):
    """Scatter, noise and display are the X-ray's in both, so nothing but bone can differ."""
    rng = np.random.default_rng(3)
    framing = draw_framing(rng, prepared.anatomy, 64, "mixed", "mixed", 1.0)
    path = np.abs(rng.normal(150_000, 30_000, (64, 64))).astype(np.float32)
    for _ in range(10):
        logs = expose(path, np.zeros_like(path), draw_exposure(rng), framing.beam.side_mm / 64, rng)
        cxr, soft = display(*logs, draw_display(rng), framing.beam.side_mm / 64)
        np.testing.assert_array_equal(cxr, soft)
        assert cxr.dtype == np.float32
        assert 0 <= cxr.min() < cxr.max() <= 1


def test_a_pair_looks_like_a_chest_x_ray(prepared):
    """Air is dark, lungs are darker than the heart, bone is brighter than its truth, the heart is on the right."""
    options = DrrOptions(size=96, lungs=True, pose=0.0)
    for number in range(6):
        pair = draw_pair(prepared.materials, prepared.anatomy, "one", number, options)
        cxr, soft, lungs = (pair[role] for role in ("cxr", "soft_tissue", "lungs"))
        assert (cxr - soft).min() > -0.1  # beside an edge that the display sharpens
        assert (cxr - soft).max() > 0.03
        inside = lungs > 0.5
        assert 0.1 < inside.mean() < 0.6
        assert cxr[inside].mean() < cxr[40:60, 44:52].mean()
        left, right = inside[:, :48].sum(), inside[:, 48:].sum()
        assert right < 0.95 * left  # the heart hides lung at the patient's left, the right of the picture


def test_the_field_holds_the_lungs_and_not_more_than_the_volume():
    anatomy = Anatomy((2.0, 1.0, 1.0), (170, 240, 360), ((20, 150), (40, 200), (40, 320)), cut=False)
    cut = Anatomy((2.0, 1.0, 1.0), (170, 240, 300), ((20, 150), (40, 200), (10, 290)), cut=True)
    for seed in range(40):
        shown = draw_framing(np.random.default_rng(seed), anatomy, 512, "mixed", "mixed", 1.0)
        height = (len(shown.heights) - 1) * shown.spacing[0]
        middle, half = shown.pose.centre[2], shown.beam.side_mm / 2
        assert middle - half > 0
        assert middle + half < height
        assert shown.heights[0] == 0
        assert shown.heights[-1] == pytest.approx(169)
        assert np.diff(shown.heights).min() > 0
        framing = draw_framing(np.random.default_rng(seed), cut, 512, "PA", "cone", 1.0)
        assert framing.beam.side_mm < 300 * framing.spacing[2]
        assert framing.beam.view == "PA"
        assert framing.beam.source_mm is not None
        straight = draw_framing(np.random.default_rng(seed), cut, 512, "AP", "parallel", 0.0)
        assert (straight.pose.yaw, straight.pose.tilt, straight.pose.roll) == (0, 0, 0)
        assert straight.beam.source_mm is None


def test_fine_voxels_are_averaged_and_keep_their_mass():
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 1000, (41, 60, 80)).astype(np.int16)
    coarse = coarsen(Volume("fine", hu, (0.5, 0.5, 0.7), hu > 0), 1.0)
    assert coarse.hu.shape == (20, 30, 56)
    assert coarse.spacing == pytest.approx((1.0, 1.0, 1.0))
    assert coarse.hu.mean() == pytest.approx(hu[:40].mean(), abs=2)
    assert coarse.labels.shape == coarse.hu.shape
    assert coarsen(Volume("thick", hu, (5.0, 1.0, 1.0)), 1.0).hu is hu


def test_numbers_of_labels():
    assert parse_labels(None) is None
    assert parse_labels("25-27,69") == {25, 26, 27, 69}
    with pytest.raises(SettingsError, match="ribs is not a list of numbers"):
        parse_labels("ribs")


def test_the_command_takes_a_series_and_nifti_with_labels_and_names_what_is_of_no_use(tmp_path):
    chest = make_chest()
    cts, labels = tmp_path / "cts", tmp_path / "labels"
    write_series(cts / "series", chest, descending=True)
    write_nifti(cts / "nifti.nii.gz", chest, flip=(0, 2))
    write_npz(cts / "cut.npz", chest[:50])
    write_nifti(labels / "nifti.nii.gz", np.where(chest > 200, 30, 1).astype(np.int16))
    arguments = [cts, "-o", tmp_path / "pool", "--count", 1, "--size", 256, "--workers", 1]
    arguments += ["--labels", labels, "--bone-labels", "25-50"]
    result = CliRunner().invoke(app, ["drr", *map(str, arguments)])
    assert result.exit_code == 3
    assert "cut: refused, covers 196 mm from feet to head, less than 200 mm" in result.output
    assert "2 pairs. CTs used: 2, without pairs: 1" in result.output
    series, nifti = (read(tmp_path / "pool" / f"{name}_0000_cxr.png") for name in ("series", "nifti"))
    assert series.shape == nifti.shape == (256, 256)
    result = CliRunner().invoke(app, ["drr", str(cts), "-o", str(tmp_path / "other"), "--labels", str(tmp_path / "no")])
    assert isinstance(result.exception, SettingsError)
