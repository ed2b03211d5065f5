"""The models that BS-Diff is compared with in the paper's Table 1: shape, loss and discriminator of each.

They are written from the papers and, for sizes the papers leave out, from published code. All map an X-ray to soft
tissue, [B, 1, H, W] float32 in [-1, 1]. All are trained by the same loop on the same pairs for the same number of
steps.

The losses mix the terms that their papers name. 0.84 to 0.16 is the mixture of Zhao et al. 2017, on which two of them
build; 100 to 1 is that of pix2pix. Learning rate and length are the recipe's, because the comparison is one of
networks.
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
    """A network of the comparison.

    Attributes:
        title: its name in the paper's table.
        build: makes the network for images of a side in px.
        multiple: returns the number that a side in px must be a multiple of.
        losses: its own loss.
        view: makes the input of its discriminator, if it has one.
        view_channels: channels of that input.
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
