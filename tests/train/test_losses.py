"""Stage 2's loss: zero for equal images, MS-SSIM as torch metrics define it, small images allowed."""

import pytest
import torch

from train.losses import enhancer_loss, ms_ssim_loss


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


def test_the_gradient_is_finite():
    x = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    y = (x * 0.5).requires_grad_()
    enhancer_loss(y, x).backward()
    assert torch.isfinite(y.grad).all()
    assert float(y.grad.abs().max()) > 0
