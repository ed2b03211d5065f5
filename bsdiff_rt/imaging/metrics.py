"""Quality of a predicted soft-tissue image: BSR in three forms, MSE, SSIM, PSNR.

Every image is [H, W], float, in [0, 1]. The bone suppression ratio (BSR) is that of Yang et al. (Medical Image Analysis
35, 2017), which the BS-Diff paper cites. The published code computes another one, which gives even an untouched X-ray a
high score. It is reported under its own name, because the paper's tables use it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.errors import SettingsError

Image = NDArray[np.floating]
Mask = NDArray[np.bool_]

_SSIM_WINDOW_PX = 7
_SSIM_K1, _SSIM_K2 = 0.01, 0.03
# A smaller mean square of a difference is rounding of float64 after a fit, not bone. One 16-bit grey level in one of a
# million pixels has two hundred times as much.
_NO_BONE = 1e-18


@dataclass(frozen=True)
class Quality:
    """One prediction against its truth. `psnr` is in dB; every other figure is a ratio."""

    bsr: float
    bsr_tone_matched: float
    bsr_release: float
    mse: float
    ssim: float
    psnr: float

    def as_dict(self) -> dict[str, float]:
        """Return the figures by name, for JSON."""
        return asdict(self)


def bsr(cxr: Image, soft_tissue: Image, predicted: Image) -> float:
    """Return the bone suppression ratio 1 - |B - B_hat|^2 / |B|^2, with B = cxr - soft_tissue, B_hat = cxr - predicted.

    Args:
        cxr: the X-ray, [H, W], in [0, 1].
        soft_tissue: the truth, [H, W], in [0, 1].
        predicted: [H, W], in [0, 1].

    Returns:
        1 for the true soft tissue, 0 for the untouched X-ray, less than 0 for anything worse. NaN if there is no bone.

    Raises:
        SettingsError: the images differ in shape.
    """
    _same_shape(cxr, soft_tissue, predicted)
    return _ratio(np.subtract(predicted, soft_tissue, dtype=np.float64), cxr, soft_tissue)


def match_tone(image: Image, soft_tissue: Image) -> Image:
    """Return `image` with the gain and offset that bring it closest to `soft_tissue` (least squares).

    Raises:
        SettingsError: the images differ in shape.
    """
    _same_shape(image, soft_tissue)
    source = image.astype(np.float64)
    variance = float(source.var())
    if variance == 0.0:
        return np.full_like(source, float(soft_tissue.mean(dtype=np.float64)))
    target = soft_tissue.astype(np.float64)
    gain = float(np.mean((source - source.mean()) * (target - target.mean()))) / variance
    matched: Image = (source - source.mean()) * gain + target.mean()
    return matched


def bsr_tone_matched(cxr: Image, soft_tissue: Image, predicted: Image) -> float:
    """Return the BSR after gain and offset of both the prediction and the X-ray are fitted to the truth.

    Both are fitted so that an untouched X-ray still scores 0. A change of tone alone then gains nothing.

    Raises:
        SettingsError: the images differ in shape.
    """
    return bsr(match_tone(cxr, soft_tissue), soft_tissue, match_tone(predicted, soft_tissue))


def bsr_release(cxr: Image, soft_tissue: Image, predicted: Image) -> float:
    """Return the ratio that the published code computes. Use it only to compare with the paper's tables.

    The mean of the prediction is first moved to that of the truth. Then only pixels that are darker than the truth
    count as error. So bone that stays in the picture costs nothing.

    Raises:
        SettingsError: the images differ in shape.
    """
    _same_shape(cxr, soft_tissue, predicted)
    shift = float(soft_tissue.mean(dtype=np.float64) - predicted.mean(dtype=np.float64))
    shifted = predicted.astype(np.float64) + shift
    return _ratio(np.clip(soft_tissue - shifted, 0.0, None), cxr, soft_tissue)


def mse(soft_tissue: Image, predicted: Image) -> float:
    """Return the mean squared error of two images of one shape, in [0, 1].

    Raises:
        SettingsError: the images differ in shape.
    """
    _same_shape(soft_tissue, predicted)
    return float(np.mean(np.square(np.subtract(soft_tissue, predicted, dtype=np.float64))))


def psnr(soft_tissue: Image, predicted: Image, data_range: float = 1.0) -> float:
    """Return the peak signal-to-noise ratio in dB: infinity for equal images, NaN if a pixel is NaN.

    Args:
        soft_tissue: the truth, any shape.
        predicted: the prediction, of the truth's shape.
        data_range: the largest value minus the smallest one that an image can have.

    Raises:
        SettingsError: the images differ in shape.
    """
    error = mse(soft_tissue, predicted)
    return math.inf if error == 0 else 20.0 * math.log10(data_range) - 10.0 * math.log10(error)


def ssim(soft_tissue: Image, predicted: Image, mask: Mask | None = None) -> float:
    """Return the mean structural similarity as scikit-image computes it: 7 x 7 uniform window, data range 1.

    Args:
        soft_tissue: the truth, [H, W].
        predicted: [H, W].
        mask: [H, W], the pixels whose windows are averaged; None averages all.

    Raises:
        SettingsError: the images are smaller than the window, or differ in shape.
    """
    _same_shape(soft_tissue, predicted)
    if min(soft_tissue.shape) < _SSIM_WINDOW_PX:
        raise SettingsError(f"SSIM needs images of at least {_SSIM_WINDOW_PX} px a side, got {soft_tissue.shape}")
    x, y = soft_tissue.astype(np.float64), predicted.astype(np.float64)
    pixels = _SSIM_WINDOW_PX**2
    unbiased = pixels / (pixels - 1)
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    var_x = unbiased * (_window_mean(x * x) - mean_x * mean_x)
    var_y = unbiased * (_window_mean(y * y) - mean_y * mean_y)
    cov = unbiased * (_window_mean(x * y) - mean_x * mean_y)
    c1, c2 = _SSIM_K1**2, _SSIM_K2**2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    if mask is not None:
        edge = _SSIM_WINDOW_PX // 2
        similarity = similarity[mask[edge:-edge, edge:-edge]]
    return float(similarity.mean())


def quality(cxr: Image, soft_tissue: Image, predicted: Image, mask: Mask | None = None) -> Quality:
    """Return all figures of one prediction.

    Args:
        cxr: the X-ray, [H, W], in [0, 1].
        soft_tissue: the truth, [H, W], in [0, 1].
        predicted: [H, W], in [0, 1].
        mask: [H, W], the only pixels that count, also for the fit of gain and offset; None counts all.

    Raises:
        SettingsError: the images differ in shape, are too small, or the mask is empty or of another shape.
    """
    if mask is not None and (mask.shape != cxr.shape or not mask.any()):
        raise SettingsError(f"the mask has shape {mask.shape} and {int(mask.sum())} pixels, the X-ray {cxr.shape}")
    similarity = ssim(soft_tissue, predicted, mask)
    if mask is not None:
        cxr, soft_tissue, predicted = cxr[mask], soft_tissue[mask], predicted[mask]
    return Quality(
        bsr=bsr(cxr, soft_tissue, predicted),
        bsr_tone_matched=bsr_tone_matched(cxr, soft_tissue, predicted),
        bsr_release=bsr_release(cxr, soft_tissue, predicted),
        mse=mse(soft_tissue, predicted),
        ssim=similarity,
        psnr=psnr(soft_tissue, predicted),
    )


def mean_quality(rows: list[Quality]) -> Quality:
    """Return the mean of each figure over images."""
    return Quality(**{name: float(np.mean([row.as_dict()[name] for row in rows])) for name in Quality.__annotations__})


def _ratio(error: Image, cxr: Image, soft_tissue: Image) -> float:
    """Return 1 - |error|^2 / |cxr - soft_tissue|^2; NaN if there is no bone."""
    bone_energy = float(np.mean(np.square(np.subtract(cxr, soft_tissue, dtype=np.float64))))
    return 1.0 - float(np.mean(np.square(error))) / bone_energy if bone_energy > _NO_BONE else math.nan


def _window_mean(image: Image) -> Image:
    edge = _SSIM_WINDOW_PX // 2
    mean = cv2.blur(image, (_SSIM_WINDOW_PX, _SSIM_WINDOW_PX))
    return np.asarray(mean[edge:-edge, edge:-edge], dtype=np.float64)


def _same_shape(*images: Image) -> None:
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise SettingsError(f"images to compare differ in shape: {', '.join(map(str, sorted(shapes)))}")
