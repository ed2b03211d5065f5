"""What is shown while a run goes on."""

from __future__ import annotations

import re
import sys

import pytest

from bsdiff_rt.folder import progress as module
from bsdiff_rt.folder.progress import BuildProgress, FileProgress, print_line
from bsdiff_rt.folder.report import FileEntry

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


class Gone:
    """A stderr that nobody reads any more."""

    def isatty(self):
        return False

    def write(self, _):
        raise BrokenPipeError(32, "Broken pipe")

    flush = write


def test_a_reader_that_is_gone_ends_no_run(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Gone())
    print_line("anything")
    with FileProgress(1, quiet=False) as progress:
        progress.on_file(FileEntry("a.png", None, "failed", "damaged"))


def test_lines_carry_a_time_unless_on_a_terminal(capsys, monkeypatch):
    print_line("one\ntwo")
    assert re.fullmatch(TIME + r"one\\ntwo\n", capsys.readouterr().err)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    print_line("one")
    assert capsys.readouterr().err == "one\n"


def test_progress_in_a_log(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with FileProgress(400, quiet=False) as progress:
        for number in range(3):
            now[0] += 20
            progress.on_file(FileEntry(f"{number}.png", f"{number}.png", "ok" if number else "skipped"))
        now[0] += 1
        progress.on_file(FileEntry("3.png", None, "failed", "damaged"))
    lines = [re.sub(TIME, "", line) for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "1 of 400 files, 2 h 13 min left",
        "2 of 400 files, 0.03 images/s, 2 h 13 min left",
        "3 of 400 files, 0.03 images/s, 2 h 12 min left",
        "failed: 3.png: damaged",
    ]


def test_quiet_shows_only_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(module, "PLAIN_EVERY_S", -1.0)
    with FileProgress(2, quiet=True) as progress:
        progress.on_file(FileEntry("a.png", "a.png", "ok"))
        progress.on_file(FileEntry("b.png", None, "refused", "a CT"))
    assert [re.sub(TIME, "", line) for line in capsys.readouterr().err.splitlines()] == ["refused: b.png: a CT"]


def test_a_build_in_a_log(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with BuildProgress(quiet=False) as phases:
        now[0] = 42.0
        phases.show("compiling", 0.5)
        now[0] = 420.0
        phases.show("comparing", None)
    lines = [re.sub(TIME, "", line) for line in capsys.readouterr().err.splitlines()]
    assert lines == ["compiling, 50% done (42 s so far)", "comparing (7 min so far)"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5280, "88 min"), (11100, "3 h 5 min")]
)
def test_durations(seconds, text):
    assert module._format_seconds(seconds) == text
