"""Measure `infer --ray` on this machine: the same files as without it, its overhead, and workers that are killed.

    python -m benchmarks.ray_trials --images 200 --workers 1,2 --kills 0 --json PATH
    python -m benchmarks.ray_trials --images 500 --workers 2 --kills 50 --bundle BUNDLE --runner eager

The example X-rays are copied under several names. A run without Ray comes first, and then one with Ray for each number
of workers. Each worker has the same number of CPU cores; the run without Ray has as many as one worker. Kills are
SIGKILL to a worker chosen at random, spread over the run. Linux only, because processes are found in /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.kill_trials import EXAMPLES, hash_files
from bsdiff_rt.config import InferSettings
from bsdiff_rt.files import write_atomically
from bsdiff_rt.folder import ray_workers
from bsdiff_rt.folder.pipeline import Inference
from bsdiff_rt.folder.ray_workers import LOCAL, Share

WORKER = "ray::MapWorker"  # how the processes of workers are called


def make_inputs(folder: Path, count: int) -> Path:
    """Copy PNG X-rays of the examples under `count` names. Return their folder."""
    sources = sorted(EXAMPLES.glob("phantom*.png"))
    (folder / "in").mkdir()
    for number in range(count):
        shutil.copy(sources[number % len(sources)], folder / "in" / f"{number:05d}.png")
    return folder / "in"


def run(inputs: Path, settings: InferSettings, ray: str | None) -> dict[str, Any]:
    """Run once. Return seconds, images per second of the run without its start, and counts."""
    started = time.monotonic()
    first: list[float] = []
    inference = Inference(settings, ray=ray)
    report = inference.run(
        inference.find_tasks([inputs]), lambda _: None if first else first.append(time.monotonic() - started)
    )
    seconds = time.monotonic() - started
    return {
        "seconds": round(seconds, 2),
        "seconds_to_first": round(first[0], 2),
        "counts": dict(report.counts()),
        "workers_replaced": report.workers_replaced or 0,
    }


def find_workers() -> list[int]:
    """Return the processes of this machine that are workers of Ray Data."""
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if command.read_bytes().startswith(WORKER.encode()):
                found.append(int(command.parent.name))
        except OSError:
            continue
    return found


class Killer:
    """Ends workers at random, each after one more part of the files is done; a context manager.

    Args:
        output: the output folder, whose files are counted.
        images: number of files of the run.
        kills: number of workers to end.
        seed: chooses them.
    """

    def __init__(self, output: Path, images: int, kills: int, seed: int) -> None:
        self._output, self._random, self.killed = output, random.Random(seed), 0
        self._at = sorted(self._random.randint(1, max(1, images - 8)) for _ in range(kills))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while self._at and not self._over.wait(0.02):
            if sum(1 for _ in self._output.glob("*.png")) >= self._at[0] and (workers := find_workers()):
                os.kill(self._random.choice(workers), signal.SIGKILL)
                self.killed += 1
                self._at.pop(0)


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Run without Ray and with it. Return one row for each run."""
    inputs = make_inputs(folder, arguments.images)
    rows: list[dict[str, Any]] = []
    expected: dict[str, str] = {}
    for workers in (0, *map(int, arguments.workers.split(","))):
        output = folder / f"out{workers}"
        settings = InferSettings(
            output=output,
            bundle=arguments.bundle,
            runner=arguments.runner,
            threads=1,
            device="cpu",
            steps=arguments.steps,
        )
        ray_workers.find_share = lambda *_, workers=workers: Share(workers, 1, 0)
        with Killer(output, arguments.images, arguments.kills if workers else 0, arguments.seed) as killer:
            row = {"workers": workers} | run(inputs, settings, LOCAL if workers else None)
        found = hash_files(output)
        expected = expected or found
        different = sum(found.get(name) != digest for name, digest in expected.items()) + len(found.keys() - expected)
        rows.append(row | {"killed": killer.killed, "files": len(found), "different_files": different})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Read the options, measure, and print or write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--workers", default="1,2", help="numbers of workers, separated by commas")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundle", default="demo")
    parser.add_argument("--runner", default="auto")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments, Path(folder))
    if arguments.json is not None:
        write_atomically(
            arguments.json, (json.dumps({"images": arguments.images, "rows": rows}, indent=1) + "\n").encode()
        )


if __name__ == "__main__":
    main()
