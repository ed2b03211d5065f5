"""Plot of a benchmark: time of a step, images per second by batch size, roofline."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bsdiff_rt.bench.flops import VALUE_BYTES, Work
from bsdiff_rt.config import step_count
from bsdiff_rt.errors import SettingsError

# Okabe and Ito's colours, which people with any colour vision can tell apart. The first part of a row's name that is
# listed here decides, so a runner has the same colour in every plot; markers tell its precisions apart.
COLOURS = {
    "onnxruntime": "#0072B2",
    "aoti": "#D55E00",
    "tensorrt-rtx": "#F0E442",
    "tensorrt": "#009E73",
    "openvino": "#CC79A7",
    "published": "#56B4E9",
    "diffusers": "#E69F00",
    "eager": "#000000",
}
OTHER_COLOUR = "#999999"
MARKERS = {"fp32": "o", "bf16": "s", "fp16": "D"}
SAME_LINE = 0.1  # rates closer than this share one label


def check_plot(path: Path) -> None:
    """Check a path for a plot before anything is measured.

    Raises:
        SettingsError: matplotlib is not installed, the folder does not exist, or the name has no picture format.
    """
    if find_spec("matplotlib") is None:
        raise SettingsError(f"plot {path}: needs matplotlib, which is not installed; `pip install matplotlib`")
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise SettingsError(f"plot {path}: name a .png, .pdf or .svg file")
    if not path.absolute().parent.is_dir():
        raise SettingsError(f"plot {path}: there is no folder {path.parent}")


def draw_plot(document: dict[str, Any], path: Path) -> None:
    """Write the plot.

    Args:
        document: `Document.to_dict()`, or the content of its JSON file.
        path: a .png, .pdf or .svg file.

    Raises:
        SettingsError: as `check_plot`, or no row was measured.
    """
    check_plot(path)
    if not document["rows"]:
        raise SettingsError(f"plot {path}: nothing was measured, so there is nothing to draw")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5.2), layout="constrained")
    latency, throughput, roofline = figure.subplots(1, 3)
    names = list(dict.fromkeys(row["name"] for row in document["rows"]))
    _draw_latency(latency, document, names)
    _draw_throughput(throughput, document, names)
    _draw_roofline(roofline, document)
    for axes in (latency, throughput, roofline):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3, which="major")
        axes.set_axisbelow(True)
    handles, labels = throughput.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(names), 5), frameon=False)
    stage_2 = "with stage 2" if document["enhance"] else "without stage 2"
    figure.suptitle(
        f"{document['device']} · {document['bundle']['name']}, {document['size_px']} px · image: "
        f"{document['sampler']}, {step_count(document['steps'])}, {stage_2} · {document['conditions']['started'][:10]}",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)


def choose_style(row: dict[str, Any]) -> dict[str, Any]:
    """Return matplotlib's colour and marker for a row: the colour by runner or peer, the marker by precision."""
    colour = next((colour for name, colour in COLOURS.items() if row["name"].startswith(name)), None)
    return {"color": colour or COLOURS.get(row.get("runner", ""), OTHER_COLOUR), "marker": MARKERS[row["precision"]]}


def choose_ceilings(document: dict[str, Any]) -> list[tuple[str, float]]:
    """Return the matrix product rates to draw, in TFLOP/s by rising rate. A CPU has no fp16 line."""
    on_cpu = document["conditions"].get("device", "").startswith("cpu")
    rates = [(name, float(rate)) for name, rate in document["matmul_tflops"].items() if not (on_cpu and name == "fp16")]
    return sorted(rates, key=lambda item: item[1])


def _draw_latency(axes: Any, document: dict[str, Any], names: list[str]) -> None:
    """Draw bars of the median time of one denoiser call per image; the thin line ends at the p95."""
    batches = sorted({row["batch"] for row in document["rows"]})
    height = 0.8 / len(batches)
    for row in document["rows"]:
        y = names.index(row["name"]) + height * (batches.index(row["batch"]) - (len(batches) - 1) / 2)
        step, p95 = row["step_ms"] / row["batch"], row["step_ms_p95"] / row["batch"]
        colour = choose_style(row)["color"]
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


def _draw_throughput(axes: Any, document: dict[str, Any], names: list[str]) -> None:
    """Draw whole images per second against batch size."""
    for name in names:
        rows = sorted((row for row in document["rows"] if row["name"] == name), key=lambda row: int(row["batch"]))
        x, y = [row["batch"] for row in rows], [row["images_per_second"] for row in rows]
        axes.plot(x, y, label=name, **choose_style(rows[0]))
    batches = sorted({row["batch"] for row in document["rows"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch size")
    axes.set_ylabel("images per second")
    axes.set_title(f"Whole images, {step_count(document['steps'])}")


def _list_parts(document: dict[str, Any]) -> list[tuple[str, float]]:
    """Return each kind of work with its FLOP per byte, for the smallest batch and the precision of the fastest row."""
    row = min(document["rows"], key=lambda row: (row["batch"], row["step_ms"]))
    value_bytes = VALUE_BYTES[row["precision"]]
    parts = [(kind, Work(**part)) for kind, part in document.get("work_parts", {}).items()]
    return [(kind, part.intensity(row["batch"], value_bytes)) for kind, part in parts if part.flop]


def _draw_roofline(axes: Any, document: dict[str, Any]) -> None:
    """Draw the arithmetic rate of each row against its arithmetic per byte, and the measured rates of the device.

    Dotted lines show where attention, convolutions and the rest of a step would lie on their own.
    """
    work = Work(**document["work_per_image"]["denoiser"])
    points = []
    for row in document["rows"]:
        intensity = work.intensity(row["batch"], VALUE_BYTES[row["precision"]])
        points.append(intensity)
        axes.plot(intensity, row["tflops"], **choose_style(row), markersize=8, markeredgecolor="white")
    parts = _list_parts(document)
    points += [intensity for _, intensity in parts]
    bandwidth = document["copy_gb_s"] / 1e3  # TB/s: TFLOP/s per FLOP/byte
    rates = choose_ceilings(document)
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
    for number, (kind, intensity) in enumerate(parts):
        axes.axvline(intensity, color="#666666", linewidth=1, linestyle=":")
        axes.annotate(
            kind,
            (intensity, 0.02 + 0.2 * number),
            xycoords=("data", "axes fraction"),
            xytext=(3, 0),
            textcoords="offset points",
            rotation=90,
            va="bottom",
            size=8,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.set_xlabel("FLOP per byte, every layer's input and output counted once")
    axes.set_ylabel("TFLOP/s")
    axes.set_title("Denoiser step against measured ceilings")
