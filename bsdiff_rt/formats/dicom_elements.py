"""Values of DICOM elements as their writers meant them: other cases, commas in numbers, one number instead of two."""

from __future__ import annotations

import math
from typing import Any

from pydicom import Dataset
from pydicom.datadict import dictionary_description

from bsdiff_rt.errors import InputFailed

BONE_SUPPRESSED = "BONE_SUPPRESSED"  # value 4 of Image Type in results of this program
FULL_RANGE = "FULL RANGE"  # explanation of a result's window over all its values
SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
_BINARY_VRS = ("US", "SS", "UL", "SL", "UV", "SV", "FL", "FD")


def read_term(dataset: Dataset, keyword: str) -> str:
    """Return a code string or short text in upper case, without spaces around it; empty if absent."""
    value: Any = dataset.get(keyword)
    return "" if value is None else str(value).strip(" \0").upper()


def read_terms(dataset: Dataset, keyword: str) -> list[str]:
    """Return all values of a code string in upper case; empty if absent."""
    value: Any = dataset.get(keyword)
    values = [] if value is None else [value] if isinstance(value, str) else list(value)
    return [str(each).strip(" \0").upper() for each in values]


def read_numbers(dataset: Dataset, keyword: str) -> list[float]:
    """Return the values of a number that is stored as text; empty if absent. A decimal comma is read as a point.

    Raises:
        InputFailed: a value is not a number; names the element, not the value.
    """
    if keyword not in dataset:
        return []
    raw: Any = dataset.get_item(keyword)
    value: Any = raw.value
    if isinstance(value, bytes) and raw.VR in _BINARY_VRS:
        value = dataset[keyword].value
    if isinstance(value, bytes):  # pydicom has not converted it; its conversion would refuse commas
        value = value.decode("latin-1").split("\\")
    values = [] if value is None else [value] if isinstance(value, str | int | float) else list(value)
    texts = [str(each).strip(" \0").replace(",", ".") for each in values]
    if texts and not texts[0]:
        return []
    try:
        numbers = [float(text) for text in texts if text]
    except ValueError:
        numbers = [math.nan]
    if not all(math.isfinite(number) for number in numbers):
        raise InputFailed(f"{name_element(keyword)} is not a number. Correct the header.")
    return numbers


def read_number(dataset: Dataset, keyword: str) -> float | None:
    """Return the first value of a number that is stored as text; None if absent.

    Raises:
        InputFailed: the value is not a number.
    """
    numbers = read_numbers(dataset, keyword)
    return numbers[0] if numbers else None


def name_element(keyword: str) -> str:
    """Return the name of an element as the standard writes it, such as "Window Center"."""
    return dictionary_description(keyword)


def mend_spacings(dataset: Dataset) -> list[str]:
    """Correct pixel spacings that are not two decimal numbers, in place, so that results can carry them.

    One value says that the pixels are square. What is not a number is removed.

    Returns:
        A warning for each spacing that was changed.
    """
    warnings = []
    for keyword in SPACINGS:
        if keyword not in dataset:
            continue
        raw: Any = dataset.get_item(keyword)
        try:
            numbers = read_numbers(dataset, keyword)
        except InputFailed:
            del dataset[keyword]
            warnings.append(f"{name_element(keyword)} is not a number and is left out.")
            continue
        if len(numbers) == 1:
            numbers *= 2
            warnings.append(f"{name_element(keyword)} has one value instead of two. The pixels are taken as square.")
        elif not (isinstance(raw.value, bytes) and b"," in raw.value):
            continue
        setattr(dataset, keyword, [f"{number:.10g}" for number in numbers])
    return warnings
