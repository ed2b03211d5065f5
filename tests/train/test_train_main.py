"""From phantoms to soft tissue by the documented commands, at tiny size: train both stages, export, infer."""

import csv
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bsdiff_rt.cli import app as product
from bsdiff_rt.config import Schedule
from export.__main__ import app as exporter
from train.__main__ import HELD_OUT_PHANTOM_SEED, app
from train.denoiser import draw_times, target


def run(command_line, *arguments):
    result = CliRunner().invoke(command_line, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


TINY = ("--phantoms", 4, "--save-every", 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    pairs = tmp_path_factory.mktemp("pairs")
    assert run(app, "phantoms", pairs, "--count", 2, "--size", 64).exit_code == 0
    common = (*TINY, "--pairs", pairs, "--hold-out", f"phantom{HELD_OUT_PHANTOM_SEED}")
    stage1 = ("denoiser", "-o", folder, "--preset", "tiny", "--objective", "x0", "--size", 64, *common)
    assert run(app, *stage1, "--steps", 4).exit_code == 0
    assert run(app, *stage1, "--steps", 6).exit_code == 0  # resumes at 4
    assert run(app, "enhancer", "-o", folder, "--samples", 3, "--steps", 2, *common).exit_code == 0
    return folder


def test_training_leaves_checkpoints_a_log_and_a_picture(trained):
    for stage in ("denoiser", "enhancer"):
        assert (trained / f"{stage}.pt").is_file()
        assert (trained / f"{stage}_samples.png").stat().st_size > 1000
    with (trained / "denoiser.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [2, 4, 6]
    assert {"phantoms_bsr", "pairs_psnr", "pairs_foreign"} <= set(rows[0])
    assert all(np.isfinite(float(row["loss"])) for row in rows)


def test_a_trained_run_becomes_a_bundle_that_infers(trained, tmp_path):
    bundle = tmp_path / "bundle"
    made = run(exporter, "checkpoints", trained, "-o", bundle, "--name", "t", "--sampler", "ddim", "--steps", 2)
    assert made.exit_code == 0, made.output
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["training"]["denoiser_steps"] == 6
    assert manifest["schedule"]["objective"] == "x0"
    xrays = tmp_path / "in"
    assert run(app, "phantoms", xrays, "--count", 1, "--size", 64, "--dicom").exit_code == 0
    for path in xrays.glob("*_soft_tissue.png"):
        path.unlink()
    (next(xrays.glob("*.dcm"))).rename(xrays / "dicom.dcm")
    result = run(product, "infer", xrays, "-o", tmp_path / "out", "--bundle", bundle, "--quiet")
    assert result.exit_code == 0, result.output
    assert sorted(p.suffix for p in (tmp_path / "out").glob("*_cxr.png")) == [".png"]
    assert (tmp_path / "out" / "dicom.dcm").is_file()


def test_an_unknown_held_out_pair_is_refused(tmp_path):
    run(app, "phantoms", tmp_path / "p", "--count", 1, "--size", 64)
    with pytest.raises(Exception, match="no such pair"):
        run(app, "denoiser", "-o", tmp_path, "--pairs", tmp_path / "p", "--hold-out", "x", *TINY, "--size", 64)


def test_targets_of_the_three_objectives():
    """v = a eps - s x0 (Salimans and Ho 2022); x0 and eps are themselves."""
    x_0, eps = torch.tensor([0.5]), torch.tensor([-1.0])
    a, s = torch.tensor([0.6]), torch.tensor([0.8])
    assert target(Schedule(objective="eps"), x_0, eps, a, s) == -1.0
    assert target(Schedule(objective="x0"), x_0, eps, a, s) == 0.5
    assert target(Schedule(objective="v"), x_0, eps, a, s).item() == pytest.approx(0.6 * -1.0 - 0.8 * 0.5)


def test_times_are_uniform_for_eps_and_lean_to_the_noisy_end_otherwise():
    rng = np.random.default_rng(0)
    uniform = draw_times(rng, Schedule(objective="eps"), 20000)
    assert float((uniform >= 900).double().mean()) == pytest.approx(0.1, abs=0.01)
    leaning = draw_times(rng, Schedule(objective="x0"), 20000)
    assert float((leaning >= 900).double().mean()) == pytest.approx(0.55, abs=0.015)
    assert int(leaning.max()) == 999
