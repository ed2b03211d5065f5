"""The tone of a picture apart from the bones in it, and the tone that a scanner's images have. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.config import ScannerTone
from bsdiff_rt.imaging.network_input import Placement, resize, shown, unit

# How `tone_of` tells a change of overall tone from bones: on a square of TONE_PX, within a window wider than a bone,
# TONE_PERCENTILE of the pixels lie between bones; what they show is smoothed by a Gaussian a sixth as wide.
TONE_PX = 64
TONE_PERCENTILE = 25
# Windows, px of that square. The one holds two ribs and what lies between: broader structure in a network's bone layer
# may be its mistake about a foreign picture's tone. The other holds any bone, for a layer that is known to be true.
RIBS_WINDOW_PX = 7
BONES_WINDOW_PX = 15

# `tone_change` takes an X-ray for the training scanner's when its quantiles are as near to that scanner's (root mean
# square), and the networks take its tone for that scanner's when they change it by more (median over the image). The
# demo model's training X-rays lie within 0.009 to 0.014 of their mean and 0.017 to 0.025 from each other, so that one
# not seen lies some 0.017 off, now and then twice that. Phantoms are beyond 0.06; of 3000 random tone curves over the
# same X-rays, 61 in a thousand are as near, 16 in a thousand also retoned. What is beyond TONE_OTHER_RMS is another
# scanner's whatever the networks made of it.
TONE_CXR_RMS = 0.04
TONE_OTHER_RMS = 0.08
TONE_CHANGE = 0.01
TONE_POWERS = (0.8, 1.25)  # what would take a stronger one is no matter of tone
# Which percentile of the envelope over the picture is the networks' change of overall tone: below the median, because
# around the spine even the widest window leaves bone in it.
OFFSET_PERCENTILE = 40


@dataclass(frozen=True)
class ToneChange:
    """What gives the networks' picture the tone it should have; by default nothing.

    Attributes:
        power: what grey levels in [0, 1] are raised to; None leaves them.
        offset: what is added to grey levels in [0, 1]; None leaves them.
    """

    power: float | None = None
    offset: float | None = None

    def apply(self, soft_tissue_net: NDArray[np.float32], cxr_net: NDArray[np.float32]) -> NDArray[np.float32]:
        """The networks' picture in that tone; both [size, size] in [-1, 1], and so is what is returned.

        A power leaves black and white. An offset makes nothing brighter than it is in the X-ray: bone only ever adds.
        """
        if self.power is not None:
            soft_tissue_net = 2 * unit((soft_tissue_net + 1) / 2) ** np.float32(self.power) - 1
        if self.offset is not None:
            raised = soft_tissue_net + np.float32(2 * self.offset)
            soft_tissue_net = np.clip(raised, -1, np.maximum(soft_tissue_net, cxr_net))
        return soft_tissue_net


def tone_quantiles(cxr: NDArray[np.float32], count: int) -> NDArray[np.float64]:
    """`ScannerTone.cxr` of one picture, [H, W] in [0, 1]: [count], float64."""
    return np.asarray(np.quantile(cxr, np.linspace(0.02, 0.98, count)), dtype=np.float64)


def tone_change(
    cxr_net: NDArray[np.float32],
    soft_tissue_net: NDArray[np.float32],
    placement: Placement,
    tone: ScannerTone,
    *,
    foreign: bool = False,
) -> ToneChange:
    """What gives a result its scanner's tone.

    An X-ray that looks like the training scanner's, and that the networks took for one, gets the mean of that scanner's
    soft-tissue images, by a power. One that is another scanner's, as its grey levels say or as the networks do that
    leave its tone nearly alone, keeps its own: what they changed it by is undone, by an offset. One in between stays as
    the networks made it.

    Args:
        cxr_net: [size, size], float32, in [-1, 1], the networks' input.
        soft_tissue_net: [size, size], float32, in [-1, 1], their output.
        placement: what `to_network` returned for this picture.
        tone: of the training scanner; known.
        foreign: known to be another scanner's, whatever its grey levels look like.

    Returns:
        A power within TONE_POWERS, an offset, or neither: also where no such power gives that mean.
    """
    cxr, soft_tissue = shown(cxr_net, placement), shown(soft_tissue_net, placement)
    distance = float(np.sqrt(np.mean((tone_quantiles(cxr, len(tone.cxr)) - np.array(tone.cxr)) ** 2)))
    envelope = tone_of(cxr - soft_tissue, placement.size, BONES_WINDOW_PX)
    retoned = float(np.median(envelope)) >= TONE_CHANGE
    if foreign or distance > TONE_OTHER_RMS or not retoned:
        return ToneChange(offset=round(float(np.percentile(envelope, OFFSET_PERCENTILE)), 4))
    if distance > TONE_CXR_RMS:
        return ToneChange()

    def mean(power: float) -> float:
        return float(np.mean(soft_tissue ** np.float32(power), dtype=np.float64))

    low, high = TONE_POWERS
    if not mean(high) <= tone.soft_tissue_mean <= mean(low):  # a larger power is a darker image
        return ToneChange()
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) > tone.soft_tissue_mean else (low, middle)
    return ToneChange(power=round((low + high) / 2, 4))


def tone_of(bone: NDArray[np.float32], side: int, window_px: int) -> NDArray[np.float32]:
    """The change of tone in a layer X-ray - soft tissue: its smooth lower envelope. What rises above it is bone.

    An envelope and not a mean (a Gaussian): bone only ever adds, so a mean would leave a part of every bone in the
    picture and darken what lies beside it.

    Args:
        bone: [h, w], float32, any range.
        side: of the square that the layer is (part of), px.
        window_px: side of the window, px of a square of TONE_PX.

    Returns:
        [h, w], float32.
    """
    height, width = bone.shape
    scale = min(TONE_PX / side, 1.0)
    small = resize(bone, (max(1, round(height * scale)), max(1, round(width * scale))))
    reach = max(1, round(window_px * side * scale / TONE_PX) // 2)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(small, reach, mode="symmetric"), (2 * reach + 1,) * 2)
    values = windows.reshape(*small.shape, -1)
    rank = round((values.shape[-1] - 1) * TONE_PERCENTILE / 100)
    envelope = np.ascontiguousarray(np.partition(values, rank, axis=-1)[..., rank])
    sigma = window_px / 6 * side * scale / TONE_PX
    smooth = cv2.GaussianBlur(envelope, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
    return resize(np.asarray(smooth, dtype=np.float32), (height, width))
