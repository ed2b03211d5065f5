"""What both loops share: the schedule of a run, averaged weights, and resuming exactly."""

import numpy as np
import pytest
import torch
from torch import nn

from bsdiff_rt.errors import SettingsError
from train.loop import Run, Trainee, TrainOptions, ahead, crops_of, load_checkpoint, mixed_precision, pieces


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
    for (piece,) in pieces(trainee.options.accumulate, x):
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
    options = TrainOptions(steps=100, crops=crops_of(96, 256), images=2)
    assert {options.crop(step, 256) for step in (0, 50, 99)} == {(14, 96)}
    with pytest.raises(SettingsError, match="--crop 272 is more than --size 256; choose at most that"):
        crops_of(272, 256)
    with pytest.raises(SettingsError, match="--crop 100: give a multiple of 16 px"):
        crops_of(100, 256)


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


def test_a_batch_in_pieces_has_the_same_gradient():
    """Equal up to the order of float32 sums."""
    whole, parts = make_trainee(), make_trainee(accumulate=2)
    assert advance(whole, 4) == pytest.approx(advance(parts, 4), rel=1e-5)
    for a, b in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_batch_is_never_cut_into_empty_pieces():
    x, y = torch.arange(3), torch.arange(3) * 2
    assert [(len(a), len(b)) for a, b in pieces(5, x, y)] == [(1, 1)] * 3
    assert [a.tolist() for a, _ in pieces(2, x, y)] == [[0, 1], [2]]


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
    assert mixed_precision(True)
    assert not mixed_precision(False)
    assert mixed_precision(None) in (True, False)


def run_to_the_end(folder, figures, **options):
    """A run that is judged by the given figures in turn; the steps it was judged at."""
    trainee = make_trainee(**{"save_every": 2} | options)
    run = Run(folder, "x", trainee, "psnr", size=8)
    figures, judged = iter(figures), []

    def validate(picture):
        assert picture.name == "x_samples.png"
        judged.append(trainee.step)
        return {"pairs_bsr": -1.0, "pairs_psnr": next(figures)}

    for index, batch in run.batches(lambda step: np.full((2, 1, 8, 8), step, np.float32)):
        assert index == trainee.step == int(batch[0, 0, 0, 0])
        run.after_step({"loss": trainee.update(summands(trainee, batch))}, validate)
    return judged


def test_training_stops_when_the_figure_gets_no_better_and_keeps_the_best(tmp_path):
    assert run_to_the_end(tmp_path, [1.0, 3.0, 2.0, 3.0, 9.0], patience=2) == [2, 4, 6, 8]
    kept = load_checkpoint(tmp_path / "x.pt")
    assert kept["step"] == 4
    assert kept["size"] == 8
    assert kept["stopping"] == {"best": 3.0, "checks": 0, "finished": True}
    assert run_to_the_end(tmp_path, [], patience=2) == []  # finished: the same command changes nothing


def test_patience_is_counted_on_after_an_interruption(tmp_path):
    with pytest.raises(StopIteration):
        run_to_the_end(tmp_path, [3.0, 2.0], patience=2)
    assert load_checkpoint(tmp_path / "x.pt")["step"] == 4  # the one whose verdict is known
    assert run_to_the_end(tmp_path, [2.0], patience=2) == [6]
    assert load_checkpoint(tmp_path / "x.pt")["step"] == 2


def test_without_patience_the_last_step_is_kept(tmp_path):
    assert run_to_the_end(tmp_path, range(4, 0, -1), steps=7) == [2, 4, 6, 7]
    assert load_checkpoint(tmp_path / "x.pt")["step"] == 7
    assert not (tmp_path / "x_best.pt").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_weights():
    trainee = make_trainee()
    before = [p.clone() for p in trainee.network.parameters()]
    with pytest.raises(SettingsError, match="the loss of step 0 is inf; lower --learning-rate"):
        trainee.update([trainee.model(torch.full((1, 1, 8, 8), 1e30)).square().mean()])
    assert all(torch.equal(a, b) for a, b in zip(before, trainee.network.parameters(), strict=True))
    assert trainee.step == 0


def test_other_settings_than_the_checkpoints_are_refused(tmp_path):
    run_to_the_end(tmp_path, [1.0], steps=2)
    with pytest.raises(SettingsError, match=r"x\.pt: trained with size 8, not 16; give the same, or another folder"):
        Run(tmp_path, "x", make_trainee(), "psnr", size=16)


def test_a_damaged_checkpoint_and_a_size_that_cannot_be_halved(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"PK cut off")
    with pytest.raises(SettingsError, match=r"x\.pt: damaged, or no checkpoint"):
        load_checkpoint(tmp_path / "x.pt")
    with pytest.raises(SettingsError, match="--size 108: give a multiple of 16 px"):
        TrainOptions(steps=10).crop(0, 108)
