"""Tell a change of overall tone apart from bone. Torch-free.

A scanner that processes X-ray and soft tissue on their own changes the tone between the two. Training separates that
change from the bone, because tone is not bone.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.imaging.network_input import resize

# On a square of TONE_PX, within a window wider than any bone, TONE_PERCENTILE of the pixels lie between bones. What
# they show is smoothed by a Gaussian a sixth as wide.
TONE_PX = 64
TONE_PERCENTILE = 25
BONES_WINDOW_PX = 15  # px of that square; wider than any bone


def measure_tone(bone: NDArray[np.float32], side: int, window_px: int) -> NDArray[np.float32]:
    """Return the change of tone in a layer X-ray - soft tissue: its smooth lower envelope.

    What rises above the envelope is bone. A mean would not do: bone only ever adds, so a mean would leave a part of
    every bone in the picture and darken its surroundings.

    Args:
        bone: the layer, [h, w], float32, any range.
        side: side of the square that holds the layer, px.
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
