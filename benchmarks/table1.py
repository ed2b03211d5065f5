"""The paper's Tables 1 and 2 for any data set: BS-Diff against other networks, and with and without stage 2.

    python -m benchmarks.table1 DATASET --bundle BUNDLE --comparators RUN --json table1.json

DATASET is a folder made by `python -m train prepare` (its test part is judged), or any folder of NAME_cxr.png and
NAME_soft_tissue.png. Every NAME.onnx in --comparators, written by `python -m train comparator`, is a row; so is the
untouched X-ray. BS-Diff makes the pictures that `infer` writes with the bundle's defaults; Table 1 has stage 2 as the
bundle has it. A comparator sees what BS-Diff sees of each X-ray, once, and its picture is judged without detail of the
X-ray. All pictures are judged with their longer side at the size of the networks, in [0, 1].
95 % intervals are percentiles of 1000 bootstrap samples of patients. Below each row stand the paper's values, on data
of its own: its bone suppression ratio is set below the release's, the form its published code computes.
"""

from __future__ import annotations

import json
import platform
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

from benchmarks.quality import resize_longer, run_stages, write
from bsdiff_rt.bundle import Manifest, open_bundle
from bsdiff_rt.config import Preprocessing, SamplerName, step_count
from bsdiff_rt.engines.select import load
from bsdiff_rt.errors import BsdiffError, SettingsError, one_line, run_command
from bsdiff_rt.formats import read
from bsdiff_rt.formats.radiograph import Radiograph, grey_digest
from bsdiff_rt.formats.raster import find_pairs, read_together
from bsdiff_rt.imaging.metrics import Quality, mean_quality, quality
from bsdiff_rt.imaging.network_input import resize
from bsdiff_rt.imaging.one_image import Prepared, finish, prepare
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.devices import resolve_device
from bsdiff_rt.sampling.noise import ImageNoise
from bsdiff_rt.sampling.schedule import Table, sampler_table

DATASET_FILE, DATASET_BITS = "dataset.json", 16  # what `python -m train prepare` writes
RESAMPLES, LEVEL = 1000, 0.95
UNTOUCHED, STAGE_1, BOTH = "untouched X-ray", "BS-Diff, stage 1 alone", "BS-Diff"
TITLES = {"resnet-bs": "ResNet-BS", "gusarev": "Gusarev", "mca-net": "MCA-Net"}  # of the files of `train comparator`
COLUMNS = (("bsr", 3), ("bsr_release", 3), ("mse", 4), ("ssim", 3), ("psnr", 2))
# Chen et al., "BS-Diff: Effective bone suppression using conditional diffusion models from chest X-ray images", ISBI
# 2024 (arXiv 2311.15328), Tables 1 and 2.
PUBLISHED = {
    BOTH: {"bsr_release": 0.988, "mse": 0.0002, "ssim": 0.937, "psnr": 38.249},
    STAGE_1: {"bsr_release": 0.796, "mse": 0.0029, "ssim": 0.893, "psnr": 29.528},
}

Image = NDArray[np.float32]
Predict = Callable[["Case"], dict[str, tuple[Image, float]]]  # by row: soft tissue, [H, W] in [0, 1], and seconds

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Case:
    """One pair to judge on.

    Attributes:
        patient: whose it is.
        prepared: the X-ray, ready for the model.
        soft_tissue: the truth, [H, W], float32, in [0, 1].
        noise_key: digest of the X-ray's pixels, which keys its noise as in `infer`.
        digest: the X-ray's name in a bundle's `trained_on`.
    """

    patient: str
    prepared: Prepared
    soft_tissue: Image
    noise_key: bytes
    digest: str


@app.command()
def main(
    dataset: Annotated[Path, typer.Argument(help="Folder of `train prepare`, or of pairs.")],
    bundle: Annotated[str, typer.Option(help="BS-Diff: a bundle's name or folder.")] = "demo",
    comparators: Annotated[Path | None, typer.Option(help="Folder of NAME.onnx; each is a row.")] = None,
    part: Annotated[str, typer.Option(help="Part of a prepared data set: train, val or test.")] = "test",
    sampler: Annotated[SamplerName | None, typer.Option(help="Sampler.", show_default="the bundle's")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps.", show_default="the bundle's")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of noise and bootstrap.")] = 0,
    output: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
) -> None:
    """Print both tables."""
    model, where = open_bundle(bundle), resolve_device(device)
    manifest = model.manifest
    settings, mirror = manifest.sampler, manifest.mirror
    settings = replace(settings, name=sampler or settings.name, steps=steps or settings.steps)
    cases = read_cases(dataset, part, model.manifest.preprocessing)
    head: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "bundle": model.identity, "torch": torch.__version__}
    head |= {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads", "device": str(where)}
    head |= {"sampler": asdict(settings), "mirror": mirror}
    head |= {"images": len(cases), "seed": seed}
    if output:  # refuses a place that cannot be written before anything is judged
        write(output, head | {"rows": []})
    rows = judge(lambda case: {UNTOUCHED: (case.prepared.cxr, 0.0)}, cases, seed)
    known = {BOTH: warn_of_training_images(BOTH, manifest.training.get("trained_on", ()), cases)}
    networks = sorted(comparators.glob("*.onnx")) if comparators else []
    if comparators and not networks:
        raise SettingsError(f"--comparators {comparators}: no NAME.onnx there; `python -m train comparator` writes it")
    for path in networks:
        rows += (found := judge(comparator(path, where), cases, seed))
        known[found[0]["name"]] = warn_of_training_images(found[0]["name"], trained_on(path), cases)
    table = sampler_table(model.manifest.schedule, settings.name, settings.steps)
    with load(model, "auto", where) as runner:
        kind, shortest = runner.name, sampler_table(model.manifest.schedule, settings.name, 1)
        bs_diff(runner, shortest, seed, manifest)(cases[0])  # the first call pays for what later ones find made
        rows += judge(bs_diff(runner, table, seed, manifest), cases, seed)
    print(f"{len(cases)} images of {len({case.patient for case in cases})} patients, {settings.name} in", end=" ")
    print(f"{step_count(settings.steps)}{', mirror images averaged in' if mirror else ''}", end="")
    print(f", {kind} on {where}; ", end="")
    print("brackets: 95 % interval over patients; second line: the paper")
    print_table("Table 1: methods", [row for row in rows if row["name"] != (STAGE_1 if manifest.enhance else BOTH)])
    print_table("Table 2: stages", [row for row in rows if row["name"] in (STAGE_1, BOTH)])
    if output:
        write(output, head | {"runner": kind, "images_trained_on": known, "rows": rows})


def read_cases(folder: Path, part: str, prep: Preprocessing) -> list[Case]:
    """The pairs of one part of a prepared data set, or of a plain folder, where each counts as a patient.

    Pictures of a prepared data set are equalised already: they are only brought to the networks' size.

    Raises:
        SettingsError: no pair there, one without its soft tissue, or a damaged record.
        InputRefused, InputFailed: a file that cannot be read.
    """
    record = folder / DATASET_FILE
    prepared = record.is_file()
    if prepared:
        try:
            found = [entry for entry in json.loads(record.read_text())["pairs"] if entry["part"] == part]
        except (ValueError, KeyError, TypeError) as error:
            raise SettingsError(f"{record}: not the record of a data set ({type(error).__name__})") from None
        if not found:
            raise SettingsError(f"{folder}: no pairs in {part}")
        stems = [(entry["patient"], folder / part / entry["name"]) for entry in found]
        files = [(patient, Path(f"{stem}_cxr.png"), Path(f"{stem}_soft_tissue.png")) for patient, stem in stems]
        digests = [entry.get("digest") for entry in found]
        prep = replace(prep, clahe_clip_limit=0.0)
    else:
        files = find_pairs(folder)
        digests = [None] * len(files)
    cases = []
    for (patient, *paths), known in zip(files, digests, strict=True):
        pair = [read_prepared(path) for path in paths] if prepared else read_together(paths)
        cxr, soft_tissue = pair[0].cxr, resize(pair[1].cxr, pair[0].cxr.shape)
        digest = known or grey_digest(cxr).hex()[:16]  # train/data.py does the same
        cases.append(Case(patient, prepare(cxr, prep), soft_tissue, pair[0].pixel_digest, digest))
    return cases


def read_prepared(path: Path) -> Radiograph:
    """Read one picture of a prepared data set, which has all 16 bits. A refusal names the file."""
    try:
        return read(path, least_bits=DATASET_BITS)
    except BsdiffError as error:
        raise type(error)(f"{path}: {error}") from error


def warn_of_training_images(name: str, trained_on: Iterable[str], cases: list[Case]) -> int:
    """How many of the cases a network learned from: what it says of them is no measure of others."""
    known = set(trained_on)
    count = sum(case.digest in known for case in cases)
    if count:
        print(f"{name} was trained on {count} of the {len(cases)} images")
    return count


def trained_on(network: Path) -> Iterable[str]:
    """The X-rays a comparator learned from, by the checkpoint beside it; none where there is none, or an older one."""
    checkpoint = network.with_suffix(".pt")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True) if checkpoint.is_file() else {}
    return state.get("trained_on") or ()


def bs_diff(runner: Runner, table: Table, seed: int, manifest: Manifest) -> Predict:
    """Return BS-Diff as a function of a case. It gives two rows; stage 1 runs once for both."""

    def predict(case: Case) -> dict[str, tuple[Image, float]]:
        results = run_stages(runner, table, case.prepared, ImageNoise(seed, case.noise_key), manifest.mirror)
        return {
            name: (finish(case.prepared, passes, mirror=manifest.mirror).soft_tissue, taken)
            for name, (passes, taken) in zip((STAGE_1, BOTH), results, strict=True)
        }

    return predict


def comparator(path: Path, device: torch.device) -> Predict:
    """A network of one input in an ONNX file: its row.

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

    def predict(case: Case) -> dict[str, tuple[Image, float]]:
        cxr_net = case.prepared.cxr_net
        if cxr_net.shape != (size, size):
            raise SettingsError(f"{path}: made for images of {size} px, the bundle's are {cxr_net.shape[0]} px")
        started = time.perf_counter()
        (out,) = session.run(None, {"cxr": cxr_net[None, None]})
        taken = time.perf_counter() - started
        soft_tissue = finish(case.prepared, np.clip(out[0], -1, 1), mirror=False, detail="model").soft_tissue
        return {TITLES.get(path.stem, path.stem): (soft_tissue, taken)}

    return predict


def judge(predict: Predict, cases: list[Case], seed: int) -> list[dict[str, Any]]:
    """One row per prediction: means over images, intervals over patients, median seconds."""
    found: dict[str, list[tuple[Quality, float]]] = {}
    for case in cases:
        cxr, size = case.prepared.cxr, case.prepared.placement.size
        for name, (image, seconds) in predict(case).items():
            figures = quality(*(resize_longer(one, size) for one in (cxr, case.soft_tissue, image)))
            found.setdefault(name, []).append((figures, seconds))
    patients = [case.patient for case in cases]
    rows = []
    for name, judged in found.items():
        rows_of = [one.as_dict() for one, _ in judged]
        intervals = {key: interval([one[key] for one in rows_of], patients, seed) for key in rows_of[0]}
        mean = mean_quality([one for one, _ in judged]).as_dict()
        seconds = float(np.median([second for _, second in judged]))
        rows.append({"name": name, **mean, "seconds": seconds, "intervals": intervals, "paper": PUBLISHED.get(name)})
    return rows


def interval(values: list[float], patients: list[str], seed: int) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean over images when patients are drawn; None for a single patient."""
    _, owner = np.unique(patients, return_inverse=True)
    sums, counts = np.bincount(owner, values), np.bincount(owner)
    if len(counts) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(len(counts), size=(RESAMPLES, len(counts)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """The rows as text, the paper's values below each."""
    print(f"\n{title}")
    heads = ("BSR (Yang)", "BSR (release)", "MSE", "SSIM", "PSNR, dB")
    print(f"{'':24}" + "".join(f"{head:>26}" for head in heads) + f"{'s per image':>13}")
    for row in rows:
        cells = []
        for key, digits in COLUMNS:
            between = row["intervals"][key]
            brackets = f" [{between[0]:.{digits}f}, {between[1]:.{digits}f}]" if between else ""
            cells.append(f"{row[key]:.{digits}f}{brackets}")
        print(f"{row['name']:24}" + "".join(f"{cell:>26}" for cell in cells) + f"{row['seconds']:13.3f}")
        paper = row["paper"] or {}
        print(f"{'  paper':24}" + "".join(f"{paper.get(key, '-'):>26}" for key, _ in COLUMNS))


def run() -> None:
    """Entry point: our errors become one line and their exit code."""
    run_command(app)


if __name__ == "__main__":
    run()
