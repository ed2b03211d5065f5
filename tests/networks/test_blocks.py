"""Projections in one product: the same numbers as in three, whatever the precision."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import randomise

from bsdiff_rt.config import PRESETS
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.blocks import SelfAttention, join_projections
from bsdiff_rt.networks.unet import Denoiser


def make_pair(channels=32, seed=0):
    """An attention block with random weights, and its joined copy."""
    plain = SelfAttention(channels, 4).eval()
    randomise(plain, seed)
    return plain, join_projections(copy.deepcopy(plain))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_one_product_gives_the_numbers_of_three(layout):
    plain, joined = make_pair()
    x = torch.randn(3, 32, 8, 12, generator=torch.Generator().manual_seed(1)).to(memory_format=layout)
    found = joined(x)
    # Every number is the same sum of products. Another blocking of the sums may change the last digit.
    torch.testing.assert_close(found, plain(x), rtol=0, atol=1e-6)
    assert found.is_contiguous(memory_format=layout)
    tokens = x.flatten(2).transpose(1, 2)
    for one, three in zip(joined.project(tokens), plain.project(tokens), strict=True):
        torch.testing.assert_close(one, three, rtol=0, atol=1e-6)


@torch.no_grad()
def test_whole_networks_keep_their_output():
    preset = PRESETS["tiny"]
    networks = [Denoiser(preset.denoiser).eval(), Enhancer(preset.enhancer).eval()]
    x = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    for seed, (network, inputs) in enumerate(zip(networks, [(x, -x, torch.tensor([3, 900])), (x,)], strict=True)):
        randomise(network, seed)
        expected = network(*inputs)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        assert join_projections(network) is network
        found = network(*inputs)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        assert sum(parameter.numel() for parameter in network.parameters()) == parameters
        attentions = [module for module in network.modules() if isinstance(module, SelfAttention)]
        assert attentions
        assert all(block.to_qkv is not None and not hasattr(block, "to_q") for block in attentions)


def test_joining_twice_changes_nothing():
    _, joined = make_pair()
    before = joined.to_qkv
    assert join_projections(joined).to_qkv is before


def test_what_a_block_was_told_stays():
    plain, _ = make_pair()
    plain.attend = lambda query, key, value: value
    plain.bfloat16()
    assert plain.dtype == torch.bfloat16
    joined = join_projections(plain)
    assert joined.dtype == torch.bfloat16
    assert joined.attend(None, None, 1) == 1
    assert not joined.to_qkv.training


def test_weights_are_stored_apart():
    """Bundles and checkpoints hold three projections, as the published ones do."""
    plain, _ = make_pair()
    names = set(plain.state_dict())
    assert {f"to_{letter}.{kind}" for letter in "qkv" for kind in ("weight", "bias")} < names
    assert not any("qkv" in name for name in names)
