"""Give damaged and hostile inputs to everything that reads, and count what becomes of them.

    python -m benchmarks.fuzz --minutes 20 --inputs 100000 --keep faults/

An input is a whole file, or a DICOM session, of which some bytes or values were changed. Each must be taken, or refused
with one of this program's own errors, within 5 s and 2 GiB. Anything else is a fault: a crash of the process, a hang,
more memory, another error, or a path outside the folder. An input follows from its kind and number, so a fault can be
had again with `--only KIND:NUMBER`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import queue
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bsdiff_rt.tables import print_table

LONGEST_S = 5.0
GRACE_S = 5.0  # in native code no signal is heard: the process is ended so much later
MEMORY_BYTES = 2 << 30
KINDS = ("png", "jpg", "tif", "dicom", "safetensors", "manifest", "report", "dimse")
# How many inputs of each kind, of all. Sessions and networks take longest.
SHARES = {"png": 20, "jpg": 15, "tif": 20, "dicom": 30, "safetensors": 4, "manifest": 4, "report": 5, "dimse": 2}
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
OUTCOMES = ("taken", "refused", "fault")


class Hang(BaseException):
    """An input that takes too long. No handler of errors takes it for an error of the input."""


@dataclass(frozen=True)
class Fault:
    """An input that was neither taken nor refused: its kind and number, and what happened."""

    kind: str
    number: int
    what: str


def mutate(content: bytes, chance: random.Random) -> bytes:
    """Return some bytes with one to five changes. Most of them lie near the beginning, where headers are."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 5))):
        size = max(len(changed), 1)
        place = chance.randrange(min(size, 400)) if chance.random() < 0.6 else chance.randrange(size)
        kind = chance.randrange(6)
        if kind == 0:
            changed[place : place + 4] = chance.randbytes(chance.randint(1, 4))
        elif kind == 1:
            changed[place:place] = chance.randbytes(chance.randint(1, 8))
        elif kind == 2:
            del changed[place : place + chance.randint(1, 60)]
        elif kind == 3 and chance.random() < 0.3:
            del changed[place:]
        elif kind == 4:
            changed[place:place] = changed[place // 2 : place // 2 + chance.randint(4, 60)]
        else:
            width = chance.choice((1, 2, 4, 8))
            number = chance.choice(NUMBERS) % 256**width
            changed[place : place + width] = number.to_bytes(width, chance.choice(("little", "big")))
    return bytes(changed)


def change_json(text: str, chance: random.Random) -> Any:
    """Return parsed JSON with one to three values replaced by odd ones."""
    content = json.loads(text)
    for _ in range(chance.randint(1, 3)):
        above, place = None, content
        key: Any = None
        while isinstance(place, dict | list) and place and (above is None or chance.random() < 0.8):
            above = place
            key = chance.choice(list(place)) if isinstance(place, dict) else chance.randrange(len(place))
            place = place[key]
        if above is not None:
            above[key] = draw_value(chance)
    return content


def draw_value(chance: random.Random, depth: int = 0) -> Any:
    """Return an odd JSON value."""
    kind = chance.randrange(8)
    if kind == 0 and depth < 3:
        return [draw_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    if kind == 1 and depth < 3:
        return {chance.choice(("", "a", "output", "files")): draw_value(chance, depth + 1) for _ in range(3)}
    paths = ("../../outside", "/etc/passwd", "a\0b", "", ".", "..", "a.png", "report.json", "\ud800", "x" * 5000)
    numbers = (0, -1, 1.5, 1e308, float("nan"), float("inf"), 10**30, -(2**63), *NUMBERS)
    return chance.choice((None, True, chance.choice(paths), chance.choice(numbers), chance.choice(numbers)))


def work(kind: str, numbers: tuple[int, int, int], ends_at: float, state: Any, faults: Any, keep: Path | None) -> None:
    """Try inputs of one kind in this process.

    Args:
        kind: one of KINDS.
        numbers: first number, the one behind the last, and the step.
        ends_at: time of the monotonic clock.
        state: shared: number of the input at hand, when it was begun, counts by OUTCOMES, and the longest time in s.
        faults: queue of Fault.
        keep: folder for faulty inputs.
    """
    warnings.simplefilter("ignore")
    targets = importlib.import_module("benchmarks.fuzz_targets")
    with tempfile.TemporaryDirectory() as name, targets.open_target(kind, Path(name)) as (draw, use):
        for seed in range(20):  # what is loaded once is no memory of an input
            if not use(draw(random.Random(seed), whole=True)):
                raise RuntimeError(f"{kind}: a whole input is refused.")
        limit_memory()
        signal.signal(signal.SIGALRM, interrupt)
        for number in range(*numbers):
            if time.monotonic() > ends_at:
                return
            content = draw(random.Random(f"{kind}:{number}"))
            state[0], state[1] = number, time.monotonic()
            what = try_one(use, content)
            state[5] = max(state[5], time.monotonic() - state[1])
            state[1] = 0.0
            state[2 + OUTCOMES.index(what if what in OUTCOMES else "fault")] += 1
            if what not in OUTCOMES:
                faults.put(Fault(kind, number, what))
                keep_input(keep, kind, number, content)


def try_one(use: Callable[[bytes], bool], content: bytes) -> str:
    """Return "taken", "refused", or what went wrong."""
    signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
    try:
        return "taken" if use(content) else "refused"
    except Hang:
        return f"more than {LONGEST_S:.0f} s"
    except MemoryError:
        return f"more than {MEMORY_BYTES >> 30} GiB"
    except BaseException as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = "" if trace is None else f" in {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        return f"{type(error).__name__}{place}: {str(error)[:120]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def interrupt(*_: object) -> None:
    """Raise Hang."""
    raise Hang


def limit_memory() -> None:
    """Let this process take MEMORY_BYTES more than it has."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    limit = int(fields["VmData"].split()[0]) * 1024 + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def keep_input(keep: Path | None, kind: str, number: int, content: bytes) -> None:
    """Write a faulty input into a folder, if there is one."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{kind}-{number}").write_bytes(content)


def run_kind(kind: str, count: int, ends_at: float, keep: Path | None) -> tuple[Counter[str], list[Fault], float]:
    """Try inputs of one kind in a process of its own, which is started again after a crash.

    Returns:
        Counts by OUTCOMES, the faults, and the longest time of one input, s.
    """
    context = multiprocessing.get_context("spawn")
    counts: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
    found: list[Fault] = []
    longest, first = 0.0, 0
    while first < count and time.monotonic() < ends_at:
        state, faults = context.Array("d", 6, lock=False), context.Queue()
        state[0] = -1
        process = context.Process(target=work, args=(kind, (first, count, 1), ends_at, state, faults, keep))
        process.start()
        what = watch(process, state)
        while True:
            try:
                found.append(faults.get(timeout=0.2))
            except queue.Empty:
                break
        for place, outcome in enumerate(OUTCOMES):
            counts[outcome] += int(state[2 + place])
        longest = max(longest, state[5])
        first = int(state[0]) + 1
        if what is not None:
            if state[0] < 0:
                raise RuntimeError(f"{kind}: the process ended before its first input ({what}).")
            counts["fault"] += 1
            found.append(Fault(kind, int(state[0]), what))
            continue
        break
    return counts, found, longest


def watch(process: Any, state: Any) -> str | None:
    """Wait for a process. Return None if it ended well, else what happened to the input at hand."""
    while process.is_alive():
        process.join(0.5)
        began = state[1]  # read once: the process sets it to 0 between inputs
        if began and time.monotonic() - began > LONGEST_S + GRACE_S:
            process.kill()
            process.join()
            return f"more than {LONGEST_S + GRACE_S:.0f} s in native code"
    return None if process.exitcode == 0 else f"the process ended with {process.exitcode}"


def show_one(text: str) -> None:
    """Try one input again, in this process, and let its error pass."""
    kind, _, number = text.partition(":")
    targets = importlib.import_module("benchmarks.fuzz_targets")
    with tempfile.TemporaryDirectory() as name, targets.open_target(kind, Path(name)) as (draw, use):
        print("taken" if use(draw(random.Random(f"{kind}:{int(number)}"))) else "refused")


def main() -> None:
    """Read the arguments, try the inputs and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="time for all kinds (default: 20)")
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs of all kinds (default: 100000)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds, separated by commas (default: all)")
    parser.add_argument("--keep", type=Path, help="folder for faulty inputs")
    parser.add_argument("--json", type=Path, help="write the counts to a JSON file")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="try one input again and show its error")
    given = parser.parse_args()
    if given.only:
        show_one(given.only)
        return
    kinds = given.kinds.split(",")
    if unknown := sorted(set(kinds) - set(KINDS)):
        parser.error(f"--kinds: {unknown[0]!r} is not known. Choose from {', '.join(KINDS)}.")
    total, begin = sum(SHARES[kind] for kind in kinds), time.monotonic()
    rows, faults, document = [], [], {}
    for place, kind in enumerate(kinds):
        left = sum(SHARES[later] for later in kinds[place:])
        ends_at = time.monotonic() + (begin + 60 * given.minutes - time.monotonic()) * SHARES[kind] / left
        counts, found, longest = run_kind(kind, given.inputs * SHARES[kind] // total, ends_at, given.keep)
        faults += found
        document[kind] = {**counts, "longest_s": round(longest, 2)}
        rows.append([kind, str(sum(counts.values())), *(str(counts[one]) for one in OUTCOMES), f"{longest:.2f}"])
        print(f"{kind}: {dict(counts)}", file=sys.stderr, flush=True)
    print_table(("kind", "inputs", *OUTCOMES, "longest s"), rows)
    for fault in faults[:50]:
        print(f"{fault.kind}:{fault.number}: {fault.what}")
    if given.json:
        given.json.write_text(json.dumps(document, indent=1) + "\n")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
