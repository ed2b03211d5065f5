"""Runs that are killed at random points: nothing is half, untrue or lost. docs/reliability.md has the large trial."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import kill_trials

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_ten_kills_leave_whole_files_and_a_true_report(small):
    command = [sys.executable, "-m", "benchmarks.kill_trials", "--kills", "10", "--copies", "1", "--runner", "eager"]
    done = subprocess.run(
        [*command, "--bundle", str(small.folder)], capture_output=True, text=True, timeout=600, check=False, cwd=ROOT
    )
    assert done.stdout, done.stderr
    counted = json.loads(done.stdout)
    assert counted["faults"] == []
    assert counted["kills"] == 10
    assert counted["inputs"] == 4
    assert done.returncode == 0


@pytest.fixture
def finished(tmp_path):
    """A folder with one result and its report, and what its file should be."""
    (tmp_path / "a.png").write_bytes(b"pixels")
    expected = kill_trials.hash_files(tmp_path)
    entry = {"input": "in/a.png", "output": "a.png", "status": "ok", "sha256": expected["a.png"], "maps": {}}
    report = {"bsdiff_rt": "1", "files": [entry], "earlier": [], "planned": []}
    (tmp_path / "report.json").write_text(json.dumps(report))
    return tmp_path, expected, report


def test_a_whole_folder_has_no_fault(finished):
    folder, expected, _ = finished
    assert kill_trials.find_faults(folder, expected) == []


def test_each_kind_of_fault_is_found(finished):
    folder, expected, report = finished
    (folder / "a.png").write_bytes(b"pix")
    assert kill_trials.find_faults(folder, expected) == ["a.png is not complete", "a.png is not as the report says"]
    (folder / "a.png").write_bytes(b"pixels")
    (folder / "report.json").write_text(json.dumps(report | {"files": []}))
    assert kill_trials.find_faults(folder, expected) == ["a.png is not named by the report"]
    (folder / "report.json").write_text("{")
    assert kill_trials.find_faults(folder, expected) == ["report.json is not complete"]
    (folder / "report.json").unlink()
    assert kill_trials.find_faults(folder, expected) == ["a.png without a report"]
