"""The run report: every input and its fate, in report.json beside the results. Torch-free."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from bsdiff_rt import __version__
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.radiograph import write_atomically

logger = logging.getLogger(__name__)

FILE_NAME = "report.json"
SAVE_EVERY_S = 5.0
PACKAGES = ("torch", "onnxruntime-gpu", "onnxruntime", "tensorrt", "numpy", "opencv-python-headless", "pydicom")

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
        seconds: reading, its share of the batch, and writing.
        sha256: of the output file.
        input_sha256: of the input file; a changed input is done again.
        tone_power: what `--scanner-tone` raised the networks' grey levels to; None where it left them.
    """

    input: str
    output: str | None
    status: Status
    reason: str | None = None
    seconds: float = 0.0
    sha256: str | None = None
    input_sha256: str | None = None
    tone_power: float | None = None


@dataclass
class Report:
    """Everything report.json holds."""

    bundle: dict[str, str]
    settings: dict[str, Any]
    environment: dict[str, Any]
    images_per_second: float = 0.0
    networks_busy: float = 0.0  # share of the run's wall time, from 0 to 1
    files: list[FileEntry] = field(default_factory=list)
    bsdiff_rt: str = __version__

    def counts(self) -> Counter[str]:
        """Number of files by status."""
        return Counter(entry.status for entry in self.files)

    def to_json(self) -> str:
        """The text of report.json."""
        head = {"bsdiff_rt": self.bsdiff_rt, "bundle": self.bundle, "settings": self.settings}
        tail = {"environment": self.environment, "images_per_second": round(self.images_per_second, 4)}
        tail |= {"networks_busy": round(self.networks_busy, 4)}
        return json.dumps(head | tail | {"files": [asdict(entry) for entry in self.files]}, indent=1) + "\n"

    def write(self, folder: Path) -> None:
        """Write report.json into `folder`, whole or not at all."""
        write_atomically(folder / FILE_NAME, self.to_json().encode())

    def settings_digest(self) -> str:
        """SHA-256 over bundle and settings: two runs with the same digest make the same pictures."""
        return hashlib.sha256(json.dumps([self.bundle, self.settings], sort_keys=True).encode()).hexdigest()


class Ledger:
    """Keeps a run's report up to date: in memory, on disk every few seconds, and for whoever watches.

    Any thread may add: who finishes a file adds its entry itself, so that an interruption of the main thread cannot
    part the two.

    Args:
        report: the run's report, without files yet.
        folder: output folder.
        order: every input, as the report lists them.
        before: what an earlier run finished (`finished_before`); entries not reached yet stay in the saved report, so
            that an interrupted run can be resumed again.
        on_file: told each entry as it is added.
    """

    def __init__(
        self,
        report: Report,
        folder: Path,
        order: Iterable[str],
        before: dict[str, FileEntry],
        on_file: Callable[[FileEntry], None],
    ) -> None:
        self.report = report
        self._folder = folder
        self._place = {name: number for number, name in enumerate(order)}
        self._before = before
        self._on_file = on_file
        self._lock = threading.RLock()
        self._started = self._saved = time.monotonic()

    def add(self, entry: FileEntry) -> None:
        """Take up one file's fate."""
        with self._lock:
            self.report.files.append(entry)
            self._on_file(entry)
            if time.monotonic() - self._saved > SAVE_EVERY_S:
                try:
                    self.save()
                except SettingsError as error:  # there may be room again when the run ends
                    logger.warning("%s", error)
                self._saved = time.monotonic()

    def save(self, busy_s: float = 0.0) -> None:
        """Write the report as it stands; `busy_s` is how long the networks worked, known at the end.

        Raises:
            SettingsError: it cannot be written.
        """
        with self._lock:
            self.report.networks_busy = busy_s / max(time.monotonic() - self._started, 1e-9)
            self._save()

    def _save(self) -> None:
        self.report.files.sort(key=lambda entry: self._place[entry.input])
        seconds = max(time.monotonic() - self._started, 1e-9)
        self.report.images_per_second = self.report.counts()["ok"] / seconds
        inputs = {entry.input for entry in self.report.files}
        outputs = {entry.output for entry in self.report.files}
        waiting = [
            replace(entry, status="skipped")
            for entry in self._before.values()
            if entry.input not in inputs and entry.output not in outputs
        ]
        try:
            replace(self.report, files=[*self.report.files, *waiting]).write(self._folder)
        except OSError as error:
            raise SettingsError(f"--output {self._folder}: {FILE_NAME} cannot be written ({error.strerror})") from error


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
        logger.warning("%s cannot be used (%s): every file is done again", path, type(error).__name__)
        return {}
    if not same:
        logger.info("%s is from another version or other settings: every file is done again", path)
        return {}
    return done


def results_in(folder: Path) -> dict[Path, str | None]:
    """Results an earlier run, of any version and settings, says it wrote into `folder`: path below it -> SHA-256.

    Empty where no run's report.json lies.
    """
    try:
        content = json.loads((folder / FILE_NAME).read_text())
        if "bsdiff_rt" not in content:
            return {}
        return {Path(entry["output"]): entry.get("sha256") for entry in content["files"] if entry["output"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # another program's, or damaged
        return {}


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
