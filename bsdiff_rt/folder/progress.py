"""Show progress on stderr: a live bar on a terminal, lines with the time of day elsewhere. Torch-free."""

from __future__ import annotations

import os
import sys
import time
import unicodedata
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

import typer

if TYPE_CHECKING:
    from bsdiff_rt.folder.report import FileEntry

PLAIN_EVERY_S = 10.0
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # Unicode's controls, bytes that are no text, line and paragraph separators


def escape(text: str) -> str:
    """Return a text in which nothing moves the cursor or begins another line. A file name may hold any character."""
    return "".join(
        c.encode("unicode_escape", "surrogatepass").decode() if unicodedata.category(c) in _UNPRINTABLE else c
        for c in text
    )


def print_line(text: str) -> None:
    """Print one line to stderr, with the local time in front unless stderr is a terminal.

    If nobody reads stderr any more, the line is lost and nothing else happens.
    """
    try:
        prefix = "" if sys.stderr.isatty() else time.strftime("%Y-%m-%d %H:%M:%S ")
        typer.echo(prefix + escape(text), err=True)
    except OSError:
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Send everything that is still written to a broken stream nowhere. Otherwise Python would fail when it exits."""
    with suppress(OSError, ValueError, AttributeError):  # no file behind it
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class FileProgress:
    """Show files done, speed and time left: a bar on a terminal, a line now and then in a log.

    Args:
        total: number of files; None if it is not known.
        quiet: show only files that were refused or failed.

        look_for: a text that may be part of a file's reason.

    Attributes:
        found: whether it was part of any.
    """

    def __init__(self, total: int | None, quiet: bool, look_for: str = "") -> None:
        self._total, self._quiet, self._look_for = total, quiet, look_for
        self.found = False
        self._done = self._computed = 0
        self._started = self._printed = time.monotonic()
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
        """Count one file, and print at once if it was refused or failed."""
        self._done += 1
        self._computed += entry.status == "ok"
        elapsed = time.monotonic() - self._started
        speed = f"{self._computed / elapsed:.2f} images/s" if self._computed and elapsed else ""
        if entry.reason is not None:
            self.found = self.found or (bool(self._look_for) and self._look_for in entry.reason)
            self._print(f"{entry.status}: {entry.input}: {entry.reason}")
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.update(self._task, advance=1, speed=speed)
        elif time.monotonic() - self._printed > PLAIN_EVERY_S:
            self._printed = time.monotonic()
            done, left = f"{self._done} files", ""
            if self._total is not None:
                left = f"{_format_seconds(elapsed / self._done * (self._total - self._done))} left"
                done = f"{self._done} of {self._total} files"
            parts = (done, speed, left)
            self._print(", ".join(part for part in parts if part))

    def _print(self, line: str) -> None:
        if self._bar is None:
            print_line(line)
            return
        with suppress(OSError):  # nobody reads it any more, which is no reason to leave files undone
            self._bar.console.print(escape(line), markup=False, highlight=False, soft_wrap=True)


class BuildProgress:
    """Show what a build is doing and for how long: a live line on a terminal, a line for each phase in a log.

    Args:
        quiet: show nothing.
    """

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
        """Show a phase, and the share of the build that is done, 0 to 1; None if it is not known."""
        if self._live is not None:
            self._live.update(self._task, description=phase)
            if done is not None:
                self._live.update(self._task, completed=done, total=1)
        elif not self._quiet:
            share = "" if done is None else f", {done:.0%} done"
            print_line(f"{phase}{share} ({_format_seconds(time.monotonic() - self._started)} so far)")


def _format_seconds(seconds: float) -> str:
    """Return a duration as `40 s`, `12 min` or `3 h 5 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
