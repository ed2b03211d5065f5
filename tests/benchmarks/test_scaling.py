"""The simulation of an archive run: its limits and losses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.scaling import Assumptions, simulate

IDEAL = Assumptions(
    images=64_000,
    gpu_rate=10,
    core_rate=100,
    cores=8,
    image_mb=1,
    storage_mb_s=1e9,
    list_rate=1e9,
    entry_rate=1e9,
    start_s=0,
    death_hours=1e9,
    straggler_share=0,
    straggler_times=1,
    gpu_price=2,
)


@pytest.mark.parametrize("workers", [1, 10, 100])
def test_without_losses_gpus_add_up(workers):
    outcome = simulate(IDEAL, workers)
    assert outcome.efficiency == pytest.approx(1, abs=0.02)
    assert (outcome.limit, outcome.redone) == ("GPU", 0)
    assert outcome.price == pytest.approx(64_000 / 10 / 3600 * 2, abs=1)


@pytest.mark.parametrize(
    ("changed", "limit", "speed"),
    [
        ({"storage_mb_s": 300}, "storage", 300),
        ({"entry_rate": 200}, "report", 200),
        ({"core_rate": 0.5}, "cores", 400),
    ],
)
def test_the_smallest_rate_is_the_limit(changed, limit, speed):
    outcome = simulate(replace(IDEAL, **changed), 100)
    assert outcome.limit == limit
    assert outcome.images_per_second == pytest.approx(speed, rel=0.02)


def test_listing_stragglers_and_deaths_cost_time():
    fast = simulate(IDEAL, 100).hours
    for changed in ({"list_rate": 1000}, {"straggler_share": 0.1, "straggler_times": 5}, {"death_hours": 0.1}):
        assert simulate(replace(IDEAL, **changed), 100).hours > fast
    assert simulate(replace(IDEAL, death_hours=0.1), 100).redone > 0
