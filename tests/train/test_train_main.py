"""From phantoms to soft tissue by the documented commands, at tiny size: train both stages, export, infer."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from benchmarks.table1 import app as table1
from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.cli import app as product
from bsdiff_rt.config import PRESETS, Schedule
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.networks.unet import Denoiser
from export.__main__ import app as exporter
from train.__main__ import app
from train.checkpoint import load_checkpoint
from train.commands.options import SharedOptions
from train.commands.setup import Samples, load_real_pairs, split_pairs
from train.denoiser import denoiser_losses
from train.diffusion import bone_weights, draw_times, target
from train.loop import Trainee, TrainOptions
from train.phantom_pool import HELD_OUT_PHANTOM_SEED
from train.recipe import RECIPES


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
    defaults = ("--name", "t", "--sampler", "ddim", "--steps", 2, "--least-span", 0.3)
    made = run(exporter, "checkpoints", trained, "-o", bundle, *defaults)
    assert made.exit_code == 0, made.output
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["preprocessing"]["least_span"] == 0.3
    assert manifest["training"]["denoiser_steps"] == 6
    assert manifest["training"]["trained_on"] == load_checkpoint(trained / "denoiser.pt")["trained_on"]
    assert len(manifest["training"]["trained_on"]) == 1
    assert manifest["schedule"]["objective"] == "x0"
    xrays = tmp_path / "in"
    assert run(app, "phantoms", xrays, "--count", 1, "--size", 128, "--dicom").exit_code == 0  # smaller ones are icons
    for path in xrays.glob("*_soft_tissue.png"):
        path.unlink()
    (next(xrays.glob("*.dcm"))).rename(xrays / "dicom.dcm")
    result = run(product, "infer", xrays, "-o", tmp_path / "out", "--bundle", bundle, "--quiet")
    assert result.exit_code == 0, result.output
    assert sorted(p.suffix for p in (tmp_path / "out").glob("*_cxr.png")) == [".png"]
    assert (tmp_path / "out" / "dicom.dcm").is_file()


def test_what_trained_stage_1_cannot_judge_stage_2(trained, tmp_path):
    """Another split of the same pairs, or a --hold-out forgotten."""
    shutil.copy(trained / "denoiser.pt", tmp_path)
    run(app, "phantoms", tmp_path / "p", "--count", 2, "--size", 64)
    name = f"phantom{HELD_OUT_PHANTOM_SEED + 1}"
    common = (*TINY, "--pairs", tmp_path / "p", "--hold-out", name)
    with pytest.raises(SettingsError, match=f"held out here, but stage 1 was trained on: {name}"):
        run(app, "enhancer", "-o", tmp_path, "--samples", 3, "--steps", 2, *common)


@pytest.fixture
def copied_graphs(tiny_bundle, monkeypatch):
    """Graphs are those of the tiny bundle, whose networks have the same shape; weights are the exported ones."""

    def copy_graph(network, inputs, weights, graph):
        save_file(network.state_dict(), weights)
        shutil.copy(tiny_bundle / graph.name, graph)

    monkeypatch.setattr("export.bundle.export_graph", copy_graph)


def test_training_goes_on_from_a_bundle(trained, tiny_bundle, tmp_path, copied_graphs):
    start = ("--preset", "tiny", "--size", 64, "--start", tiny_bundle, "--crop", 32)
    assert run(app, "denoiser", "-o", tmp_path, *start, *TINY, "--steps", 1).exit_code == 0
    shutil.copy(trained / "enhancer.pt", tmp_path)
    made = run(exporter, "checkpoints", tmp_path, "-o", tmp_path / "b", "--no-enhance")
    assert made.exit_code == 0, made.output
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert manifest["training"]["denoiser_start"] == open_bundle(tiny_bundle).sha256
    had, has = (load_file(folder / "denoiser.safetensors") for folder in (tiny_bundle, tmp_path / "b"))
    moved = {name: (has[name] - had[name]).abs().max() for name in had}
    assert 0 < max(moved.values()) < 1e-3  # one step of the warm-up


def test_an_unknown_held_out_pair_is_refused(tmp_path):
    run(app, "phantoms", tmp_path / "p", "--count", 1, "--size", 64)
    with pytest.raises(Exception, match="no such pair"):
        run(app, "denoiser", "-o", tmp_path, "--pairs", tmp_path / "p", "--hold-out", "x", *TINY, "--size", 64)


def test_pairs_are_kept_large_enough_for_the_network(tmp_path):
    run(app, "phantoms", tmp_path / "p", "--count", 2, "--size", 64)
    name = f"phantom{HELD_OUT_PHANTOM_SEED}"
    for size, stored in ((64, 384), (512, 768)):
        (pair,), (held_out,) = split_pairs(tmp_path / "p", [name], size)
        assert (pair.cxr.shape, held_out.cxr.shape) == ((stored, stored), (size, size))


def test_both_stages_learn_from_data_of_one_clahe(trained, tmp_path):
    run(app, "phantoms", tmp_path / "p", "--count", 4, "--size", 64, "--seed", 1_000_000)
    run(app, "prepare", tmp_path / "p", tmp_path / "p", "-o", tmp_path / "d", "--size", 64, "--no-register")
    state = torch.load(trained / "denoiser.pt", weights_only=True)
    torch.save(state | {"clahe": 2.0}, tmp_path / "denoiser.pt")
    with pytest.raises(SettingsError, match=r"denoiser\.pt: trained on CLAHE 2, but this data set has 0"):
        run(app, "enhancer", "-o", tmp_path, "--dataset", tmp_path / "d", "--phantoms", 2, "--samples", 3, "--steps", 2)


def test_a_data_set_smaller_than_the_network_is_refused(tmp_path):
    run(app, "phantoms", tmp_path / "p", "--count", 4, "--size", 64)
    prepared = ("--size", 64, "--split", "2:1:1", "--no-register", "--clahe", 2)
    assert run(app, "prepare", tmp_path / "p", tmp_path / "p", "-o", tmp_path / "d", *prepared).exit_code == 0
    with pytest.raises(SettingsError, match=r"--size 128: .*d holds images of 64 px\. Prepare it again at 128 or more"):
        load_real_pairs(None, None, tmp_path / "d", 128)
    paper = Samples.load(SharedOptions(recipe="paper", dataset=tmp_path / "d"), 64)
    assert paper.make_batches(tmp_path, 64, 0).description()["clahe"] == 2.0
    demo = Samples.load(SharedOptions(phantoms=1, dataset=tmp_path / "d"), 64)
    with pytest.raises(SettingsError, match=r"the data set is equalised \(CLAHE 2\), phantoms are not"):
        demo.make_batches(tmp_path, 64, 0)


@pytest.mark.parametrize(
    ("size", "message"), [(48, "--size 48: phantoms need at least 64 px"), (250, "--size 250: give a multiple")]
)
def test_a_size_nothing_can_be_drawn_at_is_refused_at_once(tmp_path, monkeypatch, size, message):
    monkeypatch.setattr("train.commands.setup.load_phantom_pool", lambda *_: pytest.fail("phantoms were drawn"))
    with pytest.raises(SettingsError, match=message):
        run(app, "denoiser", "-o", tmp_path, *TINY, "--size", size)


def test_demo_trains_stage_1_by_the_demo_recipe(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr("train.commands.demo.denoiser", lambda output, shared: runs.append((output, shared)))
    run(app, "demo", "-o", tmp_path, "--pairs", tmp_path / "p", "--drrs", tmp_path / "d")
    assert runs == [(tmp_path, SharedOptions(pairs=tmp_path / "p", drrs=tmp_path / "d", recipe="demo"))]


def test_groups_to_validate_on_where_no_pair_is_held_out(caplog):
    def choose(phantoms, size, patience):
        recipe = replace(RECIPES["demo"], phantoms=phantoms)
        return Samples(recipe, [], [], None).choose_groups(size, patience)

    assert choose(4, 64, 0).keys() == {"phantoms"}
    assert not caplog.records
    assert choose(0, 64, 0).keys() == {"phantoms"}
    assert "no pair is held out: checkpoints are validated on drawn phantoms" in caplog.text
    with pytest.raises(SettingsError, match=r"early stopping has nothing to watch\. Give --hold-out"):
        choose(0, 64, 5)
    with pytest.raises(SettingsError, match=r"--size 48: phantoms need at least 64 px\. Give --hold-out"):
        choose(0, 48, 0)


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
    # 90 % drawn from there, and a tenth of the rest.
    assert float((leaning >= 900).double().mean()) == pytest.approx(0.91, abs=0.015)
    assert int(leaning.max()) == 999


def test_an_x0_error_counts_relative_to_the_bone_there_is():
    """0.02 / (energy + 0.004): the same share of the bone left in weighs alike, but for images of hardly any bone."""
    pair = torch.zeros(3, 2, 4, 4)
    pair[1, 0] = 0.2  # mean square 0.04, all of it in the mean
    pair[2, 1, :, :2] = 0.4  # mean square 0.08, half of it in the mean
    about_mean, mean = bone_weights(Schedule(objective="x0"), pair).T
    torch.testing.assert_close(mean, 0.2 * torch.tensor([0.02 / 0.004, 0.02 / 0.044, 0.02 / 0.084]))
    torch.testing.assert_close(about_mean, torch.tensor([0.02 / 0.004, 0.02 / 0.004, 0.02 / 0.044]))
    for objective in ("eps", "v"):
        torch.testing.assert_close(bone_weights(Schedule(objective=objective), pair), torch.ones(3, 2))


def test_the_loss_weighs_each_sample_and_pieces_add_up_to_it():
    trainee = Trainee(Denoiser(PRESETS["tiny"].denoiser), TrainOptions(bf16=False))
    rng = torch.Generator().manual_seed(0)
    x_t, cxr, wanted = (torch.randn(3, 1, 16, 16, generator=rng) for _ in range(3))
    t, weights = torch.tensor([0, 500, 999]), torch.tensor([[0.5, 3.0], [2.0, 0.0], [0.0, 0.0]])
    wanted = wanted + 0.5  # a mean worth telling from the rest
    (loss,) = denoiser_losses(trainee, x_t, cxr, t, wanted, weights)
    # A network just made predicts 0: each sample's error is its goal's.
    moments = torch.stack([wanted.var(dim=(1, 2, 3), correction=0), wanted.mean(dim=(1, 2, 3)) ** 2], dim=1)
    expected = (weights * moments).sum() / 3
    torch.testing.assert_close(loss, expected)
    halves = Trainee(trainee.network, TrainOptions(bf16=False, accumulate=2))
    torch.testing.assert_close(sum(denoiser_losses(halves, x_t, cxr, t, wanted, weights)), expected)


def test_your_own_pairs_to_the_papers_tables(tiny_bundle, tmp_path):
    """Prepare, both stages by the paper's recipe, a comparator, the tables; networks and steps are tiny."""
    pairs, data, folder = tmp_path / "pairs", tmp_path / "data", tmp_path / "run"
    run(app, "phantoms", pairs, "--count", 4, "--size", 64)
    prepared = run(app, "prepare", pairs, pairs, "-o", data, "--size", 64, "--split", "2:1:1", "--no-register")
    assert prepared.exit_code == 0, prepared.output
    common = ("-o", folder, "--recipe", "paper", "--dataset", data, "--steps", 2, "--save-every", 2)
    assert run(app, "denoiser", *common, "--preset", "tiny", "--size", 64, "--accumulate", 2).exit_code == 0
    second = ("--samples", 2, "--stage-one-steps", 1, "--perceptual", 0)
    assert run(app, "enhancer", *common, *second).exit_code == 0
    assert run(app, "comparator", "gusarev", *common, "--size", 64).exit_code == 0
    first = load_checkpoint(folder / "denoiser.pt")
    assert (first["schedule"]["objective"], first["options"]["ema"], first["step"]) == ("eps", 0.995, 2)
    assert first["stopping"]["finished"]
    assert "critic" in load_checkpoint(folder / "enhancer.pt")
    tables = run(table1, data, "--bundle", tiny_bundle, "--comparators", folder, "--device", "cpu")
    assert tables.exit_code == 0
    assert "1 images of 1 patients" in tables.output
    for row in ("Gusarev", "untouched X-ray", "BS-Diff, stage 1 alone"):
        assert row in tables.output


def test_a_dry_run_writes_nothing_and_leaves_what_is_there(trained, tmp_path):
    stage1 = ("--preset", "tiny", "--size", 64, "--phantoms", 500, "--dry-run")
    result = run(app, "denoiser", "-o", tmp_path / "new", *stage1, "--steps", 3600)
    assert "3,600 steps on " in result.output
    assert " per step, " in result.output
    assert not (tmp_path / "new").exists()
    before = sorted((path, path.stat().st_mtime_ns) for path in trained.rglob("*"))
    assert "parameters, 1,500 steps" in run(app, "enhancer", "-o", trained, "--dry-run").output
    assert "128,961 parameters" in run(app, "comparator", "gusarev", "-o", trained, "--size", 64, "--dry-run").output
    assert sorted((path, path.stat().st_mtime_ns) for path in trained.rglob("*")) == before


def test_what_cannot_be_trained_is_said_before_hours_of_work(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(SettingsError, match=r"vgg16-397923af.pth: no such file"):
        run(app, "enhancer", "-o", trained, "--recipe", "paper", "--steps", 1)
    with pytest.raises(SettingsError, match="counts epochs over real pairs"):
        run(app, "denoiser", "-o", tmp_path / "x", "--recipe", "paper")
    with pytest.raises(SettingsError, match="--recipe mine: choose one of demo, paper"):
        run(app, "denoiser", "-o", tmp_path / "x", "--recipe", "mine")
    with pytest.raises(SettingsError, match="preset 'huge': choose one of paper, demo, tiny"):
        run(app, "denoiser", "-o", tmp_path / "x", "--preset", "huge")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": None}, "denoiser.pt: not a checkpoint of stage 1. Write one with `python -m train denoiser`"),
        ({"averaged": {}}, "denoiser.pt: does not fit preset tiny of this version. Train it again"),
        ({"schedule": {"kind": "linear"}}, "denoiser.pt: does not fit preset tiny of this version"),
    ],
)
def test_stage_2_needs_stage_1s_checkpoint_of_this_version(trained, tmp_path, change, message):
    state = load_checkpoint(trained / "denoiser.pt") | change
    torch.save({key: value for key, value in state.items() if value is not None}, tmp_path / "denoiser.pt")
    with pytest.raises(SettingsError, match=message):
        run(app, "enhancer", "-o", tmp_path, "--phantoms", 1, "--samples", 1, "--steps", 1)
