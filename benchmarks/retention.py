"""What a model keeps of what is not bone: nodules, vessels, lines and other inserts put into X-rays.

    python -m train phantoms PHANTOMS --count 20 --size 512
    python -m benchmarks.retention phantoms=PHANTOMS xrays=FOLDER --json retention.json --picture worst.png

A folder holds X-rays, or pairs NAME_cxr.* and NAME_soft_tissue.*, whose bone layer tells ribs from what lies between.
Inserts are drawn at random places, several in a picture, and each X-ray is processed without and with them:

    kept = <response, insert> / <insert, insert>,  response = result with the insert - result without it

1 is an insert that stays as it was, 0 one that went away with the bones. `gain` is the gain in contrast to noise: kept
times the standard deviation around the insert in the X-ray, over that in the result. What other programs make of the
same pictures is judged with --method: `--write-inputs DIR` writes them, the program writes its results as
RESULTS/SET/NAME.png under the same names, and `--method NAME=RESULTS` reads them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.cases import Case as TableCase
from benchmarks.documents import write_json
from benchmarks.retention_cases import PLAN, Case, Image, Wanted, Xray, place_inserts
from benchmarks.retention_report import UNTOUCHED, Kept, print_rows, summarise, write_picture
from benchmarks.table1 import load_comparator
from bsdiff_rt import __version__, formats
from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.config import InferSettings, Preprocessing
from bsdiff_rt.errors import BsdiffError, SettingsError, run_command
from bsdiff_rt.folder.pipeline import Inference
from bsdiff_rt.formats.raster import read_raster, write_png
from bsdiff_rt.imaging.network_input import resize
from bsdiff_rt.imaging.one_image import prepare
from bsdiff_rt.runners.devices import resolve_device

BITS = 16
CXR, TRUTH = "_cxr", "_soft_tissue"
RING = 8.0  # mm around an insert where noise is measured

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Subject:
    """One X-ray of a set and the inserts for it."""

    group: str
    xray: Xray
    cases: list[Case]

    def file(self, number: int | None) -> str:
        """Return the relative path of its picture without inserts (None), or of a round of inserts."""
        return f"{self.group}/{self.xray.name}{'' if number is None else f'_inserts{number:02d}'}.png"

    def picture(self, number: int | None) -> Image:
        """Return the X-ray without inserts (None) or with those of a round."""
        image = self.xray.cxr.copy()
        for case in self.cases:
            if case.round == number:
                image[case.rows, case.columns] += case.insert
        return image

    def rounds(self) -> list[int]:
        """Return the numbers of its rounds."""
        return sorted({case.round for case in self.cases})


@app.command()
def main(
    sets: Annotated[list[str], typer.Argument(help="NAME=FOLDER of X-rays or pairs; repeatable.")],
    bundle: Annotated[list[str] | None, typer.Option(help="Model to judge; repeatable. Default: demo.")] = None,
    comparators: Annotated[Path | None, typer.Option(help="Folder of NAME.onnx of `train comparator`.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER of finished results; repeatable.")] = None,
    write_inputs: Annotated[Path | None, typer.Option(help="Write the X-rays for other programs there; stop.")] = None,
    size: Annotated[int, typer.Option(min=0, help="Longer side of the X-rays, px; 0: as they are.")] = 512,
    field_mm: Annotated[float, typer.Option(min=1, help="What the longer side shows, mm.")] = 400.0,
    repeats: Annotated[int, typer.Option(min=1, help="Times every insert is put into each X-ray.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of places and intervals.")] = 0,
    output: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Write a picture of the ten worst nodules there.")] = None,
) -> None:
    """Print how much of each kind of insert is kept."""
    subjects = [
        one for entry in sets for one in read_subjects(*split_name(entry), size, field_mm, PLAN * repeats, seed)
    ]
    head: dict[str, Any] = {"bsdiff_rt": __version__, "date": time.strftime("%Y-%m-%d"), "size_px": size}
    head |= {"field_mm": field_mm, "repeats": repeats, "seed": seed}
    head |= {"images": {name: sum(one.group == name for one in subjects) for name in {s.group for s in subjects}}}
    if output:
        write_json(output, head | {"rows": []})
    with tempfile.TemporaryDirectory() as temporary:
        inputs = write_inputs or Path(temporary) / "inputs"
        write_pictures(subjects, inputs)
        if write_inputs:
            print(f"wrote the X-rays without and with inserts to {write_inputs}")
            return
        found: list[Kept] = []
        for name, folder in results(bundle or ["demo"], comparators, method or [], inputs, Path(temporary)):
            found += judge(name, folder, subjects)
        rows = summarise(found, seed)
        print_rows(rows)
        if picture:
            write_picture(picture, found)
    if output:
        write_json(output, head | {"rows": rows})


def split_name(entry: str) -> tuple[str, Path]:
    """Return name and folder of NAME=FOLDER.

    Raises:
        SettingsError: it is not of that form, or there is no such folder.
    """
    name, _, folder = entry.partition("=")
    if not name or not folder or Path(name).name != name:
        raise SettingsError(f"{entry}: give NAME=FOLDER")
    if not Path(folder).is_dir():
        raise SettingsError(f"{entry}: no such folder")
    return name, Path(folder)


def read_subjects(
    group: str, folder: Path, size: int, field_mm: float, plan: tuple[Wanted, ...], seed: int
) -> list[Subject]:
    """Read the X-rays of a folder, bring their longer side to `size` px, and place the inserts.

    Raises:
        SettingsError: no X-ray there.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and formats.is_candidate(path))
    truths = {path.stem.removesuffix(TRUTH): path for path in files if path.stem.endswith(TRUTH)}
    subjects: list[Subject] = []
    seen: dict[str, Path] = {}
    for path in (path for path in files if not path.stem.endswith(TRUTH)):
        name = path.stem.removesuffix(CXR)
        if name in seen:  # their pictures would replace each other
            raise SettingsError(f"{path} and {seen[name]} have the same stem. Give a folder with one of them.")
        seen[name] = path
        if name in truths:
            pictures = [picture.cxr for picture in formats.read_together([path, truths[name]], any_view=True)]
        else:
            pictures = [formats.read(path, any_view=True).cxr]
        scale = max(float(pictures[0].max()), 1e-6)
        if scale < 0.5:  # a 16-bit file that dark would be read as one of fewer bits
            pictures = [np.clip(image / scale, 0, 1) for image in pictures]
        pictures = [_at_size(image, size, pictures[0].shape) for image in pictures]
        cxr, truth = pictures[0], pictures[1] if len(pictures) > 1 else None
        xray = Xray(name, cxr, truth, field_mm / max(cxr.shape))
        rng = np.random.default_rng([seed, len(subjects)])
        subjects.append(Subject(group, xray, place_inserts(xray, plan, rng)))
    if not subjects:
        raise SettingsError(f"{folder}: no X-ray there")
    return subjects


def _at_size(image: Image, size: int, shape: tuple[int, ...]) -> Image:
    """Return the image with its longer side at `size` px (0: as it is), and as if it had `shape`."""
    scale = size / max(shape) if size else 1.0
    return np.clip(resize(image, (max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale)))), 0, 1)


def write_pictures(subjects: list[Subject], folder: Path) -> None:
    """Write every X-ray without and with its inserts."""
    for subject in subjects:
        for number in (None, *subject.rounds()):
            path = folder / subject.file(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(path, subject.picture(number), BITS)


def results(
    bundles: list[str], comparators: Path | None, methods: list[str], inputs: Path, work: Path
) -> Iterable[tuple[str, Path]]:
    """Yield name and folder of results of each method, the bundles' and comparators' made here."""
    yield UNTOUCHED, inputs
    for number, bundle in enumerate(bundles):
        output = work / f"bundle{number}"
        inference = Inference(InferSettings(output=output, bundle=bundle, any_view=True))
        report = inference.run(inference.find_tasks([inputs]))
        if failed := [entry for entry in report.files if entry.status != "ok"]:
            raise SettingsError(f"{len(failed)} of {len(report.files)} X-rays gave no result: {failed[0].reason}")
        yield open_bundle(bundle).manifest.name if len(bundles) == 1 else Path(bundle).name, output
    for path in sorted(comparators.glob("*.onnx")) if comparators else []:
        output = work / path.stem
        _run_comparator(path, inputs, output)
        yield path.stem, output
    for entry in methods:
        yield split_name(entry)


def _run_comparator(path: Path, inputs: Path, output: Path) -> None:
    """Write what a comparator makes of every picture."""
    predict = load_comparator(path, resolve_device("auto"))
    for source in sorted(inputs.rglob("*.png")):
        cxr = read_raster(source, BITS).cxr
        case = TableCase(source.stem, source.stem, prepare(cxr, Preprocessing()), cxr, BITS, b"", "")
        (prediction,) = predict(case).values()
        target = output / source.relative_to(inputs)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_png(target, prediction.soft_tissue, BITS)


def judge(method: str, folder: Path, subjects: list[Subject]) -> list[Kept]:
    """Return what a method kept of every insert.

    Raises:
        SettingsError: a result is missing, unreadable, or not of its X-ray's shape.
    """
    found = []
    for subject in subjects:
        plain = _read(folder / subject.file(None), subject.xray.cxr.shape)
        for number in subject.rounds():
            changed = _read(folder / subject.file(number), subject.xray.cxr.shape)
            for case in (case for case in subject.cases if case.round == number):
                found.append(_judge_case(method, subject, case, plain, changed))
    return found


def _read(path: Path, shape: tuple[int, ...]) -> Image:
    try:
        image = read_raster(path, BITS).cxr
    except BsdiffError as error:
        raise SettingsError(f"{path}: {error}; results need the names that --write-inputs wrote") from error
    if image.shape != shape:
        raise SettingsError(f"{path}: {image.shape} px, but its X-ray has {shape}")
    return image


def _judge_case(method: str, subject: Subject, case: Case, plain: Image, changed: Image) -> Kept:
    """Return what is kept of one insert, from the results without and with it."""
    here = case.rows, case.columns
    response = (changed - plain)[here]
    kept = float(np.sum(response * case.insert, dtype=np.float64) / np.sum(np.square(case.insert), dtype=np.float64))
    around = _widen(case, RING / subject.xray.mm_per_px)
    before, after = (float(np.std(remove_plane(image[around]))) for image in (subject.xray.cxr, plain))
    gain = kept * before / max(after, 1e-6)
    crops = []
    if "nodule" in case.wanted.kind:
        window = _widen(case, 2 * RING / subject.xray.mm_per_px)
        crops = [image[window] for image in (subject.picture(case.round), plain, changed)]
    return Kept(method, subject.group, subject.xray.name, case.wanted, case.place, kept, gain, crops)


def _widen(case: Case, pixels: float) -> tuple[slice, slice]:
    """Return the case's window with a margin on every side."""
    margin = round(pixels)
    rows, columns = (slice(max(side.start - margin, 0), side.stop + margin) for side in (case.rows, case.columns))
    return rows, columns


def remove_plane(image: Image) -> Image:
    """Return the image without its plane of brightness, which is no noise."""
    rows, columns = (np.linspace(-1, 1, side) for side in image.shape)
    terms = np.stack([np.ones(image.size), np.repeat(rows, len(columns)), np.tile(columns, len(rows))], 1)
    flat = image.ravel() - terms @ np.linalg.lstsq(terms, image.ravel().astype(np.float64), rcond=None)[0]
    return np.asarray(flat, dtype=np.float32)


def run() -> None:
    """Entry point: our errors become one line and their exit code."""
    run_command(app)


if __name__ == "__main__":
    run()
