"""A model bundle on disk: manifest, weights and graphs. It is opened only if every file has the hash of the manifest.

A bundle is a folder:

    manifest.json           `Manifest` below, with the SHA-256 of every other file and of itself
    denoiser.safetensors    weights of stage 1
    denoiser.onnx           graph of stage 1; its initialisers are external data in the safetensors file
    enhancer.safetensors    weights of stage 2
    enhancer.onnx           graph of stage 2, in the same way

A bundle is identified by the SHA-256 of manifest.json, which covers every file through their hashes. Torch-free.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bsdiff_rt.config import (
    DenoiserConfig,
    EnhancerConfig,
    Preprocessing,
    SamplerSettings,
    Schedule,
)
from bsdiff_rt.errors import BundleError
from bsdiff_rt.files import file_sha256, parse_json

if TYPE_CHECKING:
    from pydantic import TypeAdapter

FORMAT = 2
MANIFEST = "manifest.json"
DIGEST = "sha256"  # of the manifest itself
FILES = ("denoiser.safetensors", "denoiser.onnx", "enhancer.safetensors", "enhancer.onnx")
NOTICE = "Not for diagnostic use."
BUNDLES = Path(__file__).parent / "bundles"

T = TypeVar("T")


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        format: version of this layout.
        name: name of the model, for reports.
        preset: the network preset that was trained, or "" for another shape. Stage 2 may be `NO_ENHANCER` all the same.
        denoiser, enhancer: network shapes.
        schedule: the diffusion that the denoiser was trained for, and what it predicts.
        sampler: default sampler and number of steps. Its seed is 0; users choose their own.
        preprocessing: from an X-ray to the model's input.
        enhance: whether stage 2 runs by default.
        mirror: whether the result is averaged with that of the mirrored X-ray by default.
        training: provenance in free form: data, steps, seeds, dates, figures.
        agreement: largest difference between eager and ONNX Runtime at export for each graph, and the tolerance.
        licence: of the weights; "unstated" if none was given.
        notice: what the model must not be used for.
        files: SHA-256 (hex) of every other file of the bundle.
    """

    format: int
    name: str
    preset: str
    denoiser: DenoiserConfig
    enhancer: EnhancerConfig
    schedule: Schedule
    sampler: SamplerSettings
    preprocessing: Preprocessing
    enhance: bool
    mirror: bool
    training: dict[str, Any]
    agreement: dict[str, float]
    licence: str
    notice: str
    files: dict[str, str]

    def to_json(self) -> str:
        """Return the text of manifest.json."""
        return to_signed_json(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse manifest.json strictly: no field missing or unknown, every type right, no byte changed.

        Raises:
            BundleError: names the field that is wrong.
        """
        try:
            content = parse_json(text)
        except ValueError as error:
            raise BundleError(f"{MANIFEST} is not JSON: {error}") from error
        if isinstance(content, dict) and content.get("format") != FORMAT:
            raise BundleError(
                f"{MANIFEST}: format is {content.get('format')!r}; this version reads format {FORMAT}. Export again."
            )
        rest = {key: value for key, value in content.items() if key != DIGEST} if isinstance(content, dict) else content
        manifest = parse_strictly(cls, rest, MANIFEST)
        if to_signed_json(rest) != text:
            raise BundleError(
                f"{MANIFEST} was changed: its {DIGEST} does not fit. Copy the bundle again, or export it again."
            )
        return manifest


@dataclass(frozen=True)
class Bundle:
    """An opened bundle whose files were verified.

    Attributes:
        folder: its folder.
        manifest: its parsed manifest.
        sha256: hash of the manifest, which covers all files; 64 hex digits.
    """

    folder: Path
    manifest: Manifest
    sha256: str

    @cached_property
    def identity(self) -> dict[str, str]:
        """Name and hash, for reports."""
        return {"name": self.manifest.name, "sha256": self.sha256}

    def file(self, name: str) -> Path:
        """Return the path of one of the bundle's files."""
        return self.folder / name


def open_bundle(name_or_folder: str | Path) -> Bundle:
    """Open a bundle and check every file against its hash.

    Args:
        name_or_folder: name of a bundle of the package, or a folder. A folder with the name of a bundle of the package
            is written with its path, such as `./demo`.

    Raises:
        BundleError: there is no such bundle, or it is incomplete, altered or not readable. Names the file or field.
    """
    folder, shipped = Path(name_or_folder), list_bundles()
    if str(name_or_folder) in shipped:  # before folders: what lies where a command is started must not change the model
        folder = BUNDLES / name_or_folder
    elif not folder.is_dir():
        known = ", ".join(shipped) or "none"
        raise BundleError(
            f"no bundle {str(name_or_folder)!r}: neither a folder nor a bundle of the package ({known}). "
            "`python -m export` makes one."
        )
    try:
        return _read_bundle(folder)
    except OSError as error:
        raise BundleError(f"{error.filename or folder}: cannot be read ({error.strerror})") from error


def _read_bundle(folder: Path) -> Bundle:
    """Read the manifest of a folder, and check the files that it names."""
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(f"{folder}: not a bundle (no {MANIFEST} in it). `python -m export` makes one.")
    text = path.read_bytes()
    try:
        manifest = Manifest.from_json(text.decode())
    except (BundleError, UnicodeDecodeError) as error:
        raise BundleError(f"{folder}: {error}") from error
    if missing := set(FILES) - set(manifest.files):
        raise BundleError(f"{path}: files lists no {', '.join(sorted(missing))}")
    for file, expected in manifest.files.items():
        if Path(file).name != file:
            raise BundleError(f"{path}: files names {file!r}, which is not a plain file name")
        if not (folder / file).is_file():
            raise BundleError(f"{folder / file}: missing. The bundle is incomplete; copy it again.")
        actual = file_sha256(folder / file)
        if actual != expected:
            raise BundleError(
                f"{folder / file}: SHA-256 is {actual[:16]}…, but {expected[:16]}… in the manifest. "
                "The file was altered or damaged. Copy the bundle again."
            )
    return Bundle(folder, manifest, hashlib.sha256(text).hexdigest())


def list_bundles() -> list[str]:
    """Return the names of the bundles in the package."""
    return sorted(path.parent.name for path in BUNDLES.glob(f"*/{MANIFEST}"))


def to_signed_json(content: Mapping[str, Any]) -> str:
    """Return the text of a manifest, with the SHA-256 of the same text without that field.

    The hash detects damage and changes by hand. An attacker could write a new one.
    """

    def text(mapping: Mapping[str, Any]) -> str:
        return json.dumps(mapping, indent=2, sort_keys=True) + "\n"

    plain = {key: value for key, value in content.items() if key != DIGEST}
    return text(plain | {DIGEST: hashlib.sha256(text(plain).encode()).hexdigest()})


def parse_strictly(kind: type[T], content: Any, where: str) -> T:
    """Return a JSON document as a dataclass. No field may be missing, unknown or of another type.

    Args:
        kind: the dataclass. Defaults of its fields are not used.
        content: what `json.loads` returned.
        where: name of the document, for messages.

    Raises:
        BundleError: names the field that is wrong.
    """
    import pydantic  # here: its import is slow, and --help must be fast

    adapter = _make_adapter(kind)
    try:
        parsed = adapter.validate_json(json.dumps(content), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        *place, field = (where, *first["loc"])
        if first["type"] == "missing":
            raise BundleError(f"{_join(place)}: field {field!r} is missing") from error
        words = first["msg"].removeprefix("Input ")
        raise BundleError(f"{_join((*place, field))} {words}, is {first['input']!r:.80}") from error
    _check_keys(content, adapter.dump_python(parsed), where)
    return parsed


def _make_adapter(kind: type[T]) -> TypeAdapter[T]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _join(place: Iterable[object]) -> str:
    return ": ".join(map(str, place))


def _check_keys(content: Any, parsed: Any, where: str) -> None:
    """Raise BundleError if a JSON object has other keys than what was parsed from it, at any depth."""
    if not isinstance(content, dict):
        return
    if unknown := set(content) - set(parsed):
        raise BundleError(f"{where}: unknown field {min(unknown)!r}")
    if missing := set(parsed) - set(content):
        raise BundleError(f"{where}: field {min(missing)!r} is missing")
    for key, value in content.items():
        _check_keys(value, parsed[key], f"{where}: {key}")


def manifest_schema() -> dict[str, Any]:
    """Return the JSON schema of manifest.json."""
    schema = _make_adapter(Manifest).json_schema(mode="validation")
    schema["properties"][DIGEST] = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
    for part in (schema, *schema.get("$defs", {}).values()):
        part["required"] = list(part["properties"])  # also those with a default
        part["additionalProperties"] = False
    return schema
