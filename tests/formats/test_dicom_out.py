"""Derived DICOM out, read back with pydicom alone: identity, provenance, pixels, what is kept and what is not."""

from __future__ import annotations

import datetime
import logging
import warnings
from dataclasses import replace

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import get_j2k_parameters
from pydicom.sequence import Sequence
from pydicom.uid import (
    JPEG2000,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    SecondaryCaptureImageStorage,
)
from synthetic import PATIENT, SECRETS, chest, code, dataset, dx_dataset, lookup_table, save, stored

from bsdiff_rt.errors import InputFailed, InputRefused, SettingsError
from bsdiff_rt.formats.dicom_in import read_dicom
from bsdiff_rt.formats.dicom_out import SERIES_SUFFIX, Derivation, derive_uid, write_derived
from bsdiff_rt.formats.radiograph import Radiograph

PICTURE = chest(48, 60)
SOFT = chest(48, 60, seed=1) * 0.9
DERIVATION = Derivation(
    description="BS-Diff, dpmpp-2m, 20 steps, seed 0, fp16, 256 x 256",
    bundle_name="demo",
    bundle_sha256="ab" * 32,
    settings_digest="cd" * 32,
    software_version="0.1.0",
    created=datetime.datetime(2026, 5, 4, 3, 2, 1),
)


def derive(
    tmp_path, header, soft=SOFT, derivation=DERIVATION, kind="dicom", syntax=ExplicitVRLittleEndian, name="o.dcm"
):
    radiograph = read_dicom(save(tmp_path / "SECRET.dcm", header, syntax))
    write_derived(tmp_path / name, radiograph, soft, derivation, kind)
    return dcmread(tmp_path / name)


@pytest.mark.parametrize("bits", [8, 10, 12, 15, 16])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_pixels_and_what_viewers_need(tmp_path, bits, syntax):
    window = {"WindowCenter": 2 ** (bits - 1) - 20, "WindowWidth": 2 ** (bits - 1)}
    header = dataset(stored(PICTURE, bits), bits, PhotometricInterpretation="MONOCHROME1", **window)
    derived = derive(tmp_path, header, syntax=syntax)
    assert derived.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    np.testing.assert_array_equal(derived.pixel_array, np.rint(SOFT * np.float32(2**bits - 1)))
    assert (derived.Rows, derived.Columns) == SOFT.shape
    assert (derived.BitsStored, derived.HighBit, derived.PixelRepresentation) == (bits, bits - 1, 0)
    assert derived.BitsAllocated == (8 if bits == 8 else 16)
    assert derived.PhotometricInterpretation == "MONOCHROME2"
    assert derived.PresentationLUTShape == "IDENTITY"
    assert (derived.WindowCenter[0], derived.WindowWidth[0]) == (2 ** (bits - 1), 2**bits)
    assert list(derived.WindowCenterWidthExplanation) == ["FULL RANGE", "LUNGS"]


def linear(values, center, width):
    """PS3.3 C.11.2.1.2.1."""
    return np.clip((values - (center - 0.5)) / (width - 1) + 0.5, 0, 1)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_window_is_fitted_to_the_lungs(tmp_path, bits):
    soft = chest(300, 256) * np.float32(0.9)
    derived = derive(tmp_path, dataset(stored(chest(300, 256), bits), bits), soft=soft)
    lungs = np.concatenate([derived.pixel_array[60:195, 46:102], derived.pixel_array[60:195, 154:210]])
    shown = linear(lungs, derived.WindowCenter[1], derived.WindowWidth[1])
    assert 0.02 < np.quantile(shown, 0.03) < 0.15
    assert 0.85 < np.quantile(shown, 0.97) < 0.98
    assert np.mean((shown > 0) & (shown < 1)) > 0.95
    assert np.ptp(np.quantile(linear(lungs, derived.WindowCenter[0], derived.WindowWidth[0]), (0.03, 0.97))) < 0.5


def test_a_faint_result_opens_with_the_window_of_the_lungs(tmp_path):
    """Viewers begin with the first window; this program compares results by the full range."""
    faint = (0.5 + 0.1 * chest(300, 256)).astype(np.float32)
    derived = derive(tmp_path, dataset(stored(faint, 12)), soft=faint)
    assert list(derived.WindowCenterWidthExplanation) == ["LUNGS", "FULL RANGE"]
    assert derived.WindowWidth[1] == 4096
    shown = linear(derived.pixel_array, derived.WindowCenter[0], derived.WindowWidth[0])
    assert np.ptp(np.quantile(shown, (0.05, 0.95))) > 0.7
    again = read_dicom(tmp_path / "o.dcm", derived=True)
    np.testing.assert_allclose(again.cxr, faint, atol=0.5 / 4095 + 1e-6)
    assert again.warnings == ()


@pytest.mark.parametrize("bits", [8, 10, 12, 15, 16])
@pytest.mark.parametrize("make", [dataset, dx_dataset])
def test_jpeg_2000_keeps_every_pixel(tmp_path, bits, make):
    soft = chest(150, 130) * np.float32(0.9)
    source = make(stored(chest(150, 130), bits), bits)
    plain = derive(tmp_path, source, soft=soft, name="plain.dcm")
    derived = derive(tmp_path, source, soft=soft, kind="dicom-j2k")
    assert derived.file_meta.TransferSyntaxUID == JPEG2000Lossless
    codestream = get_frame(derived.PixelData, 0, number_of_frames=1)
    assert get_j2k_parameters(codestream) == {"precision": bits, "is_signed": False, "jp2": False}
    decoded, _ = get_decoder(JPEG2000Lossless).as_array(derived, decoding_plugin="pylibjpeg")  # not what wrote it
    np.testing.assert_array_equal(decoded, plain.pixel_array)
    assert len(derived.PixelData) < 0.9 * len(plain.PixelData)
    assert (
        read_dicom(tmp_path / "o.dcm", derived=True).pixel_digest
        == read_dicom(tmp_path / "plain.dcm", derived=True).pixel_digest
    )
    # The same object in another encoding: all but the pixels is equal, and lossless stays lossless.
    del derived.PixelData, plain.PixelData
    assert derived == plain
    assert derived.get("LossyImageCompression") is None


def test_series_numbers_follow_the_sources(tmp_path):
    def number(source, **changes):
        header = dataset(stored(PICTURE, 12), SeriesNumber=source)
        return derive(tmp_path, header, derivation=Derivation(**{**vars(DERIVATION), **changes})).SeriesNumber

    assert 101 <= number(1) <= 199
    assert 1201 <= number(12) <= 1299
    assert 20_000_000_01 <= number(20_000_000) <= 20_000_000_99
    for unusual in (None, 0, -3, 20_000_001):
        assert 9000 <= number(unusual) <= 9999
    others = {number(1, settings_digest=str(run)) for run in range(10)}  # results of other settings
    assert len(others) > 5
    assert len({number(1) for _ in range(2)}) == 1


@pytest.mark.parametrize(
    ("part", "region"), [("CHEST", "816094009"), ("chest", "816094009"), ("PORT CHEST", None), (None, None)]
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_a_chest_fills_an_empty_anatomic_region(tmp_path, part, region):
    source = dx_dataset(stored(PICTURE, 12), BodyPartExamined=part)
    for given in (None, Sequence([])):
        if given is not None:
            source.AnatomicRegionSequence = given
        codes = derive(tmp_path, source).AnatomicRegionSequence
        assert [(item.CodeValue, item.CodingSchemeDesignator) for item in codes] == (
            [(region, "SCT")] if region else []
        )
    mine = code("51185008", "SCT", "Thorax")
    source.AnatomicRegionSequence = [mine]
    assert [item.CodeValue for item in derive(tmp_path, source).AnatomicRegionSequence] == ["51185008"]
    assert "AnatomicRegionSequence" not in derive(tmp_path, dataset(stored(PICTURE, 12)))  # CR: not asked for


@pytest.mark.parametrize("make", [dataset, dx_dataset])
@pytest.mark.parametrize("kind", ["dicom", "dicom-sc"])
def test_our_own_reader_sees_what_was_written(tmp_path, make, kind):
    derive(tmp_path, make(stored(PICTURE, 12)), kind=kind)
    again = read_dicom(tmp_path / "o.dcm", derived=True)
    np.testing.assert_allclose(again.cxr, SOFT, atol=0.5 / 4095 + 1e-6)


@pytest.mark.parametrize("make", [dataset, dx_dataset])
@pytest.mark.parametrize("kind", ["dicom", "dicom-sc"])
def test_warnings_reach_whoever_sees_the_object_only(tmp_path, make, kind):
    derivation = replace(DERIVATION, warnings=("it looks like a negative", "Do not use the result."))
    for comments in ("", "Zweite Aufnahme für Dr. Ü"):
        derived = derive(tmp_path, make(stored(PICTURE, 12), ImageComments=comments), kind=kind, derivation=derivation)
        expected = "bsdiff-rt: Warning: it looks like a negative. Warning: Do not use the result."
        if comments and kind == "dicom":  # a Secondary Capture image takes over little of its source
            expected += f" {comments}"
        assert derived.ImageComments == expected
    assert "ImageComments" not in derive(tmp_path, make(stored(PICTURE, 12)), kind=kind)  # there is nothing to say
    long = derive(tmp_path, make(stored(PICTURE, 12), ImageComments="x" * 10240), kind=kind, derivation=derivation)
    assert len(long.ImageComments) <= 10240  # LT, PS3.5 table 6.2-1


def test_a_derived_image_is_not_processed_again(tmp_path):
    derive(tmp_path, dataset(stored(PICTURE, 12)))
    with pytest.raises(InputRefused, match="already bone suppressed"):
        read_dicom(tmp_path / "o.dcm")


@pytest.mark.parametrize("kind", ["dicom", "dicom-sc"])
@pytest.mark.parametrize("make", [dataset, dx_dataset])
def test_identity_and_provenance(tmp_path, make, kind):
    source = make(stored(PICTURE, 12))
    derived = derive(tmp_path, source, kind=kind)
    expected = source.SOPClassUID if kind == "dicom" else SecondaryCaptureImageStorage
    assert derived.SOPClassUID == derived.file_meta.MediaStorageSOPClassUID == expected
    assert derived.SOPInstanceUID == derived.file_meta.MediaStorageSOPInstanceUID != source.SOPInstanceUID
    assert derived.SeriesInstanceUID not in (source.SeriesInstanceUID, derived.SOPInstanceUID)
    assert derived.StudyInstanceUID == source.StudyInstanceUID
    for keyword in PATIENT:
        assert derived[keyword].value == source[keyword].value, keyword
    assert derived.SpecificCharacterSet == "ISO_IR 100"
    assert str(derived.PatientName) == "SECRET^ÄNNE"
    assert derived.Modality == source.Modality
    assert list(derived.ImageType) == ["DERIVED", "SECONDARY", "", "BONE_SUPPRESSED"]
    assert derived.SeriesDescription == f"Thorax pa, {SERIES_SUFFIX}"
    assert 101 <= derived.SeriesNumber <= 199  # behind the source, 1
    assert derived.InstanceNumber == 1
    assert derived.SyntheticData == "YES"
    assert derived.DerivationDescription == DERIVATION.description
    for keyword in ("InstanceCreationDate", "ContentDate"):
        assert derived[keyword].value == "20260504"
    assert "SeriesDate" not in derived  # one for all images of the series, or none
    assert derived.ContentTime == "030201"

    (reference,) = derived.SourceImageSequence
    assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert reference.ReferencedSOPClassUID == source.SOPClassUID
    (purpose,) = reference.PurposeOfReferenceCodeSequence
    assert (purpose.CodeValue, purpose.CodingSchemeDesignator) == ("121322", "DCM")

    (equipment,) = derived.ContributingEquipmentSequence
    assert equipment.Manufacturer == "bsdiff-rt"
    assert equipment.ManufacturerModelName == "demo"
    assert equipment.SoftwareVersions == "0.1.0"
    assert equipment.DeviceUID == derive_uid("device", "ab" * 32)
    assert "ab" * 32 in equipment.ContributionDescription
    assert equipment.PurposeOfReferenceCodeSequence[0].CodeValue == "109102"


def test_digital_x_ray_specifics(tmp_path):
    source = dx_dataset(stored(PICTURE, 12), PhotometricInterpretation="MONOCHROME1", PresentationLUTShape="INVERSE")
    source.PixelIntensityRelationshipSign = 1
    derived = derive(tmp_path, source)
    assert derived.SOPClassUID == DigitalXRayImageStorageForPresentation
    assert derived.PresentationIntentType == "FOR PRESENTATION"
    assert derived.PixelIntensityRelationshipSign == -1
    assert (derived.RescaleSlope, derived.RescaleIntercept, derived.RescaleType) == (1, 0, "US")


def test_secondary_capture_takes_no_detector_attributes(tmp_path):
    source = dx_dataset(stored(PICTURE, 12), DetectorID="D1", KVP="120", PatientAge="070Y")
    derived = derive(tmp_path, source, kind="dicom-sc")
    for keyword in ("DetectorID", "KVP", "PresentationIntentType", "RescaleSlope", "PixelIntensityRelationship"):
        assert keyword not in derived, keyword
    assert derived.ConversionType == "SYN"
    assert derived.SecondaryCaptureDeviceManufacturer == "bsdiff-rt"
    assert derived.PatientAge == "070Y"
    assert derived.ImagerPixelSpacing == [0.2, 0.2]
    assert derive(tmp_path, source, kind="dicom").KVP == 120


def test_a_secondary_capture_source_stays_one(tmp_path):
    source = dataset(stored(PICTURE, 12), SOPClassUID=SecondaryCaptureImageStorage, ConversionType="DF")
    derived = derive(tmp_path, source)
    assert derived.SOPClassUID == SecondaryCaptureImageStorage
    assert derived.ConversionType == "SYN"


def _with_everything():
    source = dataset(stored(PICTURE, 12), WindowCenter=1000, WindowWidth=100)
    source.VOILUTSequence = [lookup_table("voi", np.arange(4096), 0, 12)]
    source.VOILUTFunction = "SIGMOID"
    source.RescaleSlope, source.RescaleIntercept, source.RescaleType = "1", "0", "US"
    source.WindowCenterWidthExplanation = "NORMAL"
    source.add_new("SmallestImagePixelValue", "US", 3)
    source.add_new("LargestImagePixelValue", "US", 4000)
    source.add_new("PixelPaddingValue", "US", 0)
    source.add_new((0x6000, 0x0010), "US", 48)
    source.add_new((0x6002, 0x3000), "OW", b"\0" * 360)
    source.add_new((0x5000, 0x0010), "US", 1)
    source.private_block(0x0011, "SECRET VENDOR", create=True).add_new(1, "LO", "SECRET")
    inner = Dataset()
    inner.CodeValue = "1"
    inner.private_block(0x0013, "SECRET VENDOR", create=True).add_new(1, "LO", "SECRET")
    source.ProcedureCodeSequence = [inner]
    source.IconImageSequence = [Dataset()]
    source.SourceImageSequence = [Dataset()]
    source.DerivationDescription = "edge enhancement"
    source.DigitalSignaturesSequence = [Dataset()]
    source.BurnedInAnnotation = "YES"
    source.RealWorldValueMappingSequence = Sequence([Dataset()])
    source.PixelIntensityRelationshipLUTSequence = Sequence([Dataset()])
    source.SmallestImagePixelValueInPlane, source.LargestImagePixelValueInPlane = 0, 4095
    source.IrradiationEventUID = "1.2.3.4"
    source.ShutterShape = "RECTANGULAR"
    source.ShutterLeftVerticalEdge = "3"
    return source


@pytest.mark.parametrize("kind", ["dicom", "dicom-sc"])
def test_what_described_other_pixels_is_left_out(tmp_path, kind):
    derived = derive(tmp_path, _with_everything(), kind=kind)
    for keyword in (
        *("VOILUTSequence", "VOILUTFunction", "RescaleSlope", "RescaleType"),
        *("SmallestImagePixelValue", "LargestImagePixelValue", "PixelPaddingValue", "IconImageSequence"),
        *("RealWorldValueMappingSequence", "PixelIntensityRelationshipLUTSequence"),
        *("SmallestImagePixelValueInPlane", "LargestImagePixelValueInPlane"),
        "DigitalSignaturesSequence",
    ):
        assert keyword not in derived, keyword
    assert "NORMAL" not in derived.WindowCenterWidthExplanation
    assert not [element for element in derived.iterall() if element.tag.is_private]
    assert not [element for element in derived if element.tag.group in (0x5000, 0x6000, 0x6002)]
    assert len(derived.SourceImageSequence) == 1
    assert derived.DerivationDescription == DERIVATION.description
    assert derived.BurnedInAnnotation == "YES"
    assert derived.IrradiationEventUID == "1.2.3.4"
    assert derived.ProcedureCodeSequence[0].CodeValue == "1"


def test_shutters_stay_only_with_the_matrix(tmp_path):
    assert derive(tmp_path, _with_everything()).ShutterLeftVerticalEdge == 3
    assert "ShutterShape" not in derive(tmp_path, _with_everything(), soft=chest(24, 30))


def test_the_source_is_not_changed(tmp_path):
    radiograph = read_dicom(save(tmp_path / "a.dcm", _with_everything()))
    before = radiograph.dataset.to_json(), radiograph.dataset.file_meta.to_json()
    write_derived(tmp_path / "o.dcm", radiograph, SOFT, DERIVATION)
    assert (radiograph.dataset.to_json(), radiograph.dataset.file_meta.to_json()) == before


def test_nothing_absent_is_made_up(tmp_path):
    absent = ("PatientName", "PatientID", "AccessionNumber", "SeriesDescription", "InstanceNumber", "SeriesInstanceUID")
    derived = derive(tmp_path, dataset(stored(PICTURE, 12), **dict.fromkeys(absent)))
    for keyword in ("PixelSpacing", "LossyImageCompression"):
        assert keyword not in derived, keyword
    for keyword in ("PatientName", "PatientID", "AccessionNumber", "StudyID", "InstanceNumber"):  # type 2
        assert derived[keyword].is_empty, keyword
    assert derived.SeriesDescription == SERIES_SUFFIX


DX_TYPE_2 = ("AnatomicRegionSequence", "DetectorType", "PositionerType", "AcquisitionContextSequence")


def test_what_dx_requires_is_there_empty_where_the_source_lacks_it_and_kept_where_it_has_it(tmp_path):
    bare = dx_dataset(stored(PICTURE, 12), BodyPartExamined=None)
    for keyword in DX_TYPE_2:
        if keyword in bare:
            delattr(bare, keyword)
    derived = derive(tmp_path, bare)
    assert all(derived[keyword].is_empty for keyword in DX_TYPE_2)
    bare.DetectorType = "DIRECT"
    assert derive(tmp_path, bare).DetectorType == "DIRECT"
    assert not any(keyword in derive(tmp_path, dataset(stored(PICTURE, 12))) for keyword in DX_TYPE_2[1:])  # CR


def test_equipment_is_added_to_what_contributed_before(tmp_path):
    item = Dataset()
    item.Manufacturer = "before"
    derived = derive(tmp_path, dataset(stored(PICTURE, 12), ContributingEquipmentSequence=Sequence([item])))
    assert [each.Manufacturer for each in derived.ContributingEquipmentSequence] == ["before", "bsdiff-rt"]


def test_spacing(tmp_path):
    spacings = {"PixelSpacing": ["0.15", "0.148"], "ImagerPixelSpacing": ["0.2", "0.2"]}
    source = dataset(stored(PICTURE, 12), **spacings)
    same = derive(tmp_path, source)
    assert (same.PixelSpacing, same.ImagerPixelSpacing) == ([0.15, 0.148], [0.2, 0.2])
    half = derive(tmp_path, source, soft=chest(24, 20))
    assert half.PixelSpacing == pytest.approx([0.3, 0.444])
    assert half.ImagerPixelSpacing == pytest.approx([0.4, 0.6])
    assert "NominalScannedPixelSpacing" not in half
    zero = derive(tmp_path, dataset(stored(PICTURE, 12), PixelSpacing=["0", "0"]), soft=chest(24, 20))
    assert zero.PixelSpacing == [0, 0]


@pytest.mark.parametrize(
    ("syntax", "flag", "expected"),
    [
        (ExplicitVRLittleEndian, None, None),
        (ExplicitVRLittleEndian, "01", "01"),
        (JPEGLosslessSV1, "00", "00"),
        (JPEGBaseline8Bit, None, "01"),
        (JPEGBaseline8Bit, "01", "01"),
        (JPEGBaseline8Bit, "00", "01"),
    ],
)
def test_lossy_stays_lossy(tmp_path, syntax, flag, expected):
    source = dataset(stored(PICTURE, 8), 8)
    if flag:
        source.LossyImageCompression, source.LossyImageCompressionRatio = flag, "10"
    derived = derive(tmp_path, source, syntax=syntax)
    assert derived.get("LossyImageCompression") == expected
    # Required beside 01 (type 1C). What the source says of it stays.
    if syntax == JPEGBaseline8Bit:
        ratio = PICTURE.size / len(dcmread(tmp_path / "SECRET.dcm").PixelData)
        assert derived.LossyImageCompressionMethod == "ISO_10918_1"
        assert derived.LossyImageCompressionRatio == pytest.approx(10 if flag else ratio, rel=1e-3)


@pytest.mark.parametrize("flag", [None, "01"])
def test_jpeg_2000_is_lossy_where_it_says_so(tmp_path, flag):
    source = dataset(stored(PICTURE, 12))
    if flag:
        source.LossyImageCompression = flag
    source = dcmread(save(tmp_path / "a.dcm", source, JPEG2000Lossless))
    source.file_meta.TransferSyntaxUID = JPEG2000  # allows both
    source.save_as(tmp_path / "b.dcm")
    write_derived(tmp_path / "o.dcm", read_dicom(tmp_path / "b.dcm"), SOFT, DERIVATION)
    derived = dcmread(tmp_path / "o.dcm")
    assert derived.get("LossyImageCompressionMethod") == (flag and "ISO_15444_1")
    if flag:
        assert derived.LossyImageCompressionRatio == pytest.approx(2 * PICTURE.size / len(source.PixelData), rel=1e-3)


def test_uids_depend_on_source_bundle_and_settings_only(tmp_path):
    def uids(header=None, kind="dicom", **changes):
        derivation = Derivation(**{**vars(DERIVATION), **changes})
        derived = derive(tmp_path, header or dataset(stored(PICTURE, 12)), derivation=derivation, kind=kind)
        return derived.SOPInstanceUID, derived.SeriesInstanceUID

    instance, series = uids()
    assert uids(created=None, description="other words") == (instance, series)
    for other in (
        uids(bundle_sha256="ef" * 32),
        uids(settings_digest="0"),
        uids(software_version="0.2.0"),
        uids(kind="dicom-sc"),
    ):
        assert other[0] != instance
        assert other[1] != series
    second, same_series = uids(dataset(stored(PICTURE, 12), SOPInstanceUID="1.2.3.9"))
    assert second != instance
    assert same_series == series
    reprocessed, same_series = uids(dataset(stored(PICTURE**2, 12)))  # sent again under its old UID
    assert reprocessed != instance
    assert same_series == series
    for uid in (instance, series, derive_uid("implementation")):
        assert uid.is_valid
        assert uid.startswith("2.25.")
        assert int(uid[5:]) >> 76 & 0xF == 8
        assert int(uid[5:]) >> 62 & 0x3 == 2


def test_bytes_are_the_same_on_every_run(tmp_path):
    source = _with_everything()
    derive(tmp_path, source, name="a")
    derive(tmp_path, source, name="b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_long_and_foreign_text_is_cut_to_what_dicom_allows(tmp_path):
    derivation = Derivation(**{**vars(DERIVATION), "description": "é\\" * 2000, "bundle_name": "modèle " * 20})
    source = dataset(stored(PICTURE, 12), SeriesDescription="Thorax im Stehen p.a. und viel mehr Text als nötig ist")
    derived = derive(tmp_path, source, derivation=derivation)
    assert len(derived.DerivationDescription) == 1024
    assert derived.DerivationDescription.startswith("?/?/")
    assert len(derived.ContributingEquipmentSequence[0].ManufacturerModelName) <= 64
    assert derived.SeriesDescription.endswith(SERIES_SUFFIX)
    assert len(derived.SeriesDescription) <= 64


def test_a_malformed_element_is_left_out_and_said_without_its_value(tmp_path, caplog):
    header = dataset(stored(PICTURE, 12))
    header.add_new("PregnancyStatus", "LO", "SECRET")  # a number by the standard
    path = save(tmp_path / "SECRET.dcm", header)
    content = path.read_bytes()
    at = content.index(b"\x10\x00\xc0\x21LO")
    path.write_bytes(content[: at + 4] + b"FD" + content[at + 6 :])  # 6 bytes are no 8-byte number
    with warnings.catch_warnings(record=True, action="always") as caught, caplog.at_level(logging.DEBUG):
        write_derived(tmp_path / "o.dcm", read_dicom(path), SOFT, DERIVATION)
    assert "PregnancyStatus" not in dcmread(tmp_path / "o.dcm")
    assert "(0010,21C0)" in caplog.text
    heard = caplog.text + "".join(str(warning.message) for warning in caught)
    assert not any(secret in heard for secret in SECRETS)


def test_a_malformed_element_in_a_sequence_costs_the_sequence_alone(tmp_path, caplog):
    inner = Dataset()
    inner.add_new("PregnancyStatus", "LO", "SECRET")  # as above
    path = save(tmp_path / "s.dcm", dataset(stored(PICTURE, 12), 12, RequestAttributesSequence=[inner]))
    content = path.read_bytes()
    at = content.index(b"\x10\x00\xc0\x21LO")
    path.write_bytes(content[: at + 4] + b"FD" + content[at + 6 :])
    write_derived(tmp_path / "o.dcm", read_dicom(path), SOFT, DERIVATION)
    assert "RequestAttributesSequence" not in dcmread(tmp_path / "o.dcm")
    assert "element (0040,0275) of the source is malformed" in caplog.text


def _in_another_character_set(tmp_path, **elements):
    """Latin-1 bytes that the header calls UTF-8, as faulty gateways write them."""
    path = save(tmp_path / "SECRET.dcm", dataset(stored(PICTURE, 12), **elements))
    path.write_bytes(path.read_bytes().replace(b"ISO_IR 100", b"ISO_IR 192"))
    return read_dicom(path)


def test_a_patient_is_never_given_another_name(tmp_path):
    with pytest.raises(InputFailed, match="not text of the declared Specific Character Set") as failure:
        write_derived(tmp_path / "o.dcm", _in_another_character_set(tmp_path), SOFT, DERIVATION)
    assert not any(secret in str(failure.value) for secret in SECRETS)
    assert not (tmp_path / "o.dcm").exists()


def test_other_text_of_another_character_set_is_left_out_and_said(tmp_path, caplog):
    inner = Dataset()
    inner.CodeMeaning = "SECRET Ärm"
    names = {"PatientName": "A^B", "StudyDescription": "SECRET Thorax für ÄNNE"}
    radiograph = _in_another_character_set(tmp_path, **names, ProcedureCodeSequence=Sequence([inner]))
    write_derived(tmp_path / "o.dcm", radiograph, SOFT, DERIVATION)
    derived = dcmread(tmp_path / "o.dcm")
    assert derived.PatientName == "A^B"
    assert "StudyDescription" not in derived
    assert "ProcedureCodeSequence" not in derived
    assert "(0008,1030)" in caplog.text
    assert not any(secret in caplog.text for secret in SECRETS)


def test_what_the_standard_requires_is_there_and_empty(tmp_path):
    header = dataset(stored(PICTURE, 12), BodyPartExamined=None, ViewPosition=None, StudyDate=None)
    derived = derive(tmp_path, header)
    for keyword in ("Manufacturer", "BodyPartExamined", "ViewPosition", "StudyDate"):
        assert derived[keyword].is_empty
    assert "BodyPartExamined" not in derive(tmp_path, header, kind="dicom-sc")


def test_a_time_zone_that_there_is_not_is_no_time_zone(tmp_path):
    derived = derive(tmp_path, dataset(stored(PICTURE, 12), TimezoneOffsetFromUTC="+2500"))
    assert derived.InstanceCreationDate == "20260504"


def test_failures(tmp_path):
    radiograph = read_dicom(save(tmp_path / "a.dcm", dataset(stored(PICTURE, 12))))
    target = tmp_path / "o.dcm"
    with pytest.raises(SettingsError, match="needs DICOM input"):
        write_derived(target, Radiograph(PICTURE, 12, b""), SOFT, DERIVATION)
    with pytest.raises(InputFailed, match="not an image"):
        write_derived(target, radiograph, SOFT * np.float32(np.nan), DERIVATION)
    with pytest.raises(OSError, match="No such file"):
        write_derived(tmp_path / "none" / "o.dcm", radiograph, SOFT, DERIVATION)
    radiograph.dataset.SOPInstanceUID = None
    with pytest.raises(InputFailed, match="cannot be written again") as failure:
        write_derived(target, radiograph, SOFT, DERIVATION)
    assert failure.value.__cause__ is None
    assert not target.exists()


def test_computed_radiography_stays_it(tmp_path):
    derived = derive(tmp_path, dataset(stored(PICTURE, 12)))
    assert derived.SOPClassUID == ComputedRadiographyImageStorage
    assert "PresentationIntentType" not in derived


def test_x_rays_without_a_series_share_none_across_studies(tmp_path):
    first, second = (
        derive(tmp_path, dataset(stored(PICTURE, 12), SeriesInstanceUID=None, StudyInstanceUID=study))
        for study in ("1.2.3.1", "1.2.3.2")
    )
    assert first.SeriesInstanceUID != second.SeriesInstanceUID


@pytest.mark.parametrize(("offset", "date", "time"), [("+0900", "20260504", "120201"), ("-0330", "20260503", "233201")])
def test_times_count_from_where_the_source_says(tmp_path, offset, date, time):
    created = datetime.datetime(2026, 5, 4, 3, 2, 1, tzinfo=datetime.UTC)
    derivation = Derivation(**{**vars(DERIVATION), "created": created})
    derived = derive(tmp_path, dataset(stored(PICTURE, 12), TimezoneOffsetFromUTC=offset), derivation=derivation)
    assert (derived.InstanceCreationDate, derived.InstanceCreationTime) == (date, time)
    assert derived.ContributingEquipmentSequence[0].ContributionDateTime == f"{date}{time}{offset}"


@pytest.mark.parametrize(("make", "modality"), [(dataset, "CR"), (dx_dataset, "DX")])
def test_a_modality_the_class_implies(tmp_path, make, modality):
    assert derive(tmp_path, make(stored(PICTURE, 12), Modality=None)).Modality == modality


def test_what_only_the_source_is_or_has(tmp_path):
    derived = derive(tmp_path, dataset(stored(PICTURE, 12), SOPInstanceStatus="AO", RetrieveAETitle="ARCHIVE"))
    assert "SOPInstanceStatus" not in derived
    assert "RetrieveAETitle" not in derived


def test_a_number_that_is_none_and_a_description_of_two_values(tmp_path):
    header = dataset(stored(PICTURE, 12), SeriesDescription=["Thorax", "pa"])
    header.InstanceNumber = 77
    path = save(tmp_path / "SECRET.dcm", header)
    path.write_bytes(path.read_bytes().replace(b"IS\x02\x0077", b"IS\x02\x001A"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_derived(tmp_path / "o.dcm", read_dicom(path), SOFT, DERIVATION)
        derived = dcmread(tmp_path / "o.dcm")
        assert derived.InstanceNumber is None
    assert derived.SeriesDescription == f"Thorax pa, {SERIES_SUFFIX}"
