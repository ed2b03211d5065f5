"""Read CT volumes: a DICOM series, NIfTI (and what else SimpleITK reads), or npz; all in one orientation.

Axes of every volume are z (feet to head), y (front to back) and x (patient's right to left), whatever the file's order.
"""

from __future__ import annotations

import os
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.errors import InvalidDicomError

from bsdiff_rt.errors import InputFailed, InputRefused, SettingsError, one_line

Volume3D = NDArray[np.int16]
Mask = NDArray[np.bool_]
Spacing = tuple[float, float, float]

ITK_SUFFIXES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd")
NPZ_SUFFIX = ".npz"
HU_RANGE = (-1000, 3000)
OBLIQUE = 0.02  # of a direction cosine: beyond it, about one degree, the volume is resampled along the patient's axes
SLICE_TOLERANCE = 0.25  # of the slice distance: a larger deviation is a missing or doubled slice
FEWEST_SLICES = 20
_HEADER = (
    *("Modality", "SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient", "ImageType"),
    *("NumberOfFrames", "Rows", "Columns"),
)


@dataclass(frozen=True)
class Source:
    """Files that hold one volume. `name` names it in the pool; `files` is one file, or the slices of a DICOM series."""

    name: str
    files: tuple[Path, ...]
    dicom: bool = False


@dataclass(frozen=True)
class Volume:
    """A CT.

    Attributes:
        name: name in the pool.
        hu: [Z, Y, X] int16, Hounsfield units in HU_RANGE.
        spacing: distance of the voxels in z, y and x, mm.
        labels: [Z, Y, X] bool, bone as the user's label file has it; None without one.
    """

    name: str
    hu: Volume3D
    spacing: Spacing
    labels: Mask | None = None


def find_sources(paths: Iterable[Path]) -> list[Source]:
    """Return the volumes in files and folders, by name; folders are searched recursively.

    Raises:
        SettingsError: a path does not exist, holds no volume, or two volumes have one name.
    """
    found: list[Source] = []
    for path in paths:
        if not path.exists():
            raise SettingsError(f"{path}: no such file or folder")
        here = _sources_of_folder(path) if path.is_dir() else [_source_of_file(path)]
        if not here:
            raise SettingsError(f"{path}: holds no CT (DICOM series, {', '.join(ITK_SUFFIXES)}, {NPZ_SUFFIX})")
        found += here
    return sorted(_name_apart(found), key=lambda source: source.name)


def _name_apart(sources: list[Source]) -> list[Source]:
    """Return the volumes; those of one name get the names of the folders above before it, as many as it takes.

    Raises:
        SettingsError: a volume is given twice, or two files of one folder differ in their suffix only.
    """
    files = Counter(source.files[0].resolve() for source in sources)
    if twice := sorted(path for path, count in files.items() if count > 1):
        raise SettingsError(f"{twice[0]}: this CT is given twice")
    level = 0
    while doubled := {name for name, count in Counter(source.name for source in sources).items() if count > 1}:
        sources = [_prefix(source, level) if source.name in doubled else source for source in sources]
        level += 1
    return sources


def _prefix(source: Source, level: int) -> Source:
    """Return the volume with the name of the folder so many levels above it before its own."""
    above = source.files[0].resolve().parents
    level += source.dicom  # a series has the name of its folder already
    if level >= len(above) - 1:
        raise SettingsError(f"{source.files[0]}: another CT beside it has this name; rename one of them")
    return replace(source, name=f"{above[level].name}-{source.name}")


def strip_suffixes(path: Path) -> str:
    """Return a file's name without the suffix of its format; `scan.nii.gz` is `scan`."""
    for suffix in (*ITK_SUFFIXES, NPZ_SUFFIX):
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def read_volume(source: Source, labels: Path | None = None, label_values: frozenset[int] | None = None) -> Volume:
    """Read one CT.

    Args:
        source: the files.
        labels: file whose voxels say what is bone; None without one. An npz may hold its own, as `bone`.
        label_values: values of the label file that are bone; None is all but 0.

    Returns:
        The volume, in the axes of this module.

    Raises:
        InputRefused: not a CT, or slices are missing.
        InputFailed: unreadable or damaged.
    """
    if labels is not None and not labels.is_file():
        raise InputFailed(f"label file {labels} does not exist")
    if source.files[0].suffix.lower() == NPZ_SUFFIX:
        return _read_npz(source, labels, label_values)
    sitk = _import_simpleitk()
    image = _series_image(sitk, source) if source.dicom else _read_image(sitk, source.files[0])
    bone = None
    if labels is not None:
        label_image = sitk.Resample(_read_image(sitk, labels), image, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
        bone = _select_labels(_to_array(sitk, _orient(sitk, label_image, 0)), label_values)
    image = _orient(sitk, image, HU_RANGE[0])
    hu = _to_hounsfield(_to_array(sitk, image))
    x, y, z = image.GetSpacing()
    return Volume(source.name, hu, (z, y, x), bone)


def _import_simpleitk() -> ModuleType:
    try:
        import SimpleITK
    except ImportError:
        raise SettingsError(
            "SimpleITK is not installed; DICOM series and NIfTI files need it: pip install 'bsdiff-rt[train]'"
        ) from None
    module: ModuleType = SimpleITK
    module.ProcessObject.SetGlobalWarningDisplay(False)
    return module


def _source_of_file(path: Path) -> Source:
    if path.name.lower().endswith((*ITK_SUFFIXES, NPZ_SUFFIX)):
        return Source(strip_suffixes(path), (path,))
    raise SettingsError(f"{path}: not a CT volume; give a folder of DICOM slices, {', '.join(ITK_SUFFIXES)} or npz")


def _sources_of_folder(folder: Path) -> list[Source]:
    """Return the volumes below a folder; each DICOM series is one."""
    found: list[Source] = []
    for place, folders, files in os.walk(folder):
        folders.sort()
        paths = [Path(place) / name for name in sorted(files) if not name.startswith(".")]
        volumes = [path for path in paths if path.name.lower().endswith((*ITK_SUFFIXES, NPZ_SUFFIX))]
        found += [Source(strip_suffixes(path), (path,)) for path in volumes]
        series: dict[str, list[Path]] = defaultdict(list)
        for path in paths:
            if path not in volumes and (header := _read_header(path)) is not None:
                series[str(header.get("SeriesInstanceUID", ""))].append(path)
        name = Path(place).resolve().name
        for number, uid in enumerate(sorted(series), 1):
            found.append(Source(name if len(series) == 1 else f"{name}-{number}", tuple(series[uid]), dicom=True))
    return found


def _read_header(path: Path) -> pydicom.Dataset | None:
    """Return the few attributes that tell a series, or None if the file is not DICOM or has no image position."""
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_HEADER))
    except (InvalidDicomError, OSError, EOFError, ValueError):
        return None
    return header if "SeriesInstanceUID" in header else None


def _read_npz(source: Source, labels: Path | None, label_values: frozenset[int] | None) -> Volume:
    """Read `hu` [z, y, x] and `spacing_mm` [3], and `bone` where the file has it."""
    try:
        with np.load(source.files[0]) as content:
            hu, spacing = content["hu"], content["spacing_mm"].astype(float)
            bone = content["bone"].astype(bool) if "bone" in content.files else None
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputFailed(f"not an npz with `hu` and `spacing_mm` ({one_line(error)})") from error
    if hu.ndim != 3 or spacing.shape != (3,) or not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise InputFailed(f"`hu` has shape {hu.shape}, `spacing_mm` {spacing.tolist()}; [z, y, x] and mm are needed")
    if labels is not None:
        sitk = _import_simpleitk()
        bone = _select_labels(_to_array(sitk, _orient(sitk, _read_image(sitk, labels), 0)), label_values)
    if bone is not None and bone.shape != hu.shape:
        raise InputFailed(f"its bone labels have shape {bone.shape}, the CT {hu.shape}")
    return Volume(source.name, _to_hounsfield(hu), (float(spacing[0]), float(spacing[1]), float(spacing[2])), bone)


def _read_image(sitk: ModuleType, path: Path) -> Any:
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise InputFailed(f"cannot be read by SimpleITK ({str(error).strip().splitlines()[-1][:120]})") from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise InputRefused(f"{image.GetDimension()} dimensions, not one grey volume of three")
    return image


def _series_image(sitk: ModuleType, source: Source) -> Any:
    """Return the image of a series whose slices were checked and sorted along its normal."""
    files, distance = sort_slices(source.files)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(path) for path in files])
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise InputFailed(f"cannot be read by SimpleITK ({str(error).strip().splitlines()[-1][:120]})") from error
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise InputRefused("a colour series, not a CT")
    x, y, _ = image.GetSpacing()
    image.SetSpacing((x, y, distance))
    return image


def sort_slices(files: Iterable[Path]) -> tuple[list[Path], float]:
    """Sort a series' slices along their normal.

    Returns:
        The files, and the distance of two slices, mm.

    Raises:
        InputRefused: not a CT, too few slices, slices that are missing, doubled, or differ in orientation or matrix.
    """
    headers = [(path, header) for path in files if (header := _read_header(path)) is not None]
    first = headers[0][1]
    if (modality := first.get("Modality")) != "CT":
        raise InputRefused(f"Modality {modality}, not CT")
    if int(first.get("NumberOfFrames", 1) or 1) > 1:
        raise InputRefused("a multi-frame CT; convert it to NIfTI, for example with dcm2niix")
    if "LOCALIZER" in (first.get("ImageType") or ()):
        raise InputRefused("a localizer, not a CT volume")
    if len(headers) < FEWEST_SLICES:
        raise InputRefused(f"{len(headers)} slices, fewer than {FEWEST_SLICES}")
    placed = []
    for path, header in headers:
        position, axes = header.get("ImagePositionPatient"), header.get("ImageOrientationPatient")
        if position is None or axes is None:
            raise InputRefused(f"{path.name} has no image position or orientation")
        placed.append((np.array(position, dtype=float), np.array(axes, dtype=float), path, header))
    axes = placed[0][1]
    matrix = (first.get("Rows"), first.get("Columns"))
    if any(np.abs(its - axes).max() > 1e-3 or (h.get("Rows"), h.get("Columns")) != matrix for _, its, _, h in placed):
        raise InputRefused("its slices differ in orientation or matrix; give one reconstruction")
    normal = np.cross(axes[:3], axes[3:])
    order = sorted(((float(position @ normal), path) for position, _, path, _ in placed), key=lambda entry: entry[0])
    gaps = np.diff([place for place, _ in order])
    distance = float(np.median(gaps))
    if distance <= 0 or (gaps < distance * (1 - SLICE_TOLERANCE)).any():
        raise InputRefused("two slices at one place, or slices closer than the others; give one reconstruction")
    if (missing := int(np.rint(gaps / distance - 1).clip(0).sum())) or (gaps > distance * (1 + SLICE_TOLERANCE)).any():
        raise InputRefused(f"about {max(missing, 1)} of {len(order) + max(missing, 1)} slices are missing")
    return [path for _, path in order], distance


def _orient(sitk: ModuleType, image: Any, outside: int) -> Any:
    """Return the image along the patient's axes: x to the left, y to the back, z to the head.

    A volume that is turned against them, such as by the gantry's tilt, is resampled; `outside` fills what it lacks.
    """
    image = sitk.DICOMOrient(image, "LPS")
    direction = np.array(image.GetDirection()).reshape(3, 3)
    if np.abs(direction - np.eye(3)).max() <= OBLIQUE:
        return image
    size, spacing = np.array(image.GetSize()), np.array(image.GetSpacing())
    steps = [np.array([i, j, k]) * (size - 1) * spacing for i in (0, 1) for j in (0, 1) for k in (0, 1)]
    corners = np.array([np.array(image.GetOrigin()) + direction @ step for step in steps])
    low, high = corners.min(0), corners.max(0)
    grid = [int(n) for n in np.ceil((high - low) / spacing) + 1]
    method = sitk.sitkLinear if outside else sitk.sitkNearestNeighbor
    return sitk.Resample(
        image, grid, sitk.Transform(), method, low.tolist(), spacing.tolist(), np.eye(3).ravel().tolist(), outside
    )


def _to_array(sitk: ModuleType, image: Any) -> NDArray[Any]:
    return np.asarray(sitk.GetArrayFromImage(image))


def _to_hounsfield(values: NDArray[Any]) -> Volume3D:
    """Return int16 in HU_RANGE; what is not a number, or padding below air, is air.

    Raises:
        InputRefused: the values cannot be Hounsfield units.
    """
    if values.dtype.kind == "f":
        values = np.rint(np.nan_to_num(values, nan=HU_RANGE[0], posinf=HU_RANGE[1], neginf=HU_RANGE[0]))
    elif values.dtype.kind not in "iu":
        raise InputFailed(f"voxels are {values.dtype}, not numbers")
    lowest = int(values.min())
    if lowest > -500:
        raise InputRefused(f"its lowest value is {lowest}: not Hounsfield units, where air is -1000")
    return np.asarray(np.clip(values, *HU_RANGE), dtype=np.int16)


def _select_labels(values: NDArray[Any], chosen: frozenset[int] | None) -> Mask:
    if chosen is None:
        return np.asarray(values != 0)
    return np.isin(values, sorted(chosen))
