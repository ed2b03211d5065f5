"""Drawn chest X-rays and DICOM files for tests: no patient was ever in front of these pictures. Seeded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import compress
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    RLELossless,
)

# What must never appear in a message, a log record or a file name; every text field that names or dates a patient.
PATIENT = {
    "PatientName": "SECRET^ÄNNE",
    "PatientID": "SECRET-4711",
    "PatientBirthDate": "19471231",
    "PatientSex": "F",
    "PatientAddress": "SECRET STREET 9",
    "AccessionNumber": "SECRETACC",
    "ReferringPhysicianName": "SECRET^DOCTOR",
    "InstitutionName": "SECRET CLINIC",
    "StudyDescription": "SECRET STUDY",
    "StudyDate": "19991231",
    "StudyTime": "235959",
}
SECRETS = (
    "SECRET",
    "ÄNNE",
    "498.4711",  # the UIDs below; four digits alone come up in hashes
    "19471231",
    "19991231",
    "235959",
)


def chest(rows: int = 64, columns: int = 64, seed: int = 0) -> NDArray[np.float32]:
    """A chest-like picture, [rows, columns], float32, in [0, 1]: mediastinum bright, lungs dark, ribs, noise."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float64)
    y, x = (y + 0.5) / rows, (x + 0.5) / columns
    picture = 0.75 - 0.2 * np.abs(x - 0.5)
    for centre in (0.29, 0.71):
        lung = 1 / (1 + np.exp(30 * (((x - centre) / 0.17) ** 2 + ((y - 0.45) / 0.33) ** 2 - 1)))
        ribs = 0.5 + 0.5 * np.cos(2 * np.pi * (9 * y + 3 * (x - centre) ** 2 / 0.03))
        picture -= lung * (0.5 - 0.12 * ribs**4)
    picture += 0.01 * generator.standard_normal((rows, columns))
    return np.clip(picture, 0.02, 0.98).astype(np.float32)


def stored(picture: NDArray[np.float32], bits: int, *, signed: bool = False) -> NDArray[np.int32]:
    """The picture as stored values of `bits` bits, [H, W], int32; signed ones are centred on zero."""
    values = np.rint(picture.astype(np.float64) * (2**bits - 1)).astype(np.int32)
    return values - 2 ** (bits - 1) if signed else values


def dataset(values: NDArray[np.int32], bits: int = 12, *, signed: bool = False, **elements: Any) -> Dataset:
    """A CR chest X-ray with the given stored values, uncompressed; further elements by keyword, None removes one."""
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.SpecificCharacterSet = "ISO_IR 100"
    header.SOPClassUID = ComputedRadiographyImageStorage
    header.Modality = "CR"
    header.ImageType = ["ORIGINAL", "PRIMARY"]
    for number, keyword in enumerate(("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"), start=1):
        setattr(header, keyword, f"1.2.826.0.1.3680043.8.498.4711.{number}")
    for keyword, value in PATIENT.items():
        setattr(header, keyword, value)
    header.SeriesNumber, header.InstanceNumber = 1, 1
    header.SeriesDescription = "Thorax pa"
    header.BodyPartExamined, header.ViewPosition = "CHEST", "PA"
    header.PatientOrientation = ["L", "F"]
    header.SamplesPerPixel = 1
    header.PhotometricInterpretation = "MONOCHROME2"
    header.Rows, header.Columns = values.shape
    header.BitsAllocated = 8 if bits == 8 else 16
    header.BitsStored, header.HighBit = bits, bits - 1
    header.PixelRepresentation = int(signed)
    set_pixels(header, values)
    for keyword, value in elements.items():
        if value is None:
            delattr(header, keyword)
        else:
            setattr(header, keyword, value)
    return header


def dx_dataset(values: NDArray[np.int32], bits: int = 12, **elements: Any) -> Dataset:
    """A DX image for presentation, with the attributes this package touches."""
    settings = {
        "SOPClassUID": DigitalXRayImageStorageForPresentation,
        "Modality": "DX",
        "PresentationIntentType": "FOR PRESENTATION",
        "PresentationLUTShape": "IDENTITY",
        "PixelIntensityRelationship": "LOG",
        "PixelIntensityRelationshipSign": -1,
        "RescaleSlope": "1",
        "RescaleIntercept": "0",
        "RescaleType": "US",
        "ImagerPixelSpacing": ["0.2", "0.2"],
    }
    return dataset(values, bits, **{**settings, **elements})


def set_pixels(header: Dataset, values: NDArray[np.int32]) -> None:
    """Put stored values into a dataset as Pixel Data, Explicit VR Little Endian, unused bits zero."""
    mask = 2 ** int(header.BitsStored) - 1
    shift = int(header.HighBit) + 1 - int(header.BitsStored)
    wide = header.BitsAllocated == 16
    content = ((values & mask) << shift).astype("<u2" if wide else "u1").tobytes()
    header.add_new("PixelData", "OW" if wide else "OB", content + b"\0" * (len(content) % 2))


def lookup_table(keyword: str, entries: NDArray[np.int64], first: int, bits: int) -> Dataset:
    """Item of a Modality or VOI LUT Sequence: "US" descriptor and data."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US" if first >= 0 else "SS", [len(entries) % 65536, first, bits])
    item.add_new("LUTData", "US", [int(entry) for entry in entries])
    item.LUTExplanation = keyword
    if keyword == "modality":
        item.ModalityLUTType = "US"
    return item


def code(value: str, scheme: str, meaning: str) -> Dataset:
    """A code sequence item."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def save(path: Path, header: Dataset, syntax: UID = ExplicitVRLittleEndian) -> Path:
    """Write a dataset made by `dataset` in the given transfer syntax, and return the path."""
    header.file_meta.TransferSyntaxUID = syntax
    header.file_meta.MediaStorageSOPClassUID = header.get("SOPClassUID") or "1.2"
    header.file_meta.MediaStorageSOPInstanceUID = header.get("SOPInstanceUID") or "1.2"
    values = _pixels(header)
    if syntax in (RLELossless, JPEG2000Lossless):
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        compress(header, syntax, encoding_plugin="pydicom" if syntax == RLELossless else "pylibjpeg")
    elif syntax in (JPEGLossless, JPEGLosslessSV1):
        predictor = 1 if syntax == JPEGLosslessSV1 else 2
        _encapsulated(header, jpeg_lossless(values, int(header.BitsStored), predictor))
    elif syntax == JPEGBaseline8Bit:
        _encapsulated(header, cv2.imencode(".jpg", values, [cv2.IMWRITE_JPEG_QUALITY, 98])[1].tobytes())
    elif syntax == ExplicitVRBigEndian and values is not None and header.BitsAllocated == 16:
        header.PixelData = values.byteswap().tobytes()
    implicit, little = syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
    dcmwrite(path, header, implicit_vr=implicit, little_endian=little, enforce_file_format=True)
    return path


LOSSLESS_SYNTAXES = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEG2000Lossless,
)


def _pixels(header: Dataset) -> NDArray[np.uint8] | NDArray[np.uint16] | None:
    """The samples of a dataset that is what it says; None for those made wrong on purpose."""
    if any(keyword not in header for keyword in ("PixelData", "BitsAllocated", "Rows", "Columns")):
        return None
    values = np.frombuffer(header.PixelData, "<u2" if header.BitsAllocated == 16 else "u1")
    size = header.Rows * header.Columns
    return values[:size].reshape(header.Rows, header.Columns) if len(values) >= size else None


def _encapsulated(header: Dataset, codestream: bytes) -> None:
    header.PixelData = encapsulate([codestream])
    header["PixelData"].VR = "OB"
    header["PixelData"].is_undefined_length = True


def jpeg_lossless(values: NDArray[np.uint8] | NDArray[np.uint16], precision: int, predictor: int = 1) -> bytes:
    """Lossless JPEG, process 14 (ITU-T T.81 annex H), of [H, W] samples: one table of 5-bit codes for 17 categories.

    Predictors 1 (left; DICOM's SV1) and 2 (above).
    """
    samples = values.astype(np.int64)
    predicted = np.empty_like(samples)
    predicted[1:] = samples[:-1]
    if predictor == 1:
        predicted[1:, 1:] = samples[1:, :-1]
    predicted[0, 1:] = samples[0, :-1]
    predicted[0, 0] = 2 ** (precision - 1)
    bits = []
    for difference in ((samples - predicted + 32768) % 65536 - 32768).ravel().tolist():
        category = abs(difference).bit_length()
        bits.append(f"{category:05b}")
        if 0 < category < 16:
            bits.append(f"{difference if difference > 0 else difference + 2**category - 1:0{category}b}")
    stream = "".join(bits)
    stream += "1" * (-len(stream) % 8)
    scan = int(stream, 2).to_bytes(len(stream) // 8, "big").replace(b"\xff", b"\xff\x00")
    rows, columns = values.shape
    frame = bytes((precision, *divmod(rows, 256), *divmod(columns, 256), 1, 1, 0x11, 0))
    table = bytes((0, 0, 0, 0, 0, 17, *(0,) * 11, *range(17)))
    segments = ((0xC3, frame), (0xC4, table), (0xDA, bytes((1, 1, 0, predictor, 0, 0))))
    head = b"".join(bytes((0xFF, marker)) + (len(data) + 2).to_bytes(2, "big") + data for marker, data in segments)
    return b"\xff\xd8" + head + scan + b"\xff\xd9"
