"""MCA-Net: Zhou et al., "Generation of virtual dual energy images from standard single-shot radiographs using
multi-scale and conditional adversarial network", ACCV 2018 (arXiv 1810.09354).

A U-Net whose image is the sum of images drawn at four scales, trained against a discriminator that sees the image and
its gradients beside the X-ray's. Trained here on the soft tissue; the authors also train it on the bone image.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = (64, 128, 256, 512, 512, 512, 512)  # per level of half the side of the one above, from half the image's
LAST_CHANNELS = 32  # at the image's own side
SCALES = 4  # full, half, quarter, eighth


def count_levels(size: int) -> int:
    """Return how many of the seven levels images of `size` px have room for. The lowest is 2 x 2 px."""
    return min(len(CHANNELS), int(math.log2(size)) - 1)


def _down(before: int, after: int) -> nn.Sequential:
    """Return layers that halve the side."""
    return nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.LeakyReLU())


def _up(before: int, after: int) -> nn.Sequential:
    """Return layers that double the side."""
    return nn.Sequential(
        nn.ConvTranspose2d(before, after, 2, stride=2),
        nn.LeakyReLU(),
        nn.Conv2d(after, after, 3, padding=1),
        nn.LeakyReLU(),
    )


def _image(channels: int, ratio: int) -> nn.Sequential:
    """Return layers that make an image at the full side from features that are `ratio` times smaller."""
    return nn.Sequential(
        nn.Conv2d(channels, 1, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(1, 1, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(1, 1, 3, padding=1),
        nn.Upsample(scale_factor=ratio, mode="bilinear"),
    )


class McaNet(nn.Module):
    """The generator. H and W must be multiples of 2**levels.

    Args:
        levels: how many of CHANNELS are used; more than the three smaller scales.
    """

    def __init__(self, levels: int = len(CHANNELS)) -> None:
        super().__init__()
        widths = CHANNELS[:levels]
        self.down = nn.ModuleList(_down(*pair) for pair in zip((1, *widths), widths, strict=False))
        # From the lowest level up: what comes from below, joined by the level's own features but at the lowest.
        outputs = (*widths[-2::-1], LAST_CHANNELS)
        inputs = (widths[-1], *(2 * width for width in widths[-2::-1]))
        self.up = nn.ModuleList(_up(*pair) for pair in zip(inputs, outputs, strict=True))
        self.last = nn.Conv2d(LAST_CHANNELS, 1, 1)
        self.images = nn.ModuleList(_image(widths[i], 2 ** (i + 1)) for i in range(SCALES - 1))

    def forward(self, cxr: Tensor) -> Tensor:
        """Map an X-ray [B, 1, H, W] in [-1, 1] to soft tissue of the same shape and range."""
        skips = [cxr]
        for down in self.down:
            skips.append(down(skips[-1]))
        h = skips.pop()
        scales = []  # features at an eighth, a quarter, half of the side, last the full side
        for up in self.up:
            h = up(h)
            scales.append(h)
            h = torch.cat([h, skips.pop()], 1)
        total = self.last(scales[-1])
        for draw, features in zip(self.images, scales[-2::-1], strict=False):
            total = total + draw(features)
        return torch.tanh(total)


def add_gradients(image: Tensor, cxr: Tensor | None) -> Tensor:
    """Return the discriminator's input, [B, 6, H, W]: image and X-ray, each after its two Sobel gradients."""
    assert cxr is not None, "MCA-Net's discriminator is shown the X-ray"
    sobel = image.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    kernels = torch.stack([sobel, sobel.T])[:, None]
    seen = [torch.cat([F.conv2d(x, kernels, padding=1), x], 1) for x in (image, cxr)]
    return torch.cat(seen, 1)
