"""Measure what changes of an X-ray cost a model: frames, text, exposure, faint or weak bones, noise, rotation.

    python -m train phantoms DIR --count 6 --size 512
    python -m benchmarks.robustness DIR --json robustness.json     # and with --raw-view

X-ray and truth are changed alike. `infer` processes the changed X-rays with the bundle's defaults, and each result is
compared with the changed truth. Use phantoms, or pairs whose truth has the X-ray's tone. If a scanner changes the tone
of the soft-tissue image, changed pairs no longer belong to that scanner.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.documents import describe_run, write_json
from bsdiff_rt.bundle import open_bundle
from bsdiff_rt.config import InferSettings
from bsdiff_rt.errors import SettingsError, run_command
from bsdiff_rt.folder.pipeline import Inference
from bsdiff_rt.formats import read_together
from bsdiff_rt.formats.radiograph import find_range
from bsdiff_rt.formats.raster import find_pairs, read_raster, write_png
from bsdiff_rt.imaging.metrics import mean_quality, quality
from bsdiff_rt.runners.devices import resolve_device
from bsdiff_rt.tables import print_table

Image = NDArray[np.float32]
Pair = tuple[Image, Image]
Change = Callable[[Image, Image], tuple[Any, Any]]

BITS = 16
FRAME = 0.08  # width of a frame, as a share of the side
TEXT_PX = 512  # side of the image that the text is drawn for
HEADER = ("change", "BSR", "BSR tone-matched", "PSNR dB", "SSIM")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(help="Pairs NAME_cxr.*, NAME_soft_tissue.*, both in one tone.")],
    bundle: Annotated[str, typer.Option(help="Model: demo, or a bundle's folder.")] = "demo",
    raw_view: Annotated[
        bool, typer.Option("--raw-view", help="Show borders, burned-in text and faint X-rays to the model as they are.")
    ] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows to a JSON file.")] = None,
) -> None:
    """Print one row for each change of the X-rays."""
    rows = measure_changes(folder, bundle, raw_view=raw_view)
    cells = [
        [
            row["change"],
            f"{row['bsr']:.3f}",
            f"{row['bsr_tone_matched']:.3f}",
            f"{row['psnr']:.2f}",
            f"{row['ssim']:.4f}",
        ]
        for row in rows
    ]
    print_table(HEADER, cells)
    if json_path is not None:
        head = describe_run(open_bundle(bundle), resolve_device("auto"))
        write_json(json_path, head | {"raw_view": raw_view, "rows": rows})


def measure_changes(folder: Path, bundle: str, *, raw_view: bool = False) -> list[dict[str, Any]]:
    """Return one row for each change, with mean figures over the folder's pairs.

    Args:
        folder: pairs of images.
        bundle: a bundle's name or folder.
        raw_view: show the X-rays to the model as they are, without hiding or spreading anything.

    Raises:
        SettingsError: an X-ray has no result, or a change makes it too dark.
    """
    pairs = [tuple(picture.cxr for picture in read_together(paths)) for _, *paths in find_pairs(folder)]
    with tempfile.TemporaryDirectory() as temporary:
        sources, output = Path(temporary) / "in", Path(temporary) / "out"
        sources.mkdir()
        changed: dict[str, list[Pair]] = {}
        for number, (name, change) in enumerate(CHANGES.items()):
            changed[name] = [clip_pair(*change(cxr, truth)) for cxr, truth in pairs]
            for index, (cxr, _) in enumerate(changed[name]):
                check_range(name, cxr)
                write_png(sources / f"{number}-{index}.png", cxr, BITS)
        run_inference(sources, output, bundle, raw_view=raw_view)
        rows = []
        for number, (name, cases) in enumerate(changed.items()):
            results = [read_raster(output / f"{number}-{index}.png", BITS).cxr for index in range(len(cases))]
            mean = mean_quality(
                [quality(cxr, truth, result) for (cxr, truth), result in zip(cases, results, strict=True)]
            )
            figures = {key: getattr(mean, key) for key in ("bsr", "bsr_tone_matched", "psnr", "ssim")}
            rows.append({"change": name, "images": len(cases), **figures})
    return rows


def check_range(name: str, cxr: Image) -> None:
    """Check that a changed X-ray is read again with its grey levels.

    Args:
        name: of the change.
        cxr: [H, W], float32, in [0, 1].

    Raises:
        SettingsError: it is so dark that a reader would take it for an image of fewer bits.
    """
    if find_range(np.rint(cxr * 65535).astype(np.int64))[1] < 32768:
        raise SettingsError(f"{name}: the X-ray uses less than half of the grey scale; choose brighter X-rays")


def run_inference(sources: Path, output: Path, bundle: str, *, raw_view: bool) -> None:
    """Process a folder as `infer` does.

    Args:
        sources: folder of X-rays.
        output: folder for the results.
        bundle: a bundle's name or folder.
        raw_view: as in `measure_changes`.

    Raises:
        SettingsError: an X-ray has no result.
    """
    inference = Inference(InferSettings(output=output, bundle=bundle, raw_view=raw_view))
    if raw_view:
        manifest = inference.bundle.manifest
        unspread = replace(manifest.preprocessing, least_span=0.0)
        inference.bundle = replace(inference.bundle, manifest=replace(manifest, preprocessing=unspread))
    report = inference.run(inference.find_tasks([sources]))
    if failed := [entry for entry in report.files if entry.status != "ok"]:
        raise SettingsError(f"{len(failed)} of {len(report.files)} changed X-rays have no result: {failed[0].reason}")


def clip_pair(cxr: Image, truth: Image) -> Pair:
    """Return both images clipped to [0, 1], float32."""
    return np.clip(cxr, 0, 1, dtype=np.float32), np.clip(truth, 0, 1, dtype=np.float32)


def apply_to_both(change: Callable[[Image], Any]) -> Change:
    """Return a change that does the same to X-ray and truth."""
    return lambda cxr, truth: (change(cxr), change(truth))


def add_frame(grey: float) -> Callable[[Image], Any]:
    """Return a change that shrinks the image into a frame of one grey level, in [0, 1]."""

    def change(image: Image) -> Any:
        rows, columns = image.shape
        y, x = round(FRAME * rows), round(FRAME * columns)
        small = cv2.resize(image, (columns - 2 * x, rows - 2 * y), interpolation=cv2.INTER_AREA)
        return cv2.copyMakeBorder(small, y, y, x, x, cv2.BORDER_CONSTANT, value=grey)

    return change


def rotate(degrees: float, zoom: float = 1.0, border: int = cv2.BORDER_REPLICATE) -> Callable[[Image], Any]:
    """Return a change that rotates and enlarges the image about its middle."""

    def change(image: Image) -> Any:
        rows, columns = image.shape
        matrix = cv2.getRotationMatrix2D((columns / 2, rows / 2), degrees, zoom)
        return cv2.warpAffine(image, matrix, (columns, rows), flags=cv2.INTER_CUBIC, borderMode=border)

    return change


def add_text(image: Image) -> Any:
    """Return the image with white text burned into a corner."""
    ink = np.zeros((TEXT_PX, TEXT_PX), np.uint8)
    cv2.putText(ink, "L PORTABLE", (20, 60), cv2.FONT_HERSHEY_SIMPLEX, 1.5, 255, 4)
    drawn = cv2.resize(ink, image.shape[::-1], interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    return np.maximum(image, drawn)


def add_noise(deviation: float) -> Change:
    """Return a change that adds the same noise to both images, because noise is not bone."""

    def change(cxr: Image, truth: Image) -> tuple[Any, Any]:
        noise = np.random.default_rng(0).normal(0, deviation, cxr.shape)
        return cxr + noise, truth + noise

    return change


def scale_bones(share: float, low: float = 0.0, high: float = 1.0) -> Change:
    """Return a change that multiplies the bones by `share` and maps grey levels from [0, 1] to [low, high]."""

    def change(cxr: Image, truth: Image) -> tuple[Any, Any]:
        return low + (high - low) * (truth + share * (cxr - truth)), low + (high - low) * truth

    return change


def equalise(cxr: Image, truth: Image) -> tuple[Any, Any]:
    """Return the X-ray with a flat histogram, and the truth through the same curve."""
    levels = np.linspace(0, 1, 257)
    curve = np.quantile(cxr, levels)
    return np.interp(cxr, curve, levels), np.interp(truth, curve, levels)


def blur(image: Image, share: float) -> Any:
    """Return the image under a Gaussian blur, whose standard deviation is a share of the longer side."""
    return cv2.GaussianBlur(image, (0, 0), share * max(image.shape))


CHANGES: dict[str, Change] = {
    "none": lambda cxr, truth: (cxr, truth),
    "black frame, 8 %": apply_to_both(add_frame(0.0)),
    "white frame, 8 %": apply_to_both(add_frame(1.0)),
    "rotated by 10 degrees, black corners": apply_to_both(rotate(10, border=cv2.BORDER_CONSTANT)),
    "rotated by 20 degrees": apply_to_both(rotate(20)),
    "enlarged 1.5 times": apply_to_both(rotate(0, 1.5)),
    "burned-in text": apply_to_both(add_text),
    "softer": apply_to_both(lambda image: blur(image, 0.004)),
    "sharper": apply_to_both(lambda image: 2.5 * image - 1.5 * blur(image, 0.006)),
    "noise of 0.02": add_noise(0.02),
    "noise of 0.05": add_noise(0.05),
    "to the power 0.5": apply_to_both(np.sqrt),
    "to the power 2": apply_to_both(np.square),
    "histogram equalised": equalise,
    "grey levels 0.35 to 0.65": scale_bones(1.0, 0.35, 0.65),
    "bones at 0.5": scale_bones(0.5),
    "bones at 0.3": scale_bones(0.3),
    "bones at 0.3, 0.35 to 0.65": scale_bones(0.3, 0.35, 0.65),
    "bones at 1.5": scale_bones(1.5),
}


def run() -> None:
    """Run the command; an error of this project becomes one line and its exit code."""
    run_command(app)


if __name__ == "__main__":
    run()
