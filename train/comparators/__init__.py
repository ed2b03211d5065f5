"""The networks BS-Diff is compared with in the paper's Table 1: shape, loss and discriminator of each.

Written anew from the papers and, for sizes they leave out, from published code. All map an X-ray to soft tissue,
[B, 1, H, W] float32 in [-1, 1], and are trained by the same loop on the same pairs for the same number of steps.

The losses mix the terms their papers name; 0.84 to 0.16 is the mixture of Zhao et al. 2017, on which two of them build,
and 100 to 1 that of pix2pix. Learning rate and length are the recipe's, not theirs: the comparison is of networks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from train.comparators.gusarev import Gusarev
from train.comparators.mca_net import McaNet, add_gradients, count_levels
from train.comparators.resnet_bs import ResNetBS
from train.discriminator import View, image_alone
from train.losses import LossWeights


@dataclass(frozen=True)
class Comparator:
    """One of them.

    Attributes:
        title: as the paper's table calls it.
        build: the network for images of a side in px.
        multiple: what their side must be a multiple of, px.
        losses: its own loss.
        view, view_channels: what its discriminator sees, where it has one.
    """

    title: str
    build: Callable[[int], nn.Module]
    multiple: Callable[[int], int]
    losses: LossWeights
    view: View = image_alone
    view_channels: int = 1


COMPARATORS: dict[str, Comparator] = {
    "resnet-bs": Comparator("ResNet-BS", lambda _: ResNetBS(), lambda _: 1, LossWeights(mae=0.16, ms_ssim=0.84)),
    "gusarev": Comparator("Gusarev", lambda _: Gusarev(), lambda _: 8, LossWeights(mae=0.0, mse=0.16, ms_ssim=0.84)),
    "mca-net": Comparator(
        "MCA-Net",
        lambda size: McaNet(count_levels(size)),
        lambda size: 2 ** count_levels(size),
        LossWeights(mae=100.0, ms_ssim=0.0, adversarial=1.0),
        add_gradients,
        6,
    ),
}
