"""DICOM in the registry of formats: its reader, its writer and the kinds of results that it writes."""

from __future__ import annotations

from pathlib import Path
from typing import cast, get_args

from bsdiff_rt.errors import SettingsError
from bsdiff_rt.formats.base import Format, ReadOptions, ResultToWrite
from bsdiff_rt.formats.dicom_in import is_dicom, read_dicom, read_identity
from bsdiff_rt.formats.dicom_out import DicomKind, write_derived
from bsdiff_rt.formats.radiograph import Radiograph


def _read(path: Path, options: ReadOptions) -> Radiograph:
    return read_dicom(path, any_view=options.any_view, derived=options.derived)


def _write(path: Path, result: ResultToWrite) -> None:
    if result.derivation is None:
        raise SettingsError("a DICOM result needs a Derivation: how the picture was made")
    write_derived(path, result.like, result.picture, result.derivation, cast(DicomKind, result.kind))


DICOM = Format(
    name="dicom",
    titles=("DICOM",),
    suffixes=frozenset({".dcm", ".dicom", ".ima"}),
    recognise=is_dicom,
    read=_read,
    kinds=get_args(DicomKind),
    result_suffix=".dcm",
    needs_source=True,
    write=_write,
    any_name=True,
    states_depth=True,
    identify=read_identity,
)
