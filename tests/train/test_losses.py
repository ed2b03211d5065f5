"""The hybrid loss: zero for equal images, every term with its weight, small images allowed."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from bsdiff_rt.errors import SettingsError
from train.discriminator import Critic
from train.loop import Trainee, TrainOptions
from train.losses import HybridLoss, LossWeights, ms_ssim_loss, optimise
from train.perceptual import VGG16, perceptual_distance


def enhancer_loss(predicted, soft_tissue):
    return sum(HybridLoss(LossWeights()).terms(predicted, soft_tissue).values())


def test_equal_images_lose_nothing():
    x = torch.rand(2, 1, 176, 176, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert float(enhancer_loss(x, x)) == pytest.approx(0.0, abs=1e-6)


def test_mae_is_part_of_the_loss():
    x = torch.zeros(1, 1, 64, 64)
    y = torch.full_like(x, 0.2)
    assert float(enhancer_loss(y, x)) == pytest.approx(0.2 + float(ms_ssim_loss(y, x)), abs=1e-6)


def test_structure_costs_more_than_a_shift_of_grey():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(1, 1, 64, 64, generator=generator) * 2 - 1
    noisy = x + 0.2 * torch.randn(x.shape, generator=generator)
    assert float(ms_ssim_loss(noisy, x)) > float(ms_ssim_loss(x * 0.95, x)) > 0


@pytest.mark.parametrize("side", [11, 21, 22, 43, 44, 87, 88, 96, 98, 99, 175, 176])
def test_ms_ssim_takes_every_side_from_the_kernel_up(side):
    x = torch.rand(1, 1, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert float(ms_ssim_loss(x, x)) == pytest.approx(0, abs=1e-5)  # float32 sums over the window
    assert float(ms_ssim_loss(x, -x)) > 0.5


def test_the_gradient_is_finite():
    x = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    y = (x * 0.5).requires_grad_()
    enhancer_loss(y, x).backward()
    assert torch.isfinite(y.grad).all()
    assert float(y.grad.abs().max()) > 0


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.rand(2, 1, 32, 32, generator=generator) * 2 - 1 for _ in range(2))
    return x, y


@pytest.fixture(autouse=True)
def thin_networks(monkeypatch):
    """VGG-16 and discriminator with a few channels: their arithmetic, in milliseconds."""
    monkeypatch.setattr("train.perceptual.STAGES", ((4, 4), (4,), (4,), (4,), (4,)))
    monkeypatch.setattr("train.discriminator.CHANNELS", 8)


def test_each_term_carries_its_weight_and_zero_leaves_it_out(images):
    torch.manual_seed(0)
    vgg, critic = VGG16().eval(), Critic(0.01, Accelerator())
    x, y = images
    weights = LossWeights(mae=2.0, mse=3.0, ms_ssim=4.0, perceptual=0.001, adversarial=0.01)
    terms = HybridLoss(weights, vgg, critic).terms(x, y)
    expected = {
        "mae": 2.0 * (x - y).abs().mean(),
        "mse": 3.0 * (x - y).square().mean(),
        "ms_ssim": 4.0 * ms_ssim_loss(x, y),
        "perceptual": 0.001 * perceptual_distance(vgg, x, y),
        "adversarial": 0.01 * critic.against(x),
    }
    assert {name: float(term.detach()) for name, term in terms.items()} == pytest.approx(
        {name: float(term.detach()) for name, term in expected.items()}, rel=1e-5
    )
    assert set(HybridLoss(LossWeights(mae=0, ms_ssim=0, mse=1)).terms(x, y)) == {"mse"}


def toy(adversarial=0.5, **options):
    torch.manual_seed(1)
    trainee = Trainee(nn.Conv2d(1, 1, 3, padding=1), TrainOptions(warmup=0, bf16=False, **options))
    critic = Critic(adversarial, trainee.accelerator) if adversarial else None
    return trainee, HybridLoss(LossWeights(ms_ssim=0.0, adversarial=adversarial), critic=critic)


def test_a_step_trains_network_and_critic_and_reports_the_terms(images):
    trainee, loss = toy()
    before = [p.clone() for p in loss.critic.network.parameters()]
    found = optimise(trainee, loss, *images)
    assert set(found) == {"loss", "mae", "adversarial", "critic"}
    assert found["loss"] == pytest.approx(found["mae"] + found["adversarial"], rel=1e-6)
    assert all(not torch.equal(a, b) for a, b in zip(before, loss.critic.network.parameters(), strict=True))
    assert trainee.step == 1


def test_a_step_in_pieces_is_the_same_step(images):
    """Equal up to the order of float32 sums; without the critic, whose batch norm sees each piece alone."""
    found = [optimise(*toy(adversarial=0.0, accumulate=n), *images) for n in (1, 2)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_the_critic_learns_to_tell_and_the_network_to_please(images):
    _, loss = toy()
    predicted, truth = images[0], images[1] * 0.1
    assert min(loss.critic.update(predicted, truth) for _ in range(30)) < 0.1  # at chance it is 0.25
    with torch.no_grad():
        assert float(loss.critic.against(truth)) < float(loss.critic.against(predicted))


def test_a_critic_resumes_or_says_that_there_was_none():
    _, loss = toy()
    state = loss.state()
    _, other = toy()
    other.critic.network.initial_conv.conv.bias.data.add_(1.0)
    other.resume(state)
    torch.testing.assert_close(other.critic.network.state_dict(), loss.critic.network.state_dict())
    other.resume({})  # nothing to resume from
    with pytest.raises(SettingsError, match="without the adversarial term"):
        other.resume({"network": {}})
    assert HybridLoss(LossWeights()).state() == {}
