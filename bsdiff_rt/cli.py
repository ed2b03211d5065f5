"""The command line. Each command builds its settings and calls the library; torch is imported only to compute.

This module is longer than others, and so are its functions, because they list the options with their help texts.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from bsdiff_rt import __version__
from bsdiff_rt.config import DetailName, FormatName, InferSettings, SamplerName, step_count
from bsdiff_rt.errors import BsdiffError, SettingsError, describe_error
from bsdiff_rt.files import write_atomically
from bsdiff_rt.folder.progress import BuildProgress, FileProgress, discard, escape, print_line
from bsdiff_rt.tables import print_table
from bsdiff_rt.urls import is_url, parse_path

if TYPE_CHECKING:
    from bsdiff_rt.folder.report import FileEntry, Report
    from bsdiff_rt.imaging.metrics import Quality
    from bsdiff_rt.node.sending import Outcome
    from bsdiff_rt.node.settings import Destination, Tls

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich would take a third of the time that --help may take
    help="Bone suppression of chest X-rays by conditional diffusion. Not for diagnostic use.",
)

EXIT_SOME_FAILED = 3
EXIT_INTERRUPTED = 130

# Groups of options in `infer --help`, and those that `serve --help` has besides.
FILES, MODEL, SPEED, RUN = "Input and output", "Model", "Speed", "Run"
NETWORK, LIMITS = "Network", "Limits"


_ADDRESS = re.compile(r"auto|local|ray://.+|[\w.-]+:\d+|\[[0-9a-fA-F:]+\]:\d+")  # what --ray takes


class GroupedCommand(TyperCommand):
    """A command whose help lists the options in groups: those of `rich_help_panel`, in plain text."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command's words. `--ray` may stand without an address, before anything that is none."""
        for place, word in enumerate(args):
            if word == "--ray" and not (args[place + 1 :] and _ADDRESS.fullmatch(args[place + 1])):
                args[place] = "--ray=local"
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")  # pydantic's words
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one section for each group, in the order in which the groups first appear."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                title = RUN if param.name == "help" else getattr(param, "rich_help_panel", None) or FILES
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _flag(*names: str, help: str, group: str | None = None) -> Any:
    """Return a switch that is off by default and says so."""
    return typer.Option(*names, help=help, show_default="off", rich_help_panel=group)


Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:N.", rich_help_panel=SPEED)]
Quiet = Annotated[bool, _flag("--quiet", "-q", help="Print errors only, and what was asked for.", group=RUN)]
Verbose = Annotated[bool, _flag("--verbose", "-v", help="Print decisions and details, too.", group=RUN)]
AsJson = Annotated[bool, _flag("--json", help="Print the result as one JSON document.", group=RUN)]


# Options of `infer` that `watch` has as well.
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        parser=parse_path,
        help="Folder for the results and report.json.",
        rich_help_panel=FILES,
    ),
]
Format = Annotated[
    FormatName,
    typer.Option(
        "--format",
        help="File format of the results. auto: DICOM for DICOM, PNG for others, with 16 bits if the X-ray has "
        "more than 8. dicom-sc: Secondary Capture. dicom-j2k: JPEG 2000 lossless.",
        rich_help_panel=FILES,
    ),
]
AnyView = Annotated[bool, _flag("--any-view", help="Process lateral views and other body parts, too.", group=FILES)]
BundleName = Annotated[
    str,
    typer.Option(
        "--bundle", "-b", metavar="NAME|DIR", help="Model: demo, or the folder of a bundle.", rich_help_panel=MODEL
    ),
]
Sampler = Annotated[
    SamplerName | None,
    typer.Option(
        show_default="the bundle's",
        help="Sampler. ddpm with 1000 steps is the paper's; release is the published code's.",
        rich_help_panel=MODEL,
    ),
]
Steps = Annotated[
    str | None,
    typer.Option(
        "--steps",
        "-n",
        metavar="N[:M]",
        show_default="the bundle's; all 1000 with a --sampler of another kind",
        help="Denoiser steps per image, 1 to 1000. With :M, from 20 steps on: compute the model's deep features in "
        "every Mth step only. Faster, but not exact.",
        rich_help_panel=MODEL,
    ),
]
Seed = Annotated[
    int,
    typer.Option(metavar="N", help="Random seed. The same image and seed give the same result.", rich_help_panel=MODEL),
]
Samples = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=1,
        max=64,
        help="Samples per image. The result is their mean; their standard deviation goes to uncertainty/.",
        rich_help_panel=MODEL,
    ),
]
Enhance = Annotated[
    bool | None,
    typer.Option("--enhance/--no-enhance", show_default="the bundle's", help="Run stage 2.", rich_help_panel=MODEL),
]
Mirror = Annotated[
    bool | None,
    typer.Option(
        "--mirror/--no-mirror",
        show_default="the bundle's",
        help="Average with the result of the mirrored X-ray. Better, and takes twice as long.",
        rich_help_panel=MODEL,
    ),
]
Probe = Annotated[
    bool,
    _flag(
        "--probe",
        help="Measure how much of an 8 mm nodule would survive at each place; pictures go to retention/. Takes "
        "five times as long.",
        group=MODEL,
    ),
]
Detail = Annotated[
    DetailName,
    typer.Option(
        help="full: the model's picture plus fine detail from the X-ray that is not bone. "
        "model: the model's picture, enlarged.",
        rich_help_panel=MODEL,
    ),
]
RawView = Annotated[
    bool,
    _flag(
        "--raw-view",
        help="Show uniform borders and burned-in text to the model, too. By default they are hidden from it, and "
        "reappear unchanged in the result.",
        group=MODEL,
    ),
]
RunnerName = Annotated[
    str,
    typer.Option(
        metavar="NAME|DIR",
        help="auto, eager, onnxruntime, openvino, aoti, tensorrt, tensorrt-rtx, or the folder of a built engine. "
        "auto: the fastest engine built for this machine, else onnxruntime, else eager.",
        rich_help_panel=SPEED,
    ),
]
PrecisionName = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    typer.Option(help="Precision of weights and activations.", rich_help_panel=SPEED),
]
Batch = Annotated[str, typer.Option(metavar="N|auto", help="Images per batch.", rich_help_panel=SPEED)]
Threads = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, show_default="all processors", help="CPU threads of the model.", rich_help_panel=SPEED
    ),
]


# Options of `serve` and `send`.
To = Annotated[
    list[str],
    typer.Option(
        metavar="AET@HOST:PORT",
        help="Node to send results to. Append /tls for TLS. Repeat it for several.",
        rich_help_panel=NETWORK,
    ),
]
Aet = Annotated[str, typer.Option(metavar="AET", help="AE title of this program.", rich_help_panel=NETWORK)]
TlsCert = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", show_default="none", help="Certificate of this program, for TLS (PEM).", rich_help_panel=NETWORK
    ),
]
TlsKey = Annotated[
    Path | None,
    typer.Option(metavar="FILE", show_default="none", help="Its private key (PEM).", rich_help_panel=NETWORK),
]
TlsCa = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        show_default="none",
        help="Authorities that the certificates of the others must come from (PEM).",
        rich_help_panel=NETWORK,
    ),
]


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Bone suppression of chest X-rays by conditional diffusion. Not for diagnostic use."""
    if show:
        _print(f"bsdiff-rt {__version__}")
        raise SystemExit(0)


@app.command(cls=GroupedCommand)
def infer(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT",
            parser=parse_path,
            help="Files, or folders, which are searched recursively. s3:// and gs:// URLs are taken, also as output.",
        ),
    ],
    output: Output,
    output_format: Format = "auto",
    preview: Annotated[
        bool, _flag("--preview", help="Write preview.png: X-ray, soft tissue and bone side by side.", group=FILES)
    ] = False,
    html: Annotated[
        bool, _flag("--html", help="Write report.html: a page to look at every image, without a network.", group=FILES)
    ] = False,
    send_to: Annotated[
        str | None,
        typer.Option(
            "--send",
            metavar="AET@HOST:PORT",
            show_default="off",
            help="Send the DICOM results to this node afterwards. What it has is not sent again.",
            rich_help_panel=FILES,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        _flag(
            "--overwrite",
            help="Process finished files again. Files that no report.json of this program names are never replaced.",
            group=FILES,
        ),
    ] = False,
    any_view: AnyView = False,
    dry_run: Annotated[
        bool, _flag("--dry-run", help="List what would be written or refused, and why. Write nothing.", group=FILES)
    ] = False,
    bundle: BundleName = "demo",
    sampler: Sampler = None,
    steps: Steps = None,
    seed: Seed = 0,
    samples: Samples = 1,
    enhance: Enhance = None,
    mirror: Mirror = None,
    probe: Probe = False,
    detail: Detail = "full",
    raw_view: RawView = False,
    runner: RunnerName = "auto",
    device: Device = "auto",
    precision: PrecisionName = "auto",
    batch: Batch = "auto",
    threads: Threads = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            show_default="off",
            help="Run in many workers through Ray: one for each GPU, or for each --threads CPU cores (4 by default). "
            "ADDRESS is HOST:PORT of a cluster, or auto. Without it, Ray starts here and stops with the run.",
            rich_help_panel=SPEED,
        ),
    ] = None,
    fail_on: Annotated[
        Literal["failed", "refused", "never"],
        typer.Option(
            help="Outcomes that give exit code 3. failed: only files that failed. refused: refused files, too.",
            rich_help_panel=RUN,
        ),
    ] = "refused",
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Remove the bones from chest X-rays.

    DICOM, PNG, JPEG or TIFF in, an image of the same matrix out.
    """
    _log(quiet, verbose)
    count, cache_every = _parse_steps(steps)
    settings = InferSettings(
        output=output,
        bundle=bundle,
        runner=runner,
        device=device,
        precision=precision,
        sampler=sampler,
        steps=count,
        cache_every=cache_every,
        seed=seed,
        samples=samples,
        batch=_parse_batch(batch),
        threads=threads,
        enhance=enhance,
        mirror=mirror,
        detail=detail,
        probe=probe,
        raw_view=raw_view,
        format=output_format,
        preview=preview,
        html=html,
        overwrite=overwrite,
        any_view=any_view,
    )
    from bsdiff_rt.folder.search import check_inputs
    from bsdiff_rt.formats.dicom_checks import ACCEPT_ANY_VIEW

    check_inputs(inputs, output)
    destination = None if send_to is None else _check_send(send_to, settings)
    from bsdiff_rt.folder.pipeline import Inference

    inference = Inference(settings, ray=ray)
    tasks = inference.find_tasks(inputs)
    if not tasks and fail_on != "never":
        raise SettingsError(
            f"{', '.join(map(str, inputs))}: no chest X-ray found. Images are DICOM, PNG, JPEG or TIFF files."
        )
    if dry_run:
        entries = list(inference.plan(tasks))
        _print_plan(entries, as_json)
        counts = Counter[str](entry.status for entry in entries)
        refuses_views = any(ACCEPT_ANY_VIEW in (entry.reason or "") for entry in entries)
    else:
        with FileProgress(tasks.count, quiet, ACCEPT_ANY_VIEW) as progress:
            report = inference.run(tasks, progress.on_file)
        counts, refuses_views = report.counts(), progress.found
        if as_json:
            _print(report.to_json().rstrip())
        elif not quiet:
            _print(_summarise(report, settings))
    if not quiet and refuses_views:
        print_line("--any-view processes lateral views and other body parts, too.")
    unsent = 0
    if destination is not None and not dry_run:
        sent = Counter[str](outcome.status for outcome in _send_results(output, [destination]))
        unsent = sent["failed"]
        if not quiet:
            (print_line if as_json else _print)(_count_sent(sent))
        if unsent:
            print_line(f"Results that were not sent stay in {output}: bsdiff-rt send {output} --to {send_to}")
    counted = {"failed": {"failed"}, "refused": {"refused", "failed"}, "never": set[str]()}[fail_on]
    if any(counts[status] for status in counted) or (unsent and fail_on != "never"):
        raise typer.Exit(EXIT_SOME_FAILED)


@app.command(cls=GroupedCommand)
def watch(
    folder: Annotated[
        Path, typer.Argument(metavar="INPUT", parser=parse_path, help="Folder to watch, with everything below it.")
    ],
    output: Output,
    every: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0.1,
            max=3600,
            help="Time between two looks. A file is processed once it is the same in two of them.",
            rich_help_panel=FILES,
        ),
    ] = 2.0,
    output_format: Format = "auto",
    any_view: AnyView = False,
    bundle: BundleName = "demo",
    sampler: Sampler = None,
    steps: Steps = None,
    seed: Seed = 0,
    samples: Samples = 1,
    enhance: Enhance = None,
    mirror: Mirror = None,
    probe: Probe = False,
    detail: Detail = "full",
    raw_view: RawView = False,
    runner: RunnerName = "auto",
    device: Device = "auto",
    precision: PrecisionName = "auto",
    batch: Batch = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Process X-rays as they arrive in a folder.

    The model is kept loaded, until Ctrl-C or SIGTERM.
    """
    _log(quiet, verbose)
    count, cache_every = _parse_steps(steps)
    settings = InferSettings(
        output=output,
        bundle=bundle,
        runner=runner,
        device=device,
        precision=precision,
        sampler=sampler,
        steps=count,
        cache_every=cache_every,
        seed=seed,
        samples=samples,
        batch=_parse_batch(batch),
        threads=threads,
        enhance=enhance,
        mirror=mirror,
        detail=detail,
        probe=probe,
        raw_view=raw_view,
        format=output_format,
        any_view=any_view,
    )
    from bsdiff_rt.folder.search import check_inputs

    for one in (folder, output):
        if is_url(one):
            raise SettingsError(f"{one}: watch needs folders on a disk. Use infer for object storage.")
    check_inputs([folder], output)
    if not folder.is_dir():
        raise SettingsError(f"{folder}: not a folder. Name one to watch, or use infer.")
    from bsdiff_rt.folder.pipeline import Inference

    inference = Inference(settings)
    if not quiet:
        print_line(f"watching {folder}; stop with Ctrl-C or SIGTERM")

    def show(entry: FileEntry) -> None:
        if entry.reason is not None or not quiet:
            print_line(f"{entry.status}: {entry.input}" + (f": {entry.reason}" if entry.reason else ""))

    try:
        inference.watch(folder, show, wait=lambda: time.sleep(every))
    except _Interrupted:
        report = inference.report  # every entry stands in it: the interruption is passed on when all is written
    if as_json:
        _print(report.to_json().rstrip())
    elif not quiet:
        _print(_summarise(report, settings))


@app.command(cls=GroupedCommand)
def serve(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of the node: its journal, received X-rays and results.")
    ],
    to: To,
    aet: Aet = "BSDIFF",
    listen: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS:PORT",
            help="Where to receive X-rays. 0.0.0.0 is every IPv4 address of this machine.",
            rich_help_panel=NETWORK,
        ),
    ] = "127.0.0.1:11112",
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="AET[@ADDRESS]",
            show_default="everybody on this machine",
            help="Node that may send, by AE title and IP address. Repeat it for several.",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    http: Annotated[
        int,
        typer.Option(
            metavar="PORT",
            min=0,
            max=65535,
            help="Port on 127.0.0.1 of the status page, /health and /metrics. 0 for none.",
            rich_help_panel=NETWORK,
        ),
    ] = 8080,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_ca: TlsCa = None,
    associations: Annotated[
        int, typer.Option(metavar="N", min=1, max=1000, help="Senders at the same time.", rich_help_panel=LIMITS)
    ] = 10,
    pdu: Annotated[
        int,
        typer.Option(metavar="BYTES", min=4096, max=1 << 24, help="Largest PDU to receive.", rich_help_panel=LIMITS),
    ] = 131072,
    quota: Annotated[
        float,
        typer.Option(
            metavar="GB",
            min=0.01,
            help="Disk space for X-rays and results. Finished ones make room; then X-rays are refused.",
            rich_help_panel=LIMITS,
        ),
    ] = 20.0,
    keep: Annotated[
        float,
        typer.Option(metavar="DAYS", min=0, help="How long to keep files of finished X-rays.", rich_help_panel=LIMITS),
    ] = 1.0,
    output_format: Annotated[
        Literal["dicom", "dicom-sc", "dicom-j2k"],
        typer.Option(
            "--format",
            help="dicom: the X-ray's class. dicom-sc: Secondary Capture. dicom-j2k: JPEG 2000 lossless.",
            rich_help_panel=MODEL,
        ),
    ] = "dicom",
    any_view: Annotated[
        bool, _flag("--any-view", help="Process lateral views and other body parts, too.", group=MODEL)
    ] = False,
    rules: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default="all are processed",
            help="TOML file: which X-rays to process, by modality, body part, station and view.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    bundle: BundleName = "demo",
    runner: RunnerName = "auto",
    device: Device = "auto",
    precision: PrecisionName = "auto",
    batch: Batch = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Be a DICOM node beside a PACS.

    It receives X-rays and sends their results on, until Ctrl-C or SIGTERM.
    """
    _log(quiet, verbose)
    from bsdiff_rt.node import settings as node
    from bsdiff_rt.node.rules import Rules, read_rules

    node.check_packages()
    host, port = node.parse_listen(listen)
    settings = node.NodeSettings(
        folder=folder,
        destinations=tuple(node.parse_destination(text) for text in to),
        aet=aet,
        host=host,
        port=port,
        senders=tuple(node.parse_sender(text) for text in allow or ()),
        associations=associations,
        pdu_bytes=pdu,
        quota_bytes=int(quota * node.GB),
        keep_days=keep,
        http_port=http or None,
        tls=node.make_tls(tls_cert, tls_key, tls_ca),
        rules=Rules() if rules is None else read_rules(rules),
    )
    settings.check()
    from bsdiff_rt.folder.pipeline import Inference
    from bsdiff_rt.node.serving import Node

    inference = Inference(
        InferSettings(
            output=settings.results,
            bundle=bundle,
            runner=runner,
            device=device,
            precision=precision,
            batch=_parse_batch(batch),
            threads=threads,
            format=output_format,
            any_view=any_view,
        )
    )
    try:
        with ExitStack() as stack:
            served = Node(settings, inference)
            served.start(stack)
            if not quiet:
                page = f"; status at http://127.0.0.1:{served.http_port}/" if served.http_port else ""
                print_line(f"{aet} listens at {host}:{served.port}{page}. Stop with Ctrl-C or SIGTERM")
            while True:
                served.watch(1.0)
    except _Interrupted:
        if not quiet:
            print_line("stopped. X-rays that are not finished wait in the journal")


@app.command(cls=GroupedCommand)
def send(
    folder: Annotated[Path, typer.Argument(metavar="RESULTS", help="Output folder of infer or watch.")],
    to: To,
    aet: Aet = "BSDIFF",
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_ca: TlsCa = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Send the DICOM results of a run to a PACS. One that it has, asked by C-FIND, is not sent again."""
    _log(quiet, verbose)
    from bsdiff_rt.node import settings as node

    node.check_packages()
    destinations = [node.parse_destination(text) for text in to]
    tls = node.make_tls(tls_cert, tls_key, tls_ca)
    node.check_destinations(destinations, node.check_aet(aet, "aet"), tls)
    outcomes = _send_results(folder, destinations, aet, tls)
    if not outcomes:
        raise SettingsError(f"{folder}: no report.json that names a DICOM result. Name the output folder of infer.")
    counts = Counter[str](outcome.status for outcome in outcomes)
    if as_json:
        _print(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    elif not quiet:
        _print(_count_sent(counts))
    if counts["failed"]:
        raise typer.Exit(EXIT_SOME_FAILED)


def _check_send(send_to: str, settings: InferSettings) -> Destination:
    """Return the node that `infer --send` names. SettingsError if nothing could be sent there."""
    from bsdiff_rt.node import settings as node

    node.check_packages()
    destination = node.parse_destination(send_to, "send")
    if destination.tls:
        raise SettingsError("TLS needs certificates. Use bsdiff-rt send after the run.", setting="send")
    if settings.format == "png":
        raise SettingsError("nodes take DICOM, not png. Leave out --format, or choose a DICOM one.", setting="send")
    if is_url(settings.output):
        raise SettingsError(f"{settings.output}: results are sent from a folder on a disk.", setting="send")
    return destination


def _send_results(
    folder: Path, destinations: Sequence[Destination], aet: str = "BSDIFF", tls: Tls | None = None
) -> list[Outcome]:
    """Send a folder's DICOM results to each node, and print what fails. Return what became of each."""
    from bsdiff_rt.folder.earlier import list_results
    from bsdiff_rt.node.receiving import quiet_libraries
    from bsdiff_rt.node.sending import Connection, send_results

    quiet_libraries()
    paths = sorted(path for path, _ in list_results(folder) if path.suffix == ".dcm")
    outcomes = []
    for destination in destinations:
        for outcome in send_results(folder, paths, str(destination), Connection(destination, aet, tls)):
            outcomes.append(outcome)
            if outcome.status == "failed":
                print_line(f"failed: {outcome.path}: {outcome.reason}")
    return outcomes


def _count_sent(counts: Counter[str]) -> str:
    return f"sent {counts['sent']}, skipped {counts['skipped']} that were there, failed {counts['failed']}"


@app.command()
def build_engine(
    bundle: Annotated[str, typer.Argument(help="Model: demo, or the folder of a bundle.")] = "demo",
    runner: Annotated[
        Literal["auto", "aoti", "openvino", "tensorrt", "tensorrt-rtx"],
        typer.Option(help="Runner that the engine is for. auto: the fastest that needs one and is installed."),
    ] = "auto",
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        typer.Option(help="Precision of weights and activations. auto: fp16 on a GPU, fp32 on a CPU."),
    ] = "auto",
    batch: Annotated[
        str,
        typer.Option(
            metavar="N|MIN:MAX|auto",
            help="Images per batch that the engine takes. auto: 1 on a CPU, 1:8 on a GPU; 1:4 for TensorRT with the "
            "paper's networks.",
        ),
    ] = "auto",
    device: Device = "auto",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", show_default="a folder in the cache", help="Folder for the engine."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="CAPABILITY,...|all",
            show_default="this machine's GPU",
            help="Compute capabilities of other machines' GPUs, such as 8.9. Needs no GPU here. tensorrt-rtx only.",
        ),
    ] = None,
    max_autotune: Annotated[
        bool,
        _flag("--max-autotune", help="Let the compiler time more kernels. A build takes much longer. aoti only."),
    ] = False,
    save_onnx: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            show_default="none",
            help="Also write the graphs for other tools: denoiser, enhancer and the whole step. New files only.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be built, and where. Build nothing.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Build an engine for this machine. It is kept only if its results agree with eager in fp32.

    With --for, build it for the GPUs of other machines. It is compared with eager when it is first used there.
    """
    _log(quiet, verbose)
    asked = None if batch == "auto" else _parse_batch_range(batch)
    from bsdiff_rt.bundle import open_bundle
    from bsdiff_rt.engines import build as engine
    from bsdiff_rt.engines.manifest import read_engine
    from bsdiff_rt.engines.onnx_files import save_graphs
    from bsdiff_rt.runners.devices import resolve_device

    model, where = open_bundle(bundle), resolve_device(device)
    targets = tuple(part for part in (target or "").split(",") if part)
    options = engine.resolve_options(model, where, runner, precision, asked, targets, max_autotune=max_autotune)
    low, high = options.batch
    described = f"{options.runner} {options.precision}, batch {f'{low}:{high}' if low < high else low}"
    if targets:
        described += f", for compute capability {', '.join(options.capabilities)}"
        where = resolve_device("cpu")
    if options.max_autotune:
        described += ", with more kernels tried"
    graphs = [] if save_onnx is None else save_graphs(model, options.precision, save_onnx)
    if not as_json:
        for path in graphs:
            _print(str(path))
    if dry_run:
        if not graphs:  # graphs for other tools may be of a precision that no engine has here
            engine.check_options(options, where)
        folder = output or engine.locate_engine(model, options, where)
        if as_json:
            planned = {"engine": str(folder), **asdict(options), "graphs": [str(path) for path in graphs]}
            _print(json.dumps(planned, indent=1))
        else:
            _print(f"{folder}\n{described}. Nothing was built.")
        return
    with BuildProgress(quiet) as phases:
        folder = engine.build_engine(model, options, where, output, phases.show)
    manifest = read_engine(folder).manifest
    parity, speed = manifest.parity, manifest.speed
    if parity is None or speed is None:
        if as_json:
            _print(
                json.dumps({"engine": str(folder), "build_seconds": manifest.build_seconds, "parity": None}, indent=1)
            )
        elif not quiet:
            _print(
                f"{folder}\n{described}, built in {manifest.build_seconds:.0f} s.\n"
                "Not compared with eager yet. Copy the folder to the machine with the GPU, and name it with --runner."
            )
        return
    if as_json:
        found = {"engine": str(folder), "build_seconds": manifest.build_seconds}
        _print(json.dumps(found | {"parity": parity.to_dict(), "speed": asdict(speed)}, indent=1))
        return
    if verbose:
        for check in parity.checks:
            print_line(str(check))
    if not quiet:
        _print(
            f"{folder}\n{described}, built in {manifest.build_seconds:.0f} s.\n"
            f"Compared with {parity.reference}: single calls differ by at most {parity.worst_call:.1e} of the largest "
            f"output. Images after {step_count(parity.steps)} of {parity.sampler} have {parity.psnr_db:.1f} dB or more."
            f"\nSpeed at batch {speed.batch}: {speed}."
        )
    if speed.ratio < 1:
        print_line(
            f"This engine is slower than {speed.instead}, so `--runner auto` prefers that. If the machine was busy, "
            "build it again."
        )


@app.command()
def bench(
    bundle: Annotated[
        str,
        typer.Option(
            "--bundle", "-b", help="Model: demo, a bundle's folder, or paper (the full-size network, random weights)."
        ),
    ] = "demo",
    runner: Annotated[
        list[str] | None,
        typer.Option(
            "--runner",
            "-r",
            metavar="NAME or ENGINE_FOLDER",
            show_default="all that can be used",
            help="Runner to measure, by name as in `infer`, or the folder of an engine. Repeat it, or separate names "
            "by commas. The first row is always eager fp32.",
        ),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            show_default="those a runner has",
            help="Precision to measure: fp32, bf16, fp16. Repeat it, or separate names by commas.",
        ),
    ] = None,
    batch: Annotated[
        str | None, typer.Option(show_default="1,4,8; 1 on a CPU", help="Batch sizes, separated by commas.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            "-n",
            show_default="the bundle's; 10 if it has 100 or more",
            help="Denoiser steps of a whole image.",
        ),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            show_default="20; 5 on a CPU",
            help="Measured rounds of steps. Whole images: a fifth of them.",
        ),
    ] = None,
    device: Device = "auto",
    plot_path: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="PATH", show_default="none", help="Draw a plot: .png, .pdf or .svg. Needs matplotlib."
        ),
    ] = None,
    profile_path: Annotated[
        Path | None,
        typer.Option(
            "--profile",
            metavar="PATH",
            show_default="none",
            help="Write a trace of the steps: .json, for ui.perfetto.dev.",
        ),
    ] = None,
    as_json: AsJson = False,
    json_path: Annotated[
        Path | None,
        typer.Option("--json-file", metavar="PATH", show_default="none", help="Write the JSON document to a file."),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Time every runner on this machine.

    Its images are compared with those of the eager network.
    """
    _log(quiet, verbose)
    batches = None if batch is None else tuple(_parse_whole(part, "--batch") for part in batch.split(","))
    if json_path is not None and not json_path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {json_path.parent}", param_hint="--json-file")
    from bsdiff_rt.bench import plot, profile, report
    from bsdiff_rt.bench.candidates import parse_wanted
    from bsdiff_rt.bench.document import BenchSettings, Document, run_benchmark

    if plot_path is not None:
        plot.check_plot(plot_path)
    if profile_path is not None:
        profile.check_profile(profile_path)
    wanted = parse_wanted(_split_names(runner), _split_names(precision))

    def save(document: Document) -> None:
        if json_path is not None:
            write_atomically(json_path, document.to_json().encode())

    settings = BenchSettings(bundle, wanted, device, batches, steps, repeats)
    document = run_benchmark(settings, save, profile=profile_path)
    found = document.to_dict()
    if as_json:
        _print(document.to_json().rstrip())
    else:
        with _writing():
            print_table(*report.build_table(found))
        for line in report.write_notes(found):
            _print(line)
    if plot_path is not None:
        plot.draw_plot(found, plot_path)
    if document.exit_code:
        raise typer.Exit(document.exit_code)


@app.command()
def evaluate(
    predicted: Annotated[Path, typer.Argument(metavar="RESULTS", help="Results of infer: a file or a folder.")],
    soft_tissue: Annotated[Path, typer.Argument(metavar="TRUTH", help="True soft-tissue images: a file or a folder.")],
    cxr: Annotated[Path, typer.Option("--cxr", help="X-rays that the results were made from: a file or a folder.")],
    size: Annotated[
        int, typer.Option(min=16, help="Every image is resized to this many px on its longer side first.")
    ] = 256,
    bundle: Annotated[
        str | None,
        typer.Option(
            "--bundle",
            "-b",
            show_default="the one in report.json, if it is shipped",
            help="Model that made the results. Images that it was trained on are named.",
        ),
    ] = None,
    lungs: Annotated[
        bool,
        typer.Option(
            "--lungs",
            help="Count only the lung fields: NAME_lungs.png beside the X-ray, else found in it. For truths that are "
            "right only there.",
        ),
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Compare results with true soft-tissue images.

    BSR (bone suppression ratio: Yang's, tone-matched, and as the published code computes it), MSE, SSIM, PSNR.
    """
    _log(quiet, verbose)
    from bsdiff_rt.folder.evaluate import evaluate as compare
    from bsdiff_rt.folder.evaluate import match, read_trained_on
    from bsdiff_rt.imaging.metrics import mean_quality

    matches = match(predicted, soft_tissue, cxr)
    known = read_trained_on(predicted, bundle)
    outcomes = list(compare(matches, size, known or (), lungs=lungs))
    rows = [(each.name, each.quality) for each in outcomes if each.quality is not None]
    failed = [(each.name, each.error) for each in outcomes if each.error is not None]
    if not rows:
        raise failed[0][1]
    mean = mean_quality([row for _, row in rows])
    trained_on = [each.name for each in outcomes if each.trained_on]
    if as_json:
        found = {
            "size_px": size,
            "lungs": lungs,
            "images": [{"name": name} | _convert_to_json(row) for name, row in rows],
            "mean": _convert_to_json(mean),
            "trained_on": trained_on if known is not None else None,
            "failed": [{"name": name, "reason": str(error)} for name, error in failed],
        }
        _print(json.dumps(found, indent=1))
    else:
        table = [[name, *(f"{value:.4f}" for value in row.as_dict().values())] for name, row in [*rows, ("mean", mean)]]
        titles = ["image", "BSR", "BSR tone-matched", "BSR as published", "MSE", "SSIM", "PSNR dB"]
        with _writing():
            print_table([escape(title) for title in titles], [[escape(cell) for cell in row] for row in table])
        where = ", inside the lungs" if lungs else ""
        _print(f"Measured with every image at {size} px on its longer side{where}.")
        if without_bone := [name for name, row in rows if math.isnan(row.bsr)]:
            print_line(f"No BSR where X-ray and truth are the same picture: {', '.join(without_bone)}")
    if trained_on:
        print_line(
            f"{len(trained_on)} of {len(rows)} images were used to train this model. Their figures say nothing about "
            f"other patients: {', '.join(trained_on)}"
        )
    elif known is None and not quiet:
        print_line("The model is not known, so images that it was trained on cannot be named. Give --bundle.")
    for _, error in failed:
        _print_error(str(error))
    if failed:
        raise typer.Exit(EXIT_SOME_FAILED)


@app.command(name="report")
def summarise_report(
    output: Annotated[Path, typer.Argument(metavar="DIR", parser=parse_path, help="Output folder of infer or watch.")],
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Summarise a run of any length.

    Files by status, reasons, speed and the slowest files.
    """
    _log(quiet, verbose)
    from bsdiff_rt.folder.summary import format_summary, summarise

    found = summarise(output)
    _print(json.dumps(found, indent=1) if as_json else "\n".join(map(escape, format_summary(found).splitlines())))


@app.command()
def info(quiet: Quiet = False, verbose: Verbose = False, as_json: AsJson = False) -> None:
    """Show versions, devices, runners, bundles and engines.

    What cannot be used here is shown with the reason.
    """
    _log(quiet, verbose)
    from bsdiff_rt.info import describe

    found = describe()
    if as_json:
        _print(json.dumps(found, indent=1))
        return
    lines = []
    for title, content in found.items():
        lines += [title, *(f"  {name}: {value}" for name, value in content.items())]
    _print("\n".join(lines))


def _parse_batch_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not all(part.isascii() and part.isdecimal() for part in (low, high or low)) or text.endswith(":"):
        raise typer.BadParameter(f"{text!r} is not N, MIN:MAX or auto", param_hint="--batch")
    if not 1 <= int(low) <= int(high or low):
        raise typer.BadParameter(f"{text!r} must be 1 or more, with the smaller number first", param_hint="--batch")
    return int(low), int(high or low)


def _parse_batch(text: str) -> int | None:
    return None if text == "auto" else _parse_whole(text, "--batch", "auto or ")


def _parse_steps(text: str | None) -> tuple[int | None, int]:
    """Return the number of steps (None: the bundle's), and in which of them deep features are computed (1: in all)."""
    if text is None:
        return None, 1
    steps, colon, every = text.partition(":")
    if not all(part.isascii() and part.isdecimal() for part in (steps, every if colon else "1")):
        raise typer.BadParameter(f"{text!r} is not N or N:M, such as 50 or 1000:3", param_hint="'--steps'")
    return int(steps), int(every) if colon else 1


def _parse_whole(text: str, option: str, alternative: str = "") -> int:
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is not {alternative}a whole number above 0", param_hint=option)
    return int(text)


def _split_names(values: list[str] | None) -> tuple[str, ...]:
    """Return the values of an option that may be repeated, each a list separated by commas; each name once."""
    return tuple(dict.fromkeys(name for value in values or () for name in value.split(",")))


def _convert_to_json(row: Quality) -> dict[str, float | None]:
    """Return figures for JSON. It has no infinity (PSNR of equal images) and no NaN (BSR without bone): null."""
    return {name: value if math.isfinite(value) else None for name, value in row.as_dict().items()}


def _summarise(report: Report, settings: InferSettings) -> str:
    """Return the last line of a run."""
    counts = report.counts()
    images = "image" if counts["ok"] == 1 else "images"
    skipped = f"skipped {counts['skipped']} finished before, " if counts["skipped"] else ""
    speed = f" ({report.images_per_second:.2f} images/s)" if counts["ok"] else ""
    return (_summarise_retention(report, settings.output) if settings.probe else "") + (
        f"wrote {counts['ok']} {images}, {skipped}refused {counts['refused']}, failed {counts['failed']}{speed}. "
        f"Results and report.json: {escape(str(settings.output))}"
    )


def _summarise_retention(report: Report, output: Path) -> str:
    """Return a line on what `--probe` measured, or nothing."""
    from bsdiff_rt.folder.pipeline import read_files

    entries = read_files(report, output)
    probed = [(entry.retention, entry.input) for entry in entries if entry.retention is not None]
    if not probed:
        return ""
    mean = sum(figures["mean"] for figures, _ in probed) / len(probed)
    least, name = min(probed, key=lambda one: one[0]["percentile_5"])
    return (
        f"{least['nodule_mm']:g} mm nodules keep {mean:.0%} of their contrast on average. The image that loses most is "
        f"{escape(name)}: 5% of its nodules keep {least['percentile_5']:.0%} or less\n"
    )


def _print_plan(entries: list[FileEntry], as_json: bool) -> None:
    if as_json:
        _print(json.dumps([asdict(entry) for entry in entries], indent=1))
        return
    words = {"ok": "would write", "skipped": "would skip", "refused": "would refuse", "failed": "would fail"}
    for entry in entries:
        place = f" -> {entry.output}" if entry.reason is None else f": {entry.reason}"
        _print(escape(f"{words[entry.status]}: {entry.input}{place}"))


def _print(text: str) -> None:
    """Print to stdout, and see to it that the text arrived."""
    with _writing():
        typer.echo(text)


@contextmanager
def _writing() -> Iterator[None]:
    """Write to stdout. If the reader is gone (`| head -1`), what is written is dropped.

    Raises:
        BsdiffError: stdout cannot be written, for example because the disk is full.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout)
    except OSError as error:
        discard(sys.stdout)
        raise BsdiffError(
            f"standard output cannot be written ({error.strerror}). Files that were written are complete."
        ) from error


def _print_error(text: str) -> None:
    """Print an error to stderr. Unlike a log line it has no time."""
    try:
        typer.echo(f"bsdiff-rt: {escape(text)}", err=True)
    except OSError:
        discard(sys.stderr)


def _log(quiet: bool, verbose: bool) -> None:
    """Send log records to stderr: errors only, warnings and what is used, or everything."""
    level = logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(level=logging.WARNING, handlers=[_ToStderr()], force=True)
    logging.getLogger("bsdiff_rt").setLevel(level)


class _ToStderr(logging.Handler):
    """Write log records to what is stderr at the time, which is above the live bar while there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record as one line, followed by its traceback if it has one."""
        try:
            print_line(record.getMessage())
            if record.exc_info:
                typer.echo("".join(traceback.format_exception(*record.exc_info)), err=True)
        except Exception:  # as in every handler of the library: a log line must not end a run
            self.handleError(record)


class _Interrupted(BaseException):
    """Ctrl-C, a scheduler's stop, or a closed terminal. Not KeyboardInterrupt, which typer would end with code 1."""


def _interrupt(*_: object) -> None:
    raise _Interrupted


def _set_up_streams() -> None:
    """Make both streams usable: closed ones go nowhere, and bytes in file names that are no text are shown escaped."""
    if None in (sys.stdout, sys.stderr):  # closed by the shell (`2>&-`)
        nowhere = Path(os.devnull).open("w")  # noqa: SIM115  # until the process ends
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _set_up_signals() -> None:
    """End in an orderly way when interrupted. SIGHUP is left alone if it is ignored, as under nohup."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
            signal.signal(number, _interrupt)


def main() -> None:
    """Run the command line. An error of this package becomes one line and an exit code; any other one is a bug."""
    _set_up_streams()
    if any(not word or (word.startswith("--") and word.find("=") == len(word) - 1) for word in sys.argv[1:]):
        _print_error("an empty argument would mean the current folder. Is a variable of a script not set?")
        raise SystemExit(SettingsError.exit_code)
    if sys.argv[1:] == ["--version"]:  # typer would load pydantic first, which takes longer than everything else
        version(show=True)
    _set_up_signals()
    try:
        app()
    except BsdiffError as error:
        _print_error(describe_error(error))
        raise SystemExit(error.exit_code) from None
    except _Interrupted:
        resumes = ". Finished files are complete; the same command (without --overwrite) goes on with the rest"
        _print_error(f"interrupted{resumes if sys.argv[1:2] == ['infer'] else ''}")
        raise SystemExit(EXIT_INTERRUPTED) from None
