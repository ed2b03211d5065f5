"""Progress of a training: rounded figures, time left without pauses, lines in a log and a bar on a terminal."""

import io
import logging
import sys

import pytest

from train import progress as module
from train.progress import StderrHandler, StepProgress, format_figures


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it."""
    time = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: time[0])
    return time


def test_figures_are_rounded():
    assert format_figures({"loss": 0.0123456, "pairs_psnr": 34.5678}) == "loss 0.0123, pairs_psnr 34.6"


def test_time_left_leaves_out_what_was_done_before_and_pauses(clock):
    progress = StepProgress("denoiser", 100, 300, shown=False)
    assert progress.describe_rate() == ""
    clock[0] += 30
    progress.pause(20)
    progress.update(120, 0.5)
    assert progress.describe_rate() == "0.5 s per step, 90 s left"


def test_a_log_gets_a_line_a_minute(clock, caplog):
    caplog.set_level(logging.INFO)
    progress = StepProgress("denoiser", 0, 6000)
    for step in range(1, 131):
        clock[0] += 1
        progress.update(step, 0.0123456)
    progress.close()
    assert caplog.messages == [
        "denoiser: step 61 of 6,000, loss 0.0123, 1 s per step, 99 min left",
        "denoiser: step 122 of 6,000, loss 0.0123, 1 s per step, 98 min left",
    ]


def test_a_terminal_gets_a_bar_and_log_lines_above_it(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    progress = StepProgress("denoiser", 0, 100)
    clock[0] += 2
    progress.update(10, 0.5)
    handler = StderrHandler()
    handler.emit(logging.LogRecord("x", logging.INFO, "", 0, "validating step 10", (), None))
    progress.close()
    shown = terminal.getvalue()
    assert "10/100" in shown
    assert "loss 0.5, 0.2 s per step" in shown
    assert "validating step 10\n" in shown.replace("\x1b[2K", "")
