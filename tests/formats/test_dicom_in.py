"""DICOM in: transfer syntaxes and depths, grey-scale transformations against formulas written out here, refusals."""

from __future__ import annotations

import io
import logging
import warnings

import numpy as np
import pytest
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, generate_fragments
from pydicom.uid import (
    CTImageStorage,
    DigitalMammographyXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)
from synthetic import (
    LOSSLESS_SYNTAXES,
    SECRETS,
    chest,
    code,
    dataset,
    dx_dataset,
    lookup_table,
    save,
    set_pixels,
    stored,
)

from bsdiff_rt.errors import InputFailed, InputRefused
from bsdiff_rt.formats.dicom_in import is_dicom, quiet_pydicom, read_dicom

PICTURE = chest(48, 60)


def read(tmp_path, header, syntax=ExplicitVRLittleEndian, **options):
    return read_dicom(save(tmp_path / "SECRET.dcm", header, syntax), **options)


# --- decoding ---


@pytest.mark.parametrize("syntax", LOSSLESS_SYNTAXES, ids=lambda syntax: syntax.name[:24])
@pytest.mark.parametrize(
    ("bits", "signed"),
    [(8, False), (10, False), (12, False), (12, True), (14, False), (15, True), (16, False), (16, True)],
)
def test_every_syntax_and_depth_gives_the_same_picture(tmp_path, syntax, bits, signed):
    values = stored(PICTURE, bits, signed=signed)
    radiograph = read(tmp_path, dataset(values, bits, signed=signed), syntax)
    low = -(2 ** (bits - 1)) if signed else 0
    np.testing.assert_allclose(radiograph.cxr, (values - low) / (2**bits - 1), atol=1e-6)
    assert radiograph.cxr.dtype == np.float32
    assert radiograph.bits_stored == bits
    plain = read(tmp_path, dataset(values, bits, signed=signed))
    assert radiograph.pixel_digest == plain.pixel_digest
    assert "PixelData" not in radiograph.dataset
    assert radiograph.dataset.PatientID == "SECRET-4711"


def test_lossy_jpeg(tmp_path):
    radiograph = read(tmp_path, dataset(stored(PICTURE, 8), 8), JPEGBaseline8Bit)
    assert np.abs(radiograph.cxr - PICTURE).mean() < 0.005


def _as_chest(name):
    """A test picture that comes with pydicom, with the header of a chest X-ray."""
    header = dcmread(get_testdata_file(name, download=False))
    header.SOPClassUID, header.Modality = SecondaryCaptureImageStorage, "CR"
    header.StudyInstanceUID = header.SOPInstanceUID = "1.2.3"
    for keyword in ("WindowCenter", "WindowWidth", "PixelPaddingValue", "BodyPartExamined", "PatientOrientation"):
        if keyword in header:
            delattr(header, keyword)
    return header


def test_jpeg_ls(tmp_path):
    header, plain = _as_chest("MR_small_jpeg_ls_lossless.dcm"), _as_chest("MR_small.dcm")
    assert header.file_meta.TransferSyntaxUID == JPEGLSLossless
    dcmwrite(tmp_path / "a.dcm", header)
    dcmwrite(tmp_path / "b.dcm", plain)
    assert read_dicom(tmp_path / "a.dcm").pixel_digest == read_dicom(tmp_path / "b.dcm").pixel_digest


@pytest.mark.parametrize("name", ["JPGExtended.dcm", "J2K_pixelrep_mismatch.dcm", "JPEG2000.dcm"])
def test_12_bit_jpeg_and_lossy_jpeg_2000_of_other_encoders(tmp_path, name):
    header = _as_chest(name)
    if name == "JPGExtended.dcm":  # a few of its pixels are just above 8 bits: stray ones
        header.WindowCenter, header.WindowWidth = 2048, 4096
    dcmwrite(tmp_path / "a.dcm", header)
    radiograph = read_dicom(tmp_path / "a.dcm")
    values = header.pixel_array.astype(np.float64)  # pydicom's own choice of decoder
    scaled = (values - values.min()) / np.ptp(values)
    got = (radiograph.cxr - radiograph.cxr.min()) / np.ptp(radiograph.cxr)
    # Decoders of lossy JPEG may round a stored value differently (ITU-T T.83). Of JPEG 2000 every value is equal.
    rounded_differently = np.abs(got - scaled) > 2e-3
    if name == "JPGExtended.dcm":
        assert rounded_differently.mean() < 0.02  # seen: 0.014
        np.testing.assert_allclose(got, scaled, atol=1.01 / np.ptp(values))
    else:
        np.testing.assert_allclose(got, scaled, atol=1e-6)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
@pytest.mark.parametrize("signed", [False, True])
def test_high_bit_above_and_overlay_in_unused_bits(tmp_path, syntax, signed):
    values = stored(PICTURE, 10, signed=signed)
    expected = read(tmp_path, dataset(values, 10, signed=signed)).cxr
    header = dataset(values, 10, signed=signed, HighBit=13)
    set_pixels(header, values)
    words = np.frombuffer(header.PixelData, "<u2") | np.uint16(0b1100_0000_0000_1001)
    header.PixelData = words.tobytes()
    np.testing.assert_array_equal(read(tmp_path, header, syntax).cxr, expected)


def test_odd_sized_8_bit_in_16_and_preambleless(tmp_path):
    values = stored(chest(33, 35), 8)
    header = dataset(values, 8)
    expected = read(tmp_path, header).cxr
    wide = dataset(values, 8, BitsAllocated=16)
    set_pixels(wide, values)
    np.testing.assert_array_equal(read(tmp_path, wide).cxr, expected)
    for implicit in (True, False):
        bare = dataset(values, 8)
        del bare.file_meta
        dcmwrite(tmp_path / "bare", bare, implicit_vr=implicit, little_endian=True)
        assert is_dicom(tmp_path / "bare")
        np.testing.assert_array_equal(read_dicom(tmp_path / "bare").cxr, expected)


def test_is_dicom(tmp_path):
    path = tmp_path / "a"
    for content, expected in (
        (b"", False),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), False),
        (b"\x08\0\x08\0" + b"\xff" * 200, False),
        (bytes(128) + b"DICM", True),
        (b"\x08\0\x05\0CS\x0a\0ISO_IR 100", True),
        (b"\x08\0\x05\0\x0a\0\0\0ISO_IR 100", True),
        (b"\0\x08\0\x05CS\0\x0aISO_IR 100", True),
    ):
        path.write_bytes(content)
        assert is_dicom(path) is expected, content[:12]
    assert not is_dicom(tmp_path / "none")
    assert not is_dicom(tmp_path)


# --- grey-scale transformations ---

VALUES = stored(PICTURE, 12)


def linear(x, center, width):
    """PS3.3 C.11.2.1.2.1, as written there, with output 0 to 1."""
    out = ((x - (center - 0.5)) / (width - 1) + 0.5) if width > 1 else np.zeros(x.shape)
    out = np.where(x <= center - 0.5 - (width - 1) / 2, 0, out)
    return np.where(x > center - 0.5 + (width - 1) / 2, 1, out)


def linear_exact(x, center, width):
    out = (x - center) / width + 0.5
    return np.where(x <= center - width / 2, 0, np.where(x > center + width / 2, 1, out))


def sigmoid(x, center, width):
    return 0.5 + 0.5 * np.tanh(2 * (x - center) / width)  # = 1 / (1 + exp(-4 (x - center) / width))


@pytest.mark.parametrize(("center", "width"), [(1800, 1500), (2048, 4096), (2000.5, 801), (2000, 1)])
@pytest.mark.parametrize(
    ("function", "formula"),
    [(None, linear), ("LINEAR", linear), ("LINEAR_EXACT", linear_exact), ("SIGMOID", sigmoid)],
)
def test_windows(tmp_path, function, formula, center, width):
    header = dataset(VALUES, WindowCenter=center, WindowWidth=width)
    if function:
        header.VOILUTFunction = function
    expected = formula(VALUES.astype(np.float64), center, width)
    np.testing.assert_allclose(read(tmp_path, header).cxr, expected, atol=2e-6)


def test_the_first_of_several_windows(tmp_path):
    header = dataset(VALUES, WindowCenter=[1800, 100], WindowWidth=[1500, 10])
    np.testing.assert_allclose(read(tmp_path, header).cxr, linear(VALUES, 1800, 1500), atol=1e-6)


@pytest.mark.parametrize("width", [0, -5])
def test_a_window_of_no_width_is_none(tmp_path, width):
    header = dataset(VALUES, WindowCenter=0, WindowWidth=width)
    np.testing.assert_allclose(read(tmp_path, header).cxr, VALUES / 4095, atol=1e-6)


def test_rescale_then_window(tmp_path):
    header = dataset(VALUES, RescaleSlope="0.5", RescaleIntercept="-1000", WindowCenter=-100, WindowWidth=700)
    np.testing.assert_allclose(read(tmp_path, header).cxr, linear(VALUES * 0.5 - 1000, -100, 700), atol=2e-6)


def test_a_falling_rescale_without_window_inverts(tmp_path):
    header = dataset(VALUES, RescaleSlope="-1", RescaleIntercept="4095")
    np.testing.assert_allclose(read(tmp_path, header).cxr, 1 - VALUES / 4095, atol=1e-6)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_modality_lut_then_window(tmp_path, syntax):
    table = np.rint(65535 * np.sqrt(np.arange(4096) / 4095)).astype(np.int64)
    header = dataset(VALUES, ModalityLUTSequence=[lookup_table("modality", table, 0, 16)])
    np.testing.assert_allclose(read(tmp_path, header, syntax).cxr, table[VALUES] / 65535, atol=1e-6)
    header = dataset(VALUES, ModalityLUTSequence=[lookup_table("modality", table, 0, 16)])
    header.WindowCenter, header.WindowWidth = 40000, 30000
    expected = linear(table[VALUES].astype(np.float64), 40000, 30000)
    np.testing.assert_allclose(read(tmp_path, header, syntax).cxr, expected, atol=2e-6)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_voi_lut_clips_outside_its_entries(tmp_path, syntax, as_bytes):
    table = np.rint(1023 * (np.arange(2000) / 1999) ** 2).astype(np.int64)
    item = lookup_table("voi", table, 900, 10)
    if as_bytes:
        del item.LUTData
        item.add_new("LUTData", "OW", table.astype("<u2").tobytes())
    # The LUT wins over a window that is there too.
    header = dataset(VALUES, VOILUTSequence=[item], WindowCenter=1, WindowWidth=2)
    expected = table[np.clip(VALUES - 900, 0, 1999)] / 1023
    np.testing.assert_allclose(read(tmp_path, header, syntax).cxr, expected, atol=1e-6)


def test_voi_lut_of_signed_pixels_starts_below_zero(tmp_path):
    values = stored(PICTURE, 12, signed=True)
    table = np.arange(4096)[::-1].copy()
    header = dataset(values, signed=True, VOILUTSequence=[lookup_table("voi", table, -2048, 12)])
    np.testing.assert_allclose(read(tmp_path, header).cxr, table[values + 2048] / 4095, atol=1e-6)


def test_a_long_lut_of_signed_pixels(tmp_path):
    """More entries than a signed number can say: pydicom reads the descriptor of signed pixels as SS."""
    values = stored(PICTURE, 16, signed=True)
    table = np.rint(65535 * (np.arange(40000) / 39999) ** 2).astype(np.int64)
    header = dataset(values, 16, signed=True, VOILUTSequence=[lookup_table("voi", table, -20000, 16)])
    expected = table[np.clip(values + 20000, 0, 39999)] / 65535
    np.testing.assert_allclose(read(tmp_path, header, ImplicitVRLittleEndian).cxr, expected, atol=1e-6)


def test_a_lut_of_what_the_rescale_made_positive(tmp_path):
    values = stored(PICTURE, 16, signed=True)
    table = np.arange(0, 40000)
    item = lookup_table("voi", table, 0, 16)
    item.LUTDescriptor = [20000, 40000, 16]  # of values from 0 to 65535: 40000 is no negative number
    item.LUTData = list(range(20000))
    header = dataset(values, 16, signed=True, RescaleSlope="1", RescaleIntercept="32768", VOILUTSequence=[item])
    expected = np.clip(values + 32768 - 40000, 0, 19999) / 65535
    np.testing.assert_allclose(read(tmp_path, header).cxr, expected, atol=1e-6)


def test_8_bit_lut_entries_in_bytes(tmp_path):
    table = (np.arange(256)[::-1] ** 2 // 255).astype(np.int64)
    item = lookup_table("voi", table, 0, 8)
    del item.LUTData
    item.add_new("LUTData", "OW", table.astype("u1").tobytes())
    values = stored(PICTURE, 8)
    got = read(tmp_path, dataset(values, 8, VOILUTSequence=[item])).cxr
    np.testing.assert_allclose(got, table[values] / 255, atol=1e-6)


@pytest.mark.parametrize("entries_bits", [10, 12])
def test_a_lut_that_declares_too_few_bits(tmp_path, entries_bits):
    table = np.arange(4096) >> (12 - entries_bits)
    header = dataset(VALUES, VOILUTSequence=[lookup_table("voi", table, 0, 8)])
    np.testing.assert_allclose(read(tmp_path, header).cxr, table[VALUES] / (2**entries_bits - 1), atol=1e-6)


@pytest.mark.parametrize(("entries_bits", "range_bits"), [(12, 12), (14, 14), (15, 16), (16, 16)])
def test_a_lut_that_declares_more_bits_than_its_entries_have(tmp_path, entries_bits, range_bits):
    """12 bits called 16 would be black; a picture that leaves half of its range may be meant so."""
    table = np.arange(4096) * (2**entries_bits - 1) // 4095
    header = dataset(VALUES, VOILUTSequence=[lookup_table("voi", table, 0, 16)])
    np.testing.assert_allclose(read(tmp_path, header).cxr, table[VALUES] / (2**range_bits - 1), atol=1e-6)


@pytest.mark.parametrize("function", [None, "LINEAR"])
def test_a_window_narrower_than_one_is_exact(tmp_path, function):
    given = {} if function is None else {"VOILUTFunction": function}
    header = dataset(VALUES, RescaleSlope=str(1 / 4095)[:16], RescaleIntercept="0", WindowCenter=0.5, WindowWidth="0.9")
    for keyword, value in given.items():
        setattr(header, keyword, value)
    np.testing.assert_allclose(read(tmp_path, header).cxr, linear_exact(VALUES / 4095, 0.5, 0.9), atol=2e-6)


@pytest.mark.parametrize(
    ("photometric", "shape", "inverted"),
    [
        ("MONOCHROME2", None, False),
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME1", None, True),
        ("MONOCHROME1", "INVERSE", True),
        ("MONOCHROME1", "IDENTITY", True),
    ],
)
def test_polarity_comes_after_the_window(tmp_path, photometric, shape, inverted):
    header = dataset(VALUES, PhotometricInterpretation=photometric, WindowCenter=1700, WindowWidth=1400)
    if shape:
        header.PresentationLUTShape = shape
    expected = linear(VALUES.astype(np.float64), 1700, 1400)
    np.testing.assert_allclose(read(tmp_path, header).cxr, 1 - expected if inverted else expected, atol=1e-6)


def test_without_window_the_depth_that_holds_the_values_is_the_range(tmp_path):
    # 12-bit values declared as 16 bits are common; a single bright pixel below 2**12 changes nothing.
    for brightest in (3000, 4095):
        values = VALUES.copy()
        values[0, 0] = brightest
        got = read(tmp_path, dataset(values, 16)).cxr
        np.testing.assert_allclose(got, values / 4095, atol=1e-6)
    assert read(tmp_path, dataset(VALUES, 16)).bits_stored == 16


@pytest.mark.parametrize(("stray", "shown"), [(65535, 1.0), (0, 0.0)])
def test_stray_pixels_set_no_range(tmp_path, stray, shown):
    values = stored(PICTURE * 0.9 + 0.05, 12)
    expected = values / 4095
    values[5, 7], expected[5, 7] = stray, shown
    np.testing.assert_allclose(read(tmp_path, dataset(values, 16)).cxr, expected, atol=1e-6)


@pytest.mark.parametrize("below", [1, 500])
def test_noise_below_zero_makes_no_signed_range(tmp_path, below):
    """An offset that leaves unexposed pixels a little below zero: the picture would lie in the upper half."""
    values = stored(PICTURE, 12)
    values.reshape(-1)[:below] = -30
    expected = np.clip(values, 0, None) / 4095
    np.testing.assert_allclose(read(tmp_path, dataset(values, 16, signed=True)).cxr, expected, atol=1e-6)
    values.reshape(-1)[:500] = -400  # a tenth of the highest value: meant
    expected = (values + 4096.0) / 8191
    np.testing.assert_allclose(read(tmp_path, dataset(values, 16, signed=True)).cxr, expected, atol=1e-6)


def test_a_modality_lut_that_declares_more_bits_than_its_entries_have(tmp_path):
    table = np.arange(4096)[::-1].copy()
    header = dataset(VALUES, ModalityLUTSequence=[lookup_table("modality", table, 0, 16)])
    np.testing.assert_allclose(read(tmp_path, header).cxr, table[VALUES] / 4095, atol=1e-6)


@pytest.mark.parametrize(
    ("signed", "value", "limit"), [(False, 4095, None), (False, 0, None), (False, 4000, 4095), (True, -2000, None)]
)
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_padding_is_black_and_does_not_count(tmp_path, signed, value, limit, photometric, syntax):
    values = stored(PICTURE * 0.2 + 0.01, 12, signed=signed)  # all below 2**10 when unsigned
    expected = read(tmp_path, dataset(values, signed=signed, PhotometricInterpretation=photometric)).cxr
    values[:, :7] = value
    values[:3] = limit or value
    header = dataset(values, signed=signed, PhotometricInterpretation=photometric)
    header.add_new("PixelPaddingValue", "SS" if signed else "US", value)
    if limit:
        header.add_new("PixelPaddingRangeLimit", "US", limit)
    got = read(tmp_path, header, syntax).cxr
    assert (got[:, :7] == 0).all()
    assert (got[:3] == 0).all()
    np.testing.assert_array_equal(got[3:, 7:], expected[3:, 7:])


# --- what is accepted and refused ---


def test_accepted(tmp_path):
    for header in (
        dx_dataset(VALUES),
        dataset(VALUES, SOPClassUID=SecondaryCaptureImageStorage, Modality="DX"),
        dataset(VALUES, SOPClassUID=SecondaryCaptureImageStorage, Modality="RG"),
        dataset(VALUES, Modality=None),
        dataset(VALUES, ViewPosition=None, PatientOrientation=None, BodyPartExamined=None),
        dataset(VALUES, ViewPosition="AP", BodyPartExamined="PORT CHEST", PatientOrientation=["P", "F"]),
        dataset(VALUES, ViewCodeSequence=[code("399348003", "SCT", "antero-posterior")]),
        dataset(VALUES, NumberOfFrames=1, HighBit=None),
        dataset(VALUES, PatientOrientation=["R", "F"]),  # seen from behind
        dataset(VALUES, PatientOrientation="L"),
    ):
        assert read(tmp_path, header).cxr.shape == VALUES.shape


def _rgb():
    header = dataset(VALUES, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0)
    header.BitsAllocated, header.BitsStored, header.HighBit = 8, 8, 7
    header.PixelData = bytes(3 * VALUES.size)
    return header


def _float():
    header = dataset(VALUES, PixelData=None)
    header.FloatPixelData = VALUES.astype("<f4").tobytes()
    return header


def _report():
    header = dataset(VALUES, PixelData=None, Rows=None, Columns=None)
    header.Modality = "CR"
    return header


def _directory():
    header = dataset(VALUES, PixelData=None)
    header.DirectoryRecordSequence = [Dataset()]
    return header


REFUSED = {
    "CT": (lambda: dataset(VALUES, Modality="CT", SOPClassUID=CTImageStorage), "modality CT"),
    "other": (lambda: dataset(VALUES, Modality="OT", SOPClassUID=SecondaryCaptureImageStorage), "modality OT"),
    "no modality": (lambda: dataset(VALUES, Modality=None, SOPClassUID=SecondaryCaptureImageStorage), "missing"),
    "secret modality": (lambda: dataset(VALUES, Modality="SECRET 4711"), "modality unknown"),
    "breast": (lambda: dataset(VALUES, SOPClassUID=DigitalMammographyXRayImageStorageForPresentation), "Mammography"),
    "unknown class": (lambda: dataset(VALUES, SOPClassUID="1.2.4711.19471231"), "unknown SOP class"),
    "no class": (lambda: dataset(VALUES, SOPClassUID=None), "SOPClassUID is missing"),
    "no instance": (lambda: dataset(VALUES, SOPInstanceUID=None), "SOPInstanceUID is missing"),
    "no study": (lambda: dataset(VALUES, StudyInstanceUID=None), "StudyInstanceUID is missing"),
    "raw class": (lambda: dx_dataset(VALUES, SOPClassUID=DigitalXRayImageStorageForProcessing), "FOR PROCESSING"),
    "raw intent": (lambda: dx_dataset(VALUES, PresentationIntentType="FOR PROCESSING"), "FOR PROCESSING"),
    "directory": (_directory, "DICOMDIR"),
    "report": (_report, "no image"),
    "float": (_float, "floating-point"),
    "ours": (lambda: dataset(VALUES, ImageType=["DERIVED", "SECONDARY", "", "BONE_SUPPRESSED"]), "already"),
    "frames": (lambda: dataset(VALUES, NumberOfFrames=3), "3 frames"),
    "colour": (_rgb, "not a grey"),
    "palette": (lambda: dataset(VALUES, PhotometricInterpretation="PALETTE COLOR"), "not a grey"),
    "1 bit": (lambda: dataset(VALUES, 12, BitsStored=1, HighBit=0), "1 bits stored"),
    "32 bits": (lambda: dataset(VALUES, 12, BitsAllocated=32), "in 32"),
    "thumbnail": (lambda: dataset(VALUES[:20].copy()), "20 x 60 px"),
    "empty": (lambda: dataset(VALUES * 0 + 7), "same grey"),
    "squashed": (
        lambda: dx_dataset(VALUES, ImagerPixelSpacing=["0.15", "0.3"]),
        "not square",
    ),
}
NOT_FRONTAL = {
    "lateral": (lambda: dataset(VALUES, ViewPosition="LL"), "View Position LL"),
    "lateral in words": (lambda: dataset(VALUES, ViewPosition="LATERAL"), "View Position LATERAL"),
    "code": (lambda: dataset(VALUES, ViewCodeSequence=[code("399173006", "SCT", "SECRET")]), "View Code"),
    "old code": (lambda: dataset(VALUES, ViewCodeSequence=[code("R-10236", "SRT", "left lateral")]), "View Code"),
    "orientation": (lambda: dataset(VALUES, ViewPosition=None, PatientOrientation=["P", "F"]), "Orientation"),
    "turned": (lambda: dataset(VALUES, PatientOrientation=["F", "R"]), "turned or upside down"),
    "turned back": (lambda: dataset(VALUES, PatientOrientation=["H", "L"]), "turned or upside down"),
    "upside down": (lambda: dataset(VALUES, ViewPosition=None, PatientOrientation=["L", "HR"]), "upside down"),
    "foot": (lambda: dx_dataset(VALUES, AnatomicRegionSequence=[code("T-D9700", "SRT", "SECRET")]), "Anatomic Region"),
    "hand": (lambda: dataset(VALUES, BodyPartExamined="HAND"), "Body Part Examined HAND"),
}


@pytest.mark.parametrize("case", REFUSED | NOT_FRONTAL)
def test_refused_with_a_reason(tmp_path, case):
    make, reason = (REFUSED | NOT_FRONTAL)[case]
    with pytest.raises(InputRefused, match=reason) as refusal:
        read(tmp_path, make())
    assert not any(secret in str(refusal.value) for secret in SECRETS)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("case", NOT_FRONTAL)
def test_the_view_check_can_be_overridden(tmp_path, case):
    assert read(tmp_path, NOT_FRONTAL[case][0](), any_view=True).cxr.shape == VALUES.shape


@pytest.mark.parametrize("case", REFUSED)
def test_nothing_else_can(tmp_path, case):
    with pytest.raises(InputRefused):
        read(tmp_path, REFUSED[case][0](), any_view=True)


def test_unsupported_compression(tmp_path):
    for uid, reason in (("1.2.840.10008.1.2.4.100", "MPEG2"), ("1.2.4711", "unknown transfer syntax")):
        header = dataset(VALUES)
        header.PixelData = encapsulate([b"12345678"])
        header["PixelData"].VR, header["PixelData"].is_undefined_length = "OB", True
        header.file_meta.TransferSyntaxUID = uid
        header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID
        header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
        buffer = io.BytesIO()
        dcmwrite(buffer, header, implicit_vr=False, little_endian=True, enforce_file_format=True)
        (tmp_path / "a.dcm").write_bytes(buffer.getvalue())
        with pytest.raises(InputRefused, match=reason) as refusal:
            read_dicom(tmp_path / "a.dcm")
        assert "4711" not in str(refusal.value)


# --- damage ---


def _short_lut():
    item = lookup_table("voi", np.arange(100), 0, 12)
    item.LUTDescriptor = [4096, 0, 12]
    return dataset(VALUES, VOILUTSequence=[item])


def _secret_number():
    header = dataset(VALUES)
    header.add_new("WindowCenter", "LO", "SECRET^4711")
    header.add_new("WindowWidth", "LO", "SECRET^4711")
    return header


DAMAGED = {
    "no rows": (lambda: dataset(VALUES, Rows=None), "Rows is missing"),
    "no bits": (lambda: dataset(VALUES, PixelRepresentation=None), "PixelRepresentation is missing"),
    "high bit": (lambda: dataset(VALUES, HighBit=5), "do not fit"),
    "pixels missing": (lambda: dataset(VALUES, PixelData=None), "no pixel data"),
    "pixels too few": (lambda: dataset(VALUES, Rows=500), r"truncated: 5760 of 60000 bytes of pixels are there"),
    "lookup table": (_short_lut, "fewer entries"),
    "function": (lambda: dataset(VALUES, WindowCenter=1, WindowWidth=9, VOILUTFunction="SECRET"), "LINEAR_EXACT"),
    "number": (_secret_number, "Window Center is not a number"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_a_failure_with_a_reason(tmp_path, case, caplog):
    make, reason = DAMAGED[case]
    path = save(tmp_path / "SECRET.dcm", make())
    recorded = warnings.catch_warnings(record=True, action="always")
    with recorded as caught, pytest.raises(InputFailed, match=reason) as failure:
        read_dicom(path)
    heard = [str(failure.value), caplog.text, *(str(warning.message) for warning in caught)]
    assert not any(secret in each for secret in SECRETS for each in heard)
    assert failure.value.__cause__ is None  # nothing of pydicom's text in a traceback either


@pytest.mark.parametrize(
    "syntax",
    [ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless, JPEGLosslessSV1, JPEGBaseline8Bit],
    ids=lambda syntax: syntax.name[:24],
)
def test_truncated_at_any_length(tmp_path, syntax, caplog):
    path = save(tmp_path / "SECRET.dcm", dataset(stored(PICTURE, 8), 8), syntax)
    content = path.read_bytes()
    end = content.rindex(b"\xe0\x7f\x10\0")  # Pixel Data
    caplog.set_level(logging.DEBUG)
    # Of the sequence delimiter behind compressed pixels, the last four bytes are a length that is always zero.
    last = len(content) - (1 if syntax == ExplicitVRLittleEndian else 5)
    lengths = np.unique([*np.linspace(0, end, 15), *np.linspace(end, last, 25), last - 4])
    with warnings.catch_warnings(record=True, action="always") as caught:
        for length in lengths.astype(int):
            path.write_bytes(content[:length])
            # Cut before the header says what it is, a file looks like something else.
            with pytest.raises(InputFailed if length >= end else (InputFailed, InputRefused)) as failure:
                read_dicom(path)
            assert not any(secret in str(failure.value) for secret in SECRETS), length
    heard = [caplog.text, *(str(warning.message) for warning in caught)]
    assert not any(secret in each for secret in SECRETS for each in heard)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLosslessSV1, JPEGBaseline8Bit])
def test_a_truncated_codestream_in_a_whole_file(tmp_path, syntax):
    header = dataset(stored(PICTURE, 8), 8)
    save(tmp_path / "a.dcm", header, syntax)
    *_, codestream = generate_fragments(header.PixelData)
    header.PixelData = encapsulate([codestream[: len(codestream) // 2]])
    header["PixelData"].is_undefined_length = True
    dcmwrite(tmp_path / "a.dcm", header, enforce_file_format=True)
    with pytest.raises(InputFailed, match="truncated"):
        read_dicom(tmp_path / "a.dcm")


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLosslessSV1])
def test_zeros_behind_a_whole_codestream_are_no_damage(tmp_path, syntax):
    path = save(tmp_path / "a.dcm", dataset(VALUES), syntax)
    expected, header = read_dicom(path).pixel_digest, dcmread(path)
    *_, codestream = generate_fragments(header.PixelData)
    header.PixelData = encapsulate([codestream + bytes(64)])
    header["PixelData"].is_undefined_length = True
    dcmwrite(tmp_path / "b.dcm", header, enforce_file_format=True)
    assert read_dicom(tmp_path / "b.dcm").pixel_digest == expected


def test_random_damage_never_escapes(tmp_path):
    path = save(tmp_path / "SECRET.dcm", dataset(stored(PICTURE, 8), 8), RLELossless)
    content = np.frombuffer(path.read_bytes(), np.uint8)
    generator = np.random.default_rng(0)
    failures = []
    for _ in range(80):
        damaged = content.copy()
        damaged[generator.integers(140, 1500, 6)] = generator.integers(0, 256, 6)
        path.write_bytes(damaged.tobytes())
        try:
            read_dicom(path)
        except (InputFailed, InputRefused) as error:
            failures.append(str(error))
    assert failures
    assert not any(secret in failure for secret in SECRETS for failure in failures)


def test_not_dicom_and_unreadable(tmp_path):
    path = tmp_path / "SECRET.dcm"
    with pytest.raises(InputFailed, match="No such file") as failure:
        read_dicom(path)
    assert "SECRET" not in str(failure.value)
    path.write_bytes(b"")
    with pytest.raises(InputFailed, match="0 bytes"):
        read_dicom(path)
    path.write_bytes(b"SECRET text, no DICOM at all, and longer than the preamble" * 9)
    with pytest.raises(InputRefused, match="not a DICOM file"):
        read_dicom(path)
    path.write_bytes(bytes(128) + b"DICM")
    with pytest.raises((InputFailed, InputRefused)):
        read_dicom(path)


def test_pydicoms_own_logging_works_outside(caplog):
    logging.getLogger("pydicom").warning("heard")
    assert "heard" in caplog.text


@pytest.mark.parametrize("name", ["pydicom", "pydicom.pixels.decoders.base", "pydicom.pixels.utils"])
def test_nothing_pydicom_logs_while_reading_is_shown(caplog, name):
    with quiet_pydicom():
        logging.getLogger(name).error("SECRET")
    assert not caplog.records


def test_the_filter_of_pydicoms_warnings_is_put_in_place_once(monkeypatch):
    """Python takes a filter away before it puts it there again: another reading thread would show its warning."""
    with warnings.catch_warnings():
        with quiet_pydicom():
            before = list(warnings.filters)
        monkeypatch.setattr(warnings, "filterwarnings", lambda *_, **__: pytest.fail("put there again"))
        with quiet_pydicom():
            assert warnings.filters == before
