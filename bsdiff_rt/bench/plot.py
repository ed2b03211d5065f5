"""The picture of a benchmark's document: latency by runner, images per second by batch size, roofline."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bsdiff_rt.bench.flops import Work
from bsdiff_rt.config import step_count
from bsdiff_rt.errors import SettingsError

# Okabe and Ito's colours, told apart with any colour vision; one stays with its runner through all panels.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX*"
SAME_LINE = 0.1  # ceilings closer than this share one label
VALUE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def check_plot(path: Path) -> None:
    """Refuse at once what could only fail after the measurement.

    Raises:
        SettingsError: matplotlib is not installed, the folder does not exist, or the name ends in no picture format.
    """
    if find_spec("matplotlib") is None:
        raise SettingsError(f"picture {path}: needs matplotlib, which is not installed; `pip install matplotlib`")
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise SettingsError(f"picture {path}: name a .png, .pdf or .svg file")
    if not path.parent.is_dir():
        raise SettingsError(f"picture {path}: there is no folder {path.parent}")


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the picture.

    Args:
        found: `bench_report.Document.as_dict()`, or what was read from a JSON file of it.
        path: a .png, .pdf or .svg file.

    Raises:
        SettingsError: see `check_plot`; or no row was measured.
    """
    check_plot(path)
    if not found["rows"]:
        raise SettingsError(f"picture {path}: nothing was measured, so there is nothing to draw")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5.2), layout="constrained")
    latency, throughput, roofline = figure.subplots(1, 3)
    names = list(dict.fromkeys(row["name"] for row in found["rows"]))
    _latency(latency, found, names)
    _throughput(throughput, found, names)
    _roofline(roofline, found, names)
    for axes in (latency, throughput, roofline):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3, which="major")
        axes.set_axisbelow(True)
    handles, labels = throughput.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(names), 5), frameon=False)
    stage_2 = "stage 2 included" if found["enhance"] else "without stage 2"
    figure.suptitle(
        f"{found['device']} · {found['bundle']['name']}, {found['size_px']} px · image: {found['sampler']}, "
        f"{step_count(found['steps'])}, {stage_2} · {found['conditions']['started'][:10]}",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)


def _style(names: list[str], name: str) -> dict[str, Any]:
    number = names.index(name)
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def _latency(axes: Any, found: dict[str, Any], names: list[str]) -> None:
    """Bars: median time of one denoiser call per image, by runner and batch size; the thin line ends at the p95."""
    batches = sorted({row["batch"] for row in found["rows"]})
    height = 0.8 / len(batches)
    for row in found["rows"]:
        y = names.index(row["name"]) + height * (batches.index(row["batch"]) - (len(batches) - 1) / 2)
        step, p95 = row["step_ms"] / row["batch"], row["step_ms_p95"] / row["batch"]
        colour = _style(names, row["name"])["color"]
        axes.barh(y, step, height * 0.9, color=colour, alpha=0.85, xerr=[[0], [p95 - step]], ecolor="#333333")
        axes.annotate(
            f"{step:.3g}  (batch {row['batch']})",
            (p95, y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            size=8,
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.3)
    axes.set_xlabel("ms per step and image, median and p95")
    axes.set_title("Denoiser step")


def _throughput(axes: Any, found: dict[str, Any], names: list[str]) -> None:
    """Lines: whole images per second against batch size."""
    for name in names:
        rows = sorted((row for row in found["rows"] if row["name"] == name), key=lambda row: int(row["batch"]))
        x, y = [row["batch"] for row in rows], [row["images_per_second"] for row in rows]
        axes.plot(x, y, label=name, **_style(names, name))
    batches = sorted({row["batch"] for row in found["rows"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch size")
    axes.set_ylabel("images per second")
    axes.set_title(f"Whole images, {step_count(found['steps'])}")


def _roofline(axes: Any, found: dict[str, Any], names: list[str]) -> None:
    """Points: arithmetic rate of each row's step against its arithmetic per byte; lines: what the device reaches."""
    work = Work(**found["work_per_image"]["denoiser"])
    points = []
    for row in found["rows"]:
        intensity = work.intensity(row["batch"], VALUE_BYTES[row["precision"]])
        points.append(intensity)
        axes.plot(intensity, row["tflops"], **_style(names, row["name"]), markersize=8, markeredgecolor="white")
    bandwidth = found["copy_gb_s"] / 1e3  # TB/s: TFLOP/s per FLOP/byte
    rates = sorted(found["matmul_tflops"].items(), key=lambda item: float(item[1]))
    ridges = [rate / bandwidth for _, rate in rates]
    left, right = min(*points, ridges[0]) / 2, max(*points, ridges[-1]) * 2
    for (name, rate), ridge in zip(rates, ridges, strict=True):
        axes.plot([ridge, right], [rate, rate], color="#666666", linewidth=1)
        near = [other for other, value in rates if abs(value / rate - 1) < SAME_LINE]
        if name == near[0]:
            text = ", ".join(near)
            axes.annotate(text, (right, rate), xytext=(-2, 3), textcoords="offset points", ha="right", size=8)
    axes.plot([left, ridges[-1]], [left * bandwidth, rates[-1][1]], color="#666666", linewidth=1)
    axes.annotate("copies", (ridges[0], rates[0][1]), xytext=(6, -10), textcoords="offset points", size=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.set_xlabel("FLOP per byte, every layer's input and output counted once")
    axes.set_ylabel("TFLOP/s")
    axes.set_title("Denoiser step against measured ceilings")
