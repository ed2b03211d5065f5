"""The fuzzer: its inputs are the same each time, and every way to fail is seen and counted."""

from __future__ import annotations

import json
import random
import signal
import time

import pytest

pytest.importorskip("resource", reason="Windows has no limits of this kind")
pytest.importorskip("pynetdicom")

from benchmarks import fuzz
from benchmarks.fuzz_targets import mend_png, open_target
from bsdiff_rt import formats


@pytest.fixture
def alarm():
    before = signal.signal(signal.SIGALRM, fuzz.interrupt)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_whole_inputs_are_taken_and_damaged_ones_taken_or_refused(kind, tmp_path, alarm):
    count = 4 if kind == "dimse" else 25
    with open_target(kind, tmp_path) as (draw, use):
        assert use(draw(random.Random(1), whole=True))
        inputs = [draw(random.Random(f"{kind}:{number}")) for number in range(count)]
        assert inputs == [draw(random.Random(f"{kind}:{number}")) for number in range(count)]
        outcomes = [fuzz.try_one(use, content) for content in inputs]
    assert set(outcomes) <= {"taken", "refused"}, outcomes
    assert "refused" in outcomes


def use_badly(error):
    def use(_):
        raise error

    return use


def test_what_is_no_refusal_is_named(alarm, monkeypatch):
    monkeypatch.setattr(fuzz, "LONGEST_S", 0.05)
    assert fuzz.try_one(lambda _: True, b"") == "taken"
    assert fuzz.try_one(lambda _: False, b"") == "refused"
    assert fuzz.try_one(lambda _: time.sleep(5), b"").startswith("more than")
    assert fuzz.try_one(use_badly(MemoryError()), b"") == "more than 2 GiB"
    assert fuzz.try_one(use_badly(KeyError("x")), b"").startswith("KeyError in test_fuzz_script.py:")
    assert fuzz.try_one(use_badly(SystemExit(0)), b"").startswith("SystemExit")


class Process:
    """A process that is over, or hangs until it is killed."""

    def __init__(self, exitcode):
        self.exitcode = exitcode

    def is_alive(self):
        return self.exitcode is None

    def join(self, seconds=0.0):
        time.sleep(0.01)

    def kill(self):
        self.exitcode = -9


def test_a_process_that_crashes_or_hangs_is_seen(monkeypatch):
    monkeypatch.setattr(fuzz, "GRACE_S", 0.0)
    monkeypatch.setattr(fuzz, "LONGEST_S", 0.05)
    idle = [3.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert fuzz.watch(Process(0), idle) is None
    assert fuzz.watch(Process(-11), idle) == "the process ended with -11"
    assert "native code" in fuzz.watch(Process(None), [3.0, time.monotonic(), 0.0, 0.0, 0.0, 0.0])


def test_an_input_that_ends_while_it_is_looked_at_is_no_hang():
    class State(list):
        def __getitem__(self, place):
            value = super().__getitem__(place)
            self[place] = 0.0
            return value

    process = Process(None)
    process.join = lambda *_: setattr(process, "exitcode", 0)
    assert fuzz.watch(process, State([3.0, time.monotonic(), 0.0, 0.0, 0.0, 0.0])) is None
    assert process.exitcode == 0


def test_odd_values_take_a_place_in_json():
    text = json.dumps({"a": [1, {"b": "c"}], "d": {"e": None}})
    changed = [fuzz.change_json(text, random.Random(seed)) for seed in range(30)]
    assert all(set(one) == {"a", "d"} for one in changed)
    assert len({json.dumps(one) for one in changed}) > 15


def test_mended_png_files_have_right_checksums(tmp_path):
    with open_target("png", tmp_path) as (draw, _):
        whole = draw(random.Random(0), whole=True)
    damaged = bytearray(whole)
    damaged[29] ^= 0xFF  # of the checksum of the header
    (tmp_path / "x.png").write_bytes(mend_png(bytes(damaged)))
    assert mend_png(bytes(damaged)) == whole
    formats.read(tmp_path / "x.png")


@pytest.mark.slow
def test_a_kind_is_run_in_a_process_of_its_own():
    counts, faults, longest = fuzz.run_kind("png", 12, time.monotonic() + 60, None)
    assert sum(counts.values()) == 12
    assert faults == []
    assert longest < fuzz.LONGEST_S
