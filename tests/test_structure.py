"""Limits on size: modules, functions, the README, the options of `infer`, and the time `--help` takes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GROUPS = ("Input and output", "Model", "Speed", "Run")
CLI = "from bsdiff_rt.cli import main; import sys; sys.argv[0] = 'bsdiff-rt'; main()"
TIMED_CLI = f"import atexit, sys, time; atexit.register(lambda: print(time.process_time(), file=sys.stderr)); {CLI}"


def find_long_functions(folder: str, limit: int) -> list[str]:
    """Return `file:line name (lines)` for each function of `folder` that has more than `limit` lines."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        if path == ROOT / "bsdiff_rt" / "cli.py":  # its functions are lists of options
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > limit:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} ({lines} lines)")
    return found


def run_cli(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a fresh interpreter, as a user's shell does."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=ROOT)


def test_at_most_ten_modules_lie_directly_in_the_package():
    modules = sorted(path.name for path in (ROOT / "bsdiff_rt").glob("*.py"))
    assert len(modules) <= 10, modules


@pytest.mark.parametrize("folder", ["bsdiff_rt", "train", "export", "benchmarks"])
def test_no_function_has_more_than_60_lines(folder):
    assert find_long_functions(folder, 60) == []


@pytest.mark.parametrize("command", [["--help"], ["infer", "--help"], ["--version"]])
def test_help_takes_under_300_milliseconds(command):
    """Processor time of the whole process, the best of ten: other tests on the same core make it seem slower."""
    assert any(float(run_cli(TIMED_CLI, *command).stderr.split()[-1]) < 0.3 for _ in range(10))


def test_the_readme_has_at_most_600_words():
    words = README.read_text(encoding="utf-8").split()
    assert len(words) <= 600, f"README.md has {len(words)} words"


@pytest.mark.parametrize("page", [README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_no_table_row_is_wider_than_120_characters(page):
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert [row for row in rows if len(row) > 120] == []


def test_infer_has_at_most_28_options_in_four_groups():
    """The 24 of the first release, and --probe, --html, --send and --ray, which came later."""
    text = run_cli(CLI, "infer", "--help").stdout
    titles = re.findall(r"^(?:╭─ )?([A-Z][a-z ]+?)(?::| ─+╮)$", text, re.MULTILINE)
    assert [title for title in titles if title not in ("Arguments", "Options")] == list(GROUPS)
    options = set(re.findall(r"^(?:│ )?\W*(?:-\w, +)?(--[a-z][a-z-]*)", text, re.MULTILINE)) - {"--help"}
    assert len(options) <= 28, sorted(options)


def test_every_test_file_has_a_name_of_its_own():
    """pytest imports two files of one name as one module, and then collects nothing at all."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert {name for name in names if names.count(name) > 1} == set()
