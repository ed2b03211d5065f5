"""Compressed pixels are the values that pydicom's decoders give, and several files are decoded at once."""

from __future__ import annotations

import threading
import time

import cv2
import imagecodecs
import numpy as np
import pytest
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
)
from synthetic import jpeg_lossless

from bsdiff_rt.formats.dicom_pixels import decode_stored_values

DTYPES = {(True, False): np.uint8, (True, True): np.int8, (False, False): np.uint16, (False, True): np.int16}


def draw(bits: int, signed: bool, shape: tuple[int, int] = (64, 48)) -> np.ndarray:
    """Smooth values of `bits` bits over their whole range."""
    noise = np.random.default_rng(bits).random(shape, dtype=np.float32)
    smooth = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 2**bits - 1, cv2.NORM_MINMAX)
    return (np.rint(smooth).astype(np.int64) - (2 ** (bits - 1) if signed else 0)).astype(DTYPES[bits <= 8, signed])


def wrap(codestream: bytes, shape: tuple[int, int], syntax: str, bits: int, signed: bool) -> Dataset:
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = syntax
    header.Rows, header.Columns = shape
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit = 8 if bits <= 8 else 16, bits, bits - 1
    header.PixelRepresentation = int(signed)
    header.PixelData = encapsulate([codestream])
    header["PixelData"].is_undefined_length = True
    return header


def decode_with_pydicom(header: Dataset) -> np.ndarray:
    """Decode by libjpeg or OpenJPEG, which pydicom calls through its plugin pylibjpeg."""
    decoder = get_decoder(header.file_meta.TransferSyntaxUID)
    values, _ = decoder.as_array(header, raw=True, decoding_plugin="pylibjpeg", correct_unused_bits=True)
    return values.astype(np.int32)


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize(
    ("syntax", "bits", "stated"),
    [
        *(
            (JPEGLosslessSV1, bits, stated)
            for bits, stated in ((8, 8), (10, 10), (12, 12), (14, 12), (14, 15), (16, 16))
        ),
        *((JPEGLSLossless, bits, bits) for bits in (8, 16)),  # the encoder here knows only these
        (JPEGLSNearLossless, 16, 16),
        (JPEGBaseline8Bit, 8, 8),
    ],
)
def test_jpeg_is_pydicoms(syntax, bits, stated, signed):
    values = draw(bits, signed=False)  # the pattern of bits; the header says whether it has a sign
    if syntax == JPEGLosslessSV1:
        codestream = jpeg_lossless(values, bits)
    elif syntax == JPEGBaseline8Bit:
        values = values // 2  # no value near the turn from positive to negative
        codestream = cv2.imencode(".jpg", values)[1].tobytes()
    else:
        codestream = imagecodecs.jpegls_encode(values, level=2 if syntax == JPEGLSNearLossless else 0)
    header = wrap(codestream, values.shape, syntax, stated, signed)
    ours, _ = decode_stored_values(header)
    # Decoders of lossy JPEG may round differently (ITU-T T.83).
    np.testing.assert_allclose(ours, decode_with_pydicom(header), rtol=0, atol=1 if syntax == JPEGBaseline8Bit else 0)


@pytest.mark.parametrize("lossless", [True, False], ids=["lossless", "lossy"])
@pytest.mark.parametrize("header_signed", [False, True], ids=["header unsigned", "header signed"])
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize(("bits", "stated"), [(8, 8), (10, 12), (12, 12), (14, 12), (15, 16), (16, 16)])
def test_jpeg_2000_is_pydicoms(bits, stated, signed, header_signed, lossless):
    """Also where the header states other bits or another sign than the picture has."""
    values = draw(bits, signed)
    codestream = imagecodecs.jpeg2k_encode(
        values, codecformat="j2k", reversible=lossless, level=0 if lossless else 60, bitspersample=bits
    )
    header = wrap(codestream, values.shape, JPEG2000Lossless if lossless else JPEG2000, stated, header_signed)
    ours, warnings = decode_stored_values(header)
    np.testing.assert_array_equal(ours, decode_with_pydicom(header))
    assert warnings == []
    if lossless and signed == header_signed:
        np.testing.assert_array_equal(ours, values)


@pytest.mark.parametrize("syntax", [HTJ2KLossless, HTJ2K])
def test_high_throughput_jpeg_2000(syntax):
    values = draw(12, signed=False)
    codestream = imagecodecs.htj2k_encode(values)
    ours, _ = decode_stored_values(wrap(codestream, values.shape, syntax, 12, signed=False))
    np.testing.assert_array_equal(ours, values)


def test_other_threads_go_on_while_a_picture_is_decoded():
    """Decoding with Python's lock held one worker to one picture a time, however many cores it had."""
    values = draw(12, signed=False, shape=(1500, 1500))
    header = wrap(
        imagecodecs.jpeg2k_encode(values, codecformat="j2k", bitspersample=12), values.shape, JPEG2000, 12, False
    )
    done, ticks = threading.Event(), 0

    def tick():
        nonlocal ticks
        while not done.is_set():
            time.sleep(0.001)
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    decode_stored_values(header)
    done.set()
    thread.join()
    assert ticks >= 20  # decoding takes about 0.2 s; with the lock held it was 1 to 5
