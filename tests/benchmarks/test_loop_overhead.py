"""The share of sampling time spent outside the network."""

from __future__ import annotations

import time

from helpers import ToyRunner

from benchmarks import loop_overhead
from benchmarks.loop_overhead import Overhead, measure_overhead
from bsdiff_rt.config import Schedule
from bsdiff_rt.sampling.schedule import sampler_table


def test_time_in_the_network_is_not_counted(monkeypatch):
    runner, table = ToyRunner(16), sampler_table(Schedule(objective="x0"), "ddim", 2)
    quick = measure_overhead(runner, table, 1)
    monkeypatch.setattr(runner, "denoise", lambda x_t, cxr, t, out: time.sleep(0.05))
    slow = measure_overhead(runner, table, 2)
    assert 0 < slow.share < quick.share < 1
    assert slow.share < 0.5  # 0.1 s of sleep against some 0.1 ms of arithmetic on 256 pixels
    assert len(slow.step_times) == 4  # without the warm-up
    assert min(slow.step_times) >= 0.05


def test_a_busy_machine_is_reported(monkeypatch, capsys):
    rates = iter([{"fp32": 1e12}, {"fp32": 2e12}])
    monkeypatch.setattr(loop_overhead, "measure_matmul_rates", lambda *_: next(rates))
    monkeypatch.setattr(loop_overhead, "read_load", lambda: None)
    monkeypatch.setattr(loop_overhead, "TRIALS", (("ddim", 2, 1),))
    monkeypatch.setattr(loop_overhead, "load", lambda *_: ToyRunner(16))
    monkeypatch.setattr(loop_overhead, "measure_overhead", lambda *_: Overhead(0.007, (1.0, 1.0, 1.6)))
    loop_overhead.main()
    said = capsys.readouterr()
    assert said.out == "ddim, 2 steps: 0.70% of the time outside the network\n"
    assert "ddim, 2 steps: p95 is 1.6 times the median" in said.err
    assert "fp32 matrix products ran at 200% of their first rate" in said.err
