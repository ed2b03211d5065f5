"""What a file format has to offer. A new format is one module that makes a `Format`, and its line in `FORMATS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.formats.radiograph import Radiograph


@dataclass(frozen=True)
class ReadOptions:
    """How a file is read.

    Attributes:
        any_view: accept lateral views and other body parts, too.
        derived: accept results of this program, too. Use it to compare results, not to process them again.
        least_bits: the smallest depth of a file that does not state its own, 8 to 16.
    """

    any_view: bool = False
    derived: bool = False
    least_bits: int = 8


@dataclass(frozen=True)
class Identity:
    """Whom a file belongs to, as it says itself. Never written anywhere.

    Attributes:
        study: StudyInstanceUID, or None.
        patient: PatientID, or None.
    """

    study: str | None = None
    patient: str | None = None


@dataclass(frozen=True)
class Derivation:
    """How a result was made, for formats that can record it.

    Attributes:
        description: sampler, steps, seed, precision and size of the model's input. DICOM keeps at most 1024 characters.
        bundle_name: name of the model bundle.
        bundle_sha256: hash of the bundle. In DICOM it gives the Device UID, so that a retrained model is a new device.
        settings_digest: identifies the resolved settings. In DICOM it is part of the new UIDs.
        software_version: version of this package.
        created: date and time, local unless aware; None for now.
        warnings: what a reader of the result should know, one sentence each.
    """

    description: str
    bundle_name: str
    bundle_sha256: str
    settings_digest: str
    software_version: str
    created: datetime | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class ResultToWrite:
    """A soft-tissue image on its way to a file.

    Attributes:
        picture: [H, W], float32, in [0, 1].
        like: the X-ray that it belongs to.
        kind: one of the format's `kinds`.
        derivation: how it was made; None if the caller does not say.
    """

    picture: NDArray[np.float32]
    like: Radiograph
    kind: str
    derivation: Derivation | None = None


@dataclass(frozen=True)
class Format:
    """A file format, or a family of formats with one reader.

    Attributes:
        name: as in `Radiograph.format`.
        titles: the names that users know, for messages.
        suffixes: file name suffixes, lower case, with their dot.
        recognise: return whether a file is of this format, by its content. It never raises.
        read: read a file that is of this format by its content or its suffix.
        kinds: kinds of results that it writes. The first one is for X-rays of this format. Empty if it cannot write.
        result_suffix: suffix of the results.
        needs_source: whether a result needs an X-ray of the same format, whose header it copies.
        write: write a result.
        any_name: whether files of this format are common under names without a suffix.
        states_depth: whether a file states how many bits its grey levels have.
        identify: return whom a file belongs to, by its header. It never raises. None if the format does not say.
    """

    name: str
    titles: tuple[str, ...]
    suffixes: frozenset[str]
    recognise: Callable[[Path], bool]
    read: Callable[[Path, ReadOptions], Radiograph]
    kinds: tuple[str, ...] = ()
    result_suffix: str = ""
    needs_source: bool = False
    write: Callable[[Path, ResultToWrite], None] | None = None
    any_name: bool = False
    states_depth: bool = False
    identify: Callable[[Path], Identity] | None = None
