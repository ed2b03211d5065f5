"""The kernel behind the denoiser: the plain version's numbers, and taken only where it gives them.

Triton's interpreter runs the kernel without a GPU. It must be chosen before Triton is imported, hence a fresh process.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bsdiff_rt.sampling import fused_step
from bsdiff_rt.sampling.fused_step import TOLERANCE, choose_step
from bsdiff_rt.sampling.sampler import step

ROOT = Path(__file__).parents[2]
CUDA = torch.device("cuda", 0)
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed; torch for CUDA brings it"
)
COMPARE = """
import json, torch
from toy import SCHEDULES, ToyRunner, draws, images
from bsdiff_rt.config import SAMPLERS
from bsdiff_rt.sampling.buffers import StepBuffers
from bsdiff_rt.sampling.fused_step import fused_step, measure_difference
from bsdiff_rt.sampling.sampler import step
from bsdiff_rt.sampling.schedule import sampler_table

found = {"one step": measure_difference(torch.device("cpu"), step)}
for name in SAMPLERS:
    table, results = sampler_table(SCHEDULES[0], name, 5), []
    for version in (step, fused_step):
        buffers, draw = StepBuffers.allocate(images(dtype=torch.float32), table), draws()
        buffers.start(draw(0))
        for k in range(5):
            buffers.ring.copy_(draw(k + 1))
            version(ToyRunner(SCHEDULES[0]), buffers)
        results.append(torch.cat((buffers.x_t, buffers.x0, buffers.x0_previous)))
        assert buffers.index.tolist() == [5]
    found[name] = float((results[0] - results[1]).abs().max())
print(json.dumps(found))
"""


@needs_triton
def test_the_kernel_is_the_plain_version():
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPARE], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 5
    assert found["one step"] <= TOLERANCE
    # In the noisiest step P is 255, so x0 has the rounding of numbers of that size before the clamp.
    assert max(found.values()) < 1e-4


@pytest.fixture
def fresh():
    """The comparison is made once for each device; forget it before and after."""
    fused_step._agrees.cache_clear()
    yield
    fused_step._agrees.cache_clear()


def test_a_cpu_has_the_plain_version(monkeypatch):
    monkeypatch.setattr(fused_step, "measure_difference", lambda *_: pytest.fail("compared"))
    assert choose_step(torch.device("cpu"), step) is step


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("difference", "chosen"), [(0.0, fused_step.fused_step), (2e-6, step), (float("inf"), step), (float("nan"), step)]
)
def test_a_kernel_that_differs_is_not_taken(monkeypatch, caplog, difference, chosen):
    compared = []
    monkeypatch.setattr(fused_step, "measure_difference", lambda *which: compared.append(which) or difference)
    assert [choose_step(CUDA, step) for _ in range(2)] == [chosen] * 2
    assert compared == [(CUDA, step)]
    warned = "The step's kernel differs by" in caplog.text
    assert warned == (chosen is step)


@pytest.mark.usefixtures("fresh")
def test_a_kernel_that_does_not_run_is_not_taken(monkeypatch, caplog):
    def fail(*_):
        raise ImportError("No module named\n'triton'")

    caplog.set_level(logging.INFO, "bsdiff_rt")
    monkeypatch.setattr(fused_step, "measure_difference", fail)
    assert choose_step(CUDA, step) is step
    expected = "The step's kernel does not work on cuda:0 (ImportError: No module named 'triton'). Its operations run"
    assert expected in caplog.text


@pytest.mark.usefixtures("fresh")
def test_too_little_memory_is_the_callers_affair(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fused_step, "measure_difference", fail)
    with pytest.raises(torch.OutOfMemoryError):
        choose_step(CUDA, step)


def test_the_comparison_sees_a_difference(monkeypatch):
    """The kernel's place is taken by the plain version, with one pixel changed."""

    def change(value):
        def changed(runner, buffers):
            step(runner, buffers)
            buffers.x_t[1, 0, 2, 2] = value

        return changed

    for version, smallest in ((step, 0.0), (change(10.0), 1.0), (change(torch.nan), float("inf"))):
        monkeypatch.setattr(fused_step, "fused_step", version)
        difference = fused_step.measure_difference(torch.device("cpu"), step)
        assert difference >= smallest
        assert (difference == 0) == (version is step)


@pytest.mark.gpu
def test_the_kernel_is_the_plain_version_on_a_gpu():
    pytest.importorskip("triton")
    assert fused_step.measure_difference(CUDA, step) <= TOLERANCE
