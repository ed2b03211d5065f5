"""Progress of a training on stderr: a live bar on a terminal, lines with a time in a log."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from train.dry_run import format_seconds

logger = logging.getLogger(__name__)

LOG_EVERY_S = 60.0


class StderrHandler(logging.Handler):
    """Write log lines to whatever `sys.stderr` is at the moment, so that a live bar can print them above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record as a line."""
        sys.stderr.write(self.format(record) + "\n")


class StepProgress:
    """Steps done, loss, seconds per step and time left of one training.

    Args:
        name: of the stage.
        first: steps done before.
        last: steps in all.
        shown: False for a process that shows nothing, such as the second of two.
    """

    def __init__(self, name: str, first: int, last: int, *, shown: bool = True) -> None:
        self._name, self._last = name, last
        self._first = self._step = first
        self._started = self._logged = time.monotonic()
        self._paused_s = 0.0
        self._bar: Progress | None = None
        self._task: Any = None
        self._shown = shown
        if shown and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[loss]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(name, total=last, completed=first, loss="")
            self._bar.start()

    def update(self, step: int, loss: float) -> None:
        """Count a step and show its loss."""
        self._step = step
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=f"loss {loss:.3g}, {self._step_text()}")
            return
        now = time.monotonic()
        if self._shown and now - self._logged > LOG_EVERY_S:
            self._logged = now
            logger.info(
                "%s: step %s of %s, loss %.3g, %s",
                self._name,
                f"{step:,}",
                f"{self._last:,}",
                loss,
                self.describe_rate(),
            )

    def describe_rate(self) -> str:
        """Return seconds per step and time left in words; "" before the first step."""
        done = self._step - self._first
        if not done:
            return ""
        step_s = (time.monotonic() - self._started - self._paused_s) / done
        return f"{self._step_text()}, {format_seconds(step_s * (self._last - self._step))} left"

    def pause(self, seconds: float) -> None:
        """Leave out a time that was not spent on steps, such as that of a validation."""
        self._paused_s += seconds

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _step_text(self) -> str:
        done = max(1, self._step - self._first)
        return f"{format_seconds((time.monotonic() - self._started - self._paused_s) / done)} per step"


def format_figures(figures: dict[str, float]) -> str:
    """Return figures by name in words, with three significant digits: `loss 0.0123, pairs_psnr 34.6`."""
    return ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
