"""Fine detail of the X-ray in the result. Torch-free.

The model sees a matrix far smaller than an X-ray's. Whether detail finer than its pixels is bone or soft tissue follows
from the bone layer that the model found.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.config import Preprocessing
from bsdiff_rt.imaging.clahe import EqualizingCurves
from bsdiff_rt.imaging.network_input import Placement, clip_to_unit, from_network, resize, view_picture

# `bone_share` compares bone with X-ray around each pixel of the model's matrix: standard deviation of the Gaussian, and
# variance of the noise it allows for, grey levels in [0, 1].
SHARE_SIGMA_PX = 1.5
SHARE_NOISE = 1e-4


def add_fine_detail(
    cxr: NDArray[np.float32],
    cxr_net: NDArray[np.float32],
    soft_tissue_net: NDArray[np.float32],
    placement: Placement,
    prep: Preprocessing,
) -> NDArray[np.float32]:
    """Return the model's picture at the X-ray's matrix, plus fine detail from the X-ray that is not bone.

    soft tissue = enlarged soft_tissue_net + (1 - bone_share) * detail, where detail is the X-ray less what the model's
    matrix shows of it. An X-ray no larger than that matrix has no such detail. If the preprocessing equalises, the
    X-ray is equalised before its detail is taken.

    Args:
        cxr: the X-ray, [H, W], float32, in [0, 1].
        cxr_net: the model's input made from it, [size, size], float32, in [-1, 1].
        soft_tissue_net: the model's output, [size, size], float32, in [-1, 1].
        placement: where the X-ray lies in the square, from `to_network`.
        prep: the bundle's preprocessing, which made `cxr_net`.

    Returns:
        [H, W], float32, in [0, 1].
    """
    if max(cxr.shape) <= placement.size:
        return from_network(soft_tissue_net, placement)
    if prep.clahe_clip_limit > 0:
        small = resize(cxr, (placement.height, placement.width))
        cxr = EqualizingCurves.measure(small, prep.clahe_clip_limit, prep.clahe_tiles, cxr.shape).apply(cxr)
    seen, soft_tissue = view_picture(cxr_net, placement), view_picture(soft_tissue_net, placement)
    share = clip_to_unit(resize(bone_share(seen, seen - soft_tissue), cxr.shape))
    # Neither enlarged picture is clipped: both overshoot alike beside hard edges, and there the difference counts.
    return clip_to_unit(resize(soft_tissue, cxr.shape) + (1 - share) * (cxr - resize(seen, cxr.shape)))


def bone_share(cxr: NDArray[np.float32], bone: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the share of the X-ray's local contrast that is bone: the slope of bone over X-ray.

    This is the linear coefficient of the guided filter (He et al., IEEE TPAMI 35, 2013, equation 5) with Gaussian
    weights. At the edge of a bone both images rise together (1). At the edge of a vessel only the X-ray rises (0).
    Finer structure at the same place is taken for bone to the same share.

    Args:
        cxr: [h, w], float32, grey levels on a scale 1 wide.
        bone: [h, w], float32, on the same scale.

    Returns:
        [h, w], float32, in [0, 1].
    """

    def mean(image: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(cv2.GaussianBlur(image, (0, 0), SHARE_SIGMA_PX), dtype=np.float32)

    cxr, bone = cxr - cxr.mean(), bone - bone.mean()  # small numbers: the differences below keep their digits
    variance = np.maximum(mean(cxr * cxr) - mean(cxr) ** 2, 0)
    slope = (mean(cxr * bone) - mean(cxr) * mean(bone)) / (variance + np.float32(SHARE_NOISE))
    return clip_to_unit(slope)
