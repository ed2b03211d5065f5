"""Derived DICOM images out: the soft-tissue picture as a new series of the same study. Torch-free.

What is copied, changed, added and left out, and why, is in docs/dicom.md. In one line each:
  - patient, study, acquisition and geometry stay as they are, character set included; nothing absent is made up;
  - new Series and SOP Instance UIDs (PS3.3 C.7.6.1.1.2), computed from source, bundle and settings, so that a re-run
    makes the same object again instead of a second one;
  - Image Type DERIVED, the source referenced with its purpose, this program named as contributing equipment;
  - MONOCHROME2 with Presentation LUT Shape IDENTITY, the source's Bits Stored, a window over the full range;
  - whatever describes the source's pixels (LUTs, windows, overlays, icons, signatures, private elements) is left out.
"""

from __future__ import annotations

import copy
import hashlib
import io
import logging
import re
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydicom import DataElement, Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag, Tag
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
)

from bsdiff_rt.errors import BsdiffError, InputFailed, SettingsError
from bsdiff_rt.files import write_atomically
from bsdiff_rt.formats.base import Derivation as Derivation
from bsdiff_rt.formats.dicom_elements import BONE_SUPPRESSED
from bsdiff_rt.formats.dicom_in import quiet_pydicom
from bsdiff_rt.formats.radiograph import Radiograph, to_stored

logger = logging.getLogger(__name__)


def _tags(keywords: str) -> frozenset[BaseTag]:
    return frozenset(Tag(keyword) for keyword in keywords.split())


SERIES_SUFFIX = "bone suppressed, not for diagnostic use"
_MANUFACTURER = "bsdiff-rt"
_LO_CHARACTERS, _ST_CHARACTERS = 64, 1024  # PS3.5 table 6.2-1

# Elements that describe the source's pixels, its presentation, its series or its object, not the patient's examination.
_DROPPED = _tags(
    """
    VOILUTSequence VOILUTFunction WindowCenter WindowWidth WindowCenterWidthExplanation ModalityLUTSequence
    RescaleSlope RescaleIntercept RescaleType PresentationLUTSequence SoftcopyVOILUTSequence
    SmallestValidPixelValue LargestValidPixelValue SmallestImagePixelValue LargestImagePixelValue
    SmallestPixelValueInSeries LargestPixelValueInSeries SmallestImagePixelValueInPlane LargestImagePixelValueInPlane
    PixelPaddingValue PixelPaddingRangeLimit PlanarConfiguration
    RealWorldValueMappingSequence PixelIntensityRelationshipLUTSequence
    NumberOfFrames FrameIncrementPointer PixelDataProviderURL ICCProfile IconImageSequence HistogramSequence
    DigitalSignaturesSequence MACParametersSequence EncryptedAttributesSequence DataSetTrailingPadding
    SourceImageSequence DerivationDescription DerivationCodeSequence SeriesDescriptionCodeSequence
    InstanceCreatorUID ReferencedPerformedProcedureStepSequence SeriesDate SeriesTime SOPInstanceStatus
    SOPAuthorizationDateTime SOPAuthorizationComment AuthorizationEquipmentCertificationNumber RetrieveAETitle
    InstanceAvailability
    """
)
_DROPPED_GROUPS = (0x0000, 0x0002, 0x7FE0, *range(0x5000, 0x5100, 2), *range(0x6000, 0x6100, 2))  # curves, overlays

# In px of the source's matrix; left out where the matrix changes.
_PIXEL_COORDINATES = _tags(
    """
    ShutterShape ShutterLeftVerticalEdge ShutterRightVerticalEdge ShutterUpperHorizontalEdge ShutterLowerHorizontalEdge
    CenterOfCircularShutter RadiusOfCircularShutter VerticesOfThePolygonalShutter ShutterPresentationValue
    CollimatorShape CollimatorLeftVerticalEdge CollimatorRightVerticalEdge CollimatorUpperHorizontalEdge
    CollimatorLowerHorizontalEdge CenterOfCircularCollimator RadiusOfCircularCollimator VerticesOfThePolygonalCollimator
    """
)
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
# The same of DX (PS3.3 C.8.11.2, C.8.11.4, C.8.11.5, C.7.6.14). What is of type 1 there and lacking stays so.
_TYPE_2_DX = ("AnatomicRegionSequence", "DetectorType", "PositionerType", "AcquisitionContextSequence")
_TYPE_2_CR = ("BodyPartExamined", "ViewPosition")  # PS3.3 C.8.1.1; of no other class kept here
_TEXT_VRS = ("PN", "LO", "SH", "LT", "ST", "UC", "UT")  # in the Specific Character Set (PS3.5 6.1.2.3)
_SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")

_LARGEST_OFFSET = timedelta(hours=14)  # PS3.5 6.2, DT: +1400

# What a Secondary Capture image takes over: patient and trial (groups 0010 and 0012), and of the rest only this.
_SC_COPIED = _tags(
    """
    SpecificCharacterSet StudyDate StudyTime AcquisitionDate AcquisitionTime AcquisitionDateTime AccessionNumber
    IssuerOfAccessionNumberSequence Modality InstitutionName ReferringPhysicianName TimezoneOffsetFromUTC
    StudyDescription ProcedureCodeSequence SeriesDescription ReferencedStudySequence Manufacturer ManufacturerModelName
    AnatomicRegionSequence IrradiationEventUID BodyPartExamined ViewPosition ImagerPixelSpacing
    NominalScannedPixelSpacing PatientPosition ContributingEquipmentSequence StudyInstanceUID StudyID SeriesNumber
    InstanceNumber AcquisitionNumber PatientOrientation Laterality ImageLaterality FrameOfReferenceUID
    PositionReferenceIndicator PixelSpacing PixelSpacingCalibrationType PixelSpacingCalibrationDescription
    PixelAspectRatio BurnedInAnnotation RecognizableVisualFeatures LossyImageCompression LossyImageCompressionRatio
    LossyImageCompressionMethod ViewCodeSequence
    """
)


def write_derived(
    path: Path,
    radiograph: Radiograph,
    soft_tissue: NDArray[np.float32],
    derivation: Derivation,
    sop: Literal["same", "sc"] = "same",
) -> None:
    """Write a soft-tissue picture as a derived DICOM image, uncompressed, Explicit VR Little Endian.

    The bytes are the same on every run, but for the creation dates and times. The file appears whole or not at all.

    Args:
        path: the file; its folder exists.
        radiograph: the source, read by `dicom.read_dicom`.
        soft_tissue: [H', W'], float32, in [0, 1]; the source's matrix, or another one over the same field of view
            (without padding): pixel spacings are then scaled.
        sop: "same" keeps the class of CR and DX sources and makes every other one a Secondary Capture image; "sc"
            always makes a Secondary Capture image.

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
            derived = _header(source, sop, resized=pixels.shape != radiograph.cxr.shape)
            _describe_object(derived, source, radiograph.pixel_digest, derivation)
            _describe_pixels(derived, source, pixels, radiograph.bits_stored)
            buffer = io.BytesIO()
            dcmwrite(buffer, derived, enforce_file_format=True)
    except BsdiffError:
        raise
    except Exception as error:  # pydicom's messages quote element values
        raise InputFailed(f"the source's header cannot be written again ({type(error).__name__})") from None
    write_atomically(path, buffer.getvalue())


def derived_uid(kind: str, *parts: str) -> UID:
    """A UID computed from what it stands for: 2.25 and a UUID (PS3.5 B.2), here version 8 from SHA-256 (RFC 9562)."""
    digest = hashlib.sha256("\0".join(("bsdiff-rt", kind, *parts)).encode()).digest()
    number = int.from_bytes(digest[:16], "big")
    number = number & ~(0xF << 76) | 8 << 76  # version
    number = number & ~(0x3 << 62) | 2 << 62  # variant
    return UID(f"2.25.{number}")


def _header(source: Dataset, sop: Literal["same", "sc"], *, resized: bool) -> Dataset:
    """The elements a derived image takes over from its source, and its SOP class."""
    kept = (ComputedRadiographyImageStorage, DigitalXRayImageStorageForPresentation)
    as_source = sop == "same" and source.SOPClassUID in kept
    derived = Dataset()
    for tag in sorted(source.keys()):
        if not _is_copied(tag, as_source, resized):
            continue
        try:
            element: DataElement = copy.deepcopy(source[tag])
            undecoded = _undecoded(element)  # reads every value, those in sequences as well
        except Exception as error:  # a value that its VR does not allow; which one is not said
            logger.warning("element %s of the source is malformed (%s) and left out", tag, type(error).__name__)
            continue
        if undecoded:
            if tag.group == 0x0010:  # an altered name or ID is another patient's
                raise InputFailed(
                    "the patient's data are not text of the declared Specific Character Set and cannot be copied "
                    "unchanged; correct the header"
                )
            logger.warning("element %s of the source is not text of its character set and left out", tag)
            continue
        derived.add(element)
    derived.remove_private_tags()
    derived.SOPClassUID = source.SOPClassUID if as_source else SecondaryCaptureImageStorage
    return derived


def _undecoded(element: DataElement) -> bool:
    """Whether a text, or one in a sequence, holds bytes that its character set has not: they were replaced."""
    if element.VR == "SQ":
        return any(_undecoded(inner) for item in element.value for inner in item)
    return element.VR in _TEXT_VRS and "\ufffd" in str(element.value)


def _is_copied(tag: BaseTag, as_source: bool, resized: bool) -> bool:
    if tag.is_private or tag.group in _DROPPED_GROUPS or tag in _DROPPED or (resized and tag in _PIXEL_COORDINATES):
        return False
    return as_source or tag.group in (0x0010, 0x0012) or tag in _SC_COPIED


def _describe_object(derived: Dataset, source: Dataset, pixel_digest: bytes, derivation: Derivation) -> None:
    """Identity, provenance and warnings (PS3.3 C.7.3.1, C.7.6.1, C.12.1)."""
    created = (derivation.created or datetime.now()).astimezone(_timezone(source))
    date, time = created.strftime("%Y%m%d"), created.strftime("%H%M%S")
    made_by = (derivation.bundle_sha256, derivation.settings_digest, derivation.software_version, derived.SOPClassUID)

    # With the pixels: a source sent again, processed anew under its old UID, gives another object.
    derived.SOPInstanceUID = derived_uid("instance", source.SOPInstanceUID, pixel_digest.hex(), *made_by)
    derived.SeriesInstanceUID = derived_uid(
        "series", source.StudyInstanceUID, str(source.get("SeriesInstanceUID") or ""), *made_by
    )
    # Four digits away from the scanner's own numbers; the same for all images of the new series.
    derived.SeriesNumber = 9000 + int(derived.SeriesInstanceUID.rsplit(".", 1)[1]) % 1000
    derived.SeriesDescription = _series_description(derived)
    derived.InstanceNumber = _integer(derived, "InstanceNumber")
    required = {ComputedRadiographyImageStorage: _TYPE_2_CR, DigitalXRayImageStorageForPresentation: _TYPE_2_DX}
    for keyword in (*_TYPE_2, *required.get(derived.SOPClassUID, ())):
        if keyword not in derived:
            setattr(derived, keyword, Sequence() if keyword.endswith("Sequence") else None)
    if not derived.get("Modality"):  # the reader takes such files of these two classes alone
        derived.Modality = "CR" if source.SOPClassUID == ComputedRadiographyImageStorage else "DX"
    # No Series Date and Time: it is one for all images of a series, which are written one after another.
    derived.InstanceCreationDate = derived.ContentDate = date
    derived.InstanceCreationTime = derived.ContentTime = time

    # Value 3 is empty in DX objects (C.8.11.3.1.1) and harmless elsewhere.
    derived.ImageType = ["DERIVED", "SECONDARY", "", BONE_SUPPRESSED]
    derived.SyntheticData = "YES"  # C.12.1: not a faithful representation of acquired data
    derived.DerivationDescription = _ascii(derivation.description, _ST_CHARACTERS)
    derived.SourceImageSequence = Sequence([_source_reference(source)])
    equipment = list(derived.get("ContributingEquipmentSequence") or [])
    derived.ContributingEquipmentSequence = Sequence([*equipment, _equipment(derivation, created)])
    if derived.SOPClassUID == DigitalXRayImageStorageForPresentation:
        derived.PresentationIntentType = "FOR PRESENTATION"
    if derived.SOPClassUID == SecondaryCaptureImageStorage:  # C.8.6.1
        derived.ConversionType = "SYN"
        derived.DateOfSecondaryCapture, derived.TimeOfSecondaryCapture = date, time
        derived.SecondaryCaptureDeviceManufacturer = _MANUFACTURER
        derived.SecondaryCaptureDeviceManufacturerModelName = _ascii(derivation.bundle_name, _LO_CHARACTERS)
        derived.SecondaryCaptureDeviceSoftwareVersions = _ascii(derivation.software_version, _LO_CHARACTERS)

    derived.file_meta = FileMetaDataset()
    derived.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    derived.file_meta.MediaStorageSOPClassUID = derived.SOPClassUID
    derived.file_meta.MediaStorageSOPInstanceUID = derived.SOPInstanceUID
    derived.file_meta.ImplementationClassUID = derived_uid("implementation")
    derived.file_meta.ImplementationVersionName = _ascii(f"BSDIFF_{derivation.software_version}", 16)


def _series_description(derived: Dataset) -> str:
    """The source's description, cut to leave room for what must be read: LO, at most 64 characters."""
    description = derived.get("SeriesDescription") or ""
    before = (description if isinstance(description, str) else " ".join(map(str, description))).strip()
    room = _LO_CHARACTERS - len(SERIES_SUFFIX) - 2
    return f"{before[:room].rstrip()}, {SERIES_SUFFIX}" if before else SERIES_SUFFIX


def _integer(derived: Dataset, keyword: str) -> int | None:
    """An integer string; None, which is written empty, where there is none or it is no number."""
    try:
        return int(derived[keyword].value)
    except (KeyError, TypeError, ValueError):
        return None


def _timezone(source: Dataset) -> timezone | None:
    """What the dates and times of the whole object count from (C.12.1.1.8); None, the local one, where not said."""
    found = re.fullmatch(r"([+-])(\d\d)(\d\d)", str(source.get("TimezoneOffsetFromUTC") or "").strip())
    if not found:
        return None
    offset = timedelta(hours=int(found[2]), minutes=int(found[3]))
    if offset > _LARGEST_OFFSET:
        return None
    return timezone(-offset if found[1] == "-" else offset)


def _source_reference(source: Dataset) -> Dataset:
    """Item of the Source Image Sequence (C.7.6.1, C.12.4.1)."""
    item = Dataset()
    item.ReferencedSOPClassUID = source.SOPClassUID
    item.ReferencedSOPInstanceUID = source.SOPInstanceUID
    item.PurposeOfReferenceCodeSequence = _code("121322", "Source image for image processing operation")
    return item


def _equipment(derivation: Derivation, created: datetime) -> Dataset:
    """Item of the Contributing Equipment Sequence (C.12.1; purpose from CID 7005)."""
    item = Dataset()
    item.Manufacturer = _MANUFACTURER
    item.ManufacturerModelName = _ascii(derivation.bundle_name, _LO_CHARACTERS)
    item.SoftwareVersions = _ascii(derivation.software_version, _LO_CHARACTERS)
    item.DeviceUID = derived_uid("device", derivation.bundle_sha256)
    item.ContributionDateTime = created.strftime("%Y%m%d%H%M%S%z")
    item.ContributionDescription = _ascii(
        f"Bone suppression; not for diagnostic use; bundle SHA-256 {derivation.bundle_sha256}", _ST_CHARACTERS
    )
    item.PurposeOfReferenceCodeSequence = _code("109102", "Processing Equipment")
    return item


def _code(value: str, meaning: str) -> Sequence:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
    return Sequence([item])


def _describe_pixels(
    derived: Dataset, source: Dataset, pixels: NDArray[np.uint8] | NDArray[np.uint16], bits_stored: int
) -> None:
    """Image Pixel module, polarity, window and spacing (PS3.3 C.7.6.3, C.11.6, C.11.2, 10.7)."""
    rows, columns = pixels.shape
    derived.Rows, derived.Columns = rows, columns
    derived.SamplesPerPixel = 1
    derived.PhotometricInterpretation = "MONOCHROME2"
    derived.PresentationLUTShape = "IDENTITY"
    derived.BitsAllocated = 8 * pixels.dtype.itemsize
    derived.BitsStored, derived.HighBit = bits_stored, bits_stored - 1
    derived.PixelRepresentation = 0
    # LINEAR maps [center - width / 2, center + width / 2 - 1] onto the full output range.
    derived.WindowCenter, derived.WindowWidth = 2 ** (bits_stored - 1), 2**bits_stored
    if derived.SOPClassUID == DigitalXRayImageStorageForPresentation:  # C.8.11.3: required there
        derived.RescaleSlope, derived.RescaleIntercept, derived.RescaleType = "1", "0", "US"
    if "PixelIntensityRelationshipSign" in derived or derived.SOPClassUID == DigitalXRayImageStorageForPresentation:
        derived.PixelIntensityRelationshipSign = -1  # higher values: less X-ray intensity
    factors = (int(source.Rows) / rows, int(source.Columns) / columns)
    if factors != (1, 1):
        for keyword in _SPACINGS:
            if keyword in derived and len(derived[keyword].value or ()) == 2:
                derived[keyword].value = [
                    f"{float(mm) * factor:.10g}" for mm, factor in zip(derived[keyword].value, factors, strict=True)
                ]
    little = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    derived.add_new("PixelData", "OB" if bits_stored == 8 else "OW", little + b"\0" * (len(little) % 2))


def _ascii(text: str, characters: int) -> str:
    """Text that every character set can hold, in one value and at the length its VR allows."""
    return text.replace("\\", "/").encode("ascii", "replace").decode()[:characters]
