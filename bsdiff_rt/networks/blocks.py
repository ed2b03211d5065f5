"""The blocks of both networks: residual block, self-attention, nearest x2 upsampling.

Everything here can be exported (torch.export, ONNX opset 18) with a dynamic batch axis: no branch depends on a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N = TypeVar("N", bound=nn.Module)

NORM_EPS = 1e-6  # the published networks' value; torch's default is 1e-5


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    """Return a GroupNorm with the epsilon of the published networks.

    Raises:
        ValueError: `channels` is not a multiple of `groups`.
    """
    return nn.GroupNorm(groups, channels, eps=NORM_EPS)


class ResBlock(nn.Module):
    """Twice GroupNorm, SiLU and 3x3 convolution around a skip connection. The time embedding may be added in between.

    `Denoiser` applies the SiLU in front of the embedding's projections once for all blocks.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output. If both differ, the skip connection is a 1x1 convolution.
        groups: groups of both norms. It divides both channel counts.
        time_features: size of the time embedding, 0 for a block without one.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, time_features: int = 0) -> None:
        super().__init__()
        self.norm1 = group_norm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_features, out_channels) if time_features else None
        self.norm2 = group_norm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip_connection = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        """Apply the block.

        Args:
            x: [B, in_channels, H, W], floating.
            time_embedding: [B, time_features], after its SiLU. Blocks without `time_features` ignore it.

        Returns:
            [B, out_channels, H, W], same dtype.
        """
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None and time_embedding is not None:
            h = h + self.time_emb_proj(time_embedding)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = self.skip_connection(x) + h
        return out


class SelfAttention(nn.Module):
    """Single-head self-attention over all pixels, with a skip connection. The head is as wide as the channels.

    There is no output projection. The published networks hold one (`proj_attn`) but never apply it. With one head it
    could be multiplied into `to_v` anyway.

    Args:
        channels: channels of input and output.
        groups: groups of the norm; divides `channels`.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_qkv: nn.Linear | None = None  # replaces these three in `join_projections`
        # aoti_builder.py replaces this by a faster form.
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block: [B, channels, H, W] -> the same shape and dtype."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, H*W, channels]
        # With a head axis of length 1 torch can choose a fused kernel. The default scale is 1/sqrt(channels).
        query, key, value = (projected.unsqueeze(1) for projected in self.project(tokens))
        attended = self.attend(query, key, value).squeeze(1)  # [B, H*W, channels]
        # x comes first: the sum takes its memory format, so channels_last stays channels_last and NCHW stays NCHW.
        # Rows and columns are separated before the channels move. In the other order TensorRT does not recognise the
        # attention, and stores the score of every pair of pixels.
        image: Tensor = attended.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return x + image

    def project(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values: [B, N, channels] -> three times the same shape and dtype."""
        if self.to_qkv is None:
            return self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        return tuple(self.to_qkv(tokens).chunk(3, dim=-1))

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of queries, keys and values."""
        return (self.to_q if self.to_qkv is None else self.to_qkv).weight.dtype


def join_projections(network: N) -> N:
    """Let each attention of a network compute queries, keys and values in one matrix product, in place.

    The results stay the same. One product of three times the width keeps a GPU busier than three. Weights are stored
    and trained apart, so a joined network cannot load a state dict.

    Args:
        network: with its weights.

    Returns:
        The network.
    """
    for block in network.modules():
        if isinstance(block, SelfAttention) and block.to_qkv is None:
            parts = (block.to_q, block.to_k, block.to_v)
            joined = nn.Linear(parts[0].in_features, 3 * parts[0].out_features, device="meta")
            joined.weight, joined.bias = (
                nn.Parameter(torch.cat([getattr(part, name).detach() for part in parts])) for name in ("weight", "bias")
            )
            block.to_qkv = joined.train(block.training)
            del block.to_q, block.to_k, block.to_v
    return network


class Upsample(nn.Module):
    """Nearest neighbour x2, then a 3x3 convolution: [B, channels, H, W] -> [B, channels, 2H, 2W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block; the dtype stays."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def sinusoidal_embedding(t: Tensor, size: int, max_period: float = 10000.0) -> Tensor:
    """Return sinusoids of the timestep, cosines first, always in float32.

    Args:
        t: [B], int or float, 0 .. training steps - 1.
        size: length of the embedding, even.
        max_period: slowest wavelength / (2 pi), in steps.

    Returns:
        [B, size], float32, in [-1, 1].
    """
    half = size // 2
    # This order of operations, all in float32, gives the published digits. Another order changes the last ones.
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.to(torch.float32)[:, None] * torch.exp(exponents / half)
    return torch.cat((torch.cos(angles), torch.sin(angles)), dim=-1)
