"""Check whether a soft-tissue image can be what a model of bones makes of an X-ray. Torch-free.

Both limits lie well above what the demo model does to chests (docs/reliability.md). They find a broken model or engine
and pictures of another kind. They do not find a result that is wrong in a plausible way.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.imaging.network_input import resize

Image = NDArray[np.float32]

WORK_PX = 128  # side of the pictures that are compared: fine detail and noise do not count
SPAN_SHARES = (0.01, 0.99)  # of the pixels; changes are measured in the span between their grey levels
MOST_CHANGE = 0.2  # mean change
AIR = 0.1  # pixels so far above the darkest grey levels are air or lung without bone
MOST_BRIGHTER = 0.08  # there, at its largest

TOO_DIFFERENT = "the result differs from the X-ray by more than bones. Do not use it, and check model and engine."
BRIGHTER = "the result is brighter than the X-ray where there is no bone. Compare it with the X-ray before you use it."


def check_result(cxr: Image, soft_tissue: Image) -> tuple[str, ...]:
    """Return a warning for each limit that a result breaks.

    Args:
        cxr: the X-ray as the model saw it, [H, W], any range, air dark.
        soft_tissue: the result in the same grey levels, [H, W].
    """
    before, after = (resize(picture, (WORK_PX, WORK_PX)) for picture in (cxr, soft_tissue))
    low, high = (float(level) for level in np.quantile(before, SPAN_SHARES))
    removed = (before - after) / max(high - low, 1e-6)
    if np.abs(removed).mean() > MOST_CHANGE:
        return (TOO_DIFFERENT,)
    if -removed[before <= low + AIR * (high - low)].min() > MOST_BRIGHTER:
        return (BRIGHTER,)
    return ()
