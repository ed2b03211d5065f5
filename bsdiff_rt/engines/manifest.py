"""An engine on disk: its identity, and whether it may be used here.

An engine is a folder:

    engine.json     `EngineManifest` below, with the SHA-256 of every other file
    denoiser.*, enhancer.*   what the runner's module wrote (runners/aoti.py, runners/tensorrt.py)

Engines are native code, and whoever can write to their folder can run code as whoever uses it. The hashes catch damage,
not an attacker; against those a folder that others own or may write to is refused.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import os
import platform
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bsdiff_rt.bundle import Bundle, typed
from bsdiff_rt.config import EngineOptions, EngineRunnerName, Precision, RunnerName
from bsdiff_rt.engines.parity import Parity
from bsdiff_rt.errors import BundleError, EngineError
from bsdiff_rt.files import file_sha256
from bsdiff_rt.runners.base import Progress, Runner
from bsdiff_rt.runners.registry import unavailable

FORMAT = 2
MANIFEST = "engine.json"


@dataclass(frozen=True)
class Speed:
    """How long a denoiser call took when the engine was built, in turn with what runs without an engine.

    The fastest call of each counts: other work on the machine makes some slower.

    Attributes:
        batch: images in each call, the engine's smallest batch.
        step_ms: the engine's.
        instead: the runner it was timed beside, in fp32.
        instead_ms: that runner's.
        ratio: instead_ms over step_ms; above 1 the engine is the faster one.
    """

    batch: int
    step_ms: float
    instead: RunnerName
    instead_ms: float
    ratio: float

    def __str__(self) -> str:
        ours, theirs = (f"{ms:.3g}" if ms < 1000 else f"{ms:.0f}" for ms in (self.step_ms, self.instead_ms))
        return f"{ours} ms a step, {self.ratio:.2f} times as fast as {self.instead} ({theirs} ms)"


@dataclass(frozen=True)
class EngineManifest:
    """What an engine says of itself. Loading checks every field down to `versions`, and the files.

    Attributes:
        format: version of this layout and of how engines are built.
        bundle: name and sha256 of the bundle it was built from.
        runner: what runs it.
        image_size: side of the square images, in px.
        platform: operating system and architecture.
        device: name of the GPU, or of the processor.
        compute_capability: of the GPU; of a processor its vector instructions and a digest of all its features.
        multiprocessors: of the GPU; 0 for a processor.
        driver: CUDA version of the driver; "none" for a processor.
        versions: of the libraries it is tied to.
        precision: of the denoiser's weights and activations.
        batch_min, batch_max: the batches it takes.
        build_options: what else the runner's module chose.
        build_seconds: of the build, without the gate.
        built: when, UTC, ISO 8601.
        bsdiff_rt: version that built it.
        parity: what the gate found.
        speed: what it gains here; `auto` passes over an engine that gains nothing.
        files: SHA-256 (hex) of every other file.
    """

    format: int
    bundle: dict[str, str]
    runner: EngineRunnerName
    image_size: int
    platform: str
    device: str
    compute_capability: str
    multiprocessors: int
    driver: str
    versions: dict[str, str]
    precision: Precision
    batch_min: int
    batch_max: int
    build_options: dict[str, Any]
    build_seconds: float
    built: str
    bsdiff_rt: str
    parity: Parity
    speed: Speed
    files: dict[str, str]

    def to_json(self) -> str:
        """The text of engine.json."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> EngineManifest:
        """Parse engine.json strictly: every field present, none unknown, every type right.

        Raises:
            EngineError: naming the field.
        """
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise EngineError(f"{MANIFEST} is not JSON: {error}") from error
        if isinstance(content, dict) and content.get("format") != FORMAT:
            raise EngineError(f"{MANIFEST}: format: built as {content.get('format')!r}, this version reads {FORMAT}")
        try:
            return typed(cls, content, MANIFEST)
        except BundleError as error:
            raise EngineError(str(error)) from error


@dataclass(frozen=True)
class Engine:
    """An engine whose identity and files were checked.

    Attributes:
        folder: where it lies.
        manifest: its parsed manifest.
        sha256: hash of the manifest, which covers all files; 64 hex digits.
    """

    folder: Path
    manifest: EngineManifest
    sha256: str

    def load(self, device: torch.device) -> Runner:
        """The runner, loaded.

        Raises:
            EngineError: the back end cannot load it.
        """
        manifest = self.manifest
        return backend(manifest.runner).load(
            self.folder,
            device=device,
            precision=manifest.precision,
            batch_range=(manifest.batch_min, manifest.batch_max),
            image_size=manifest.image_size,
        )


@dataclass(frozen=True)
class Backend:
    """What the module of a runner with engines offers.

    Attributes:
        build: (bundle, options, device, folder, progress) -> build options; writes its files into the folder.
        load: the runner's class.
        versions: of the libraries an engine is tied to.
    """

    build: Callable[[Bundle, EngineOptions, torch.device, Path, Progress], dict[str, Any]]
    load: Callable[..., Runner]
    versions: Callable[[], dict[str, str]]


def backend(name: EngineRunnerName) -> Backend:
    """The module of a runner with engines; only here are they imported.

    Raises:
        EngineError: a library it needs cannot be imported.
    """
    if name == "aoti":
        from bsdiff_rt.runners import aoti

        return Backend(aoti.build, aoti.AotiRunner, aoti.versions)
    from bsdiff_rt.runners import tensorrt

    return Backend(tensorrt.build, tensorrt.TensorRTRunner, tensorrt.versions)


def identify(device: torch.device) -> dict[str, Any]:
    """The machine's part of an engine's identity: field of the manifest to what it is here."""
    fields: dict[str, Any] = {"platform": f"{platform.system()} {platform.machine()}"}
    if device.type == "cpu":
        name, features = _processor()
        capability = f"{torch.backends.cpu.get_cpu_capability()} {features}"
        return fields | {"device": name, "compute_capability": capability, "multiprocessors": 0, "driver": "none"}
    properties = torch.cuda.get_device_properties(device)
    driver = _driver()
    return fields | {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": f"CUDA {driver // 1000}.{driver % 1000 // 10}",
    }


def _driver() -> int:
    """Newest CUDA version the driver serves, 12080 for 12.8, from the driver itself: torch has no public way to ask."""
    version = ctypes.c_int()
    ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def _processor() -> tuple[str, str]:
    """Name, and eight digits for its features: code compiled for this processor may use any of them.

    The name alone is not enough: virtual machines show the same one for different processors.
    """
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        text = ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    features = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    digest = hashlib.sha256(" ".join(sorted(features[1].split())).encode()).hexdigest()[:8] if features else "unknown"
    return (name[1] if name else platform.processor() or platform.machine()), digest


def open_engine(folder: Path, bundle: Bundle, device: torch.device) -> Engine:
    """Check an engine against bundle, machine and its own hashes. Nothing of it is loaded.

    Raises:
        EngineError: no engine, one that others may write to, a damaged one, or one built for something else; names the
            field or file, what the engine was built for and what is here.
    """
    engine = read_engine(folder)
    manifest = engine.manifest
    for field, here in bundle.identity.items():
        if field == "sha256" or manifest.bundle.get("sha256") != bundle.sha256:
            _require(folder, f"bundle {field}", manifest.bundle.get(field), here)
    _require(folder, "image_size", manifest.image_size, bundle.manifest.preprocessing.size)
    check_machine(engine, device)
    check_files(engine)
    return engine


def read_engine(folder: Path) -> Engine:
    """Read an engine's manifest, and check nothing but that it is one and that nobody else may write it.

    Raises:
        EngineError: not an engine, or not safe.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise EngineError(f"{folder}: no {MANIFEST} in it; `bsdiff-rt build-engine` makes an engine")
    for part in (folder, *folder.iterdir()):
        _check_owner(part)
    text = path.read_bytes()
    try:
        manifest = EngineManifest.from_json(text.decode())
    except (EngineError, UnicodeDecodeError) as error:
        raise EngineError(f"{folder}: {error}") from error
    return Engine(folder, manifest, hashlib.sha256(text).hexdigest())


def check_machine(engine: Engine, device: torch.device) -> None:
    """Raises EngineError unless this machine is the one the engine was built for, in every field."""
    manifest = engine.manifest
    for field, here in identify(device).items():
        _require(engine.folder, field, getattr(manifest, field), here)
    if reason := unavailable(manifest.runner, device):
        raise EngineError(f"{engine.folder}: runner {manifest.runner}: {reason}")
    here = backend(manifest.runner).versions()
    for library in sorted(set(here) | set(manifest.versions)):
        _require(engine.folder, f"version of {library}", manifest.versions.get(library), here.get(library))


def check_files(engine: Engine) -> None:
    """Raises EngineError unless every file is there and has the hash it was built with, and there is no other."""
    unlisted = {path.name for path in engine.folder.iterdir()} - {MANIFEST, *engine.manifest.files}
    if unlisted:
        raise EngineError(f"{engine.folder / min(unlisted)}: not in {MANIFEST}; remove it, or build the engine again")
    for file, expected in engine.manifest.files.items():
        path = engine.folder / file
        if Path(file).name != file:
            raise EngineError(f"{engine.folder / MANIFEST}: files names {file!r}, which is not a plain file name")
        if not path.is_file():
            raise EngineError(f"{path}: missing; build the engine again")
        actual = file_sha256(path)
        if actual != expected:
            raise EngineError(
                f"{path}: SHA-256: built as {expected[:16]}…, this is {actual[:16]}…; "
                "the file was altered or damaged, build the engine again"
            )


def _require(folder: Path, field: str, built: object, here: object) -> None:
    if built != here:
        raise EngineError(f"{folder}: {field}: built for {built}, this is {here}; build the engine again here")


def _check_owner(path: Path) -> None:
    if not hasattr(os, "getuid"):  # Windows: its access lists have no such bits
        return
    status = path.stat()
    if status.st_uid not in (os.getuid(), 0):
        raise EngineError(f"{path}: belongs to another user, who could put any code into it; build the engine yourself")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise EngineError(
            f"{path}: others may write to it (mode {stat.S_IMODE(status.st_mode):o}), so it could be any code; if it "
            "is what you built, `chmod -R go-w` its folder"
        )
