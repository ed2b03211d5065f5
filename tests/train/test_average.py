"""The mean of checkpoints: weights, header, and what cannot be averaged."""

import pytest
import torch
from typer.testing import CliRunner

from bsdiff_rt.errors import SettingsError
from train.__main__ import app
from train.average import average_checkpoints
from train.checkpoint import load_checkpoint
from train.commands.average import parse_run
from train.loop import Trainee, TrainOptions

HEADER = {"preset": "tiny", "schedule": {"objective": "x0"}, "size": 64, "clahe": None, "step": 7}


def save(folder, value, **header):
    folder.mkdir()
    weights = {"a": torch.full((2, 2), value), "b": torch.full((3,), -value)}
    torch.save(HEADER | {"averaged": weights, "network": weights, "optimizer": {}} | header, folder / "denoiser.pt")
    return folder / "denoiser.pt"


def test_weights_are_averaged_and_training_images_united(tmp_path):
    first = save(tmp_path / "a", 1.0, trained_on=["x"])
    second = save(tmp_path / "b", 4.0, trained_on=["y", "x"])
    runs = (str(first.parent), f"{second}=2", "--output", str(tmp_path / "mean"))
    result = CliRunner().invoke(app, ["average", *runs], catch_exceptions=False)
    assert result.exit_code == 0
    assert f"the mean of {first} (1), {second} (2)" in result.output
    mean = load_checkpoint(tmp_path / "mean" / "denoiser.pt")
    torch.testing.assert_close(mean["averaged"]["a"], torch.full((2, 2), 3.0))
    torch.testing.assert_close(mean["averaged"]["b"], torch.full((3,), -3.0))
    assert mean["trained_on"] == ["x", "y"]
    assert (mean["preset"], mean["step"]) == ("tiny", 7)
    assert "optimizer" not in mean
    with pytest.raises(SettingsError, match=r"exists\. Choose another folder"):
        average_checkpoints([(first, 1.0)], tmp_path / "mean" / "denoiser.pt")


def test_other_networks_and_weights_are_refused(tmp_path):
    first = save(tmp_path / "a", 1.0)
    other = save(tmp_path / "b", 1.0, size=128)
    with pytest.raises(SettingsError, match=r"size is 128, in .* it is 64"):
        average_checkpoints([(first, 1.0), (other, 1.0)], tmp_path / "c.pt")
    shape = save(tmp_path / "d", 1.0, averaged={"a": torch.zeros(3), "b": torch.zeros(3)})
    with pytest.raises(SettingsError, match="another network than"):
        average_checkpoints([(first, 1.0), (shape, 1.0)], tmp_path / "c.pt")
    with pytest.raises(SettingsError, match="weights above 0"):
        average_checkpoints([(first, 0.0)], tmp_path / "c.pt")
    with pytest.raises(SettingsError, match="the weight a number"):
        parse_run("RUN=much")
    assert not (tmp_path / "c.pt").exists()


def test_a_folder_with_an_equals_sign_in_its_name_is_a_run(tmp_path):
    run = save(tmp_path / "lr=5e-4", 1.0)
    assert parse_run(str(run.parent)) == (run, 1.0)
    assert parse_run(f"{run.parent}=2") == (run, 2.0)


def test_a_refused_call_leaves_no_folder(tmp_path):
    first = save(tmp_path / "a", 1.0)
    result = CliRunner().invoke(app, ["average", f"{first}=0", "--output", str(tmp_path / "mean")])
    assert result.exit_code
    assert not (tmp_path / "mean").exists()


def test_a_mean_is_not_trained_on(tmp_path):
    first = save(tmp_path / "a", 1.0)
    (tmp_path / "mean").mkdir()
    average_checkpoints([(first, 1.0)], tmp_path / "mean" / "denoiser.pt")
    with pytest.raises(SettingsError, match=r"a mean of runs cannot be continued\. Export it"):
        Trainee(torch.nn.Linear(2, 2), TrainOptions(steps=1)).restore(tmp_path / "mean" / "denoiser.pt")
