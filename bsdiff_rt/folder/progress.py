"""Progress on stderr: live on a terminal, plain lines in a log. Torch-free."""

from __future__ import annotations

import sys
import time
import unicodedata
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from bsdiff_rt.folder.report import FileEntry

PLAIN_EVERY_S = 10.0
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # Unicode's controls, bytes that are no text, line and paragraph separators


def printable(text: str) -> str:
    """A message without what would move a terminal's cursor or begin another line: a file name may hold anything."""
    return "".join(
        c.encode("unicode_escape", "surrogatepass").decode() if unicodedata.category(c) in _UNPRINTABLE else c
        for c in text
    )


class FileProgress:
    """Files done, images/s and time left, on stderr: a live bar on a terminal, a line now and then in a log."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._quiet = total, quiet
        self._done = self._computed = 0
        self._started = self._told = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> FileProgress:
        if sys.stderr.isatty() and not self._quiet:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=self._total, speed="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def on_file(self, entry: FileEntry) -> None:
        """Count one file; say at once what is wrong with it."""
        self._done += 1
        self._computed += entry.status == "ok"
        elapsed = time.monotonic() - self._started
        speed = f"{self._computed / elapsed:.2f} images/s, " if self._computed and elapsed else ""
        if entry.reason is not None:
            self._say(f"{entry.status}: {entry.input}: {entry.reason}")
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.update(self._task, advance=1, speed=speed.rstrip(", "))
        elif time.monotonic() - self._told > PLAIN_EVERY_S:
            self._told = time.monotonic()
            left = elapsed / self._done * (self._total - self._done)
            self._say(f"{self._done}/{self._total} files, {speed}{left:.0f} s left")

    def _say(self, line: str) -> None:
        line = printable(line)
        with suppress(OSError):  # whoever listened is gone: no reason to leave files undone
            if self._bar is not None:
                self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
            else:
                typer.echo(line, err=True)


class BuildProgress:
    """What a build is doing and since when, on stderr: a live line on a terminal, a line per phase in a log."""

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._started = quiet, time.monotonic()
        self._live: Any = None

    def __enter__(self) -> BuildProgress:
        if sys.stderr.isatty() and not self._quiet:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._live = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._live.add_task("", total=None)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, phase: str, done: float | None) -> None:
        """A phase, and the share done in [0, 1], None where it is not known."""
        if self._live is not None:
            self._live.update(self._task, description=phase)
            if done is not None:
                self._live.update(self._task, completed=done, total=1)
        elif not self._quiet:
            share = "" if done is None else f", {done:.0%} done"
            typer.echo(f"{time.monotonic() - self._started:.0f} s: {phase}{share}", err=True)
