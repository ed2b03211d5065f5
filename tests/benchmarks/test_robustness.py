"""A row for each change, judged against the truth changed alike; the model does no better than the changes allow."""

import json

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import robustness
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.imaging.view import find_view
from train.phantoms import write_pairs


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    write_pairs(folder, 2, first_seed=3, size=96)
    return folder


def test_a_row_for_each_change(phantoms, tiny_bundle, tmp_path):
    arguments = [str(phantoms), "--bundle", str(tiny_bundle), "--json", str(tmp_path / "r.json")]
    result = CliRunner().invoke(robustness.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    document = json.loads((tmp_path / "r.json").read_text())
    assert [row["change"] for row in document["rows"]] == list(robustness.CHANGES)
    assert [line[:36].strip() for line in result.stdout.splitlines()[1:]] == list(robustness.CHANGES)
    assert {row["images"] for row in document["rows"]} == {2}
    assert all(np.isfinite(row["bsr"]) for row in document["rows"])


@pytest.mark.parametrize("name", robustness.CHANGES)
def test_changes_keep_shape_and_the_order_of_x_ray_and_truth(name):
    """What is bone stays brighter in the X-ray, and outside of it both are one."""
    truth = np.linspace(0.2, 0.7, 96 * 80, dtype=np.float32).reshape(96, 80)
    cxr = truth.copy()
    cxr[40:44, 10:70] += 0.2
    one, other = robustness.clip_pair(*robustness.CHANGES[name](cxr, truth))
    assert one.shape == other.shape == truth.shape
    assert one.dtype == other.dtype == np.float32
    assert one.sum() > other.sum()
    same = np.abs(one - other) < 1e-6
    assert same.mean() > 0.5


def test_a_folder_too_dark_is_refused(tmp_path, tiny_bundle):
    for role in ("cxr", "soft_tissue"):
        dark = np.tile(np.linspace(0, 4000, 64).astype(np.uint16), (64, 1))
        dark[0] = 8000 if role == "cxr" else 0
        cv2.imwrite(str(tmp_path / f"a_{role}.png"), np.minimum(dark, 5000))
    with pytest.raises(SettingsError, match="uses less than half of the grey scale"):
        robustness.measure_changes(tmp_path, str(tiny_bundle))


def test_a_change_that_gives_no_result_is_said(phantoms, tiny_bundle, monkeypatch):
    monkeypatch.setattr(robustness, "CHANGES", {"flat": lambda cxr, truth: (0 * cxr + 0.6, truth)})
    with pytest.raises(SettingsError, match="2 of 2 changed X-rays have no result: the image is empty"):
        robustness.measure_changes(phantoms, str(tiny_bundle))


def test_raw_view_hides_nothing_from_the_model(phantoms, monkeypatch):
    views = []

    def record(cxr, *, trim, least_span):
        views.append((trim, least_span))
        return find_view(cxr, trim=trim, least_span=least_span)

    monkeypatch.setattr("bsdiff_rt.imaging.one_image.find_view", record)
    monkeypatch.setattr(robustness, "CHANGES", {"none": robustness.CHANGES["none"]})
    for raw_view in (False, True):
        robustness.measure_changes(phantoms, "demo", raw_view=raw_view)
    assert set(views[:2]) == {(True, 0.45)}
    assert set(views[2:]) == {(False, 0.0)}
