"""A model bundle on disk: manifest, weights, graphs; opened only when every byte is what the manifest says.

A bundle is a folder:

    manifest.json           `Manifest` below, with the SHA-256 of every other file, and of itself without it
    denoiser.safetensors    weights of stage 1       denoiser.onnx    its graph; the initialisers are external data
    enhancer.safetensors    weights of stage 2       enhancer.onnx    that point into the safetensors file

A bundle is known by its hash: the SHA-256 of manifest.json, which covers every file through their hashes. Torch-free.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from bsdiff_rt.config import (
    DenoiserConfig,
    EnhancerConfig,
    Preprocessing,
    SamplerSettings,
    Schedule,
)
from bsdiff_rt.errors import BundleError
from bsdiff_rt.files import file_sha256

FORMAT = 2
MANIFEST = "manifest.json"
DIGEST = "sha256"  # the manifest's own
FILES = ("denoiser.safetensors", "denoiser.onnx", "enhancer.safetensors", "enhancer.onnx")
NOTICE = "Not for diagnostic use."
BUNDLES = Path(__file__).parent / "bundles"

T = TypeVar("T")


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself.

    Attributes:
        format: version of this layout.
        name: of the model, for reports.
        preset: the network preset it was trained as, or "" for another shape.
        denoiser, enhancer: network shapes.
        schedule: the diffusion the denoiser was trained for, with what it predicts.
        sampler: default sampler and number of steps; its seed is the user's business and stays 0.
        preprocessing: from a radiograph to the networks' input.
        enhance: default of `infer --enhance`.
        mirror: default of `infer --mirror`.
        training: provenance, free-form: data, steps, seeds, dates, figures.
        agreement: largest difference between eager and ONNX Runtime at export, per graph, and the tolerance.
        licence: of the weights.
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
        """The text of manifest.json."""
        return signed(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse manifest.json strictly: every field present, none unknown, every type right, no byte changed.

        The one exception is `least_span`, which bundles exported before 2026-11-26 have not.

        Raises:
            BundleError: naming the field.
        """
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise BundleError(f"{MANIFEST} is not JSON: {error}") from error
        if isinstance(content, dict) and content.get("format") != FORMAT:
            raise BundleError(f"{MANIFEST}: format is {content.get('format')!r}; this version reads format {FORMAT}")
        rest = {key: value for key, value in content.items() if key != DIGEST} if isinstance(content, dict) else content
        manifest = typed(cls, _completed(rest), MANIFEST)
        if signed(rest) != text:
            raise BundleError(
                f"{MANIFEST} is not as it was written (its {DIGEST} says so); copy the bundle again, or export it anew"
            )
        return manifest


@dataclass(frozen=True)
class Bundle:
    """An opened bundle whose files were verified.

    Attributes:
        folder: where it lies.
        manifest: its parsed manifest.
        sha256: hash of the manifest, which covers all files; 64 hex digits.
    """

    folder: Path
    manifest: Manifest
    sha256: str

    @cached_property
    def identity(self) -> dict[str, str]:
        """Name and hash, as reports carry them."""
        return {"name": self.manifest.name, "sha256": self.sha256}

    def file(self, name: str) -> Path:
        """Path of one of the bundle's files."""
        return self.folder / name


def open_bundle(name_or_folder: str | Path) -> Bundle:
    """Open a bundle that comes with the package (by name) or a folder, and check every file against its hash.

    A folder that has the name of a bundle of the package is given with its path (`./demo`).

    Raises:
        BundleError: no such bundle, an incomplete or altered one; names the file or field.
    """
    folder, shipped = Path(name_or_folder), shipped_bundles()
    if str(name_or_folder) in shipped:  # before folders: what lies where a command is started must not change the model
        folder = BUNDLES / name_or_folder
    elif not folder.is_dir():
        known = ", ".join(shipped) or "none"
        raise BundleError(f"no bundle {str(name_or_folder)!r}: neither a folder nor one of those shipped ({known})")
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(f"{folder}: no {MANIFEST} in it; `python -m export` makes a bundle")
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
            raise BundleError(f"{folder / file}: missing; the bundle is incomplete, copy it again")
        actual = file_sha256(folder / file)
        if actual != expected:
            raise BundleError(
                f"{folder / file}: SHA-256 is {actual[:16]}…, the manifest says {expected[:16]}…; "
                "the file was altered or damaged, copy the bundle again"
            )
    return Bundle(folder, manifest, hashlib.sha256(text).hexdigest())


def shipped_bundles() -> list[str]:
    """Names of the bundles that come with the package."""
    return sorted(path.parent.name for path in BUNDLES.glob(f"*/{MANIFEST}"))


def _completed(content: Any) -> Any:
    """A manifest's content with the default of what bundles of earlier versions lack."""
    preprocessing = content.get("preprocessing") if isinstance(content, dict) else None
    if not isinstance(preprocessing, dict):
        return content
    return content | {"preprocessing": {"least_span": Preprocessing.least_span} | preprocessing}


def signed(content: Mapping[str, Any]) -> str:
    """The text of a manifest of that content, with its own SHA-256: of the same text without it, 64 hex digits.

    It tells damage and changes by hand; an attacker could write it anew.
    """

    def text(mapping: Mapping[str, Any]) -> str:
        return json.dumps(mapping, indent=2, sort_keys=True) + "\n"

    plain = {key: value for key, value in content.items() if key != DIGEST}
    return text(plain | {DIGEST: hashlib.sha256(text(plain).encode()).hexdigest()})


def typed(kind: type[T], value: Any, where: str) -> T:
    """`value`, from JSON, as `kind`: dataclasses, tuples, literals, dictionaries and plain values. Strict.

    Args:
        kind: the type wanted; of a dataclass every field must be there, and no other.
        value: what `json.loads` returned.
        where: what to call it in a message.

    Raises:
        BundleError: naming the place that does not fit.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise BundleError(f"{where} should be an object, is {value!r}")
        fields = typing.get_type_hints(kind)
        if unknown := set(value) - set(fields):
            raise BundleError(f"{where}: unknown field {sorted(unknown)[0]!r}")
        if missing := set(fields) - set(value):
            raise BundleError(f"{where}: field {sorted(missing)[0]!r} is missing")
        return typing.cast(T, kind(**{name: typed(fields[name], value[name], f"{where}: {name}") for name in fields}))
    if origin is typing.Literal:
        if value not in args:
            raise BundleError(f"{where} should be one of {', '.join(map(str, args))}, is {value!r}")
    elif origin is tuple:
        if not isinstance(value, list):
            raise BundleError(f"{where} should be a list, is {value!r}")
        return typing.cast(T, tuple(typed(args[0], item, where) for item in value))
    elif origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise BundleError(f"{where} should be an object, is {value!r}")
        return typing.cast(T, {key: typed(args[1], item, f"{where}: {key}") for key, item in value.items()})
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
        return typing.cast(T, float(value))
    elif kind is not Any and not isinstance(kind, types.GenericAlias) and type(value) is not kind:
        raise BundleError(f"{where} should be of type {kind.__name__}, is {value!r}")
    return typing.cast(T, value)
