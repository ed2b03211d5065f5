"""DICOM files as archives hold them: odd windows, numbers, terms, labels and JPEG headers are read or explained."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from pydicom import dcmread, dcmwrite
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, get_frame
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    SecondaryCaptureImageStorage,
)
from synthetic import SECRETS, chest, dataset, dx_dataset, jpeg_lossless, save, set_pixels, stored

from bsdiff_rt.errors import InputFailed, InputRefused
from bsdiff_rt.formats.dicom_in import is_dicom, read_dicom
from bsdiff_rt.formats.dicom_out import Derivation, write_derived
from bsdiff_rt.formats.jpeg import parse_jpeg

PICTURE = chest(48, 60)
VALUES = stored(PICTURE, 12)


pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR", "ignore:The value length")


def read(tmp_path, header, syntax=ExplicitVRLittleEndian, **options):
    radiograph = read_dicom(save(tmp_path / "SECRET.dcm", header, syntax), **options)
    assert not any(secret in warning for secret in SECRETS for warning in radiograph.warnings)
    return radiograph


def number(path, keyword_bytes, old, new):
    """Replace the text of a decimal string in a file by another one of the same length."""
    content = path.read_bytes()
    at = content.index(keyword_bytes)
    assert content[at + 8 : at + 8 + len(old)] == old
    path.write_bytes(content[: at + 8] + new + content[at + 8 + len(new) :])


# --- windows that do not fit the values ---


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_a_window_that_clips_much_is_a_warning_with_the_share(tmp_path, photometric):
    header = dataset(VALUES, WindowCenter=1023, WindowWidth=2047, PhotometricInterpretation=photometric)
    (warning,) = read(tmp_path, header).warnings
    _, counts = np.unique(VALUES[VALUES >= 2046], return_counts=True)
    clipped = (counts.sum() - counts.max()) / VALUES.size  # without the most frequent one, as of a border
    assert 0.5 < clipped < 0.9
    shade = "white" if photometric == "MONOCHROME2" else "black"
    assert f"window (center 1023, width 2047) clips {clipped:.0%} of the pixels to plain {shade}" in warning


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_every_window_function_is_watched(tmp_path, function):
    header = dataset(VALUES, WindowCenter=700, WindowWidth=700, VOILUTFunction=function)
    assert "plain white" in read(tmp_path, header).warnings[0]


def test_a_window_that_fits_is_no_warning(tmp_path):
    fitting = dataset(VALUES, WindowCenter=2000, WindowWidth=4000)
    assert read(tmp_path, fitting).warnings == ()
    air = VALUES.copy()
    air[:, :10] = 7  # a sixth of the picture is one dark value; a border has no detail to lose
    assert read(tmp_path, dataset(air, WindowCenter=2100, WindowWidth=3600)).warnings == ()
    air[:, :40] = 7
    assert read(tmp_path, dataset(air, WindowCenter=2100, WindowWidth=3600)).warnings == ()


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_a_window_that_misses_the_values_gives_way_to_their_range(tmp_path, photometric):
    """Detectors with an offset: values from 32768 up, and the window of the values without it."""
    offset = VALUES + 32768
    header = dataset(offset, 16, WindowCenter=2048, WindowWidth=4096, PhotometricInterpretation=photometric)
    radiograph = read(tmp_path, header)
    low, high = (int(np.quantile(offset, share, method="nearest")) for share in (5e-4, 1 - 5e-4))
    expected = np.clip((offset - low) / (high - low), 0, 1)
    expected = expected if photometric == "MONOCHROME2" else 1 - expected
    np.testing.assert_allclose(radiograph.cxr, expected, atol=1e-5)
    assert radiograph.warnings == (
        f"The window (center 2048, width 4096) displays next to none of the values, which run from {low} to {high}. "
        "Their own range is used instead.",
    )


def test_a_window_that_misses_all_but_a_few_pixels(tmp_path):
    values = VALUES + 32768
    values[0, 0] = 1000
    radiograph = read(tmp_path, dataset(values, 16, WindowCenter=2048, WindowWidth=4096))
    assert "displays next to none of the values" in radiograph.warnings[0]
    assert np.ptp(radiograph.cxr[1:]) == 1


def test_an_empty_picture_stays_empty_whatever_its_window(tmp_path):
    with pytest.raises(InputRefused, match="same grey"):
        read(tmp_path, dataset(VALUES * 0 + 7, WindowCenter=60000, WindowWidth=10))


# --- numbers ---


@pytest.mark.parametrize("keyword", ["PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"])
def test_one_spacing_says_square(tmp_path, keyword):
    radiograph = read(tmp_path, dataset(VALUES, **{keyword: "0.168"}))
    np.testing.assert_allclose(radiograph.cxr, VALUES / 4095, atol=1e-6)
    assert len(radiograph.warnings) == 1
    assert "has one value instead of two" in radiograph.warnings[0]
    out = tmp_path / "o.dcm"
    write_derived(out, radiograph, PICTURE, Derivation("d", "demo", "ab" * 32, "cd", "0"))
    assert dcmread(out)[keyword].value == [0.168, 0.168]


def test_a_decimal_comma_is_a_point(tmp_path):
    plain = dataset(VALUES, WindowCenter="1747.5", WindowWidth="3095.25", RescaleSlope="1.25", RescaleIntercept="-50")
    plain.PixelSpacing = ["0.150", "0.151"]
    expected = read(tmp_path, plain)
    path = tmp_path / "SECRET.dcm"
    for element, value in (
        (b"\x28\x00\x50\x10DS", b"1747.5"),
        (b"\x28\x00\x51\x10DS", b"3095.25"),
        (b"\x28\x00\x53\x10DS", b"1.25"),
        (b"\x28\x00\x30\x00DS", b"0.150\\0.151"),
    ):
        number(path, element, value, value.replace(b".", b","))
    radiograph = read_dicom(path)
    np.testing.assert_array_equal(radiograph.cxr, expected.cxr)
    assert radiograph.dataset.PixelSpacing == [0.15, 0.151]
    number(path, b"\x28\x00\x30\x00DS", b"0,150\\0,151", b"0,150\\0,351")
    with pytest.raises(InputRefused, match=r"not square \(Pixel Spacing 0.15 by 0.351\)"):
        read_dicom(path)


@pytest.mark.parametrize(
    ("element", "keyword", "name"),
    [
        (b"\x28\x00\x50\x10DS", "WindowCenter", "Window Center"),
        (b"\x28\x00\x51\x10DS", "WindowWidth", "Window Width"),
        (b"\x28\x00\x52\x10DS", "RescaleIntercept", "Rescale Intercept"),
        (b"\x28\x00\x53\x10DS", "RescaleSlope", "Rescale Slope"),
        (b"\x28\x00\x08\x00IS", "NumberOfFrames", "Number of Frames"),
    ],
)
@pytest.mark.parametrize("text", [b"two ", b"nan "])
def test_what_is_no_number_is_named(tmp_path, element, keyword, name, text):
    header = dataset(VALUES, WindowCenter="2000", WindowWidth="2000", RescaleSlope="1000", RescaleIntercept="1000")
    setattr(header, keyword, "1234")
    path = save(tmp_path / "SECRET.dcm", header)
    number(path, element, b"1234", text)
    with pytest.raises(InputFailed, match=f"{name} is not a number"):
        read_dicom(path)


def test_a_spacing_that_is_no_number_is_left_out_and_said(tmp_path):
    path = save(tmp_path / "a.dcm", dataset(VALUES, PixelSpacing=["0.15", "0.15"]))
    number(path, b"\x28\x00\x30\x00DS", b"0.15\\0.15", b"unknown  ")
    radiograph = read_dicom(path)
    assert "PixelSpacing" not in radiograph.dataset
    assert radiograph.warnings == ("Pixel Spacing is not a number and is left out.",)


# --- terms ---


@pytest.mark.parametrize(
    ("view", "named"),
    [
        *(("LARGE LATERAL", "LATERAL"), ("AP LLD", "LLD"), ("LEFT LATERAL", "LATERAL"), ("LEFTLATERAL", "LATERAL")),
        *(
            ("lat", "LAT"),
            ("PA/LAT", "LAT"),
            ("L-LAT", "LAT"),
            ("AP LEFT DECUBITUS", "DECUBITUS"),
            ("R_OBLIQUE", "OBL"),
        ),
        ("Seitlich", "SEITLICH"),
    ],
)
def test_lateral_and_oblique_views_by_any_spelling(tmp_path, view, named):
    with pytest.raises(InputRefused, match=rf"not a frontal view \(View Position {named}"):
        read(tmp_path, dataset(VALUES, ViewPosition=view))
    assert read(tmp_path, dataset(VALUES, ViewPosition=view), any_view=True).warnings == ()


@pytest.mark.parametrize(
    "view", ["AP SUPINE", "pa", "PA ERECT", "AP PORTABLE", "BILATERAL PA", "FRONTAL", "AP SITTING"]
)
def test_frontal_views_by_any_spelling(tmp_path, view):
    assert read(tmp_path, dataset(VALUES, ViewPosition=view)).cxr.shape == VALUES.shape


@pytest.mark.parametrize(
    "part",
    [
        "LUMBAR SPINE",
        "T SPINE",
        "L-SPINE",
        "Thoracic Spine",
        "LEFT HAND",
        "UPPER_ARM",
        "knee",
        "ABDOMEN SUPINE",
        "PELVIS AP",
    ],
)
def test_other_body_parts_by_any_spelling(tmp_path, part):
    with pytest.raises(InputRefused, match=r"not a chest \(Body Part Examined [A-Z]+\)"):
        read(tmp_path, dataset(VALUES, BodyPartExamined=part))
    assert read(tmp_path, dataset(VALUES, BodyPartExamined=part), any_view=True).cxr.shape == VALUES.shape


@pytest.mark.parametrize(
    "part", ["CHEST", "chest", "PORT CHEST", "CHEST ABDOMEN", "THORAX", "Lungs", "RIBS", "SECRET 5"]
)
def test_chests_by_any_spelling(tmp_path, part):
    assert read(tmp_path, dataset(VALUES, BodyPartExamined=part)).cxr.shape == VALUES.shape


@pytest.mark.parametrize("photometric", ["monochrome2", "Monochrome1", "MONOCHROME2 "])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, JPEG2000Lossless])
def test_photometric_interpretation_in_any_case(tmp_path, photometric, syntax):
    header = dataset(VALUES)
    save(tmp_path / "a.dcm", header, syntax)
    header.PhotometricInterpretation = photometric
    dcmwrite(tmp_path / "a.dcm", header, enforce_file_format=True)
    expected = 1 - VALUES / 4095 if "1" in photometric else VALUES / 4095
    np.testing.assert_allclose(read_dicom(tmp_path / "a.dcm").cxr, expected, atol=1e-6)


# --- pixel data that are not what the label says ---


def relabelled(path, header, syntax):
    """Write a dataset as it is, under another transfer syntax in the file meta information."""
    body = io.BytesIO()
    meta = header.file_meta
    del header.file_meta
    dcmwrite(body, header, implicit_vr=False, little_endian=True)
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
    head = io.BytesIO()
    write_file_meta_info(head, meta)
    path.write_bytes(bytes(128) + b"DICM" + head.getvalue() + body.getvalue())
    header.file_meta = meta
    return path


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEGBaseline8Bit, JPEG2000Lossless])
def test_uncompressed_pixels_under_a_compressed_label_are_read(tmp_path, syntax):
    path = relabelled(tmp_path / "a.dcm", dataset(VALUES), syntax)
    radiograph = read_dicom(path)
    np.testing.assert_allclose(radiograph.cxr, VALUES / 4095, atol=1e-6)
    assert len(radiograph.warnings) == 1
    assert f"labelled {syntax.name}, but its pixels are not compressed" in radiograph.warnings[0]
    assert "LossyImageCompression" not in radiograph.dataset


def test_a_compressed_label_over_pixels_of_another_length(tmp_path):
    header = dataset(VALUES)
    header.PixelData = header.PixelData[:-40]
    with pytest.raises(InputFailed, match=r"labelled JPEG-LS .* \(5720 of 5760 bytes\)"):
        read_dicom(relabelled(tmp_path / "a.dcm", header, JPEGLSLossless))


def test_compressed_pixels_under_another_label_are_read(tmp_path):
    header = dataset(VALUES)
    save(tmp_path / "a.dcm", header, JPEG2000Lossless)
    for label in (ExplicitVRLittleEndian, JPEGBaseline8Bit, JPEGLSLossless):
        radiograph = read_dicom(relabelled(tmp_path / "b.dcm", header, label))
        np.testing.assert_allclose(radiograph.cxr, VALUES / 4095, atol=1e-6)
        assert "but its pixels are JPEG 2000" in radiograph.warnings[0]
    header = dataset(VALUES)
    save(tmp_path / "a.dcm", header, JPEGLosslessSV1)
    for label in (ExplicitVRLittleEndian, JPEG2000Lossless):
        radiograph = read_dicom(relabelled(tmp_path / "b.dcm", header, label))
        np.testing.assert_allclose(radiograph.cxr, VALUES / 4095, atol=1e-6)
        assert "but its pixels are JPEG Lossless" in radiograph.warnings[0]


def test_a_picture_without_its_encapsulation_is_read(tmp_path):
    header = dataset(VALUES)
    save(tmp_path / "a.dcm", header, JPEG2000Lossless)
    codestream = get_frame(header.PixelData, 0, number_of_frames=1)
    header.PixelData = codestream + b"\0" * (len(codestream) % 2)
    header["PixelData"].is_undefined_length = False
    radiograph = read_dicom(relabelled(tmp_path / "b.dcm", header, JPEG2000Lossless))
    np.testing.assert_allclose(radiograph.cxr, VALUES / 4095, atol=1e-6)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, JPEGLSLossless])
def test_pixel_data_of_no_length(tmp_path, syntax):
    header = dataset(VALUES)
    header.PixelData = b""
    with pytest.raises(InputFailed, match="no pixel data, although the header describes an image"):
        read_dicom(relabelled(tmp_path / "a.dcm", header, syntax))


# --- JPEG ---


def with_codestream(path, header, codestream, syntax):
    header.PixelData = encapsulate([codestream])
    header["PixelData"].VR, header["PixelData"].is_undefined_length = "OB", True
    return relabelled(path, header, syntax)


@pytest.mark.parametrize("trailer", [b" " * 64, b"\r\n", b"\0" * 40, b"comment \xff\xd9 \xff\xda"])
@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEGLosslessSV1, JPEG2000Lossless])
def test_bytes_behind_the_end_of_a_picture(tmp_path, trailer, syntax):
    if syntax == JPEG2000Lossless and b"\xda" in trailer:
        pytest.skip("markers of JPEG")
    header = dataset(stored(PICTURE, 8), 8)
    expected = read_dicom(save(tmp_path / "a.dcm", header, syntax)).pixel_digest
    codestream = get_frame(header.PixelData, 0, number_of_frames=1)
    path = with_codestream(tmp_path / "b.dcm", header, codestream + trailer, syntax)
    assert read_dicom(path).pixel_digest == expected


def test_a_thumbnail_inside_does_not_hide_a_truncated_picture(tmp_path):
    """The end marker of a thumbnail in an application segment is not that of the picture."""
    values = stored(PICTURE, 8).astype(np.uint8)
    picture = cv2.imencode(".jpg", values)[1].tobytes()
    small = cv2.imencode(".jpg", values[::4, ::4].copy())[1].tobytes()
    whole = picture[:2] + b"\xff\xe1" + (len(small) + 2).to_bytes(2, "big") + small + picture[2:]
    header = dataset(stored(PICTURE, 8), 8)
    assert read_dicom(with_codestream(tmp_path / "a.dcm", header, whole, JPEGBaseline8Bit)).cxr.shape == PICTURE.shape
    cut = whole[: -len(picture) // 2]
    with pytest.raises(InputFailed, match="truncated"):
        read_dicom(with_codestream(tmp_path / "b.dcm", header, cut, JPEGBaseline8Bit))


def extended_jpeg(end_of_selection):
    """The 12-bit JPEG that comes with pydicom, with another end of spectral selection in its scan header."""
    header = dcmread(get_testdata_file("JPGExtended.dcm", download=False))
    codestream = bytearray(get_frame(header.PixelData, 0, number_of_frames=1))
    (scan,) = (segment for segment in parse_jpeg(bytes(codestream)).segments if segment.marker == 0xDA)
    assert codestream[scan.start + len(scan.data) - 3 :][:3] == bytes((0, 63, 0))
    codestream[scan.start + len(scan.data) - 2] = end_of_selection
    chest_header = dataset(np.zeros((header.Rows, header.Columns), np.int32), SOPClassUID=SecondaryCaptureImageStorage)
    chest_header.WindowCenter, chest_header.WindowWidth = 2048, 4096
    return chest_header, bytes(codestream)


def test_a_sequential_jpeg_whose_scan_ends_at_zero(tmp_path):
    digests = set()
    for end in (63, 0, 17):
        header, codestream = extended_jpeg(end)
        digests.add(read_dicom(with_codestream(tmp_path / "a.dcm", header, codestream, JPEGExtended12Bit)).pixel_digest)
    assert len(digests) == 1


@pytest.mark.parametrize("syntax", [JPEGLossless, JPEGLosslessSV1, JPEGBaseline8Bit])
@pytest.mark.parametrize("stored_bits", [8, 12])
def test_jpeg_of_8_bits_in_a_header_of_16(tmp_path, syntax, stored_bits):
    values = stored(PICTURE, 8)
    expected = read_dicom(save(tmp_path / "a.dcm", dataset(values, 8), syntax))
    header = dataset(values, stored_bits, BitsAllocated=16)
    set_pixels(header, values)
    if syntax == JPEGBaseline8Bit:
        codestream = cv2.imencode(".jpg", values.astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 98])[1].tobytes()
    else:
        codestream = jpeg_lossless(values.astype(np.uint8), 8, 1 if syntax == JPEGLosslessSV1 else 2)
    radiograph = read_dicom(with_codestream(tmp_path / "b.dcm", header, codestream, syntax))
    np.testing.assert_array_equal(radiograph.cxr, expected.cxr)
    assert radiograph.bits_stored == stored_bits


# --- files without preamble ---


def bare(header, first_element):
    """The bytes of a file without preamble, from the given element of its file meta information on."""
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
    buffer = io.BytesIO()
    dcmwrite(buffer, header, enforce_file_format=True)
    content = buffer.getvalue()[132:]
    return content[content.index(first_element) :]


@pytest.mark.parametrize(
    "first",
    [b"\2\0\0\0UL", b"\2\0\1\0OB", b"\2\0\2\0UI", b"\2\0\3\0UI", b"\2\0\x10\0UI", b"\2\0\x12\0UI", b"\2\0\x13\0SH"],
)
def test_a_file_that_begins_with_any_element_of_group_2(tmp_path, first):
    path = tmp_path / "IM0001"
    path.write_bytes(bare(dx_dataset(VALUES), first))
    assert is_dicom(path)
    np.testing.assert_allclose(read_dicom(path).cxr, VALUES / 4095, atol=1e-6)


def test_what_only_begins_like_one_is_not_dicom(tmp_path):
    for content in (
        b"\2\0\x10\0" + bytes(200),
        b"\2\0\x10\x33UI\x14\0" + bytes(200),
        b"\2\0\x10\0XX\x14\0" + bytes(90),
    ):
        (tmp_path / "a").write_bytes(content)
        assert not is_dicom(tmp_path / "a")


def test_samples_per_pixel_may_be_missing(tmp_path):
    np.testing.assert_array_equal(
        read(tmp_path, dataset(VALUES, SamplesPerPixel=None)).cxr, read(tmp_path, dataset(VALUES)).cxr
    )
