"""Runner `tensorrt-rtx`: runner `tensorrt` (tensorrt.py) with TensorRT for RTX, NVIDIA's library for its RTX cards.

It builds without a GPU, for any RTX card. The card's driver compiles the kernels when an engine is first used.
"""

from __future__ import annotations

from functools import partial

from bsdiff_rt.runners.tensorrt import TensorRTRunner
from bsdiff_rt.runners.tensorrt_builder import build_plans
from bsdiff_rt.runners.tensorrt_library import RTX

load_engine = partial(TensorRTRunner, RTX)
list_versions = RTX.list_versions
build = partial(build_plans, RTX)
