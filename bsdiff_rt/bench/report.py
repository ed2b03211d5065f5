"""The table and the notes that `bench` prints below it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bsdiff_rt.bench.flops import VALUE_BYTES, Work, compute_floor_ms
from bsdiff_rt.config import step_count

Cell = Callable[[dict[str, Any]], str]


def build_table(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the names of the columns and one line of cells for each row.

    Args:
        document: `Document.to_dict()`, or the content of its JSON file.
    """
    columns = _choose_columns(document)
    return list(columns), [[write_cell(row) for write_cell in columns.values()] for row in document["rows"]]


def write_notes(document: dict[str, Any]) -> list[str]:
    """Return lines on the conditions, the device's rates, and what was not measured.

    Args:
        document: `Document.to_dict()`, or the content of its JSON file.
    """
    rates = ", ".join(f"{name} {rate:.3g}" for name, rate in document["matmul_tflops"].items())
    work = document["work_per_image"]["denoiser"]["flop"]
    stage_2 = "with stage 2" if document["enhance"] else "without stage 2"
    mirror = ", one pass (infer also runs the mirrored X-ray)" if document["mirror"] else ""
    lines = [
        f"device: {document['device']}",
        f"model: {document['bundle']['name']}, {document['size_px']} px; "
        f"image: {document['sampler']}, {step_count(document['steps'])}, {stage_2}{mirror}",
        f"times: medians of {document['repeats']} steps and {document['image_repeats']} images, measured in turn",
        f"work: {work / 1e9:.4g} GFLOP a step and image; matrix products reach {rates} TFLOP/s; "
        f"copies reach {document['copy_gb_s']:.3g} GB/s",
    ]
    lines += _describe_parts(document)
    if any(row["outside_network_s"] is None for row in document["rows"]):
        lines.append("outside network: - means too small to measure in this run")
    for missing in document["not_measured"]:
        batch = f", batch {missing['batch']}" if missing["batch"] else ""
        lines.append(f"not measured: {missing['name']}{batch}: {missing['reason']}")
    return lines


def _describe_parts(document: dict[str, Any]) -> list[str]:
    """Return one line for each kind of work in a step, and what the floor means."""
    lines = []
    for kind, content in document.get("work_parts", {}).items():
        part = Work(**content)
        share = part.flop / document["work_per_image"]["denoiser"]["flop"]
        floors = {
            name: 1e3 * part.compute_floor_s(1, VALUE_BYTES.get(name, 4), rate * 1e12, document["copy_gb_s"] * 1e9)
            for name, rate in document["matmul_tflops"].items()
        }
        least = ", ".join(f"{name} {milliseconds:.3g} ms" for name, milliseconds in floors.items())
        lines.append(f"{kind}: {part.flop / 1e9:.4g} GFLOP ({share:.0%}), at batch 1 at least {least}")
    if lines:
        lines.append("floor: the sum of these, each for the arithmetic or the memory traffic, whichever takes longer")
    return lines


def _choose_columns(document: dict[str, Any]) -> dict[str, Cell]:
    columns: dict[str, Cell] = {
        "runner": lambda row: str(row["name"]),
        "precision": lambda row: str(row["precision"]),
        "batch": lambda row: str(row["batch"]),
        "step ms": _write_number("step_ms", ".4g"),
        "p95 ms": _write_number("step_ms_p95", ".4g"),
        "rounds": lambda row: str(len(row["step_times_ms"])),
        "eager / this": _write_number("eager_over_this", ".2f"),
        "TFLOP/s": _write_number("tflops", ".3g"),
        "of ceiling": _write_number("share_of_ceiling", ".0%"),
        "floor ms": lambda row: _write_optional(compute_floor_ms(document, row), ".4g"),
        "step / floor": lambda row: _write_optional(_divide(row["step_ms"], compute_floor_ms(document, row)), ".2f"),
        "image s": _write_number("image_s", ".4g"),
        "images/s": _write_number("images_per_second", ".4g"),
        "outside network s": _write_number("outside_network_s", ".3g"),
        f"{document['train_steps']} steps s, extrapolated": _write_number("full_image_s_extrapolated", ".4g"),
        "peak MiB": _write_number("peak_bytes", ".0f", 2.0**-20),
        "PSNR step dB": _write_decibel("psnr_step_vs_eager"),
        "PSNR image dB": _write_decibel("psnr_vs_eager"),
    }
    if any(row.get("published_over_this") is not None for row in document["rows"]):
        columns["published / this"] = _write_number("published_over_this", ".2f")
    if any(row.get("step_ms_uncaptured") is not None for row in document["rows"]):
        columns["uncaptured step ms"] = _write_number("step_ms_uncaptured", ".4g")
    if any(row["image_s_uncaptured"] is not None for row in document["rows"]):
        columns["uncaptured s"] = _write_number("image_s_uncaptured", ".4g")
        columns["same bits"] = lambda row: {True: "yes", False: "NO", None: "-"}[row["captured_equals_uncaptured"]]
    return columns


def _write_optional(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _divide(number: float, by: float | None) -> float | None:
    return number / by if by else None


def _write_number(name: str, form: str, scale: float = 1.0) -> Cell:
    return lambda row: "-" if row.get(name) is None else format(row[name] * scale, form)


def _write_decibel(name: str) -> Cell:
    number = _write_number(name, ".1f")
    return lambda row: "equal" if row["equals_eager"] is not None and row[name] is None else number(row)
