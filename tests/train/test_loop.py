"""What both loops share: the schedule of a run, averaged weights, and resuming exactly."""

import numpy as np
import pytest
import torch
from torch import nn

from bsdiff_rt.errors import SettingsError
from train.loop import Trainee, TrainOptions, ahead, load_checkpoint


def make_trainee(**options):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Conv2d(4, 1, 3))
    return Trainee(network, TrainOptions(**{"steps": 20, "warmup": 2} | options))


def advance(trainee, steps):
    losses = []
    for step in range(trainee.step, trainee.step + steps):
        x = torch.from_numpy(np.random.default_rng(step).standard_normal((2, 1, 8, 8), dtype=np.float32))
        loss = (trainee.network(x) - x[:, :, 2:-2, 2:-2]).square().mean()
        trainee.update(loss)
        losses.append(float(loss.detach()))
    return losses


def test_resuming_gives_the_losses_of_an_uninterrupted_run(tmp_path):
    whole = make_trainee()
    expected = advance(whole, 12)
    first = make_trainee()
    advance(first, 5)
    first.save(tmp_path / "x.pt", preset="tiny")
    second = make_trainee()
    second.restore(tmp_path / "x.pt")
    assert second.step == 5
    assert advance(second, 7) == pytest.approx(expected[5:], abs=1e-7)
    for a, b in zip(whole.averaged.parameters(), second.averaged.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_averaged_weights_follow_the_decay():
    trainee = make_trainee(ema=0.5)
    before = [p.clone() for p in trainee.averaged.parameters()]
    advance(trainee, 1)
    decay = min(0.5, 2 / 11)
    for old, averaged, new in zip(before, trainee.averaged.parameters(), trainee.network.parameters(), strict=True):
        torch.testing.assert_close(averaged, decay * old + (1 - decay) * new)


def test_learning_rate_warms_up_and_decays_to_a_hundredth():
    options = TrainOptions(steps=1000, warmup=100, learning_rate=1e-3)
    assert options.rate(0) == pytest.approx(1e-5)
    assert options.rate(99) == pytest.approx(1e-3)
    assert options.rate(550) == pytest.approx(1e-3 * (0.01 + 0.99 * 0.5))
    assert options.rate(1000) == pytest.approx(1e-5)


def test_crops_follow_the_parts_of_the_run_at_equal_cost():
    options = TrainOptions(steps=100, crops=((0.5,), (0.5, 1.0), (1.0,)), images=4)
    assert options.crop(0, 64) == (16, 32)
    assert {options.crop(step, 64) for step in (34, 35)} == {(16, 32), (4, 64)}
    assert options.crop(99, 64) == options.crop(1000, 64) == (4, 64)
    assert options.crop(0, 16) == (4, 16)  # no smaller than the networks can halve


def test_checkpoint_of_another_network_is_refused(tmp_path):
    make_trainee().save(tmp_path / "x.pt")
    other = Trainee(nn.Conv2d(1, 1, 1), TrainOptions())
    with pytest.raises(SettingsError, match="checkpoint of another network"):
        other.restore(tmp_path / "x.pt")


def test_missing_and_foreign_checkpoints_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(SettingsError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "list.pt")


def test_batches_come_in_order_whatever_the_depth():
    made = [(step, int(batch[0])) for step, batch in ahead(lambda step: np.array([step * 2]), 3, 11, depth=4)]
    assert made == [(step, step * 2) for step in range(3, 11)]
