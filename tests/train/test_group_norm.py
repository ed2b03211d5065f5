"""The fast gradient of group normalisation against torch's own, in float64 where torch is exact."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from train.group_norm import GroupNorm, use_fast_group_norm


def gradients(norm: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    norm(x).backward(dy)
    assert x.grad is not None
    return [t.double() for t in (x.grad, norm.weight.grad, norm.bias.grad) if t is not None]


@pytest.mark.parametrize(("shape", "groups"), [((2, 16, 32, 32), 8), ((3, 24, 5, 7), 4), ((1, 8, 1, 3), 2)])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_gradients_agree_with_torch(shape: tuple[int, ...], groups: int, offset: float) -> None:
    torch.manual_seed(0)
    bf16 = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}
    x, dy = (torch.randn(shape).to(**bf16) for _ in range(2))
    x = (x + offset).contiguous(memory_format=torch.channels_last)
    slow = nn.GroupNorm(groups, shape[1])
    nn.init.normal_(slow.weight)
    fast = GroupNorm(groups, shape[1])
    fast.load_state_dict(slow.state_dict())
    for got, right in zip(
        gradients(fast, x, dy), gradients(copy.deepcopy(slow).double(), x.double(), dy.double()), strict=True
    ):
        # bf16 rounds each value by 2^-9 of itself; the offset multiplies the rounding of x before it is taken away.
        assert float((got - right).norm() / right.norm()) < 0.006 * (1 + offset)


def test_other_inputs_are_torchs_own() -> None:
    norm = GroupNorm(4, 8)
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(norm(x), nn.GroupNorm(4, 8)(x))


def test_replacing_keeps_parameters_and_names() -> None:
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()))
    before = {name: id(parameter) for name, parameter in network.named_parameters()}
    use_fast_group_norm(network)
    assert {name: id(parameter) for name, parameter in network.named_parameters()} == before
    assert isinstance(network[1][0], GroupNorm)
