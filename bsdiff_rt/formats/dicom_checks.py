"""Which DICOM files are chest X-rays that can be processed. Everything else is refused with one sentence.

A refusal quotes no attribute that could name a person: only terms that are listed here, numbers, and the names of
registered UIDs.
"""

from __future__ import annotations

import re

from pydicom import Dataset
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    MediaStorageDirectoryStorage,
    MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    SecondaryCaptureImageStorage,
)

from bsdiff_rt.errors import InputFailed, InputRefused
from bsdiff_rt.formats.dicom_elements import (
    BONE_SUPPRESSED,
    SPACINGS,
    mend_spacings,
    name_element,
    read_number,
    read_numbers,
    read_term,
    read_terms,
)
from bsdiff_rt.formats.radiograph import check_size

# Ratio of the sides of a pixel up to which it counts as square.
SQUARE_WITHIN = 1.02

SOP_CLASSES = (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    SecondaryCaptureImageStorage,
    MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
)
MODALITIES = ("CR", "DX", "RG")  # RG: conventional film, digitised
_PHOTOMETRIC = ("MONOCHROME1", "MONOCHROME2")
ACCEPT_ANY_VIEW = "To process it all the same, accept any view (--any-view)."  # the end of each such refusal


def _words(terms: str) -> frozenset[str]:
    return frozenset(terms.split())


# Modalities that a refusal may name (PS3.3 C.7.3.1.1.1). Any other value is not quoted.
_OTHER_MODALITIES = _words(
    "AU BI BMD CT DOC ECG ES FID GM IO IVOCT IVUS KO LS MG MR NM OCT OP OPT OT PR PT PX REG RF RTDOSE RTIMAGE RTPLAN "
    "RTRECORD RTSTRUCT SEG SM SR US VL XA XC"
)
# Words in View Position (0018,5101) that name a lateral, decubitus or oblique view: the defined terms (PS3.3 C.8.7.1.1,
# C.8.11.5), and what vendors and users write.
_OTHER_VIEWS = _words(
    "LL RL LLD RLD LLO RLO LAO RAO LPO RPO LAT OBL LLAT RLAT DECUB DECUBITUS SEITLICH SEITE PROFIL PROFILE XTL"
)
_OTHER_VIEW_PARTS = ("LATERAL", "OBLIQ", "DECUBIT")  # also inside words, as in LEFTLATERAL
_BOTH_SIDES = ("BILATERAL", "UNILATERAL")  # say nothing of the projection
# View Code Sequence (0054,0220), CID 4010: every lateral and oblique projection, in SNOMED CT and as SNOMED-RT id.
_OTHER_VIEW_CODES = _words(
    "399198007 399173006 399067008 30730003 399352003 399260004 260427002 399182000 399236003 399184004 399135007 "
    "399356000 399006002 399038007 399312000 399059000 399160007 "
    "R-10232 R-10236 R-102CD G-A145 R-10228 R-10224 R-40783 R-102C1 R-10234 R-10238 R-10220 "
    "R-40985 R-10212 R-10210 R-10208 R-10216 R-10204"
)
# Words in Body Part Examined (0018,0015) that certainly do not name a chest: defined terms of PS3.16 annex L, and the
# words that users write apart. Everything else may be free text for a chest.
_OTHER_BODY_PARTS = _words(
    "ABDOMEN ACJOINT ANKLE ARM BREAST CALCANEUS COCCYX CSPINE CERVICALSPINE CTSPINE ELBOW EXTREMITY FEMUR FIBULA "
    "FINGER FOOT FOREARM HAND HEAD HIP HUMERUS JAW KNEE LEG LSPINE LUMBAR LUMBARSPINE MANDIBLE MAXILLA NECK ORBIT "
    "PATELLA PELVIS RADIUS SACRUM SHOULDER SIJOINT SINUS SKULL SPINE SSPINE THORACICSPINE THUMB TIBIA TLSPINE TOE "
    "TSPINE ULNA WRIST ABDOMINAL FEET HANDS HIPS KNEES LWS HWS BWS BECKEN HUEFTE KNIE SCHAEDEL SCHULTER WIRBELSAEULE"
)
# A chest word beside one of these: a larger field that shows the chest, such as CHEST ABDOMEN.
_CHEST_PARTS = ("CHEST", "THORAX", "LUNG", "TORAX", "PULMO")
# Anatomic Region Sequence (0008,2218), required in DX: the same regions in SNOMED CT and as SNOMED-RT id (CID 4031).
_OTHER_REGIONS = _words(
    "113345001 818981001 70258002 76752008 122494005 16953009 71341001 56459004 14975008 85562004 69536005 24136001 "
    "72696002 122496007 45048000 12921003 816092008 16982005 89546000 74670003 122495006 421060004 "
    "T-D4000 T-15750 T-04000 T-11501 T-15430 T-12710 T-D9700 T-D8500 T-D8700 T-D1100 T-15710 T-D9200 T-11503 T-D1600 "
    "T-D6000 T-15410 T-11100 T-15460 T-11502"
)


def check_kind(dataset: Dataset, *, derived: bool) -> None:
    """Refuse objects that are not chest X-rays for presentation.

    Args:
        dataset: the header.
        derived: accept results of this program.

    Raises:
        InputRefused: another kind of object.
    """
    sop_class = UID(str(dataset.get("SOPClassUID", "")))
    meta_class = str(dataset.file_meta.get("MediaStorageSOPClassUID", ""))
    if MediaStorageDirectoryStorage in (sop_class, meta_class) or "DirectoryRecordSequence" in dataset:
        raise InputRefused("a DICOMDIR (a directory of files, not an image)")
    intent = read_term(dataset, "PresentationIntentType")
    if sop_class == DigitalXRayImageStorageForProcessing or intent == "FOR PROCESSING":
        raise InputRefused("raw detector data (FOR PROCESSING); use the FOR PRESENTATION image of the same exposure")
    modality = read_term(dataset, "Modality")
    if modality not in MODALITIES and not (not modality and sop_class in SOP_CLASSES[:2]):
        named = modality if modality in _OTHER_MODALITIES else "missing" if not modality else "unknown"
        raise InputRefused(f"not a chest X-ray: modality {named}; {', '.join(MODALITIES)} are processed")
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID"):
        if not dataset.get(keyword):
            raise InputRefused(f"{keyword} is missing; a derived image could not name its source")
    if sop_class not in SOP_CLASSES:
        known = sop_class.name if sop_class.name != str(sop_class) else "an unknown SOP class"
        raise InputRefused(f"not a chest X-ray: {known}; CR, DX and Secondary Capture images are processed")
    if BONE_SUPPRESSED in read_terms(dataset, "ImageType") and not derived:
        raise InputRefused("already bone suppressed; process the original image")


def check_pixel_module(dataset: Dataset) -> list[str]:
    """Refuse what is not one grey frame of 8 to 16 bits (PS3.3 C.7.6.3), and mend what is only written oddly, in place.

    Returns:
        A warning for each thing that was mended and may matter.

    Raises:
        InputRefused: another kind of image.
        InputFailed: the header or the pixel data are incomplete.
    """
    if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
        raise InputRefused("floating-point pixels; integers of 8 to 16 bits are needed")
    if "Rows" not in dataset and "PixelData" not in dataset:
        raise InputRefused("no image (there is no pixel data)")
    if not dataset.get("PixelData"):
        raise InputFailed("no pixel data, although the header describes an image: truncated, or saved without it")
    for keyword in ("Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation"):
        if not isinstance(dataset.get(keyword), int):
            raise InputFailed(f"{keyword} is missing or not a number")
    check_size(int(dataset.Rows), int(dataset.Columns))
    frames = int(read_number(dataset, "NumberOfFrames") or 1)
    if frames > 1:
        raise InputRefused(f"{frames} frames; single images are processed")
    photometric = read_term(dataset, "PhotometricInterpretation")
    if int(dataset.get("SamplesPerPixel") or 1) != 1 or photometric not in _PHOTOMETRIC:
        raise InputRefused("not a grey image (MONOCHROME1 or MONOCHROME2)")
    dataset.PhotometricInterpretation = photometric  # the decoder takes no other spelling
    dataset.SamplesPerPixel = 1  # and does not guess it
    allocated, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
    if allocated not in (8, 16) or not 8 <= stored <= 16:
        raise InputRefused(f"{stored} bits stored in {allocated}; 8 to 16 in 8 or 16 are processed")
    if not stored - 1 <= high_bit(dataset) < allocated:
        raise InputFailed(f"{stored} bits stored up to bit {high_bit(dataset)} do not fit into {allocated} bits")
    warnings = mend_spacings(dataset)
    _check_square(dataset)
    return warnings


def high_bit(dataset: Dataset) -> int:
    """Return the position of the highest bit of a stored value."""
    value = dataset.get("HighBit")
    return int(dataset.BitsStored) - 1 if value is None else int(value)


def _check_square(dataset: Dataset) -> None:
    for keyword in (*SPACINGS, "PixelAspectRatio"):
        sides = read_numbers(dataset, keyword)
        if len(sides) != 2:
            continue
        down, across = sides
        if min(down, across) > 0 and max(down, across) / min(down, across) > SQUARE_WITHIN:
            raise InputRefused(
                f"its pixels are not square ({name_element(keyword)} {down:g} by {across:g}); resample it first"
            )


def check_view(dataset: Dataset) -> None:
    """Refuse views that are not frontal and body parts that are not the chest, as far as the header tells.

    Raises:
        InputRefused: another view or body part.
    """
    view = read_term(dataset, "ViewPosition")
    if other := _find_other_view(view):
        raise InputRefused(f"not a frontal view (View Position {other}). {ACCEPT_ANY_VIEW}")
    for item in dataset.get("ViewCodeSequence") or ():
        if read_term(item, "CodeValue") in _OTHER_VIEW_CODES:
            raise InputRefused(f"not a frontal view (View Code Sequence). {ACCEPT_ANY_VIEW}")
    # Where rows and columns run to (PS3.3 C.7.6.1.1.1). Rows towards the patient's front or back: seen from the side.
    rows, columns = (*read_terms(dataset, "PatientOrientation"), "", "")[:2]
    if not {"AP", "PA"} & set(_split(view)) and rows in ("A", "P"):
        raise InputRefused(f"not a frontal view (Patient Orientation). {ACCEPT_ANY_VIEW}")
    if rows[:1] in ("H", "F") or columns[:1] == "H":  # the model knows upright chests
        raise InputRefused(
            f"the picture is turned or upside down (Patient Orientation). Best turn it first. {ACCEPT_ANY_VIEW}"
        )
    if part := _find_other_part(read_term(dataset, "BodyPartExamined")):
        raise InputRefused(f"not a chest (Body Part Examined {part}). {ACCEPT_ANY_VIEW}")
    for item in dataset.get("AnatomicRegionSequence") or ():
        if read_term(item, "CodeValue") in _OTHER_REGIONS:
            raise InputRefused(f"not a chest (Anatomic Region Sequence). {ACCEPT_ANY_VIEW}")


def _split(term: str) -> list[str]:
    return [word for word in re.split(r"[^0-9A-Z]+", term) if word]


def _find_other_view(view: str) -> str | None:
    """Return the word in a View Position that names a view which is not frontal, from the lists above; else None."""
    for word in _split(view):
        if word in _OTHER_VIEWS:
            return word
        found = next((part for part in _OTHER_VIEW_PARTS if part in word), None)
        if found and not word.startswith(_BOTH_SIDES):
            return {"OBLIQ": "OBLIQUE", "DECUBIT": "DECUBITUS"}.get(found, found)
    return None


def _find_other_part(part: str) -> str | None:
    """Return the word in a Body Part Examined that names no chest, from the list above; None if it may be a chest."""
    if any(chest in part for chest in _CHEST_PARTS) and "SPINE" not in part:
        return None
    words = _split(part)
    return next((word for word in ("".join(words), *words) if word in _OTHER_BODY_PARTS), None)
