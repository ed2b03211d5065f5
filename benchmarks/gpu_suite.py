"""Run every check and measurement that needs a GPU, within a given time.

    python -m benchmarks.gpu_suite --output results/           # one GPU, 8 minutes
    python -m benchmarks.gpu_suite --device cpu --preset tiny  # a trial run on any machine

The parts, most telling first: rates of the machine, forms of attention, one full image in eager fp16, engines, step
times, one full image by each engine, a profile, a folder of images, peers, tests marked `gpu`. Each part has its share
of the time, plus the time that earlier parts left. It runs in its own process, so a crash or a hang costs no other
part. DIR/gpu_suite.json is written after each part, and DIR/tests.log by the tests. Until the end each part also keeps
its results in DIR/PART.json. If something cannot be done, the file gives the reason.

Needs torch, NumPy and this repository. A part that needs more names what is missing. docs/engines.md lists what to
carry to a machine without a network.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_common import Part, Skipped, read_json
from benchmarks.gpu_parts import PARTS
from bsdiff_rt.bench.report import build_table
from bsdiff_rt.config import PRESETS
from bsdiff_rt.errors import BsdiffError, SettingsError, one_line
from bsdiff_rt.tables import print_table

SUMMARY = "gpu_suite.json"
NO_DEVICE = "no device"
MINUTES = 8.0
# In seconds, for eight minutes in all; --minutes scales them.
BUDGETS_S = {
    "machine": 30,
    "attention": 45,
    "half": 60,
    "engines": 105,
    "steps": 55,
    "full": 60,
    "profile": 15,
    "folder": 30,
    "peers": 30,
    "tests": 50,
}
BATCHES = (1, 8, 4, 16, 2)  # most important first: time may run out


def run_part(part: Part) -> None:
    """Do a part in a process of its own, and record how it ended."""
    os.setsid()  # so that its compilers and tests end with it
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    started = time.monotonic()
    part.save(name=part.name, status="running")
    try:
        _ = part.device  # here: children cannot use CUDA if the parent process has used it
    except SettingsError as error:
        part.save(status=NO_DEVICE, reason=str(error), seconds=0.0)
        return
    try:
        PARTS[part.name](part)
        ending = {"status": "done"}
    except Skipped as reason:
        ending = {"status": "skipped", "reason": str(reason)}
    except ImportError as error:
        ending = {"status": "skipped", "reason": f"the package {error.name} is not installed"}
    except Exception as error:
        logging.getLogger(__name__).debug("failed", exc_info=True)
        ending = {"status": "failed", "reason": str(error) if isinstance(error, BsdiffError) else one_line(error)}
    part.save(**ending, seconds=round(time.monotonic() - started, 1))


def supervise(part: Part) -> dict[str, Any]:
    """Run a part in a child process until its deadline, and return its results, however it ended."""
    print(f"{part.name} ({part.left():.0f} s)", flush=True)
    path = part.options.output / f"{part.name}.json"
    if part.left() <= 0:
        part.save(name=part.name, status="skipped", reason="not enough time")
        return part.found
    child = multiprocessing.get_context("fork").Process(target=run_part, args=(part,))
    child.start()
    child.join(part.left())
    ended = not child.is_alive()
    if not ended:
        assert child.pid is not None  # it was started
        try:
            os.killpg(child.pid, signal.SIGKILL)  # the session of run_part: the part and what it started
        except ProcessLookupError:  # it had not opened its session yet
            child.kill()
        child.join()
    found = read_json(path) or {"name": part.name}
    if found.get("status") in (None, "running"):
        reason = f"the process died (exit code {child.exitcode})" if ended else "out of time; its results are kept"
        found |= {"status": "failed" if ended else "out of time", "reason": reason}
        path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"  {found['status']}: {found.get('reason', '')}".rstrip(": "), flush=True)
    return found


def summarise(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return one document of all parts: conditions, rows of steps and peers, and every part."""
    rows = [row | {"part": name} for name in ("steps", "peers") for row in found.get(name, {}).get("rows", [])]
    absent = [entry for name in ("steps", "peers") for entry in found.get(name, {}).get("not_measured", [])]
    first = found.get("machine", {}).get("head", {})
    return first | {"rows": rows, "not_measured": absent, "parts": list(found.values())}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, with argparse because a bare GPU machine may have nothing else."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default: cuda)")
    parser.add_argument(
        "--preset", default="paper", choices=sorted(PRESETS), help="networks with random weights (paper)"
    )
    parser.add_argument("--bundle", help="a bundle's folder instead of a preset; TensorRT needs its graphs")
    parser.add_argument("--size", type=int, help="side of the model's images, px (256; tiny: 64)")
    parser.add_argument("--output", type=Path, default=Path("out/gpu_suite"), help="folder for results (%(default)s)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for all parts (%(default)g)")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma separated (all)")
    parser.add_argument(
        "--batches", default=",".join(map(str, BATCHES)), help="batch sizes, in this order (%(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=10, help="measured rounds of steps (10)")
    parser.add_argument("--full-steps", type=int, default=1000, help="steps of the full image (1000)")
    parser.add_argument("--images", type=int, default=200, help="pictures in the folder (200)")
    parser.add_argument("--image-px", type=int, default=1024, help="side of each (1024)")
    options = parser.parse_args(arguments)
    options.size = options.size or (64 if options.preset == "tiny" else 256)
    asked = set(options.parts.split(","))
    if unknown := asked - set(PARTS):
        parser.error(f"--parts {unknown.pop()}: choose from {', '.join(PARTS)}")
    options.parts = [name for name in PARTS if name in asked | {"machine"}]  # the others need its rates
    if not all(batch.isdecimal() and int(batch) for batch in options.batches.split(",")):
        parser.error(f"--batches {options.batches}: give whole numbers above 0")
    options.batches = tuple(int(batch) for batch in options.batches.split(","))
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the parts, and return the exit code: 0 unless a part failed or there is no device."""
    options = parse_arguments(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    for name in PARTS:  # of an earlier run
        (options.output / f"{name}.json").unlink(missing_ok=True)
    work = Path(tempfile.mkdtemp(prefix="gpu-suite-"))
    found: dict[str, dict[str, Any]] = {}
    deadline = time.monotonic()
    try:
        for name in options.parts:
            deadline += BUDGETS_S[name] * options.minutes / MINUTES  # plus what earlier parts left
            found[name] = supervise(Part(name, options, work, deadline))
            (options.output / SUMMARY).write_text(json.dumps(summarise(found), indent=1) + "\n")
            if found[name]["status"] == NO_DEVICE:
                break  # the other parts need it, too
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for name in found:  # all of it is in the summary
        (options.output / f"{name}.json").unlink(missing_ok=True)
    document = summarise(found)
    for name in ("steps", "peers"):
        rows = [row for row in document["rows"] if row["part"] == name]
        if rows and "train_steps" in document:
            print(f"\n{name}:")
            print_table(*build_table(document | {"rows": rows}))
    print()
    for part in found.values():
        print(
            f"{part['name']:9} {part['status']:12} {part.get('seconds', 0):6.1f} s  {part.get('reason', '')}".rstrip()
        )
    return 1 if any(part["status"] in ("failed", NO_DEVICE) for part in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
