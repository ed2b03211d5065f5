"""The command line: thin, typed, and fast to answer (torch is imported only by the commands that compute).

Longer than other modules, and so are its functions: they are the options, and what each does.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import signal
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bsdiff_rt import __version__
from bsdiff_rt.config import DetailName, FormatName, InferSettings, SamplerName, step_count
from bsdiff_rt.errors import BsdiffError, SettingsError
from bsdiff_rt.files import write_atomically
from bsdiff_rt.folder.progress import BuildProgress, FileProgress, printable

if TYPE_CHECKING:
    from bsdiff_rt.folder.report import FileEntry
    from bsdiff_rt.imaging.metrics import Quality

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: in two thirds of the time
    help="Bone suppression of chest X-rays by conditional diffusion. Not for diagnostic use.",
)

EXIT_SOME_FAILED = 3
EXIT_INTERRUPTED = 130


def _flag(*names: str, help: str) -> Any:
    """A switch that is off where it is not given, and says so."""
    return typer.Option(*names, help=help, show_default="off")


Quiet = Annotated[bool, _flag("--quiet", "-q", help="Only errors.")]
Verbose = Annotated[bool, _flag("--verbose", "-v", help="Also what is decided along the way.")]
AsJson = Annotated[bool, _flag("--json", help="Print the result as one JSON document.")]


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Bone suppression of chest X-rays by conditional diffusion. Not for diagnostic use."""
    if show:
        typer.echo(f"bsdiff-rt {__version__}")
        raise typer.Exit


@app.command()
def infer(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Files, or folders searched recursively.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results and report.json.")],
    bundle: Annotated[str, typer.Option("--bundle", "-b", help="Model: demo, or a bundle's folder.")] = "demo",
    runner: Annotated[
        str,
        typer.Option(help="auto, eager, onnxruntime, aoti, tensorrt, or the folder of a built engine."),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="Of weights and activations.")
    ] = "auto",
    sampler: Annotated[
        SamplerName | None,
        typer.Option(show_default="the bundle's", help="ddpm --steps 1000 is the paper, release the published code."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", "-n", show_default="the bundle's", help="Denoiser steps per image, 1 to 1000."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise; the same image and seed give the same picture.")] = 0,
    samples: Annotated[
        int,
        typer.Option(
            min=1, max=64, help="Samples per image: their mean is the result, their deviation goes to uncertainty/."
        ),
    ] = 1,
    batch: Annotated[str, typer.Option(help="Images per batch, or auto.")] = "auto",
    enhance: Annotated[
        bool | None, typer.Option("--enhance/--no-enhance", show_default="the bundle's", help="Stage 2 on or off.")
    ] = None,
    mirror: Annotated[
        bool | None,
        typer.Option(
            "--mirror/--no-mirror",
            show_default="the bundle's",
            help="Average with the mirrored X-ray's result: better, twice the time.",
        ),
    ] = None,
    detail: Annotated[
        DetailName,
        typer.Option(
            help="full: the model's picture plus fine detail from the X-ray that is not bone. "
            "model: the model's picture, enlarged."
        ),
    ] = "full",
    raw_view: Annotated[bool, _flag("--raw-view", help="Show borders and burned-in text to the model, too.")] = False,
    output_format: Annotated[
        FormatName,
        typer.Option("--format", help="auto: DICOM for DICOM, PNG otherwise (16 bit beyond 8-bit sources)."),
    ] = "auto",
    preview: Annotated[bool, _flag("--preview", help="Also preview.png: X-ray | soft tissue | bone.")] = False,
    overwrite: Annotated[
        bool, _flag("--overwrite", help="Do finished files again, and replace what this program did not write.")
    ] = False,
    any_view: Annotated[bool, _flag("--any-view", help="Take lateral views and other body parts, too.")] = False,
    dry_run: Annotated[bool, _flag("--dry-run", help="List what would be done or refused.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Remove the bones from chest X-rays: DICOM, PNG, JPEG or TIFF in, the same matrix out."""
    _log(quiet, verbose)
    settings = InferSettings(
        output=output,
        bundle=bundle,
        runner=runner,
        device=device,
        precision=precision,
        sampler=sampler,
        steps=steps,
        seed=seed,
        samples=samples,
        batch=_batch(batch),
        enhance=enhance,
        mirror=mirror,
        detail=detail,
        raw_view=raw_view,
        format=output_format,
        preview=preview,
        overwrite=overwrite,
        any_view=any_view,
    )
    from bsdiff_rt.folder.pipeline import Inference

    inference = Inference(settings)
    if dry_run:
        entries = list(inference.plan(inputs))
        _print_plan(entries, as_json)
    else:
        tasks = inference.find_tasks(inputs)
        with FileProgress(len(tasks), quiet) as progress:
            report = inference.run(tasks, progress.on_file)
        entries = report.files
        if as_json:
            typer.echo(report.to_json(), nl=False)
        else:
            counts = report.counts()
            known = ", ".join(f"{counts[s]} {s}" for s in ("ok", "skipped", "refused", "failed") if counts[s])
            speed = f", {report.images_per_second:.2f} images/s" if counts["ok"] else ""
            typer.echo(f"{known or 'no images found'}{speed}; results and report.json in {output}")
    if any(entry.status in ("refused", "failed") for entry in entries):
        raise typer.Exit(EXIT_SOME_FAILED)


@app.command()
def build_engine(
    bundle: Annotated[str, typer.Argument(help="Model: demo, or a bundle's folder.")] = "demo",
    runner: Annotated[Literal["aoti", "tensorrt"], typer.Option(help="What will run the engine.")] = "aoti",
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        typer.Option(help="Of weights and activations; auto: fp16 on a GPU, fp32 on a CPU."),
    ] = "auto",
    batch: Annotated[
        str,
        typer.Option(
            metavar="N or MIN:MAX or auto",
            help="Images per batch the engine takes; auto: 1 on a CPU, where a range costs speed, else 1:8; 1:4 for "
            "TensorRT and the paper's networks.",
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", show_default="a place in the cache", help="Folder of the engine itself."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Build an engine for this machine; it is kept only if it makes the picture that eager makes in fp32."""
    _log(quiet, verbose)
    asked = None if batch == "auto" else _batch_range(batch)
    from bsdiff_rt.bundle import open_bundle
    from bsdiff_rt.config import EngineOptions
    from bsdiff_rt.engines import build as engine
    from bsdiff_rt.engines.manifest import read_engine
    from bsdiff_rt.runners.devices import resolve_device

    model, where = open_bundle(bundle), resolve_device(device)
    on_cpu = where.type == "cpu"
    low, high = asked or engine.find_default_batch(model, runner, where)
    if precision == "auto":
        precision = "fp32" if on_cpu else "fp16"
    with BuildProgress(quiet) as phases:
        folder = engine.build_engine(model, EngineOptions(runner, precision, (low, high)), where, output, phases.show)
    manifest = read_engine(folder).manifest
    parity = manifest.parity
    if as_json:
        found = {
            "engine": str(folder),
            "build_seconds": manifest.build_seconds,
            "parity": parity.to_dict(),
            "speed": asdict(manifest.speed),
        }
        typer.echo(json.dumps(found, indent=1))
        return
    if verbose:
        for check in parity.checks:
            typer.echo(check, err=True)
    taken = f"{low}:{high}" if low < high else str(low)
    typer.echo(
        f"{folder}\n{runner} {precision}, batch {taken}, built in {manifest.build_seconds:.0f} s. Against "
        f"{parity.reference}: single calls within {parity.worst_call:.1e} of the largest output, "
        f"pictures after {step_count(parity.steps)} of {parity.sampler} {parity.psnr_db:.1f} dB or more. "
        f"At batch {manifest.speed.batch}: {manifest.speed}."
    )
    if manifest.speed.ratio < 1:
        typer.echo(
            f"Slower than {manifest.speed.instead}: `--runner auto` will pass it over. If the machine was busy, "
            "build it again.",
            err=True,
        )


@app.command()
def bench(
    bundle: Annotated[
        str, typer.Option("--bundle", "-b", help="demo, paper (the full size, random weights) or a bundle's folder.")
    ] = "demo",
    runner: Annotated[
        list[str] | None,
        typer.Option(
            show_default="all that can be used",
            help="eager, onnxruntime, aoti, tensorrt; repeatable, or comma separated. Eager fp32 always comes first.",
        ),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(show_default="those a runner has", help="fp32, bf16, fp16; repeatable, or comma separated."),
    ] = None,
    engine: Annotated[
        list[Path] | None, typer.Option(show_default="those in the cache", help="Also this built engine; repeatable.")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(show_default="1,4,8; 1 on a CPU", help="Batch sizes, comma separated.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            "-n",
            show_default="the bundle's; 10 if it has 100 or more",
            help="Denoiser steps of a whole image; 1000 measures the paper's.",
        ),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(show_default="20; 5 on a CPU", help="Measured rounds of steps; images get a fifth of them."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write rows and conditions there.")] = None,
    plot_path: Annotated[
        Path | None, typer.Option("--plot", help="Draw them there: .png, .pdf or .svg; needs matplotlib.")
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Time every runner on this machine, in turn, and compare its pictures with the eager network's."""
    _log(quiet, verbose)
    batches = None if batch is None else tuple(_whole(part, "--batch") for part in batch.split(","))
    if json_path is not None and not json_path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {json_path.parent}", param_hint="--json")
    from bsdiff_rt.bench import document as bench_report
    from bsdiff_rt.bench import plot
    from bsdiff_rt.bench.candidates import Wanted

    if plot_path is not None:
        plot.check_plot(plot_path)
    wanted = Wanted(_names(runner), _names(precision), tuple(engine or ()))
    settings = bench_report.BenchSettings(bundle, wanted, device, batches, steps, repeats)

    def save(document: bench_report.Document) -> None:
        if json_path is not None:
            write_atomically(json_path, document.to_json().encode())

    document = bench_report.run(settings, save)
    found = document.as_dict()
    for line in [*bench_report.aligned(bench_report.table(found)), *bench_report.notes(found)]:
        typer.echo(line)
    if plot_path is not None:
        plot.draw(found, plot_path)
    if document.exit_code:
        raise typer.Exit(document.exit_code)


@app.command()
def evaluate(
    predicted: Annotated[Path, typer.Argument(help="Result of infer: a file or a folder.")],
    soft_tissue: Annotated[Path, typer.Argument(help="True soft-tissue image(s).")],
    cxr: Annotated[Path, typer.Option("--cxr", help="X-ray(s) the results were made from.")],
    size: Annotated[int, typer.Option(min=16, help="Longer side at which images are compared, px.")] = 256,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure results against the truth: BSR (Yang, tone-matched, as published), MSE, SSIM, PSNR."""
    _log(quiet, verbose)
    from bsdiff_rt.folder.evaluate import evaluate as compare
    from bsdiff_rt.folder.evaluate import match
    from bsdiff_rt.imaging.metrics import mean_quality

    rows, failed = [], {}
    for name, outcome in compare(match(predicted, soft_tissue, cxr), size):
        if isinstance(outcome, BsdiffError):
            failed[name] = outcome
        else:
            rows.append((name, outcome))
    if not rows:
        raise next(iter(failed.values()))
    mean = mean_quality([row for _, row in rows])
    if as_json:
        images = [{"name": name} | _numbers(row) for name, row in rows]
        reasons = [{"name": name, "reason": str(error)} for name, error in failed.items()]
        typer.echo(json.dumps({"size_px": size, "images": images, "mean": _numbers(mean), "failed": reasons}, indent=1))
    else:
        table = [[name, *(f"{value:.4f}" for value in row.as_dict().values())] for name, row in [*rows, ("mean", mean)]]
        _print_table(["image", "BSR", "BSR tone-matched", "BSR as published", "MSE", "SSIM", "PSNR dB"], table)
    for error in failed.values():
        typer.echo(f"bsdiff-rt: {printable(str(error))}", err=True)
    if failed:
        raise typer.Exit(EXIT_SOME_FAILED)


@app.command()
def info(as_json: AsJson = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Versions, devices, runners (or why not), bundles, engines in the cache."""
    _log(quiet, verbose)
    from bsdiff_rt.info import describe

    found = describe()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for title, content in found.items():
        typer.echo(title)
        for name, value in content.items():
            typer.echo(f"  {name}: {value}")


def _batch_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not all(part.isascii() and part.isdecimal() for part in (low, high or low)) or text.endswith(":"):
        raise typer.BadParameter(f"{text!r} is not N or MIN:MAX", param_hint="--batch")
    if not 1 <= int(low) <= int(high or low):
        raise typer.BadParameter(f"{text!r}: from 1 up, the smaller one first", param_hint="--batch")
    return int(low), int(high or low)


def _batch(text: str) -> int | None:
    return None if text == "auto" else _whole(text, "--batch", "auto or ")


def _whole(text: str, option: str, alternative: str = "") -> int:
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is not {alternative}a whole number above 0", param_hint=option)
    return int(text)


def _names(values: list[str] | None) -> tuple[str, ...]:
    """The values of an option that may be repeated, each a comma separated list; each name once."""
    return tuple(dict.fromkeys(name for value in values or () for name in value.split(",")))


def _numbers(row: Quality) -> dict[str, float | None]:
    """Figures for JSON, which has no infinity (PSNR of equal images) and no NaN (BSR without bone): null."""
    return {name: value if math.isfinite(value) else None for name, value in row.as_dict().items()}


def _print_plan(entries: list[FileEntry], as_json: bool) -> None:
    if as_json:
        from dataclasses import asdict

        typer.echo(json.dumps([asdict(entry) for entry in entries], indent=1))
        return
    words = {"ok": "would write", "skipped": "would skip", "refused": "would refuse", "failed": "would fail"}
    for entry in entries:
        typer.echo(printable(f"{words[entry.status]}: {entry.input} -> {entry.reason or entry.output}"))


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        typer.echo("  ".join(cells).rstrip())


def _log(quiet: bool, verbose: bool) -> None:
    level = logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(level=logging.WARNING, handlers=[_ToStderr()], force=True)
    logging.getLogger("bsdiff_rt").setLevel(level)


class _ToStderr(logging.Handler):
    """Log lines to what is stderr at the time: above the live bar while there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record as one line, and its traceback where it has one."""
        try:
            typer.echo(printable(record.getMessage()), err=True)
            if record.exc_info:
                typer.echo("".join(traceback.format_exception(*record.exc_info)), err=True)
        except Exception:  # as every handler of the library: a log line must not end a run
            self.handleError(record)


class _Interrupted(BaseException):
    """Ctrl-C, or a job scheduler's stop. Not KeyboardInterrupt, which the command line library would end with 1."""


def _interrupt(*_: object) -> None:
    raise _Interrupted


def main() -> None:
    """Entry point: our errors become one line and their exit code; anything else is a bug and shows its trace."""
    if None in (sys.stdout, sys.stderr):  # closed (`2>&-`): nobody listens
        nowhere = Path(os.devnull).open("w")  # noqa: SIM115  # to the end of the process
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    if any(not word or (word.startswith("--") and word.find("=") == len(word) - 1) for word in sys.argv[1:]):
        typer.echo(
            "bsdiff-rt: an empty argument would be the current folder; is a variable of a script not set?", err=True
        )
        raise SystemExit(SettingsError.exit_code)
    for stream in (sys.stdout, sys.stderr):  # a file name may hold bytes that are no text; show them escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except BsdiffError as error:
        typer.echo(f"bsdiff-rt: {printable(str(error))}", err=True)
        raise SystemExit(error.exit_code) from None
    except _Interrupted:
        resumes = "; finished files are complete, the same command (without --overwrite) resumes"
        typer.echo(f"bsdiff-rt: interrupted{resumes if sys.argv[1:2] == ['infer'] else ''}", err=True)
        raise SystemExit(EXIT_INTERRUPTED) from None
