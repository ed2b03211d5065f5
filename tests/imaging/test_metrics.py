"""SSIM, PSNR and MSE against scikit-image; the three forms of BSR against cases computed by hand."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity
from synthetic import chest

from bsdiff_rt.errors import SettingsError
from bsdiff_rt.imaging.metrics import (
    Quality,
    bsr,
    bsr_release,
    bsr_tone_matched,
    match_tone,
    mean_quality,
    mse,
    psnr,
    quality,
    ssim,
)

SOFT_TISSUE = chest(48, 60, seed=1)
CXR = SOFT_TISSUE + 0.3 * chest(48, 60, seed=2) ** 3  # bone is bright, and not constant
PREDICTED = SOFT_TISSUE + 0.05 * chest(48, 60, seed=3)


@pytest.mark.parametrize("shape", [(48, 60), (7, 7), (7, 90), (33, 8)])
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_to_scikit_image(shape, noise, dtype):
    generator = np.random.default_rng(0)
    truth = chest(*shape).astype(dtype)
    other = np.clip(truth + noise * generator.standard_normal(shape), 0, 1).astype(dtype)
    wide, other_wide = truth.astype(np.float64), other.astype(np.float64)
    # Both in float64 with the same formulas; OpenCV's running window sums differ from SciPy's in rounding only.
    expected = structural_similarity(wide, other_wide, data_range=1.0)
    assert ssim(truth, other) == pytest.approx(expected, abs=1e-9)
    assert mse(truth, other) == pytest.approx(mean_squared_error(wide, other_wide), rel=1e-12)
    if noise:
        assert psnr(truth, other) == pytest.approx(peak_signal_noise_ratio(wide, other_wide, data_range=1.0), rel=1e-12)


def test_equal_images():
    assert mse(CXR, CXR) == 0
    assert psnr(CXR, CXR) == math.inf
    assert ssim(CXR, CXR) == pytest.approx(1, abs=1e-12)


def test_psnr_of_another_range():
    assert psnr(CXR * 2 - 1, SOFT_TISSUE * 2 - 1, data_range=2.0) == pytest.approx(psnr(CXR, SOFT_TISSUE), abs=1e-4)


def test_the_psnr_of_a_picture_that_is_not_finite_is_none():
    predicted = PREDICTED.copy()
    predicted[3, 5] = math.nan
    assert math.isnan(psnr(SOFT_TISSUE, predicted))
    predicted[3, 5] = math.inf
    assert psnr(SOFT_TISSUE, predicted) == -math.inf


@pytest.mark.parametrize("form", [bsr, bsr_tone_matched, bsr_release])
def test_the_truth_scores_one(form):
    assert form(CXR, SOFT_TISSUE, SOFT_TISSUE) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("form", [bsr, bsr_tone_matched])
def test_the_untouched_x_ray_scores_zero(form):
    assert form(CXR, SOFT_TISSUE, CXR) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("left", "expected"),
    [(0.0, 1.0), (0.1, 0.99), (0.5, 0.75), (1.0, 0.0), (2.0, -3.0), (-0.5, 0.75)],
)
def test_bsr_of_a_share_of_bone_left(left, expected):
    predicted = SOFT_TISSUE + left * (CXR - SOFT_TISSUE)  # 1 - left^2, too much taken away counts like too little
    assert bsr(CXR, SOFT_TISSUE, predicted) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("share", "expected"), [(0.25, 0.8125), (0.5, 0.75), (0.1, 0.91)])
def test_the_release_form_is_blind_to_bone_left_in(share, expected):
    """Bone of height h on a share f of the pixels, all left in: after the shift by f h only 1 - f of the pixels are
    darker than the truth, by f h each, so the untouched X-ray scores 1 - f (1 - f)."""
    soft_tissue = np.full((20, 20), 0.4)
    cxr = soft_tissue.copy()
    cxr.flat[: int(share * cxr.size)] += 0.2
    assert bsr_release(cxr, soft_tissue, cxr) == pytest.approx(expected, abs=1e-12)
    assert bsr(cxr, soft_tissue, cxr) == pytest.approx(0, abs=1e-12)


def test_the_release_form_counts_what_is_too_dark():
    soft_tissue = np.full((10, 10), 0.5)
    cxr, predicted = soft_tissue.copy(), soft_tissue.copy()
    cxr[:5] += 0.2  # energy 50 x 0.04
    predicted[:5] -= 0.1
    predicted[5:] += 0.1  # same mean, so no shift; the darker half: 50 x 0.01
    assert bsr_release(cxr, soft_tissue, predicted) == pytest.approx(0.75, abs=1e-12)
    assert bsr_release(cxr, soft_tissue, 1 - predicted) == pytest.approx(0.75, abs=1e-12)


@pytest.mark.parametrize(("gain", "offset"), [(0.5, 0.0), (1.0, 0.3), (0.7, -0.2), (3.0, 5.0), (-1.0, 1.0)])
def test_gain_and_offset_do_not_change_the_tone_matched_form(gain, offset):
    expected = bsr_tone_matched(CXR, SOFT_TISSUE, PREDICTED)
    assert 0 < expected < 1
    # The fit is computed in float64 of float32 pictures that gain and offset round again.
    assert bsr_tone_matched(CXR, SOFT_TISSUE, gain * PREDICTED + offset) == pytest.approx(expected, abs=1e-4)
    assert bsr_tone_matched(gain * CXR + offset, SOFT_TISSUE, PREDICTED) == pytest.approx(expected, abs=1e-4)


def test_tone_matching_is_the_least_squares_fit():
    design = np.stack([PREDICTED.ravel(), np.ones(PREDICTED.size)], axis=1).astype(np.float64)
    solution = np.linalg.lstsq(design, SOFT_TISSUE.ravel().astype(np.float64))[0]
    fitted = (design @ solution).reshape(PREDICTED.shape)
    np.testing.assert_allclose(match_tone(PREDICTED, SOFT_TISSUE), fitted, atol=1e-9)


def test_tone_matching_of_one_grey_level_is_the_mean():
    np.testing.assert_array_equal(match_tone(np.full_like(CXR, 0.3), SOFT_TISSUE), SOFT_TISSUE.mean(dtype=np.float64))


@pytest.mark.parametrize("form", [bsr, bsr_tone_matched, bsr_release])
@pytest.mark.parametrize("soft_tissue", [SOFT_TISSUE, SOFT_TISSUE.astype(np.float64), np.zeros((9, 9))])
def test_no_bone_is_no_number(form, soft_tissue):
    assert math.isnan(form(soft_tissue, soft_tissue, np.sqrt(soft_tissue)))


def test_a_change_of_tone_is_no_bone():
    soft_tissue = SOFT_TISSUE.astype(np.float64)  # float32 would leave rounding of the size of a grey level
    assert math.isnan(bsr_tone_matched(0.8 * soft_tissue + 0.1, soft_tissue, PREDICTED))


def test_the_smallest_bone_is_bone():
    soft_tissue = np.full((1024, 1024), 0.5)
    cxr = soft_tissue.copy()
    cxr[0, 0] += 1 / 65535  # one grey level of 16 bits in one pixel
    assert bsr(cxr, soft_tissue, soft_tissue) == 1


@pytest.mark.parametrize("form", [bsr, bsr_tone_matched, bsr_release, quality])
@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_three_images_of_different_shapes(form, wrong):
    images = [CXR, SOFT_TISSUE, PREDICTED]
    images[wrong] = images[wrong][:, :-1]
    with pytest.raises(SettingsError, match=r"differ in shape: \(48, 59\), \(48, 60\)"):
        form(*images)


@pytest.mark.parametrize("form", [mse, psnr, ssim, match_tone])
def test_two_images_of_different_shapes(form):
    with pytest.raises(SettingsError, match=r"differ in shape: \(48, 60\), \(60, 48\)"):
        form(CXR, CXR.T)


def test_ssim_needs_its_window():
    with pytest.raises(SettingsError, match=r"at least 7 px a side, got \(6, 60\)"):
        ssim(CXR[:6], CXR[:6])


def test_quality_is_all_of_them():
    found = quality(CXR, SOFT_TISSUE, PREDICTED)
    assert found.as_dict() == {
        "bsr": bsr(CXR, SOFT_TISSUE, PREDICTED),
        "bsr_tone_matched": bsr_tone_matched(CXR, SOFT_TISSUE, PREDICTED),
        "bsr_release": bsr_release(CXR, SOFT_TISSUE, PREDICTED),
        "mse": mse(SOFT_TISSUE, PREDICTED),
        "ssim": ssim(SOFT_TISSUE, PREDICTED),
        "psnr": psnr(SOFT_TISSUE, PREDICTED),
    }


def test_mean_quality():
    rows = [Quality(1.0, 2.0, 3.0, 4.0, 5.0, 6.0), Quality(3.0, 2.0, 1.0, 0.0, -5.0, math.inf)]
    assert mean_quality(rows) == Quality(2.0, 2.0, 2.0, 2.0, 0.0, math.inf)


def test_a_mask_leaves_out_all_other_pixels():
    mask = np.zeros(CXR.shape, bool)
    mask[8:40, 10:35] = True
    found = quality(CXR, SOFT_TISSUE, PREDICTED, mask)
    other = PREDICTED.copy()
    other[~cv2.dilate(mask.astype(np.uint8), np.ones((7, 7))).astype(bool)] = 0  # beyond the windows of SSIM
    assert quality(CXR, SOFT_TISSUE, other, mask).as_dict() == pytest.approx(found.as_dict())
    crop = (slice(8, 40), slice(10, 35))
    alone = quality(CXR[crop], SOFT_TISSUE[crop], PREDICTED[crop])
    for name in ("bsr", "bsr_tone_matched", "bsr_release", "mse", "psnr"):
        assert getattr(found, name) == pytest.approx(getattr(alone, name))
    assert quality(CXR, SOFT_TISSUE, PREDICTED, np.ones(CXR.shape, bool)).bsr == pytest.approx(
        bsr(CXR, SOFT_TISSUE, PREDICTED)
    )


@pytest.mark.parametrize("mask", [np.zeros((48, 60), bool), np.ones((48, 59), bool)])
def test_an_empty_mask_or_one_of_another_shape_is_refused(mask):
    with pytest.raises(SettingsError, match="the mask has shape"):
        quality(CXR, SOFT_TISSUE, PREDICTED, mask)
