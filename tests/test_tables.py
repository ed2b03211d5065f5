"""Text tables: aligned in a file, never cut on a narrow terminal."""

from __future__ import annotations

import re

import pytest

from bsdiff_rt import tables
from bsdiff_rt.tables import format_table, print_table, split_columns

HEADER = ["runner", "step ms", "PSNR [dB]"]
ROWS = [["eager", "176.25", "-"], ["onnxruntime", "9.5", "138.0"]]


def test_a_plain_table_is_aligned():
    assert format_table(HEADER, ROWS) == [
        "runner       step ms  PSNR [dB]",
        "eager         176.25          -",
        "onnxruntime      9.5      138.0",
    ]


def test_a_pipe_gets_plain_lines(capsys):
    print_table(HEADER, ROWS)
    assert capsys.readouterr().out.splitlines() == format_table(HEADER, ROWS)


@pytest.mark.parametrize("columns", [200, 30, 5])
def test_no_terminal_is_too_narrow_for_a_number(columns, capsys, monkeypatch):
    monkeypatch.setattr(tables.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    print_table(HEADER, ROWS)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    words = shown.split()
    for cell in ("176.25", "138.0", "9.5"):
        assert words.count(cell) == 1
    assert "PSNR [dB]" in shown  # brackets are no markup
    assert words.count("onnxruntime") == (1 if columns == 200 else 2)


def test_columns_that_fit_stay_together():
    assert split_columns([4, 3, 3, 3], 100, 2) == [[0, 1, 2, 3]]
    assert split_columns([4, 3, 3, 3], 16, 2) == [[0, 1, 2], [0, 3]]
    assert split_columns([4, 30, 3], 16, 2) == [[0, 1], [0, 2]]
