"""A small run, alone or as one of two processes: `python two_processes.py FOLDER FIGURE...`, by torch's launcher.

It is a file of its own so that the processes import no more than they need.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn

from train.loop import LONGEST_WAIT, Trainee, TrainOptions, leave_processes
from train.run import Run

STEPS = 4


def make_trainee():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Conv2d(4, 1, 3))
    return Trainee(network, TrainOptions(steps=STEPS, warmup=0, save_every=1, patience=9))


def sample(index):
    return np.random.default_rng(index).standard_normal((2, 1, 8, 8), dtype=np.float32)


def loss_of(trainee, x):
    return (trainee.model(x) - x[:, :, 2:-2, 2:-2]).square().mean()


def gloo_threads():
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if name == "pt_gloo_runloop"]


def train(folder, figures):
    """Train; the validations give the figures in turn, and one more is interrupted."""

    def validate(picture):
        figure = next(figures, None)
        if figure is None:
            raise KeyboardInterrupt
        return {"psnr": figure}

    trainee = make_trainee()
    assert trainee.accelerator.num_processes == 2
    group = distributed.group.WORLD._get_backend(torch.device("cpu"))
    assert group.options._timeout == LONGEST_WAIT, "the others wait for a long validation"
    run = Run(folder, "x", trainee, "psnr", validate)
    for _, batch in run.batches(lambda step: sample(trainee.sample_index(step))):
        run.after_step({"loss": trainee.update([loss_of(trainee, batch)])})
    assert run.finished, "every process learns that the run is over"


if __name__ == "__main__":
    train(Path(sys.argv[1]), iter(map(float, sys.argv[2:])))
    assert gloo_threads()
    leave_processes()
    assert not gloo_threads(), "they would abort the interpreter at its end, now and then"
