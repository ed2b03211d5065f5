"""Which file belongs to which: by path, stem and study, and never by guessing."""

import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from synthetic import chest, dataset, save, stored

from bsdiff_rt.errors import SettingsError
from train.pairing import Source, match_sources, pair_files


@pytest.fixture
def folders(tmp_path):
    for name in ("cxr", "soft"):
        (tmp_path / name).mkdir()
    return tmp_path / "cxr", tmp_path / "soft"


def png(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.eye(64, dtype=np.uint8))


def dicom(path, study, patient="P"):
    path.parent.mkdir(parents=True, exist_ok=True)
    elements = {"StudyInstanceUID": study, "PatientID": patient}
    save(path, dataset(stored(chest(), 12), **elements))


def pairs(folders, cxr_suffix="_cxr", soft_suffix="_soft_tissue"):
    matches, unmatched = pair_files(*folders, cxr_suffix, soft_suffix)
    found = [(each.name, each.cxr.relative, each.soft_tissue.relative, each.matched_by) for each in matches]
    return found, {(each.role, each.file): each.reason for each in unmatched}


def test_by_relative_path_then_stem_without_suffixes(folders):
    cxr, soft = folders
    png(cxr / "a" / "1_cxr.png")
    png(cxr / "b" / "1_cxr.png")
    png(cxr / "x" / "7.png")
    png(soft / "a" / "1_soft_tissue.png")
    png(soft / "b" / "1.tif")
    png(soft / "y" / "7_soft_tissue.png")
    (cxr / "notes.txt").write_text("no image")
    found, left = pairs(folders)
    assert found == [
        ("a_1", "a/1_cxr.png", "a/1_soft_tissue.png", "path"),
        ("b_1", "b/1_cxr.png", "b/1.tif", "path"),
        ("x_7", "x/7.png", "y/7_soft_tissue.png", "stem"),
    ]
    assert left == {}


def test_other_suffixes(folders):
    cxr, soft = folders
    png(cxr / "1-x.png")
    png(soft / "1-s.png")
    assert pairs(folders, "-x", "-s")[0] == [("1", "1-x.png", "1-s.png", "path")]
    assert pairs(folders)[0] == []


def test_a_stem_two_files_share_is_not_guessed(folders):
    """One of the two is out of the question by its path; the other might be, but only might."""
    cxr, soft = folders
    for name in ("a/1", "b/1"):
        png(cxr / f"{name}.png")
    png(soft / "a/1.png")
    png(soft / "c/1.png")
    found, left = pairs(folders)
    assert [entry[0] for entry in found] == ["a_1"]
    assert left == {
        ("cxr", "b/1.png"): "ambiguous: 2 X-rays and 2 soft-tissue images share its stem",
        ("soft_tissue", "c/1.png"): "ambiguous: 2 soft-tissue images and 2 X-rays share its stem",
    }


def test_two_formats_of_one_xray_are_ambiguous(folders):
    cxr, soft = folders
    png(cxr / "1.png")
    png(cxr / "1.tif")
    png(soft / "1.png")
    found, left = pairs(folders)
    assert found == []
    assert len(left) == 3
    assert left["cxr", "1.tif"] == "ambiguous: 2 X-rays and 1 soft-tissue images share its path"


def test_by_study_where_names_say_nothing(folders):
    cxr, soft = folders
    dicom(cxr / "im1", "1.2.1")
    dicom(cxr / "im2", "1.2.2")
    dicom(soft / "im2001.dcm", "1.2.2")
    dicom(soft / "im2002.dcm", "1.2.1")
    found, left = pairs(folders)
    assert [entry[1:] for entry in found] == [("im1", "im2002.dcm", "study"), ("im2", "im2001.dcm", "study")]
    assert left == {}


def test_several_images_of_a_study_are_ambiguous(folders):
    cxr, soft = folders
    dicom(cxr / "im1", "1.2.1")
    dicom(cxr / "im2", "1.2.1")
    dicom(soft / "im9", "1.2.1")
    found, left = pairs(folders)
    assert found == []
    assert set(left.values()) == {
        "ambiguous: 2 X-rays and 1 soft-tissue images share its study",
        "ambiguous: 1 soft-tissue images and 2 X-rays share its study",
    }


def test_the_same_name_in_another_study_or_of_another_patient_is_no_pair(folders):
    cxr, soft = folders
    dicom(cxr / "im1", "1.2.1")
    dicom(soft / "im1", "1.2.2")
    dicom(cxr / "im2", "1.2.3", "SECRET-A")
    dicom(soft / "im2", "1.2.3", "SECRET-B")
    found, left = pairs(folders)
    assert found == []
    said = "of the same path is of another study or patient, by its DICOM header"
    assert left["cxr", "im1"] == left["cxr", "im2"] == f"the soft-tissue image {said}"
    assert left["soft_tissue", "im2"] == f"the X-ray {said}"


def test_swapped_names_are_put_right_by_the_studies(folders):
    cxr, soft = folders
    dicom(cxr / "im1", "1.2.1")
    dicom(cxr / "im2", "1.2.2")
    dicom(soft / "im1", "1.2.2")
    dicom(soft / "im2", "1.2.1")
    assert [entry[1:] for entry in pairs(folders)[0]] == [("im1", "im2", "study"), ("im2", "im1", "study")]


def test_what_has_no_partner_is_listed(folders):
    cxr, soft = folders
    for name in ("1", "2"):
        png(cxr / f"{name}.png")
    png(soft / "1.png")
    dicom(soft / "9.dcm", "1.2.9")
    assert pairs(folders)[1] == {
        ("cxr", "2.png"): "no soft-tissue image of the same path, stem or study",
        ("soft_tissue", "9.dcm"): "no X-ray of the same path, stem or study",
    }


def test_a_partner_that_is_taken_is_not_given_twice(folders):
    """im1 pairs by path; x, of the same study, could only have the same soft tissue."""
    cxr, soft = folders
    dicom(cxr / "im1", "1.2.1")
    png(soft / "im1.png")
    dicom(soft / "x.dcm", "1.2.1")
    found, left = pairs(folders)
    assert [entry[3] for entry in found] == ["path"]
    assert left == {("soft_tissue", "x.dcm"): "the X-ray of the same study belongs to another soft-tissue image"}


def test_names_stay_apart(folders):
    for folder in folders:
        png(folder / "a_b" / "c.png")
        png(folder / "a" / "b_c.png")
    assert [entry[0] for entry in pairs(folders)[0]] == ["a_b_c", "a_b_c-2"]


def test_one_folder_holds_both(tmp_path):
    png(tmp_path / "1_cxr.png")
    png(tmp_path / "1_soft_tissue.png")
    png(tmp_path / "1_bone.png")
    found, left = pairs((tmp_path, tmp_path))
    assert found == [("1", "1_cxr.png", "1_soft_tissue.png", "path")]
    assert left == {("unknown", "1_bone.png"): "its name ends neither in _cxr nor in _soft_tissue"}
    for suffixes in (("", "_s"), ("_s", ""), ("_s", "_s")):
        with pytest.raises(SettingsError, match="two different suffixes"):
            pair_files(tmp_path, tmp_path, *suffixes)


def test_a_damaged_header_says_nothing(folders):
    cxr, soft = folders
    png(soft / "1.png")
    (cxr / "1.dcm").write_bytes(b"\0" * 128 + b"DICM\x02\0\0\0UL\xff")
    assert pairs(folders)[0] == [("1", "1.dcm", "1.png", "path")]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(SettingsError, match="no such folder"):
        pair_files(tmp_path, tmp_path / "none", "_cxr", "_soft_tissue")


def test_links_to_folders_are_told_and_hidden_folders_left_out(folders, tmp_path, caplog):
    for folder in folders:
        png(folder / "a" / "1.png")
        png(folder / ".Trash" / "2.png")
        png(tmp_path / "elsewhere" / folder.name / "3.png")
        (folder / "b").symlink_to(tmp_path / "elsewhere" / folder.name)
    matches, unmatched = pair_files(*folders, "_cxr", "_soft_tissue")
    assert ([one.name for one in matches], unmatched) == (["a_1"], [])
    assert caplog.text.count("a link to a folder is not followed") == 2


def test_thousands_without_partner_take_no_time():
    """4000 of each kind took 43 s while each file looked at all others."""
    ours, theirs = ([Source(Path(n), n, n) for n in (f"{kind}{i}" for i in range(4000))] for kind in "cs")
    started = time.process_time()
    matches, left = match_sources(ours, theirs)
    assert (len(matches), len(left)) == (0, 8000)
    assert len(match_sources(ours, ours)[0]) == 4000
    assert time.process_time() - started < 5
