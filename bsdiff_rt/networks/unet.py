"""Stage 1, the denoiser: the published conditional U-Net (Chen et al., ISBI 2024), output channel 0 only.

The computation is that of `DiffusionModelUNet` of monai-generative 0.2 with one attention head per level as wide as
that level's channels; `published.py` converts its weights and tests/networks/ compares the two outputs.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsdiff_rt.config import DenoiserConfig
from bsdiff_rt.networks.blocks import ResBlock, SelfAttention, Upsample, group_norm, sinusoidal_embedding


def _make_attentions(count: int, channels: int, groups: int, present: bool) -> nn.ModuleList:
    """Return one module per residual block: self-attention if `present`, else the identity."""
    return nn.ModuleList(SelfAttention(channels, groups) if present else nn.Identity() for _ in range(count))


class DownBlock(nn.Module):
    """One level of the encoder: residual blocks, each followed by attention if `attention`, then a stride-2 conv.

    Args:
        in_channels: channels from the level above.
        out_channels: channels of this level.
        res_blocks: number of residual blocks.
        attention: whether this level has attention.
        groups: groups of every norm.
        time_features: size of the time embedding.
        downsample: whether a stride-2 convolution follows. The lowest level has none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        res_blocks: int,
        attention: bool,
        groups: int,
        time_features: int,
        downsample: bool,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(in_channels if i == 0 else out_channels, out_channels, groups, time_features)
            for i in range(res_blocks)
        )
        self.attentions = _make_attentions(res_blocks, out_channels, groups, attention)
        self.downsampler = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1) if downsample else None

    def forward(self, h: Tensor, time_embedding: Tensor) -> list[Tensor]:
        """Apply the level.

        Args:
            h: [B, in_channels, H, W].
            time_embedding: [B, time_features].

        Returns:
            Every intermediate result in order, for the decoder. The last one is the level's output.
        """
        outputs = self.run_blocks(h, time_embedding)
        if self.downsampler is not None:
            outputs.append(self.downsampler(outputs[-1]))
        return outputs

    def run_blocks(self, h: Tensor, time_embedding: Tensor) -> list[Tensor]:
        """Apply the level without its stride-2 convolution. The arguments are those of `forward`.

        Returns:
            The result of each residual block, with its attention: [B, out_channels, H, W] each.
        """
        outputs: list[Tensor] = []
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            h = attention(resnet(h, time_embedding))
            outputs.append(h)
        return outputs


class MiddleBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution, as published."""

    def __init__(self, channels: int, groups: int, time_features: int) -> None:
        super().__init__()
        self.resnet_1 = ResBlock(channels, channels, groups, time_features)
        self.attention = SelfAttention(channels, groups)
        self.resnet_2 = ResBlock(channels, channels, groups, time_features)

    def forward(self, h: Tensor, time_embedding: Tensor) -> Tensor:
        """Apply the block: [B, channels, H, W] and [B, time_features] -> [B, channels, H, W]."""
        out: Tensor = self.resnet_2(self.attention(self.resnet_1(h, time_embedding)), time_embedding)
        return out


class UpBlock(nn.Module):
    """One level of the decoder: residual blocks that each also take one result of the encoder, then upsampling.

    Args:
        in_channels: channels from the level below.
        skip_channels: channels of each skip, in the order of their use. Each has one residual block.
        out_channels: channels of this level.
        attention: whether this level has attention.
        groups: groups of every norm.
        time_features: size of the time embedding.
        upsample: whether nearest x2 and a convolution follow. The top level has none.
    """

    def __init__(
        self,
        in_channels: int,
        skip_channels: list[int],
        out_channels: int,
        attention: bool,
        groups: int,
        time_features: int,
        upsample: bool,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock((in_channels if i == 0 else out_channels) + skip, out_channels, groups, time_features)
            for i, skip in enumerate(skip_channels)
        )
        self.attentions = _make_attentions(len(skip_channels), out_channels, groups, attention)
        self.upsampler = Upsample(out_channels) if upsample else None

    def forward(self, h: Tensor, skips: list[Tensor], time_embedding: Tensor) -> Tensor:
        """Apply the level.

        Args:
            h: [B, in_channels, H, W].
            skips: results of the encoder, newest last. This level removes its own from the end.
            time_embedding: [B, time_features].

        Returns:
            [B, out_channels, 2H, 2W], or [B, out_channels, H, W] at the top level.
        """
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            h = attention(resnet(torch.cat((h, skips.pop()), dim=1), time_embedding))
        return h if self.upsampler is None else self.upsampler(h)


class Denoiser(nn.Module):
    """The stage 1 network. It predicts eps, v or x0 (`Schedule.objective`) from x_t, the X-ray and the timestep.

    Args:
        config: the shape of the network.

    Raises:
        ValueError: the per-level tuples of `config` differ in length, or a channel count is not a multiple of
            `norm_groups`.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        channels, groups = config.channels, config.norm_groups
        time_features = 4 * channels[0]
        lowest = len(channels) - 1

        self.time_embed = nn.Sequential(
            nn.Linear(channels[0], time_features), nn.SiLU(), nn.Linear(time_features, time_features)
        )
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)

        self.down_blocks = nn.ModuleList()
        skip_channels = [channels[0]]  # of every result of the encoder, in order; the decoder takes them from the end
        previous = channels[0]
        levels = list(zip(channels, config.res_blocks, config.attention, strict=True))
        for i, (width, res_blocks, attention) in enumerate(levels):
            self.down_blocks.append(
                DownBlock(previous, width, res_blocks, attention, groups, time_features, downsample=i < lowest)
            )
            skip_channels += [width] * (res_blocks + (i < lowest))
            previous = width

        self.middle_block = MiddleBlock(previous, groups, time_features)

        self.up_blocks = nn.ModuleList()
        for i, (width, res_blocks, attention) in reversed(list(enumerate(levels))):
            skips = [skip_channels.pop() for _ in range(res_blocks + 1)]
            self.up_blocks.append(UpBlock(previous, skips, width, attention, groups, time_features, upsample=i > 0))
            previous = width

        self.norm_out = group_norm(groups, previous)
        self.conv_out = nn.Conv2d(previous, config.out_channels, 3, padding=1)
        self._zero_init()

    def _zero_init(self) -> None:
        """Zero the last convolution of each residual block and of the output, as the published network does."""
        last = [module.conv2 for module in self.modules() if isinstance(module, ResBlock)]
        for convolution in (*last, self.conv_out):
            for parameter in convolution.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x_t: Tensor, cxr: Tensor, t: Tensor) -> Tensor:
        """Predict from the noisy image, the X-ray and the timestep.

        Args:
            x_t: [B, 1, H, W], the parameters' dtype (or any under autocast); H and W multiples of 2**(levels - 1).
            cxr: [B, 1, H, W], same dtype, in [-1, 1].
            t: [B], int or float, 0 .. training steps - 1, one for each image.

        Returns:
            [B, out_channels, H, W], same dtype (autocast's under autocast).
        """
        return self.compute(x_t, cxr, t)[0]

    def compute(self, x_t: Tensor, cxr: Tensor, t: Tensor, deep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predict, and return the deep features, which may be those of an earlier step (DeepCache, Ma et al. 2024).

        Args:
            x_t, cxr, t: those of `forward`.
            deep: the deep features of another step, `shape_deep`. Then the first level alone is computed. None computes
                all levels.

        Returns:
            The prediction, and the deep features that it was made with.
        """
        sinusoids = sinusoidal_embedding(t, self.config.channels[0])
        # Only the sinusoids need float32, because the angles reach 999 rad. They are in [-1, 1] and can be cast then.
        time_embedding = F.silu(self.time_embed(sinusoids.to(self.conv_in.weight.dtype)))

        h = self.conv_in(torch.cat((x_t, cxr), dim=1))
        skips = [h, *cast(DownBlock, self.down_blocks[0]).run_blocks(h, time_embedding)]
        if deep is None:
            deep = self._run_deep_levels(skips[-1], time_embedding)
        h = self.up_blocks[-1](deep, skips, time_embedding)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return (cxr + out if self.config.residual else out), deep

    def shape_deep(self, batch: int, size: int) -> tuple[int, int, int, int]:
        """Return the shape of the deep features of `batch` images of `size` x `size` px."""
        return batch, self.config.channels[:2][-1], size, size

    def _run_deep_levels(self, h: Tensor, time_embedding: Tensor) -> Tensor:
        """Apply all levels below the first one: [B, channels[0], H, W] -> the deep features, `shape_deep`."""
        downsample = cast(DownBlock, self.down_blocks[0]).downsampler
        skips = [h if downsample is None else downsample(h)]
        for down_block in self.down_blocks[1:]:
            skips += down_block(skips[-1], time_embedding)
        h = self.middle_block(skips[-1], time_embedding)
        for up_block in self.up_blocks[:-1]:
            h = up_block(h, skips, time_embedding)
        return h
