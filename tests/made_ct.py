"""A made chest CT: a body with two lungs, a heart, a spine, ribs and a sternum, as ellipses in each slice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SPACING = (4.0, 3.0, 3.0)  # z, y, x, mm


def ellipse(shape, centre, radii):
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return ((rows - centre[0]) / radii[0]) ** 2 + ((columns - centre[1]) / radii[1]) ** 2 <= 1


def make_chest(slices: int = 80, contrast: bool = False, table: bool = False) -> np.ndarray:
    """Return a chest [slices, 100, 120] int16 HU, z feet to head, y front to back, x right to left, of SPACING.

    The heart lies on the patient's left (larger x), the liver on the right, below the lungs.
    """
    hu = np.full((slices, 100, 120), -1000, np.int16)
    for k in range(slices):
        height = k / slices
        plane = hu[k]
        plane[ellipse(plane.shape, (50, 60), (36, 52))] = 40
        size = np.clip(1.25 * (height - 0.12), 0, 1) ** 0.5 * np.clip(2.2 * (0.93 - height), 0, 1) ** 0.5
        for side in (-1, 1):
            centre = 60 + side * (24 * min(1, 1.6 - height))
            if size > 0.2:
                plane[ellipse(plane.shape, (50, centre), (27 * size, 17 * size))] = -850
        if 0.15 < height < 0.5:
            plane[ellipse(plane.shape, (42, 68), (13, 15))] = 350 if contrast else 45
        spine = ellipse(plane.shape, (76, 60), (6, 7))
        plane[spine] = 250
        plane[spine & ~ellipse(plane.shape, (76, 60), (4.5, 5.5))] = 700
        plane[ellipse(plane.shape, (17, 60), (1.6, 5))] = 500
        if k % 6 < 3:  # ribs
            rim = ellipse(plane.shape, (50, 60), (32.5, 47)) & ~ellipse(plane.shape, (50, 60), (30, 44.5))
            rim[:, 50:70] = False
            plane[rim] = 600
        if table:
            plane[94:96, 20:100] = 100
    return hu


def write_npz(path: Path, hu: np.ndarray, spacing=SPACING, **more) -> Path:
    np.savez(path, hu=hu, spacing_mm=np.array(spacing), **more)
    return path


def write_nifti(path: Path, hu: np.ndarray, spacing=SPACING, flip: tuple[int, ...] = ()) -> Path:
    """Write NIfTI whose header puts the voxels where they belong; axes in `flip` (of x, y, z) run backwards in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing(spacing[::-1])
    image.SetOrigin((-170.0, -120.0, 30.0))
    image = sitk.Flip(image, [axis in flip for axis in range(3)])  # keeps each voxel's place in the patient
    sitk.WriteImage(image, str(path))
    return path


def write_series(folder: Path, hu: np.ndarray, spacing=SPACING, descending=False, leave_out=(), modality="CT") -> Path:
    """Write a DICOM series in which file names and instance numbers run from feet to head, or from head to feet."""
    folder.mkdir(parents=True)
    series, frame = generate_uid(), generate_uid()
    order = range(len(hu))[:: -1 if descending else 1]
    for number, k in enumerate(order):
        if k in leave_out:
            continue
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        one.SOPClassUID, one.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        one.Modality, one.PatientID, one.PatientName = modality, "made", "made"
        one.StudyInstanceUID = one.SeriesInstanceUID = series
        one.FrameOfReferenceUID = frame
        one.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        one.InstanceNumber = number + 1
        one.ImagePositionPatient = [-170.0, -120.0, 30.0 + k * spacing[0]]
        one.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        one.PixelSpacing = [spacing[1], spacing[2]]
        one.SliceThickness = spacing[0]
        one.Rows, one.Columns = hu.shape[1:]
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.BitsAllocated = one.BitsStored = 16
        one.HighBit, one.PixelRepresentation = 15, 0
        one.RescaleIntercept, one.RescaleSlope = -1024, 1
        one.PixelData = (hu[k].astype(np.int32) + 1024).astype("<u2").tobytes()
        pydicom.dcmwrite(folder / f"IM{number:04d}.dcm", one, enforce_file_format=True)
    return folder
