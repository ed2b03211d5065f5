"""PNG, JPEG and TIFF: depths, palettes, what is refused and why, truncation at any length, atomic PNG output."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from synthetic import chest

from bsdiff_rt.errors import InputFailed, InputRefused, SettingsError
from bsdiff_rt.formats.radiograph import to_stored
from bsdiff_rt.formats.raster import find_pairs, read_raster, write_png

GREY_8 = np.rint(chest(96, 80) * 255).astype(np.uint8)
GREY_16 = np.rint(chest(96, 80) * 65535).astype(np.uint16)


def encode(suffix, picture, *options):
    return cv2.imencode(suffix, picture, list(options))[1].tobytes()


def put(tmp_path, content, name="a.png"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(png, kind, data):
    """The PNG with a chunk put right behind IHDR."""
    return png[:33] + chunk(kind, data) + png[33:]


def exif(orientation, order="<"):
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "IHHHIHHI", 8, 1, 274, 3, 1, orientation, 0, 0)


def tiff(picture, order="<", **tags):
    """An uncompressed TIFF of one strip; tags by number as t262=..., values that fit their four bytes."""
    rows, columns = picture.shape[:2]
    samples = 1 if picture.ndim == 2 else picture.shape[2]
    data = picture.astype(picture.dtype.newbyteorder(order)).tobytes()
    entries = {256: (4, columns), 257: (4, rows), 258: (3, 8 * picture.itemsize), 259: (3, 1), 262: (3, 1)}
    entries |= {273: (4, 0), 277: (3, samples), 278: (4, rows), 279: (4, len(data)), 339: (3, 1)}
    entries |= {int(tag[1:]): (3, value) for tag, value in tags.items()}
    entries[273] = (4, 8 + 2 + 12 * len(entries) + 4)
    directory = struct.pack(order + "H", len(entries))
    for tag, (kind, value) in sorted(entries.items()):
        packed = struct.pack(order + ("H2x" if kind == 3 else "I"), value)
        directory += struct.pack(order + "HHI", tag, kind, 1) + packed
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "I", 8) + directory + bytes(4) + data


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("bits", [8, 9, 10, 12, 14, 15, 16])
def test_depth_is_the_smallest_that_holds_the_maximum(tmp_path, suffix, bits):
    picture = np.rint(chest(96, 80) * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)
    picture[0, 0] = 2**bits - 1
    radiograph = read_raster(put(tmp_path, encode(suffix, picture), "a" + suffix))
    assert radiograph.bits_stored == bits
    assert radiograph.dataset is None
    assert radiograph.cxr.dtype == np.float32
    np.testing.assert_array_equal(radiograph.cxr, (picture / np.float32(2**bits - 1)).astype(np.float32))


def test_8_bit_values_saved_in_16_bits_are_8_bits(tmp_path):
    """Half as bright otherwise."""
    wide = read_raster(put(tmp_path, encode(".png", GREY_8.astype(np.uint16))))
    assert wide.bits_stored == 8
    np.testing.assert_array_equal(wide.cxr, read_raster(put(tmp_path, encode(".png", GREY_8))).cxr)
    assert read_raster(put(tmp_path, encode(".png", (GREY_8 // 4).astype(np.uint16)))).bits_stored == 8


def test_a_hot_pixel_does_not_make_a_picture_dark(tmp_path):
    picture = np.rint(chest(96, 80) * 4095).astype(np.uint16)
    expected = read_raster(put(tmp_path, encode(".png", picture)))
    picture[5, 7] = 65535
    found = read_raster(put(tmp_path, encode(".png", picture)))
    assert found.bits_stored == 12
    assert found.cxr[5, 7] == 1
    expected.cxr[5, 7] = 1
    np.testing.assert_array_equal(found.cxr, expected.cxr)


def test_a_lead_marker_counts(tmp_path):
    picture = np.rint(chest(96, 80) * 4095).astype(np.uint16)
    picture[2:6, 2:6] = 16000  # 0.2 % of the pixels
    assert read_raster(put(tmp_path, encode(".png", picture))).bits_stored == 14


def test_a_depth_that_is_known(tmp_path):
    picture = np.rint(chest(96, 80) * 1000).astype(np.uint16)
    np.testing.assert_allclose(read_raster(put(tmp_path, encode(".png", picture)), 12).cxr, picture / 4095, atol=1e-6)
    np.testing.assert_array_equal(read_raster(put(tmp_path, encode(".png", GREY_8)), 12).cxr, GREY_8 / np.float32(255))


def test_the_digest_is_of_the_pixels_not_of_the_file(tmp_path):
    digests = {
        read_raster(put(tmp_path, content)).pixel_digest
        for content in (
            encode(".png", GREY_8),
            encode(".png", GREY_8, cv2.IMWRITE_PNG_COMPRESSION, 0),
            tiff(GREY_8),
            encode(".png", cv2.cvtColor(GREY_8, cv2.COLOR_GRAY2BGR)),
        )
    }
    assert len(digests) == 1
    assert read_raster(put(tmp_path, encode(".png", 255 - GREY_8))).pixel_digest not in digests


def test_jpeg_grey_and_as_colour(tmp_path):
    grey = read_raster(put(tmp_path, encode(".jpg", GREY_8, cv2.IMWRITE_JPEG_QUALITY, 95)))
    assert grey.bits_stored == 8
    assert np.abs(grey.cxr - GREY_8 / 255).max() < 0.05
    colour = encode(".jpg", cv2.cvtColor(GREY_8, cv2.COLOR_GRAY2BGR), cv2.IMWRITE_JPEG_QUALITY, 95)
    assert np.abs(read_raster(put(tmp_path, colour)).cxr - grey.cxr).max() < 0.01


@pytest.mark.parametrize("picture", [GREY_8, GREY_16], ids=["8", "16"])
@pytest.mark.parametrize("conversion", [cv2.COLOR_GRAY2BGR, cv2.COLOR_GRAY2BGRA])
def test_grey_saved_as_colour_is_grey(tmp_path, picture, conversion):
    radiograph = read_raster(put(tmp_path, encode(".png", cv2.cvtColor(picture, conversion))))
    np.testing.assert_array_equal(radiograph.cxr, read_raster(put(tmp_path, encode(".png", picture))).cxr)


def test_channels_that_differ_by_a_jpeg_artefact_are_grey(tmp_path):
    colour = cv2.cvtColor(np.clip(GREY_8, 10, 240), cv2.COLOR_GRAY2BGR)
    colour[::3, :, 0] += 7
    assert np.abs(read_raster(put(tmp_path, encode(".png", colour))).cxr * 255 - colour[..., 1]).max() < 2


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_byte_orders(tmp_path, order):
    got = read_raster(put(tmp_path, tiff(GREY_16, order)))
    np.testing.assert_array_equal(np.rint(got.cxr * (2**got.bits_stored - 1)), GREY_16)


def test_upright_exif_is_read(tmp_path):
    for content in (with_chunk(encode(".png", GREY_8), b"eXIf", exif(1)), tiff(GREY_8, t274=1)):
        assert read_raster(put(tmp_path, content)).cxr.shape == GREY_8.shape
    damaged = with_chunk(encode(".png", GREY_8), b"eXIf", b"II*\0\xff\xff")
    assert read_raster(put(tmp_path, damaged)).cxr.shape == GREY_8.shape


JPEG = encode(".jpg", GREY_8)
COLOUR = cv2.cvtColor(GREY_8, cv2.COLOR_GRAY2BGR)
COLOUR[40:60, 40:60, 2] = 255
TRANSPARENT = cv2.cvtColor(GREY_8, cv2.COLOR_GRAY2BGRA)
TRANSPARENT[:9, :, 3] = 0
LEVELS = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
HOT = LEVELS * np.array([1, 0, 0], np.uint8)


def palette_png(indices, colours):
    png = encode(".png", indices)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *indices.shape[::-1], 8, 3, 0, 0, 0))
    return png[:8] + head + chunk(b"PLTE", colours.tobytes()) + png[33:]


def written_by_tifffile(*pages, **options):
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, bigtiff=options.pop("bigtiff", False)) as file:
        for page in pages:
            file.write(page, metadata=None, **options)
    return buffer.getvalue()


def palette_tiff(indices, colours):
    table = colours.T.astype(np.uint16) * 257
    return written_by_tifffile(indices, photometric="palette", colormap=table)


ONE_BIT = encode(".png", GREY_8)
ONE_BIT = ONE_BIT[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 80, 96, 1, 0, 0, 0, 0)) + ONE_BIT[33:]
TURNED = {order: b"Exif\0\0" + exif(6, order) for order in "<>"}


def jpeg_with(marker, data, jpeg=JPEG):
    return jpeg[:2] + bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data + jpeg[2:]


REFUSED = {
    "neither": (b"GIF89a" + b"\0" * 100, "not a PNG, JPEG or TIFF"),
    "text": (b"SECRET^NAME is not an image", "not a PNG, JPEG or TIFF"),
    "colour": (encode(".png", COLOUR), "colour picture"),
    "colour JPEG": (encode(".jpg", COLOUR), "colour picture"),
    "transparent": (encode(".png", TRANSPARENT), "transparent"),
    "palette": (palette_png(GREY_8, HOT), "colour picture"),
    "one bit": (ONE_BIT, "1 bits"),
    "animated": (with_chunk(encode(".png", GREY_8), b"acTL", struct.pack(">II", 2, 0)), "animated"),
    "turned PNG, said behind the pixels": (
        encode(".png", GREY_8)[:-12] + chunk(b"eXIf", exif(6)) + encode(".png", GREY_8)[-12:],
        "turned",
    ),
    "turned PNG": (with_chunk(encode(".png", GREY_8), b"eXIf", exif(3)), "turned"),
    "turned JPEG": (jpeg_with(0xE1, TURNED["<"]), "turned"),
    "turned JPEG, big endian": (jpeg_with(0xE1, TURNED[">"]), "turned"),
    "turned TIFF": (tiff(GREY_8, t274=6), "turned"),
    "12-bit JPEG": (jpeg_with(0xC1, struct.pack(">BHHB3x", 12, 96, 80, 1)), "12 bits"),
    "CMYK JPEG": (jpeg_with(0xC0, struct.pack(">BHHB", 8, 96, 80, 4)), "4 channels"),
    "float TIFF": (tiff(GREY_8.astype(np.float32), t339=3), "floating-point"),
    "signed TIFF": (tiff(GREY_16, t339=2), "signed"),
    "32-bit TIFF": (tiff(GREY_8.astype(np.uint32)), "32 bits"),
    "two pages": (written_by_tifffile(GREY_8, GREY_8), "several pages"),
    "white is zero": (tiff(GREY_16, t262=0), "white-is-zero"),
    "palette TIFF": (palette_tiff(GREY_8, HOT), "colour picture"),
    "mask TIFF": (tiff(GREY_8, t262=4), "neither grey nor RGB"),
    "grey with alpha TIFF": (tiff(np.dstack([GREY_16, GREY_16]), t262=1), "further channels"),
    "planes": (tiff(COLOUR, t262=2, t284=2), "separate planes"),
    "empty picture": (encode(".png", np.full((64, 64), 7, np.uint8)), "same grey"),
    "thumbnail": (encode(".png", GREY_8[:31, :64]), "31 x 64 px"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_reason(tmp_path, case):
    content, reason = REFUSED[case]
    with pytest.raises(InputRefused, match=reason) as refusal:
        read_raster(put(tmp_path, content, "SECRET.png"))
    assert "SECRET" not in str(refusal.value)


WHOLE = {
    "png": encode(".png", GREY_16),
    "jpeg": JPEG,
    "progressive jpeg": encode(".jpg", GREY_8, cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    "jpeg with restarts": encode(".jpg", GREY_8, cv2.IMWRITE_JPEG_RST_INTERVAL, 5),
    "tiff": encode(".tiff", GREY_16),
    "tiff, header first": tiff(GREY_16),
}


@pytest.mark.parametrize("form", WHOLE)
def test_truncated_at_any_length(tmp_path, form):
    content = WHOLE[form]
    assert read_raster(put(tmp_path, content)).cxr.shape == GREY_16.shape
    lengths = {*range(60), *np.linspace(60, len(content) - 1, 60).astype(int), *range(len(content) - 12, len(content))}
    for length in sorted(lengths):
        with pytest.raises(InputFailed):
            read_raster(put(tmp_path, content[:length]))


@pytest.mark.parametrize("form", ["png", "jpeg"])
def test_a_zero_filled_tail_is_damage(tmp_path, form):
    content = WHOLE[form]
    half = len(content) // 2
    with pytest.raises(InputFailed):
        read_raster(put(tmp_path, content[:half] + bytes(len(content) - half)))


def test_damage_inside(tmp_path):
    png = bytearray(WHOLE["png"])
    png[len(png) // 2] ^= 1
    with pytest.raises(InputFailed, match="checksum"):
        read_raster(put(tmp_path, bytes(png)))
    with pytest.raises(InputFailed, match="truncated or damaged"):
        read_raster(put(tmp_path, WHOLE["png"][:33] + chunk(b"IEND", b"")))
    with pytest.raises(InputFailed, match="cannot be decoded"):
        read_raster(put(tmp_path, WHOLE["png"][:33] + chunk(b"IDAT", b"none") + chunk(b"IEND", b"")))
    with pytest.raises(InputFailed, match="where a marker is due"):
        read_raster(put(tmp_path, b"\xff\xd8\xff\xe0\0\4..no"))
    with pytest.raises(InputFailed, match="no picture"):
        read_raster(put(tmp_path, b"\xff\xd8\xff\xfe\0\4..\xff\xd9"))
    with pytest.raises(InputFailed, match="where its pixels are"):
        read_raster(put(tmp_path, tiff(GREY_8).replace(struct.pack("<HHI", 273, 4, 1), struct.pack("<HHI", 9, 4, 1))))


@pytest.mark.parametrize("compression", [8, 32946])
def test_damage_anywhere_in_a_deflate_tiff_is_seen(tmp_path, compression):
    content = encode(".tiff", GREY_16, cv2.IMWRITE_TIFF_COMPRESSION, compression)
    np.testing.assert_array_equal(
        read_raster(put(tmp_path, content)).cxr, read_raster(put(tmp_path, tiff(GREY_16))).cxr
    )
    directory = struct.unpack_from("<I", content, 4)[0]
    for place in np.random.default_rng(0).integers(8, directory, 60):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(InputFailed, match="TIFF file is truncated or damaged"):
            read_raster(put(tmp_path, bytes(damaged)))


def test_a_deflate_strip_that_grows_a_thousandfold_is_read(tmp_path):
    flat = np.zeros((4000, 3000), np.uint16)
    flat[::7, ::5] = 4095
    content = encode(".tiff", flat, cv2.IMWRITE_TIFF_COMPRESSION, 8, cv2.IMWRITE_TIFF_ROWSPERSTRIP, 4000)
    assert read_raster(put(tmp_path, content)).cxr.shape == flat.shape


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_palette_of_greys_is_grey(tmp_path, suffix):
    """Also one in another order than the indices."""
    make = palette_png if suffix == ".png" else palette_tiff
    for indices, colours in ((GREY_8, LEVELS), (255 - GREY_8, LEVELS[::-1])):
        radiograph = read_raster(put(tmp_path, make(indices, np.ascontiguousarray(colours)), f"a{suffix}"))
        np.testing.assert_array_equal(radiograph.cxr, GREY_8 / np.float32(255))
        assert radiograph.warnings == ()


def test_a_palette_that_is_missing(tmp_path, capfd):
    whole = palette_png(GREY_8, LEVELS)
    table = chunk(b"PLTE", LEVELS.tobytes())
    for content in (whole.replace(table, b""), tiff(GREY_8, t262=3)):
        with pytest.raises(InputFailed, match="its palette is missing"):
            read_raster(put(tmp_path, content))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("picture", [GREY_8, GREY_16], ids=["8", "16"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_coloured_dot_is_taken_as_grey_and_said(tmp_path, picture, suffix):
    colour = cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR)
    colour[10:17, 10:17] = (0, 0, np.iinfo(picture.dtype).max)
    radiograph = read_raster(put(tmp_path, encode(suffix, colour)))
    expected = picture.copy()
    expected[10:17, 10:17] = round(0.299 * np.iinfo(picture.dtype).max)
    full = 2**radiograph.bits_stored - 1
    np.testing.assert_allclose(radiograph.cxr * full, expected, atol=1)
    assert radiograph.warnings == ("49 pixels are coloured. They are taken as grey.",)


def test_a_colour_photo_is_refused_whatever_its_colours(tmp_path):
    warm = np.dstack([GREY_8 * 0.8, GREY_8 * 0.9, GREY_8]).astype(np.uint8)  # a film on a light box
    patch = cv2.cvtColor(GREY_8, cv2.COLOR_GRAY2BGR)
    patch[:10, :10, 0] = 255  # 1.3 % of the pixels
    for picture in (warm, patch):
        with pytest.raises(InputRefused, match="colour picture"):
            read_raster(put(tmp_path, encode(".png", picture)))


@pytest.mark.parametrize("picture", [GREY_8, GREY_16], ids=["8", "16"])
def test_a_tiff_without_byte_counts(tmp_path, picture):
    """Uncompressed: the size follows from rows and columns."""
    content = tiff(picture).replace(struct.pack("<HHI", 279, 4, 1), struct.pack("<HHI", 280, 4, 1))
    whole = read_raster(put(tmp_path, tiff(picture)))
    np.testing.assert_array_equal(read_raster(put(tmp_path, content)).cxr, whole.cxr)
    for length in (len(content) - 1, len(content) // 2, 300):
        with pytest.raises(InputFailed):
            read_raster(put(tmp_path, content[:length]))


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "packbits", "zstd"])
@pytest.mark.parametrize("picture", [GREY_8, GREY_16], ids=["8", "16"])
@pytest.mark.parametrize("bigtiff", [False, True])
def test_tiff_compressions_and_bigtiff(tmp_path, compression, picture, bigtiff):
    content = written_by_tifffile(picture, compression=compression, bigtiff=bigtiff, rowsperstrip=7)
    radiograph = read_raster(put(tmp_path, content))
    np.testing.assert_array_equal(np.rint(radiograph.cxr * (2**radiograph.bits_stored - 1)), picture)


def test_a_tiff_whose_strips_are_nowhere(tmp_path):
    for tag in (273, 279):
        content = bytearray(tiff(GREY_8))
        at = content.index(struct.pack("<HHI", tag, 4, 1))
        content[at + 8 : at + 12] = bytes(4)
        with pytest.raises(InputFailed, match="where its pixels are"):
            read_raster(put(tmp_path, bytes(content)))


def test_bytes_behind_the_end_of_a_jpeg(tmp_path):
    expected = read_raster(put(tmp_path, JPEG)).pixel_digest
    for trailer in (b" " * 64, b"\xff\xd9", JPEG):
        assert read_raster(put(tmp_path, JPEG + trailer)).pixel_digest == expected


def test_unreadable(tmp_path):
    with pytest.raises(InputFailed, match="empty"):
        read_raster(put(tmp_path, b""))
    with pytest.raises(InputFailed, match="No such file") as failure:
        read_raster(tmp_path / "SECRET.png")
    assert "SECRET" not in str(failure.value)


@pytest.mark.parametrize("bits", [8, 9, 12, 15, 16])
def test_written_png_has_the_sources_range(tmp_path, bits):
    picture = chest(70, 50)
    write_png(tmp_path / "a.png", picture, bits)
    got = cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_UNCHANGED)
    assert got.dtype == (np.uint8 if bits == 8 else np.uint16)
    np.testing.assert_array_equal(got, np.rint(picture * np.float32(2**bits - 1)))
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_read_and_written_back_is_the_same(tmp_path):
    path = put(tmp_path, encode(".png", GREY_16))
    radiograph = read_raster(path)
    write_png(tmp_path / "b.png", radiograph.cxr, radiograph.bits_stored)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "b.png"), cv2.IMREAD_UNCHANGED), GREY_16)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_file_is_written_of_what_is_not_an_image(tmp_path, bad):
    picture = chest()
    picture[3, 3] = bad
    with pytest.raises(InputFailed, match="not an image"):
        write_png(tmp_path / "a.png", picture, 12)
    assert not list(tmp_path.iterdir())


def test_values_outside_are_clipped():
    np.testing.assert_array_equal(to_stored(np.array([[-0.5, 0.5, 1.5]], np.float32), 12), [[0, 2048, 4095]])


def test_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        write_png(tmp_path / "none" / "a.png", chest(), 8)


def test_pairs_are_found_by_name(tmp_path):
    for name in ("b_cxr.png", "b_soft_tissue.tif", "a [2]_cxr.jpg", "a [2]_soft_tissue.png", "a [2]_cxr.dcm", "c.png"):
        (tmp_path / name).touch()
    assert find_pairs(tmp_path) == [
        ("a [2]", tmp_path / "a [2]_cxr.jpg", tmp_path / "a [2]_soft_tissue.png"),
        ("b", tmp_path / "b_cxr.png", tmp_path / "b_soft_tissue.tif"),
    ]


def test_pairs_missing_or_incomplete_are_said_so(tmp_path):
    with pytest.raises(SettingsError, match="no pairs NAME_cxr"):
        find_pairs(tmp_path)
    cv2.imwrite(str(tmp_path / "a_cxr.png"), np.eye(64, dtype=np.uint8))
    with pytest.raises(SettingsError, match="expected one file a_soft_tissue"):
        find_pairs(tmp_path)


@pytest.mark.parametrize("orientation", [0, 1])
def test_upright_or_not_said(tmp_path, orientation):
    np.testing.assert_array_equal(
        read_raster(put(tmp_path, tiff(GREY_8, t274=orientation))).cxr, GREY_8 / np.float32(255)
    )


def test_opencv_keeps_quiet(tmp_path, capfd):
    lzw = bytearray(encode(".tiff", GREY_16))
    lzw[8:600] = b"\xff" * 592
    with pytest.raises(InputFailed, match="decoded"):
        read_raster(put(tmp_path, bytes(lzw)))
    assert capfd.readouterr() == ("", "")
