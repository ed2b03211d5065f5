"""The paper's tables: rows of the networks given, intervals of a known distribution, prepared and plain data sets."""

import json
import re
import shutil
from dataclasses import replace

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from synthetic import chest
from typer.testing import CliRunner

from benchmarks.cases import Case, read_cases
from benchmarks.methods import parse_methods
from benchmarks.table1 import (
    BOTH,
    PUBLISHED,
    STAGE_1,
    UNTOUCHED,
    app,
    bootstrap_interval,
    load_comparator,
    print_rows,
)
from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.config import Preprocessing
from bsdiff_rt.errors import InputFailed, SettingsError
from bsdiff_rt.imaging.one_image import prepare

SIZE = 64
CPU = torch.device("cpu")


def write_pair(folder, name, seed):
    """A drawn chest, and as its soft tissue half of it."""
    cxr = np.rint(chest(SIZE, SIZE, seed) * 65535).astype(np.uint16)
    cxr[0, 0] = 65535  # every depth's largest value occurs
    cv2.imwrite(str(folder / f"{name}_cxr.png"), cxr)
    cv2.imwrite(str(folder / f"{name}_soft_tissue.png"), cxr // 2)


@pytest.fixture
def dataset(tmp_path):
    """Five pairs of three patients in the test part, one in train; as `python -m train prepare` writes it."""
    folder = tmp_path / "dataset"
    pairs = [("a", "p1", "test"), ("b", "p1", "test"), ("c", "p2", "test"), ("d", "p3", "test"), ("e", "p4", "train")]
    for part in ("train", "val", "test"):
        (folder / part).mkdir(parents=True)
    for seed, (name, _, part) in enumerate(pairs):
        write_pair(folder / part, name, seed)
    entries = [{"name": name, "patient": patient, "part": part} for name, patient, part in pairs]
    entries.append({"name": "bad", "patient": None, "part": None})
    (folder / "dataset.json").write_text(json.dumps({"pairs": entries}))
    return folder


def write_network(path, gain, size=SIZE):
    """out = gain (cxr + 1) - 1: in [0, 1] the X-ray times the gain."""
    shape = ["batch", 1, size, size]
    nodes = [
        helper.make_node("Add", ["cxr", "one"], ["raised"]),
        helper.make_node("Mul", ["raised", "gain"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "one"], ["out"]),
    ]
    constants = [helper.make_tensor(n, TensorProto.FLOAT, [], [v]) for n, v in (("one", 1.0), ("gain", gain))]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("cxr", "out")]
    graph = helper.make_graph(nodes, "toy", ends[:1], ends[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def test_rows_of_every_network_with_the_papers_values(dataset, tiny_bundle, tmp_path):
    networks = tmp_path / "networks"
    networks.mkdir()
    write_network(networks / "gusarev.onnx", 0.5)
    write_network(networks / "other.onnx", 0.75)
    path = tmp_path / "t.json"
    arguments = [dataset, "--bundle", tiny_bundle, "--comparators", networks, "--device", "cpu", "--json", path]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    written = json.loads(path.read_text())
    rows = {row["name"]: row for row in written["rows"]}
    assert list(rows) == [UNTOUCHED, "Gusarev", "other", STAGE_1, BOTH]
    assert written["images"] == 4
    # The truth is half the X-ray, and so the bone is the other half.
    assert rows["Gusarev"]["bsr"] == pytest.approx(1.0, abs=1e-4)
    assert rows["other"]["bsr"] == pytest.approx(0.75, abs=1e-4)
    assert rows[UNTOUCHED]["bsr"] == pytest.approx(0.0, abs=1e-6)
    assert rows[UNTOUCHED]["bsr_release"] > 0.1  # the release's form rewards doing nothing
    assert rows["Gusarev"]["intervals"]["bsr"] == pytest.approx([1.0, 1.0], abs=1e-4)
    low, high = rows["other"]["intervals"]["psnr"]
    assert low < rows["other"]["psnr"] < high
    assert 0 < rows[STAGE_1]["seconds"] < rows[BOTH]["seconds"]
    assert rows[BOTH]["paper"]["psnr"] == 38.249
    assert rows["other"]["paper"] is None
    one, two = result.output.split("Table 2")
    assert "4 images of 3 patients" in one
    assert "ddim, 3 steps, onnxruntime on cpu" in one
    assert "38.249" in one
    assert STAGE_1 not in one
    assert "29.528" in two
    assert "other" not in two


def test_images_that_a_network_was_trained_on_are_told(dataset, tiny_bundle, tmp_path, monkeypatch):
    """Whoever prepares a data set anew moves patients from one part to another."""
    networks, path = tmp_path / "networks", tmp_path / "t.json"
    networks.mkdir()
    digests = [case.digest for case in read_cases(dataset, "test", Preprocessing(SIZE))]
    for name, known in (("gusarev", digests[:1]), ("other", None)):
        write_network(networks / f"{name}.onnx", 0.5)
        torch.save({"trained_on": known} if known else {}, networks / f"{name}.pt")
    write_network(networks / "third.onnx", 0.5)  # without a checkpoint
    model = open_bundle(str(tiny_bundle))
    seen = replace(model.manifest, training={"trained_on": [*digests[:2], "0" * 16]})
    monkeypatch.setattr("benchmarks.table1.open_bundle", lambda _: replace(model, manifest=seen))
    arguments = [dataset, "--bundle", tiny_bundle, "--comparators", networks, "--device", "cpu", "--json", path]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert "BS-Diff was trained on 2 of the 4 images" in result.output
    assert "Gusarev was trained on 1 of the 4 images" in result.output
    assert "third was" not in result.output
    known = {"BS-Diff": 2, "Gusarev": 1, "other": 0, "third": 0}
    assert json.loads(path.read_text())["images_trained_on"] == known


def test_the_papers_values_stand_below_the_columns_they_belong_to(capsys):
    row = {"name": BOTH, "seconds": 1.5, "paper": PUBLISHED[BOTH]}
    row |= {"bsr": 0.5, "bsr_tone_matched": 0.4, "bsr_release": 0.75, "mse": 0.25, "ssim": 0.125, "psnr": None}
    row["intervals"] = dict.fromkeys(("bsr", "bsr_tone_matched", "bsr_release", "mse", "ssim", "psnr"), (0.1, 0.9))
    print_rows("T", [row])
    ours, paper = (re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()[3:])
    assert [cell.split()[0] for cell in ours] == ["BS-Diff", "0.500", "0.400", "0.750", "0.2500", "0.125", "-", "1.500"]
    assert ours[1] == "0.500 [0.100, 0.900]"
    assert paper == ["paper", "-", "-", "0.988", "0.0002", "0.937", "38.249", "-"]


def test_other_methods_are_judged_beside_ours(dataset, tiny_bundle, tmp_path):
    """Results of any program: half of the X-ray, which is the truth, and a quarter at another size and depth."""
    exact, poor = tmp_path / "exact", tmp_path / "poor"
    for folder in (exact, poor):
        folder.mkdir()
    for name in "abcd":
        cxr = cv2.imread(str(dataset / "test" / f"{name}_cxr.png"), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(exact / f"{name}_soft_tissue.png"), cxr // 2)
        cv2.imwrite(str(poor / f"{name}_cxr.png"), cv2.resize(cxr // 4, (96, 96), interpolation=cv2.INTER_AREA))
    path = tmp_path / "t.json"
    arguments = [dataset, "--bundle", tiny_bundle, "--device", "cpu", "--json", path]
    arguments += ["--method", f"exact={exact}", "--method", f"quarter={poor}"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    rows = {row["name"]: row for row in json.loads(path.read_text(), parse_constant=pytest.fail)["rows"]}
    assert list(rows) == [UNTOUCHED, "exact", "quarter", STAGE_1, BOTH]
    assert rows["exact"]["bsr"] == pytest.approx(1.0, abs=1e-6)
    # A quarter leaves an error of a quarter of the X-ray, where bone is a half: 1 - (1/2)^2.
    assert rows["quarter"]["bsr"] == pytest.approx(0.75, abs=0.01)
    low, high = rows["quarter"]["intervals"]["psnr"]
    assert low < rows["quarter"]["psnr"] < high
    assert rows["quarter"]["seconds"] is None
    assert "quarter" in result.output


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("exact", "exact: give it as NAME=FOLDER"),
        ("exact=", "exact=: give it as NAME=FOLDER"),
        ("BS-Diff={folder}", "BS-Diff: this row exists"),
        ("x={folder}", r"no result for b \(3 of 4 missing\)"),
        ("x={folder}/nowhere", "no such file or folder"),
    ],
)
def test_methods_that_cannot_be_judged(dataset, tiny_bundle, tmp_path, value, message):
    (tmp_path / "results").mkdir()
    shutil.copy(dataset / "test" / "a_soft_tissue.png", tmp_path / "results" / "a.png")
    arguments = [dataset, "--bundle", tiny_bundle, "--device", "cpu"]
    arguments += ["--method", value.format(folder=tmp_path / "results")]
    with pytest.raises(SettingsError, match=message):
        CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_two_methods_of_one_name_and_a_result_of_another_shape(dataset, tiny_bundle, tmp_path):
    with pytest.raises(SettingsError, match="a: two methods have this name"):
        parse_methods(["a=x", "a=y"])
    wide = tmp_path / "wide"
    wide.mkdir()
    for name in "abcd":
        cv2.imwrite(str(wide / f"{name}.png"), np.linspace(0, 255, 64 * 80).reshape(64, 80).astype(np.uint8))
    arguments = [dataset, "--bundle", tiny_bundle, "--device", "cpu", "--method", f"wide={wide}"]
    with pytest.raises(SettingsError, match=r"a\.png: 64 x 80 px has another aspect ratio"):
        CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_interval_of_a_known_distribution():
    """The mean of 400 normal values has standard error 1 / 20: plus and minus 1.96 of it, to the bootstrap's noise."""
    values = np.random.default_rng(0).standard_normal(400)
    low, high = bootstrap_interval(list(values), [str(i) for i in range(400)], seed=0)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.01)
    assert bootstrap_interval(list(values), [str(i) for i in range(400)], seed=0) == (low, high)
    assert bootstrap_interval(list(values), [str(i) for i in range(400)], seed=1) != (low, high)


def test_patients_are_drawn_not_images():
    """Ten equal images of each patient tell nothing more than one."""
    values = np.random.default_rng(1).standard_normal(30)
    names = [str(i) for i in range(30)]
    once = bootstrap_interval(list(values), names, seed=0)
    often = bootstrap_interval(list(np.repeat(values, 10)), list(np.repeat(names, 10)), seed=0)
    assert often == pytest.approx(once, rel=1e-9)


def test_one_patient_has_no_interval():
    assert bootstrap_interval([1.0, 2.0], ["a", "a"], seed=0) is None


def test_one_patients_table_has_no_brackets(dataset, tiny_bundle, tmp_path):
    """And its JSON is one that every reader takes: NaN is no JSON."""
    path = tmp_path / "t.json"
    arguments = [
        str(a) for a in (dataset, "--part", "train", "--bundle", tiny_bundle, "--device", "cpu", "--json", path)
    ]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "[" not in result.output.split("Table 1")[1]
    rows = json.loads(path.read_text(), parse_constant=pytest.fail)["rows"]
    assert all(set(row["intervals"].values()) == {None} for row in rows)


def test_a_plain_folder_is_equalised_as_the_bundle_asks_a_prepared_one_is_not(dataset):
    plain, prepared = dataset / "test", dataset
    raw, equal = Preprocessing(SIZE), Preprocessing(SIZE, clahe_clip_limit=2.0)
    assert [case.patient for case in read_cases(prepared, "test", raw)] == ["p1", "p1", "p2", "p3"]
    assert [case.patient for case in read_cases(plain, "test", raw)] == ["a", "b", "c", "d"]
    first = [read_cases(folder, "test", prep)[0] for folder in (plain, prepared) for prep in (raw, equal)]
    seen = [case.prepared.cxr_net for case in first]
    np.testing.assert_array_equal(seen[0], seen[2])
    np.testing.assert_array_equal(seen[2], seen[3])
    assert not np.array_equal(seen[0], seen[1])
    np.testing.assert_allclose(first[0].soft_tissue * 2, first[0].prepared.cxr, atol=1e-4)
    assert read_cases(prepared, "train", Preprocessing(32))[0].prepared.cxr_net.shape == (32, 32)


def test_what_cannot_be_judged_is_said(dataset, tmp_path):
    with pytest.raises(SettingsError, match="no pairs in val"):
        read_cases(dataset, "val", Preprocessing(SIZE))
    with pytest.raises(SettingsError, match="no pairs NAME_cxr"):
        read_cases(tmp_path, "test", Preprocessing(SIZE))
    (dataset / "test" / "c_soft_tissue.png").unlink()
    with pytest.raises(InputFailed, match=r"c_soft_tissue.png: cannot be read"):
        read_cases(dataset, "test", Preprocessing(SIZE))
    (dataset / "dataset.json").write_text("{}")
    with pytest.raises(SettingsError, match=r"dataset.json: not the record of a data set \(KeyError\)"):
        read_cases(dataset, "test", Preprocessing(SIZE))


def test_a_network_that_does_not_fit_is_refused(tmp_path):
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(SettingsError, match=r"text.onnx: "):
        load_comparator(tmp_path / "text.onnx", CPU)
    write_network(tmp_path / "small.onnx", 1.0, size=32)
    cxr = chest(SIZE, SIZE)
    case = Case("a", "p", prepare(cxr, Preprocessing(SIZE)), cxr, 16, b"", "")
    small = load_comparator(tmp_path / "small.onnx", CPU)
    with pytest.raises(SettingsError, match=r"small.onnx: made for images of 32 px, the bundle's are 64 px"):
        small(case)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here ONNX Runtime may have CUDA")
def test_the_device_asked_for_is_used_or_refused(tmp_path):
    write_network(tmp_path / "x.onnx", 1.0)
    with pytest.raises(SettingsError, match="no CUDAExecutionProvider here"):
        load_comparator(tmp_path / "x.onnx", torch.device("cuda", 0))


@pytest.mark.parametrize("enhance", [True, False])
def test_table_1_has_stage_2_as_the_bundle_has(dataset, tiny_bundle, monkeypatch, enhance):
    model = open_bundle(str(tiny_bundle))
    seen = replace(model, manifest=replace(model.manifest, enhance=enhance))
    monkeypatch.setattr("benchmarks.table1.open_bundle", lambda _: seen)
    result = CliRunner().invoke(app, [str(dataset), "--device", "cpu"], catch_exceptions=False)
    first, second = result.output.split("Table 2")
    assert (STAGE_1 in first) is not enhance
    assert all(f"\n{name} " in second for name in (STAGE_1, BOTH))


def test_what_table_1_cannot_use_or_write_is_said_before_anything_is_judged(dataset, tiny_bundle, tmp_path):
    (tmp_path / "empty").mkdir()
    for extra, message in (
        (["--comparators", tmp_path / "empty"], r"empty: no NAME\.onnx;"),
        (["--json", tmp_path / "nowhere" / "t.json"], "t.json cannot be written"),
    ):
        arguments = [str(a) for a in (dataset, "--bundle", tiny_bundle, "--device", "cpu", *extra)]
        with pytest.raises(SettingsError, match=message):
            CliRunner().invoke(app, arguments, catch_exceptions=False)
