"""Kill runs of `infer` at random points, and check that nothing is half, untrue or lost.

    python -m benchmarks.kill_trials --kills 50

Each trial runs the same inputs into a folder and ends the process by SIGKILL at a random time. After every kill, each
file in the folder must be complete and the report must be true. The same run is then started again, until it ends by
itself: its files must be those of an undisturbed run, byte for byte. For this the clock that DICOM objects are dated
with stands still. Processes are forked (Linux, macOS), so that the
seconds of starting Python do not count as a place to be killed at.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Self

from bsdiff_rt.config import InferSettings
from bsdiff_rt.files import file_sha256
from bsdiff_rt.folder import ledger
from bsdiff_rt.folder.pipeline import Inference
from bsdiff_rt.folder.report import FILE_NAME, PAGE, locate_map, read_named
from bsdiff_rt.formats import dicom_out

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SAVE_EVERY_S = 0.05  # instead of 5 s: short runs are killed between saves, too
POLL_S = 0.002


class StillClock(datetime):
    """A clock that stands still. DICOM objects state when they were made, which differs between two runs."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        """Return the same time always."""
        return cls(2026, 1, 1, tzinfo=tz)


def make_inputs(folder: Path, copies: int) -> Path:
    """Copy the example X-rays, DICOM and PNG, into two folders, under several names. Return their folder."""
    for source in sorted(EXAMPLES.glob("phantom*")):
        for number in range(copies):
            target = folder / "in" / ("b" if number % 2 else "a") / f"{number} {source.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    return folder / "in"


def fork_run(settings: InferSettings, inputs: Path) -> int:
    """Start a run in a process of its own, and return its number."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        inference = Inference(settings)
        inference.run(inference.find_tasks([inputs]))
        code = 0
    finally:
        os._exit(code)


def end_run(pid: int, after_s: float) -> bool:
    """Wait for a run and kill it after some time. Return whether it was killed.

    Raises:
        RuntimeError: it ended by itself with an error.
    """
    deadline = time.monotonic() + after_s
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            if status:
                raise RuntimeError(f"the run ended with status {status}")
            return False
        time.sleep(POLL_S)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every result and map below a folder. Reports and hidden files are left out."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    kept = [path for path in paths if path not in (folder / FILE_NAME, folder / PAGE)]
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in kept}


def find_faults(folder: Path, expected: dict[str, str]) -> list[str]:
    """Return what is wrong with a folder after a kill: half files, and what its report does not say or says wrongly."""
    found = hash_files(folder)
    faults = [f"{name} is not complete" for name, digest in found.items() if digest != expected.get(name)]
    if (folder / PAGE).exists() and not (folder / PAGE).read_text(encoding="utf-8").endswith("</html>\n"):
        faults.append(f"{PAGE} is not complete")
    if not (folder / FILE_NAME).exists():
        return faults + [f"{name} without a report" for name in found]
    try:
        report = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    except ValueError:
        return [*faults, f"{FILE_NAME} is not complete"]
    named = {path.as_posix() for path in read_named(folder)}
    faults += [f"{name} is not named by the report" for name in found if name not in named]
    for entry in report["files"]:
        listed = {str(entry["output"]): entry["sha256"]}
        for kind, digest in entry["maps"].items():
            listed[locate_map(Path(), kind, entry["output"]).as_posix()] = digest
        faults += [f"{name} is not as the report says" for name, digest in listed.items() if found.get(name) != digest]
    return faults


def run_trials(kills: int, bundle: str, runner: str, seed: int, copies: int) -> dict[str, object]:
    """Kill runs until `kills` were hit, and return what was counted. `faults` must be empty."""
    ledger.SAVE_EVERY_S, ledger.SAVE_SHARE = SAVE_EVERY_S, 1.0
    vars(dicom_out)["datetime"] = StillClock
    chance = random.Random(seed)
    counts: Counter[str] = Counter()
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = make_inputs(folder, copies)

        def make_settings(output: Path) -> InferSettings:
            return InferSettings(
                output=output, bundle=bundle, runner=runner, device="cpu", threads=1, samples=2, html=True
            )

        begin = time.monotonic()
        end_run(fork_run(make_settings(folder / "undisturbed"), inputs), 3600)
        duration = time.monotonic() - begin
        expected = hash_files(folder / "undisturbed")
        while counts["kills"] < kills:
            output = folder / f"out {counts['folders']}"
            counts["folders"] += 1
            # In half of the folders one kill, in the others kills until a run happens to be faster.
            once = counts["folders"] % 2 == 1
            while end_run(fork_run(make_settings(output), inputs), chance.uniform(0, duration)):
                counts["kills"] += 1
                counts["kills with results in the folder"] += any(hash_files(output)) if output.exists() else False
                counts["files found complete"] += len(hash_files(output))
                counts["half-written parts left"] += len(list(output.rglob(".bsdiff-rt-part-*")))
                faults += find_faults(output, expected)
                if once or counts["kills"] >= kills:
                    end_run(fork_run(make_settings(output), inputs), 3600)
                    break
            faults += find_faults(output, expected)
            if hash_files(output) != expected:
                faults.append(f"{output.name}: the files are not those of an undisturbed run")
            if hidden := [path.name for path in output.rglob(".*")]:
                faults.append(f"{output.name}: left over: {', '.join(hidden)}")
            shutil.rmtree(output)
    return {"inputs": len(expected) // 2, "undisturbed_s": round(duration, 1), **counts, "faults": faults}


def main() -> None:
    """Read the arguments, run the trials and print what was counted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="runs to kill (default: 50)")
    parser.add_argument("--bundle", default="demo", help="model (default: demo)")
    parser.add_argument("--runner", default="auto", help="runner (default: auto)")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills (default: 0)")
    parser.add_argument("--copies", type=int, default=2, help="copies of each example X-ray (default: 2)")
    asked = parser.parse_args()
    counted = run_trials(asked.kills, asked.bundle, asked.runner, asked.seed, asked.copies)
    print(json.dumps(counted, indent=1))
    raise SystemExit(bool(counted["faults"]))


if __name__ == "__main__":
    main()
