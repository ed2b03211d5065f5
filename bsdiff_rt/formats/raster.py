"""PNG, JPEG and TIFF files in, PNG out. Torch-free.

OpenCV decodes, but it returns a partly grey picture for a truncated PNG or JPEG, the first page of many, the first
frame of an animation, and wrong pixels for some TIFF layouts, all without an error. So the container is walked first:
PNG chunks with their checksums up to IEND (PNG specification, third edition, section 5), JPEG segments up to the end of
image marker (ITU-T T.81, annex B), TIFF directories, whether each strip lies inside the file (TIFF 6.0, section 2) and,
where strips are Deflate streams, their checksums (RFC 1950). What this cannot see: data replaced inside a file whose
structure is whole, in formats without checksums (JPEG, other TIFFs).

A picture turned by an EXIF orientation is refused: rotating it would break the overlay with the source file, and not
rotating it would show the networks a sideways chest.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.errors import InputFailed, InputRefused, SettingsError
from bsdiff_rt.files import write_atomically
from bsdiff_rt.formats.base import Format, ReadOptions, ResultToWrite
from bsdiff_rt.formats.radiograph import (
    Radiograph,
    from_pixels,
    to_stored,
)

_Grey = NDArray[np.uint8] | NDArray[np.uint16]

# Largest difference between the channels of a grey picture saved as colour, of the full range: JPEG's colour
# conversion and quantisation leave up to a few levels of 255.
GREY_TOLERANCE = 8 / 255

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_SIGNATURE = b"\xff\xd8\xff"
_TIFF_SIGNATURES = (b"II*\x00", b"MM\x00*")
_BIGTIFF_SIGNATURES = (b"II+\x00", b"MM\x00+")
_ORIENTATION = 274
RASTER_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff"})
# OpenCV prints what its decoders find; the one line of an InputFailed says it.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

_TIFF_DEFLATE = (8, 32946)  # Compression: Adobe's number and the one before it
_INFLATED_AT_ONCE = 1 << 20  # bytes

_UPRIGHT = (0, 1)  # 0 is not defined: some writers leave it where they know nothing
_TIFF_INTEGERS = {1: ("B", 1), 3: ("H", 2), 4: ("I", 4)}  # field type: struct code, bytes


def read_raster(path: Path, at_least: int = 8) -> Radiograph:
    """Read a grey picture of 8 or 16 bits.

    Grey saved as RGB or RGBA is taken as grey. A 16-bit file does not state its depth: see `from_pixels`.

    Args:
        path: the file.
        at_least: bits of a 16-bit file, where they are known: it may be darker than its range.

    Raises:
        InputRefused: not PNG, JPEG or TIFF, or not a single, upright, grey picture of 8 or 16 bits.
        InputFailed: unreadable, truncated or damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputFailed(f"cannot be read: {error.strerror or type(error).__name__}") from error
    if not content:
        raise InputFailed("the file is empty (0 bytes)")
    name, check = _container(content)
    try:
        check(content)
    except (struct.error, IndexError) as error:
        raise InputFailed(f"the {name} file is truncated or damaged: its structure leads out of the file") from error
    grey = _decode(name, content)
    return from_pixels(grey, at_least)


def find_pairs(folder: Path) -> list[tuple[str, Path, Path]]:
    """Name and files of every pair of images NAME_cxr.* and NAME_soft_tissue.* in `folder`, sorted by name.

    Raises:
        SettingsError: no pair there, or an X-ray without its soft-tissue image.
    """
    pairs = []
    images = [path for path in sorted(folder.glob("*")) if path.suffix.lower() in RASTER_SUFFIXES]
    for cxr in (path for path in images if path.stem.endswith("_cxr")):
        name = cxr.stem.removesuffix("_cxr")
        partners = [path for path in images if path.stem == f"{name}_soft_tissue"]
        if len(partners) != 1:
            raise SettingsError(f"{cxr}: expected one file {name}_soft_tissue.*, found {len(partners)}")
        pairs.append((name, cxr, partners[0]))
    if not pairs:
        raise SettingsError(f"{folder}: no pairs NAME_cxr.png / NAME_soft_tissue.png found")
    return pairs


def read_together(paths: Sequence[Path]) -> list[Radiograph]:
    """Read pictures that share one grey scale, such as an X-ray and its soft tissue.

    A darker picture may need fewer bits than its partner. Read alone, each would be scaled by its own depth. Here every
    16-bit file is scaled by the depth of the deepest one.

    Raises:
        InputRefused, InputFailed: as `read_raster`.
    """
    pictures = [read_raster(path) for path in paths]
    deepest = max(picture.bits_stored for picture in pictures)
    return [
        picture if picture.bits_stored == deepest else read_raster(path, deepest)
        for path, picture in zip(paths, pictures, strict=True)
    ]


def write_png(path: Path, soft_tissue: NDArray[np.float32], bits_stored: int) -> None:
    """Write a result as PNG: 8 bits for an 8-bit source, else 16 bits with values up to 2**bits_stored - 1.

    So the result of a 12-bit source saved in 16 bits has the source's range and overlays with it. The file appears
    whole or not at all.

    Args:
        path: the file; its folder exists.
        soft_tissue: [H, W], float32, in [0, 1].
        bits_stored: the source's, 8 to 16.

    Raises:
        InputFailed: the result is not an image.
        OSError: the file cannot be written.
    """
    done, encoded = cv2.imencode(".png", to_stored(soft_tissue, bits_stored))
    if not done:
        raise InputFailed("the result could not be encoded as PNG")
    write_atomically(path, encoded.tobytes())


def _container(content: bytes) -> tuple[str, Callable[[bytes], None]]:
    """Name and structure check of the file format that the first bytes announce."""
    if content.startswith(_PNG_SIGNATURE):
        return "PNG", _check_png
    if content.startswith(_JPEG_SIGNATURE):
        return "JPEG", _check_jpeg
    if content.startswith(_TIFF_SIGNATURES):
        return "TIFF", _check_tiff
    if content.startswith(_BIGTIFF_SIGNATURES):
        raise InputRefused("BigTIFF is not supported; save it as TIFF or PNG")
    if any(signature.startswith(content) for signature in (_PNG_SIGNATURE, _JPEG_SIGNATURE, *_TIFF_SIGNATURES)):
        raise InputFailed(f"truncated after {len(content)} bytes")
    raise InputRefused("not a PNG, JPEG or TIFF file")


def _decode(name: str, content: bytes) -> _Grey:
    """Decode to one grey channel, [H, W], uint8 or uint16, as stored (no EXIF rotation)."""
    try:
        picture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise InputFailed(f"the {name} file cannot be decoded (OpenCV error {error.code})") from error
    if picture is None:
        raise InputFailed(f"the {name} file cannot be decoded")
    if picture.dtype not in (np.uint8, np.uint16):
        raise InputRefused(f"{picture.dtype} pixels; 8- or 16-bit unsigned integers are needed")
    if picture.ndim == 2:
        return cast(_Grey, picture)
    full = 255 if picture.dtype == np.uint8 else 65535
    if picture.shape[2] == 4 and int(picture[..., 3].min()) < full:
        raise InputRefused("the picture has transparent parts; save it without an alpha channel")
    colours = picture[..., :3]
    spread = colours.max(axis=2).astype(np.int64) - colours.min(axis=2)
    if int(spread.max()) > GREY_TOLERANCE * full:
        raise InputRefused("a colour picture; a chest X-ray is grey (all channels equal)")
    return cast(_Grey, cv2.cvtColor(np.ascontiguousarray(colours), cv2.COLOR_BGR2GRAY))


def _check_png(content: bytes) -> None:
    """Walk the chunks to IEND with their checksums; refuse palettes, animations and depths other than 8 and 16."""
    position, seen = len(_PNG_SIGNATURE), set()
    while True:
        length, kind = struct.unpack_from(">I4s", content, position)
        data = content[position + 8 : position + 8 + length]
        (checksum,) = struct.unpack_from(">I", content, position + 8 + length)
        if zlib.crc32(data, zlib.crc32(kind)) != checksum:
            raise InputFailed("the PNG file is damaged: a chunk's checksum does not match")
        if kind == b"IHDR":
            depth, colour_type = struct.unpack_from(">BB", data, 8)
            if colour_type == 3:
                raise InputRefused("a PNG with a colour palette; save it as 8- or 16-bit grey")
            if depth not in (8, 16):
                raise InputRefused(f"a PNG of {depth} bits; 8 or 16 are needed")
        elif kind == b"acTL":
            raise InputRefused("an animated PNG; one picture per file is needed")
        elif kind == b"eXIf":
            _refuse_turned(data)
        seen.add(kind)
        if kind == b"IEND":
            break
        position += 12 + length
    if not {b"IHDR", b"IDAT"} <= seen:
        raise InputFailed("the PNG file is damaged: it holds no picture")


def _check_jpeg(content: bytes) -> None:
    """Walk the segments to the end of image marker; refuse precisions other than 8 bits and CMYK."""
    frame = False
    for marker, data in _jpeg_segments(content):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # SOF0 to SOF15
            frame = True
            precision, _, _, components = struct.unpack_from(">BHHB", data)
            if precision != 8:
                raise InputRefused(f"a JPEG of {precision} bits; 8 are supported, save it as 16-bit PNG")
            if components not in (1, 3):
                raise InputRefused(f"a JPEG of {components} channels; a chest X-ray is grey")
        elif marker == 0xE1 and data.startswith(b"Exif\x00\x00"):
            _refuse_turned(data[6:])
    if not frame:
        raise InputFailed("the JPEG file is damaged: it holds no picture")


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Each marker segment up to EOI, with the entropy-coded data after SOS skipped.

    Raises:
        InputFailed: the file ends before its end of image marker, or a marker is not where one must be.
    """
    position = 2
    while True:
        if content[position] != 0xFF:
            raise InputFailed("the JPEG file is damaged: data where a marker is due")
        while content[position] == 0xFF:  # fill bytes
            position += 1
        marker = content[position]
        position += 1
        if marker == 0xD9:  # EOI
            return
        (length,) = struct.unpack_from(">H", content, position)
        if position + length > len(content):
            raise InputFailed("the JPEG file is truncated")
        yield marker, content[position + 2 : position + length]
        position += length
        if marker == 0xDA:  # SOS: to the next marker that is neither a stuffed zero nor a restart
            position = content.find(b"\xff", position)
            while position >= 0 and (content[position + 1] == 0 or 0xD0 <= content[position + 1] <= 0xD7):
                position = content.find(b"\xff", position + 2)
            if position < 0:
                raise InputFailed("the JPEG file is truncated: no end of image marker")


def _check_tiff(content: bytes) -> None:
    """Refuse layouts that are not one grey 8- or 16-bit picture or that OpenCV decodes wrongly; find truncation."""
    tags, following = _tiff_directory(content)
    if following:
        raise InputRefused("a TIFF of several pages; one picture per file is needed")
    bits = set(tags.get(258, [1]))
    if any(value != 1 for value in tags.get(339, [1])):
        raise InputRefused("a TIFF of signed or floating-point pixels; 8- or 16-bit unsigned integers are needed")
    if bits not in ({8}, {16}):
        raise InputRefused(f"a TIFF of {'/'.join(map(str, sorted(bits)))} bits; 8 or 16 are needed")
    photometric = tags.get(262, [-1])[0]
    if photometric == 0:
        raise InputRefused("a TIFF stored white-is-zero; save it black-is-zero (grey values inverted)")
    if photometric == 3:
        raise InputRefused("a TIFF with a colour palette; save it as 8- or 16-bit grey")
    if photometric not in (1, 2, 6):
        raise InputRefused("a TIFF that is neither grey nor RGB")
    if photometric == 1 and tags.get(277, [1])[0] != 1:
        raise InputRefused("a grey TIFF with further channels; save it without its alpha channel")
    if tags.get(277, [1])[0] > 1 and tags.get(284, [1])[0] != 1:
        raise InputRefused("a TIFF with its channels in separate planes; save it as grey")
    if tags.get(_ORIENTATION, [1])[0] not in _UPRIGHT:
        _refuse_orientation()
    offsets, counts = (tags.get(273) or tags.get(324), tags.get(279) or tags.get(325))
    if not offsets or not counts or len(offsets) != len(counts):
        raise InputFailed("the TIFF file is damaged: it does not say where its pixels are")
    if any(offset + count > len(content) or not count for offset, count in zip(offsets, counts, strict=True)):
        raise InputFailed("the TIFF file is truncated: it ends before its pixels do")
    if tags.get(259, [1])[0] in _TIFF_DEFLATE:
        for offset, count in zip(offsets, counts, strict=True):
            _check_deflate(content[offset : offset + count])


def _check_deflate(strip: bytes) -> None:
    """Inflate a strip, which OpenCV does without a look at its checksum, and keep nothing of it."""
    stream = zlib.decompressobj()
    try:
        while strip and not stream.eof:
            stream.decompress(strip, _INFLATED_AT_ONCE)
            strip = stream.unconsumed_tail
        stream.flush()  # what the last codes stand for, where they met the limit
    except zlib.error:
        raise InputFailed("the TIFF file is damaged: a strip's checksum or code does not match") from None
    if not stream.eof:
        raise InputFailed("the TIFF file is damaged: a strip ends too early")


def _tiff_directory(content: bytes) -> tuple[dict[int, list[int]], int]:
    """Integer tags of the first image file directory, and the offset of the next one (0: none). EXIF has this form too.

    Raises:
        struct.error: it leads out of the file.
    """
    order = "<" if content.startswith(b"II") else ">"
    (position,) = struct.unpack_from(order + "I", content, 4)
    (entries,) = struct.unpack_from(order + "H", content, position)
    tags: dict[int, list[int]] = {}
    for entry in range(position + 2, position + 2 + 12 * entries, 12):
        tag, kind, count = struct.unpack_from(order + "HHI", content, entry)
        if kind not in _TIFF_INTEGERS:
            continue
        code, size = _TIFF_INTEGERS[kind]
        start = entry + 8
        if size * count > 4:
            (start,) = struct.unpack_from(order + "I", content, start)
        if start + size * count > len(content):
            raise struct.error("outside the file")
        tags[tag] = list(struct.unpack_from(f"{order}{count}{code}", content, start))
    (following,) = struct.unpack_from(order + "I", content, position + 2 + 12 * entries)
    return tags, following


def _refuse_turned(exif: bytes) -> None:
    """Refuse an EXIF block whose orientation is not upright; a damaged block says nothing about the pixels."""
    try:
        tags, _ = _tiff_directory(exif)
    except struct.error:
        return
    if tags.get(_ORIENTATION, [1])[0] not in _UPRIGHT:
        _refuse_orientation()


def _refuse_orientation() -> None:
    raise InputRefused("the picture is marked as turned (EXIF orientation); save it upright first")


def _recognise(path: Path) -> bool:
    """Return whether a file begins as a PNG, JPEG or TIFF file does; False if it cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError:
        return False
    return head.startswith((_PNG_SIGNATURE, _JPEG_SIGNATURE, *_TIFF_SIGNATURES, *_BIGTIFF_SIGNATURES))


def _read(path: Path, options: ReadOptions) -> Radiograph:
    return read_raster(path, options.least_bits)


def _write(path: Path, result: ResultToWrite) -> None:
    write_png(path, result.picture, result.like.bits_stored)


RASTER = Format(
    name="raster",
    titles=("PNG", "JPEG", "TIFF"),
    suffixes=RASTER_SUFFIXES,
    recognise=_recognise,
    read=_read,
    kinds=("png",),
    result_suffix=".png",
    write=_write,
)
