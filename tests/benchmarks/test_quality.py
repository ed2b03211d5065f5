"""Quality against steps: the rows are what `infer` writes, judged by the same metrics."""

import itertools
import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks import quality as quality_module
from benchmarks.quality import app, load_pairs
from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.config import NO_ENHANCER, InferSettings
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.folder import evaluate as evaluate_module
from bsdiff_rt.folder.evaluate import read_result
from bsdiff_rt.folder.pipeline import Inference
from bsdiff_rt.imaging.metrics import mean_quality, quality
from bsdiff_rt.runners.eager import EagerRunner, load_networks
from bsdiff_rt.sampling.schedule import sampler_table
from train.phantoms import write_pairs


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    write_pairs(folder, 2, first_seed=3, size=96)
    return folder


def test_a_row_per_sampler_steps_stage_and_detail(phantoms, tiny_bundle, tmp_path):
    path = tmp_path / "q.json"
    arguments = ["--bundle", tiny_bundle, "--phantoms", phantoms, "--pairs", phantoms, "--pairs-are", "the same again"]
    arguments += ["--steps", "1,2", "--full", 0, "--device", "cpu", "--json", path]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    written = json.loads(path.read_text())
    rows = written["rows"]
    assert len(rows) == 2 * 4 * 2 * 2 * 2  # groups, samplers, steps, stage 2, detail
    assert len(result.output.splitlines()) == len(rows)
    assert {row["images"] for row in rows} == {2}
    first, again = (
        [{k: v for k, v in row.items() if k not in ("group", "seconds")} for row in rows if row["group"] == group]
        for group in ("held-out phantoms", "the same again")
    )
    assert first == again
    assert all(np.isfinite(row["bsr"]) for row in rows)
    one_step = [row for row in first if row["steps"] == 1 and not row["stage2"] and row["detail"] == "model"]
    assert len({row["bsr"] for row in one_step}) == 1  # one step is the same for every sampler: x0 of t = 999


def test_mirrored_rows_are_what_infer_writes(phantoms, tiny_bundle, tmp_path):
    path = tmp_path / "q.json"
    arguments = ["--bundle", tiny_bundle, "--phantoms", phantoms, "--steps", "2", "--full", 0, "--size", 0, "--mirror"]
    arguments += ["--device", "cpu", "--json", path]
    assert CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False).exit_code == 0
    rows = {(row["sampler"], row["stage2"], row["detail"]): row for row in json.loads(path.read_text())["rows"]}
    settings = {"sampler": "ddim", "steps": 2, "mirror": True, "device": "cpu", "bundle": str(tiny_bundle)}
    for enhance, detail in itertools.product((False, True), ("model", "full")):
        output = tmp_path / f"{enhance}-{detail}"
        inference = Inference(InferSettings(output=output, enhance=enhance, detail=detail, **settings))
        inputs = sorted(phantoms.glob("*_cxr.png"))
        inference.run(inference.find_tasks(inputs))
        found = []
        for cxr, pair in zip(inputs, load_pairs(phantoms), strict=True):
            found.append(quality(pair.cxr, pair.soft_tissue, read_result(output / cxr.name, 16)))
        # Written at 16 bits.
        assert rows["ddim", enhance, detail]["psnr"] == pytest.approx(mean_quality(found).psnr, abs=1e-3)


def test_all_steps_run_on_fewer_images(phantoms, tiny_bundle, tmp_path, monkeypatch):
    """`--full 1` adds ddpm over the whole schedule for one image; shortened here by judging without networks."""
    seen = []
    monkeypatch.setattr("benchmarks.quality.judge", lambda _, prep, table, *rest: seen.append(table.steps) or {})
    arguments = ["--bundle", str(tiny_bundle), "--phantoms", str(phantoms), "--steps", "1", "--full", "1"]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    assert seen == [1] * 8 + [1000]


def test_pairs_share_one_grey_scale(tmp_path):
    cxr = np.full((64, 64), 60000, np.uint16)
    cxr[0] = 10
    cv2.imwrite(str(tmp_path / "a_cxr.png"), cxr)
    cv2.imwrite(str(tmp_path / "a_soft_tissue.png"), cxr // 4)
    (pair,) = load_pairs(tmp_path)
    np.testing.assert_allclose(pair.soft_tissue * 4, pair.cxr, atol=1e-4)


@pytest.mark.parametrize(
    ("steps", "json_file", "message"),
    [
        ("1,zwei", "q.json", "1,zwei: give whole numbers, separated by commas"),
        ("1,2000", "q.json", "2000 sampling steps requested"),
        ("1", "absent/q.json", r"q\.json cannot be written \(No such file"),
    ],
)
def test_what_cannot_be_done_is_said_before_hours_of_it(phantoms, tmp_path, monkeypatch, steps, json_file, message):
    monkeypatch.setattr("benchmarks.quality.judge", lambda *_: pytest.fail("judged"))
    arguments = ["--phantoms", phantoms, "--steps", steps, "--json", tmp_path / json_file, "--device", "cpu"]
    with pytest.raises(SettingsError, match=message):
        CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_an_interruption_keeps_the_rows_that_are_there(phantoms, tiny_bundle, tmp_path, monkeypatch):
    judged = []

    def judge(*arguments):
        judged.append(arguments)
        if len(judged) == 3:  # two phantoms a row
            raise KeyboardInterrupt
        return real(*arguments)

    real = quality_module.judge
    monkeypatch.setattr("benchmarks.quality.judge", judge)
    arguments = ["--bundle", tiny_bundle, "--phantoms", phantoms, "--steps", "1", "--json", tmp_path / "q.json"]
    CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--device", "cpu")])
    rows = json.loads((tmp_path / "q.json").read_text())["rows"]
    assert {(row["sampler"], row["steps"]) for row in rows} == {("ddpm", 1)}


def test_nothing_to_judge_is_said(tiny_bundle):
    with pytest.raises(SettingsError, match="nothing to judge: give --phantoms, --pairs, or both"):
        CliRunner().invoke(app, ["--bundle", str(tiny_bundle)], catch_exceptions=False)


def test_all_steps_asked_for_by_number_run_on_every_image(phantoms, tiny_bundle, monkeypatch):
    seen = []
    monkeypatch.setattr("benchmarks.quality.judge", lambda _, prep, table, *rest: seen.append(table.steps) or {})
    arguments = ["--bundle", str(tiny_bundle), "--phantoms", str(phantoms), "--steps", "1000", "--full", "0"]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    assert seen == [1000] * 8


def test_only_the_lungs_count(tiny_bundle, tmp_path, monkeypatch):
    folder = tmp_path / "pairs"
    write_pairs(folder, 1, first_seed=3, size=96)
    name = next(folder.glob("*_cxr.png")).name.removesuffix("_cxr.png")
    mask = np.zeros((96, 96), bool)
    mask[30:60, 20:40] = True
    cv2.imwrite(str(folder / f"{name}_lungs.png"), mask.astype(np.uint8) * 255)
    (given,) = load_pairs(folder, lungs=True)
    np.testing.assert_array_equal(given.lungs, mask)
    assert load_pairs(folder)[0].lungs is None
    arguments = ["--bundle", tiny_bundle, "--pairs", folder, "--steps", "1", "--full", 0, "--size", 0]
    arguments += ["--device", "cpu", "--lungs", "--json", tmp_path / "q.json"]
    judged = []
    monkeypatch.setattr(quality_module, "quality", lambda *images: judged.append(images[3]) or quality(*images))
    assert CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False).exit_code == 0
    assert json.loads((tmp_path / "q.json").read_text())["lungs"] is True
    for used in judged:
        np.testing.assert_array_equal(used, mask)
    (folder / f"{name}_lungs.png").unlink()
    monkeypatch.setattr(evaluate_module, "find_lungs", lambda cxr: cxr > 0.5)
    (found,) = load_pairs(folder, lungs=True)
    np.testing.assert_array_equal(found.lungs, found.cxr > 0.5)
    cv2.imwrite(str(folder / f"{name}_lungs.png"), mask[:50].astype(np.uint8) * 255)
    with pytest.raises(SettingsError, match="its X-ray has another size"):
        load_pairs(folder, lungs=True)


@pytest.mark.parametrize("enhancer", [None, NO_ENHANCER])
def test_a_bundle_without_stage_2_has_no_rows_of_it(phantoms, tiny_bundle, enhancer):
    bundle = open_bundle(tiny_bundle)
    manifest = bundle.manifest if enhancer is None else replace(bundle.manifest, enhancer=enhancer)
    runner = EagerRunner(*load_networks(bundle), manifest.preprocessing.size, torch.device("cpu"))
    table = sampler_table(manifest.schedule, "ddim", 1)
    found = quality_module.judge(runner, manifest, table, load_pairs(phantoms)[0], 96, False)
    assert {stage2 for stage2, _ in found} == ({False, True} if enhancer is None else {False})
