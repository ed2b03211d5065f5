"""Damaged and hostile X-rays: whatever the bytes, the reader returns a picture or says in one sentence why not.

Every test draws the same inputs each time. `FUZZ_EXAMPLES=50000 pytest tests/formats/test_fuzz.py` draws more.
"""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import Dataset, dcmwrite
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    RLELossless,
)
from synthetic import chest, dataset, lookup_table, save, stored

from bsdiff_rt import formats
from bsdiff_rt.errors import InputFailed, InputRefused
from bsdiff_rt.formats import dicom_in, radiograph

resource = pytest.importorskip("resource", reason="Windows does not tell how much memory a process took")

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 170))  # of each of the twelve tests: some 2,000 together
LONGEST_MS = 5000
MEMORY_BYTES = 1 << 30  # that reading 40 x 36 px may add at most; the limit for hostile files is 2 GiB
SHAPE = (40, 36)
CHEST = chest(*SHAPE)
SAME_EACH_TIME = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=LONGEST_MS,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def encode_png(values: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG", **options)
    return file.getvalue()


def encode_tiff(values: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


GREY_8, GREY_16 = np.rint(CHEST * 255).astype(np.uint8), np.rint(CHEST * 65535).astype(np.uint16)
RASTER = {
    "png-8": encode_png(GREY_8),
    "png-16": cv2.imencode(".png", GREY_16)[1].tobytes(),
    "jpg": cv2.imencode(".jpg", GREY_8)[1].tobytes(),
    "tif-raw": encode_tiff(GREY_16),
    "tif-deflate": encode_tiff(GREY_16, compression="zlib"),
    "tif-tiles": encode_tiff(GREY_16, tile=(16, 16), bigtiff=True),
}
SYNTAXES = {
    "raw": ExplicitVRLittleEndian,
    "rle": RLELossless,
    "jpeg-lossless": JPEGLosslessSV1,
    "jpeg-2000": JPEG2000Lossless,
    "deflated": DeflatedExplicitVRLittleEndian,
}


@pytest.fixture(autouse=True)
def bounded():
    """Fails a test whose inputs made this process take more memory than they should."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < MEMORY_BYTES


def check(path: Path) -> None:
    """Read a file. The test fails if the reader raises an unexpected error or returns values outside [0, 1]."""
    try:
        found = formats.read(path)
    except (InputRefused, InputFailed):
        return
    assert found.cxr.dtype == np.float32
    assert found.cxr.ndim == 2
    assert np.isfinite(found.cxr).all()
    assert 0 <= found.cxr.min() < found.cxr.max() <= 1
    assert 8 <= found.bits_stored <= 16


PLACES = st.integers(0, 300) | st.integers(0, 65535)  # most of what decides lies at the beginning
NUMBERS = st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
MUTATIONS = st.one_of(
    st.tuples(st.just("set"), PLACES, st.binary(min_size=1, max_size=4)),
    st.tuples(st.just("insert"), PLACES, st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("delete"), PLACES, st.integers(1, 60)),
    st.tuples(st.just("cut"), PLACES, st.just(0)),
    st.tuples(st.just("copy"), PLACES, st.integers(4, 60)),
    st.tuples(st.sampled_from(["little", "big"]), PLACES, st.tuples(st.sampled_from([2, 4]), NUMBERS)),
)


def mutate(content: bytes, changes: list[tuple[str, int, Any]]) -> bytes:
    """Return some bytes, changed in each of the given ways."""
    changed = bytearray(content)
    for kind, place, value in changes:
        at = place % max(len(changed), 1)
        if kind == "set":
            changed[at : at + len(value)] = value
        elif kind == "insert":
            changed[at:at] = value
        elif kind == "delete":
            del changed[at : at + value]
        elif kind == "cut":
            del changed[at:]
        elif kind == "copy":
            changed[at:at] = changed[at // 2 : at // 2 + value]
        else:
            size, number = value
            changed[at : at + size] = (number % 256**size).to_bytes(size, kind)
    return bytes(changed)


@pytest.mark.parametrize("kind", RASTER)
def test_damaged_pictures(tmp_path, kind):
    path = tmp_path / f"x.{kind[:3]}"

    @SAME_EACH_TIME
    @given(st.lists(MUTATIONS, min_size=1, max_size=5))
    def draw(changes):
        path.write_bytes(mutate(RASTER[kind], changes))
        check(path)

    draw()


@pytest.mark.parametrize("kind", SYNTAXES)
def test_damaged_dicom(tmp_path, kind):
    whole = save(tmp_path / "whole.dcm", dataset(stored(CHEST, 12)), SYNTAXES[kind]).read_bytes()
    path = tmp_path / "x.dcm"

    @SAME_EACH_TIME
    @given(st.lists(MUTATIONS, min_size=1, max_size=5))
    def draw(changes):
        path.write_bytes(mutate(whole, changes))
        check(path)

    draw()


KEYWORDS = re.findall(
    r"\w+",
    """
    Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation SamplesPerPixel PhotometricInterpretation
    NumberOfFrames WindowCenter WindowWidth VOILUTFunction RescaleSlope RescaleIntercept PixelPaddingValue PixelSpacing
    ImagerPixelSpacing PixelAspectRatio Modality SOPClassUID SOPInstanceUID ImageType ViewPosition BodyPartExamined
    PatientOrientation PresentationLUTShape LossyImageCompression SpecificCharacterSet TimezoneOffsetFromUTC
    PresentationIntentType ModalityLUTSequence VOILUTSequence ViewCodeSequence AnatomicRegionSequence
    """,
)
ODD_VALUES = st.one_of(
    st.binary(max_size=12),
    st.integers(0, 65535).map(lambda number: number.to_bytes(2, "little")),
    st.sampled_from([b"1e400", b"NaN", b"-inf", b"1,5", b"0", b"-1", b"1\\2\\3", b"9" * 30, b"\\", b" ", b"A" * 5000]),
    st.sampled_from([b"MONOCHROME1", b"RGB", b"SIGMOID", b"INVERSE", b"ISO 2022 IR 87", b"nonsense", b"+9900", b"1.2"]),
)
LUTS = st.tuples(st.sampled_from([1, 2, 256, 4096]), st.integers(-5, 30000), st.sampled_from([8, 12, 16]))


@SAME_EACH_TIME
@given(st.lists(st.tuples(st.sampled_from(KEYWORDS), ODD_VALUES, LUTS), min_size=1, max_size=3))
def test_odd_dicom_elements(tmp_path, elements):
    """Values that no writer should write, in the elements that the reader looks at."""
    header = dataset(stored(CHEST, 12))
    for keyword, value, (entries, first, bits) in elements:
        if keyword.endswith("LUTSequence"):
            item = lookup_table(keyword[:8].lower(), np.arange(entries), first, bits)
            item[tag_for_keyword("LUTDescriptor")] = raw_element("LUTDescriptor", value)
            setattr(header, keyword, Sequence([item]))
        elif keyword.endswith("Sequence"):
            item = Dataset()
            item[tag_for_keyword("CodeValue")] = raw_element("CodeValue", value)
            setattr(header, keyword, Sequence([item]))
        else:
            header[tag_for_keyword(keyword)] = raw_element(keyword, value)
    header.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian  # it states no VR, so any bytes can be written
    header.file_meta.MediaStorageSOPClassUID = header.file_meta.MediaStorageSOPInstanceUID = "1.2"
    try:
        dcmwrite(tmp_path / "x.dcm", header, implicit_vr=True, little_endian=True, enforce_file_format=True)
    except Exception:  # not even pydicom's writer takes it
        reject()
    check(tmp_path / "x.dcm")


def raw_element(keyword: str, value: bytes) -> DataElement:
    return DataElement(tag_for_keyword(keyword), "OB", value + b" " * (len(value) % 2))


# --- what fuzzing found, and sizes that only a hostile file states ---


def refuse(path: Path) -> str:
    with pytest.raises((InputRefused, InputFailed)) as caught:
        formats.read(path)
    return str(caught.value)


def test_a_tiff_whose_tiles_are_missing_is_damaged(tmp_path):
    """tifffile fills up what is missing with black."""
    content = encode_tiff(GREY_16, tile=(16, 16))
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        length = file.pages[0].tags["ImageLength"]
    changed = bytearray(content)
    changed[length.valueoffset : length.valueoffset + 2] = (800).to_bytes(2, "little")
    (tmp_path / "x.tif").write_bytes(changed)
    assert refuse(tmp_path / "x.tif") == "the TIFF file is damaged: strips or tiles of its picture are missing"


@pytest.mark.parametrize("kind", ["png-8", "tif-raw", "jpg"])
def test_a_size_that_only_the_header_states_takes_no_memory(tmp_path, kind):
    content = bytearray(RASTER[kind])
    if kind == "png-8":
        content[16:24] = (60_000).to_bytes(4, "big") * 2
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    elif kind == "jpg":
        at = content.index(b"\xff\xc0") + 5
        content[at : at + 4] = (60_000).to_bytes(2, "big") * 2
    else:
        with tifffile.TiffFile(io.BytesIO(content)) as file:
            for name in ("ImageWidth", "ImageLength"):
                at = file.pages[0].tags[name].valueoffset
                content[at : at + 2] = (60_000).to_bytes(2, "little")
    (tmp_path / f"x.{kind[:3]}").write_bytes(content)
    assert refuse(tmp_path / f"x.{kind[:3]}") == "the image is 60000 x 60000 px; at most 64 million px are processed"


@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless], ids=lambda syntax: syntax.name
)
def test_a_dicom_header_that_states_a_huge_picture_takes_no_memory(tmp_path, syntax):
    header = dataset(stored(CHEST, 12))
    save(tmp_path / "x.dcm", header, syntax)
    header.Rows = header.Columns = 65535
    dcmwrite(tmp_path / "x.dcm", header)
    assert refuse(tmp_path / "x.dcm") == "the image is 65535 x 65535 px; at most 64 million px are processed"


@pytest.mark.parametrize(
    "syntax", [JPEGBaseline8Bit, JPEGLosslessSV1, JPEG2000Lossless], ids=lambda syntax: syntax.name
)
def test_a_compressed_picture_of_another_size_than_its_header_is_not_decoded(tmp_path, syntax):
    header = dataset(stored(CHEST, 8), 8)
    save(tmp_path / "x.dcm", header, syntax)
    header.Rows = 41
    dcmwrite(tmp_path / "x.dcm", header)
    assert refuse(tmp_path / "x.dcm") == "damaged: the compressed picture has 40 x 36 px, the header says 41 x 36"


@pytest.mark.parametrize("preamble", [True, False])
def test_a_deflated_bomb_is_not_inflated(tmp_path, preamble, monkeypatch):
    monkeypatch.setattr(dicom_in, "MAX_INFLATED", 1 << 22)
    header = dataset(np.zeros((2000, 2000), np.int32), 12)
    path = save(tmp_path / "x.dcm", header, DeflatedExplicitVRLittleEndian)
    assert path.stat().st_size < 30_000
    if not preamble:
        path.write_bytes(path.read_bytes()[132:])
    assert refuse(path) == "it becomes larger than 4 MB when it is inflated"


def test_a_huge_file_is_not_read(tmp_path):
    with (tmp_path / "x.png").open("wb") as file:
        file.write(RASTER["png-8"])
        file.truncate(formats.MAX_FILE_BYTES + (1 << 20))  # a hole: it takes no room on the disk
    assert refuse(tmp_path / "x.png") == "the file has 1025 MB; at most 1024 MB are processed"


def test_the_largest_picture_is_larger_than_any_detector():
    assert radiograph.MAX_PIXELS >= 8000 * 8000
