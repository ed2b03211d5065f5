"""A blinded reader study after the paper's Table 3: one page to rate on, and the figures from what readers send back.

    python -m benchmarks.reader_study make --cxr XRAYS --method bs-diff=OUT --method truth=TRUTH -o study.html
    python -m benchmarks.reader_study tabulate reader1.csv reader2.csv --key study_key.json

The page is one offline file: images, script and style are inside, nothing is loaded or sent. It shows each result
beside its X-ray under a code; which method is behind a code stands only in the key file, which stays with whoever runs
the study. docs/reader-study.md says how to run one.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import itertools
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import typer
from numpy.typing import NDArray

from bsdiff_rt.errors import BsdiffError, SettingsError, run_command
from bsdiff_rt.folder.evaluate import list_by_name, read_result
from bsdiff_rt.formats.dicom_in import is_dicom, read_dicom
from bsdiff_rt.formats.radiograph import Radiograph
from bsdiff_rt.formats.raster import read_raster
from bsdiff_rt.imaging.network_input import place, resize

TEMPLATE = Path(__file__).with_name("reader_study.html")
SCORES = (1, 2, 3)
# The paper's criteria; the wording of the levels is this project's.
CRITERIA = {
    "pulmonary_vessels": {"name": "Pulmonary vessels", "levels": ["hardly shown", "partly shown", "clearly shown"]},
    "central_airway": {"name": "Central airway", "levels": ["hardly shown", "partly shown", "clearly shown"]},
    "bone_suppression": {"name": "Bone suppression", "levels": ["poor", "partial", "nearly complete"]},
}
_ROLES = re.compile(r"_(cxr|soft_tissue)$")

Image = NDArray[np.float32]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def make(
    cxr: Annotated[Path, typer.Option(help="Folder of X-rays.")],
    method: Annotated[list[str], typer.Option(help="NAME=FOLDER of a method's results, of the X-rays' stems; repeat.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("study.html"),
    key: Annotated[
        Path | None, typer.Option(help="Key file, not for readers.", show_default="beside the page, NAME_key.json")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of codes and order.")] = 0,
    size: Annotated[int, typer.Option(min=64, help="Longest side of the images in the page, px.")] = 768,
) -> None:
    """Write the page that readers open and the key that they must not see."""
    key = key or output.with_name(f"{output.stem}_key.json")
    for path in (output, key):
        if path.exists():
            raise SettingsError(f"{path}: exists; a new study would make answers to the old one unreadable")
    folders = dict(_named_folder(text) for text in method)
    if len(folders) != len(method):
        raise SettingsError("--method: two methods have the same name")
    page, record = build_study(cxr, folders, seed, size)
    key.write_text(json.dumps(record, indent=1) + "\n")
    output.write_text(page, encoding="utf-8")
    print(f"{output}: {len(record['items'])} items for the readers; {key}: the key, not for the readers")


def build_study(cxr: Path, methods: dict[str, Path], seed: int, size: int) -> tuple[str, dict[str, Any]]:
    """The page's text and the key's content.

    Raises:
        SettingsError: no X-ray, or a method without a result for one of them (means would not be of the same images).
        InputRefused, InputFailed: a file that cannot be read.
    """
    xrays = list_by_name(cxr, "_cxr")
    if not xrays:
        raise SettingsError(f"{cxr}: no image there")
    results = {name: list_by_name(folder, "_soft_tissue") for name, folder in methods.items()}
    for name, files in results.items():
        if missing := sorted(xrays.keys() - files.keys()):
            raise SettingsError(f"{methods[name]}: no result for {missing[0]} ({len(missing)} of {len(xrays)} missing)")
    rng = np.random.default_rng(seed)
    pairs = list(itertools.product(xrays, methods))
    codes = rng.choice(26**4, len(pairs), replace=False)
    order = rng.permutation(len(pairs))
    images: list[str] = []
    items, behind = [], {}
    place: dict[str, int] = {}
    for number in order:
        name, method = pairs[number]
        # Letters alone: a spreadsheet takes 1E05 for a number.
        code = "".join(chr(ord("A") + int(codes[number]) // 26**place_of % 26) for place_of in range(4))
        source = _read(xrays[name])
        if name not in place:
            place[name] = len(images)
            images.append(_data_uri(source.cxr, size))
        images.append(_data_uri(read_result(results[method][name], source.bits_stored), size))
        items.append({"code": code, "cxr": place[name], "result": len(images) - 1})
        behind[code] = {"image": name, "method": method}
    study = hashlib.sha256("".join(images).encode() + str(seed).encode()).hexdigest()[:12]
    data = {"study": study, "criteria": CRITERIA, "items": items, "images": images}
    page = TEMPLATE.read_text(encoding="utf-8").replace("/*STUDY*/null", json.dumps(data))
    return page, {"study": study, "seed": seed, "items": behind}


@app.command()
def tabulate(
    answers: Annotated[list[Path], typer.Argument(help="CSV files exported by the page, one a reader.")],
    key: Annotated[Path, typer.Option(help="Key file of the study.")] = Path("study_key.json"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of tables.")] = False,
) -> None:
    """Mean score of each method by criterion, and how far the readers agree."""
    found = evaluate_answers(read_key(key), [read_answers(path) for path in answers])
    print(json.dumps(found, indent=1, allow_nan=False) if as_json else table(found))


@dataclass(frozen=True)
class Answers:
    """One reader's scores: by item code, then criterion; what was not rated is absent."""

    study: str
    reader: str
    scores: dict[str, dict[str, int]]


def read_key(path: Path) -> dict[str, Any]:
    """A study's key.

    Raises:
        SettingsError: not a key written by `make`.
    """
    try:
        key = json.loads(path.read_text())
        sound = isinstance(key["study"], str) and all(
            {"image", "method"} <= each.keys() for each in key["items"].values()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise SettingsError(f"{path}: not the key of a reader study; `make` wrote it beside the page")
    return dict(key)


def read_answers(path: Path) -> Answers:
    """One reader's file.

    Raises:
        SettingsError: not a file exported by the page, or a score that is none.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        readers, studies = {row["reader"] for row in rows}, {row["study"] for row in rows}
        written = [(row["item"], name, row[name].strip()) for row in rows for name in CRITERIA]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, AttributeError):
        raise SettingsError(f"{path}: not a file exported by the page of a reader study") from None
    if len(readers) != 1 or len(studies) != 1:
        raise SettingsError(f"{path}: {len(readers)} readers and {len(studies)} studies in one file; export one by one")
    if len({row["item"] for row in rows}) != len(rows):
        raise SettingsError(f"{path}: an item is listed twice")
    scores: dict[str, dict[str, int]] = defaultdict(dict)
    for item, name, text in written:
        if text and text not in map(str, SCORES):
            raise SettingsError(f"{path}: item {item}: {name} is {text!r}; scores are 1, 2 and 3")
        if text:
            scores[item][name] = int(text)
    return Answers(studies.pop(), readers.pop(), dict(scores))


def evaluate_answers(key: dict[str, Any], answers: list[Answers]) -> dict[str, Any]:
    """Means by method and criterion over readers and images, and agreement by criterion, as plain values.

    Agreement is taken over the items that all readers rated; figures that are not defined are None.

    Raises:
        SettingsError: answers to another study or of one reader twice.
    """
    for each in answers:
        if each.study != key["study"] or each.scores.keys() - key["items"].keys():
            raise SettingsError(f"the answers of {each.reader} are to another study than the key's")
    readers = [each.reader for each in answers]
    if len(set(readers)) != len(readers):
        raise SettingsError("two files are of one reader; readers must have different names")
    methods: dict[str, Any] = {}
    for method in sorted({item["method"] for item in key["items"].values()}):
        codes = [code for code, item in key["items"].items() if item["method"] == method]
        methods[method] = {
            name: _mean([each.scores.get(code, {}).get(name) for each in answers for code in codes])
            for name in CRITERIA
        }
    rated = {each.reader: sum(len(scores) == len(CRITERIA) for scores in each.scores.values()) for each in answers}
    return {
        "study": key["study"],
        "items": len(key["items"]),
        "rated": rated,
        "methods": methods,
        "agreement": {name: agreement(name, answers) for name in CRITERIA} if len(answers) > 1 else {},
    }


def agreement(criterion: str, answers: list[Answers]) -> dict[str, Any]:
    """Fleiss' kappa of all readers and the weighted kappa of each two, over the items that all of them rated."""
    rated = [
        {code: scores[criterion] for code, scores in each.scores.items() if criterion in scores} for each in answers
    ]
    common = sorted(set.intersection(*(set(each) for each in rated)))
    scores = np.array([[each[code] for code in common] for each in rated], dtype=int).reshape(len(answers), -1)
    counts = np.stack([(scores == score).sum(axis=0) for score in SCORES], axis=1)
    pairs = {
        f"{answers[i].reader} - {answers[j].reader}": weighted_kappa(_table(scores[i], scores[j]))
        for i, j in itertools.combinations(range(len(answers)), 2)
    }
    return {"items": len(common), "fleiss_kappa": fleiss_kappa(counts), "weighted_kappa": pairs}


def fleiss_kappa(counts: NDArray[np.integer]) -> float | None:
    """Fleiss (1971): agreement of several readers beyond chance; 1 complete, 0 chance, None where not defined.

    Args:
        counts: [items, categories], how many readers chose each; every row has the same sum, at least 2.
    """
    items = len(counts)
    if not items:
        return None
    readers = int(counts[0].sum())
    observed = float(((counts**2).sum(axis=1) - readers).mean()) / (readers * (readers - 1))
    chance = float(np.square(counts.sum(axis=0) / (items * readers)).sum())
    return None if chance == 1.0 else (observed - chance) / (1.0 - chance)


def weighted_kappa(both: NDArray[np.integer], power: int = 2) -> float | None:
    """Cohen (1968): agreement of two readers beyond chance, disagreement weighted by its distance to the `power`.

    Args:
        both: [categories, categories], items by the first reader's and the second's score.
        power: 1 for linear, 2 for quadratic weights.

    Returns: 1 complete, 0 chance; None where not defined: nothing rated, or one score given throughout.
    """
    places = np.arange(len(both))
    weights = np.abs(places[:, None] - places) ** power
    total = both.sum()
    if not total:
        return None
    chance = float((weights * np.outer(both.sum(axis=1), both.sum(axis=0))).sum()) / float(total)
    return None if chance == 0.0 else 1.0 - float((weights * both).sum()) / chance


def table(found: dict[str, Any]) -> str:
    """The result as text."""
    names = [criterion["name"] for criterion in CRITERIA.values()]
    width = max(len(method) for method in (*found["methods"], "method"))
    lines = [f"{'method':{width}}  " + "  ".join(f"{name:>17}" for name in names)]
    for method, means in found["methods"].items():
        cells = (_figure(means[name]["mean"]) + f" ({means[name]['ratings']})" for name in CRITERIA)
        lines.append(f"{method:{width}}  " + "  ".join(f"{cell:>17}" for cell in cells))
    lines.append("mean score, 3 is best (number of ratings)\n")
    lines += [f"{reader}: {count} of {found['items']} items rated" for reader, count in found["rated"].items()]
    for name, figures in found["agreement"].items():
        pairs = ", ".join(f"{pair} {_figure(kappa)}" for pair, kappa in figures["weighted_kappa"].items())
        lines.append(
            f"{CRITERIA[name]['name']}: Fleiss' kappa {_figure(figures['fleiss_kappa'])}, "
            f"quadratically weighted kappa {pairs}, over {figures['items']} items"
        )
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _mean(scores: list[int | None]) -> dict[str, Any]:
    given = [score for score in scores if score is not None]
    return {"mean": float(np.mean(given)) if given else None, "ratings": len(given)}


def _table(first: NDArray[np.integer], second: NDArray[np.integer]) -> NDArray[np.integer]:
    """[3, 3]: how often the first reader gave the row's score and the second the column's."""
    counts = np.zeros((len(SCORES), len(SCORES)), dtype=int)
    np.add.at(counts, (first - 1, second - 1), 1)
    return counts


def _named_folder(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise SettingsError(f"--method {text}: give it as NAME=FOLDER")
    return name, Path(folder)


def _read(path: Path) -> Radiograph:
    try:
        return read_dicom(path) if is_dicom(path) else read_raster(path)
    except BsdiffError as error:
        raise type(error)(f"{path}: {error}") from error


def _data_uri(image: Image, size: int) -> str:
    """8-bit PNG, as the pixels alone: nothing of the file's name or header travels with them."""
    at = place(image.shape, min(size, max(image.shape)))
    small = resize(image, (at.height, at.width))
    encoded = cv2.imencode(".png", np.rint(np.clip(small, 0, 1) * 255).astype(np.uint8))[1]
    return "data:image/png;base64," + base64.b64encode(encoded.tobytes()).decode()


def main() -> None:
    """Entry point: library errors become one line and their exit code."""
    run_command(app)


if __name__ == "__main__":
    main()
