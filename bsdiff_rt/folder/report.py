"""The run report: report.json lists every input of a run with its outcome. Its keys: docs/reports.md. Torch-free."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections import Counter
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from bsdiff_rt import __version__
from bsdiff_rt.config import InferSettings
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.files import parse_json, write_atomically
from bsdiff_rt.urls import is_url, lexists, resolve

logger = logging.getLogger(__name__)

FILE_NAME = "report.json"
PREVIEW, PAGE = "preview.png", "report.html"
PARQUET = "report.parquet"  # every input of a long run
UNCERTAINTY = "uncertainty"  # folder, in the output folder, of the standard deviations of several samples
RETENTION = "retention"  # folder of the pictures of the probe
MAPS = (UNCERTAINTY, RETENTION)
PACKAGES = (
    *("torch", "onnxruntime-gpu", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx-cu13-libs"),
    *("numpy", "opencv-python-headless", "pydicom"),
)

# What is kept of an entry when a later run, with other settings or inputs, writes its own report.
EARLIER = ("output", "sha256", "input", "input_sha256", "path_sha256", "maps")

Status = Literal["ok", "skipped", "refused", "failed"]


@dataclass(frozen=True)
class FileEntry:
    """One input of a run and its outcome.

    Attributes:
        input: path as the user gave it, or as it was found in a folder.
        output: path of the result, relative to the output folder; None if nothing was written.
        status: `ok` if written by this run, `skipped` if written by an earlier run with the same settings, `refused`
            if this program does not process such a file, `failed` if it should have worked.
        reason: one line that says why the input was refused or failed; None otherwise.
        seconds: time spent on reading, on the model and on writing, without waiting in between. A skipped file keeps
            the seconds of the run that wrote it.
        sha256: SHA-256 of the output file.
        input_sha256: SHA-256 of the input file, if it could be read. A changed input is processed again.
        path_sha256: SHA-256 of the input's absolute path. It tells two files apart that have the same relative path.
        maps: SHA-256 of each map of the result, by the name of the folder that holds it (`MAPS`).
        retention: how much of a small nodule would survive in this X-ray (`probe.Retention.to_report`); None without
            the probe, and in an X-ray that has no place for a nodule.
        view: rows, columns and grey levels the model was given, if that was not the whole, unchanged picture.
        warnings: one line for each thing a reader of the result should know.
    """

    input: str
    output: str | None
    status: Status
    reason: str | None = None
    seconds: float = 0.0
    sha256: str | None = None
    input_sha256: str | None = None
    path_sha256: str | None = None
    maps: dict[str, str] = field(default_factory=dict)
    retention: dict[str, Any] | None = None
    view: dict[str, float] | None = None
    warnings: list[str] = field(default_factory=list)


_ENTRY_KEYS = tuple(item.name for item in fields(FileEntry))
_SETTING_DEFAULTS = {item.name: item.default for item in fields(InferSettings) if item.default is not MISSING}


def now() -> str:
    """Return the local time with its offset, in ISO 8601, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


@dataclass
class Report:
    """The content of report.json.

    Attributes:
        bundle: name, sha256 and licence of the model.
        settings: the resolved settings that change pixels.
        environment: versions and device.
        started, ended: local times of this run; `ended` is None while it goes on, and stays so if it is killed.
        images_per_second: images written per second of this run. A run that writes none keeps the earlier figure.
        model_busy: share of the run's time in which the model computed, 0 to 1; kept in the same way.
        preview: name of the preview picture of this or an earlier run; None if no run made one.
        page: name of the page of this or an earlier run; None if no run made one.
        files: the inputs of this run, and finished files of earlier runs with the same settings.
        earlier: results of other runs that are still in the folder.
        planned: results that did not exist when the run began, and are not in `files` yet.
        files_in: the file beside report.json that holds the entries of a long run, whose `files` is empty; else None.
        counted: number of files by status in a long run; else None.
        workers_replaced: workers of `--ray` that died and were replaced; None without.
        bsdiff_rt: version of this package.
    """

    bundle: dict[str, str]
    settings: dict[str, Any]
    environment: dict[str, Any]
    started: str = field(default_factory=now)
    ended: str | None = None
    images_per_second: float = 0.0
    model_busy: float = 0.0
    preview: str | None = None
    page: str | None = None
    files: list[FileEntry] = field(default_factory=list)
    earlier: list[FileEntry] = field(default_factory=list)
    planned: list[str] = field(default_factory=list)
    files_in: str | None = None
    counted: Counter[str] | None = None
    workers_replaced: int | None = None
    bsdiff_rt: str = __version__

    def counts(self) -> Counter[str]:
        """Return the number of files by status."""
        return Counter[str](entry.status for entry in self.files) if self.counted is None else self.counted

    def to_json(self) -> str:
        """Return the text of report.json."""
        content: dict[str, Any] = {
            "bsdiff_rt": self.bsdiff_rt,
            "bundle": self.bundle,
            "settings": self.settings,
            "environment": self.environment,
            "started": self.started,
            "ended": self.ended,
            "images_per_second": round(self.images_per_second, 4),
            "model_busy": round(self.model_busy, 4),
            "preview": self.preview,
            "page": self.page,
            "files": [asdict(entry) for entry in self.files],
            "earlier": [{key: getattr(entry, key) for key in EARLIER} for entry in self.earlier],
            "planned": self.planned,
        }
        if self.files_in is not None:
            content |= {"files_in": self.files_in, "counts": dict(self.counts())}
        if self.workers_replaced is not None:
            content["workers_replaced"] = self.workers_replaced
        return json.dumps(content, indent=1) + "\n"

    def write(self, folder: Path) -> None:
        """Write report.json into `folder`, completely or not at all. It is on the disk when this returns.

        Raises:
            OSError: the file cannot be written.
        """
        write_atomically(folder / FILE_NAME, self.to_json().encode(), durable=True)


def check_output(folder: Path) -> None:
    """Check that a report.json in the output folder, if there is one, is a readable report of this program.

    Args:
        folder: the output folder; it need not exist.

    Raises:
        SettingsError: another program wrote the file, or it is damaged. Writing a report would replace it.
    """
    path = folder / FILE_NAME
    if not lexists(path):
        return
    try:
        content = _load(folder)
        if not isinstance(content["bsdiff_rt"], str):
            raise TypeError
        _read_entries(content)
    except OSError as error:
        raise SettingsError(
            f"{path}: cannot be read ({error.strerror}). Choose another output folder.", setting="output"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(
            f"{path}: not a report of bsdiff-rt, or damaged. Move it away, or choose another output folder.",
            setting="output",
        ) from error


def read_finished(folder: Path, report: Report) -> dict[str, FileEntry]:
    """Return the results that an earlier run with the bundle and settings of `report` finished, by output path.

    The version of this package does not matter, so a new release does not redo an archive. A setting that the earlier
    report does not know counts as having its default.
    """
    path = folder / FILE_NAME
    try:
        earlier = _load(folder)
        entries = [read_entry(content) for content in earlier["files"]]
        difference = find_difference(earlier, report)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be used (%s). Every file is processed again.", path, type(error).__name__)
        return {}
    if difference:
        logger.info("%s: %s. Every file is processed again.", path, difference)
        return {}
    return {entry.output: entry for entry in entries if entry.status in ("ok", "skipped") and entry.output}


def find_difference(head: dict[str, Any], report: Report) -> str:
    """Return in which setting a report.json differs from `report`, as words; "" if bundle and settings are the same.

    Raises:
        KeyError, TypeError, AttributeError: not the content of a report.
    """
    if head["bundle"]["sha256"] != report.bundle["sha256"]:
        return "made with another bundle"
    missing = {key: _SETTING_DEFAULTS[key] for key in report.settings.keys() - head["settings"].keys()}
    earlier = missing | head["settings"]
    changed = [key for key in earlier if key not in report.settings or earlier[key] != report.settings[key]]
    if not changed:
        return ""
    return f"made with {changed[0]} {earlier[changed[0]]}, now {report.settings.get(changed[0])}"


def read_results(folder: Path) -> dict[Path, FileEntry]:
    """Return the results that the report in `folder` names, of any version and settings: path below it -> entry.

    Only the keys in `EARLIER` are filled. Empty if there is no report of this program.
    """
    try:
        content = _load(folder)
        if "bsdiff_rt" not in content:
            return {}
        return {Path(entry.output): entry for entry in _read_entries(content) if entry.output}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def read_planned(folder: Path) -> set[Path]:
    """Return the results that an unfinished run was going to write into `folder`. Some of them may exist."""
    try:
        return {Path(output) for output in _load(folder)["planned"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def read_name(folder: Path, key: Literal["preview", "page"]) -> str | None:
    """Return the name of the preview or the page that the report in `folder` names, or None."""
    try:
        name = _load(folder)[key]
        return name if isinstance(name, str) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_rates(folder: Path) -> tuple[float, float]:
    """Return `images_per_second` and `model_busy` of the report in `folder`; zeros if there is none."""
    try:
        content = _load(folder)
        return float(content["images_per_second"]), float(content["model_busy"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return 0.0, 0.0


def read_named(folder: Path) -> set[Path]:
    """Return every file that the report in `folder` names, relative to it.

    These are results, their maps, the preview and the page. A later run may replace no other file. Maps of an
    unfinished run are included, because it may have written them.
    """
    results, planned = read_results(folder), read_planned(folder)
    maps = {locate_map(Path(), kind, path) for path, entry in results.items() for kind in entry.maps}
    maps |= {locate_map(Path(), kind, path) for path in planned for kind in MAPS}
    pictures = {Path(name) for name in (read_name(folder, "preview"), read_name(folder, "page")) if name}
    return {*results, *planned, *maps, *pictures}


def list_maps(settings: InferSettings) -> tuple[str, ...]:
    """Return the maps, of `MAPS`, that a run with these settings writes for every result."""
    return ((UNCERTAINTY,) if settings.samples > 1 else ()) + ((RETENTION,) if settings.probe else ())


def locate_map(folder: Path, kind: str, output: Path | str) -> Path:
    """Return where a map of a result goes: uncertainty/x.png for x.png, uncertainty/x.dcm.png for x.dcm."""
    path = Path(output)
    return folder / kind / (path if path.suffix == ".png" else f"{path}.png")


def digest_path(path: Path) -> str:
    """Return the SHA-256 of a file's absolute path, with links resolved."""
    return hashlib.sha256(os.fsencode(resolve(path))).hexdigest()


def describe_environment(device: str) -> dict[str, Any]:
    """Return versions, platform and device. Names of users and hosts are left out."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device,
        "packages": list_package_versions(),
    }


def list_package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that can change pixels."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def load_report(folder: Path) -> dict[str, Any]:
    """Return the content of report.json; empty if there is no report of this program."""
    try:
        content = _load(folder)
        _read_entries(content)
        return dict(content) if "bsdiff_rt" in content else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _load(folder: Path) -> Any:
    """Return the content of report.json.

    Raises:
        SettingsError: object storage has it and does not give it. Taken for missing, its results would be nobody's.
    """
    try:
        return parse_json((folder / FILE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        if not is_url(folder):
            raise
        raise SettingsError(f"{folder / FILE_NAME}: cannot be read ({error.strerror}). Try again.") from error


def _read_entries(content: dict[str, Any]) -> list[FileEntry]:
    """Return the entries of this and of earlier runs, each with the keys in `EARLIER` only.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: not the content of a report.
    """
    found = []
    for entry in [*content.get("earlier", []), *content["files"]]:
        known = {key: entry[key] for key in EARLIER if key in entry}
        found.append(_check_types(FileEntry(**{"input": "", "output": entry["output"], "status": "skipped"} | known)))
    return found


def read_entry(content: dict[str, Any]) -> FileEntry:
    """Return an entry of report.json. Keys of other versions are ignored; missing ones have their defaults.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: a value is missing or not what it should be.
    """
    known = {key: content[key] for key in _ENTRY_KEYS if key in content}
    return _check_types(FileEntry(**known))


def _check_types(entry: FileEntry) -> FileEntry:
    """Return an entry as it is, if its values are of the right types and its places lie in the output folder.

    Raises:
        TypeError: a value has another type.
        ValueError: a place is elsewhere.
    """
    expected: list[tuple[Any, tuple[object, ...]]] = [
        (dict, (entry.maps,)),
        (list, (entry.warnings,)),
        (dict | None, (entry.view, entry.retention)),
        (str, (entry.input, *entry.warnings, *entry.maps, *entry.maps.values())),
        (str | None, (entry.output, entry.reason, entry.sha256, entry.input_sha256, entry.path_sha256)),
        (int | float, (entry.seconds, *(entry.view or {}).values())),
    ]
    if not all(isinstance(value, kind) for kind, values in expected for value in values):
        raise TypeError("a value of another type")
    for place in (entry.output or "", *entry.maps):
        if ".." in Path(place).parts or Path(place).is_absolute():
            raise ValueError("a place outside the output folder")
    return entry
