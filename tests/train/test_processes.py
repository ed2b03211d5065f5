"""One run on two processes, on the CPU (gloo): gradients, losses and verdicts are shared."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes
from torch import distributed
from two_processes import STEPS, loss_of, make_trainee, sample
from typer.testing import CliRunner

from train.__main__ import app
from train.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_are_one_run_of_twice_the_batch(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, two_processes.__file__, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    for figures, unjudged in ((["1", "2"], True), (["3", "4"], False)):  # the third validation is interrupted
        done = subprocess.run(
            [*command, *figures], capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment
        )
        assert (done.returncode != 0) == (tmp_path / "x_unjudged.pt").exists() == unjudged, done.stderr[-3000:]

    alone, losses = make_trainee(), []
    for step in range(STEPS):
        halves = [torch.from_numpy(sample(2 * step + rank)) for rank in range(2)]
        losses.append(alone.update([loss_of(alone, half) / 2 for half in halves]))
    together = load_checkpoint(tmp_path / "x.pt")
    torch.testing.assert_close(together["network"], alone.network.state_dict(), rtol=0, atol=1e-6)
    torch.testing.assert_close(together["averaged"], alone.averaged.state_dict(), rtol=0, atol=1e-6)
    with (tmp_path / "x.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == pytest.approx(losses, abs=2e-6)  # six decimals are written


def test_a_command_ends_what_it_shares_with_other_processes(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        assert CliRunner().invoke(app, ["phantoms", str(tmp_path / "p"), "--count", "1", "--size", "64"]).exit_code == 0
        assert not distributed.is_initialized()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
