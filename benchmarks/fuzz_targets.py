"""What `benchmarks.fuzz` gives its inputs to: the readers of pictures, of models and of reports, and a node."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import random
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)
from safetensors.torch import save_file

from benchmarks.fuzz import change_json, mutate
from bsdiff_rt import bundle as bundles
from bsdiff_rt import formats
from bsdiff_rt.bench.networks import fill_randomly
from bsdiff_rt.config import PRESETS
from bsdiff_rt.errors import BsdiffError, BundleError, InputFailed, InputRefused, SettingsError
from bsdiff_rt.files import file_sha256
from bsdiff_rt.folder import report
from bsdiff_rt.folder.ledger import Ledger
from bsdiff_rt.folder.report import FileEntry, Report
from bsdiff_rt.folder.tasks import find_tasks

EXAMPLE = Path(__file__).parents[1] / "examples" / "phantom10000003_cxr.dcm"
SHAPE = (40, 36)
HOST = "127.0.0.1"
_DATA, _RELEASED = 0x04, bytes.fromhex("06000000000400000000")  # P-DATA-TF and A-RELEASE-RP (PS3.8 9.3)

Draw = Callable[..., bytes]
Use = Callable[[bytes], bool]


@contextmanager
def open_target(kind: str, folder: Path) -> Iterator[tuple[Draw, Use]]:
    """Yield what draws inputs of a kind from a random generator, and what uses one.

    The first is called with `whole=True` for an input without damage. The second returns whether the input was taken,
    False if it was refused, and raises anything else.

    Args:
        kind: one of `fuzz.KINDS`.
        folder: empty, to work in.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        if kind in ("png", "jpg", "tif", "dicom"):
            yield make_picture_target(kind, folder)
        elif kind in ("safetensors", "manifest"):
            yield make_bundle_target(kind, folder)
        elif kind == "report":
            yield make_report_target(folder)
        else:
            with open_node_target(folder) as target:
                yield target
    finally:
        logging.disable(disabled)


def make_picture_target(kind: str, folder: Path) -> tuple[Draw, Use]:
    """Return the target of the readers of pictures."""
    seeds = make_dicom_files(folder) if kind == "dicom" else make_raster_files(kind)
    path = folder / f"x.{'dcm' if kind == 'dicom' else kind}"

    def draw(chance: random.Random, *, whole: bool = False) -> bytes:
        content = chance.choice(seeds)
        if whole:
            return content
        if kind == "png" and chance.random() < 0.4:
            return mutate_png_rows(content, chance)
        changed = mutate(content, chance)
        return mend_png(changed) if kind == "png" and chance.random() < 0.5 else changed

    def use(content: bytes) -> bool:
        path.write_bytes(content)
        try:
            found = formats.read(path)
        except (InputRefused, InputFailed):
            return False
        assert found.cxr.dtype == np.float32
        assert found.cxr.ndim == 2
        assert np.isfinite(found.cxr).all()
        assert 0 <= found.cxr.min() < found.cxr.max() <= 1
        assert 8 <= found.bits_stored <= 16
        return True

    return draw, use


def draw_chest() -> NDArray[np.float32]:
    """Return a small picture with two dark lungs, [H, W], in [0, 1]."""
    y, x = np.mgrid[0 : SHAPE[0], 0 : SHAPE[1]] / np.array(SHAPE)[:, None, None]
    lungs = sum(np.exp(-(((x - middle) / 0.15) ** 2) - ((y - 0.45) / 0.3) ** 2) for middle in (0.3, 0.7))
    return np.asarray(0.9 - 0.6 * lungs, dtype=np.float32)


def make_raster_files(kind: str) -> list[bytes]:
    """Return whole files of a format."""
    chest = draw_chest()
    grey_8, grey_16 = np.rint(chest * 255).astype(np.uint8), np.rint(chest * 65535).astype(np.uint16)
    if kind == "tif":
        files = []
        for options in ({}, {"compression": "zlib"}, {"tile": (16, 16), "bigtiff": True}, {"compression": "lzw"}):
            file = io.BytesIO()
            tifffile.imwrite(file, grey_16, **options)
            files.append(file.getvalue())
        return files
    pictures = (grey_8,) if kind == "jpg" else (grey_8, grey_16, cv2.cvtColor(grey_8, cv2.COLOR_GRAY2BGR))
    return [cv2.imencode(f".{kind}", picture)[1].tobytes() for picture in pictures]


def mend_png(content: bytes) -> bytes:
    """Return a PNG file with its checksums corrected. What follows the last complete chunk stays as it is."""
    mended, place = bytearray(content), 8
    while place + 12 <= len(mended):
        (size,) = struct.unpack(">I", mended[place : place + 4])
        if place + 12 + size > len(mended):
            break
        mended[place + 8 + size : place + 12 + size] = zlib.crc32(mended[place + 4 : place + 8 + size]).to_bytes(
            4, "big"
        )
        place += 12 + size
    return bytes(mended)


def mutate_png_rows(content: bytes, chance: random.Random) -> bytes:
    """Return a PNG file with changes in its header and in its rows before they are compressed; checksums are right."""
    first = content.index(b"IDAT") - 4
    (size,) = struct.unpack(">I", content[first : first + 4])
    rows = zlib.compress(mutate(zlib.decompress(content[first + 8 : first + 8 + size]), chance))
    head = bytearray(content[:first])
    if chance.random() < 0.5:  # width, height, depth, colour, compression, filter, interlace
        head[chance.randrange(16, 29)] = chance.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
    end = content[first + 12 + size :]
    return mend_png(bytes(head) + struct.pack(">I", len(rows)) + b"IDAT" + rows + bytes(4) + end)


def make_dicom_files(folder: Path) -> list[bytes]:
    """Return whole DICOM files in several transfer syntaxes."""
    files = []
    for syntax in (
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        DeflatedExplicitVRLittleEndian,
        RLELossless,
        JPEG2000Lossless,
        JPEGBaseline8Bit,
    ):
        path = folder / "whole.dcm"
        write_dicom(path, syntax)
        files.append(path.read_bytes())
    return files


def write_dicom(path: Path, syntax: UID) -> None:
    """Write a small X-ray with the header of the example."""
    header: Dataset = dcmread(EXAMPLE)
    bits = 8 if syntax == JPEGBaseline8Bit else 12
    values = np.rint(draw_chest() * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)
    header.Rows, header.Columns = SHAPE
    header.BitsAllocated, header.BitsStored, header.HighBit = (8 if bits == 8 else 16), bits, bits - 1
    header.PixelRepresentation = 0
    for keyword in ("WindowCenter", "WindowWidth", "SmallestImagePixelValue", "LargestImagePixelValue"):
        if keyword in header:
            del header[keyword]
    header.PixelData = values.tobytes()
    header["PixelData"].VR = "OB" if bits == 8 else "OW"
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    if syntax in (RLELossless, JPEG2000Lossless):
        plugin = "pydicom" if syntax == RLELossless else "pylibjpeg"
        header.compress(syntax, encoding_plugin=plugin, generate_instance_uid=False)
    elif syntax == JPEGBaseline8Bit:
        header.PixelData = encapsulate([cv2.imencode(".jpg", values)[1].tobytes()])
        header["PixelData"].is_undefined_length = True
    header.file_meta.TransferSyntaxUID = syntax
    implicit = syntax == ImplicitVRLittleEndian
    dcmwrite(path, header, implicit_vr=implicit, little_endian=True, enforce_file_format=True)


def make_bundle_target(kind: str, folder: Path) -> tuple[Draw, Use]:
    """Return the target that opens a bundle, or loads its weights as if the hashes were right."""
    import torch

    from bsdiff_rt.networks.autoencoder import Enhancer
    from bsdiff_rt.networks.unet import Denoiser
    from bsdiff_rt.runners.eager import load_networks

    preset, model = PRESETS["tiny"], folder / "model"
    model.mkdir()
    for name, network in (("denoiser", Denoiser(preset.denoiser)), ("enhancer", Enhancer(preset.enhancer))):
        fill_randomly(network, torch.Generator().manual_seed(1))
        save_file(network.state_dict(), model / f"{name}.safetensors")
        (model / f"{name}.onnx").write_bytes(b"")
    hashes = {name: file_sha256(model / name) for name in bundles.FILES}
    manifest = dataclasses.replace(
        bundles.open_bundle("demo").manifest, denoiser=preset.denoiser, enhancer=preset.enhancer, files=hashes
    )
    (model / bundles.MANIFEST).write_text(manifest.to_json())
    opened = bundles.open_bundle(model)
    changed = model / (bundles.MANIFEST if kind == "manifest" else "denoiser.safetensors")
    content = changed.read_bytes()

    def draw(chance: random.Random, *, whole: bool = False) -> bytes:
        if whole:
            return content
        if kind == "manifest" and chance.random() < 0.7:
            odd = change_json(content.decode(), chance)
            odd.pop(bundles.DIGEST, None)
            return bundles.to_signed_json(odd).encode(errors="surrogatepass")
        return mutate(content, chance)

    def use(given: bytes) -> bool:
        changed.write_bytes(given)
        try:
            if kind == "manifest":
                bundles.open_bundle(model)
            else:
                load_networks(opened)
        except BundleError:
            return False
        return True

    return draw, use


def make_report_target(folder: Path) -> tuple[Draw, Use]:
    """Return the target that does with a report.json what a run does. Nothing outside its folder may change."""
    source, output, outside = folder / "in", folder / "out", folder / "outside"
    source.mkdir()
    output.mkdir()
    outside.write_bytes(b"mine")
    (source / "a.png").write_bytes(make_raster_files("png")[0])
    fresh = Report({"name": "tiny", "sha256": "0" * 64, "licence": "MIT"}, {"seed": 0, "steps": 3}, {"device": "cpu"})
    entry = FileEntry("in/a.png", "a.png", "ok", None, 0.5, "1" * 64, "2" * 64, "3" * 64, {"uncertainty": "4" * 64})
    content = dataclasses.replace(fresh, files=[entry], earlier=[entry], planned=["b.png"]).to_json()

    def draw(chance: random.Random, *, whole: bool = False) -> bytes:
        if whole:
            return content.encode()
        if chance.random() < 0.7:
            return json.dumps(change_json(content, chance)).encode()
        return mutate(content.encode(), chance)

    def use(given: bytes) -> bool:
        (output / "report.json").write_bytes(given)
        (output / "a.png").write_bytes(b"result")
        try:
            for read in (report.read_results, report.read_planned, report.read_named, report.read_rates):
                read(output)
            report.read_name(output, "preview")
            report.read_finished(output, fresh)
            tasks = find_tasks([source], output, "auto", {"uncertainty"})
        except SettingsError:
            return False
        assert all(task.output is None or ".." not in task.output.parts for task in tasks)
        ledger = Ledger(fresh, output, {str(task.input): task.output for task in tasks}, {}, lambda _: None)
        for task in tasks:
            ledger.add(FileEntry(str(task.input), None, "failed", "damaged", input_sha256="9" * 64))
        assert outside.read_bytes() == b"mine"
        assert {path.name for path in folder.iterdir()} == {"in", "out", "outside"}
        return True

    return draw, use


@contextmanager
def open_node_target(folder: Path) -> Iterator[tuple[Draw, Use]]:
    """Yield the target that speaks to a receiver on loopback. After every damaged session a whole one must pass."""
    from bsdiff_rt.node import receiving
    from bsdiff_rt.node.journal import Journal
    from bsdiff_rt.node.settings import Destination, NodeSettings

    usual = receiving.REQUEST_TIMEOUT_S, threading.excepthook
    receiving.REQUEST_TIMEOUT_S = 1.0
    threading.excepthook = lambda _: None  # threads of pynetdicom end with an error when a PDU makes no sense
    settings = NodeSettings(folder=folder, destinations=(Destination("PACS", HOST, 1),), port=0, associations=50)
    settings.received.mkdir()
    journal = Journal(folder / "journal.sqlite")
    receiver = receiving.Receiver(settings, journal, RLock(), lambda _: 0, lambda: None, lambda _: None)
    write_dicom(folder / "whole.dcm", ExplicitVRLittleEndian)
    session, echo = (record_session(receiver.port, path) for path in (folder / "whole.dcm", None))
    try:

        def draw(chance: random.Random, *, whole: bool = False) -> bytes:
            if whole:
                return session
            return mutate(session, chance) if chance.random() < 0.9 else chance.randbytes(chance.randint(1, 2000))

        def use(given: bytes) -> bool:
            before = sum(receiver.counts.values())
            speak(receiver.port, given, 0.05)
            assert speak(receiver.port, echo, 3.0), "the node does not answer C-ECHO any more"
            known = {"journal.sqlite", "journal.sqlite-wal", "journal.sqlite-shm", "received", "whole.dcm"}
            assert {path.name for path in folder.iterdir()} <= known
            return sum(receiver.counts.values()) > before

        yield draw, use
    finally:
        receiver.close()
        journal.close()
        receiving.REQUEST_TIMEOUT_S, threading.excepthook = usual


def record_session(port: int, path: Path | None) -> bytes:
    """Return the bytes that a sender sends: one X-ray, or C-ECHO for None."""
    from pynetdicom import AE, evt
    from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]  # made when pynetdicom is imported

    sent, ae = bytearray(), AE(ae_title="FUZZ")
    header = None if path is None else dcmread(path)
    if header is None:
        ae.add_requested_context(Verification)
    else:
        ae.add_requested_context(header.SOPClassUID, header.file_meta.TransferSyntaxUID)
    handlers: list[Any] = [(evt.EVT_DATA_SENT, lambda event: sent.extend(event.data))]
    association = ae.associate(HOST, port, evt_handlers=handlers)
    if not association.is_established:
        raise BsdiffError("the receiver takes no association.")
    if header is None:
        association.send_c_echo()
    else:
        association.send_c_store(header)
    association.release()
    return bytes(sent)


def speak(port: int, content: bytes, seconds: float) -> bool:
    """Send PDUs one by one, as a sender does, and hear the answers. Return whether the other side released.

    Args:
        port: of the receiver.
        content: PDUs, each with its length (PS3.8 9.3). What is none is sent as it is.
        seconds: how long to wait for each answer.
    """
    heard = bytearray()
    with socket.create_connection((HOST, port), timeout=seconds) as connection:
        try:
            while content:
                size = 6 + int.from_bytes(content[2:6], "big")
                kind, pdu, content = content[0], content[:size], content[size:]
                connection.sendall(pdu)
                if kind != _DATA or not content or content[0] != _DATA:  # data follow each other without an answer
                    heard.extend(connection.recv(1 << 16))
            return heard[-10:] == _RELEASED
        except OSError:  # it hung up, or waits for more
            return False
