"""The share of a sampling run spent outside the network."""

from __future__ import annotations

import time

from helpers import ToyRunner

from benchmarks.loop_overhead import share_outside
from bsdiff_rt.config import Schedule
from bsdiff_rt.sampling.schedule import sampler_table


def test_time_in_the_network_is_not_counted(monkeypatch):
    runner, table = ToyRunner(16), sampler_table(Schedule(objective="x0"), "ddim", 2)
    quick = share_outside(runner, table, 1)
    monkeypatch.setattr(runner, "denoise", lambda x_t, cxr, t, out: time.sleep(0.05))
    slow = share_outside(runner, table, 1)
    assert 0 < slow < quick < 1
    assert slow < 0.5  # 0.1 s of sleep against some 0.1 ms of arithmetic on 256 pixels
