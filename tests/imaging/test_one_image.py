"""One X-ray through `prepare` and `finish`: what the model sees, and what comes back."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic import chest

from bsdiff_rt.config import Preprocessing
from bsdiff_rt.errors import InputFailed
from bsdiff_rt.imaging.chest_guard import INVERTED
from bsdiff_rt.imaging.network_input import from_network
from bsdiff_rt.imaging.one_image import finish, list_passes, prepare
from train.phantoms import draw_phantom

PREP = Preprocessing(64)


def framed_chest() -> np.ndarray:
    """A chest in a white frame, with a burned-in block near a corner."""
    cxr = np.full((120, 100), 1.0, np.float32)
    cxr[10:-10, 10:-10] = 0.8 * chest(100, 80)
    cxr[14:20, 14:22] = 1.0
    return cxr


def test_passes_are_samples_each_with_its_mirror_image():
    prepared = prepare(chest(80, 72), PREP)
    listed = list_passes(prepared, 2, mirror=True)
    assert [sample for _, sample in listed] == [0, 0, 1, 1]
    passes = [cxr_net for cxr_net, _ in listed]
    assert [one.shape for one in passes] == [(64, 64)] * 4
    np.testing.assert_array_equal(passes[0], passes[2])
    np.testing.assert_array_equal(passes[1], passes[0][:, ::-1])
    assert len(list_passes(prepared, 3, mirror=False)) == 3


@pytest.mark.parametrize("detail", ["full", "model"])
def test_borders_and_text_keep_their_pixels(detail):
    cxr = framed_chest()
    prepared = prepare(cxr, PREP)
    darker = np.clip(prepared.cxr_net - 0.2, -1, 1)
    result = finish(prepared, darker[None], mirror=False, detail=detail).soft_tissue
    np.testing.assert_array_equal(result[:10], cxr[:10])
    np.testing.assert_array_equal(result[14:20, 14:22], cxr[14:20, 14:22])
    inside = np.s_[40:90, 30:70]
    np.testing.assert_allclose(cxr[inside].mean() - result[inside].mean(), 0.1, atol=0.01)
    raw = prepare(cxr, PREP, raw_view=True)
    changed = finish(raw, np.clip(raw.cxr_net - 0.2, -1, 1)[None], mirror=False, detail=detail).soft_tissue
    assert not np.array_equal(changed[:10], cxr[:10])


def test_the_result_is_the_mean_of_the_samples_and_the_uncertainty_their_deviation():
    prepared = prepare(chest(64, 64), PREP)
    first, second = prepared.cxr_net * 0.5, prepared.cxr_net * 0.3
    finished = finish(prepared, np.stack([first, second]), mirror=False, detail="model")
    np.testing.assert_allclose(finished.soft_tissue, from_network((first + second) / 2, prepared.placement), atol=1e-6)
    assert finished.uncertainty is not None
    # Grey levels in [0, 1] deviate by half of what values in [-1, 1] do; two samples by half their distance.
    np.testing.assert_allclose(finished.uncertainty, np.abs(first - second) / 4, atol=1e-6)
    assert finish(prepared, first[None], mirror=False).uncertainty is None


def test_mirrored_passes_are_turned_back():
    prepared = prepare(chest(64, 64), PREP)
    passes = np.stack([cxr_net for cxr_net, _ in list_passes(prepared, 1, mirror=True)])
    result = finish(prepared, passes, mirror=True, detail="model").soft_tissue
    np.testing.assert_allclose(result, prepared.cxr, atol=1e-6)


def test_an_inverted_x_ray_is_warned_of():
    cxr = draw_phantom(0, 96).cxr
    assert prepare(1 - cxr, PREP).warnings == (INVERTED,)
    assert prepare(cxr, PREP).warnings == prepare(chest(96, 80), PREP).warnings == ()
    assert len(prepare(1 - chest(96, 80), PREP).warnings) == 1


@pytest.mark.parametrize(
    ("value", "reason"), [(np.nan, "NaN or infinity"), (np.inf, "NaN or infinity"), (0.2, "one grey level")]
)
def test_an_output_that_is_no_image_is_refused(value, reason):
    prepared = prepare(chest(64, 64), PREP)
    with pytest.raises(InputFailed, match=reason):
        finish(prepared, np.full((1, 64, 64), value, np.float32), mirror=False)
