"""What the result of a model is checked for."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic import chest

from bsdiff_rt.config import Preprocessing
from bsdiff_rt.imaging.one_image import finish, prepare
from bsdiff_rt.imaging.result_guard import BRIGHTER, MOST_BRIGHTER, TOO_DIFFERENT, check_result
from train.phantoms import draw_phantom


def test_true_soft_tissue_breaks_no_limit():
    for seed in range(10**6, 10**6 + 10):
        phantom = draw_phantom(seed, 128)
        assert check_result(phantom.cxr, phantom.soft_tissue) == ()


@pytest.mark.parametrize(
    ("change", "warnings"),
    [
        (lambda cxr: cxr, ()),
        (lambda cxr: np.full_like(cxr, 0.5), (TOO_DIFFERENT,)),
        (lambda cxr: 1 - cxr, (TOO_DIFFERENT,)),
        (lambda cxr: cxr + 0.5 * MOST_BRIGHTER * np.ptp(cxr), ()),
        (lambda cxr: cxr + 1.5 * MOST_BRIGHTER * np.ptp(cxr), (BRIGHTER,)),
    ],
)
def test_limits(change, warnings):
    cxr = chest(160, 128)
    assert check_result(cxr, change(cxr).astype(np.float32)) == warnings
    assert check_result(100 * cxr, 100 * change(cxr).astype(np.float32)) == warnings


def test_finishing_warns():
    prepared = prepare(chest(64, 64), Preprocessing(64))
    assert finish(prepared, prepared.cxr_net[None], mirror=False).warnings == ()
    assert finish(prepared, -prepared.cxr_net[None], mirror=False).warnings == (TOO_DIFFERENT,)
