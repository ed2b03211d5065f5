"""The perceptual term of stage 2's loss: distance of VGG-16 features (Simonyan and Zisserman 2015).

The thirteen convolutions are built here under the names of torchvision's published weights. That file is read from
disk. Nothing is downloaded, and torchvision is not needed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from bsdiff_rt.errors import SettingsError

WEIGHTS_FILE = "vgg16-397923af.pth"  # torchvision's VGG16_Weights.IMAGENET1K_V1
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Mean and standard deviation of ImageNet's colours in [0, 1], by which the network's inputs were normalised.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

VGG16_PASSES = 3  # work of the perceptual term, in forward passes: prediction, truth, and one backward pass


class VGG16(nn.Module):
    """The convolutional part of VGG-16. Its parameters have their published names, features.N.weight and so on."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.taps = []  # index of each stage's last ReLU
        channels = 3
        for stage in STAGES:
            for width in stage:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            self.taps.append(len(layers) - 1)
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])
        for name, values in (("mean", MEAN), ("deviation", DEVIATION)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the last ReLU of each stage, [B, C, H / 2^i, W / 2^i], for grey images [B, 1, H, W] float32 in [-1,
        1].
        """
        x = ((x + 1) / 2 - self.mean) / self.deviation
        found = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                found.append(x)
        return found


def load_vgg16(path: Path | None) -> VGG16:
    """Load VGG-16 with its weights, frozen.

    Args:
        path: file of torchvision's weights. None: in torch.hub's cache.

    Raises:
        SettingsError: there is no such file, or it does not hold the weights of VGG-16.
    """
    path = path or Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE
    if not path.is_file():
        raise SettingsError(
            f"{path}: no such file. The perceptual loss needs VGG-16's weights. Put torchvision's {WEIGHTS_FILE} "
            "there, name it with --vgg16, or train with --perceptual 0."
        )
    network = VGG16().eval().requires_grad_(False)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict({name: tensor for name, tensor in state.items() if name.startswith("features.")})
    except Exception as error:  # a pickle of anything else raises anything
        raise SettingsError(f"{path}: not the weights of torchvision's VGG-16 ({type(error).__name__})") from error
    return network


def perceptual_distance(vgg: VGG16, predicted: Tensor, soft_tissue: Tensor) -> Tensor:
    """Return the squared distance of unit-length features, summed over channels and stages, averaged over pixels;
    scalar.

    It is the distance of Zhang et al. 2018 (LPIPS) without its learned weights per channel. The paper says "VGG-16
    features". Its published code has those weights.
    """
    with torch.no_grad():
        wanted = vgg(soft_tissue)
    pairs = zip(vgg(predicted), wanted, strict=True)
    return torch.stack([(_unit(x) - _unit(y)).square().sum(1).mean() for x, y in pairs]).sum()


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(1, keepdim=True) + 1e-10).sqrt()
