"""The marker segments of JPEG and JPEG-LS: what the decoders do not check (ITU-T T.81 annex B)."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from bsdiff_rt.errors import InputFailed

JPEG_START, J2K_START = b"\xff\xd8\xff", b"\xff\x4f\xff\x51"
_SOS, _EOI, _JPEG_LS_FRAME = 0xDA, 0xD9, 0xF7
_FRAMES = (*(marker for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC)), _JPEG_LS_FRAME)
# Behind coded data: a marker that is neither a stuffed byte (JPEG: 00, JPEG-LS: below 80) nor a restart.
_NEXT_MARKER = re.compile(rb"\xff+[\x80-\xcf\xd8-\xfe]")


@dataclass(frozen=True)
class Segment:
    """A marker segment.

    Attributes:
        marker: second byte of the marker.
        start: position of the data, behind marker and length.
        data: the bytes of the segment; empty for the end of the image.
    """

    marker: int
    start: int
    data: bytes


@dataclass(frozen=True)
class JpegStream:
    """A JPEG or JPEG-LS picture, from its first marker to the end of the image.

    Attributes:
        content: the bytes of the picture, without what follows its end.
        segments: its marker segments, in order.
        frame: marker of its frame: C0 and C1 baseline and extended, C2 progressive, C3 lossless, F7 JPEG-LS.
        precision: bits of a sample.
        rows, columns: size of the picture, px.
        components: number of channels.
    """

    content: bytes
    segments: tuple[Segment, ...]
    frame: int
    precision: int
    rows: int
    columns: int
    components: int

    @property
    def is_jpeg_ls(self) -> bool:
        """Return whether the picture is JPEG-LS."""
        return self.frame == _JPEG_LS_FRAME


def parse_jpeg(content: bytes) -> JpegStream:
    """Find the segments of a JPEG or JPEG-LS picture.

    Decoders fill up what a truncated file lacks and report nothing. So the end of the image is looked for here.

    Args:
        content: the bytes, beginning with the start of the image. What follows the end of the image is ignored.

    Raises:
        InputFailed: the picture ends before its end marker, has no frame, or has data where a marker is due.
    """
    try:
        segments, end = _find_segments(content)
    except (IndexError, struct.error):
        raise InputFailed("the JPEG picture is truncated") from None
    frame = next((segment for segment in segments if segment.marker in _FRAMES), None)
    if frame is None or len(frame.data) < 6:
        raise InputFailed("the JPEG data are damaged: they hold no picture")
    precision, rows, columns, components = struct.unpack_from(">BHHB", frame.data)
    return JpegStream(content[:end], tuple(segments), frame.marker, precision, rows, columns, components)


def _find_segments(content: bytes) -> tuple[list[Segment], int]:
    """Return every segment up to the end of the image, and the position behind that end.

    Raises:
        IndexError, struct.error: the content ends before.
        InputFailed: a marker is not where one must be, or there is no end of the image.
    """
    segments: list[Segment] = []
    position = 2
    while True:
        if content[position] != 0xFF:
            raise InputFailed("the JPEG data are damaged: data where a marker is due")
        while content[position] == 0xFF:  # fill bytes
            position += 1
        marker = content[position]
        position += 1
        if marker == _EOI:
            return segments, position
        (length,) = struct.unpack_from(">H", content, position)
        if length < 2 or position + length > len(content):
            raise InputFailed("the JPEG picture is truncated")
        segments.append(Segment(marker, position + 2, content[position + 2 : position + length]))
        position += length
        if marker == _SOS:
            following = _NEXT_MARKER.search(content, position)
            if following is None:
                raise InputFailed("the JPEG picture is truncated: it has no end marker")
            position = following.start()
