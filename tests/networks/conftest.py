"""The published networks (monai-generative) with random weights, and the comparison with ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from helpers import randomise as fill_randomly
from torch import Tensor, nn

from bsdiff_rt.config import DenoiserConfig, EnhancerConfig

with warnings.catch_warnings():
    # monai-generative 0.2.3 uses a torch.cuda.amp name deprecated since torch 2.4.
    warnings.simplefilter("ignore", FutureWarning)
    from generative.networks.nets import AutoencoderKL, DiffusionModelUNet


def _published_denoiser(config: DenoiserConfig, seed: int = 0) -> nn.Module:
    with torch.device("meta"):  # skips the default initialisation: at paper width it would take longer than the test
        network = DiffusionModelUNet(
            spatial_dims=2,
            in_channels=2,
            out_channels=2,
            num_channels=config.channels,
            num_res_blocks=config.res_blocks,
            attention_levels=config.attention,
            num_head_channels=config.channels,
            norm_num_groups=config.norm_groups,
        )
    network.to_empty(device="cpu")
    fill_randomly(network, seed)
    return network.eval()


def _published_enhancer(config: EnhancerConfig, seed: int = 0) -> nn.Module:
    network = AutoencoderKL(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        num_channels=config.channels,
        num_res_blocks=config.res_blocks,
        attention_levels=config.attention,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        with_encoder_nonlocal_attn=config.middle_attention,
        with_decoder_nonlocal_attn=config.middle_attention,
    )
    fill_randomly(network, seed)
    return network.eval()


@pytest.fixture
def randomise() -> Callable[[nn.Module, int], None]:
    """Fills a network with seeded random weights, in place."""
    return fill_randomly


@pytest.fixture
def published_denoiser() -> Callable[..., nn.Module]:
    """Builds the published stage 1 network for a config, with seeded random weights."""
    return _published_denoiser


@pytest.fixture
def published_enhancer() -> Callable[..., nn.Module]:
    """Builds the published stage 2 network for a config, with seeded random weights."""
    return _published_enhancer


@pytest.fixture
def relative_difference() -> Callable[[Tensor, Tensor], float]:
    """Largest absolute difference over the largest absolute value of the second tensor; shapes must agree."""

    def difference(actual: Tensor, expected: Tensor) -> float:
        assert actual.shape == expected.shape
        assert expected.abs().max() > 0.01  # a comparison of zeros proves nothing
        return ((actual - expected).abs().max() / expected.abs().max()).item()

    return difference
