"""The grey-scale transformations of DICOM: stored values to what is meant to be shown. Torch-free.

Modality LUT or rescale (PS3.3 C.11.1), VOI LUT or window (C.11.2), polarity (C.7.6.3.1.2, C.11.6),
padding (C.7.5.1.1.2).

Without a VOI LUT or window the full range is shown: that of the smallest depth which holds the stored values but for
stray ones, at most Bits Stored. Not the range between smallest and largest value: one marker or one dead pixel would
change the picture's tone. Not the range of Bits Stored either: 12-bit pictures declared as 16 bits would be black.
raster.py does the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from bsdiff_rt.errors import InputFailed
from bsdiff_rt.formats.radiograph import depth_of, range_of

NOISE_BELOW_ZERO = 1 / 16  # of the highest value
_WINDOW_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")


def shown_picture(stored: NDArray[np.int32], dataset: Dataset) -> NDArray[np.float32]:
    """From stored values to the picture that is meant to be shown.

    Args:
        stored: [H, W], int32, sign extended.
        dataset: the header.

    Returns:
        [H, W], float32, in [0, 1], 0 black; padding is 0.

    Raises:
        InputFailed: a lookup table or a window is not usable.
    """
    padding = _padding(stored, dataset)
    bits = int(dataset.BitsStored)
    full = _full_range(stored if padding is None else stored[~padding], bits)
    values, full = _modality(stored, full, dataset)
    shown = _voi(values, full, dataset)
    # MONOCHROME1: the smallest value is white, after the VOI LUT. DX objects say the same with Presentation LUT Shape
    # INVERSE (C.8.11.3.1.2), so both together are one inversion. IDENTITY beside MONOCHROME1 contradicts itself; here
    # Photometric Interpretation wins, because writers that get the shape wrong are known (dcm4che issue 944). DCMTK and
    # dcm4che follow the shape by default.
    inverse = str(dataset.get("PresentationLUTShape") or "").strip().upper() == "INVERSE"
    if inverse or str(dataset.PhotometricInterpretation).strip().upper() == "MONOCHROME1":
        shown = np.float32(1) - shown
    if padding is not None:
        shown[padding] = 0
    return shown


def _padding(stored: NDArray[np.int32], dataset: Dataset) -> NDArray[np.bool_] | None:
    """Where the picture is padding, [H, W]; None without Pixel Padding Value."""
    value: Any = dataset.get("PixelPaddingValue")
    if not isinstance(value, int):
        return None
    limit: Any = dataset.get("PixelPaddingRangeLimit")
    ends = sorted(_as_stored(end, dataset) for end in (value, limit if isinstance(limit, int) else value))
    return np.asarray((stored >= ends[0]) & (stored <= ends[1]))


def _as_stored(value: int, dataset: Dataset) -> int:
    """A header value of VR "US or SS" in the pixels' signedness, whichever of the two it was read as."""
    if int(dataset.PixelRepresentation) == 1:
        return value - 65536 if value > 32767 else value
    return value + 65536 if value < 0 else value


def _full_range(stored: NDArray[np.int32], bits_stored: int) -> tuple[float, float]:
    """The range of the smallest depth, 8 to `bits_stored` bits, that holds the values but for stray ones.

    It is signed where the values reach as far below zero as tells: a detector's offset may leave a little noise there,
    and the signed range would show that picture in its upper half.
    """
    if not stored.size:
        return 0.0, 1.0
    low, high = range_of(stored)
    if low >= 0 or -low < high * NOISE_BELOW_ZERO:
        return 0.0, float(2 ** min(depth_of(high), bits_stored) - 1)
    bits = min(max((-low - 1).bit_length(), high.bit_length(), 7), bits_stored - 1)
    return float(-(2**bits)), float(2**bits - 1)


def _modality(
    stored: NDArray[np.int32], full: tuple[float, float], dataset: Dataset
) -> tuple[NDArray[np.float32], tuple[float, float]]:
    """Modality LUT or rescale; returns the values, [H, W], float32, and the range that `full` becomes."""
    if dataset.get("ModalityLUTSequence"):
        table, first, bits = _lookup_table(
            dataset.ModalityLUTSequence[0], dataset, signed=int(dataset.PixelRepresentation) == 1
        )
        looked_up = table[np.clip(stored - first, 0, len(table) - 1)]
        return looked_up.astype(np.float32), (0.0, float(2**bits - 1))
    slope = _number(dataset, "RescaleSlope", 1.0)
    intercept = _number(dataset, "RescaleIntercept", 0.0)
    low, high = sorted(slope * end + intercept for end in full)
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept), (low, high)


def _voi(values: NDArray[np.float32], full: tuple[float, float], dataset: Dataset) -> NDArray[np.float32]:
    """The first VOI LUT, else the first window, else the full range; [H, W], float32, in [0, 1]."""
    if dataset.get("VOILUTSequence"):
        table, first, bits = _lookup_table(dataset.VOILUTSequence[0], dataset, signed=_rescaled_below_zero(dataset))
        index = np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)
        return table[index].astype(np.float32) / np.float32(2**bits - 1)
    center, width = _number(dataset, "WindowCenter", None), _number(dataset, "WindowWidth", None)
    if center is None or width is None or width <= 0:  # a window of no width is written where there is none
        low, high = full
        return _ramp(values, low, max(high - low, 1e-6))
    function = str(dataset.get("VOILUTFunction") or "LINEAR").strip().upper()
    if function not in _WINDOW_FUNCTIONS:
        raise InputFailed(f"the VOI LUT Function is none of {', '.join(_WINDOW_FUNCTIONS)}")
    if function == "SIGMOID":  # C.11.2.1.3.1
        exponent = np.clip(-4 * (values - np.float32(center)) / np.float32(width), -80, 80)
        return np.asarray(1 / (1 + np.exp(exponent)), dtype=np.float32)
    if function == "LINEAR_EXACT" or width < 1:  # C.11.2.1.3.2; LINEAR has no width below 1
        return _ramp(values, center - width / 2, width)
    # C.11.2.1.2.1; a width of 1 is a threshold.
    return _ramp(values, center - 0.5 - (width - 1) / 2, max(width - 1, 1e-6))


def _rescaled_below_zero(dataset: Dataset) -> bool:
    """Whether Bits Stored, Pixel Representation and the modality transformation allow negative values."""
    if dataset.get("ModalityLUTSequence"):
        return False
    bits = int(dataset.BitsStored)
    ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if int(dataset.PixelRepresentation) == 1 else (0, 2**bits - 1)
    slope, intercept = _number(dataset, "RescaleSlope", 1.0), _number(dataset, "RescaleIntercept", 0.0)
    return bool(min(slope * end + intercept for end in ends) < 0)


def _ramp(values: NDArray[np.float32], low: float, width: float) -> NDArray[np.float32]:
    """0 up to `low`, 1 from `low + width` on, a straight line between."""
    return np.asarray(np.clip((values - np.float32(low)) / np.float32(width), 0, 1), dtype=np.float32)


def _lookup_table(item: Dataset, dataset: Dataset, *, signed: bool) -> tuple[NDArray[np.int64], int, int]:
    """Table, first value mapped and bits per entry of a LUT item (PS3.3 C.11.1.1, C.11.2.1.1).

    `signed`: whether the values looked up may be negative, which is what decides how the first one mapped is meant. The
    header's VR of the descriptor may be another.

    Raises:
        InputFailed: fewer entries than the descriptor says.
    """
    count, first, bits = (int(value) & 0xFFFF for value in item.LUTDescriptor)
    count = count or 65536
    data: Any = item.LUTData
    if isinstance(data, bytes):
        order = "<" if dataset.original_encoding[1] is not False else ">"
        narrow = bits <= 8 and len(data) in (count, count + 1)
        entries = np.frombuffer(data, np.uint8 if narrow else f"{order}u2")
    else:
        entries = np.atleast_1d(np.asarray(data))
    table = entries[:count].astype(np.int64) & 0xFFFF
    if len(table) < count or not 1 <= bits <= 16:
        raise InputFailed("a lookup table is damaged: it has fewer entries than it says")
    # Some writers declare fewer bits than the entries have; others 16 bits over entries of 12, which to the letter is
    # black. One bit less may be meant.
    used = int(table.max()).bit_length()
    if used > bits or depth_of(int(table.max())) <= bits - 2:
        bits = max(used, min(bits, 8))
    return table, first - 65536 if signed and first > 32767 else first, bits


def _number(dataset: Dataset, keyword: str, default: Any) -> Any:
    """The first value of a decimal string as float; `default` where absent or empty."""
    value: Any = dataset.get(keyword)
    if value is not None and not isinstance(value, int | float | str):
        value = value[0] if len(value) else None
    return default if value is None or value == "" else float(value)
