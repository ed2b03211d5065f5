"""The paper's Tables 1 and 2 for any data set: BS-Diff against other methods, and with and without stage 2.

    python -m benchmarks.table1 DATASET --bundle BUNDLE --comparators RUN --method NAME=FOLDER --json table1.json

DATASET is a folder of `python -m train prepare`, whose test part is judged, or a folder of pairs NAME_cxr.* and
NAME_soft_tissue.*. The rows are:

- the untouched X-ray;
- every NAME.onnx in --comparators, written by `python -m train comparator`. It gets the model's input of each X-ray
  once, and its output is enlarged without fine detail from the X-ray;
- every --method: a folder with the results of any program, with the stems of the X-rays;
- BS-Diff as `infer` writes it with the bundle's defaults. Table 1 has stage 2 if the bundle has it on.

All images are judged with their longer side at the size of the model's images, in [0, 1]. The 95 % intervals are
percentiles of 1000 bootstrap samples of patients. The row below a method has the paper's values, measured on other
data. Its bone suppression ratio (BSR) is that of the published code, so it stands in the column "BSR as published".
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime as ort
import torch
import typer
from numpy.typing import NDArray

from benchmarks.cases import Case, count_training_images, read_cases
from benchmarks.documents import describe_run, write_json
from benchmarks.methods import match_results, parse_methods, read_picture
from benchmarks.quality import resize_longer, run_stages
from bsdiff_rt import tables
from bsdiff_rt.bundle import Bundle, open_bundle
from bsdiff_rt.config import SamplerName, SamplerSettings, step_count
from bsdiff_rt.engines.select import load
from bsdiff_rt.errors import SettingsError, one_line, run_command
from bsdiff_rt.imaging.metrics import Quality, mean_quality, quality
from bsdiff_rt.imaging.network_input import resize
from bsdiff_rt.imaging.one_image import finish
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.devices import resolve_device
from bsdiff_rt.sampling.noise import ImageNoise
from bsdiff_rt.sampling.schedule import Table, sampler_table

RESAMPLES, LEVEL = 1000, 0.95
LARGEST_ASPECT_CHANGE = 1.02  # between an X-ray and a method's result
UNTOUCHED, STAGE_1, BOTH = "untouched X-ray", "BS-Diff, stage 1 alone", "BS-Diff"
TITLES = {"resnet-bs": "ResNet-BS", "gusarev": "Gusarev", "mca-net": "MCA-Net"}  # by file of `train comparator`
COLUMNS = (("bsr", 3), ("bsr_tone_matched", 3), ("bsr_release", 3), ("mse", 4), ("ssim", 3), ("psnr", 2))
HEADER = ("method", "BSR (Yang)", "BSR tone-matched", "BSR as published", "MSE", "SSIM", "PSNR dB", "s per image")
# Chen et al., "BS-Diff: Effective bone suppression using conditional diffusion models from chest X-ray images", ISBI
# 2024 (arXiv 2311.15328), Tables 1 and 2.
PUBLISHED = {
    BOTH: {"bsr_release": 0.988, "mse": 0.0002, "ssim": 0.937, "psnr": 38.249},
    STAGE_1: {"bsr_release": 0.796, "mse": 0.0029, "ssim": 0.893, "psnr": 29.528},
}

Image = NDArray[np.float32]


@dataclass(frozen=True)
class Prediction:
    """A method's result for one case.

    Attributes:
        soft_tissue: [H, W], float32, in [0, 1], of the X-ray's aspect ratio.
        seconds: time it took; None if it is not known.
    """

    soft_tissue: Image
    seconds: float | None = None


Predict = Callable[[Case], dict[str, Prediction]]  # by name of the row

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    dataset: Annotated[Path, typer.Argument(help="Folder of `train prepare`, or of pairs.")],
    bundle: Annotated[str, typer.Option(help="BS-Diff: demo, or a bundle's folder.")] = "demo",
    comparators: Annotated[
        Path | None, typer.Option(help="Folder of NAME.onnx from `train comparator`; each file is a row.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="Results of another program, one row. Repeat it for several."),
    ] = None,
    part: Annotated[str, typer.Option(help="Part of a prepared data set: train, val or test.")] = "test",
    sampler: Annotated[SamplerName | None, typer.Option(help="Sampler.", show_default="the bundle's")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoiser steps.", show_default="the bundle's")] = None,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(help="Random seed of the noise and of the bootstrap.")] = 0,
    output: Annotated[Path | None, typer.Option("--json", help="Write the rows to a JSON file.")] = None,
) -> None:
    """Print both tables."""
    model, where = open_bundle(bundle), resolve_device(device)
    manifest = model.manifest
    settings = replace(
        manifest.sampler, name=sampler or manifest.sampler.name, steps=steps or manifest.sampler.steps, seed=seed
    )
    cases = read_cases(dataset, part, manifest.preprocessing)
    head = describe_run(model, where) | {"sampler": asdict(settings), "mirror": manifest.mirror}
    head |= {"images": len(cases), "seed": seed}
    networks = list_networks(comparators) if comparators else []
    methods = load_methods(method or [], cases)
    if output:  # refuses a path that cannot be written before anything is judged
        write_json(output, head | {"rows": []})
    rows = judge(lambda case: {UNTOUCHED: Prediction(case.prepared.cxr)}, cases, seed)
    known = {BOTH: report_training_images(BOTH, manifest.training.get("trained_on", ()), cases)}
    for path in networks:
        rows += (found := judge(load_comparator(path, where), cases, seed))
        known[found[0]["name"]] = report_training_images(found[0]["name"], read_trained_on(path), cases)
    for predict in methods:
        rows += judge(predict, cases, seed)
    found, kind = judge_bs_diff(model, settings, where, cases)
    rows += found
    patients = len({case.patient for case in cases})
    mirrored = ", mirrored X-ray averaged in" if manifest.mirror else ""
    print(f"data: {len(cases)} images of {patients} patients")
    print(f"BS-Diff: {settings.name}, {step_count(settings.steps)}{mirrored}, {kind} on {where}")
    print("[low, high]: 95 % interval over patients; paper: published values, on other data")
    print_rows("Table 1: methods", [row for row in rows if row["name"] != (STAGE_1 if manifest.enhance else BOTH)])
    print_rows("Table 2: stages", [row for row in rows if row["name"] in (STAGE_1, BOTH)])
    if output:
        write_json(output, head | {"runner": kind, "images_trained_on": known, "rows": rows})


def list_networks(folder: Path) -> list[Path]:
    """Return the comparators' files in a folder, sorted by name.

    Raises:
        SettingsError: there is none.
    """
    if networks := sorted(folder.glob("*.onnx")):
        return networks
    raise SettingsError(f"{folder}: no NAME.onnx; `python -m train comparator` writes one", setting="comparators")


def load_methods(texts: list[str], cases: list[Case]) -> list[Predict]:
    """Return other programs' results as functions of a case. Every result is found before anything is judged.

    Args:
        texts: values of `--method`.
        cases: the pairs.

    Raises:
        SettingsError: a value that is not NAME=FOLDER, a name of a built-in row, or a missing result.
    """
    found = []
    for name, folder in parse_methods(texts).items():
        if name in (UNTOUCHED, STAGE_1, BOTH, *TITLES.values()):
            raise SettingsError(f"{name}: this row exists; choose another name", setting="method")
        found.append(_load_method(name, match_results(folder, [case.name for case in cases])))
    return found


def _load_method(name: str, files: dict[str, Path]) -> Predict:
    def predict(case: Case) -> dict[str, Prediction]:
        image = read_picture(files[case.name], case.bits_stored).cxr
        ours, theirs = (shape[0] / shape[1] for shape in (case.prepared.cxr.shape, image.shape))
        if not 1 / LARGEST_ASPECT_CHANGE < ours / theirs < LARGEST_ASPECT_CHANGE:
            raise SettingsError(
                f"{files[case.name]}: {image.shape[0]} x {image.shape[1]} px has another aspect ratio than its X-ray"
            )
        return {name: Prediction(image)}

    return predict


def report_training_images(name: str, trained_on: Iterable[str], cases: list[Case]) -> int:
    """Return how many of the cases a method was trained on, and print it if there are any."""
    count = count_training_images(trained_on, cases)
    if count:
        print(f"{name} was trained on {count} of the {len(cases)} images")
    return count


def read_trained_on(network: Path) -> Iterable[str]:
    """Return digests of the X-rays that a comparator was trained on, from the checkpoint beside it.

    Empty if there is no checkpoint, or an older one without digests.
    """
    checkpoint = network.with_suffix(".pt")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True) if checkpoint.is_file() else {}
    return state.get("trained_on") or ()


def judge_bs_diff(
    model: Bundle, settings: SamplerSettings, device: torch.device, cases: list[Case]
) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of BS-Diff without and with stage 2, and the name of the runner."""
    schedule, manifest = model.manifest.schedule, model.manifest
    table = sampler_table(schedule, settings.name, settings.steps)
    with load(model, "auto", device) as runner:
        warm_up = make_bs_diff(runner, sampler_table(schedule, settings.name, 1), settings.seed, mirror=manifest.mirror)
        warm_up(cases[0])
        predict = make_bs_diff(runner, table, settings.seed, mirror=manifest.mirror)
        return judge(predict, cases, settings.seed), runner.name


def make_bs_diff(runner: Runner, table: Table, seed: int, *, mirror: bool) -> Predict:
    """Return BS-Diff as a function of a case. It gives two rows; stage 1 runs once for both."""

    def predict(case: Case) -> dict[str, Prediction]:
        results = run_stages(runner, table, case.prepared, ImageNoise(seed, case.noise_key), mirror)
        return {
            name: Prediction(finish(case.prepared, passes, mirror=mirror).soft_tissue, seconds)
            for name, (passes, seconds) in zip((STAGE_1, BOTH), results, strict=True)
        }

    return predict


def load_comparator(path: Path, device: torch.device) -> Predict:
    """Return a network in an ONNX file as a function of a case.

    Args:
        path: a graph with one input `cxr` and one output, [B, 1, S, S], in [-1, 1].
        device: where to run.

    Raises:
        SettingsError: ONNX Runtime cannot run it on that device.
    """
    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    where = {"device_id": device.index or 0} if device.type == "cuda" else {}
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(path, options, providers=[(provider, where)])
        if provider not in session.get_providers():
            raise RuntimeError(f"ONNX Runtime has no {provider} here")
        size = session.get_inputs()[0].shape[-1]
        session.run(None, {"cxr": np.zeros((1, 1, size, size), np.float32)})
    except Exception as error:  # ONNX Runtime's own exceptions share no base class
        raise SettingsError(f"{path}: {one_line(error)}") from error

    def predict(case: Case) -> dict[str, Prediction]:
        cxr_net = case.prepared.cxr_net
        if cxr_net.shape != (size, size):
            raise SettingsError(f"{path}: made for images of {size} px, the bundle's are {cxr_net.shape[0]} px")
        started = time.perf_counter()
        (out,) = session.run(None, {"cxr": cxr_net[None, None]})
        seconds = time.perf_counter() - started
        soft_tissue = finish(case.prepared, np.clip(out[0], -1, 1), mirror=False, detail="model").soft_tissue
        return {TITLES.get(path.stem, path.stem): Prediction(soft_tissue, seconds)}

    return predict


def judge(predict: Predict, cases: list[Case], seed: int) -> list[dict[str, Any]]:
    """Return one row for each prediction: means over images, intervals over patients, median seconds.

    Args:
        predict: the method.
        cases: the pairs.
        seed: of the bootstrap.
    """
    found: dict[str, list[tuple[Quality, float | None]]] = {}
    for case in cases:
        cxr = resize_longer(case.prepared.cxr, case.prepared.placement.size)
        soft_tissue = resize(case.soft_tissue, cxr.shape)
        for name, one in predict(case).items():
            figures = quality(cxr, soft_tissue, resize(one.soft_tissue, cxr.shape))
            found.setdefault(name, []).append((figures, one.seconds))
    patients = [case.patient for case in cases]
    rows = []
    for name, judged in found.items():
        figures_by_image = [one.as_dict() for one, _ in judged]
        intervals = {
            key: bootstrap_interval([one[key] for one in figures_by_image], patients, seed)
            for key in figures_by_image[0]
        }
        means = mean_quality([one for one, _ in judged]).as_dict()
        mean = {key: value if math.isfinite(value) else None for key, value in means.items()}  # JSON has no infinity
        times = [seconds for _, seconds in judged if seconds is not None]
        seconds = float(np.median(times)) if times else None
        rows.append({"name": name, **mean, "seconds": seconds, "intervals": intervals, "paper": PUBLISHED.get(name)})
    return rows


def bootstrap_interval(values: list[float], patients: list[str], seed: int) -> tuple[float, float] | None:
    """Return the percentile bootstrap interval of the mean over images, with patients drawn.

    Args:
        values: one for each image.
        patients: the patient of each image.
        seed: of the bootstrap.

    Returns:
        The limits of the 95 % interval; None for a single patient or values that are not finite.
    """
    _, owner = np.unique(patients, return_inverse=True)
    sums, counts = np.bincount(owner, values), np.bincount(owner)
    if len(counts) < 2 or not np.isfinite(sums).all():
        return None
    drawn = np.random.default_rng(seed).integers(len(counts), size=(RESAMPLES, len(counts)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Print a table with a row for each method, and the paper's values below it if there are any."""
    lines = []
    for row in rows:
        cells = [write_figure(row[key], row["intervals"][key], digits) for key, digits in COLUMNS]
        lines.append([row["name"], *cells, "-" if row["seconds"] is None else f"{row['seconds']:.3f}"])
        if row["paper"]:
            lines.append(["  paper", *(str(row["paper"].get(key, "-")) for key, _ in COLUMNS), "-"])
    print(f"\n{title}")
    tables.print_table(HEADER, lines)


def write_figure(value: float | None, interval: tuple[float, float] | None, digits: int) -> str:
    """Return a mean with its interval as text; `-` if the mean is not finite."""
    if value is None:
        return "-"
    limits = f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""
    return f"{value:.{digits}f}{limits}"


def run() -> None:
    """Run the command; an error of this project becomes one line and its exit code."""
    run_command(app)


if __name__ == "__main__":
    run()
