"""One run on two processes, on the CPU (gloo): gradients, losses and verdicts are shared."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, nn
from typer.testing import CliRunner

from train.__main__ import app
from train.checkpoint import load_checkpoint
from train.loop import Trainee, TrainOptions

ROOT = Path(__file__).parents[2]
STEPS = 4
SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_processes import gloo_threads, loss_of, make_trainee, sample
from torch import device, distributed
from train.loop import LONGEST_WAIT, leave_processes
from train.run import Run

figures = iter(map(float, sys.argv[3:]))


def validate(picture):
    figure = next(figures, None)
    if figure is None:
        raise KeyboardInterrupt
    return {"psnr": figure}


def train():
    trainee = make_trainee()
    assert trainee.accelerator.num_processes == 2
    group = distributed.group.WORLD._get_backend(device("cpu"))
    assert group.options._timeout == LONGEST_WAIT, "the others wait for a long validation"
    run = Run(Path(sys.argv[1]), "x", trainee, "psnr", validate)
    for index, batch in run.batches(lambda step: sample(trainee.sample_index(step))):
        run.after_step({"loss": trainee.update([loss_of(trainee, batch)])})
    assert run.finished, "every process learns that the run is over"


train()
assert gloo_threads()
leave_processes()
assert not gloo_threads(), "they would abort the interpreter at its end, now and then"
"""


def make_trainee():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Conv2d(4, 1, 3))
    return Trainee(network, TrainOptions(steps=STEPS, warmup=0, save_every=1, patience=9))


def sample(index):
    return np.random.default_rng(index).standard_normal((2, 1, 8, 8), dtype=np.float32)


def gloo_threads():
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if name == "pt_gloo_runloop"]


def loss_of(trainee, x):
    return (trainee.model(x) - x[:, :, 2:-2, 2:-2]).square().mean()


@pytest.mark.slow
def test_two_processes_are_one_run_of_twice_the_batch(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(script), str(tmp_path), str(Path(__file__).parent)]
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
