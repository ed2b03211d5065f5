"""Copy what a derived DICOM image takes over from its source: patient, study, acquisition and geometry."""

from __future__ import annotations

import copy
import logging

from pydicom import DataElement, Dataset
from pydicom.tag import BaseTag, Tag
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    SecondaryCaptureImageStorage,
)

from bsdiff_rt.errors import InputFailed

logger = logging.getLogger(__name__)


def _tags(keywords: str) -> frozenset[BaseTag]:
    return frozenset(Tag(keyword) for keyword in keywords.split())


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
_TEXT_VRS = ("PN", "LO", "SH", "LT", "ST", "UC", "UT")  # in the Specific Character Set (PS3.5 6.1.2.3)

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


def copy_header(source: Dataset, *, secondary_capture: bool, resized: bool) -> Dataset:
    """Return the elements that a derived image takes over from its source, and its SOP class.

    What is malformed or not text of the declared character set is left out, with a log record that names the element.

    Args:
        source: the header of the source.
        secondary_capture: whether the result is a Secondary Capture image whatever the source is.
        resized: whether the result has another matrix.

    Raises:
        InputFailed: the patient's data are not text of the declared character set.
    """
    kept = (ComputedRadiographyImageStorage, DigitalXRayImageStorageForPresentation)
    as_source = not secondary_capture and source.SOPClassUID in kept
    derived = Dataset()
    for tag in sorted(source.keys()):
        if not _is_copied(tag, as_source, resized):
            continue
        try:
            element: DataElement = copy.deepcopy(source[tag])
            undecoded = _is_undecoded(element)  # reads every value, those in sequences as well
        except Exception as error:  # a value that its VR does not allow; it is not quoted
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


def _is_undecoded(element: DataElement) -> bool:
    """Return whether a text, or one in a sequence, holds bytes that its character set lacks: they were replaced."""
    if element.VR == "SQ":
        return any(_is_undecoded(inner) for item in element.value for inner in item)
    return element.VR in _TEXT_VRS and "\ufffd" in str(element.value)


def _is_copied(tag: BaseTag, as_source: bool, resized: bool) -> bool:
    if tag.is_private or tag.group in _DROPPED_GROUPS or tag in _DROPPED or (resized and tag in _PIXEL_COORDINATES):
        return False
    return as_source or tag.group in (0x0010, 0x0012) or tag in _SC_COPIED
