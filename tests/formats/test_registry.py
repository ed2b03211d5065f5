"""The registry of formats: content decides, every kind of result is written, and a new format is one entry."""

from __future__ import annotations

import re

import cv2
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import ComputedRadiographyImageStorage, SecondaryCaptureImageStorage
from synthetic import chest, dataset, save, stored

from bsdiff_rt import formats
from bsdiff_rt.errors import InputFailed, InputRefused, SettingsError
from bsdiff_rt.formats.base import Derivation, Format, Identity
from bsdiff_rt.formats.radiograph import Radiograph, hash_pixels

PICTURE = chest(48, 60)
DERIVATION = Derivation("a test", "demo", "ab" * 32, "cd" * 32, "0.1.0")


def png(path, picture=PICTURE):
    encoded = cv2.imencode(".png", np.rint(picture * 255).astype(np.uint8))[1]
    path.write_bytes(encoded.tobytes())
    return path


def dicom(path, **elements):
    return save(path, dataset(stored(PICTURE, 12), **elements))


@pytest.mark.parametrize("name", ["a.png", "a.dcm", "a.jpg", "a", "a.xyz"])
def test_the_content_decides_not_the_name(tmp_path, name):
    path = png(tmp_path / name)
    radiograph = formats.read(path)
    assert (radiograph.format, radiograph.bits_stored, radiograph.warnings) == ("raster", 8, ())
    assert formats.result_suffix("auto", path) == ".png"
    radiograph = formats.read(dicom(path))
    assert (radiograph.format, radiograph.bits_stored) == ("dicom", 12)
    assert formats.result_suffix("auto", path) == ".dcm"


def test_options_reach_the_readers(tmp_path):
    lateral = dicom(tmp_path / "a.dcm", ViewPosition="LL")
    with pytest.raises(InputRefused, match="not a frontal view"):
        formats.read(lateral)
    assert formats.read(lateral, any_view=True).cxr.shape == PICTURE.shape
    ours = dicom(tmp_path / "b.dcm", ImageType=["DERIVED", "SECONDARY", "", "BONE_SUPPRESSED"])
    with pytest.raises(InputRefused, match="already bone suppressed"):
        formats.read(ours)
    assert formats.read(ours, derived=True).cxr.shape == PICTURE.shape
    dark = np.rint(PICTURE * 1000).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "c.png"), dark)
    assert [formats.read(tmp_path / "c.png", least_bits=bits).bits_stored for bits in (8, 12)] == [10, 12]


@pytest.mark.parametrize(
    ("kind", "suffix", "sop_class"),
    [
        ("auto", ".dcm", ComputedRadiographyImageStorage),
        ("dicom", ".dcm", ComputedRadiographyImageStorage),
        ("dicom-sc", ".dcm", SecondaryCaptureImageStorage),
        ("dicom-j2k", ".dcm", ComputedRadiographyImageStorage),
        ("png", ".png", None),
    ],
)
def test_every_kind_of_result_is_written(tmp_path, kind, suffix, sop_class):
    source = dicom(tmp_path / "a.dcm")
    assert formats.result_suffix(kind, source) == suffix
    radiograph = formats.read(source)
    out = tmp_path / f"out{suffix}"
    formats.write(out, PICTURE, like=radiograph, kind=kind, derivation=DERIVATION)
    assert np.abs(formats.read(out, derived=True, least_bits=12).cxr - PICTURE).max() <= 0.5 / 4095 + 1e-6
    if sop_class:
        assert dcmread(out).SOPClassUID == sop_class


def test_a_dicom_result_needs_a_dicom_x_ray_and_a_derivation(tmp_path):
    raster = formats.read(png(tmp_path / "a.png"))
    with pytest.raises(InputRefused, match="a DICOM result needs a DICOM X-ray"):
        formats.check_kind("dicom", raster)
    with pytest.raises(InputRefused, match="a DICOM result needs a DICOM X-ray"):
        formats.write(tmp_path / "o.dcm", PICTURE, like=raster, kind="dicom", derivation=DERIVATION)
    with pytest.raises(SettingsError, match="needs a Derivation"):
        formats.write(tmp_path / "o.dcm", PICTURE, like=formats.read(dicom(tmp_path / "a.dcm")))
    with pytest.raises(SettingsError, match=r"unknown kind of result 'gif'\. Use one of auto, dicom"):
        formats.write(tmp_path / "o.gif", PICTURE, like=raster, kind="gif")
    assert not list(tmp_path.glob("o.*"))


def test_pictures_read_together_have_one_grey_scale(tmp_path):
    values = np.rint(PICTURE * 1000).astype(np.uint16)  # 10 bits
    for name, factor in (("bright.png", 4), ("dark.png", 1)):
        cv2.imwrite(str(tmp_path / name), values * factor)
    bright, dark = formats.read_together([tmp_path / "bright.png", tmp_path / "dark.png"])
    assert [bright.bits_stored, dark.bits_stored] == [12, 12]
    np.testing.assert_allclose(dark.cxr * 4, bright.cxr, atol=1e-6)
    source = dicom(tmp_path / "a.dcm")  # 12 bits, stated
    assert [one.bits_stored for one in formats.read_together([source, tmp_path / "dark.png"])] == [12, 12]
    assert [one.bits_stored for one in formats.read_together([tmp_path / "dark.png", source])] == [10, 12]
    with pytest.raises(InputFailed, match=r"none\.png: cannot be read"):
        formats.read_together([source, tmp_path / "none.png"])


def test_whom_a_file_belongs_to(tmp_path):
    found = formats.read_identity(dicom(tmp_path / "a", StudyInstanceUID="1.2.3", PatientID="P 1"))
    assert (found.study, found.patient) == ("1.2.3", "P 1")
    for path in (png(tmp_path / "a.png"), tmp_path / "none", tmp_path / "none.dcm"):
        assert formats.read_identity(path) == Identity()


def list_titles(known):
    *others, last = sorted(title for each in known for title in each.titles)
    return f"{', '.join(others)} or {last}"


def test_the_titles_of_all_formats_are_listed():
    assert {"DICOM", "JPEG", "PNG", "TIFF"} <= set(re.split(", | or ", list_titles(formats.FORMATS)))


def test_files_of_no_known_format(tmp_path):
    path = tmp_path / "SECRET"
    with pytest.raises(InputFailed, match="cannot be read: No such file"):
        formats.read(path)
    path.write_bytes(b"")
    with pytest.raises(InputFailed, match="empty"):
        formats.read(path)
    path.write_bytes(b"SECRET text")
    with pytest.raises(InputRefused, match=f"not a {list_titles(formats.FORMATS)} file") as refusal:
        formats.read(path)
    assert "SECRET" not in str(refusal.value)
    with pytest.raises(InputRefused, match="not a DICOM file"):
        formats.read(path.rename(tmp_path / "a.dcm"))


def test_candidates_in_a_folder(tmp_path):
    expected = {"a.PNG": True, "a.dcm": True, "a.tif": True, "a.txt": False, "IM1": False}
    for name, found in expected.items():
        (tmp_path / name).write_bytes(b"text")
        assert formats.is_candidate(tmp_path / name) is found
    assert formats.is_candidate(dicom(tmp_path / "IM1"))
    assert not formats.is_candidate(png(tmp_path / "IM2"))


def _read_toy(path, options):
    values = np.frombuffer(path.read_bytes()[4:], np.uint8).reshape(64, 64)
    return Radiograph(values / np.float32(255), 8, hash_pixels(values), format="toy")


def _write_toy(path, result):
    path.write_bytes(b"TOY!" + np.rint(result.picture * 255).astype(np.uint8).tobytes())


TOY = Format(
    name="toy",
    titles=("TOY",),
    suffixes=frozenset({".toy"}),
    recognise=lambda path: path.read_bytes()[:4] == b"TOY!",
    read=_read_toy,
    kinds=("toy",),
    result_suffix=".toy",
    write=_write_toy,
)


def test_a_new_format_is_one_entry(tmp_path, monkeypatch):
    """A module like the lines above, and its name in FORMATS, are all that a new format needs."""
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, TOY))
    path = tmp_path / "a.toy"
    path.write_bytes(b"TOY!" + np.rint(chest() * 255).astype(np.uint8).tobytes())
    assert formats.is_candidate(path)
    radiograph = formats.read(path)
    assert "toy" in formats.result_kinds()
    assert [formats.result_suffix(kind, path) for kind in ("auto", "png")] == [".toy", ".png"]
    formats.write(tmp_path / "b.toy", radiograph.cxr, like=radiograph)
    assert (tmp_path / "b.toy").read_bytes() == path.read_bytes()
    formats.write(tmp_path / "b.png", radiograph.cxr, like=radiograph, kind="png")
    np.testing.assert_array_equal(formats.read(tmp_path / "b.png").cxr, radiograph.cxr)
    path.write_bytes(b"none of these")
    with pytest.raises(InputRefused, match=f"not a {list_titles(formats.FORMATS)} file"):
        formats.read(path.rename(tmp_path / "a.none"))


def test_an_x_ray_of_a_format_that_cannot_be_written_gets_a_png(tmp_path, monkeypatch):
    only_read = Format("film", ("FILM",), frozenset({".film"}), TOY.recognise, _read_toy)
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, only_read))
    path = tmp_path / "a.film"
    path.write_bytes(b"TOY!" + bytes(4096))
    assert formats.result_suffix("auto", path) == ".png"
