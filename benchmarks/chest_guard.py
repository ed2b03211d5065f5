"""Count what the judge of frontal chest X-rays makes of X-rays, as they are and turned, and of natural pictures.

    python -m benchmarks.chest_guard XRAYS... --json guard.json

The natural pictures are those that come with scikit-image. Neither they nor any real X-ray took part in the fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.documents import write_json
from bsdiff_rt import formats
from bsdiff_rt.config import Preprocessing
from bsdiff_rt.errors import SettingsError, run_command
from bsdiff_rt.imaging.chest_guard import INVERTED, NO_CHEST, WRONG_WAY
from bsdiff_rt.imaging.one_image import prepare
from bsdiff_rt.tables import print_table

Image = NDArray[np.float32]

CHANGES: dict[str, Callable[[Image], list[Image]]] = {
    "as they are": lambda picture: [picture],
    "mirrored": lambda picture: [picture[:, ::-1]],
    "5 degrees turned, both ways": lambda picture: [rotate(picture, 5), rotate(picture, -5)],
    "10 degrees turned, both ways": lambda picture: [rotate(picture, 10), rotate(picture, -10)],
    "a tenth cut off, each side": lambda picture: cut_sides(picture, 0.1),
    "a fifth cut off, each side": lambda picture: cut_sides(picture, 0.2),
    "upside down": lambda picture: [picture[::-1, ::-1]],
    "turned to the right": lambda picture: [np.rot90(picture, -1)],
    "turned to the left": lambda picture: [np.rot90(picture)],
    "inverted": lambda picture: [1 - picture],
    "one fifth": lambda picture: [picture[: len(picture) // 5, : len(picture[0]) // 5]],
}
ANSWERS = {None: "no warning", NO_CHEST: "no chest", INVERTED: "inverted", WRONG_WAY[2]: "upside down"} | {
    WRONG_WAY[turns]: "on its side" for turns in (1, 3)
}
HEADER = ("pictures", "number", *dict.fromkeys(ANSWERS.values()))
SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm", ".tif", ".tiff")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    xrays: Annotated[list[Path], typer.Argument(help="Chest X-rays: files, or folders of them.")],
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the counts to a JSON file.")] = None,
) -> None:
    """Print how many pictures of each kind get which warning."""
    paths = [path for one in xrays for path in (sorted(one.rglob("*")) if one.is_dir() else [one])]
    pictures = [formats.read(path).cxr for path in paths if path.suffix.lower() in SUFFIXES]
    if not pictures:
        raise SettingsError(f"{xrays[0]}: no X-ray with a name that ends in {', '.join(SUFFIXES)}.")
    counts = {
        name: count_answers([some for one in pictures for some in change(one)]) for name, change in CHANGES.items()
    }
    counts["natural pictures"] = count_answers(list(read_natural_pictures()))
    rows = [[name, str(sum(c.values())), *(str(c[kind]) for kind in HEADER[2:])] for name, c in counts.items()]
    print_table(HEADER, rows)
    if json_path is not None:
        write_json(json_path, {name: dict(answers) for name, answers in counts.items()})


def rotate(picture: Image, degrees: float) -> Image:
    """Return a picture, [H, W], turned to the left around its middle, with black corners."""
    height, width = picture.shape
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1)
    return np.asarray(cv2.warpAffine(picture, turn, (width, height)), np.float32)


def cut_sides(picture: Image, share: float) -> list[Image]:
    """Return four pictures: without that share of the picture at its top, bottom, left and right."""
    height, width = (round(share * side) for side in picture.shape)
    return [picture[height:], picture[:-height], picture[:, width:], picture[:, :-width]]


def count_answers(pictures: list[Image]) -> Counter[str]:
    """Return how many pictures, [H, W] in [0, 1], get each answer of ANSWERS."""
    answers: Counter[str] = Counter()
    for picture in pictures:
        warnings = prepare(np.ascontiguousarray(picture), Preprocessing(256)).warnings
        answers[ANSWERS[warnings[0] if warnings else None]] += 1
    return answers


def read_natural_pictures() -> Iterator[Image]:
    """Yield the photographs and drawings in scikit-image's package, grey, [H, W] in [0, 1].

    Raises:
        SettingsError: the package is not installed.
    """
    package = find_spec("skimage")
    if package is None or package.origin is None:
        raise SettingsError("scikit-image is not installed: pip install scikit-image")
    for path in sorted((Path(package.origin).parent / "data").iterdir()):
        picture = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) if path.suffix in SUFFIXES else None
        if picture is not None and min(picture.shape) >= 64:
            yield (picture / 255).astype(np.float32)


if __name__ == "__main__":
    run_command(app)
