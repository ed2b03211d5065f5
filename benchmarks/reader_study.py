"""Run a blinded reader study like the paper's Table 3: write a page to rate on, and tabulate the answers.

    python -m benchmarks.reader_study make --cxr XRAYS --method bs-diff=OUT --method truth=TRUTH -o study.html
    python -m benchmarks.reader_study tabulate reader1.csv reader2.csv --key study_key.json

The page is one file that works offline. It loads nothing and sends nothing. It shows each result beside its X-ray under
a code. Only the key file tells which method has which code; it stays with the person who runs the study. See
docs/reader-study.md.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import itertools
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.methods import match_results, parse_methods, read_picture
from bsdiff_rt.errors import SettingsError, run_command
from bsdiff_rt.folder.evaluate import list_by_name
from bsdiff_rt.imaging.network_input import place, resize
from bsdiff_rt.tables import print_table

TEMPLATE = Path(__file__).with_name("reader_study.html")
SCORES = (1, 2, 3)
# The criteria are the paper's, the words for the levels are not.
CRITERIA = {
    "pulmonary_vessels": {"name": "Pulmonary vessels", "levels": ["hardly shown", "partly shown", "clearly shown"]},
    "central_airway": {"name": "Central airway", "levels": ["hardly shown", "partly shown", "clearly shown"]},
    "bone_suppression": {"name": "Bone suppression", "levels": ["poor", "partial", "nearly complete"]},
}

Image = NDArray[np.float32]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


@app.command("make")
def make_study(
    cxr: Annotated[Path, typer.Option(help="Folder of X-rays.")],
    method: Annotated[
        list[str],
        typer.Option(metavar="NAME=FOLDER", help="Results of a method, with the stems of the X-rays. Repeat it."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("study.html"),
    key: Annotated[
        Path | None, typer.Option(help="Key file, not for readers.", show_default="beside the page, NAME_key.json")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of codes and order.")] = 0,
    size: Annotated[int, typer.Option(min=64, help="Longest side of the images in the page, px.")] = 768,
) -> None:
    """Write the page for the readers, and the key that they must not see."""
    key = key or output.with_name(f"{output.stem}_key.json")
    for path in (output, key):
        if path.exists():
            raise SettingsError(f"{path} exists. Choose another name, or answers to the old study become unreadable.")
    page, record = build_study(cxr, parse_methods(method), seed, size)
    key.write_text(json.dumps(record, indent=1) + "\n")
    output.write_text(page, encoding="utf-8")
    print(f"wrote {output}: {len(record['items'])} items for the readers")
    print(f"wrote {key}: the key, not for the readers")


def build_study(cxr: Path, methods: dict[str, Path], seed: int, size: int) -> tuple[str, dict[str, Any]]:
    """Return the text of the page and the content of the key.

    Args:
        cxr: folder of X-rays.
        methods: folder of results by name of the method.
        seed: of codes and order.
        size: longest side of the images, px.

    Raises:
        SettingsError: there is no X-ray, or a method has no result for one of them.
        InputRefused: a file is not an image that can be used.
        InputFailed: a file is missing, unreadable or damaged.
    """
    xrays = list_by_name(cxr, "_cxr")
    if not xrays:
        raise SettingsError(f"{cxr}: no image there")
    results = {name: match_results(folder, xrays) for name, folder in methods.items()}
    rng = np.random.default_rng(seed)
    pairs = list(itertools.product(xrays, methods))
    codes = rng.choice(26**4, len(pairs), replace=False)
    images: list[str] = []
    items, behind = [], {}
    shown: dict[str, int] = {}  # X-rays by their place among the images
    for number in rng.permutation(len(pairs)):
        name, method = pairs[number]
        code = make_code(int(codes[number]))
        source = read_picture(xrays[name])
        if name not in shown:
            shown[name] = len(images)
            images.append(encode_image(source.cxr, size))
        images.append(encode_image(read_picture(results[method][name], source.bits_stored).cxr, size))
        items.append({"code": code, "cxr": shown[name], "result": len(images) - 1})
        behind[code] = {"image": name, "method": method}
    study = hashlib.sha256("".join(images).encode() + str(seed).encode()).hexdigest()[:12]
    data = {"study": study, "criteria": CRITERIA, "items": items, "images": images}
    page = TEMPLATE.read_text(encoding="utf-8").replace("/*STUDY*/null", json.dumps(data))
    return page, {"study": study, "seed": seed, "items": behind}


def make_code(number: int) -> str:
    """Return four letters for a number below 26**4. With digits, a spreadsheet would take 1E05 for a number."""
    return "".join(chr(ord("A") + number // 26**place % 26) for place in range(4))


def encode_image(image: Image, size: int) -> str:
    """Return an 8-bit PNG as a data URI. It has the pixels alone: no file name, no header.

    Args:
        image: [H, W], float32, in [0, 1].
        size: longest side, px. A smaller image keeps its size.
    """
    at = place(image.shape, min(size, max(image.shape)))
    small = resize(image, (at.height, at.width))
    encoded = cv2.imencode(".png", np.rint(np.clip(small, 0, 1) * 255).astype(np.uint8))[1]
    return "data:image/png;base64," + base64.b64encode(encoded.tobytes()).decode()


@app.command()
def tabulate(
    answers: Annotated[list[Path], typer.Argument(help="CSV files exported by the page, one for each reader.")],
    key: Annotated[Path, typer.Option(help="Key file of the study.")] = Path("study_key.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Print the mean score of each method by criterion, and the agreement of the readers."""
    found = evaluate_answers(read_key(key), [read_answers(path) for path in answers])
    if as_json:
        print(json.dumps(found, indent=1, allow_nan=False))
    else:
        print_study(found)


@dataclass(frozen=True)
class Answers:
    """One reader's scores.

    Attributes:
        study: identifier of the study.
        reader: name or number.
        scores: by code of the item, then by criterion. An item that was not rated is absent.
    """

    study: str
    reader: str
    scores: dict[str, dict[str, int]]


def read_key(path: Path) -> dict[str, Any]:
    """Read a study's key.

    Raises:
        SettingsError: the file cannot be read, or is not a key of `make`.
    """
    try:
        key = json.loads(path.read_text())
        sound = isinstance(key["study"], str) and all(
            {"image", "method"} <= each.keys() for each in key["items"].values()
        )
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise SettingsError(f"{path}: not the key of a reader study. Use the file that `make` wrote beside the page.")
    return dict(key)


def read_answers(path: Path) -> Answers:
    """Read one reader's file.

    Raises:
        SettingsError: the file cannot be read, the page did not export it, or a score is not 1, 2 or 3.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        readers, studies = {row["reader"] for row in rows}, {row["study"] for row in rows}
        written = [(row["item"], name, row[name].strip()) for row in rows for name in CRITERIA]
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror}).") from None
    except (UnicodeDecodeError, csv.Error, KeyError, AttributeError):
        raise SettingsError(
            f'{path}: not exported by the page of a reader study. Use a file from its "export CSV".'
        ) from None
    if len(readers) != 1 or len(studies) != 1:
        raise SettingsError(
            f"{path}: {len(readers)} readers and {len(studies)} studies in one file. Export them one by one."
        )
    if len({row["item"] for row in rows}) != len(rows):
        raise SettingsError(f"{path}: an item is listed twice. Export the answers again.")
    scores: dict[str, dict[str, int]] = defaultdict(dict)
    for item, name, text in written:
        if text and text not in map(str, SCORES):
            raise SettingsError(f"{path}: item {item}: {name} is {text!r}. Scores are 1, 2 and 3.")
        if text:
            scores[item][name] = int(text)
    return Answers(studies.pop(), readers.pop(), dict(scores))


def evaluate_answers(key: dict[str, Any], answers: list[Answers]) -> dict[str, Any]:
    """Return means by method and criterion, and agreement by criterion, as plain values for JSON.

    Means are over readers and images. Agreement is over the items that all readers rated. A figure that is not defined
    is None.

    Args:
        key: of `read_key`.
        answers: one for each reader.

    Raises:
        SettingsError: the answers are to another study, or two files have the same reader.
    """
    for each in answers:
        if each.study != key["study"] or each.scores.keys() - key["items"].keys():
            raise SettingsError(f"the answers of {each.reader} belong to another study than the key")
    readers = [each.reader for each in answers]
    if len(set(readers)) != len(readers):
        raise SettingsError("two files have the same reader. Readers need different names.")
    methods: dict[str, Any] = {}
    for method in sorted({item["method"] for item in key["items"].values()}):
        codes = [code for code, item in key["items"].items() if item["method"] == method]
        methods[method] = {
            name: compute_mean([each.scores.get(code, {}).get(name) for each in answers for code in codes])
            for name in CRITERIA
        }
    rated = {each.reader: sum(len(scores) == len(CRITERIA) for scores in each.scores.values()) for each in answers}
    return {
        "study": key["study"],
        "items": len(key["items"]),
        "rated": rated,
        "methods": methods,
        "agreement": {name: compute_agreement(name, answers) for name in CRITERIA} if len(answers) > 1 else {},
    }


def compute_agreement(criterion: str, answers: list[Answers]) -> dict[str, Any]:
    """Return Fleiss' kappa of all readers and the weighted kappa of each two, over the items that all of them rated."""
    rated = [
        {code: scores[criterion] for code, scores in each.scores.items() if criterion in scores} for each in answers
    ]
    common = sorted(set.intersection(*(set(each) for each in rated)))
    scores = np.array([[each[code] for code in common] for each in rated], dtype=int).reshape(len(answers), -1)
    counts = np.stack([(scores == score).sum(axis=0) for score in SCORES], axis=1)
    pairs = {
        f"{answers[i].reader} - {answers[j].reader}": weighted_kappa(count_pairs(scores[i], scores[j]))
        for i, j in itertools.combinations(range(len(answers)), 2)
    }
    return {"items": len(common), "fleiss_kappa": fleiss_kappa(counts), "weighted_kappa": pairs}


def fleiss_kappa(counts: NDArray[np.integer]) -> float | None:
    """Return Fleiss' kappa (1971), the agreement of several readers beyond chance.

    Args:
        counts: [items, categories], number of readers who chose each category. Every row has the same sum, at least 2.

    Returns:
        1 for complete agreement, 0 for chance; None without items, or if one score was given throughout.
    """
    items = len(counts)
    if not items:
        return None
    readers = int(counts[0].sum())
    observed = float(((counts**2).sum(axis=1) - readers).mean()) / (readers * (readers - 1))
    chance = float(np.square(counts.sum(axis=0) / (items * readers)).sum())
    return None if chance == 1.0 else (observed - chance) / (1.0 - chance)


def weighted_kappa(both: NDArray[np.integer], power: int = 2) -> float | None:
    """Return Cohen's weighted kappa (1968), the agreement of two readers beyond chance.

    Args:
        both: [categories, categories], number of items by the first reader's score and the second's.
        power: disagreement counts by its distance to this power: 1 for linear, 2 for quadratic weights.

    Returns:
        1 for complete agreement, 0 for chance; None without items, or if one score was given throughout.
    """
    places = np.arange(len(both))
    weights = np.abs(places[:, None] - places) ** power
    total = both.sum()
    if not total:
        return None
    chance = float((weights * np.outer(both.sum(axis=1), both.sum(axis=0))).sum()) / float(total)
    return None if chance == 0.0 else 1.0 - float((weights * both).sum()) / chance


def print_study(found: dict[str, Any]) -> None:
    """Print the mean scores and the agreement.

    Args:
        found: result of `evaluate_answers`.
    """
    names = [str(criterion["name"]) for criterion in CRITERIA.values()]
    rows = [
        [method, *(f"{write_figure(means[key]['mean'])} ({means[key]['ratings']})" for key in CRITERIA)]
        for method, means in found["methods"].items()
    ]
    print("mean score, 3 is best (number of ratings)")
    print_table(["method", *names], rows)
    print("\nitems rated")
    counts = [[reader, str(count), str(found["items"])] for reader, count in found["rated"].items()]
    print_table(["reader", "rated", "of"], counts)
    if not found["agreement"]:
        return
    print("\nagreement: Fleiss' kappa of all readers, quadratically weighted kappa of each two")
    pairs = list(next(iter(found["agreement"].values()))["weighted_kappa"])
    rows = [
        [
            str(CRITERIA[key]["name"]),
            str(figures["items"]),
            write_figure(figures["fleiss_kappa"]),
            *(write_figure(figures["weighted_kappa"][pair]) for pair in pairs),
        ]
        for key, figures in found["agreement"].items()
    ]
    print_table(["criterion", "items", "Fleiss", *pairs], rows)


def write_figure(value: float | None) -> str:
    """Return a figure as text; `-` if it is not defined."""
    return "-" if value is None else f"{value:.3f}"


def compute_mean(scores: list[int | None]) -> dict[str, Any]:
    """Return the mean of the scores that are not None, and their number."""
    rated = [score for score in scores if score is not None]
    return {"mean": float(np.mean(rated)) if rated else None, "ratings": len(rated)}


def count_pairs(first: NDArray[np.integer], second: NDArray[np.integer]) -> NDArray[np.integer]:
    """Return [3, 3]: how often the first reader gave the row's score and the second reader the column's."""
    counts = np.zeros((len(SCORES), len(SCORES)), dtype=int)
    np.add.at(counts, (first - 1, second - 1), 1)
    return counts


def main() -> None:
    """Run the command; an error of this project becomes one line and its exit code."""
    run_command(app)


if __name__ == "__main__":
    main()
