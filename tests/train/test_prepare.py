"""From folders of files to a data set: every pair's fate, the split by patient, the files and what training reads."""

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from synthetic import SECRETS, dataset, save, stored
from typer.testing import CliRunner

from bsdiff_rt.config import Preprocessing
from bsdiff_rt.errors import InputRefused, SettingsError
from bsdiff_rt.formats.dicom_in import read_dicom
from bsdiff_rt.formats.raster import read_raster
from bsdiff_rt.imaging.network_input import to_network
from train.__main__ import app
from train.augment import Augmentation
from train.contact_sheet import CELL_PX, GAP_PX, TEXT_PX, Row, contact_sheet
from train.data import load_dataset, load_pair, xray_digest
from train.pairing import Match, Source
from train.phantoms import draw_phantom
from train.prepare import PrepareOptions, identify_patient, parse_split, prepare, read_exclusions, split_patients

SIZE_PX = 64
OPTIONS = PrepareOptions(size=SIZE_PX)


def write(path, picture, bits=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.rint(picture * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16))


def moved(picture, x, y):
    shift = np.array([[1.0, 0, x], [0, 1, y]])
    return cv2.warpAffine(picture, shift, picture.shape[::-1], borderMode=cv2.BORDER_REPLICATE)


@pytest.fixture(scope="module")
def drawn():
    """Phantoms whose edges correlate well, 256 px: X-ray and soft tissue by seed."""
    return {seed: draw_phantom(seed, 256) for seed in (0, 4, 5)}


@pytest.fixture(scope="module")
def archive(tmp_path_factory, drawn):
    """Two folders: good pairs of three patients, one moved, one of two patients, one damaged, one without partner."""
    root = tmp_path_factory.mktemp("archive")
    cxr, soft = root / "cxr", root / "soft"
    for patient, seed in (("ann", 0), ("bob", 4), ("cid", 5)):
        for visit in (1, 2):
            write(cxr / f"{patient}-{visit}.png", drawn[seed].cxr)
            write(soft / f"{patient}-{visit}.png", moved(drawn[seed].soft_tissue, 8 if visit == 2 else 0, 0))
    write(cxr / "dan-1.png", drawn[0].cxr)
    write(soft / "dan-1.png", drawn[5].soft_tissue)
    write(cxr / "eve-1.png", drawn[0].cxr)
    (soft / "eve-1.png").write_bytes((soft / "ann-1.png").read_bytes()[:-40])
    write(cxr / "fay-1.png", drawn[0].cxr)
    return cxr, soft


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def record(folder):
    return json.loads((folder / "dataset.json").read_text())


@pytest.fixture(scope="module")
def made(archive, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "set"
    listed = folder.parent / "exclude.txt"
    listed.write_text("# seen by two readers\ncid-2 # rotated\n\n")
    options = ("--size", SIZE_PX, "--patient-pattern", "^([a-z]+)-", "--exclude", listed, "--split", "1:1:1")
    result = run("prepare", *archive, "-o", folder, *options)
    return folder, result


def test_each_pair_has_its_fate(made):
    folder, result = made
    assert result.exit_code == 3
    pairs = {pair["name"]: pair for pair in record(folder)["pairs"]}
    status = {name: pair["status"] for name, pair in pairs.items()}
    used = dict.fromkeys(("ann-1", "ann-2", "bob-1", "bob-2", "cid-1"), "used")
    assert status == used | {"cid-2": "excluded", "dan-1": "bad", "eve-1": "bad"}
    assert pairs["cid-2"]["reason"] == "rotated"
    assert "less than 0.50" in pairs["dan-1"]["reason"]
    assert "truncated" in pairs["eve-1"]["reason"]
    (left,) = record(folder)["unmatched"]
    assert (left["role"], left["file"]) == ("cxr", "fay-1.png")
    for said in ("bad  dan-1: edges", "excluded  cid-2: rotated", "unmatched  cxr fay-1.png: no soft-tissue"):
        assert said in result.stdout


def test_what_moved_was_registered_and_what_did_not_was_left(made, drawn):
    folder, _ = made
    for pair in record(folder)["pairs"]:
        if pair["status"] != "used":
            continue
        lay = pair["registration"]
        second = pair["name"].endswith("2")
        assert lay["applied"] == second
        # 8 px of 256 are 2 of 64; the phantom's own pull is below 0.2 of 64.
        assert lay["displacement_px"] == pytest.approx(2.0 if second else 0.0, abs=0.2)
        if second:
            assert lay["correlation_after"] > lay["correlation_before"] + 0.2
            assert lay["matrix"][0][2] == pytest.approx(8, abs=1)
            seed = {"ann": 0, "bob": 4}[pair["name"][:3]]
            truth = cv2.resize(drawn[seed].soft_tissue, (SIZE_PX, SIZE_PX), interpolation=cv2.INTER_AREA)
            stored_as = folder / pair["part"] / f"{pair['name']}_soft_tissue.png"
            found = cv2.imread(str(stored_as), cv2.IMREAD_UNCHANGED) / 65535
            inner = slice(6, -6)
            assert np.abs(found - truth)[inner, inner].mean() < 0.01


def test_no_patient_is_in_two_parts(made):
    folder, _ = made
    document = record(folder)
    parts = [set(document["patients"][part]) for part in ("train", "val", "test")]
    assert [len(part) for part in parts] == [1, 1, 1]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    for pair in document["pairs"]:
        if pair["status"] == "used":
            assert pair["patient"] in document["patients"][pair["part"]]
    together = {pair["name"]: pair["part"] for pair in document["pairs"]}
    assert together["ann-1"] == together["ann-2"]
    assert together["bob-1"] == together["bob-2"]


def test_the_files_are_those_of_the_record(made):
    folder, _ = made
    expected = {
        f"{pair['part']}/{pair['name']}_{role}.png"
        for pair in record(folder)["pairs"]
        if pair["status"] == "used"
        for role in ("cxr", "soft_tissue")
    }
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == expected | {"dataset.json", "contact_sheet.png"}
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".prepare")] == []


def test_training_reads_the_parts(made):
    folder, _ = made
    part = next(pair["part"] for pair in record(folder)["pairs"] if pair["name"] == "ann-1")
    pair = next(each for each in load_dataset(folder, part) if each.name == "ann-1")
    assert pair.cxr.shape == pair.tone_matched.shape == (SIZE_PX, SIZE_PX)
    stored_as = cv2.imread(str(folder / part / "ann-1_cxr.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_allclose(pair.cxr, stored_as / 65535, atol=1e-6)
    assert load_dataset(folder, part, 32)[0].cxr.shape == (32, 32)


def test_a_mask_in_a_data_set_counts_as_beside_a_pair(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "set")
    part = next(pair["part"] for pair in record(folder)["pairs"] if pair["name"] == "ann-1")
    mask = np.zeros((SIZE_PX, SIZE_PX), np.uint8)
    mask[SIZE_PX // 3 : SIZE_PX // 2, SIZE_PX // 4 : SIZE_PX // 2] = 255
    without = next(pair for pair in load_dataset(folder, part) if pair.name == "ann-1")
    cv2.imwrite(str(folder / part / "ann-1_keep.png"), mask)
    for size in (None, 32):
        with_mask = next(pair for pair in load_dataset(folder, part, size) if pair.name == "ann-1")
        roles = (folder / part / f"ann-1_{role}.png" for role in ("cxr", "soft_tissue"))
        expected = load_pair("ann-1", *roles, size=size or SIZE_PX)
        np.testing.assert_allclose(with_mask.soft_tissue, expected.soft_tissue, atol=1e-5)
    whole = next(pair for pair in load_dataset(folder, part) if pair.name == "ann-1")
    assert not np.array_equal(whole.soft_tissue, without.soft_tissue)
    cv2.imwrite(str(folder / part / "ann-1_keep.png"), mask[:-1])
    with pytest.raises(SettingsError, match=r"the mask ann-1_keep\.png is"):
        load_dataset(folder, part)


def test_training_on_a_data_set(made, tmp_path, monkeypatch):
    """The train part is trained on, the val part validated on, and the test part is not touched."""
    folder, _ = made
    given = []
    monkeypatch.setattr("train.commands.denoiser.train_denoiser", lambda *arguments: given.append(arguments))
    stage1 = ("denoiser", "-o", tmp_path, "--preset", "tiny", "--size", 32, "--phantoms", 0, "--steps", 1)
    assert run(*stage1, "--dataset", folder, "--augment", "paper").exit_code == 0
    ((_, _, _, batches, validation, *_),) = given
    parts = {
        part: [pair["name"] for pair in record(folder)["pairs"] if pair["part"] == part] for part in ("train", "val")
    }
    assert [pair.name for pair in batches.real] == parts["train"]
    assert [pair.name for pair in validation.groups["pairs"]] == parts["val"]
    assert batches.real[0].cxr.shape == (SIZE_PX, SIZE_PX)
    assert validation.groups["pairs"][0].cxr.shape == (32, 32)
    assert batches.augmentation == Augmentation.of("paper")
    with pytest.raises(SettingsError, match="without --pairs"):
        run(*stage1, "--dataset", folder, "--pairs", folder / "train")
    with pytest.raises(SettingsError, match="'shear' is not known"):
        run(*stage1, "--dataset", folder, "--augment", "flip,shear")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "dataset.json").write_text('{"settings": {"size": 64, "clahe": 0}, "pairs": []}')
    with pytest.raises(SettingsError, match="its train part is empty"):
        run(*stage1, "--dataset", empty)


def test_the_same_seed_makes_the_same_data_set(archive, tmp_path):
    pattern = {"patient_pattern": "^([a-z]+)-", "register": False, "min_correlation": -1.0}
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        prepare(*archive, folder, PrepareOptions(size=32, **pattern), {"eve-1": "damaged"})
    assert (folders[0] / "dataset.json").read_bytes() == (folders[1] / "dataset.json").read_bytes()
    for pair in record(folders[0])["pairs"]:
        if pair["part"]:
            file = f"{pair['part']}/{pair['name']}_soft_tissue.png"
            assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()
            assert not pair["registration"]["applied"]  # --no-register


def test_nothing_wrong_means_exit_code_0_and_folders_may_be_one(drawn, tmp_path):
    source = tmp_path / "in"
    for seed in (0, 4):
        write(source / f"{seed}_cxr.png", drawn[seed].cxr)
        write(source / f"{seed}_soft_tissue.png", drawn[seed].soft_tissue)
    output = tmp_path / "deep" / "out"
    result = run("prepare", source, source, "-o", output, "--size", 32)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == "train  1 pairs of 1 patients"
    assert {pair["status"] for pair in record(output)["pairs"]} == {"used"}


def test_dicom_pairs_are_read_as_inference_reads_them_and_name_nobody(drawn, tmp_path):
    """MONOCHROME1 with a window on one side, plain on the other; two studies of one patient stay together."""
    for number in (1, 2, 3):
        study = {"StudyInstanceUID": f"1.2.3.{number}", "PatientID": "SECRET4711" if number < 3 else "other"}
        inverted = {"PhotometricInterpretation": "MONOCHROME1", "WindowCenter": 2000, "WindowWidth": 3000}
        for role, picture in (("cxr", drawn[0].cxr), ("soft", drawn[0].soft_tissue)):
            path = tmp_path / role / f"{role}{number}.dcm"
            path.parent.mkdir(exist_ok=True)
            save(path, dataset(stored(1 - picture, 12), 12, **study, **inverted))
    output = tmp_path / "out"
    options = PrepareOptions(size=SIZE_PX, split=(1, 1, 0), clahe=2.0)
    done = prepare(tmp_path / "cxr", tmp_path / "soft", output, options, {})
    assert done.complete
    assert {entry.matched_by for entry in done.pairs} == {"study"}
    assert [entry.patient for entry in done.pairs] == ["p0001", "p0001", "p0002"]
    assert len({entry.part for entry in done.pairs[:2]}) == 1
    assert done.patients == {"train": 1, "val": 1, "test": 0}
    text = (output / "dataset.json").read_text()
    assert not [secret for secret in SECRETS if secret in text]
    expected, _ = to_network(
        read_dicom(tmp_path / "cxr" / "cxr1.dcm").cxr, Preprocessing(SIZE_PX, clahe_clip_limit=2.0)
    )
    found = next(pair for pair in load_dataset(output, done.pairs[0].part) if pair.name == "cxr1")
    np.testing.assert_allclose(found.cxr * 2 - 1, expected, atol=4e-5)  # rounded to 16 bits: half of 2 / 65535


def test_a_pair_that_cannot_be_registered_is_bad_and_shown(drawn, tmp_path):
    dot = np.zeros((256, 256))
    dot[0, 0] = 1
    write(tmp_path / "c" / "1.png", drawn[0].cxr)
    write(tmp_path / "s" / "1.png", dot)
    done = prepare(tmp_path / "c", tmp_path / "s", tmp_path / "out", OPTIONS, {})
    assert done.pairs[0].status == "bad"
    assert "does not converge" in done.pairs[0].reason
    assert (tmp_path / "out" / "contact_sheet.png").is_file()


def test_shares_of_patients():
    people = {f"stem {i}" for i in range(120)}
    part_of = split_patients(people, (7, 2, 1), 0)
    counts = [sum(part == name for part in part_of.values()) for name in ("train", "val", "test")]
    assert counts == [84, 24, 12]
    ten = list(split_patients({f"stem {i}" for i in range(10)}, (7, 2, 1), 0).values())
    assert [ten.count(part) for part in ("train", "val", "test")] == [7, 2, 1]
    assert split_patients(people, (7, 2, 1), 1) != part_of
    assert set(split_patients(people, (1, 0, 0), 0).values()) == {"train"}


def test_a_new_patient_moves_at_most_one_over_each_border():
    people = {f"stem {i}" for i in range(50)}
    before = split_patients(people, (7, 2, 1), 3)
    for i in range(20):
        after = split_patients(people | {f"new {i}"}, (7, 2, 1), 3)
        assert sum(after[one] != before[one] for one in people) <= 2


def test_who_a_pair_is_of():
    def match(cxr_patient=None, soft_patient=None, key="a5/p7_1", study=None):
        cxr = Source(Path("x"), f"{key}.png", key, patient=cxr_patient, study=study)
        return Match("a_p7_1", cxr, Source(Path("y"), "b", "b", patient=soft_patient), "path")

    assert identify_patient(match("1", "1"), None) == "PatientID 1"
    assert identify_patient(match(None, "2", study="1.2"), None) == "PatientID 2"
    assert identify_patient(match(study="1.2"), None) == "study 1.2"
    # Asked for, it wins: a de-identified archive may have one PatientID for all.
    assert identify_patient(match("ANONYMOUS"), re.compile(r"(p\d+)_")) == "pattern p7"
    assert identify_patient(match(), re.compile(r"^(a\d)/")) == "pattern a5"
    assert identify_patient(match(), re.compile(r"(p\d+)_")) == "pattern p7"
    assert identify_patient(match(), None) == "folder a5"
    assert identify_patient(match(key="p7_1"), None) == "stem p7_1"
    for unfit in ("(q)", "(q?)p"):
        with pytest.raises(InputRefused, match="does not fit its name"):
            identify_patient(match(), re.compile(unfit))


def test_a_pattern_that_does_not_fit_refuses_the_pair(drawn, tmp_path):
    for name in ("p1_a", "zz"):
        write(tmp_path / "c" / f"{name}.png", drawn[0].cxr)
        write(tmp_path / "s" / f"{name}.png", drawn[0].soft_tissue)
    options = PrepareOptions(size=32, patient_pattern=r"^(p\d)")
    done = prepare(tmp_path / "c", tmp_path / "s", tmp_path / "out", options, {})
    assert [(entry.name, entry.status) for entry in done.pairs] == [("p1_a", "used"), ("zz", "bad")]
    assert "--patient-pattern" in done.pairs[1].reason


def test_few_patients_and_unnamed_ones_are_warned_of(drawn, tmp_path, caplog):
    write(tmp_path / "c" / "1.png", drawn[0].cxr)
    write(tmp_path / "s" / "1.png", drawn[0].soft_tissue)
    prepare(tmp_path / "c", tmp_path / "s", tmp_path / "out", PrepareOptions(size=32, split=(1, 1, 0)), {})
    assert "the train part is empty" not in caplog.text
    assert "the val part is empty: 1 patients are too few" in caplog.text
    assert "the test part" not in caplog.text
    assert "1 pairs name no patient" in caplog.text


def test_settings_that_cannot_be_used(archive, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "none").mkdir()
    cases = [
        ((*archive, tmp_path / "full", OPTIONS, {}), "not empty"),
        ((*archive, tmp_path / "full" / "file", OPTIONS, {}), "not empty"),
        ((*archive, archive[1] / "out", OPTIONS, {}), "lies in"),
        ((archive[0], tmp_path / "none", tmp_path / "out", OPTIONS, {}), "no file of one belongs"),
        ((*archive, tmp_path / "out", OPTIONS, {"ann-7": "typo"}), "ann-7: on the exclusion list"),
        ((*archive, tmp_path / "out", PrepareOptions(patient_pattern="("), {}), "not a regular expression"),
        ((*archive, tmp_path / "out", PrepareOptions(patient_pattern="a"), {}), "has no group"),
    ]
    for arguments, message in cases:
        with pytest.raises(SettingsError, match=message):
            prepare(*arguments)
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_nothing_behind(archive, tmp_path, monkeypatch):
    monkeypatch.setattr("train.prepare.write_png", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        prepare(*archive, tmp_path / "out", OPTIONS, {})
    assert list(tmp_path.iterdir()) == []


def test_the_split_as_text():
    assert parse_split("7:2:1") == (7, 2, 1)
    assert parse_split("0.8:0.2:0") == (0.8, 0.2, 0)
    for wrong in ("7:2", "0:1:1", "7:-1:1", "a:b:c", "inf:1:1", "nan:1:1"):
        with pytest.raises(SettingsError, match="such as 7:2:1"):
            parse_split(wrong)


def test_the_exclusion_list(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("# note\n a b \n\nsub/c.png # blurred # twice\nbed#4.png\n", encoding="utf-8")
    listed = "on the exclusion list"
    assert read_exclusions(path) == {"a b": listed, "sub/c.png": "blurred # twice", "bed#4.png": listed}
    with pytest.raises(SettingsError, match="cannot be read"):
        read_exclusions(tmp_path / "none")


@pytest.mark.parametrize("name", ["sub_1", "sub/1", "sub/1_cxr.png", "1_cxr.png", "1", "1_soft_tissue.png"])
def test_a_pair_goes_by_each_of_its_names(drawn, tmp_path, name):
    write(tmp_path / "c" / "sub" / "1_cxr.png", drawn[0].cxr)
    write(tmp_path / "s" / "sub" / "1_soft_tissue.png", drawn[0].soft_tissue)
    done = prepare(tmp_path / "c", tmp_path / "s", tmp_path / "out", OPTIONS, {name: "asked"})
    assert done.pairs[0].status == "excluded"
    assert not (tmp_path / "out" / "contact_sheet.png").exists()  # nothing to show


def test_the_contact_sheet_shows_bad_pairs_first_then_the_worst(caplog, monkeypatch):
    def row(name, used, correlation, grey):
        lay = {"correlation_before": 0.1, "correlation_after": correlation, "displacement_px": 1.0, "applied": used}
        picture = np.full((64, 64), grey, np.float32)
        return Row(name, used, lay, picture, picture / 2)

    rows = [row("good", True, 0.9, 0.2), row("ärgste", False, 0.6, 0.6), row("poor", True, 0.5, 0.4)]
    sheet = cv2.imdecode(np.frombuffer(contact_sheet(rows), np.uint8), cv2.IMREAD_COLOR)
    assert sheet.shape == (CELL_PX + TEXT_PX + GAP_PX, 3 * (3 * CELL_PX + GAP_PX), 3)
    middle = TEXT_PX + CELL_PX // 2
    steps = [i * (3 * CELL_PX + GAP_PX) for i in range(3)]
    assert [int(sheet[middle, x + CELL_PX // 2, 0]) for x in steps] == [153, 102, 51]
    assert [int(sheet[middle, x + CELL_PX * 3 // 2, 0]) for x in steps] == pytest.approx([76, 51, 26], abs=1)
    assert {int(sheet[middle, x + CELL_PX * 5 // 2, 0]) for x in steps} == {128}  # the median difference
    text = sheet[:TEXT_PX]
    reds = [int(text[:, x : x + 3 * CELL_PX, 2].max()) - int(text[:, x : x + 3 * CELL_PX, 0].max()) for x in steps]
    assert reds[0] > 100
    assert reds[1:] == [0, 0]
    monkeypatch.setattr("train.contact_sheet.PAIRS", 2)
    few = cv2.imdecode(np.frombuffer(contact_sheet(rows), np.uint8), cv2.IMREAD_COLOR)
    assert few.shape[1] == 2 * (3 * CELL_PX + GAP_PX)
    assert "worst 2 of 3" in caplog.text


def test_four_pairs_make_two_lines():
    lay = {"correlation_before": 0.1, "correlation_after": 0.9, "displacement_px": 1.0, "applied": False}
    row = Row("n", True, lay, np.ones((64, 64), np.float32), np.zeros((64, 64), np.float32))
    sheet = cv2.imdecode(np.frombuffer(contact_sheet([row] * 4), np.uint8), cv2.IMREAD_GRAYSCALE)
    assert sheet.shape[0] == 2 * (CELL_PX + TEXT_PX + GAP_PX)
    assert sheet[sheet.shape[0] // 2 :, 3 * CELL_PX + GAP_PX :].max() == 0


def test_a_data_set_that_is_moved_still_reads(made, tmp_path):
    folder, _ = made
    shutil.copytree(folder, tmp_path / "copy")
    assert sum(len(load_dataset(tmp_path / "copy", part)) for part in ("train", "val", "test")) == 5


def test_a_folder_for_each_patient(drawn, tmp_path):
    for patient in ("P1", "P2", "P3", "P4"):
        for number in (1, 2):
            for role in ("cxr", "soft_tissue"):
                write(tmp_path / role / patient / f"{number}.png", getattr(drawn[0], role))
    options = PrepareOptions(size=32, register=False, min_correlation=-1.0, split=(1.0, 1.0, 0.0))
    done = prepare(tmp_path / "cxr", tmp_path / "soft_tissue", tmp_path / "out", options, {})
    assert done.patients == {"train": 2, "val": 2, "test": 0}
    assert all(len({e.part for e in done.pairs if e.cxr.startswith(f"P{n}")}) == 1 for n in range(1, 5))


def test_an_x_ray_paired_with_itself_is_bad_and_one_that_comes_twice_is_told(drawn, tmp_path, caplog):
    for name, soft_tissue in (("a", drawn[0].soft_tissue), ("b", drawn[0].soft_tissue), ("c", drawn[4].cxr)):
        write(tmp_path / "c" / f"{name}.png", drawn[4].cxr if name == "c" else drawn[0].cxr)
        write(tmp_path / "s" / f"{name}.png", soft_tissue)
    done = prepare(tmp_path / "c", tmp_path / "s", tmp_path / "out", PrepareOptions(size=32, split=(1, 0, 0)), {})
    assert [(entry.name, entry.status) for entry in done.pairs] == [("a", "used"), ("b", "used"), ("c", "bad")]
    assert done.pairs[2].reason == "X-ray and soft tissue are the same image"
    assert "b: the same X-ray as a. Leave one out with --exclude" in caplog.text
    assert done.pairs[0].digest == done.pairs[1].digest != done.pairs[2].digest


@pytest.mark.parametrize(("size", "clahe"), [(32, 0.0), (64, 2.0)])
def test_an_x_ray_keeps_its_digest_whatever_is_made_of_it(drawn, tmp_path, size, clahe):
    write(tmp_path / "c" / "a.png", drawn[0].cxr)
    write(tmp_path / "s" / "a.png", drawn[0].soft_tissue)
    options = PrepareOptions(size=size, clahe=clahe, split=(1, 0, 0))
    prepare(tmp_path / "c", tmp_path / "s", tmp_path / "out", options, {})
    expected = xray_digest(read_raster(tmp_path / "c" / "a.png").cxr)
    assert [pair.digest for pair in load_dataset(tmp_path / "out", "train")] == [expected]


def test_a_pattern_that_parts_a_patient_id_is_warned_of(drawn, tmp_path, caplog):
    for side, picture in (("c", drawn[0].cxr), ("s", drawn[0].soft_tissue)):
        (tmp_path / side).mkdir()
        for number in (1, 2):
            study = {"PatientID": "ANN", "StudyInstanceUID": f"1.2.3.{number}"}
            save(tmp_path / side / f"p{number}_a.dcm", dataset(stored(picture, 12), 12, **study))
    options = PrepareOptions(size=32, patient_pattern=r"^(p\d)")
    prepare(tmp_path / "c", tmp_path / "s", tmp_path / "out", options, {})
    assert "--patient-pattern splits 1 of 1 PatientIDs" in caplog.text


def test_a_list_from_a_windows_editor_is_read(tmp_path):
    listed = tmp_path / "exclude.txt"
    listed.write_text("ann-1 # moved\n", encoding="utf-8-sig")
    assert read_exclusions(listed) == {"ann-1": "moved"}


def test_swapped_folders_are_bad(archive, tmp_path):
    cxr, soft = archive
    result = run("prepare", soft, cxr, "-o", tmp_path / "set", "--size", SIZE_PX)
    assert result.exit_code == 3
    assert "bad  ann-1: the soft tissue shows the bones, not the X-ray: are they swapped?" in result.stdout
    assert {pair["status"] for pair in record(tmp_path / "set")["pairs"]} == {"bad"}
    result = run("prepare", soft, cxr, "-o", tmp_path / "taken", "--size", SIZE_PX, "--min-correlation", -1)
    assert {"used"} == {pair["status"] for pair in record(tmp_path / "taken")["pairs"] if pair["name"] != "eve-1"}


def test_a_frame_is_left_out_of_both_as_in_inference(drawn, tmp_path):
    """The soft tissue's own border has the place of the X-ray's, whatever its grey."""
    frame = ((20, 12), (30, 30))
    write(tmp_path / "c" / "a.png", np.pad(drawn[4].cxr, frame, constant_values=1.0))
    write(tmp_path / "s" / "a.png", np.pad(drawn[4].soft_tissue, frame, constant_values=0.0))
    everything = ("-o", tmp_path / "set", "--size", SIZE_PX, "--no-register", "--min-correlation", -1)
    assert run("prepare", tmp_path / "c", tmp_path / "s", *everything).exit_code == 0
    (pair,) = load_dataset(tmp_path / "set", "train")
    for found, known in ((pair.cxr, drawn[4].cxr), (pair.soft_tissue, drawn[4].soft_tissue)):
        expected, _ = to_network(known, Preprocessing(SIZE_PX))
        np.testing.assert_allclose(found, (expected + 1) / 2, atol=4e-5)
    assert record(tmp_path / "set")["settings"]["trim"] is True
    everything = ("-o", tmp_path / "whole", *everything[2:], "--no-trim")
    assert run("prepare", tmp_path / "c", tmp_path / "s", *everything).exit_code == 0
    (pair,) = load_dataset(tmp_path / "whole", "train")
    assert (pair.cxr[0] == 1).all()
