"""Calls are timed in turn, and what fails is left out."""

from __future__ import annotations

import itertools

import torch

from bsdiff_rt.runners.timing import median_ratio, time_call, time_in_turn

CPU = torch.device("cpu")


def test_time_call():
    done = []
    assert 0 < time_call(lambda: done.append(1), CPU) < 1
    assert done == [1]


def test_calls_are_taken_in_turn_and_the_warm_up_is_not_counted(clock):
    order = []
    clock += [90.0, 91.0, 1.0, 2.0, 3.0, 4.0]
    times, failed = time_in_turn({name: lambda name=name: order.append(name) for name in "ab"}, 2, CPU)
    assert "".join(order) == "ababab"
    assert times == {"a": [1.0, 3.0], "b": [2.0, 4.0]}
    assert failed == {}


def test_without_a_warm_up_every_round_counts(clock):
    times, _ = time_in_turn({"a": lambda: None}, 3, CPU, warm_up=0)
    assert times == {"a": [1.0] * 3}


def test_a_call_that_fails_is_left_out_and_the_others_go_on(clock):
    calls = itertools.count()

    def fails_in_the_second_round():
        if next(calls) == 1:
            raise RuntimeError("no more")

    times, failed = time_in_turn({"a": fails_in_the_second_round, "b": lambda: None}, 3, CPU, warm_up=0)
    assert times == {"b": [1.0] * 3}
    assert str(failed["a"]) == "no more"
    assert next(calls) == 2


def test_the_median_of_ratios_survives_a_slow_round():
    assert median_ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0
    assert median_ratio([2.0, 2.0, 20.0], [1.0, 10.0, 10.0]) == 2.0
