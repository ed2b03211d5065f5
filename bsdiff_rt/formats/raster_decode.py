"""Decode PNG, JPEG and TIFF to one channel of grey. Damage is found, and what is no single grey picture is refused.

Each decoder was chosen for what it notices. Pillow verifies the checksum of every PNG chunk. tifffile and imagecodecs
find truncated and damaged strips of a TIFF, Deflate checksums included. OpenCV decodes PNG and JPEG, because Pillow
reduces colour of 16 bits to 8. No decoder reports a JPEG that ends too early, so `jpeg.parse_jpeg` looks for its end.
What nobody can see is data replaced inside a file of a format without checksums (JPEG, most TIFFs).

A picture turned by an EXIF orientation is refused. Rotating it would break the overlay with the source file, and not
rotating it would show the model a sideways chest.
"""

from __future__ import annotations

import io
import logging
import math
import struct
from typing import Any, cast

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from bsdiff_rt.errors import BsdiffError, InputFailed, InputRefused
from bsdiff_rt.formats.jpeg import JPEG_START, parse_jpeg
from bsdiff_rt.formats.radiograph import check_size

Grey = NDArray[np.uint8] | NDArray[np.uint16]

# Largest difference between the channels of a grey pixel saved as colour, of the full range: JPEG's colour conversion
# and quantisation leave up to a few levels of 255.
GREY_TOLERANCE = 8 / 255
# Share of the pixels that may be coloured in a grey picture, such as a dot or a letter drawn by a viewer.
COLOURED_SHARE = 0.01

PNG_START = b"\x89PNG\r\n\x1a\n"
TIFF_STARTS = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")  # the last two: BigTIFF
STARTS = (PNG_START, JPEG_START, *TIFF_STARTS)
_PNG_CHUNKS_AT = 8  # byte of the first chunk
_PNG_SIZE_AT = 16  # byte of width and height
_PNG_DEPTH_AT = 24  # byte of the bit depth, in the first chunk
_ORIENTATION = 274
_UPRIGHT = (0, 1)  # 0 is not defined: some writers leave it where they know nothing
_PHOTOMETRIC_WHITE_IS_ZERO, _PHOTOMETRIC_GREY, _PHOTOMETRIC_RGB, _PHOTOMETRIC_PALETTE, _PHOTOMETRIC_YCBCR = (
    0,
    1,
    2,
    3,
    6,
)

# OpenCV prints what its decoders find, and tifffile logs it. The one sentence of an InputFailed says it.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)


def decode_grey(content: bytes) -> tuple[Grey, list[str]]:
    """Decode a picture to one grey channel, as stored.

    Args:
        content: the bytes of a PNG, JPEG or TIFF file.

    Returns:
        The grey levels, [H, W], uint8 or uint16, and warnings.

    Raises:
        InputRefused: not PNG, JPEG or TIFF, or not a single, upright, grey picture of 8 or 16 bits.
        InputFailed: truncated or damaged.
    """
    if content.startswith(PNG_START):
        return _to_grey(_decode_png(content))
    if content.startswith(JPEG_START):
        return _to_grey(_decode_jpeg(content))
    if content.startswith(TIFF_STARTS):
        return _to_grey(_decode_tiff(content))
    if any(start.startswith(content) for start in STARTS):
        raise InputFailed(f"truncated after {len(content)} bytes")
    raise InputRefused("not a PNG, JPEG or TIFF file")


def _to_grey(picture: NDArray[Any]) -> tuple[Grey, list[str]]:
    """Return the grey levels of a picture, [H, W] or [H, W, RGB or RGBA], and a warning if some pixels are coloured."""
    if picture.dtype not in (np.uint8, np.uint16):
        raise InputRefused(f"{picture.dtype} pixels; 8- or 16-bit unsigned integers are needed")
    if picture.ndim == 2:
        return cast(Grey, picture), []
    if picture.ndim != 3 or picture.shape[2] not in (3, 4):
        raise InputRefused("a picture with further channels; save it as grey")
    full = 255 if picture.dtype == np.uint8 else 65535
    if picture.shape[2] == 4 and int(picture[..., 3].min()) < full:
        raise InputRefused("the picture has transparent parts; save it without an alpha channel")
    colours = picture[..., :3]
    spread = colours.max(axis=2).astype(np.int64) - colours.min(axis=2)
    coloured = int(np.count_nonzero(spread > GREY_TOLERANCE * full))
    if coloured > COLOURED_SHARE * spread.size:
        raise InputRefused("a colour picture; a chest X-ray is grey (all channels equal)")
    warnings = [f"{coloured} pixels are coloured. They are taken as grey."] if coloured else []
    return cast(Grey, cv2.cvtColor(np.ascontiguousarray(colours), cv2.COLOR_RGB2GRAY)), warnings


def _decode_png(content: bytes) -> NDArray[Any]:
    """Verify a PNG with its checksums and decode it; a palette becomes its colours.

    Raises:
        InputRefused: animated, turned, or of another depth than 8 or 16 bits.
        InputFailed: truncated or damaged.
    """
    if len(content) > _PNG_DEPTH_AT:
        columns, rows = struct.unpack_from(">II", content, _PNG_SIZE_AT)
        check_size(rows, columns)
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            animated = bool(getattr(image, "is_animated", False))
            if image.mode == "P" and image.palette is None:
                raise InputFailed("the PNG file is damaged: its palette is missing")
            image.verify()
    except (BsdiffError, MemoryError):
        raise
    except Exception:  # Pillow raises SyntaxError, OSError, ValueError, struct.error and others
        raise InputFailed("the PNG file is truncated or damaged: its chunks or their checksums are wrong") from None
    if animated:
        raise InputRefused("an animated PNG; one picture per file is needed")
    depth = content[_PNG_DEPTH_AT]
    if depth not in (8, 16):
        raise InputRefused(f"a PNG of {depth} bits; 8 or 16 are needed")
    _refuse_turned(_find_exif(content))
    return _decode_with_opencv("PNG", content)


def _find_exif(png: bytes) -> bytes | None:
    """Return the content of the eXIf chunk of a PNG whose chunks are whole. Pillow finds it before the pixels only."""
    place = _PNG_CHUNKS_AT
    while place + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, place)
        if kind == b"eXIf":
            return png[place + 8 : place + 8 + length]
        place += 12 + length
    return None


def _decode_jpeg(content: bytes) -> NDArray[Any]:
    """Decode a JPEG that ends where it should.

    Raises:
        InputRefused: turned, of another depth than 8 bits, or CMYK.
        InputFailed: truncated or damaged.
    """
    picture = parse_jpeg(content)
    if picture.precision != 8:
        raise InputRefused(f"a JPEG of {picture.precision} bits; 8 are supported, save it as 16-bit PNG")
    check_size(picture.rows, picture.columns)
    if picture.components not in (1, 3):
        raise InputRefused(f"a JPEG of {picture.components} channels; a chest X-ray is grey")
    for segment in picture.segments:
        if segment.marker == 0xE1 and segment.data.startswith(b"Exif\x00\x00"):
            _refuse_turned(segment.data)
    return _decode_with_opencv("JPEG", picture.content)


def _decode_with_opencv(name: str, content: bytes) -> NDArray[Any]:
    """Decode as stored, without EXIF rotation: [H, W], or [H, W, 3 or 4] in the order RGB(A)."""
    try:
        picture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise InputFailed(f"the {name} file cannot be decoded (OpenCV error {error.code})") from error
    if picture is None:
        raise InputFailed(f"the {name} file cannot be decoded")
    if picture.ndim == 2:
        return picture
    return picture[..., [2, 1, 0, 3][: picture.shape[2]]]


def _decode_tiff(content: bytes) -> NDArray[Any]:
    """Decode a TIFF or BigTIFF of one page; a palette becomes its colours.

    Raises:
        InputRefused: not one grey or RGB picture of 8 or 16 bits, or turned.
        InputFailed: truncated or damaged.
    """
    try:
        with tifffile.TiffFile(io.BytesIO(content)) as file:
            if len(file.pages) > 1:
                raise InputRefused("a TIFF of several pages; one picture per file is needed")
            page = cast(tifffile.TiffPage, file.pages[0])
            _refuse_tiff_layout(page)
            if not page.dataoffsets or not all(page.dataoffsets) or not all(page.databytecounts):
                raise InputFailed("the TIFF file is damaged: it does not say where its pixels are")
            if len(page.dataoffsets) < math.prod(page.chunked):  # tifffile would fill up the rest with black
                raise InputFailed("the TIFF file is damaged: strips or tiles of its picture are missing")
            if page.photometric == _PHOTOMETRIC_PALETTE and page.colormap is None:
                raise InputFailed("the TIFF file is damaged: its palette is missing")
            picture = np.asarray(page.asarray())
            colours = None if page.colormap is None else np.asarray(page.colormap)
    except (BsdiffError, MemoryError):
        raise
    except Exception:  # tifffile and the codecs raise whatever the damage leads to
        raise InputFailed("the TIFF file is truncated or damaged: its pixels cannot be decoded") from None
    if colours is None:
        return picture
    return np.asarray(np.moveaxis((colours >> 8).astype(np.uint8), 0, -1)[picture])


def _refuse_tiff_layout(page: tifffile.TiffPage) -> None:
    """Raise InputRefused unless a page is one upright picture of 8 or 16 bits, grey, RGB or of a palette."""
    check_size(int(page.imagelength) * int(page.imagedepth), int(page.imagewidth))
    bits = page.bitspersample if isinstance(page.bitspersample, tuple) else (page.bitspersample,)
    if page.sampleformat not in (None, 1, (1,) * page.samplesperpixel):
        raise InputRefused("a TIFF of signed or floating-point pixels; 8- or 16-bit unsigned integers are needed")
    if set(bits) not in ({8}, {16}):
        raise InputRefused(f"a TIFF of {'/'.join(map(str, sorted(set(bits))))} bits; 8 or 16 are needed")
    photometric = int(page.photometric)
    if photometric == _PHOTOMETRIC_WHITE_IS_ZERO:
        raise InputRefused("a TIFF stored white-is-zero; save it black-is-zero (grey values inverted)")
    if photometric not in (_PHOTOMETRIC_GREY, _PHOTOMETRIC_RGB, _PHOTOMETRIC_PALETTE, _PHOTOMETRIC_YCBCR):
        raise InputRefused("a TIFF that is neither grey nor RGB")
    if photometric in (_PHOTOMETRIC_GREY, _PHOTOMETRIC_PALETTE) and page.samplesperpixel != 1:
        raise InputRefused("a grey TIFF with further channels; save it without its alpha channel")
    if page.samplesperpixel > 1 and int(page.planarconfig or 1) != 1:
        raise InputRefused("a TIFF with its channels in separate planes; save it as grey")
    orientation = page.tags.get(_ORIENTATION)
    if orientation is not None and orientation.value not in _UPRIGHT:
        _refuse_orientation()


def _refuse_turned(exif: bytes | None) -> None:
    """Raise InputRefused if an EXIF block says that the picture is not upright. A damaged block says nothing."""
    if not exif:
        return
    tags = Image.Exif()
    try:
        tags.load(exif)
        orientation = tags.get(_ORIENTATION, 1)
    except Exception:  # Pillow raises whatever the damage leads to; the pixels do not depend on it
        return
    if orientation not in _UPRIGHT:
        _refuse_orientation()


def _refuse_orientation() -> None:
    raise InputRefused("the picture is marked as turned (EXIF orientation); save it upright first")
