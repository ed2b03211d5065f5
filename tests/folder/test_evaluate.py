"""Which files are compared with which, and that what is compared has one scale."""

from __future__ import annotations

import json
import math
import shutil

import cv2
import numpy as np
import pytest
from helpers import dicom, png
from synthetic import SECRETS, chest, dataset, save, stored

from bsdiff_rt import bundle as bundles
from bsdiff_rt.bundle import MANIFEST, open_bundle, to_signed_json
from bsdiff_rt.errors import BundleError, InputFailed, InputRefused, SettingsError
from bsdiff_rt.folder.evaluate import DIGEST_DIGITS, Match, evaluate, match, read_trained_on
from bsdiff_rt.formats.dicom_in import read_dicom
from bsdiff_rt.formats.radiograph import hash_grey
from bsdiff_rt.formats.raster import read_raster, write_png
from bsdiff_rt.imaging.lungs import find_lungs
from bsdiff_rt.imaging.metrics import quality

SOFT_TISSUE = chest(96, 80, seed=1) * np.float32(0.9)
CXR = np.clip(SOFT_TISSUE + 0.1 * chest(96, 80, seed=2) ** 2, 0, 1).astype(np.float32)
PREDICTED = np.clip(SOFT_TISSUE + 0.03 * chest(96, 80, seed=3), 0, 1).astype(np.float32)


@pytest.fixture
def place(tmp_path):
    """Writes a picture as PNG of so many bits below tmp_path, and returns its path."""

    def write(name, picture, bits=16):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, picture, bits)
        return path

    return write


@pytest.fixture
def three(tmp_path, place):
    """Folders of predictions, truths and X-rays, of two patients."""
    for name in ("p1", "p2"):
        place(f"out/{name}.png", PREDICTED)
        place(f"truth/{name}.png", SOFT_TISSUE)
        place(f"cxr/{name}.png", CXR)
    return tmp_path / "out", tmp_path / "truth", tmp_path / "cxr"


def compare_one(matches, **options):
    """The figures of the one match, or the reason why there are none."""
    (outcome,) = evaluate(matches, **options)
    assert (outcome.quality is None) != (outcome.error is None)
    return outcome.quality or outcome.error


def names(matches):
    return [(one.name, one.predicted.name, one.soft_tissue.name, one.cxr.name) for one in matches]


def test_folders_are_matched_by_stem(three):
    assert names(match(*three)) == [("p1", *["p1.png"] * 3), ("p2", *["p2.png"] * 3)]


def test_three_files_are_one_match_whatever_their_names(place):
    files = place("a.png", PREDICTED), place("b.png", SOFT_TISSUE), place("c.png", CXR)
    assert match(*files) == [Match("a", *files)]


def test_one_file_is_looked_up_in_folders(three):
    out, truth, cxr = three
    assert names(match(out / "p2.png", truth, cxr)) == [("p2", *["p2.png"] * 3)]


def test_roles_in_the_name(tmp_path, place):
    """Phantoms lie as NAME_cxr and NAME_soft_tissue in one folder, and infer keeps the X-ray's name."""
    place("pairs/p1_cxr.png", CXR)
    place("pairs/p1_soft_tissue.png", SOFT_TISSUE)
    place("out/p1_cxr.png", PREDICTED)
    found = match(tmp_path / "out", tmp_path / "pairs", tmp_path / "pairs")
    assert names(found) == [("p1", "p1_cxr.png", "p1_soft_tissue.png", "p1_cxr.png")]


def test_suffixes_and_subfolders_may_differ(tmp_path, place):
    place("out/sub/p1.png", PREDICTED)
    place("truth/p1.png", SOFT_TISSUE).rename(tmp_path / "truth" / "p1.PNG")
    place("cxr/a/b/p1.png", CXR)
    assert len(match(tmp_path / "out", tmp_path / "truth", tmp_path / "cxr")) == 1


def test_dicom_named_by_a_uid(tmp_path, place):
    """infer writes 1.2.3 as 1.2.3.dcm: not every last part of a name is a suffix."""
    dicom(tmp_path / "cxr" / "1.2.3")
    dicom(tmp_path / "cxr" / "1.2.4")
    for name in ("1.2.3", "1.2.4"):
        dicom(tmp_path / "out" / f"{name}.dcm")
        place(f"truth/{name}.png", SOFT_TISSUE)
    found = names(match(tmp_path / "out", tmp_path / "truth", tmp_path / "cxr"))
    assert found == [(name, f"{name}.dcm", f"{name}.png", name) for name in ("1.2.3", "1.2.4")]


def test_what_is_no_result_is_left_out(three):
    out, _, _ = three
    for name in ("preview.png", ".hidden.png"):
        shutil.copy(out / "p1.png", out / name)
    (out / "report.json").write_text("{}")
    (out / "uncertainty").mkdir()
    shutil.copy(out / "p1.png", out / "uncertainty" / "p3.png")
    assert len(match(*three)) == 2


def test_a_truth_without_prediction_does_not_matter(three):
    out, truth, cxr = three
    (out / "p1.png").unlink()
    assert [one.name for one in match(out, truth, cxr)] == ["p2"]


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("truth/p2.png", r"out/p2\.png: no soft-tissue image named p2 in .*truth"),
        ("cxr/p2.png", r"out/p2\.png: no X-ray named p2 in .*cxr"),
        ("out", "out: no such file or folder"),
        ("truth", "truth: no such file or folder"),
        ("cxr", "cxr: no such file or folder"),
        ("out/*", "out: no image to evaluate"),
    ],
)
def test_what_cannot_be_matched(three, tmp_path, gone, message):
    if gone == "out/*":
        for path in (tmp_path / "out").iterdir():
            path.unlink()
    elif (tmp_path / gone).is_dir():
        shutil.rmtree(tmp_path / gone)
    else:
        (tmp_path / gone).unlink()
    with pytest.raises(SettingsError, match=message):
        match(*three)


def test_two_files_of_one_stem(three, place):
    place("out/sub/p1.png", PREDICTED)
    with pytest.raises(SettingsError, match="have the same stem"):
        match(*three)


def test_figures_are_those_of_the_pictures(three):
    expected = quality(*(read_raster(folder / "p1.png").cxr for folder in (three[2], three[1], three[0])))
    rows = list(evaluate(match(*three), size=96))
    assert [row.name for row in rows] == ["p1", "p2"]
    # float32 pictures resized to their own size: no difference at all
    assert rows[0].quality == expected
    assert 0 < expected.bsr < 1


def test_every_picture_is_brought_to_one_size(place, tmp_path):
    files = (
        place("a.png", cv2.resize(PREDICTED, (40, 48), interpolation=cv2.INTER_AREA)),
        place("b.png", cv2.resize(SOFT_TISSUE, (160, 192), interpolation=cv2.INTER_CUBIC)),
        place("c.png", CXR),
    )
    found = compare_one(match(*files), size=48)
    same = place("d.png", PREDICTED), place("e.png", SOFT_TISSUE), files[2]
    expected = compare_one(match(*same), size=48)
    # Resizing twice is not resizing once: half a per cent of the grey range.
    assert found.mse == pytest.approx(expected.mse, abs=0.005**2)
    assert found.bsr == pytest.approx(expected.bsr, abs=0.1)


def test_aspect_ratios_must_agree(place):
    files = place("a.png", PREDICTED), place("b.png", SOFT_TISSUE[:80]), place("c.png", CXR)
    (outcome,) = evaluate(match(*files))
    assert (outcome.name, outcome.quality) == ("a", None)
    error = outcome.error
    assert isinstance(error, SettingsError)
    assert str(error).endswith("differ in aspect ratio (96 x 80, 80 x 80, 96 x 80).")


@pytest.mark.parametrize("cxr_format", ["png", "dicom"])
@pytest.mark.parametrize("bits", [10, 12, 15])
def test_a_result_darker_than_half_its_range_keeps_its_scale(tmp_path, place, bits, cxr_format):
    """A 16-bit PNG does not say its depth. Read by itself, a 12-bit result that stays below 2048 is 11 bits, twice as
    bright as it is; read against its X-ray, it is not."""
    cxr, soft_tissue, predicted = (np.float32(0.45) * image for image in (CXR, SOFT_TISSUE, PREDICTED))
    cxr[0, :8] = 0.7  # more than stray pixels
    assert max(soft_tissue.max(), predicted.max()) < 0.5 < cxr.max()
    if cxr_format == "dicom":
        header = dataset(stored(cxr, bits), bits, WindowCenter=2 ** (bits - 1), WindowWidth=2**bits)
        source = save(tmp_path / "c.dcm", header)
    else:
        source = place("c.png", cxr, bits)
    truth_bits = 16 if cxr_format == "dicom" else bits  # the truth of a DICOM file is nobody's result
    truth = place("b.png", soft_tissue / soft_tissue.max() if cxr_format == "dicom" else soft_tissue, truth_bits)
    found = compare_one(match(place("a.png", predicted, bits), truth, source), size=96)
    if cxr_format == "dicom":
        soft_tissue = soft_tissue / soft_tissue.max()
    expected = quality(cxr, soft_tissue, predicted)
    assert found.bsr == pytest.approx(expected.bsr, abs=0.02)  # rounding to 10 bits
    assert found.mse == pytest.approx(expected.mse, rel=0.02)


def test_a_source_of_8_bits_sets_no_scale(place):
    files = place("a.png", PREDICTED / 4), place("b.png", SOFT_TISSUE / 4, 12), place("c.png", CXR / 4, 8)
    found = compare_one(match(*files), size=96)
    # 12 and 14 bits by themselves: each fills its range
    assert found.ssim < 0.9


def test_dicom_truth_and_prediction(tmp_path):
    """A derived image is refused as input, not as prediction."""
    picture = stored(SOFT_TISSUE, 12)
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    derived = save(
        tmp_path / "a.dcm", dataset(picture, 12, ImageType=["DERIVED", "SECONDARY", "", "BONE_SUPPRESSED"], **window)
    )
    truth = save(tmp_path / "b.dcm", dataset(picture, 12, **window))
    cxr = save(tmp_path / "c.dcm", dataset(stored(CXR, 12), 12, **window))
    found = compare_one(match(derived, truth, cxr), size=96)
    assert found.bsr == 1
    assert found.psnr == math.inf
    with pytest.raises(InputRefused):
        read_dicom(derived)


def test_what_infer_force_made_is_compared(tmp_path):
    lateral = {"WindowCenter": 2048, "WindowWidth": 4096, "ViewPosition": "LL"}
    truth = save(tmp_path / "b.dcm", dataset(stored(SOFT_TISSUE, 12), 12, **lateral))
    cxr = save(tmp_path / "c.dcm", dataset(stored(CXR, 12), 12, **lateral))
    with pytest.raises(InputRefused):
        read_dicom(cxr)
    found = compare_one(match(truth, truth, cxr), size=96)
    assert found.bsr == 1


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_file_that_cannot_be_read_is_named(place, tmp_path, which):
    files = [place("a.png", PREDICTED), place("b.png", SOFT_TISSUE), place("c.png", CXR)]
    files[which].write_bytes(files[which].read_bytes()[:-30])
    error = compare_one(match(*files))
    assert isinstance(error, InputFailed)
    assert str(error).startswith(f"{files[which]}: the PNG file is truncated")
    png(files[which], shape=(20, 20))
    error = compare_one(match(*files))
    assert isinstance(error, InputRefused)
    assert str(error).startswith(f"{files[which]}: the image is 20 x 20 px")


def test_a_bad_file_costs_no_other_its_figures(three):
    expected = list(evaluate(match(*three)))
    (three[0] / "p1.png").write_bytes(b"")
    rows = list(evaluate(match(*three)))
    assert rows[1] == expected[1]
    assert isinstance(rows[0].error, InputFailed)


def test_a_dicom_file_that_cannot_be_read_tells_no_patient(place, tmp_path):
    broken = dicom(tmp_path / "c.dcm")
    broken.write_bytes(broken.read_bytes()[:-500])
    error = compare_one(match(place("a.png", PREDICTED), place("b.png", SOFT_TISSUE), broken))
    assert isinstance(error, InputFailed)
    assert not any(secret in str(error) for secret in SECRETS)


def test_a_truth_at_the_depth_of_its_dicom_x_ray_is_not_taken_for_a_brighter_one(tmp_path, place):
    """A 12-bit truth below 2048, equal to the prediction."""
    cxr, soft_tissue = (np.float32(0.45) * image for image in (CXR, SOFT_TISSUE))
    cxr[0, :8] = 0.7
    source = save(tmp_path / "c.dcm", dataset(stored(cxr, 12), 12, WindowCenter=2048, WindowWidth=4096))
    found = compare_one(match(place("a.png", soft_tissue, 12), place("b.png", soft_tissue, 12), source), size=96)
    assert found.bsr == pytest.approx(1, abs=1e-6)


@pytest.fixture
def trained(bundle_copy, three):
    """A copy of the tiny bundle that was trained on the X-ray of p2."""
    content = json.loads((bundle_copy / MANIFEST).read_text())
    digest = hash_grey(read_raster(three[2] / "p2.png").cxr).hex()[:DIGEST_DIGITS]
    content["training"]["trained_on"] = ["0" * DIGEST_DIGITS, digest]
    (bundle_copy / MANIFEST).write_text(to_signed_json(content))
    return bundle_copy


def test_an_x_ray_that_the_model_was_trained_on_is_named(three, trained, place):
    place("cxr/p1.png", np.clip(CXR + 0.01, 0, 1))  # otherwise both are the same X-ray
    known = read_trained_on(three[0], str(trained))
    assert [(one.name, one.trained_on) for one in evaluate(match(*three), 64, known)] == [("p1", False), ("p2", True)]
    assert not any(one.trained_on for one in evaluate(match(*three), 64))


def test_the_model_is_the_one_that_the_report_names(three, trained, monkeypatch, tmp_path):
    out, report = three[0], three[0] / "report.json"
    assert read_trained_on(out) is None
    for content in ("{", "[]", json.dumps({"bundle": {"sha256": "0" * 64}})):
        report.write_text(content)
        assert read_trained_on(out) is None
    report.write_text(json.dumps({"bundle": {"sha256": open_bundle(trained).sha256}}))
    assert read_trained_on(out) is None  # not shipped
    monkeypatch.setattr(bundles, "BUNDLES", tmp_path)
    assert len(read_trained_on(out)) == len(read_trained_on(out / "p1.png")) == 2
    with pytest.raises(BundleError):
        read_trained_on(out, "absent")


def test_a_bundle_that_states_no_training_images(three, tiny_bundle):
    assert read_trained_on(three[0], str(tiny_bundle)) == frozenset()


def test_only_the_lungs_count(three, place):
    """Outside the mask the result may be anything, such as the bones that software left in the truth."""
    out, truth, cxrs = three
    mask = np.zeros(CXR.shape, np.float32)
    mask[20:60, 10:40] = 1
    place("cxr/p1_lungs.png", mask, bits=8)
    (one, other) = evaluate(match(out, truth, cxrs), size=96, lungs=True)
    stored_pictures = [np.rint(picture * 65535) / 65535 for picture in (CXR, SOFT_TISSUE, PREDICTED)]
    expected = quality(*stored_pictures, mask > 0)
    assert one.quality.as_dict() == pytest.approx(expected.as_dict(), abs=1e-4)
    found = quality(*stored_pictures, find_lungs(stored_pictures[0]))
    assert other.quality.as_dict() == pytest.approx(found.as_dict(), abs=1e-4)
    flat = np.full_like(CXR, 0.5)
    flat[0, 0] = 1
    place("cxr/p2.png", flat)
    outcome = list(evaluate(match(out, truth, cxrs), lungs=True))[1]
    assert "Give the lung fields as p2_lungs.png" in str(outcome.error)
    place("cxr/p1_lungs.png", mask[:50], bits=8)
    assert "another size" in str(next(evaluate(match(out, truth, cxrs), lungs=True)).error)
