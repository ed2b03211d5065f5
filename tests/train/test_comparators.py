"""The comparators: sizes as published, shapes kept, the discriminator's view, and from training to ONNX Runtime."""

import csv

import numpy as np
import onnxruntime as ort
import pytest
import torch

from bsdiff_rt.errors import SettingsError
from train.augment import Augmentation
from train.checkpoint import load_checkpoint
from train.commands.comparator import comparator
from train.comparator import choose_crop, dry_run_comparator, train_comparator
from train.comparators import COMPARATORS
from train.comparators.gusarev import Gusarev
from train.comparators.mca_net import McaNet, add_gradients, count_levels
from train.comparators.resnet_bs import Block, ResNetBS
from train.data import Batches
from train.loop import TrainOptions

SIZE = 32
OPTIONS = TrainOptions(steps=3, warmup=0, images=1, bf16=False, save_every=1)


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_sizes():
    """By hand from channels and kernels: weights and biases of every convolution."""
    assert parameters(ResNetBS()) == (64 * 9 + 64) + 33 * (64 * 64 * 9 + 64) + (64 * 9 + 1)
    down = sum(a * b * 25 + b for a, b in ((1, 16), (16, 32), (32, 64)))
    assert parameters(Gusarev()) == down + sum(a * b * 25 + b for a, b in ((64, 32), (32, 16), (16, 1)))
    assert parameters(McaNet()) == 23_134_176


@pytest.mark.parametrize("name", COMPARATORS)
def test_an_image_keeps_its_shape_and_every_parameter_learns(name):
    torch.manual_seed(0)
    network = COMPARATORS[name].build(SIZE)
    x = torch.rand(1, 1, SIZE, SIZE) * 2 - 1
    out = network(x)
    assert out.shape == x.shape
    (out - x).square().mean().backward()
    # McaNet's small images pass a ReLU of one channel, which may be dead at the start.
    silent = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(key.startswith("images.") for key in silent), silent


def test_a_residual_block_adds_a_tenth():
    block = Block()
    x = torch.randn(1, 64, 4, 4)
    torch.testing.assert_close(block(x), x + 0.1 * block.change(x))


def test_every_scale_of_mca_net_reaches_its_image():
    """The bias of a small image's last convolution shifts the sum under the tanh everywhere."""
    network, x = McaNet(4), torch.zeros(1, 1, SIZE, SIZE)
    before = torch.atanh(network(x))
    for draw in network.images:
        draw[4].bias.data += 0.1
    torch.testing.assert_close(torch.atanh(network(x)), before + 0.3, rtol=1e-3, atol=1e-5)


def test_levels_leave_two_pixels_at_the_lowest():
    assert [count_levels(size) for size in (32, 64, 256, 1024)] == [4, 5, 7, 7]


def test_the_discriminator_sees_images_and_gradients():
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    seen = add_gradients(ramp, ramp.transpose(2, 3) * 2)[0, :, 1:-1, 1:-1]
    assert seen.shape[0] == 6
    assert torch.equal(seen[0], torch.full((6, 6), 8.0))  # Sobel of a slope of 1
    assert not seen[1].any()
    assert not seen[3].any()
    assert torch.equal(seen[4], torch.full((6, 6), 16.0))
    assert torch.equal(seen[2], ramp[0, 0, 1:-1, 1:-1])


class Judge:
    def description(self):
        return {}

    def direct(self, network, picture):
        return {"pairs_psnr": 1.0}


@pytest.fixture
def batches():
    pool = np.random.default_rng(0).integers(0, 256, (3, 2, SIZE, SIZE), dtype=np.uint8)
    return Batches([], pool, 0.0, Augmentation(), 0)


def test_training_ends_in_a_graph_of_the_averaged_network(batches, tmp_path):
    graph = train_comparator(tmp_path, "gusarev", batches, Judge(), OPTIONS, SIZE, SIZE)
    state = load_checkpoint(tmp_path / "gusarev.pt")
    assert (state["step"], state["comparator"], state["size"]) == (3, "gusarev", SIZE)
    network = Gusarev().eval()
    network.load_state_dict(state["averaged"])
    x = (
        np.random.default_rng(1).uniform(-1, 1, (3, 1, SIZE, SIZE)).astype(np.float32)
    )  # not the batch it was traced with
    (out,) = ort.InferenceSession(graph).run(None, {"cxr": x})
    np.testing.assert_allclose(out, network(torch.from_numpy(x)).detach().numpy(), atol=1e-5)  # order of float32 sums
    with (tmp_path / "gusarev.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert float(rows[0]["mse"]) > 0
    assert not list(tmp_path.glob("*.partial"))


def test_mca_net_trains_against_its_discriminator(batches, tmp_path, monkeypatch):
    monkeypatch.setattr("train.comparators.mca_net.CHANNELS", (4,) * 7)
    monkeypatch.setattr("train.discriminator.CHANNELS", 8)
    exported = []
    monkeypatch.setattr("train.comparator.export", lambda network, path, size: exported.append(path.name))
    train_comparator(tmp_path, "mca-net", batches, Judge(), OPTIONS, SIZE, SIZE)
    assert exported == ["mca-net.onnx"]
    state = load_checkpoint(tmp_path / "mca-net.pt")
    assert state["critic"]["network"]["initial_conv.conv.weight"].shape[1] == 6


def test_crops_are_trained_on_and_whole_images_exported(batches, tmp_path, monkeypatch):
    asked, exported = [], []
    monkeypatch.setattr(batches, "batch", lambda *given: asked.append(given) or np.zeros((1, 2, 16, 16), np.float32))
    monkeypatch.setattr("train.comparator.export", lambda network, path, size: exported.append(size))
    train_comparator(tmp_path, "gusarev", batches, Judge(), OPTIONS, SIZE, 16)
    assert asked == [(step, OPTIONS.images, SIZE, 16) for step in range(3)]
    assert exported == [SIZE]


def test_sides_a_network_takes():
    assert choose_crop("resnet-bs", 250, None) == 250
    assert choose_crop("gusarev", 256, 96) == 96
    assert choose_crop("mca-net", 256, 128) == 128


@pytest.mark.parametrize(
    ("name", "size", "crop", "message"),
    [
        ("resnet-bs", 256, 257, "--crop 257 is more than --size 256"),
        ("gusarev", 256, 100, r"gusarev: --crop 100 at --size 256\. Both must be multiples of 8 px"),
        ("gusarev", 250, None, r"gusarev: --crop 250 at --size 250\. Both must be multiples of 8 px"),
        ("gusarev", 250, 96, r"gusarev: --crop 96 at --size 250\. Both must be multiples of 8 px"),
        ("mca-net", 256, 96, r"mca-net: --crop 96 at --size 256\. Both must be multiples of 128 px"),
    ],
)
def test_sides_a_network_does_not_take(name, size, crop, message):
    with pytest.raises(SettingsError, match=message):
        choose_crop(name, size, crop)


def test_a_dry_run_and_an_unknown_name(tmp_path):
    assert dry_run_comparator("gusarev", OPTIONS, SIZE, SIZE).parameters == parameters(Gusarev())
    with pytest.raises(SettingsError, match="'vae': choose one of resnet-bs, gusarev, mca-net"):
        comparator("vae", tmp_path)
