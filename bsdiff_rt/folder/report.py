"""The run report: every input and its fate, in report.json beside the results. Torch-free."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from bsdiff_rt import __version__
from bsdiff_rt.files import write_atomically

logger = logging.getLogger(__name__)

FILE_NAME = "report.json"
PACKAGES = ("torch", "onnxruntime-gpu", "onnxruntime", "tensorrt", "numpy", "opencv-python-headless", "pydicom")

EARLIER = ("output", "sha256", "input", "input_sha256", "path_sha256")  # what is kept of an earlier run's entry

Status = Literal["ok", "skipped", "refused", "failed"]


@dataclass(frozen=True)
class FileEntry:
    """One input and what became of it.

    Attributes:
        input: its path as given or found.
        output: path below the output folder; None when nothing was written.
        status: `ok` written now, `skipped` written by an earlier run with the same settings, `refused` not something
            this program processes, `failed` should have worked.
        reason: one line, for refused and failed.
        seconds: reading, the networks' for it, and writing; not what it waited between.
        sha256: of the output file.
        input_sha256: of the input file, where it could be read; a changed input is done again.
        path_sha256: of the input's absolute path: tells two files apart that were given by the same relative one.
        view: which rows and columns the networks were shown, and how their grey levels were changed for them
            (`view.View`); None where it was all as it is.
        warnings: what a user should know about the X-ray, one sentence each.
        deviation_sha256: of the samples' deviation map; None where there is none.
    """

    input: str
    output: str | None
    status: Status
    reason: str | None = None
    seconds: float = 0.0
    sha256: str | None = None
    input_sha256: str | None = None
    path_sha256: str | None = None
    deviation_sha256: str | None = None
    view: dict[str, float] | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass
class Report:
    """Everything report.json holds."""

    bundle: dict[str, str]
    settings: dict[str, Any]
    environment: dict[str, Any]
    images_per_second: float = 0.0
    networks_busy: float = 0.0  # share of the run's wall time, from 0 to 1
    files: list[FileEntry] = field(default_factory=list)
    earlier: list[FileEntry] = field(default_factory=list)  # results of earlier runs that still lie there
    planned: list[str] = field(default_factory=list)  # results that were not there when the run began, and not reported
    bsdiff_rt: str = __version__

    def counts(self) -> Counter[str]:
        """Number of files by status."""
        return Counter(entry.status for entry in self.files)

    def to_json(self) -> str:
        """The text of report.json."""
        head = {"bsdiff_rt": self.bsdiff_rt, "bundle": self.bundle, "settings": self.settings}
        tail = {"environment": self.environment, "images_per_second": round(self.images_per_second, 4)}
        tail |= {"networks_busy": round(self.networks_busy, 4)}
        tail |= {"files": [asdict(entry) for entry in self.files]}
        tail |= {"earlier": [{key: getattr(entry, key) for key in EARLIER} for entry in self.earlier]}
        tail |= {"planned": self.planned}
        return json.dumps(head | tail, indent=1) + "\n"

    def write(self, folder: Path) -> None:
        """Write report.json into `folder`, whole or not at all."""
        write_atomically(folder / FILE_NAME, self.to_json().encode())


def finished_before(folder: Path, report: Report) -> dict[str, FileEntry]:
    """Outputs an earlier run with the version and settings of `report` finished, by output path.

    An entry counts only while its file still has the hash it was written with.
    """
    path = folder / FILE_NAME
    try:
        earlier = json.loads(path.read_text())
        entries = [FileEntry(**entry) for entry in earlier["files"]]
        done = {entry.output: entry for entry in entries if entry.status in ("ok", "skipped") and entry.output}
        same = all(earlier[key] == getattr(report, key) for key in ("bsdiff_rt", "bundle", "settings"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be used (%s): nothing is known to be done", path, type(error).__name__)
        return {}
    if not same:
        logger.info("%s is from another version or other settings: every file is done again", path)
        return {}
    return done


def results_in(folder: Path) -> dict[Path, FileEntry]:
    """Results that runs of any version and settings wrote into `folder`, by its report: path below it -> entry.

    Of an entry only what `EARLIER` names is known, of one by an older version perhaps not all of that. Empty where no
    run's report.json lies.
    """
    try:
        content = json.loads((folder / FILE_NAME).read_text())
        if "bsdiff_rt" not in content:
            return {}
        entries = [*content.get("earlier", []), *content["files"]]
        return {
            Path(entry["output"]): FileEntry(
                **({"input": ""} | {key: entry[key] for key in EARLIER if key in entry}), status="skipped"
            )
            for entry in entries
            if entry["output"]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # another program's, or damaged
        return {}


def planned_in(folder: Path) -> set[Path]:
    """Results that a run which did not come to its end was to write into `folder`: some may be there, unreported."""
    try:
        return {Path(output) for output in json.loads((folder / FILE_NAME).read_text())["planned"]}
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or another program's
        return set()


def path_digest(path: Path) -> str:
    """SHA-256 of a file's absolute path without links."""
    return hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()


def environment(device: str) -> dict[str, Any]:
    """Versions and machine, without user or host names."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device,
        "packages": package_versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide what the pixels are."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
