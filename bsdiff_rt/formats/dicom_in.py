"""Read chest X-rays from DICOM files. Torch-free.

The way of the values: stored values, modality LUT, VOI LUT, polarity, [0, 1] (PS3.3 C.11.1, C.11.2, C.7.6.3.1.2;
PS3.4 N.2). Accepted are single-frame grey images of 8 to 16 bits in the CR, DX-for-presentation and Secondary Capture
classes. Exceptions of pydicom and the codecs quote element values, so only their type reaches a message.
"""

from __future__ import annotations

import logging
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pydicom import Dataset, dcmread
from pydicom.filereader import read_dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian
from pydicom.valuerep import VR

from bsdiff_rt.errors import BsdiffError, InputFailed, InputRefused
from bsdiff_rt.formats.base import Identity
from bsdiff_rt.formats.dicom_checks import check_kind, check_pixel_module, check_view
from bsdiff_rt.formats.dicom_grey import to_displayed
from bsdiff_rt.formats.dicom_pixels import assume_transfer_syntax, decode_stored_values, note_lossy_compression
from bsdiff_rt.formats.radiograph import Radiograph, check_picture, hash_pixels

_FIRST_ELEMENTS_OF_GROUP_8 = (0, 1, 5, 8, 0x12, 0x14, 0x16, 0x18)
_GROUP_8_LITTLE = tuple(bytes((8, 0, element, 0)) for element in _FIRST_ELEMENTS_OF_GROUP_8)
_GROUP_8_BIG = tuple(bytes((0, 8, 0, element)) for element in _FIRST_ELEMENTS_OF_GROUP_8)
_GROUP_2 = b"\x02\0"  # file meta information, always explicit VR little endian
_GROUP_2_VRS = (b"UL", b"OB", b"UI", b"SH", b"AE", b"UR")
_CHUNK_BYTES = 1 << 20
MAX_INFLATED = 1 << 28  # bytes of a deflated dataset; a picture of MAX_PIXELS has half of it


def is_dicom(path: Path) -> bool:
    """Return whether a file begins as DICOM does: with "DICM" behind a 128-byte preamble, or with a data element.

    Files without preamble are not conforming (PS3.10 section 7.1), but common in old archives. They begin with an
    element of group 0002 or 0008. A file that cannot be read is no DICOM file here; the reader says why later.
    """
    try:
        with path.open("rb") as file:
            head = file.read(132)
            size = file.seek(0, 2)
    except OSError:
        return False
    if head[128:132] == b"DICM":
        return True
    if len(head) < 8:
        return False
    if head.startswith(_GROUP_2):
        return head[3] <= 1 and head[4:6] in _GROUP_2_VRS
    if head[:4] not in (*_GROUP_8_LITTLE, *_GROUP_8_BIG):
        return False
    if head[4:6].decode("latin-1") in set(VR):
        return True
    return int.from_bytes(head[4:8], "little") <= min(size - 8, 1024)


def read_dicom(path: Path, *, any_view: bool = False, derived: bool = False) -> Radiograph:
    """Read a chest X-ray from a DICOM file.

    Args:
        path: the file.
        any_view: accept lateral and oblique views and other body parts, too.
        derived: accept bone-suppressed images, too. Use it to compare results, not to process them again.

    Returns:
        The picture as it is meant to be displayed, the header without its pixels, and warnings. Padding (Pixel Padding
        Value, PS3.3 C.7.5.1.1.2) is 0.

    Raises:
        InputRefused: readable, but not a single-frame, grey, frontal chest X-ray for presentation.
        InputFailed: unreadable, truncated or damaged.
    """
    try:
        with quiet_pydicom():
            if not is_dicom(path):
                raise _explain_not_dicom(path)
            _check_deflated(path)
            dataset = dcmread(path, force=True)
            if not dataset:  # pydicom's answer to an end of file inside an element of undefined length
                raise InputFailed("truncated or damaged: no data elements can be read")
            radiograph = _read_dataset(dataset, any_view=any_view, derived=derived)
    except BsdiffError:
        raise
    except Exception as error:  # damaged input makes pydicom and the codecs raise anything; their text quotes values
        raise InputFailed(f"damaged or not conforming to DICOM ({type(error).__name__})") from None
    check_picture(radiograph.cxr)
    return radiograph


def _check_deflated(path: Path) -> None:
    """Refuse a deflated dataset that becomes too large, before pydicom inflates it in memory.

    Raises:
        InputRefused: it becomes larger than MAX_INFLATED bytes.
        zlib.error: it is damaged.
    """
    with path.open("rb") as file:
        if _find_transfer_syntax(file) != DeflatedExplicitVRLittleEndian:
            return
        stream, inflated = zlib.decompressobj(-zlib.MAX_WBITS), 0
        pending = file.read(_CHUNK_BYTES)
        while pending and not stream.eof:
            inflated += len(stream.decompress(pending, _CHUNK_BYTES))
            if inflated > MAX_INFLATED:
                raise InputRefused(f"it becomes larger than {MAX_INFLATED >> 20} MB when it is inflated")
            pending = stream.unconsumed_tail or file.read(_CHUNK_BYTES)


def _find_transfer_syntax(file: BinaryIO) -> str:
    """Return the transfer syntax UID that a file states, or "", and go to the end of the meta information."""
    begin = 132 if file.read(132)[128:] == b"DICM" else 0
    for implicit in (False, True):  # the latter is wrong, and pydicom reads it
        file.seek(begin)
        meta = read_dataset(file, implicit, True, stop_when=lambda tag, _, __: tag >> 16 != 2)
        try:
            return str(meta.get("TransferSyntaxUID", ""))
        except NotImplementedError:  # an unknown VR
            continue
    return ""


def _read_dataset(dataset: Dataset, *, any_view: bool, derived: bool) -> Radiograph:
    """Check and decode a dataset; its pixel data are removed.

    Raises:
        InputRefused, InputFailed: for the reasons that `read_dicom` lists.
    """
    assume_transfer_syntax(dataset)
    check_kind(dataset, derived=derived)
    found = check_pixel_module(dataset)
    if not any_view:
        check_view(dataset)
    stored, decoding = decode_stored_values(dataset)
    cxr, display = to_displayed(stored, dataset)
    note_lossy_compression(dataset)
    del dataset.PixelData
    return Radiograph(
        cxr, int(dataset.BitsStored), hash_pixels(stored), dataset, "dicom", (*found, *decoding, *display)
    )


def read_identity(path: Path) -> Identity:
    """Return StudyInstanceUID and PatientID. Each is None if absent, or if the file cannot be read as DICOM."""
    if not is_dicom(path):
        return Identity()
    try:
        with quiet_pydicom():
            header = dcmread(path, force=True, specific_tags=["StudyInstanceUID", "PatientID"], stop_before_pixels=True)
            study, patient = (str(header.get(each) or "").strip() for each in ("StudyInstanceUID", "PatientID"))
    except Exception:  # damaged input makes pydicom raise anything
        return Identity()
    return Identity(study or None, patient or None)


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Keep pydicom's log records of this thread, and its warnings, to itself: both quote element values.

    The warnings filter stays in place afterwards. Removing it would not be safe with several reading threads. Adding it
    again would not be safe either, because Python removes it first.
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


def _explain_not_dicom(path: Path) -> BsdiffError:
    """Return why a file that does not begin as DICOM cannot be read."""
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        return InputFailed(f"cannot be read: {error.strerror or type(error).__name__}")
    return InputFailed("the file is empty (0 bytes)") if empty else InputRefused("not a DICOM file")
