"""The autoencoder of Gusarev et al., "Deep learning models for bone suppression in chest radiographs", IEEE CIBCB 2017:
three strided convolutions down, three transposed ones up, no skip connection.
"""

from __future__ import annotations

from torch import Tensor, nn

CHANNELS = (16, 32, 64)
KERNEL_PX = 5


class Gusarev(nn.Module):
    """The network: 129 thousand parameters. H and W must be multiples of 8."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, *CHANNELS)
        layers: list[nn.Module] = []
        for above, below in zip(widths, CHANNELS, strict=False):
            layers += [nn.Conv2d(above, below, KERNEL_PX, stride=2, padding=2), nn.ReLU()]
        for below, above in zip(CHANNELS[::-1], widths[-2::-1], strict=True):
            layers += [nn.ConvTranspose2d(below, above, KERNEL_PX, stride=2, padding=2, output_padding=1), nn.ReLU()]
        layers[-1] = nn.Tanh()  # an image in [-1, 1]
        self.layers = nn.Sequential(*layers)

    def forward(self, cxr: Tensor) -> Tensor:
        """Map an X-ray [B, 1, H, W] in [-1, 1] to soft tissue of the same shape and range."""
        out: Tensor = self.layers(cxr)
        return out
