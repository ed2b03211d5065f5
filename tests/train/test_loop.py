"""What both loops share: the schedule of a run, averaged weights, and resuming exactly."""

import csv
import logging
import math
import os

import numpy as np
import pytest
import torch
from torch import nn

from bsdiff_rt.errors import SettingsError
from train import run as run_module
from train.checkpoint import load_checkpoint
from train.loop import Trainee, TrainOptions, choose_bf16, fix_crop, make_accelerator, prefetch, split_batch
from train.run import Run


def make_trainee(**options):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Conv2d(4, 1, 3))
    return Trainee(network, TrainOptions(**{"steps": 20, "warmup": 2} | options))


def advance(trainee, steps):
    losses = []
    for step in range(trainee.step, trainee.step + steps):
        x = torch.from_numpy(np.random.default_rng(step).standard_normal((2, 1, 8, 8), dtype=np.float32))
        losses.append(trainee.update(summands(trainee, x)))
    return losses


def summands(trainee, x):
    for (piece,) in split_batch(trainee.options.accumulate, x):
        error = trainee.model(piece) - piece[:, :, 2:-2, 2:-2]
        yield error.square().mean() * (len(piece) / len(x))


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="training takes the GPU, in channels last")
def test_weights_keep_the_plain_order_on_a_cpu():
    """oneDNN's gradients of ResNet-BS are slower in channels last."""
    weight = Trainee(nn.Conv2d(4, 4, 3), TrainOptions()).network.weight
    assert weight.is_contiguous()


def test_learning_rate_warms_up_and_decays_to_a_hundredth():
    options = TrainOptions(steps=1000, warmup=100, learning_rate=1e-3)
    assert options.rate(0) == pytest.approx(1e-5)
    assert options.rate(99) == pytest.approx(1e-3)
    assert options.rate(550) == pytest.approx(1e-3 * (0.01 + 0.99 * 0.5))
    assert options.rate(1000) == pytest.approx(1e-5)


def test_crops_of_one_side_all_through_the_run():
    options = TrainOptions(steps=100, crops=fix_crop(96, 256), images=2)
    assert {options.crop(step, 256) for step in (0, 50, 99)} == {(14, 96)}
    with pytest.raises(SettingsError, match=r"--crop 272 is more than --size 256\. Choose at most that"):
        fix_crop(272, 256)
    with pytest.raises(SettingsError, match="--crop 100: give a multiple of 16 px"):
        fix_crop(100, 256)


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
    made = [(step, int(batch[0])) for step, batch in prefetch(lambda step: np.array([step * 2]), 3, 11, depth=4)]
    assert made == [(step, step * 2) for step in range(3, 11)]


def test_a_batch_in_pieces_has_the_same_gradient():
    """Equal up to the order of float32 sums."""
    whole, parts = make_trainee(), make_trainee(accumulate=2)
    assert advance(whole, 4) == pytest.approx(advance(parts, 4), rel=1e-5)
    for a, b in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_batch_is_never_cut_into_empty_pieces():
    x, y = torch.arange(3), torch.arange(3) * 2
    assert [(len(a), len(b)) for a, b in split_batch(5, x, y)] == [(1, 1)] * 3
    assert [a.tolist() for a, _ in split_batch(2, x, y)] == [[0, 1], [2]]


def test_drops_replace_the_cosine():
    options = TrainOptions(steps=200, warmup=0, learning_rate=1e-4, drops=(0.125, 0.2, 0.35))
    rates = [options.rate(step) for step in (0, 24, 25, 39, 40, 69, 70, 199)]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6, 1e-7, 1e-7])


def test_the_gradient_is_clipped_to_its_norm_or_not_at_all():
    norms = []
    for clip in (1e-3, 0.0):
        trainee = make_trainee(clip=clip)
        trainee.update([(trainee.model(torch.ones(1, 1, 8, 8)) * 100).square().mean()])
        norms.append(torch.linalg.vector_norm(torch.cat([p.grad.ravel() for p in trainee.network.parameters()])))
    assert float(norms[0]) == pytest.approx(1e-3, rel=1e-3)
    assert float(norms[1]) > 1


def test_statistics_of_batch_norms_are_part_of_the_average():
    trainee = Trainee(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)), TrainOptions())
    trainee.update([trainee.model(torch.randn(4, 1, 8, 8)).square().mean()])
    assert trainee.averaged[1].num_batches_tracked == 1
    torch.testing.assert_close(trainee.averaged[1].running_var, trainee.network[1].running_var)


def test_mixed_precision_is_what_was_asked_for():
    assert choose_bf16(True)
    assert not choose_bf16(False)
    assert choose_bf16(None) in (True, False)


class Interrupted(Exception):
    pass


def run_to_the_end(folder, figures, **options):
    """A run that is judged by the given figures in turn, and interrupted where they end; the steps it was judged at."""
    trainee = make_trainee(**{"save_every": 2} | options)
    figures, judged = iter(figures), []

    def validate(picture):
        assert picture.name == "x_samples.png"
        figure = next(figures, None)
        if figure is None:
            raise Interrupted
        judged.append(trainee.step)
        return {"pairs_bsr": -1.0, "pairs_psnr": figure}

    run = Run(folder, "x", trainee, "psnr", validate, size=8)
    for index, batch in run.batches(lambda step: np.full((2, 1, 8, 8), step, np.float32)):
        assert index == trainee.step == int(batch[0, 0, 0, 0])
        run.after_step({"loss": trainee.update(summands(trainee, batch))})
    return judged


def files_of(folder):
    return sorted(path.name for path in folder.iterdir() if not path.is_dir())


def test_training_stops_when_the_figure_gets_no_better_and_keeps_the_best(tmp_path):
    assert run_to_the_end(tmp_path, [1.0, 3.0, 2.0, 3.0, 9.0], patience=2) == [2, 4, 6, 8]
    kept = load_checkpoint(tmp_path / "x.pt")
    assert kept["step"] == 4
    assert kept["size"] == 8
    assert kept["stopping"] == {"best": 3.0, "checks": 0, "finished": True}
    assert run_to_the_end(tmp_path, [], patience=2) == []  # finished: the same command changes nothing
    with pytest.raises(SettingsError, match=r"x\.pt: this run is finished and holds its best checkpoint"):
        run_to_the_end(tmp_path, [], patience=2, steps=77)


def test_patience_is_counted_on_after_an_interruption(tmp_path):
    with pytest.raises(Interrupted):
        run_to_the_end(tmp_path, [3.0, 2.0], patience=2)
    assert load_checkpoint(tmp_path / "x.pt")["step"] == 4  # the one whose verdict is known
    assert run_to_the_end(tmp_path, [2.0], patience=2) == [6]
    assert load_checkpoint(tmp_path / "x.pt")["step"] == 2


@pytest.mark.parametrize("patience", [0, 2])
def test_an_interrupted_validation_costs_no_training_and_is_made_up_for(tmp_path, patience):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    options = {"steps": 4, "patience": patience}
    assert run_to_the_end(whole, [1.0, 2.0], **options) == [2, 4]
    with pytest.raises(Interrupted):
        run_to_the_end(parts, [], **options)
    assert files_of(parts) == ["x_unjudged.pt"]
    with pytest.raises(Interrupted):
        run_to_the_end(parts, [1.0], **options)
    assert load_checkpoint(parts / "x.pt")["step"] == 2
    assert run_to_the_end(parts, [2.0], **options) == [4]
    assert files_of(parts) == files_of(whole)
    one, other = (load_checkpoint(folder / "x.pt") for folder in (whole, parts))
    torch.testing.assert_close(one["network"], other["network"], rtol=0, atol=1e-7)
    torch.testing.assert_close(one["averaged"], other["averaged"], rtol=0, atol=1e-7)
    assert one["stopping"] == other["stopping"]
    logs = []
    for folder in (whole, parts):
        with (folder / "x.csv").open() as file:
            logs.append([row | {"time": None} for row in csv.DictReader(file)])
    assert logs[0] == logs[1]


@pytest.mark.parametrize("patience", [0, 3])
@pytest.mark.parametrize("figure", [math.nan, math.inf])
def test_a_figure_that_is_not_finite_replaces_no_good_checkpoint(tmp_path, patience, figure):
    options = {"steps": 6, "patience": patience}
    with pytest.raises(
        SettingsError, match=rf"pairs_psnr is {figure} after step 4, which is not kept\. Lower --learning"
    ):
        run_to_the_end(tmp_path, [1.0, figure], **options)
    assert load_checkpoint(tmp_path / "x.pt")["step"] == 2
    assert "x_unjudged.pt" not in files_of(tmp_path)
    assert run_to_the_end(tmp_path, [2.0, 1.5], **options, learning_rate=1e-4) == [4, 6]
    assert load_checkpoint(tmp_path / "x.pt")["step"] == (4 if patience else 6)


@pytest.mark.parametrize("options", [{"steps": 20, "patience": 2}, {"steps": 6, "patience": 9}])
def test_a_best_checkpoint_that_could_not_be_put_in_place_is_so_on_resuming(tmp_path, options, monkeypatch):
    write = run_module.write_checkpoint

    def full(state, path, last_step):
        if state["stopping"]["finished"]:
            raise SettingsError("no space")
        write(state, path, last_step)

    monkeypatch.setattr(run_module, "write_checkpoint", full)
    with pytest.raises(SettingsError, match="no space"):
        run_to_the_end(tmp_path, [3.0, 2.0, 1.0], **options)
    monkeypatch.undo()
    assert run_to_the_end(tmp_path, [1.0], **options) == [6]
    kept = load_checkpoint(tmp_path / "x.pt")
    assert (kept["step"], kept["stopping"]["finished"]) == (2, True)
    assert files_of(tmp_path) == ["x.csv", "x.pt", "x_best.pt"]


@pytest.mark.parametrize("options", [{"steps": 20, "patience": 2}, {"steps": 6, "patience": 9}])
def test_what_an_earlier_version_left_at_its_end_is_put_right(tmp_path, options):
    """It saved the last checkpoint as NAME.pt before it put the best one there."""
    with pytest.raises(Interrupted):
        run_to_the_end(tmp_path, [3.0, 2.0, 1.0], steps=20, patience=9)
    (tmp_path / "x_unjudged.pt").unlink()
    last = load_checkpoint(tmp_path / "x.pt")
    assert (last["step"], last["stopping"]) == (6, {"best": 3.0, "checks": 2, "finished": False})
    assert set(last) == {"network", "averaged", "optimizer", "step", "usual_norm", "options", "size", "stopping"}
    assert run_to_the_end(tmp_path, [], **options) == []
    kept = load_checkpoint(tmp_path / "x.pt")
    assert (kept["step"], kept["stopping"]["finished"]) == (2, True)


def test_without_patience_the_last_step_is_kept(tmp_path):
    assert run_to_the_end(tmp_path, range(4, 0, -1), steps=7) == [2, 4, 6, 7]
    assert load_checkpoint(tmp_path / "x.pt")["step"] == 7
    assert not (tmp_path / "x_best.pt").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_weights():
    trainee = make_trainee()
    before = [p.clone() for p in trainee.network.parameters()]
    with pytest.raises(SettingsError, match=r"the loss of step 0 is inf\. Lower --learning-rate"):
        trainee.update([trainee.model(torch.full((1, 1, 8, 8), 1e30)).square().mean()])
    assert all(torch.equal(a, b) for a, b in zip(before, trainee.network.parameters(), strict=True))
    assert trainee.step == 0


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_ends_the_run_and_leaves_the_weights(clip):
    trainee = make_trainee(clip=clip)
    before = [p.clone() for p in trainee.network.parameters()]
    trainee.network[0].weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(SettingsError, match=r"the norm of the gradient of step 0 is nan\. Lower --learning-rate"):
        advance(trainee, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, trainee.network.parameters(), strict=True))
    assert trainee.step == 0


def test_what_is_not_finite_is_not_saved(tmp_path):
    trainee, path = make_trainee(), tmp_path / "x.pt"
    trainee.save(path)
    advance(trainee, 1)
    trainee.averaged[2].bias.fill_(math.nan)
    critic = {"network": {"weight": torch.tensor([1.0, math.inf])}}
    with pytest.raises(SettingsError, match=r"not finite after step 1, and not saved: averaged, critic\. Lower"):
        trainee.save(path, critic=critic, best=-math.inf)
    assert load_checkpoint(path)["step"] == 0


@pytest.mark.parametrize("last", ["there is no checkpoint yet", "the last checkpoint is of step 2"])
def test_a_full_disk_says_what_is_needed_and_leaves_the_last_checkpoint(tmp_path, last):
    """/dev/full takes nothing, as a full disk does."""
    if "step 2" in last:
        run_to_the_end(tmp_path, [1.0], steps=2)
    before = files_of(tmp_path)
    (tmp_path / "x_unjudged.partial").symlink_to("/dev/full")
    pattern = (
        r"x_unjudged\.pt: cannot be written \(OSError: .*No space left.*\)\. It takes 0.0 MB, [\d.]+ MB are free\. .*: "
    )
    with pytest.raises(SettingsError, match=pattern + last):
        run_to_the_end(tmp_path, [1.0], steps=4)
    assert files_of(tmp_path) == before
    if before:
        assert load_checkpoint(tmp_path / "x.pt")["step"] == 2


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order, replace, sync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: order.append("content") or sync(number))
    monkeypatch.setattr(os, "replace", lambda *paths: order.append("name") or replace(*paths))
    make_trainee().save(tmp_path / "x.pt")
    assert order == ["content", "name"]


def test_other_settings_than_the_checkpoints_are_refused(tmp_path):
    run_to_the_end(tmp_path, [1.0], steps=2)
    with pytest.raises(SettingsError, match=r"x\.pt: trained with size 8, not 16\. Give the same, or another"):
        Run(tmp_path, "x", make_trainee(), "psnr", dict, size=16)


def test_other_options_than_the_checkpoints_are_said_and_used(tmp_path, caplog):
    run_to_the_end(tmp_path, [1.0], steps=2)
    caplog.set_level(logging.WARNING)
    Run(tmp_path, "x", make_trainee(steps=2, save_every=2), "psnr", dict)
    assert not caplog.messages
    trainee = make_trainee(steps=4, save_every=2, learning_rate=0.5, weight_decay=9.0)
    Run(tmp_path, "x", trainee, "psnr", dict)
    path = tmp_path / "x.pt"
    assert caplog.messages == [
        f"{path}: trained with steps 2 so far, continues with 4",
        f"{path}: trained with learning_rate 0.001 so far, continues with 0.5",
        f"{path}: trained with weight_decay 0.0001 so far, continues with 9.0",
    ]
    advance(trainee, 1)
    (group,) = trainee.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (trainee.options.rate(2), 9.0)


def test_a_resumed_run_does_not_hold_the_weights_twice(tmp_path):
    run_to_the_end(tmp_path, [1.0], steps=2)
    run = Run(tmp_path, "x", make_trainee(steps=2, save_every=2), "psnr", dict, size=8)
    assert set(run.restored) == {"step", "usual_norm", "options", "size", "stopping"}


def test_a_damaged_checkpoint_and_a_size_that_cannot_be_halved(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"PK cut off")
    with pytest.raises(SettingsError, match=r"x\.pt: damaged, or no checkpoint"):
        load_checkpoint(tmp_path / "x.pt")
    with pytest.raises(SettingsError, match="--size 108: give a multiple of 16 px"):
        TrainOptions(steps=10).crop(0, 108)


def test_several_processes_without_a_gpu_are_refused(monkeypatch):
    """Each would take itself for the only one and write the same files."""
    assert make_accelerator().num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match=r"2 processes were launched, but there is no GPU .* without a launcher"):
        make_accelerator()


def test_a_gradient_much_larger_than_usual_is_clipped_to_a_multiple_of_it():
    """The running mean rises slowly, so a single large one moves the weights as one of 1.5 times the usual would."""
    trainee = make_trainee(clip=0.0, clip_to_usual=1.5, weight_decay=0.0)
    weight = next(trainee.network.parameters())
    seen = []
    for size in (1.0, 1.0, 100.0, 1.0):
        trainee.update([size * weight.sum() / weight.numel() ** 0.5])
        seen.append(float(weight.grad.norm()))
    assert seen[:2] == pytest.approx([1.0, 1.0], rel=1e-4)
    assert seen[2] == pytest.approx(1.5, rel=1e-3)
    assert seen[3] == pytest.approx(1.0, rel=1e-4)
    assert trainee.usual_norm == pytest.approx(1 + 0.03 * 2 * 0.97, rel=1e-3)
