"""DICOM chest X-rays in: header checks, decoding, and the way from stored values to the picture shown. Torch-free.

stored values -> Modality LUT -> VOI LUT -> polarity -> [0, 1] (PS3.3 C.11.1, C.11.2, C.7.6.3.1.2; PS3.4 N.2).

What is accepted: single-frame grey CR, DX and RG pictures in the CR, DX-for-presentation and Secondary Capture classes,
8 to 16 bits stored. Everything else is refused with one line that quotes no attribute which could name a person: only
terms this module lists itself (modalities, views, body parts), numbers and the names of registered UIDs. Exceptions of
pydicom and the codecs quote element values, so their text is dropped and only their type is given.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    JPEG2000,
    UID,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSNearLossless,
    MediaStorageDirectoryStorage,
    MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
)
from pydicom.valuerep import VR

from bsdiff_rt.errors import BsdiffError, InputFailed, InputRefused
from bsdiff_rt.formats.dicom_grey import shown_picture
from bsdiff_rt.formats.radiograph import Radiograph, check_picture, pixel_digest


def _words(terms: str) -> frozenset[str]:
    return frozenset(terms.split())


# Ratio of the sides of a pixel up to which it is taken for square.
SQUARE_WITHIN = 1.02
BONE_SUPPRESSED = "BONE_SUPPRESSED"  # value 4 of Image Type in what derived.py writes

SOP_CLASSES = (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    SecondaryCaptureImageStorage,
    MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
)
MODALITIES = ("CR", "DX", "RG")  # RG: conventional film, digitised

# Named in a refusal; any other value is not quoted (PS3.3 C.7.3.1.1.1).
_OTHER_MODALITIES = _words(
    "AU BI BMD CT DOC ECG ES FID GM IO IVOCT IVUS KO LS MG MR NM OCT OP OPT OT PR PT PX REG RF RTDOSE RTIMAGE RTPLAN "
    "RTRECORD RTSTRUCT SEG SM SR US VL XA XC"
)
# View Position (0018,5101), PS3.3 C.8.7.1.1 and C.8.11.5: lateral, decubitus, oblique, and what is found in practice.
_OTHER_VIEWS = _words("LL RL LLD RLD LLO RLO LAO RAO LPO RPO LAT LATERAL OBL OBLIQUE LLAT RLAT")
# View Code Sequence (0054,0220), CID 4010: every lateral and oblique projection, in SNOMED CT and as SNOMED-RT id.
_OTHER_VIEW_CODES = _words(
    "399198007 399173006 399067008 30730003 399352003 399260004 260427002 399182000 399236003 399184004 399135007 "
    "399356000 399006002 399038007 399312000 399059000 399160007 "
    "R-10232 R-10236 R-102CD G-A145 R-10228 R-10224 R-40783 R-102C1 R-10234 R-10238 R-10220 "
    "R-40985 R-10212 R-10210 R-10208 R-10216 R-10204"
)
# Body Part Examined (0018,0015), PS3.16 annex L: terms that are certainly not a chest; others are often free text.
_OTHER_BODY_PARTS = _words(
    "ABDOMEN ANKLE ARM BREAST CALCANEUS CSPINE CERVICALSPINE ELBOW EXTREMITY FEMUR FINGER FOOT FOREARM HAND HEAD HIP "
    "HUMERUS JAW KNEE LEG LSPINE LUMBARSPINE MANDIBLE NECK PATELLA PELVIS SHOULDER SKULL THUMB TOE WRIST"
)
# Anatomic Region Sequence (0008,2218), required in DX: the same regions in SNOMED CT and as SNOMED-RT id (CID 4031).
_OTHER_REGIONS = _words(
    "113345001 818981001 70258002 76752008 122494005 16953009 71341001 56459004 14975008 85562004 69536005 24136001 "
    "72696002 122496007 45048000 12921003 816092008 16982005 89546000 74670003 "
    "T-D4000 T-15750 T-04000 T-11501 T-15430 T-12710 T-D9700 T-D8500 T-D8700 T-D1100 T-15710 T-D9200 T-11503 T-D1600 "
    "T-D6000 T-15410 T-11100 T-15460"
)
_JPEG_2000 = "ISO_15444_1"
_LOSSY_METHODS = {  # by transfer syntax; PS3.3 C.7.6.1.1.5.1
    JPEGBaseline8Bit: "ISO_10918_1",
    JPEGExtended12Bit: "ISO_10918_1",
    JPEGLSNearLossless: "ISO_14495_1",
    JPEG2000: _JPEG_2000,
}
_PHOTOMETRIC = ("MONOCHROME1", "MONOCHROME2")


def is_dicom(path: Path) -> bool:
    """Whether the file starts like DICOM: "DICM" after a 128-byte preamble, or a group 0002 or 0008 data element.

    Files without preamble are not conforming (PS3.10 section 7.1) but common in old archives. A file that cannot be
    read is not DICOM here; reading it says why.
    """
    try:
        with path.open("rb") as file:
            head = file.read(132)
            size = file.seek(0, 2)
    except OSError:
        return False
    if head[128:132] == b"DICM":
        return True
    if len(head) < 8 or head[:4] not in (b"\x02\0\0\0", b"\x02\0\1\0", *_GROUP_8_LITTLE, *_GROUP_8_BIG):
        return False
    if head[4:6].decode("latin-1") in set(VR):
        return True
    return int.from_bytes(head[4:8], "little") <= min(size - 8, 1024)


_GROUP_8_LITTLE = tuple(bytes((8, 0, element, 0)) for element in (0, 1, 5, 8, 0x12, 0x14, 0x16, 0x18))
_GROUP_8_BIG = tuple(bytes((0, 8, 0, element)) for element in (0, 1, 5, 8, 0x12, 0x14, 0x16, 0x18))


def read_dicom(path: Path, *, force_view: bool = False, derived: bool = False) -> Radiograph:
    """Read a chest X-ray from a DICOM file.

    Args:
        path: the file.
        force_view: accept lateral and oblique views and other body parts, too.
        derived: accept bone-suppressed images, too (to evaluate them, not to process them again).

    Returns:
        The picture as it is meant to be shown, and the header without its pixels. Pixels that are padding (Pixel
        Padding Value, PS3.3 C.7.5.1.1.2) are 0.

    Raises:
        InputRefused: readable, but not a single-frame, grey, frontal chest X-ray for presentation.
        InputFailed: unreadable, truncated or damaged.
    """
    try:
        with quiet_pydicom():
            if not is_dicom(path):
                raise _not_dicom(path)
            dataset = dcmread(path, force=True)
            if not dataset:  # pydicom's answer to an end of file inside an element of undefined length
                raise InputFailed("truncated or damaged: no data elements can be read")
            _assume_transfer_syntax(dataset)
            _check_kind(dataset)
            if BONE_SUPPRESSED in _terms(dataset, "ImageType") and not derived:
                raise InputRefused("already bone suppressed; process the original image")
            _check_pixel_module(dataset)
            if not force_view:
                _check_view(dataset)
            stored = _stored_values(dataset)
            cxr = shown_picture(stored, dataset)
            _say_lossy(dataset)
            del dataset.PixelData
    except BsdiffError:
        raise
    except Exception as error:  # damaged input makes pydicom and the codecs raise anything; their text quotes values
        raise InputFailed(f"damaged or not conforming to DICOM ({type(error).__name__})") from None
    check_picture(cxr)
    return Radiograph(cxr, int(dataset.BitsStored), pixel_digest(stored), dataset, "dicom")


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Keep pydicom's log records of this thread, and its warnings, to itself: both quote element values.

    The warnings filter stays in place afterwards: taking it away again would not be safe with several reading threads,
    and neither would putting it there again, which Python does by taking it away first.
    """
    first = warnings.filters[0] if warnings.filters else None
    if first is None or getattr(first[3], "pattern", None) != _PYDICOM:
        warnings.filterwarnings("ignore", module=_PYDICOM)
    before = getattr(_reading, "active", False)
    _reading.active = True
    try:
        yield
    finally:
        _reading.active = before


_PYDICOM = r"pydicom\."
_reading = threading.local()
# A logger's filter does not see what its children log: each has its own.
for _name in ("pydicom", *(name for name in logging.root.manager.loggerDict if name.startswith("pydicom."))):
    logging.getLogger(_name).addFilter(lambda record: not getattr(_reading, "active", False))


def _not_dicom(path: Path) -> BsdiffError:
    """Why a file that does not start like DICOM cannot be read."""
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        return InputFailed(f"cannot be read: {error.strerror or type(error).__name__}")
    return InputFailed("the file is empty (0 bytes)") if empty else InputRefused("not a DICOM file")


def _assume_transfer_syntax(dataset: Dataset) -> None:
    """Where the file meta information lacks the transfer syntax, set the one pydicom found the elements encoded in."""
    if "TransferSyntaxUID" in dataset.file_meta:
        return
    implicit, little = dataset.original_encoding
    explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit


def _check_kind(dataset: Dataset) -> None:
    """Refuse what is not a chest X-ray object for presentation."""
    sop_class = UID(str(dataset.get("SOPClassUID", "")))
    meta_class = str(dataset.file_meta.get("MediaStorageSOPClassUID", ""))
    if MediaStorageDirectoryStorage in (sop_class, meta_class) or "DirectoryRecordSequence" in dataset:
        raise InputRefused("a DICOMDIR (a directory of files, not an image)")
    intent = _term(dataset, "PresentationIntentType")
    if sop_class == DigitalXRayImageStorageForProcessing or intent == "FOR PROCESSING":
        raise InputRefused("raw detector data (FOR PROCESSING); use the FOR PRESENTATION image of the same exposure")
    modality = _term(dataset, "Modality")
    if modality not in MODALITIES and not (not modality and sop_class in SOP_CLASSES[:2]):
        named = modality if modality in _OTHER_MODALITIES else "missing" if not modality else "unknown"
        raise InputRefused(f"not a chest X-ray: modality {named}; {', '.join(MODALITIES)} are processed")
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID"):
        if not dataset.get(keyword):
            raise InputRefused(f"{keyword} is missing; a derived image could not name its source")
    if sop_class not in SOP_CLASSES:
        known = sop_class.name if sop_class.name != str(sop_class) else "an unknown SOP class"
        raise InputRefused(f"not a chest X-ray: {known}; CR, DX and Secondary Capture images are processed")


def _check_pixel_module(dataset: Dataset) -> None:
    """Refuse what is not one grey frame of 8 to 16 bits (PS3.3 C.7.6.3); find a header that lost its pixels."""
    if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
        raise InputRefused("floating-point pixels; integers of 8 to 16 bits are needed")
    if "Rows" not in dataset and "PixelData" not in dataset:
        raise InputRefused("no image (there is no pixel data)")
    if "PixelData" not in dataset:
        raise InputFailed("no pixel data, although the header describes an image: truncated, or saved without it")
    for keyword in ("Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation"):
        if not isinstance(dataset.get(keyword), int):
            raise InputFailed(f"{keyword} is missing or not a number")
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise InputRefused(f"{int(dataset.NumberOfFrames)} frames; single images are processed")
    photometric = _term(dataset, "PhotometricInterpretation")
    if int(dataset.get("SamplesPerPixel") or 1) != 1 or photometric not in _PHOTOMETRIC:
        raise InputRefused("not a grey image (MONOCHROME1 or MONOCHROME2)")
    allocated, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
    if allocated not in (8, 16) or not 8 <= stored <= 16:
        raise InputRefused(f"{stored} bits stored in {allocated}; 8 to 16 in 8 or 16 are processed")
    if not stored - 1 <= _high_bit(dataset) < allocated:
        raise InputFailed(f"{stored} bits stored up to bit {_high_bit(dataset)} do not fit into {allocated} bits")
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio"):
        sides: Any = dataset.get(keyword)
        if sides is None or isinstance(sides, str) or len(sides) != 2:
            continue
        down, across = (float(side) for side in sides)
        if min(down, across) > 0 and max(down, across) / min(down, across) > SQUARE_WITHIN:
            raise InputRefused(f"its pixels are not square ({keyword} {down:g} by {across:g}); resample it first")


def _check_view(dataset: Dataset) -> None:
    """Refuse views that are not frontal and body parts that are not the chest, as far as the header tells."""
    view = _term(dataset, "ViewPosition")
    if view in _OTHER_VIEWS:
        raise InputRefused(f"not a frontal view (View Position {view}); --force processes it all the same")
    for item in dataset.get("ViewCodeSequence") or ():
        if _term(item, "CodeValue") in _OTHER_VIEW_CODES:
            raise InputRefused("not a frontal view (View Code Sequence); --force processes it all the same")
    # Where rows and columns run to (PS3.3 C.7.6.1.1.1). Rows towards the patient's front or back: seen from the side.
    rows, columns = (*_terms(dataset, "PatientOrientation"), "", "")[:2]
    if view not in ("AP", "PA") and rows in ("A", "P"):
        raise InputRefused("not a frontal view (Patient Orientation); --force processes it all the same")
    if rows[:1] in ("H", "F") or columns[:1] == "H":  # the networks know upright chests
        raise InputRefused(
            "the picture is turned or upside down (Patient Orientation); turn it first, or --force processes it all "
            "the same"
        )
    part = _term(dataset, "BodyPartExamined")
    if part in _OTHER_BODY_PARTS:
        raise InputRefused(f"not a chest (Body Part Examined {part}); --force processes it all the same")
    for item in dataset.get("AnatomicRegionSequence") or ():
        if _term(item, "CodeValue") in _OTHER_REGIONS:
            raise InputRefused("not a chest (Anatomic Region Sequence); --force processes it all the same")


def _stored_values(dataset: Dataset) -> NDArray[np.int32]:
    """Decode to stored values, [H, W], int32, with unused bits cleared and the sign extended (PS3.5 section 8.1.1).

    The decoder is named, so that the same file gives the same pixels whatever other codec packages are installed.
    """
    syntax = UID(str(dataset.file_meta.TransferSyntaxUID))
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        known = syntax.name if syntax.name != str(syntax) else "an unknown transfer syntax"
        raise InputRefused(f"compressed in a way that is not supported: {known}") from None
    by_sample = not syntax.is_encapsulated or syntax == RLELossless  # unused bits are kept; JPEG codes values
    if not by_sample:
        _check_codestream_end(dataset.PixelData)
    if not syntax.is_encapsulated:
        needed = int(dataset.Rows) * int(dataset.Columns) * int(dataset.BitsAllocated) // 8
        if len(dataset.PixelData) < needed:
            raise InputFailed(f"truncated: {len(dataset.PixelData)} of {needed} bytes of pixels are there")
    plugin = "" if not syntax.is_encapsulated else "pydicom" if by_sample else "pylibjpeg"
    options: Any = {"correct_unused_bits": not by_sample}
    pixels, _ = decoder.as_array(dataset, raw=True, decoding_plugin=plugin, **options)
    if pixels.ndim != 2:  # more data than Rows x Columns is decoded as several frames
        raise InputFailed("damaged: more pixels than one frame of Rows x Columns holds")
    if not by_sample:
        return np.asarray(pixels, dtype=np.int32)
    bits = int(dataset.BitsStored)
    samples = pixels.astype(np.int32) & (2 ** (8 * pixels.dtype.itemsize) - 1)
    values = (samples >> (_high_bit(dataset) + 1 - bits)) & (2**bits - 1)
    if int(dataset.PixelRepresentation) == 1:
        values -= (values >> (bits - 1)) << bits
    return np.asarray(values, dtype=np.int32)


def _say_lossy(dataset: Dataset) -> None:
    """Lossy stays lossy (PS3.3 C.7.6.1.1.5): enter what the header leaves out of how the pixels were compressed.

    JPEG 2000 is lossy where the header says so.
    """
    method = _LOSSY_METHODS.get(dataset.file_meta.TransferSyntaxUID)
    said = str(dataset.get("LossyImageCompression") or "").strip() == "01"
    if method is None or (method == _JPEG_2000 and not said):
        return
    dataset.LossyImageCompression = "01"
    if not dataset.get("LossyImageCompressionRatio"):
        size = int(dataset.Rows) * int(dataset.Columns) * int(dataset.BitsAllocated) / 8
        dataset.LossyImageCompressionRatio = f"{size / len(dataset.PixelData):.4g}"
    if not dataset.get("LossyImageCompressionMethod"):
        dataset.LossyImageCompressionMethod = method


def _check_codestream_end(pixel_data: bytes) -> None:
    """Find a truncated picture: JPEG, JPEG-LS and JPEG 2000 all end with FF D9, and their decoders pad silently."""
    if b"\xff\xd9" not in pixel_data.rstrip(b"\0")[-16:]:  # behind it: padding, a sequence delimiter
        raise InputFailed("the compressed picture is truncated: it has no end marker")


def _high_bit(dataset: Dataset) -> int:
    high_bit = dataset.get("HighBit")
    return int(dataset.BitsStored) - 1 if high_bit is None else int(high_bit)


def _term(dataset: Dataset, keyword: str) -> str:
    """A code string or short text, upper case, without spaces around it; empty where absent."""
    value: Any = dataset.get(keyword)
    return "" if value is None else str(value).strip().upper()


def _terms(dataset: Dataset, keyword: str) -> list[str]:
    """All values of a code string; empty where absent."""
    value: Any = dataset.get(keyword)
    values = [] if value is None else [value] if isinstance(value, str) else list(value)
    return [str(each).strip().upper() for each in values]
