"""Write a phantom's X-ray as the DICOM file of a CR reader, to test reading DICOM: 14 bits, MONOCHROME1."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, ComputedRadiographyImageStorage, ExplicitVRLittleEndian

BITS = 14
FIELD_OF_VIEW_MM = 400.0


def write_cr(path: Path, cxr: NDArray[np.float32], name: str) -> None:
    """Write an X-ray as a CR image (PS3.3 A.2), inverted as MONOCHROME1 requires. The file is the same on every run.

    Args:
        path: the file to write.
        cxr: [H, W] float32 in [0, 1], air dark.
        name: of the phantom.
    """
    top = 2**BITS - 1
    stored = np.rint((1.0 - np.clip(cxr, 0, 1)) * top).astype("<u2")
    header = Dataset()
    header.SOPClassUID = ComputedRadiographyImageStorage
    header.StudyInstanceUID, header.SeriesInstanceUID, header.SOPInstanceUID = (_uid(name, i) for i in range(3))
    header.Modality, header.BodyPartExamined, header.ViewPosition = "CR", "CHEST", "PA"
    header.PatientName, header.PatientID = f"Phantom^{name}", name
    header.PatientBirthDate = header.PatientSex = header.StudyDate = header.StudyTime = ""
    header.AccessionNumber = header.ReferringPhysicianName = header.StudyID = header.Laterality = ""
    header.SeriesNumber = header.InstanceNumber = 1
    header.Manufacturer, header.ImageType = "bsdiff-rt phantoms", ["ORIGINAL", "PRIMARY"]
    header.Rows, header.Columns = stored.shape
    header.ImagerPixelSpacing = [f"{FIELD_OF_VIEW_MM / side:.4f}" for side in stored.shape]
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME1"
    header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, BITS, BITS - 1, 0
    header.WindowCenter, header.WindowWidth = 2 ** (BITS - 1), 2**BITS
    header.PixelData = stored.tobytes()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dcmwrite(path, header, enforce_file_format=True)


def _uid(name: str, part: int) -> UID:
    """Return a UID of 2.25 and a 128-bit number (PS3.5 B.2), always the same for the same phantom."""
    digest = hashlib.sha256(f"bsdiff-rt phantom {name} {part}".encode()).digest()
    return UID(f"2.25.{int.from_bytes(digest[:16], 'big')}")
