"""ResNet-BS: Rajaraman et al., "Chest X-ray bone suppression for improving classification of tuberculosis-consistent
findings", Diagnostics 11 (2021): residual blocks at full resolution, no normalisation, no striding.
"""

from __future__ import annotations

from torch import Tensor, nn

CHANNELS, BLOCKS = 64, 16
RESIDUAL_SCALE = 0.1  # keeps sixteen sums without normalisation stable


class Block(nn.Module):
    """A residual block: x + 0.1 convolution(ReLU(convolution(x))), [B, CHANNELS, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.change = nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        change: Tensor = self.change(x)
        return x + RESIDUAL_SCALE * change


class ResNetBS(nn.Module):
    """Features, sixteen residual blocks with a shortcut around them, and a linear image. 1.2 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, CHANNELS, 3, padding=1)
        blocks = [Block() for _ in range(BLOCKS)]
        self.body = nn.Sequential(*blocks, nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1))
        self.last = nn.Conv2d(CHANNELS, 1, 3, padding=1)

    def forward(self, cxr: Tensor) -> Tensor:
        """Map an X-ray [B, 1, H, W] in [-1, 1] to soft tissue of the same shape, not clamped."""
        features = self.first(cxr)
        out: Tensor = self.last(features + self.body(features))
        return out
