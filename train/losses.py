"""Losses of stage 2. Every image is [B, 1, H, W] float32 in [-1, 1]."""

from __future__ import annotations

import torch
from monai.metrics.regression import compute_ms_ssim
from torch import Tensor

# Wang, Simoncelli, Bovik 2003, table of weights per scale, finest first.
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SSIM_KERNEL_PX = 11


def ms_ssim_loss(predicted: Tensor, soft_tissue: Tensor) -> Tensor:
    """1 - MS-SSIM, averaged over the batch; scalar. Small images use as many scales as the kernel fits in."""
    side = min(predicted.shape[-2:])
    scales = sum(side >> scale >= MS_SSIM_KERNEL_PX for scale in range(len(MS_SSIM_WEIGHTS)))
    weights = [weight / sum(MS_SSIM_WEIGHTS[:scales]) for weight in MS_SSIM_WEIGHTS[:scales]]
    unit = [(image.float().clamp(-1, 1) + 1) / 2 for image in (predicted, soft_tissue)]
    return 1.0 - compute_ms_ssim(*unit, spatial_dims=2, kernel_size=MS_SSIM_KERNEL_PX, weights=weights).mean()


def enhancer_loss(predicted: Tensor, soft_tissue: Tensor) -> Tensor:
    """1.0 MAE + 1.0 (1 - MS-SSIM): the paper's hybrid loss without its perceptual and adversarial terms; scalar."""
    return torch.mean(torch.abs(predicted - soft_tissue)) + ms_ssim_loss(predicted, soft_tissue)
