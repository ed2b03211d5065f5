"""An engine on disk: its identity, and whether it may be used here.

An engine is a folder:

    engine.json              `EngineManifest` below, with the SHA-256 of every other file
    denoiser.*, enhancer.*   written by the runner's builder

Engines are native code: whoever can write to their folder can run code as the user of the engine. The hashes catch
damage, not an attacker. Therefore a folder that others own or may write to is refused.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import os
import platform
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bsdiff_rt.bundle import Bundle, parse_strictly
from bsdiff_rt.config import Precision
from bsdiff_rt.engines.parity import Parity
from bsdiff_rt.errors import BundleError, EngineError
from bsdiff_rt.files import file_sha256, parse_json
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.devices import describe_processor
from bsdiff_rt.runners.registry import RUNNERS, list_engine_runners

FORMAT = 2
MANIFEST = "engine.json"


@dataclass(frozen=True)
class Speed:
    """Duration of a denoiser call when the engine was built, and of the fastest runner without an engine.

    Both were timed in turn. The fastest call of each counts, because other work on the machine slows some calls.

    Attributes:
        batch: images in each call, the engine's smallest batch.
        step_ms: of the engine.
        instead: name of the runner without an engine, in fp32.
        instead_ms: of that runner.
        ratio: instead_ms over step_ms. Above 1 the engine is faster.
    """

    batch: int
    step_ms: float
    instead: str
    instead_ms: float
    ratio: float

    def __str__(self) -> str:
        ours, theirs = (f"{ms:.3g}" if ms < 1000 else f"{ms:.0f}" for ms in (self.step_ms, self.instead_ms))
        return f"{ours} ms a step, {self.ratio:.2f} times as fast as {self.instead} ({theirs} ms)"


@dataclass(frozen=True)
class EngineManifest:
    """The identity of an engine. Loading checks every field down to `versions`, and the files.

    Attributes:
        format: version of this layout and of how engines are built.
        bundle: name and sha256 of the bundle it was built from.
        runner: name of the runner that runs it.
        image_size: side of the square images, in px.
        platform: operating system and architecture.
        device: name of the GPU, or of the processor; "any" if `parity` is None.
        compute_capability: of the GPU; for a processor its vector instructions and a digest of all its features. If
            `parity` is None, those that the engine was built for, such as "8.6, 8.9".
        multiprocessors: of the GPU; 0 for a processor, and if `parity` is None.
        driver: CUDA version of the driver; "none" for a processor, "any" if `parity` is None.
        versions: of the libraries that it is tied to.
        precision: of the denoiser's weights and activations.
        batch_min, batch_max: smallest and largest batch.
        build_options: further options that the builder chose.
        build_seconds: of the build, without the parity check.
        built: time of the build, UTC, ISO 8601.
        bsdiff_rt: version that built it.
        parity: result of the parity check; None if the engine was built elsewhere and has not been compared yet.
        speed: its speed here; None as well. Runner `auto` skips an engine that is slower than a runner without one.
        files: SHA-256 (hex) of every other file.
    """

    format: int
    bundle: dict[str, str]
    runner: str
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
    parity: Parity | None
    speed: Speed | None
    files: dict[str, str]

    def to_json(self) -> str:
        """Return the text of engine.json."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> EngineManifest:
        """Parse engine.json strictly: no field is missing, none is unknown, every type is right.

        Raises:
            EngineError: names the field that is wrong.
        """
        try:
            content = parse_json(text)
        except ValueError as error:
            raise EngineError(f"{MANIFEST} is not JSON: {error}") from error
        if isinstance(content, dict) and content.get("format") != FORMAT:
            raise EngineError(f"{MANIFEST}: format: built as {content.get('format')!r}, this version reads {FORMAT}")
        try:
            manifest = parse_strictly(cls, content, MANIFEST)
        except BundleError as error:
            raise EngineError(str(error)) from error
        if manifest.runner not in list_engine_runners():
            known = ", ".join(list_engine_runners())
            raise EngineError(f"{MANIFEST}: runner should be one of {known}, is {manifest.runner!r}")
        return manifest


@dataclass(frozen=True)
class Engine:
    """An engine whose identity and files were checked.

    Attributes:
        folder: its folder.
        manifest: its parsed manifest.
        sha256: hash of the manifest, which covers all files; 64 hex digits.
    """

    folder: Path
    manifest: EngineManifest
    sha256: str

    def load(self, device: torch.device) -> Runner:
        """Load the engine.

        Raises:
            EngineError: the backend cannot load it.
        """
        manifest = self.manifest
        return RUNNERS[manifest.runner].load_engine(
            self.folder,
            device=device,
            precision=manifest.precision,
            batch_range=(manifest.batch_min, manifest.batch_max),
            image_size=manifest.image_size,
        )


def identify(device: torch.device) -> dict[str, Any]:
    """Return the machine's part of an engine's identity: the value here of each field of the manifest."""
    fields: dict[str, Any] = {"platform": f"{platform.system()} {platform.machine()}"}
    if device.type == "cpu":
        name, features = describe_processor()
        capability = f"{torch.backends.cpu.get_cpu_capability()} {features}"
        return fields | {"device": name, "compute_capability": capability, "multiprocessors": 0, "driver": "none"}
    properties = torch.cuda.get_device_properties(device)
    driver = _find_driver()
    return fields | {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": f"CUDA {driver // 1000}.{driver % 1000 // 10}",
    }


def _find_driver() -> int:
    """Return the newest CUDA version of the driver, such as 12080 for 12.8. torch has no public way to ask for it."""
    version = ctypes.c_int()
    ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def open_engine(folder: Path, bundle: Bundle, device: torch.device) -> Engine:
    """Check an engine against bundle, machine and its own hashes. Nothing of it is loaded.

    Raises:
        EngineError: the folder is not an engine, others may write to it, a file is damaged, or it was built for
            something else. The message names the file, or the field with its value in the engine and here.
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
    """Read an engine's manifest. Only its format is checked, and that nobody else may write to the engine.

    Raises:
        EngineError: the folder is not an engine, cannot be read, or others may write to it.
    """
    with _naming_what_cannot_be_read(folder):
        path = folder / MANIFEST
        if not path.is_file():
            raise EngineError(f"{folder}: not an engine (no {MANIFEST} in it). Build one with bsdiff-rt build-engine.")
        for part in (folder, *folder.iterdir()):
            _check_owner(part)
        text = path.read_bytes()
    try:
        manifest = EngineManifest.from_json(text.decode())
    except (EngineError, UnicodeDecodeError) as error:
        raise EngineError(f"{folder}: {error}") from error
    return Engine(folder, manifest, hashlib.sha256(text).hexdigest())


def check_machine(engine: Engine, device: torch.device) -> None:
    """Raise EngineError unless this machine equals the one that the engine was built for, in every field.

    An engine that was built elsewhere for a kind of GPU, and has not been compared yet, only needs that kind.
    """
    manifest = engine.manifest
    if manifest.parity is None:
        _check_kind(engine, device)
        return
    for field, here in identify(device).items():
        _require(engine.folder, field, getattr(manifest, field), here)
    entry = RUNNERS[manifest.runner]
    if problem := entry.find_problem(device):
        raise EngineError(f"{engine.folder}: runner {manifest.runner}: {problem}")
    here = entry.list_versions()
    for library in sorted(set(here) | set(manifest.versions)):
        _require(engine.folder, f"version of {library}", manifest.versions.get(library), here.get(library))


def _check_kind(engine: Engine, device: torch.device) -> None:
    """Raise EngineError unless this is a GPU of the kind that an engine was built for elsewhere."""
    manifest = engine.manifest
    entry = RUNNERS[manifest.runner]
    if problem := entry.find_problem(device):
        raise EngineError(f"{engine.folder}: runner {manifest.runner}: {problem}")
    here = identify(device)
    _require(engine.folder, "platform", manifest.platform, here["platform"])
    if here["compute_capability"] not in manifest.compute_capability.split(", "):
        _require(engine.folder, "compute_capability", manifest.compute_capability, here["compute_capability"])
    library = manifest.runner
    found = entry.list_versions().get(library)
    _require(engine.folder, f"version of {library}", manifest.versions.get(library), found)


def check_files(engine: Engine) -> None:
    """Raise EngineError unless the folder holds exactly the files of the manifest, each with its hash."""
    unlisted = {path.name for path in engine.folder.iterdir()} - {MANIFEST, *engine.manifest.files}
    if unlisted:
        raise EngineError(f"{engine.folder / min(unlisted)}: not in {MANIFEST}. Remove it, or build the engine again.")
    for file, expected in engine.manifest.files.items():
        path = engine.folder / file
        if Path(file).name != file:
            raise EngineError(f"{engine.folder / MANIFEST}: files names {file!r}, which is not a plain file name")
        if not path.is_file():
            raise EngineError(f"{path}: missing. Build the engine again.")
        with _naming_what_cannot_be_read(path):
            actual = file_sha256(path)
        if actual != expected:
            raise EngineError(
                f"{path}: SHA-256: built as {expected[:16]}…, this is {actual[:16]}…. "
                "The file was altered or damaged. Build the engine again."
            )


@contextmanager
def _naming_what_cannot_be_read(path: Path) -> Iterator[None]:
    """Raise EngineError for a file or folder that this user may not read, or that the disk does not give."""
    try:
        yield
    except OSError as error:
        raise EngineError(f"{error.filename or path}: cannot be read ({error.strerror})") from error


def _require(folder: Path, field: str, built: object, here: object) -> None:
    if built != here:
        raise EngineError(f"{folder}: {field}: built for {built}, this is {here}. Build the engine again here.")


def _check_owner(path: Path) -> None:
    if not hasattr(os, "getuid"):  # Windows: its access lists have no such bits
        return
    status = path.stat()
    if status.st_uid not in (os.getuid(), 0):
        raise EngineError(f"{path}: belongs to another user, who could put any code into it. Build it yourself.")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise EngineError(
            f"{path}: others may write to it (mode {stat.S_IMODE(status.st_mode):o}), so it could be any code. "
            "If you built it, run `chmod -R go-w` on its folder."
        )
