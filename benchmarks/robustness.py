"""What changes of an X-ray cost a model: frames, text, other exposures, faint or weak bones, noise, a turned patient.

    python -m train phantoms DIR --count 6 --size 512
    python -m benchmarks.robustness DIR --json robustness.json     # and with --plain

X-ray and truth are changed alike, `infer` does the changed X-rays as it does any, with the bundle's defaults, and each
result is judged against the changed truth. Meant for phantoms, or pairs whose truth has the X-ray's tone: the images of
a scanner that tones soft tissue anew are not that scanner's any more once they were changed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import typer
from numpy.typing import NDArray

from bsdiff_rt import __version__
from bsdiff_rt.config import InferSettings
from bsdiff_rt.errors import SettingsError, run_command
from bsdiff_rt.files import write_atomically
from bsdiff_rt.folder.pipeline import Inference
from bsdiff_rt.formats.radiograph import range_of
from bsdiff_rt.formats.raster import find_pairs, read_raster, read_together, write_png
from bsdiff_rt.imaging.metrics import bsr_tone_matched, mean_quality, quality

Image = NDArray[np.float32]
Pair = tuple[Image, Image]

BITS = 16
FRAME = 0.08  # of the side
TEXT_PX = 512  # side of the picture that the text is drawn for

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def measure(folder: Path, bundle: str, *, plain: bool = False) -> list[dict[str, Any]]:
    """One row for each change: mean figures over the folder's pairs.

    With `plain` the networks are shown the X-rays as they are, without what `view.find_view` does about some changes.
    """
    pairs: list[Pair] = []
    for _, *paths in find_pairs(folder):
        cxr, soft_tissue = (picture.cxr for picture in read_together(paths))
        pairs.append((cxr, soft_tissue))
    with tempfile.TemporaryDirectory() as temporary:
        sources, output = Path(temporary) / "in", Path(temporary) / "out"
        sources.mkdir()
        changed: dict[str, list[Pair]] = {}
        for number, (name, change) in enumerate(CHANGES.items()):
            changed[name] = [unit(*change(cxr, truth)) for cxr, truth in pairs]
            for index, (cxr, _) in enumerate(changed[name]):
                if range_of(np.rint(cxr * 65535).astype(np.int64))[1] < 32768:
                    raise SettingsError(
                        f"{name}: an X-ray darker than half of the grey scale would be read as brighter"
                    )
                write_png(sources / f"{number}-{index}.png", cxr, BITS)
        inference = Inference(InferSettings(output=output, bundle=bundle, raw_view=plain))
        if plain:
            manifest = inference.bundle.manifest
            unspread = replace(manifest.preprocessing, least_span=0.0)
            inference.bundle = replace(inference.bundle, manifest=replace(manifest, preprocessing=unspread))
        report = inference.run(inference.find_tasks([sources]))
        if failed := [entry for entry in report.files if entry.status != "ok"]:
            raise SettingsError(
                f"{len(failed)} of {len(report.files)} changed X-rays gave no result: {failed[0].reason}"
            )
        rows = []
        for number, (name, cases) in enumerate(changed.items()):
            results = [read_raster(output / f"{number}-{index}.png", BITS).cxr for index in range(len(cases))]
            judged = [quality(cxr, truth, result) for (cxr, truth), result in zip(cases, results, strict=True)]
            matched = [bsr_tone_matched(cxr, truth, made) for (cxr, truth), made in zip(cases, results, strict=True)]
            mean = mean_quality(judged)
            rows.append(
                {
                    "change": name,
                    "images": len(cases),
                    "bsr": mean.bsr,
                    "bsr_tone_matched": float(np.mean(matched)),
                    "psnr": mean.psnr,
                    "ssim": mean.ssim,
                }
            )
    return rows


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(help="Pairs NAME_cxr.*, NAME_soft_tissue.*, of one tone.")],
    bundle: Annotated[str, typer.Option(help="Model.")] = "demo",
    plain: Annotated[
        bool, typer.Option("--plain", help="Show the networks frames, letters and faint X-rays as they are.")
    ] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
) -> None:
    """Print a row for each change of the X-rays."""
    rows = measure(folder, bundle, plain=plain)
    for row in rows:
        typer.echo(
            f"{row['change']:36} BSR {row['bsr']:6.3f}  tone-matched {row['bsr_tone_matched']:6.3f}  "
            f"PSNR {row['psnr']:5.2f} dB  SSIM {row['ssim']:.4f}"
        )
    if json_path is not None:
        document = {"bsdiff_rt": __version__, "bundle": bundle, "plain": plain, "rows": rows}
        write_atomically(json_path, (json.dumps(document, indent=1) + "\n").encode())


def unit(cxr: Image, truth: Image) -> Pair:
    """Both clipped to [0, 1], float32."""
    return np.clip(cxr, 0, 1, dtype=np.float32), np.clip(truth, 0, 1, dtype=np.float32)


def alike(change: Callable[[Image], Any]) -> Callable[[Image, Image], tuple[Any, Any]]:
    """The same done to X-ray and truth."""
    return lambda cxr, truth: (change(cxr), change(truth))


def framed(grey: float) -> Callable[[Image], Any]:
    """The picture smaller, in a frame of one grey level."""

    def change(image: Image) -> Any:
        rows, columns = image.shape
        y, x = round(FRAME * rows), round(FRAME * columns)
        small = cv2.resize(image, (columns - 2 * x, rows - 2 * y), interpolation=cv2.INTER_AREA)
        return cv2.copyMakeBorder(small, y, y, x, x, cv2.BORDER_CONSTANT, value=grey)

    return change


def turned(degrees: float, zoom: float = 1.0, border: int = cv2.BORDER_REPLICATE) -> Callable[[Image], Any]:
    """The picture turned and enlarged about its middle."""

    def change(image: Image) -> Any:
        rows, columns = image.shape
        matrix = cv2.getRotationMatrix2D((columns / 2, rows / 2), degrees, zoom)
        return cv2.warpAffine(image, matrix, (columns, rows), flags=cv2.INTER_CUBIC, borderMode=border)

    return change


def lettered(image: Image) -> Any:
    """White letters burned into a corner."""
    ink = np.zeros((TEXT_PX, TEXT_PX), np.uint8)
    cv2.putText(ink, "L PORTABLE", (20, 60), cv2.FONT_HERSHEY_SIMPLEX, 1.5, 255, 4)
    drawn = cv2.resize(ink, image.shape[::-1], interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    return np.maximum(image, drawn)


def noisy(deviation: float) -> Callable[[Image, Image], tuple[Any, Any]]:
    """The same noise in both: it is no bone."""

    def change(cxr: Image, truth: Image) -> tuple[Any, Any]:
        noise = np.random.default_rng(0).normal(0, deviation, cxr.shape)
        return cxr + noise, truth + noise

    return change


def weaker(share: float, low: float = 0.0, high: float = 1.0) -> Callable[[Image, Image], tuple[Any, Any]]:
    """Bones at a share of their strength, grey levels within [low, high]."""

    def change(cxr: Image, truth: Image) -> tuple[Any, Any]:
        return low + (high - low) * (truth + share * (cxr - truth)), low + (high - low) * truth

    return change


def equalised(cxr: Image, truth: Image) -> tuple[Any, Any]:
    """The X-ray's histogram flat, the truth by the same curve."""
    levels = np.linspace(0, 1, 257)
    curve = np.quantile(cxr, levels)
    return np.interp(cxr, curve, levels), np.interp(truth, curve, levels)


def sigma(image: Image, share: float) -> float:
    """A blur's width: a share of the side."""
    return share * max(image.shape)


CHANGES: dict[str, Callable[[Image, Image], tuple[Any, Any]]] = {
    "none": lambda cxr, truth: (cxr, truth),
    "black frame, 8 %": alike(framed(0.0)),
    "white frame, 8 %": alike(framed(1.0)),
    "turned by 10 degrees, black corners": alike(turned(10, border=cv2.BORDER_CONSTANT)),
    "turned by 20 degrees": alike(turned(20)),
    "enlarged 1.5 times": alike(turned(0, 1.5)),
    "white letters": alike(lettered),
    "softer": alike(lambda image: cv2.GaussianBlur(image, (0, 0), sigma(image, 0.004))),
    "sharper": alike(lambda image: 2.5 * image - 1.5 * cv2.GaussianBlur(image, (0, 0), sigma(image, 0.006))),
    "noise of 0.02": noisy(0.02),
    "noise of 0.05": noisy(0.05),
    "to the power 0.5": alike(np.sqrt),
    "to the power 2": alike(np.square),
    "histogram equalised": equalised,
    "grey levels 0.35 to 0.65": weaker(1.0, 0.35, 0.65),
    "bones at 0.5": weaker(0.5),
    "bones at 0.3": weaker(0.3),
    "bones at 0.3, 0.35 to 0.65": weaker(0.3, 0.35, 0.65),
    "bones at 1.5": weaker(1.5),
}


def run() -> None:
    """Entry point: our errors become one line and their exit code."""
    run_command(app)


if __name__ == "__main__":
    run()
