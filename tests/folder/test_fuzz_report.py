"""Damaged and hostile report.json and manifest.json: a clear refusal or nothing, and no path outside the folder."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from helpers import png
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bsdiff_rt.bundle import DIGEST, MANIFEST, open_bundle, to_signed_json
from bsdiff_rt.errors import BundleError, SettingsError
from bsdiff_rt.folder import report
from bsdiff_rt.folder.ledger import Ledger
from bsdiff_rt.folder.report import FileEntry, Report
from bsdiff_rt.folder.tasks import find_tasks

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 100))
SAME_EACH_TIME = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=5000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["../../outside", "/etc/passwd", "a\0b", "", ".", "..", "a.png", "report.json", "\ud800"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
BUNDLE = {"name": "tiny", "sha256": "0" * 64, "licence": "MIT"}
ENTRY = FileEntry("in/a.png", "a.png", "ok", None, 0.5, "1" * 64, "2" * 64, "3" * 64, {"uncertainty": "4" * 64})


def make_report() -> Report:
    return Report(BUNDLE, {"seed": 0, "steps": 3}, {"device": "cpu"})


def list_places(content, place=()):
    """Return the place of every value in nested JSON, as a tuple of keys."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [place, *(each for key, value in inner for each in list_places(value, (*place, key)))]


def change(content, place, value):
    """Put a value into nested JSON. A place that an earlier change took away is left alone."""
    *above, last = place
    try:
        for key in above:
            content = content[key]
        content[last] = value
    except (IndexError, KeyError, TypeError):
        return


def use(folder: Path, source: Path) -> None:
    """Do with a report what a run does, before it writes anything, and what it does with files that give no result."""
    for read in (report.read_results, report.read_planned, report.read_named, report.read_rates):
        read(folder)
    report.read_name(folder, "preview")
    report.read_finished(folder, make_report())
    try:
        tasks = find_tasks([source], folder, "auto", {"uncertainty"})
    except SettingsError:
        return
    for task in tasks:
        assert task.output is None or ".." not in task.output.parts
    ledger = Ledger(make_report(), folder, {str(task.input): task.output for task in tasks}, {}, lambda _: None)
    for task in tasks:
        ledger.add(FileEntry(str(task.input), None, "failed", "damaged", input_sha256="9" * 64))


@pytest.fixture
def run(tmp_path):
    """An X-ray, an output folder with a result, and a file outside that nothing may touch."""
    png(tmp_path / "in" / "a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").write_bytes(b"result")
    (tmp_path / "outside").write_bytes(b"mine")
    return tmp_path


WHOLE = dataclasses.replace(make_report(), files=[ENTRY], earlier=[ENTRY], planned=["b.png"]).to_json()
REPORT_PLACES = st.sampled_from(list_places(json.loads(WHOLE))[1:])


@SAME_EACH_TIME
@given(st.lists(st.tuples(REPORT_PLACES, VALUES), min_size=1, max_size=3))
def test_odd_values_in_a_report(run, changes):
    content = json.loads(WHOLE)
    for place, value in changes:
        change(content, place, value)
    (run / "out" / "report.json").write_text(json.dumps(content))
    use(run / "out", run / "in")
    assert (run / "outside").read_bytes() == b"mine"
    assert (run / "out" / "a.png").exists()  # its input's hash is not known to have changed


@SAME_EACH_TIME
@given(st.binary(max_size=60), st.integers(0, 2000))
def test_damaged_bytes_in_a_report(run, bytes_, place):
    content = bytearray(WHOLE.encode())
    content[place : place + len(bytes_)] = bytes_
    (run / "out" / "report.json").write_bytes(content)
    use(run / "out", run / "in")


def test_a_report_nested_without_end(run):
    (run / "out" / "report.json").write_text("[" * 100_000)
    with pytest.raises(SettingsError, match="not a report of bsdiff-rt, or damaged"):
        find_tasks([run / "in"], run / "out", "auto")
    (run / "in" / "sub").mkdir()
    (run / "in" / "sub" / "report.json").write_text("[" * 100_000)
    assert len(find_tasks([run / "in"], run / "elsewhere", "auto")) == 1


@SAME_EACH_TIME
@given(st.data())
def test_odd_values_in_a_manifest(small, data):
    path = small.folder / MANIFEST
    whole = path.read_text()
    content = {key: value for key, value in json.loads(whole).items() if key != DIGEST}  # it is signed again
    for place in data.draw(st.lists(st.sampled_from(list_places(content)[1:]), min_size=1, max_size=2)):
        change(content, place, data.draw(VALUES))
    try:
        path.write_text(to_signed_json(content))
        open_bundle(small.folder)
    except BundleError:
        pass
    finally:
        path.write_text(whole)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "\0", "nul", '{"format": 1e999}'])
def test_a_manifest_that_is_none(small, text):
    (small.folder / MANIFEST).write_text(text)
    with pytest.raises(BundleError):
        open_bundle(small.folder)
