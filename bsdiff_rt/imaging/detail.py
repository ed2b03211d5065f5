"""What of the full-size source goes into a result: `infer --detail`. Torch-free.

The networks see a matrix far smaller than an X-ray's. What is finer than their pixels is bone or soft tissue, which
only the bone layer they found tells.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.config import Preprocessing
from bsdiff_rt.imaging.clahe import EqualizingCurves
from bsdiff_rt.imaging.network_input import Placement, crop, from_network, resize, shown, unit
from bsdiff_rt.imaging.tone import RIBS_WINDOW_PX, tone_of

# How `bone_share` compares bone with X-ray: around each pixel of the square (standard deviation of a Gaussian), against
# this variance of noise, grey levels in [0, 1].
SHARE_SIGMA_PX = 1.5
SHARE_NOISE = 1e-4


def subtract_local_bone(
    cxr: NDArray[np.float32],
    cxr_net: NDArray[np.float32],
    soft_tissue_net: NDArray[np.float32],
    placement: Placement,
    prep: Preprocessing,
) -> NDArray[np.float32]:
    """Subtract the networks' bone layer, without the change of tone in it, from the source (`--detail source`).

    bone = cxr_net - soft_tissue_net; soft tissue = source - (bone - tone_of(bone)) - bone_share * detail, where detail
    is what of the source is too fine for the networks' matrix. The source's tone stays, and so does its sharpness but
    for the edges of bones. What the networks see only as a change of overall tone is left in, and so is the inside of
    bones broader than two ribs (vertebrae). Where the preprocessing equalises, what is subtracted is taken back to the
    source's grey levels: equalised contrast is another at every place.

    Args:
        cxr: [H, W], float32, in [0, 1], the source.
        cxr_net: [size, size], float32, in [-1, 1], the networks' input made from it.
        soft_tissue_net: [size, size], float32, in [-1, 1], their output.
        placement: what `to_network` returned for this picture.
        prep: the bundle's preprocessing, which made `cxr_net`.

    Returns:
        [H, W], float32, in [0, 1].
    """
    # The networks' range is twice as wide as [0, 1].
    seen, soft_tissue = (crop(image, placement) / np.float32(2) for image in (cxr_net, soft_tissue_net))
    bone = seen - soft_tissue
    local = bone - tone_of(bone, placement.size, RIBS_WINDOW_PX)
    small = resize(cxr, (placement.height, placement.width))
    if prep.clahe_clip_limit > 0:
        curves = EqualizingCurves.of(small, prep.clahe_clip_limit, prep.clahe_tiles)
        local = curves.undo(seen + np.float32(0.5)) - curves.undo(seen + np.float32(0.5) - local)
    share = unit(resize(bone_share(seen, bone), cxr.shape))
    detail = cxr - resize(small, cxr.shape)
    return unit(cxr - resize(local, cxr.shape) - share * detail)


def add_source_detail(
    cxr: NDArray[np.float32],
    cxr_net: NDArray[np.float32],
    soft_tissue_net: NDArray[np.float32],
    placement: Placement,
    prep: Preprocessing,
) -> NDArray[np.float32]:
    """The networks' picture, and what of the source is finer than their pixels and no bone (`--detail both`).

    soft tissue = soft_tissue_net, enlarged + (1 - bone_share) * detail. The tone is the networks', the sharpness the
    source's but for the edges of bones. Of a source no larger than the networks' matrix it is their picture. Where the
    preprocessing equalises, so is the source before what is fine is taken from it.

    Args:
        cxr, cxr_net, soft_tissue_net, placement, prep: as of `subtract_local_bone`.

    Returns:
        [H, W], float32, in [0, 1].
    """
    picture = from_network(soft_tissue_net, placement)
    if max(cxr.shape) > placement.size:
        if prep.clahe_clip_limit > 0:
            small = resize(cxr, (placement.height, placement.width))
            cxr = EqualizingCurves.of(small, prep.clahe_clip_limit, prep.clahe_tiles, cxr.shape).apply(cxr)
        seen, soft_tissue = shown(cxr_net, placement), shown(soft_tissue_net, placement)
        share = unit(resize(bone_share(seen, seen - soft_tissue), cxr.shape))
        picture = unit(picture + (1 - share) * (cxr - resize(seen, cxr.shape)))
    return picture


def bone_share(cxr: NDArray[np.float32], bone: NDArray[np.float32]) -> NDArray[np.float32]:
    """How much of the X-ray's contrast around each pixel is bone: the slope of bone over X-ray.

    The linear coefficient of the guided filter (He et al., IEEE TPAMI 35, 2013, equation 5, with Gaussian weights). At
    a bone's edge both images rise together (1), at a vessel's the X-ray alone (0); finer structure at the same place is
    taken for bone to the same share.

    Args:
        cxr: [h, w], float32, a grey scale 1 wide.
        bone: [h, w], float32, the same scale.

    Returns:
        [h, w], float32, in [0, 1].
    """

    def mean(image: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(cv2.GaussianBlur(image, (0, 0), SHARE_SIGMA_PX), dtype=np.float32)

    cxr, bone = cxr - cxr.mean(), bone - bone.mean()  # small numbers: the differences below keep their digits
    variance = np.maximum(mean(cxr * cxr) - mean(cxr) ** 2, 0)
    slope = (mean(cxr * bone) - mean(cxr) * mean(bone)) / (variance + np.float32(SHARE_NOISE))
    return unit(slope)
