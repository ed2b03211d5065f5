"""The grey-scale transformations of DICOM: from stored values to what is meant to be displayed. Torch-free.

Modality LUT or rescale (PS3.3 C.11.1), VOI LUT or window (C.11.2), polarity (C.7.6.3.1.2, C.11.6), padding
(C.7.5.1.1.2).

Without a VOI LUT or window the full range is displayed. That is the range of the smallest depth that holds the stored
values apart from stray ones, at most Bits Stored. It is not the range between the smallest and the largest value: one
marker or one dead pixel would change the picture's tone. It is not the range of Bits Stored either: 12-bit pictures
declared as 16 bits would be black. Raster files are read the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from bsdiff_rt.errors import InputFailed
from bsdiff_rt.formats.dicom_elements import (
    BONE_SUPPRESSED,
    FULL_RANGE,
    read_number,
    read_numbers,
    read_term,
    read_terms,
)
from bsdiff_rt.formats.radiograph import find_depth, find_range

NOISE_BELOW_ZERO = 1 / 16  # of the highest value
CLIPPED_SHARE = (
    0.25  # of the pixels, on one side; a window that clips more is worth a warning. Air takes up to a fifth.
)
MISSED_SHARE = 0.99  # of the pixels, on one side; a window that clips more was not made for these values
SIGMOID_END = 0.02  # a sigmoid never reaches 0 and 1
_WINDOW_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")


@dataclass(frozen=True)
class _Window:
    """Window center and width of a header, in modality values, and the function between its ends."""

    center: float
    width: float
    function: str


def to_displayed(stored: NDArray[np.int32], dataset: Dataset) -> tuple[NDArray[np.float32], list[str]]:
    """Turn stored values into the picture that is meant to be displayed.

    Args:
        stored: [H, W], int32, sign extended.
        dataset: the header.

    Returns:
        The picture, [H, W], float32, in [0, 1], 0 black, padding 0; and warnings about a window that does not fit.

    Raises:
        InputFailed: a lookup table or a window cannot be used.
    """
    padding = _find_padding(stored, dataset)
    bits = int(dataset.BitsStored)
    inside = np.s_[:] if padding is None else ~padding
    values, full = _apply_modality(stored, _find_full_range(stored[inside], bits), dataset)
    # MONOCHROME1: the smallest value is white, after the VOI LUT. DX objects say the same with Presentation LUT Shape
    # INVERSE (C.8.11.3.1.2), so both together are one inversion. IDENTITY beside MONOCHROME1 contradicts itself. Here
    # Photometric Interpretation wins, because writers that get the shape wrong are known (dcm4che issue 944). DCMTK and
    # dcm4che follow the shape by default.
    inverse = read_term(dataset, "PresentationLUTShape") == "INVERSE"
    inverse = inverse or read_term(dataset, "PhotometricInterpretation") == "MONOCHROME1"
    displayed, warnings = _apply_voi(values, inside, full, dataset, inverse=inverse)
    if inverse:
        displayed = np.float32(1) - displayed
    if padding is not None:
        displayed[padding] = 0
    return displayed, warnings


def _find_padding(stored: NDArray[np.int32], dataset: Dataset) -> NDArray[np.bool_] | None:
    """Return where the picture is padding, [H, W]; None without Pixel Padding Value."""
    value: Any = dataset.get("PixelPaddingValue")
    if not isinstance(value, int):
        return None
    limit: Any = dataset.get("PixelPaddingRangeLimit")
    ends = sorted(_to_signedness(end, dataset) for end in (value, limit if isinstance(limit, int) else value))
    return np.asarray((stored >= ends[0]) & (stored <= ends[1]))


def _to_signedness(value: int, dataset: Dataset) -> int:
    """Return a header value of VR "US or SS" in the pixels' signedness, whichever of the two it was read as."""
    if int(dataset.PixelRepresentation) == 1:
        return value - 65536 if value > 32767 else value
    return value + 65536 if value < 0 else value


def _find_full_range(stored: NDArray[np.int32], bits_stored: int) -> tuple[float, float]:
    """Return the range of the smallest depth, 8 to `bits_stored` bits, that holds the values apart from stray ones.

    It is signed only where the values reach clearly below zero. A detector's offset may leave a little noise there, and
    the signed range would display that picture in its upper half.
    """
    if not stored.size:
        return 0.0, 1.0
    low, high = find_range(stored)
    if low >= 0 or -low < high * NOISE_BELOW_ZERO:
        return 0.0, float(2 ** min(find_depth(high), bits_stored) - 1)
    bits = min(max((-low - 1).bit_length(), high.bit_length(), 7), bits_stored - 1)
    return float(-(2**bits)), float(2**bits - 1)


def _apply_modality(
    stored: NDArray[np.int32], full: tuple[float, float], dataset: Dataset
) -> tuple[NDArray[np.float32], tuple[float, float]]:
    """Apply modality LUT or rescale; return the values, [H, W], float32, and the range that `full` becomes."""
    if dataset.get("ModalityLUTSequence"):
        table, first, bits = _read_lookup_table(
            dataset.ModalityLUTSequence[0], dataset, signed=int(dataset.PixelRepresentation) == 1
        )
        looked_up = table[np.clip(stored - first, 0, len(table) - 1)]
        return looked_up.astype(np.float32), (0.0, float(2**bits - 1))
    slope, intercept = _read_rescale(dataset)
    low, high = sorted(slope * end + intercept for end in full)
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept), (low, high)


def _apply_voi(
    values: NDArray[np.float32], inside: Any, full: tuple[float, float], dataset: Dataset, *, inverse: bool
) -> tuple[NDArray[np.float32], list[str]]:
    """Apply the first VOI LUT, else the first window, else the full range.

    A window that displays next to nothing of the picture gives way to the range of the values.

    Args:
        values: [H, W], float32, modality values.
        inside: index of what is not padding.
        full: the range to display without LUT and window.
        dataset: the header.
        inverse: whether white is the smallest value; for the words of a warning.

    Returns:
        [H, W], float32, in [0, 1], and warnings.
    """
    if dataset.get("VOILUTSequence"):
        table, first, bits = _read_lookup_table(
            dataset.VOILUTSequence[0], dataset, signed=_rescaled_below_zero(dataset)
        )
        index = np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)
        displayed = table[index].astype(np.float32) / np.float32(2**bits - 1)
        used, end = "VOI LUT", 0.0
    elif window := _read_window(dataset):
        displayed = _apply_window(values, window)
        used, end = (
            f"window (center {window.center:g}, width {window.width:g})",
            SIGMOID_END * (window.function == "SIGMOID"),
        )
    else:
        return _ramp(values, full[0], max(full[1] - full[0], 1e-6)), []
    return _judge_clipping(values, displayed, inside, used, end, inverse=inverse)


def _judge_clipping(
    values: NDArray[np.float32],
    displayed: NDArray[np.float32],
    inside: Any,
    used: str,
    end: float,
    *,
    inverse: bool,
) -> tuple[NDArray[np.float32], list[str]]:
    """Return the picture with a warning if much of it is plain black or white, or another picture if nearly all is.

    Pixels of the most frequent clipped value do not count: borders have one value and nothing to lose.
    """
    inside_values, inside_displayed = values[inside], displayed[inside]
    if not inside_values.size or float(inside_values.min()) == float(inside_values.max()):
        return displayed, []
    low, high = (_measure_clipped(inside_values, clipped) for clipped in
                 (inside_displayed <= end, inside_displayed >= 1 - end))  # fmt: skip
    if max(low, high) > MISSED_SHARE or float(inside_displayed.min()) == float(inside_displayed.max()):
        first, last = (float(value) for value in find_range(np.rint(inside_values).astype(np.int64)))
        if last <= first:
            return displayed, []
        return _ramp(values, first, last - first), [
            f"The {used} displays next to none of the values, which run from {first:g} to {last:g}. Their own range is "
            "used instead."
        ]
    warnings = []
    for share, black in ((low, not inverse), (high, inverse)):
        if share > CLIPPED_SHARE:
            shade = "black" if black else "white"
            warnings.append(
                f"The {used} clips {share:.0%} of the pixels to plain {shade}. Their detail is missing in the result. "
                "Check the window of the file."
            )
    return displayed, warnings


def _measure_clipped(values: NDArray[np.float32], clipped: NDArray[np.bool_]) -> float:
    """Return the share of pixels that are clipped, without those of the most frequent clipped value."""
    count = int(np.count_nonzero(clipped))
    if count <= CLIPPED_SHARE * values.size:  # without them it is even less
        return count / values.size
    _, counts = np.unique(values[clipped], return_counts=True)
    return float((count - int(counts.max())) / values.size)


def _read_window(dataset: Dataset) -> _Window | None:
    """Return the first window; None if there is none. A width of 0 is written where there is none.

    Of a result of this program it is the window over the full range, so that results can be compared.

    Raises:
        InputFailed: its numbers or its function cannot be read.
    """
    centers, widths = read_numbers(dataset, "WindowCenter"), read_numbers(dataset, "WindowWidth")
    names = read_terms(dataset, "WindowCenterWidthExplanation")
    ours = BONE_SUPPRESSED in read_terms(dataset, "ImageType") and FULL_RANGE in names
    index = names.index(FULL_RANGE) if ours else 0
    if min(len(centers), len(widths)) <= index or widths[index] <= 0:
        return None
    function = read_term(dataset, "VOILUTFunction") or "LINEAR"
    if function not in _WINDOW_FUNCTIONS:
        raise InputFailed(f"the VOI LUT Function is none of {', '.join(_WINDOW_FUNCTIONS)}")
    return _Window(centers[index], widths[index], function)


def _apply_window(values: NDArray[np.float32], window: _Window) -> NDArray[np.float32]:
    """Return what a window displays of modality values: [H, W], float32, in [0, 1]."""
    center, width = window.center, window.width
    if window.function == "SIGMOID":  # C.11.2.1.3.1
        exponent = np.clip(-4 * (values - np.float32(center)) / np.float32(width), -80, 80)
        return np.asarray(1 / (1 + np.exp(exponent)), dtype=np.float32)
    if window.function == "LINEAR_EXACT" or width < 1:  # C.11.2.1.3.2; LINEAR has no width below 1
        return _ramp(values, center - width / 2, width)
    # C.11.2.1.2.1; a width of 1 is a threshold.
    return _ramp(values, center - 0.5 - (width - 1) / 2, max(width - 1, 1e-6))


def _read_rescale(dataset: Dataset) -> tuple[float, float]:
    """Return Rescale Slope and Rescale Intercept, 1 and 0 where absent."""
    slope, intercept = read_number(dataset, "RescaleSlope"), read_number(dataset, "RescaleIntercept")
    return 1.0 if slope is None else slope, 0.0 if intercept is None else intercept


def _rescaled_below_zero(dataset: Dataset) -> bool:
    """Return whether Bits Stored, Pixel Representation and the modality transformation allow negative values."""
    if dataset.get("ModalityLUTSequence"):
        return False
    bits = int(dataset.BitsStored)
    ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if int(dataset.PixelRepresentation) == 1 else (0, 2**bits - 1)
    slope, intercept = _read_rescale(dataset)
    return bool(min(slope * end + intercept for end in ends) < 0)


def _ramp(values: NDArray[np.float32], low: float, width: float) -> NDArray[np.float32]:
    """Return 0 up to `low`, 1 from `low + width` on, and a straight line between."""
    return np.asarray(np.clip((values - np.float32(low)) / np.float32(width), 0, 1), dtype=np.float32)


def _read_lookup_table(item: Dataset, dataset: Dataset, *, signed: bool) -> tuple[NDArray[np.int64], int, int]:
    """Return table, first value mapped and bits per entry of a LUT item (PS3.3 C.11.1.1, C.11.2.1.1).

    Args:
        item: the item of the LUT sequence.
        dataset: the header, for its byte order.
        signed: whether the values looked up may be negative. This decides how the first value mapped is meant; the
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
    # Some writers declare fewer bits than the entries have. Others declare 16 bits over entries of 12, which would be
    # black. One bit less may be meant.
    used = int(table.max()).bit_length()
    if used > bits or find_depth(int(table.max())) <= bits - 2:
        bits = max(used, min(bits, 8))
    return table, first - 65536 if signed and first > 32767 else first, bits
