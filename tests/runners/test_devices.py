"""Devices by name, the processor's identity, and the number of threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bsdiff_rt import open_model
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.runners import devices
from bsdiff_rt.runners.devices import (
    count_threads,
    describe_processor,
    read_processor_clock,
    resolve_device,
    set_threads,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(params=[0, 2])
def gpus(request, monkeypatch):
    """A machine with so many CUDA devices, as far as torch.cuda says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    return request.param


def test_device_auto(gpus):
    assert resolve_device("auto") == (GPU if gpus else CPU)
    assert resolve_device("cpu") == CPU


@pytest.mark.parametrize(("name", "needed"), [("cuda", 1), ("cuda:0", 1), ("cuda:1", 2), ("cuda:2", 3)])
def test_device_by_name(gpus, name, needed):
    if gpus >= needed:
        assert resolve_device(name) == torch.device(name)
    else:
        with pytest.raises(SettingsError, match=f"^{name} does not exist: this machine has {gpus} CUDA devices"):
            resolve_device(name)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cuda:-1", "meta", "mps", "cpu:1", "CPU", "cuda:0:1"])
def test_no_device(gpus, name):
    with pytest.raises(SettingsError, match=f"^'{name}' is not .*Use auto, cpu, cuda or cuda:N") as caught:
        resolve_device(name)
    assert caught.value.setting == "device"


CPUINFO = (
    "processor\t: 0\nmodel name\t: AMD EPYC 9B14\ncpu MHz\t\t: 2600.5\nflags\t\t: fpu avx2 {}\n\n"
    "processor\t: 1\nmodel name\t: 2\n"
)


def test_processor(monkeypatch):
    text = CPUINFO.format("avx512f")
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    name, features = describe_processor()
    assert name == "AMD EPYC 9B14"
    assert read_processor_clock() == 2600.5
    text = CPUINFO.format("avx512f amx_tile")  # a processor of the same name, elsewhere
    assert describe_processor()[0] == name
    assert describe_processor()[1] != features


def test_a_processor_without_cpuinfo(monkeypatch):
    def fail(self: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", fail)
    name, features = describe_processor()
    assert name
    assert features == "unknown"
    assert read_processor_clock() is None


@pytest.fixture
def threads(monkeypatch):
    """Put the number of threads back after the test."""
    before = torch.get_num_threads()
    monkeypatch.setattr(devices, "_threads", None)
    yield
    torch.set_num_threads(before)


def test_threads(threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert count_threads() == 3
    set_threads(2)
    assert count_threads() == torch.get_num_threads() == 2
    with pytest.raises(SettingsError, match=r"^0 is too few\. Use 1 or more\.$") as caught:
        set_threads(0)
    assert caught.value.setting == "threads"
    assert count_threads() == 2


def test_a_model_sets_the_threads_of_its_runner(threads):
    with open_model("demo", runner="onnxruntime", device="cpu", threads=1):
        assert count_threads() == torch.get_num_threads() == 1


def test_threads_where_the_system_does_not_know_a_processs_processors(threads, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # macOS, Windows
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert count_threads() == 5
