"""Signs of a busy machine: each limit, from both sides."""

from __future__ import annotations

import pytest

from bsdiff_rt.bench import busy
from bsdiff_rt.bench.busy import check_load, check_rates, check_tail, read_load, write_warning


@pytest.mark.parametrize(("load", "signs"), [(None, 0), (0.3, 0), (4.0, 0), (4.1, 1)])
def test_load(load, signs, monkeypatch):
    monkeypatch.setattr(busy.os, "cpu_count", lambda: 4)
    assert len(check_load(load)) == signs


@pytest.mark.parametrize(("after", "signs"), [(1.0, 0), (1.14, 0), (1.16, 1), (0.86, 0), (0.84, 1)])
def test_rates(after, signs):
    assert len(check_rates({"fp32": 2e12, "bf16": 9e12}, {"fp32": after * 2e12})) == signs


@pytest.mark.parametrize(("p95", "signs"), [(10.0, 0), (15.0, 0), (15.1, 1)])
def test_tail(p95, signs):
    assert len(check_tail("eager, batch 1", 10.0, p95)) == signs


def test_the_warning_tells_every_sign():
    assert write_warning(["a", "b"]) == (
        "warning: the machine was busy (a; b). Repeat the measurement when it is idle."
    )


def test_the_load_is_a_number_or_unknown(monkeypatch):
    assert read_load() is None or read_load() >= 0
    monkeypatch.delattr(busy.os, "getloadavg", raising=False)
    assert read_load() is None
