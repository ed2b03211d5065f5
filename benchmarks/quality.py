"""Measure quality against steps: BSR (Yang), PSNR and SSIM of every sampler, without and with stage 2.

    python -m benchmarks.quality --phantoms HELD_OUT --pairs FOLDER --json benchmarks/results/quality.json

BSR is the bone suppression ratio, the share of bone removed: 1 is perfect. No training sees the phantoms of
`python -m train phantoms`. If the model was not trained on the real pairs, say so with --pairs-are.

--lungs counts only the lung fields, for pairs whose truth is right only there. NAME_lungs.png beside NAME_cxr.png is
the mask; without it the lung fields are found in the X-ray.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from benchmarks.documents import describe_run, write_json
from bsdiff_rt.bundle import Manifest, open_bundle
from bsdiff_rt.config import NO_ENHANCER, SAMPLERS, DetailName, SamplerName
from bsdiff_rt.engines.select import load
from bsdiff_rt.errors import SettingsError, run_command
from bsdiff_rt.folder.evaluate import load_lungs
from bsdiff_rt.formats import read_together
from bsdiff_rt.formats.raster import find_pairs
from bsdiff_rt.imaging.metrics import Quality, mean_quality, quality
from bsdiff_rt.imaging.network_input import place, resize
from bsdiff_rt.imaging.one_image import Prepared, finish, list_passes, prepare
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.devices import resolve_device
from bsdiff_rt.sampling.batching import run_enhancer, suppress
from bsdiff_rt.sampling.noise import ImageNoise
from bsdiff_rt.sampling.schedule import Table, sampler_table

STEPS = (1, 2, 3, 5, 10, 20, 50)

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]
DETAILS: tuple[DetailName, ...] = ("full", "model")


@dataclass(frozen=True)
class Pair:
    """One pair to judge on.

    Attributes:
        cxr: the X-ray, [H, W], float32, in [0, 1].
        soft_tissue: the truth, [H, W], float32, in [0, 1].
        digest: of the X-ray's pixels, which keys its noise as in `infer`.
        lungs: the only pixels that count, [H, W]; None counts all.
    """

    cxr: Image
    soft_tissue: Image
    digest: bytes
    lungs: Mask | None = None


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    bundle: Annotated[str, typer.Option(help="Model: demo, or a bundle's folder.")] = "demo",
    phantoms: Annotated[Path | None, typer.Option(help="Folder of `python -m train phantoms`.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="Folder of real pairs.")] = None,
    pairs_are: Annotated[str, typer.Option(help="Name of the pairs in the table.")] = "training pairs",
    steps: Annotated[str, typer.Option(help="Numbers of steps, separated by commas.")] = ",".join(map(str, STEPS)),
    full: Annotated[int, typer.Option(help="Images of each group for ddpm with all steps; 0: none.")] = 1,
    mirror: Annotated[
        bool | None,
        typer.Option("--mirror/--no-mirror", help="Average the mirrored X-ray in.", show_default="the bundle's"),
    ] = None,
    lungs: Annotated[
        bool, typer.Option("--lungs", help="Count only the lung fields: NAME_lungs.png, or found in the X-ray.")
    ] = False,
    size: Annotated[int, typer.Option(help="Longer side at which images are compared, px; 0: full size.")] = 256,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:N.")] = "auto",
    output: Annotated[Path | None, typer.Option("--json", help="Write the rows to a JSON file.")] = None,
) -> None:
    """Print one row for each group, sampler, number of steps, stage and detail."""
    model, where = open_bundle(bundle), resolve_device(device)
    manifest = model.manifest
    schedule = manifest.schedule
    mirror = manifest.mirror if mirror is None else mirror
    groups = {"held-out phantoms": load_pairs(phantoms, lungs=lungs)} if phantoms else {}
    groups |= {pairs_are: load_pairs(pairs, lungs=lungs)} if pairs else {}
    if not groups:
        raise SettingsError("nothing to judge: give --phantoms, --pairs, or both")
    settings: list[tuple[SamplerName, int, int | None]]
    settings = [(sampler, count, None) for sampler in SAMPLERS for count in parse_steps(steps)]
    settings += [("ddpm", schedule.train_steps, full)] if full else []
    # Before anything is judged: this refuses a number of steps that the model does not have.
    tables = [sampler_table(schedule, sampler, count) for sampler, count, _ in settings]
    head = describe_run(model, where) | {"size_px": size, "lungs": lungs}
    if output:
        write_json(output, head | {"rows": []})
    rows: list[dict[str, Any]] = []
    with load(model, "auto", where) as runner:
        for group, images in groups.items():
            for (sampler, count, most), table in zip(settings, tables, strict=True):
                some = images[:most]
                started = time.monotonic()
                found = [judge(runner, manifest, table, pair, size, mirror) for pair in some]
                row = {"group": group, "images": len(some), "sampler": sampler, "steps": count, "mirror": mirror}
                row["seconds"] = (time.monotonic() - started) / len(some)
                for stage2, detail in found[0]:
                    figures = mean_quality([one[stage2, detail] for one in found]).as_dict()
                    finite = {key: value if math.isfinite(value) else None for key, value in figures.items()}
                    rows.append(row | {"stage2": stage2, "detail": detail} | finite)
                    print(write_line(rows[-1]), flush=True)
                if output:  # after each setting, so that an interruption keeps what is done
                    write_json(output, head | {"rows": rows})


def parse_steps(steps: str) -> list[int]:
    """Return the numbers in a list separated by commas.

    Raises:
        SettingsError: the list has something else.
    """
    try:
        return [int(count) for count in steps.split(",")]
    except ValueError:
        raise SettingsError(f"{steps}: give whole numbers, separated by commas", setting="steps") from None


def load_pairs(folder: Path, *, lungs: bool = False) -> list[Pair]:
    """Return every pair in a folder (`find_pairs`), with its lung fields if `lungs` is set."""
    pairs = []
    for name, *paths in find_pairs(folder):
        cxr, truth = read_together(paths)
        mask = load_lungs(folder / f"{name}_lungs.png", cxr.cxr) if lungs else None
        pairs.append(Pair(cxr.cxr, resize(truth.cxr, cxr.cxr.shape), cxr.pixel_digest, mask))
    return pairs


def judge(
    runner: Runner, manifest: Manifest, table: Table, pair: Pair, size: int, mirror: bool
) -> dict[tuple[bool, DetailName], Quality]:
    """Return the quality of what `infer` would write, by (stage 2 on, detail), compared at `size` px.

    Stage 1 runs once. A bundle without stage 2 has no such entries.
    """
    prepared = prepare(pair.cxr, manifest.preprocessing)
    noise = ImageNoise(0, pair.digest)
    lungs = None if pair.lungs is None else resize_longer(pair.lungs.astype(np.float32), size) > 0.5
    found: dict[tuple[bool, DetailName], Quality] = {}
    without, with_stage2 = run_stages(runner, table, prepared, noise, mirror)
    stages = {False: without[0]} if manifest.enhancer == NO_ENHANCER else {False: without[0], True: with_stage2[0]}
    for stage2, passes in stages.items():
        for detail in DETAILS:
            picture = finish(prepared, passes, mirror=mirror, detail=detail).soft_tissue
            cxr, truth, result = (resize_longer(image, size) for image in (pair.cxr, pair.soft_tissue, picture))
            found[stage2, detail] = quality(cxr, truth, result, lungs)
    return found


def run_stages(
    runner: Runner, table: Table, prepared: Prepared, noise: ImageNoise, mirror: bool
) -> tuple[tuple[Image, float], tuple[Image, float]]:
    """Return the model's outputs for one X-ray without and with stage 2, and the seconds each took.

    Returns:
        Twice the passes, [P, S, S], float32, in [-1, 1], for `finish`, and a time. Stage 1 runs once.
    """
    started = time.perf_counter()
    passes = [cxr_net for cxr_net, _ in list_passes(prepared, 1, mirror=mirror)]
    first = suppress(runner, np.stack(passes)[:, None], table, [noise] * len(passes), enhance=False)
    between = time.perf_counter()
    second = run_enhancer(runner, torch.from_numpy(first).to(runner.device)).cpu().numpy()
    ended = time.perf_counter()
    return (first[:, 0], between - started), (second[:, 0], ended - started)


def resize_longer(image: Image, size: int) -> Image:
    """Return an image with its longer side at `size` px; 0 leaves it as it is."""
    if not size:
        return image
    placement = place(image.shape, size)
    return resize(image, (placement.height, placement.width))


def write_line(row: dict[str, Any]) -> str:
    """Return one row as text. Lines appear one by one, because each may take minutes."""
    bsr, matched, psnr, ssim = (
        math.nan if row[key] is None else row[key] for key in ("bsr", "bsr_tone_matched", "psnr", "ssim")
    )
    return (
        f"{row['group']:18} {row['sampler']:9} {row['steps']:4d} steps  stage 2 {'on ' if row['stage2'] else 'off'} "
        f"{row['detail']:5}  BSR {bsr:6.3f}  tone-matched {matched:6.3f}  "
        f"PSNR {psnr:5.2f} dB  SSIM {ssim:.4f}  {row['seconds']:6.2f} s per image"
    )


def run() -> None:
    """Run the command; an error of this project becomes one line and its exit code."""
    run_command(app)


if __name__ == "__main__":
    run()
