"""CT volumes from every format come out in one orientation; a volume of no use says why."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import SimpleITK as sitk
from made_ct import SPACING, make_chest, write_nifti, write_npz, write_series

from bsdiff_rt.errors import InputFailed, InputRefused, SettingsError
from train.drr.body import check_chest, check_geometry, crop_to_body, find_body, find_lungs
from train.drr.volume import find_sources, read_volume, sort_slices


@pytest.fixture(scope="module")
def chest():
    return make_chest()


def read(path, **options):
    (source,) = find_sources([path])
    return read_volume(source, **options)


def check(hu, spacing=SPACING):
    body = find_body(hu, spacing)
    check_geometry(hu, spacing)
    check_chest(hu, body, find_lungs(hu, body, spacing), spacing)


@pytest.mark.parametrize("flip", [(), (0,), (1,), (2,), (0, 1, 2)])
def test_nifti_comes_out_along_the_patients_axes_whatever_its_own(tmp_path, chest, flip):
    volume = read(write_nifti(tmp_path / "scan.nii.gz", chest, flip=flip))
    assert volume.name == "scan"
    assert volume.spacing == pytest.approx(SPACING)
    np.testing.assert_array_equal(volume.hu, chest)


@pytest.mark.parametrize("descending", [False, True])
def test_a_series_comes_out_from_feet_to_head_whatever_its_order(tmp_path, chest, descending):
    volume = read(write_series(tmp_path / "patient", chest, descending=descending))
    assert volume.name == "patient"
    assert volume.spacing == pytest.approx(SPACING)
    np.testing.assert_array_equal(volume.hu, chest)


def test_npz_is_read_with_its_bone_labels(tmp_path, chest):
    bone = chest > 200
    volume = read(write_npz(tmp_path / "scan.npz", chest, bone=bone))
    np.testing.assert_array_equal(volume.hu, chest)
    np.testing.assert_array_equal(volume.labels, bone)


def test_labels_of_another_grid_are_put_onto_the_ct(tmp_path, chest):
    labels = np.where(chest > 200, 7, np.where(chest > 0, 3, 0)).astype(np.int16)
    ct, file = write_nifti(tmp_path / "a" / "scan.nii.gz", chest), tmp_path / "labels.nii.gz"
    write_nifti(file, labels, flip=(2,))
    np.testing.assert_array_equal(read(ct, labels=file, label_values=frozenset({7})).labels, labels == 7)
    np.testing.assert_array_equal(read(ct, labels=file).labels, labels != 0)


def test_a_turned_volume_is_resampled_along_the_patients_axes(tmp_path):
    """A ball at a known place stays there when the slices are tilted by 15 degrees."""
    angle = np.deg2rad(15)
    direction = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    z, y, x = np.meshgrid(*(np.arange(n) for n in (40, 50, 60)), indexing="ij")
    places = np.stack([x, y, z], -1) * 3.0 @ direction.T
    ball = np.linalg.norm(places - np.array([110.0, 60.0, 70.0]), axis=-1) < 15
    image = sitk.GetImageFromArray(np.where(ball, 300, -1000).astype(np.int16))
    image.SetSpacing((3.0, 3.0, 3.0))
    image.SetDirection(direction.ravel().tolist())
    sitk.WriteImage(image, str(tmp_path / "tilted.nii.gz"))
    volume = read(tmp_path / "tilted.nii.gz")
    corner = (np.array([[0, 0, 0], [0, 49, 0], [0, 0, 39], [0, 49, 39]]) * 3.0 @ direction.T).min(0)
    found = np.argwhere(volume.hu > -300).mean(0)[::-1] * np.array(volume.spacing)[::-1] + corner
    assert found == pytest.approx([110.0, 60.0, 70.0], abs=1.0)
    assert (volume.hu > -300).sum() * 27 == pytest.approx(4 / 3 * np.pi * 15**3, rel=0.1)


@pytest.mark.parametrize(
    ("leave_out", "reason"),
    [({30}, "about 1 of 80 slices are missing"), ({30, 31, 50}, "about 3 of 80 slices are missing")],
)
def test_missing_slices_are_counted(tmp_path, chest, leave_out, reason):
    with pytest.raises(InputRefused, match=reason):
        read(write_series(tmp_path / "patient", chest, leave_out=leave_out))


def test_doubled_slices_other_modalities_and_short_series_are_refused(tmp_path, chest):
    doubled = write_series(tmp_path / "doubled", chest)
    (doubled / "copy.dcm").write_bytes((doubled / "IM0003.dcm").read_bytes())
    with pytest.raises(InputRefused, match="two slices at one place"):
        read(doubled)
    with pytest.raises(InputRefused, match="Modality MR, not CT"):
        read(write_series(tmp_path / "mr", chest, modality="MR"))
    with pytest.raises(InputRefused, match="12 slices, fewer than 20"):
        read(write_series(tmp_path / "short", chest[:12]))


def test_slices_are_sorted_by_place_not_by_name(tmp_path, chest):
    folder = write_series(tmp_path / "patient", chest[:30], descending=True)
    files, distance = sort_slices(sorted(folder.iterdir()))
    assert distance == pytest.approx(SPACING[0])
    assert [path.name for path in files] == [f"IM{number:04d}.dcm" for number in range(29, -1, -1)]


def test_what_is_no_ct_file_says_so(tmp_path, chest):
    (tmp_path / "broken.nii.gz").write_bytes(b"not a volume")
    with pytest.raises(InputFailed, match="cannot be read by SimpleITK"):
        read(tmp_path / "broken.nii.gz")
    np.savez(tmp_path / "other.npz", values=chest)
    with pytest.raises(InputFailed, match="not an npz with `hu` and `spacing_mm`"):
        read(tmp_path / "other.npz")
    with pytest.raises(InputRefused, match="its lowest value is 0: not Hounsfield units"):
        read(write_npz(tmp_path / "bytes.npz", ((chest + 1000) // 10)))
    with pytest.raises(SettingsError, match="no such file or folder"):
        find_sources([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match="holds no CT"):
        find_sources([tmp_path / "empty"])


def test_a_folder_gives_all_its_volumes_by_name(tmp_path, chest):
    write_series(tmp_path / "b", chest[:20])
    write_npz(tmp_path / "a.npz", chest)
    write_nifti(tmp_path / "c.nii.gz", chest)
    (tmp_path / "notes.txt").write_text("no volume")
    assert [source.name for source in find_sources([tmp_path])] == ["a", "b", "c"]


def test_volumes_of_one_name_get_those_of_their_folders(tmp_path, chest):
    """Archives often lay out a patient as PATIENT/CT."""
    for patient in ("p1", "p2"):
        write_series(tmp_path / "site" / patient / "CT", chest[:20])
    (tmp_path / "other" / "p2").mkdir(parents=True)
    write_npz(tmp_path / "other" / "p2" / "CT.npz", chest)
    write_npz(tmp_path / "alone.npz", chest)
    names = {source.name: source.files[0] for source in find_sources([tmp_path])}
    assert set(names) == {"alone", "p1-CT", "site-p2-CT", "other-p2-CT"}
    assert names["p1-CT"].parent == tmp_path / "site" / "p1" / "CT"
    with pytest.raises(SettingsError, match=r"alone\.npz: this CT is given twice"):
        find_sources([tmp_path, tmp_path / "alone.npz"])
    write_nifti(tmp_path / "alone.nii.gz", chest)
    with pytest.raises(SettingsError, match=r"alone.*: another CT beside it has this name"):
        find_sources([tmp_path])


def test_without_simpleitk_npz_is_read_and_nifti_says_what_to_install(tmp_path, chest, monkeypatch):
    nifti = write_nifti(tmp_path / "scan.nii.gz", chest)
    npz = write_npz(tmp_path / "scan.npz", chest)
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    assert read(npz).hu.shape == chest.shape
    with pytest.raises(SettingsError, match="SimpleITK is not installed"):
        read(nifti)


def test_the_body_is_found_without_its_table(chest):
    body = find_body(make_chest(table=True), SPACING)
    truth = find_body(chest, SPACING)
    np.testing.assert_array_equal(body, truth)
    inside = chest[truth]
    assert (inside > -900).all()
    assert truth[:, 88:].sum() == 0  # the table lies at 94
    rows, columns = (np.flatnonzero(truth.any(axis=axes)) for axes in ((0, 2), (0, 1)))
    box = crop_to_body(truth, SPACING)
    assert (box[1].start, box[2].start) == (rows[0] - 3, columns[0] - 3)


def test_a_chest_is_taken_and_other_volumes_say_why_not(chest):
    check(chest)
    with pytest.raises(InputRefused, match=r"slices every 8\.0 mm"):
        check(chest[::2], (8.0, 3.0, 3.0))
    with pytest.raises(InputRefused, match="covers 156 mm from feet to head"):
        check(chest[:40])
    with pytest.raises(InputRefused, match="not a chest, or most of it is cut: 0 ml of lung"):
        check(np.where(chest == -850, 40, chest).astype(np.int16))
    with pytest.raises(InputRefused, match="the lungs are cut at the upper end"):
        check(chest[:55])
    with pytest.raises(InputRefused, match="the lungs are cut at the lower end"):
        check(chest[25:])
    with pytest.raises(InputRefused, match="the lungs are cut at the side"):
        check(np.ascontiguousarray(chest[:, :, 22:]))
    metal = chest.copy()
    metal[40:50, 40:50, 20:26] = 3000
    with pytest.raises(InputRefused, match="22 ml of metal"):
        check(metal)
    with pytest.raises(InputRefused, match="the spine is at the front"):
        check(np.ascontiguousarray(chest[:, ::-1]))
    with pytest.raises(InputRefused, match="the lungs' apices are not at the head"):
        check(np.ascontiguousarray(chest[::-1]))
