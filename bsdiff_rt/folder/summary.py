"""Summarise the report of a run of any length: the command `report`. Torch-free."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bsdiff_rt.errors import SettingsError
from bsdiff_rt.folder.report import FILE_NAME, PARQUET, load_report
from bsdiff_rt.folder.stored_journal import has_journal, open_journal

SLOWEST = 10
REASONS = 20  # shown; those of most files
_REASONS_KEPT = 10_000  # a reason may name a file, so there may be as many as files
_COLUMNS = ["input", "status", "reason", "seconds"]
_ROWS = 10_000


def summarise(folder: Path) -> dict[str, Any]:
    """Return what a run did, from report.json and from the file beside it that lists a long run's inputs.

    Returns:
        `started`, `ended`, `bundle` (its name), `images_per_second`, `model_busy`, `workers_replaced`; `counts` by
        status; `reasons`, those of most files first; `slowest`, the files that took most seconds.

    Raises:
        SettingsError: there is no report, or it cannot be read here.
    """
    head = load_report(folder)
    if not head:
        raise SettingsError(f"{folder}: no {FILE_NAME} of bsdiff-rt. Name an output folder of infer or watch.")
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    slowest: list[tuple[float, str]] = []
    for entry in _read_entries(folder, head):
        counts[entry["status"]] += 1
        if (reason := entry["reason"]) is not None:
            reasons[reason if reason in reasons or len(reasons) < _REASONS_KEPT else "other reasons"] += 1
        if entry["status"] == "ok":
            push = heapq.heappush if len(slowest) < SLOWEST else heapq.heappushpop
            push(slowest, (entry["seconds"], entry["input"]))
    return {
        "started": head["started"],
        "ended": head["ended"],
        "bundle": head["bundle"]["name"],
        "images_per_second": head["images_per_second"],
        "model_busy": head["model_busy"],
        "workers_replaced": head.get("workers_replaced", 0),
        "counts": dict(counts),
        "reasons": [{"reason": reason, "files": files} for reason, files in reasons.most_common(REASONS)],
        "slowest": [{"input": name, "seconds": seconds} for seconds, name in sorted(slowest, reverse=True)],
    }


def format_summary(found: dict[str, Any]) -> str:
    """Return a summary as lines of text."""
    counts = ", ".join(f"{status} {count}" for status, count in sorted(found["counts"].items())) or "no file"
    lines = [
        f"files      {counts}",
        f"model      {found['bundle']}",
        f"time       {found['started']} to {found['ended'] or 'now, or it was killed'}",
        f"rate       {found['images_per_second']:.2f} images/s, model busy {found['model_busy']:.0%}",
    ]
    if found["workers_replaced"]:
        lines.append(f"workers    {found['workers_replaced']} died and were replaced; their images were done again")
    if found["reasons"]:
        lines += ["reasons", *(f"  {one['files']:>9}  {one['reason']}" for one in found["reasons"])]
    if found["slowest"]:
        lines += ["slowest", *(f"  {one['seconds']:7.2f} s  {one['input']}" for one in found["slowest"])]
    return "\n".join(lines)


def _read_entries(folder: Path, head: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield input, status, reason and seconds of each file of a run, and perhaps more."""
    if "files_in" not in head:
        yield from head["files"]
    elif has_journal(folder):
        with open_journal(folder) as journal:
            yield from journal.read_entries()
    elif not (folder / PARQUET).is_file():
        raise SettingsError(
            f"{folder}: neither {head['files_in']} nor {PARQUET} is here, and one of them lists the files."
        )
    elif find_spec("pyarrow") is None:
        raise SettingsError(f"{folder / PARQUET}: needs pyarrow to be read. Install bsdiff-rt[archive].")
    else:
        import pyarrow.parquet as pq

        with (folder / PARQUET).open("rb") as file:
            for batch in pq.ParquetFile(file).iter_batches(_ROWS, columns=_COLUMNS):
                yield from batch.to_pylist()
