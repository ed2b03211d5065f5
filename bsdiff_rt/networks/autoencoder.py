"""Stage 2, the enhancer: the published autoencoder (Chen et al., ISBI 2024), which sharpens the denoiser's result.

It computes what `AutoencoderKL` of monai-generative 0.2 computes when it decodes the mean mu. The published forward
pass adds sigma * noise to mu, although no KL term was trained. Without the noise the output is deterministic, so the
sigma branch does not exist here. `published.py` converts the weights, and tests/networks/ compares the outputs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bsdiff_rt.config import EnhancerConfig
from bsdiff_rt.networks.blocks import ResBlock, SelfAttention, Upsample, group_norm


class PaddedDownsample(nn.Module):
    """Stride-2 3x3 convolution, padded by one pixel at the right and at the bottom, as published.

    [B, channels, H, W] -> [B, channels, H/2, W/2], H and W even.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block; the dtype stays."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


def _level(in_channels: int, out_channels: int, res_blocks: int, attention: bool, groups: int) -> list[nn.Module]:
    """Return the residual blocks of one level, each followed by attention if the level has it."""
    layers: list[nn.Module] = []
    for i in range(res_blocks):
        layers.append(ResBlock(in_channels if i == 0 else out_channels, out_channels, groups))
        if attention:
            layers.append(SelfAttention(out_channels, groups))
    return layers


def _middle(config: EnhancerConfig) -> list[nn.Module]:
    """Return the blocks at the lowest resolution. Without `middle_attention` there are none, as published."""
    if not config.middle_attention:
        return []
    channels, groups = config.channels[-1], config.norm_groups
    return [
        ResBlock(channels, channels, groups),
        SelfAttention(channels, groups),
        ResBlock(channels, channels, groups),
    ]


def _encoder(config: EnhancerConfig) -> nn.Sequential:
    """Return the encoder: [B, 1, H, W] -> [B, latent_channels, H / 2**(levels - 1), W / 2**(levels - 1)]."""
    channels, groups = config.channels, config.norm_groups
    layers: list[nn.Module] = [nn.Conv2d(1, channels[0], 3, padding=1)]
    above = channels[0]
    for i, (width, res_blocks, attention) in enumerate(zip(channels, config.res_blocks, config.attention, strict=True)):
        layers += _level(above, width, res_blocks, attention, groups)
        if i < len(channels) - 1:
            layers.append(PaddedDownsample(width))
        above = width
    # As published, there is no activation between the last norm and convolution, here and in the decoder.
    layers += [*_middle(config), group_norm(groups, above), nn.Conv2d(above, config.latent_channels, 3, padding=1)]
    return nn.Sequential(*layers)


def _decoder(config: EnhancerConfig) -> nn.Sequential:
    """Return the decoder: [B, latent_channels, H / 2**(levels - 1), W / 2**(levels - 1)] -> [B, 1, H, W]."""
    channels, groups = config.channels, config.norm_groups
    below = channels[-1]
    layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, below, 3, padding=1), *_middle(config)]
    for i in reversed(range(len(channels))):
        layers += _level(below, channels[i], config.res_blocks[i], config.attention[i], groups)
        if i > 0:
            layers.append(Upsample(channels[i]))
        below = channels[i]
    layers += [group_norm(groups, below), nn.Conv2d(below, 1, 3, padding=1)]
    return nn.Sequential(*layers)


class Enhancer(nn.Module):
    """The stage 2 network. It makes a sharp soft-tissue image from the denoiser's smooth one.

    Args:
        config: the shape of the network.

    Raises:
        ValueError: the per-level tuples of `config` differ in length, or a channel count is not a multiple of
            `norm_groups`.
    """

    def __init__(self, config: EnhancerConfig) -> None:
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.encoder = _encoder(config)
        self.quant_conv_mu = nn.Conv2d(latent, latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)
        self.decoder = _decoder(config)
        if config.residual:
            for parameter in self.decoder[-1].parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Encode the image, and decode the mean of the latent.

        Args:
            x: [B, 1, H, W], the parameters' dtype (or any under autocast), in [-1, 1]; H and W multiples of
                2**(levels - 1).

        Returns:
            [B, 1, H, W], same dtype (under autocast its own, but x's if `residual`), about [-1, 1], not clamped.
        """
        mu = self.quant_conv_mu(self.encoder(x))  # [B, latent_channels, H / 2**(levels - 1), W / 2**(levels - 1)]
        out: Tensor = self.decoder(self.post_quant_conv(mu))
        return x + out if self.config.residual else out
