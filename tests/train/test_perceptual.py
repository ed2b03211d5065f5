"""VGG-16: torchvision's names and shapes, the features of a hand-written first stage, and what is said of bad files."""

import pytest
import torch
import torch.nn.functional as F

from bsdiff_rt.errors import SettingsError
from train.perceptual import DEVIATION, MEAN, VGG16, WEIGHTS_FILE, load_vgg16, perceptual_distance

# Index of each convolution in torchvision's vgg16().features.
CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file in the published form, with seeded random weights and a classifier nobody needs."""
    torch.manual_seed(0)
    state = VGG16().state_dict() | {"classifier.0.weight": torch.zeros(2, 2)}
    path = tmp_path_factory.mktemp("hub") / "checkpoints" / WEIGHTS_FILE
    path.parent.mkdir()
    torch.save(state, path)
    return path


def test_names_and_size_are_the_published_ones():
    network = VGG16()
    names = {f"features.{i}.{kind}" for i in CONVOLUTIONS for kind in ("weight", "bias")}
    assert set(network.state_dict()) == names
    assert sum(p.numel() for p in network.parameters()) == 14_714_688  # VGG-16 without its classifier
    assert network.features[28].weight.shape == (512, 512, 3, 3)


def test_first_stage_against_a_hand_written_one(published):
    vgg = load_vgg16(published)
    x = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    state = torch.load(published)
    rgb = torch.cat([((x + 1) / 2 - mean) / deviation for mean, deviation in zip(MEAN, DEVIATION, strict=True)], 1)
    for i in (0, 2):
        rgb = F.relu(F.conv2d(rgb, state[f"features.{i}.weight"], state[f"features.{i}.bias"], padding=1))
    features = vgg(x)
    torch.testing.assert_close(features[0], rgb)
    assert [tuple(f.shape[1:]) for f in features] == [
        (64, 32, 32),
        (128, 16, 16),
        (256, 8, 8),
        (512, 4, 4),
        (512, 2, 2),
    ]


def test_distance_is_zero_for_equal_images_and_its_gradient_reaches_the_prediction_alone(published):
    vgg = load_vgg16(published)
    x = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    assert float(perceptual_distance(vgg, x, x)) == 0.0
    predicted = (x * 0.5).requires_grad_()
    distance = perceptual_distance(vgg, predicted, x)
    distance.backward()
    # Unit vectors are at most 2 apart: squared 4, in five stages.
    assert 0 < distance.item() < 20
    assert float(predicted.grad.abs().max()) > 0
    assert all(p.grad is None for p in vgg.parameters())


def test_the_cache_of_torch_hub_is_looked_into(published, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(published.parents[1]))
    assert torch.equal(load_vgg16(None).features[0].weight, torch.load(published)["features.0.weight"])


def test_a_missing_or_foreign_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(SettingsError, match=rf"{WEIGHTS_FILE}: no such file\. .*--vgg16, or train with --perceptual 0"):
        load_vgg16(None)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(SettingsError, match=r"text.pth: not the weights of torchvision's VGG-16"):
        load_vgg16(tmp_path / "text.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "part.pth")
    with pytest.raises(SettingsError, match=r"part.pth: not the weights"):
        load_vgg16(tmp_path / "part.pth")
