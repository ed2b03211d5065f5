"""Stored values of a DICOM image, decoded from whatever its pixel data really are.

The transfer syntax is a label. Gateways decompress pixels and leave the old label, or the other way round. Where the
pixel data tell what they are, they are read as that, and a warning says so.
"""

from __future__ import annotations

import struct
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels.decoders.base import Decoder, get_decoder
from pydicom.pixels.utils import get_j2k_parameters
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from bsdiff_rt.errors import InputFailed, InputRefused
from bsdiff_rt.formats.dicom_checks import high_bit
from bsdiff_rt.formats.jpeg import J2K_START, JPEG_START, parse_jpeg

_JPEG_2000_METHOD = "ISO_15444_1"
_LOSSY_METHODS = {  # by transfer syntax; PS3.3 C.7.6.1.1.5.1
    JPEGBaseline8Bit: "ISO_10918_1",
    JPEGExtended12Bit: "ISO_10918_1",
    JPEGLSNearLossless: "ISO_14495_1",
    JPEG2000: _JPEG_2000_METHOD,
}
_ITEM = b"\xfe\xff\x00\xe0"  # begins encapsulated pixel data
_JPEG_SYNTAX = {0xC0: JPEGBaseline8Bit, 0xC1: JPEGExtended12Bit, 0xC3: JPEGLossless}  # by frame marker
_JPEG_LS_SYNTAXES = (JPEGLSLossless, JPEGLSNearLossless)
_J2K_SYNTAXES = (JPEG2000Lossless, JPEG2000, HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K)
_J2K_SIZE_AT = 8  # of the size, behind the start: markers, length, capabilities
_J2K_DATA, _J2K_END = b"\xff\x93", b"\xff\xd9"


def assume_transfer_syntax(dataset: Dataset) -> None:
    """Set the transfer syntax that the elements are encoded in, if the file meta information lacks it, in place."""
    if "TransferSyntaxUID" in dataset.file_meta:
        return
    implicit, little = dataset.original_encoding
    explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit


def decode_stored_values(dataset: Dataset) -> tuple[NDArray[np.int32], list[str]]:
    """Decode the pixel data to stored values, with unused bits cleared and the sign extended (PS3.5 section 8.1.1).

    The decoder is named, so that a file gives the same pixels whatever other codec packages are installed. A wrong
    transfer syntax is corrected in the dataset.

    Args:
        dataset: the header with its pixel data; `check_pixel_module` has passed it.

    Returns:
        The stored values, [H, W], int32, and warnings.

    Raises:
        InputRefused: compressed in a way that is not supported.
        InputFailed: truncated or damaged.
    """
    _find_decoder(dataset)
    warnings = _correct_label(dataset)
    decoder = _find_decoder(dataset)
    syntax = decoder.UID
    if syntax.is_encapsulated and syntax != RLELossless:
        return _decode_codestream(dataset, syntax), warnings
    if not syntax.is_encapsulated and len(dataset.PixelData) < (needed := _native_size(dataset)):
        raise InputFailed(f"truncated: {len(dataset.PixelData)} of {needed} bytes of pixels are there")
    options: dict[str, Any] = {"correct_unused_bits": False}
    plugin = "pydicom" if syntax.is_encapsulated else ""
    pixels, _ = decoder.as_array(dataset, raw=True, decoding_plugin=plugin, **options)
    if pixels.ndim != 2:  # more data than Rows x Columns is decoded as several frames
        raise InputFailed("damaged: more pixels than one frame of Rows x Columns holds")
    bits = int(dataset.BitsStored)
    samples = pixels.astype(np.int32) & (2 ** (8 * pixels.dtype.itemsize) - 1)
    return _extend_sign(samples >> (high_bit(dataset) + 1 - bits), bits, dataset), warnings


def note_lossy_compression(dataset: Dataset) -> None:
    """Enter how lossy pixels were compressed where the header leaves it out, in place (PS3.3 C.7.6.1.1.5).

    Pixels that were lossy stay lossy in every result. JPEG 2000 is lossy where the header says so.
    """
    method = _LOSSY_METHODS.get(dataset.file_meta.TransferSyntaxUID)
    stated = str(dataset.get("LossyImageCompression") or "").strip() == "01"
    if method is None or (method == _JPEG_2000_METHOD and not stated):
        return
    dataset.LossyImageCompression = "01"
    if not dataset.get("LossyImageCompressionRatio"):
        size = int(dataset.Rows) * int(dataset.Columns) * int(dataset.BitsAllocated) / 8
        dataset.LossyImageCompressionRatio = f"{size / len(dataset.PixelData):.4g}"
    if not dataset.get("LossyImageCompressionMethod"):
        dataset.LossyImageCompressionMethod = method


def _find_decoder(dataset: Dataset) -> Decoder:
    syntax = UID(str(dataset.file_meta.TransferSyntaxUID))
    try:
        return get_decoder(syntax)
    except NotImplementedError:
        raise InputRefused(f"compressed in a way that is not supported: {_name(syntax)}") from None


def _native_size(dataset: Dataset) -> int:
    return int(dataset.Rows) * int(dataset.Columns) * int(dataset.BitsAllocated) // 8


def _name(syntax: UID) -> str:
    return syntax.name if syntax.name != str(syntax) else "an unknown transfer syntax"


def _decode_codestream(dataset: Dataset, syntax: UID) -> NDArray[np.int32]:
    """Decode JPEG, JPEG-LS or JPEG 2000 to stored values.

    imagecodecs does so without Python's lock, so several files are decoded at once; pydicom's plugins hold it. Whether
    values have a sign is what the header says, whatever the picture says.

    Raises:
        InputFailed: truncated or damaged.
    """
    codestream, bits = _read_codestream(dataset), int(dataset.BitsStored)
    if syntax in _J2K_SYNTAXES:
        _check_j2k_stream(dataset, codestream)
        pixels = imagecodecs.jpeg2k_decode(codestream)
        bits = get_j2k_parameters(codestream).get("precision", bits)
    else:
        picture = parse_jpeg(codestream)
        _check_size(dataset, picture.rows, picture.columns)
        if picture.is_jpeg_ls:
            pixels = imagecodecs.jpegls_decode(picture.content)
            bits = min(bits, picture.precision)
        else:
            pixels = imagecodecs.jpeg8_decode(picture.content)
    if pixels.shape != (int(dataset.Rows), int(dataset.Columns)):
        raise InputFailed("damaged: the compressed picture has several components, the header says one")
    return _extend_sign(pixels.astype(np.int32), bits, dataset)


def _extend_sign(samples: NDArray[np.int32], bits: int, dataset: Dataset) -> NDArray[np.int32]:
    """Return the values that the lowest `bits` of the samples stand for."""
    values = samples & (2**bits - 1)
    if int(dataset.PixelRepresentation) == 1:
        values -= (values >> (bits - 1)) << bits
    return np.asarray(values, dtype=np.int32)


def _correct_label(dataset: Dataset) -> list[str]:
    """Correct a transfer syntax that is not what the pixel data are, in place.

    Returns:
        A warning if it was corrected.

    Raises:
        InputFailed: the label is wrong, and what the pixel data are cannot be told.
    """
    label = UID(str(dataset.file_meta.TransferSyntaxUID))
    element = dataset["PixelData"]
    content = bytes(element.value)
    undefined = bool(element.is_undefined_length)
    if not label.is_encapsulated and not undefined:
        return []
    if label.is_encapsulated and not undefined:
        if content.startswith((JPEG_START, J2K_START)):
            dataset.PixelData = encapsulate([content])
        elif not content.startswith(_ITEM):
            needed = _native_size(dataset)
            if len(content) not in (needed, needed + needed % 2):
                raise InputFailed(
                    f"labelled {_name(label)}, but the pixel data are neither compressed nor as long as uncompressed "
                    f"ones ({len(content)} of {needed} bytes)"
                )
            dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            return [f"The file is labelled {_name(label)}, but its pixels are not compressed. They are read as such."]
    actual = _recognise_codestream(dataset)
    if actual is None or actual == label:
        return []
    if label.is_encapsulated and _family(actual) == _family(label):
        return []
    dataset.file_meta.TransferSyntaxUID = actual
    return [f"The file is labelled {_name(label)}, but its pixels are {_name(actual)}. They are read as such."]


def _family(syntax: UID) -> int:
    """Return 1 for JPEG-LS, 2 for JPEG 2000, 0 for everything else that is compressed."""
    return 1 if syntax in _JPEG_LS_SYNTAXES else 2 if syntax in _J2K_SYNTAXES else 0


def _read_codestream(dataset: Dataset) -> bytes:
    """Return the compressed picture without its encapsulation.

    Raises:
        InputFailed: the encapsulation is damaged.
    """
    try:
        return get_frame(dataset.PixelData, 0, number_of_frames=1)
    except Exception:  # pydicom raises ValueError, struct.error and others
        raise InputFailed("the compressed picture is truncated: its fragments are incomplete") from None


def _recognise_codestream(dataset: Dataset) -> UID | None:
    """Return the transfer syntax that a compressed picture has by its own first bytes; None if they do not tell."""
    codestream = _read_codestream(dataset)
    if codestream.startswith(J2K_START):
        return JPEG2000
    if codestream.startswith(JPEG_START):
        picture = parse_jpeg(codestream)
        return JPEGLSLossless if picture.is_jpeg_ls else _JPEG_SYNTAX.get(picture.frame, JPEGExtended12Bit)
    return None


def _check_j2k_stream(dataset: Dataset, codestream: bytes) -> None:
    """Find truncation, which the decoder fills up without a word, and another size than the header states.

    Raises:
        InputFailed: one of them.
    """
    if codestream.rfind(_J2K_END) < codestream.rfind(_J2K_DATA) or _J2K_END not in codestream:
        raise InputFailed("the compressed picture is truncated: it has no end marker")
    _check_size(dataset, *_read_j2k_size(codestream))


def _read_j2k_size(codestream: bytes) -> tuple[int, int]:
    """Return rows and columns of a JPEG 2000 picture (ITU-T T.800 A.5.1).

    Raises:
        InputFailed: it does not state them.
    """
    start = codestream.find(J2K_START)
    try:
        if start < 0:
            raise InputFailed("the compressed picture is damaged: it does not state its size")
        right, bottom, left, top = struct.unpack_from(">4I", codestream, start + _J2K_SIZE_AT)
    except struct.error:
        raise InputFailed("the compressed picture is truncated") from None
    return bottom - top, right - left


def _check_size(dataset: Dataset, rows: int, columns: int) -> None:
    """Refuse a compressed picture of another size than the header states: its decoder would take memory for it.

    Raises:
        InputFailed: the sizes differ.
    """
    stated = int(dataset.Rows), int(dataset.Columns)
    if (rows, columns) != stated:
        raise InputFailed(
            f"damaged: the compressed picture has {rows} x {columns} px, the header says {stated[0]} x {stated[1]}"
        )
