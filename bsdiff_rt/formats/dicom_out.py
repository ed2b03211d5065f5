"""Write soft-tissue images as derived DICOM images: a new series of the same study. Torch-free.

docs/dicom.md says what is copied, changed, added and left out. In short:
  - patient, study, acquisition and geometry stay as they are, character set included; nothing absent is made up;
  - Series and SOP Instance UIDs are new (PS3.3 C.7.6.1.1.2). They follow from source, bundle and settings, so that a
    second run writes the same object again instead of a second one;
  - Image Type is DERIVED, the source is referenced with its purpose, this program is named as contributing equipment;
  - MONOCHROME2 with Presentation LUT Shape IDENTITY, the source's Bits Stored, one window over the full range and one
    fitted to the lungs;
  - whatever describes the source's pixels (LUTs, windows, overlays, icons, signatures, private elements) is left out.
"""

from __future__ import annotations

import hashlib
import io
import re
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Literal

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    SecondaryCaptureImageStorage,
)

from bsdiff_rt.errors import BsdiffError, InputFailed, SettingsError
from bsdiff_rt.files import write_atomically
from bsdiff_rt.formats.base import Derivation as Derivation
from bsdiff_rt.formats.dicom_copy import copy_header
from bsdiff_rt.formats.dicom_elements import BONE_SUPPRESSED, FULL_RANGE, SPACINGS, read_term
from bsdiff_rt.formats.dicom_in import quiet_pydicom
from bsdiff_rt.formats.radiograph import Radiograph, to_stored
from bsdiff_rt.imaging.display import find_lung_levels, is_faint

DicomKind = Literal["dicom", "dicom-sc", "dicom-j2k"]

SERIES_SUFFIX = "bone suppressed, not for diagnostic use"
LUNGS = "LUNGS"  # explanation of the window that is fitted to the lungs
_MANUFACTURER = "bsdiff-rt"
_LO_CHARACTERS, _ST_CHARACTERS, _LT_CHARACTERS = 64, 1024, 10240  # PS3.5 table 6.2-1
_LARGEST_OFFSET = timedelta(hours=14)  # PS3.5 6.2, DT: +1400
_LARGEST_SERIES_NUMBER = 20_000_000  # of a source; a hundred times as much is still an integer string

# Type 2 (required, empty where unknown) in every image of these classes.
_TYPE_2 = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "Manufacturer",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
)
# Type 2 in DX (PS3.3 C.8.11.2, C.8.11.4, C.8.11.5, C.7.6.14). What is of type 1 there and lacking stays so.
_TYPE_2_DX = ("AnatomicRegionSequence", "DetectorType", "PositionerType", "AcquisitionContextSequence")
_TYPE_2_CR = ("BodyPartExamined", "ViewPosition")  # PS3.3 C.8.1.1; of no other class kept here
_CHEST_TERMS = ("CHEST", "THORAX", "TORAX")  # in Body Part Examined


def write_derived(
    path: Path,
    radiograph: Radiograph,
    soft_tissue: NDArray[np.float32],
    derivation: Derivation,
    kind: DicomKind = "dicom",
) -> None:
    """Write a soft-tissue image as a derived DICOM image, Explicit VR Little Endian.

    The bytes are the same on every run, except for the creation dates and times. The file appears whole or not at all.

    Args:
        path: the file; its folder exists.
        radiograph: the source, read by `read_dicom`.
        soft_tissue: [H', W'], float32, in [0, 1], at the source's matrix. Another matrix over the same field of view
            (without padding) is possible: pixel spacings are then scaled.
        derivation: how the image was made.
        kind: dicom keeps the class of CR and DX sources and makes every other one a Secondary Capture image; dicom-sc
            always makes a Secondary Capture image; dicom-j2k is like dicom, with JPEG 2000 lossless pixels.

    Raises:
        SettingsError: the source is not DICOM.
        InputFailed: the result is not an image, or the source's header cannot be written again.
        OSError: the file cannot be written.
    """
    source = radiograph.dataset
    if source is None:
        raise SettingsError("DICOM output needs DICOM input: a derived object refers to its source")
    pixels = to_stored(soft_tissue, radiograph.bits_stored)
    try:
        with quiet_pydicom():
            resized = pixels.shape != radiograph.cxr.shape
            derived = copy_header(source, secondary_capture=kind == "dicom-sc", resized=resized)
            _describe_object(derived, source, radiograph.pixel_digest, derivation)
            _describe_pixels(derived, pixels, radiograph.bits_stored)
            _scale_spacings(derived, source, pixels.shape)
            _describe_windows(derived, soft_tissue, radiograph.bits_stored)
            if kind == "dicom-j2k":
                _compress(derived, pixels, radiograph.bits_stored)
            buffer = io.BytesIO()
            dcmwrite(buffer, derived, enforce_file_format=True)
    except BsdiffError:
        raise
    except Exception as error:  # pydicom's messages quote element values
        raise InputFailed(f"the source's header cannot be written again ({type(error).__name__})") from None
    write_atomically(path, buffer.getvalue())


def derive_uid(kind: str, *parts: str) -> UID:
    """Return a UID that follows from what it stands for.

    It is 2.25 and a UUID (PS3.5 B.2), here version 8 from SHA-256 (RFC 9562).
    """
    digest = _hash(kind, *parts)
    number = int.from_bytes(digest[:16], "big")
    number = number & ~(0xF << 76) | 8 << 76  # version
    number = number & ~(0x3 << 62) | 2 << 62  # variant
    return UID(f"2.25.{number}")


def _hash(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(("bsdiff-rt", *parts)).encode()).digest()


def _compress(derived: Dataset, pixels: NDArray[np.uint8] | NDArray[np.uint16], bits: int) -> None:
    """Replace the pixels by JPEG 2000 lossless (PS3.5 A.4.4). imagecodecs computes it without Python's lock."""
    codestream = imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", reversible=True, bitspersample=bits)
    derived.file_meta.TransferSyntaxUID = JPEG2000Lossless
    derived.PixelData = encapsulate([bytes(codestream)])
    derived["PixelData"].is_undefined_length = True
    derived["PixelData"].VR = "OB"


def _describe_object(derived: Dataset, source: Dataset, pixel_digest: bytes, derivation: Derivation) -> None:
    """Enter identity, provenance and warnings (PS3.3 C.7.3.1, C.7.6.1, C.12.1)."""
    created = (derivation.created or datetime.now()).astimezone(_read_timezone(source))
    _identify(derived, source, pixel_digest, derivation)
    _fill_required(derived, source)
    # No Series Date and Time: it is one for all images of a series, which are written one after another.
    derived.InstanceCreationDate = derived.ContentDate = created.strftime("%Y%m%d")
    derived.InstanceCreationTime = derived.ContentTime = created.strftime("%H%M%S")

    # Value 3 is empty in DX objects (C.8.11.3.1.1) and harmless elsewhere.
    derived.ImageType = ["DERIVED", "SECONDARY", "", BONE_SUPPRESSED]
    derived.SyntheticData = "YES"  # C.12.1: not a faithful representation of acquired data
    derived.DerivationDescription = _to_ascii(derivation.description, _ST_CHARACTERS)
    _enter_warnings(derived, derivation)
    derived.SourceImageSequence = Sequence([_make_source_reference(source)])
    equipment = list(derived.get("ContributingEquipmentSequence") or [])
    derived.ContributingEquipmentSequence = Sequence([*equipment, _make_equipment(derivation, created)])
    if derived.SOPClassUID == DigitalXRayImageStorageForPresentation:
        derived.PresentationIntentType = "FOR PRESENTATION"
    if derived.SOPClassUID == SecondaryCaptureImageStorage:  # C.8.6.1
        derived.ConversionType = "SYN"
        derived.DateOfSecondaryCapture = derived.InstanceCreationDate
        derived.TimeOfSecondaryCapture = derived.InstanceCreationTime
        derived.SecondaryCaptureDeviceManufacturer = _MANUFACTURER
        derived.SecondaryCaptureDeviceManufacturerModelName = _to_ascii(derivation.bundle_name, _LO_CHARACTERS)
        derived.SecondaryCaptureDeviceSoftwareVersions = _to_ascii(derivation.software_version, _LO_CHARACTERS)


def _enter_warnings(derived: Dataset, derivation: Derivation) -> None:
    """Put warnings before the source's Image Comments (C.7.6.1), where a reader at the PACS can see them."""
    if not derivation.warnings:
        return
    warnings = " ".join(f"Warning: {one.rstrip('.')}." for one in derivation.warnings)
    comments = f"{_MANUFACTURER}: {_to_ascii(warnings, _LT_CHARACTERS)} {derived.get('ImageComments') or ''}"
    derived.ImageComments = comments.strip()[:_LT_CHARACTERS]


def _identify(derived: Dataset, source: Dataset, pixel_digest: bytes, derivation: Derivation) -> None:
    """Enter UIDs, series number and description, and the file meta information."""
    made_by = (derivation.bundle_sha256, derivation.settings_digest, derivation.software_version, derived.SOPClassUID)
    # With the pixels: a source sent again, processed anew under its old UID, gives another object.
    derived.SOPInstanceUID = derive_uid("instance", source.SOPInstanceUID, pixel_digest.hex(), *made_by)
    derived.SeriesInstanceUID = derive_uid(
        "series", source.StudyInstanceUID, str(source.get("SeriesInstanceUID") or ""), *made_by
    )
    derived.SeriesNumber = _choose_series_number(derived)
    derived.SeriesDescription = _describe_series(derived)
    derived.InstanceNumber = _read_integer(derived, "InstanceNumber")
    derived.file_meta = FileMetaDataset()
    derived.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    derived.file_meta.MediaStorageSOPClassUID = derived.SOPClassUID
    derived.file_meta.MediaStorageSOPInstanceUID = derived.SOPInstanceUID
    derived.file_meta.ImplementationClassUID = derive_uid("implementation")
    derived.file_meta.ImplementationVersionName = _to_ascii(f"BSDIFF_{derivation.software_version}", 16)


def _choose_series_number(derived: Dataset) -> int:
    """Return a number that sorts the result behind its source: 100 times the source's, plus 1 to 99.

    The last two digits follow from the Series UID: results of several models or settings rarely get the same number. A
    source without a number, or with one that is not usual, gives 9000 to 9999.
    """
    chosen = int(derived.SeriesInstanceUID.rsplit(".", 1)[1])
    number = _read_integer(derived, "SeriesNumber")
    if number is None or not 0 < number <= _LARGEST_SERIES_NUMBER:
        return 9000 + chosen % 1000
    return 100 * number + 1 + chosen % 99


def _fill_required(derived: Dataset, source: Dataset) -> None:
    """Add what the standard requires and the source lacks: empty, or what follows from other elements."""
    required = {ComputedRadiographyImageStorage: _TYPE_2_CR, DigitalXRayImageStorageForPresentation: _TYPE_2_DX}
    for keyword in (*_TYPE_2, *required.get(derived.SOPClassUID, ())):
        if keyword not in derived:
            setattr(derived, keyword, Sequence() if keyword.endswith("Sequence") else None)
    if not derived.get("Modality"):  # the reader takes such files of these two classes alone
        derived.Modality = "CR" if source.SOPClassUID == ComputedRadiographyImageStorage else "DX"
    is_chest = read_term(derived, "BodyPartExamined") in _CHEST_TERMS
    if "AnatomicRegionSequence" in derived and not derived.AnatomicRegionSequence and is_chest:
        derived.AnatomicRegionSequence = _make_code("816094009", "SCT", "Chest")  # CID 4031


def _describe_series(derived: Dataset) -> str:
    """Return the source's description, cut to leave room for what must be read: LO, at most 64 characters."""
    description = derived.get("SeriesDescription") or ""
    before = (description if isinstance(description, str) else " ".join(map(str, description))).strip()
    room = _LO_CHARACTERS - len(SERIES_SUFFIX) - 2
    return f"{before[:room].rstrip()}, {SERIES_SUFFIX}" if before else SERIES_SUFFIX


def _read_integer(derived: Dataset, keyword: str) -> int | None:
    """Return an integer string; None, which is written empty, where there is none or it is no number."""
    try:
        return int(derived[keyword].value)
    except (KeyError, TypeError, ValueError):
        return None


def _read_timezone(source: Dataset) -> timezone | None:
    """Return what the dates and times of the object count from (C.12.1.1.8); None, the local one, if not stated."""
    found = re.fullmatch(r"([+-])(\d\d)(\d\d)", str(source.get("TimezoneOffsetFromUTC") or "").strip())
    if not found:
        return None
    offset = timedelta(hours=int(found[2]), minutes=int(found[3]))
    if offset > _LARGEST_OFFSET:
        return None
    return timezone(-offset if found[1] == "-" else offset)


def _make_source_reference(source: Dataset) -> Dataset:
    """Return the item of the Source Image Sequence (C.7.6.1, C.12.4.1)."""
    item = Dataset()
    item.ReferencedSOPClassUID = source.SOPClassUID
    item.ReferencedSOPInstanceUID = source.SOPInstanceUID
    item.PurposeOfReferenceCodeSequence = _make_code("121322", "DCM", "Source image for image processing operation")
    return item


def _make_equipment(derivation: Derivation, created: datetime) -> Dataset:
    """Return the item of the Contributing Equipment Sequence (C.12.1; purpose from CID 7005)."""
    item = Dataset()
    item.Manufacturer = _MANUFACTURER
    item.ManufacturerModelName = _to_ascii(derivation.bundle_name, _LO_CHARACTERS)
    item.SoftwareVersions = _to_ascii(derivation.software_version, _LO_CHARACTERS)
    item.DeviceUID = derive_uid("device", derivation.bundle_sha256)
    item.ContributionDateTime = created.strftime("%Y%m%d%H%M%S%z")
    item.ContributionDescription = _to_ascii(
        f"Bone suppression; not for diagnostic use; bundle SHA-256 {derivation.bundle_sha256}", _ST_CHARACTERS
    )
    item.PurposeOfReferenceCodeSequence = _make_code("109102", "DCM", "Processing Equipment")
    return item


def _make_code(value: str, scheme: str, meaning: str) -> Sequence:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return Sequence([item])


def _describe_pixels(derived: Dataset, pixels: NDArray[np.uint8] | NDArray[np.uint16], bits_stored: int) -> None:
    """Enter the pixels, the Image Pixel module and the polarity (PS3.3 C.7.6.3, C.11.6)."""
    derived.Rows, derived.Columns = pixels.shape
    derived.SamplesPerPixel = 1
    derived.PhotometricInterpretation = "MONOCHROME2"
    derived.PresentationLUTShape = "IDENTITY"
    derived.BitsAllocated = 8 * pixels.dtype.itemsize
    derived.BitsStored, derived.HighBit = bits_stored, bits_stored - 1
    derived.PixelRepresentation = 0
    if derived.SOPClassUID == DigitalXRayImageStorageForPresentation:  # C.8.11.3: required there
        derived.RescaleSlope, derived.RescaleIntercept, derived.RescaleType = "1", "0", "US"
    if "PixelIntensityRelationshipSign" in derived or derived.SOPClassUID == DigitalXRayImageStorageForPresentation:
        derived.PixelIntensityRelationshipSign = -1  # higher values: less X-ray intensity
    little = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    derived.add_new("PixelData", "OB" if bits_stored == 8 else "OW", little + b"\0" * (len(little) % 2))


def _scale_spacings(derived: Dataset, source: Dataset, shape: tuple[int, ...]) -> None:
    """Scale the pixel spacings if the result has another matrix than the source (PS3.3 10.7)."""
    factors = (int(source.Rows) / shape[0], int(source.Columns) / shape[1])
    if factors == (1, 1):
        return
    for keyword in SPACINGS:
        if keyword in derived and len(derived[keyword].value or ()) == 2:
            derived[keyword].value = [
                f"{float(mm) * factor:.10g}" for mm, factor in zip(derived[keyword].value, factors, strict=True)
            ]


def _describe_windows(derived: Dataset, soft_tissue: NDArray[np.float32], bits_stored: int) -> None:
    """Enter a window over the full range and one fitted to the lungs (PS3.3 C.11.2).

    Viewers begin with the first one. That is the full range, which shows the result like the source. Only if it would
    show the result faint, that of the lungs is first.
    """
    full = 2**bits_stored - 1
    low, high = (round(level * full) for level in find_lung_levels(soft_tissue))
    # LINEAR maps [center - width / 2, center + width / 2 - 1] onto the full output range.
    width = max(high - low, 1) + 1
    windows = [(2 ** (bits_stored - 1), full + 1, FULL_RANGE), (low + width / 2, width, LUNGS)]
    if is_faint(soft_tissue):
        windows.reverse()
    derived.WindowCenter, derived.WindowWidth, derived.WindowCenterWidthExplanation = map(
        list, zip(*windows, strict=True)
    )


def _to_ascii(text: str, characters: int) -> str:
    """Return text that every character set can hold, in one value and at the length that its VR allows."""
    return text.replace("\\", "/").encode("ascii", "replace").decode()[:characters]
