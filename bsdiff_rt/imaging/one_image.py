"""One X-ray, from pixels to the model's input and back to a soft-tissue image. Torch-free.

Folder runs, the Python API and the benchmarks all go through `prepare` and `finish`, so all of them see one picture.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.config import DetailName, Preprocessing
from bsdiff_rt.errors import InputFailed
from bsdiff_rt.imaging.chest_guard import load_guard
from bsdiff_rt.imaging.detail import add_fine_detail
from bsdiff_rt.imaging.network_input import Placement, from_network, to_network, view_picture, without_mirror
from bsdiff_rt.imaging.probe import PICTURES, Nodule, Retention, add_nodules, measure_retention, place_nodules
from bsdiff_rt.imaging.result_guard import check_result
from bsdiff_rt.imaging.view import View, find_view

Image = NDArray[np.float32]

CONSTANT = 1e-4  # a result whose grey levels, in [0, 1], span less than this shows nothing


@dataclass(frozen=True)
class Prepared:
    """An X-ray that is ready for the model.

    Attributes:
        cxr: the whole X-ray, [H, W], float32, in [0, 1].
        view: the part of it that the model sees, and the change of its grey levels.
        cxr_net: the model's input, [S, S], float32, in [-1, 1].
        placement: where the view lies in that square.
        preprocessing: the bundle's, which made `cxr_net`.
        warnings: what a user should know about the picture, one sentence each.
        probe: virtual nodules, one list for each further picture that the model is given; empty if nothing is probed.
    """

    cxr: Image
    view: View
    cxr_net: Image
    placement: Placement
    preprocessing: Preprocessing
    warnings: tuple[str, ...]
    probe: tuple[list[Nodule], ...] = ()


@dataclass(frozen=True)
class Finished:
    """What the model made of one X-ray.

    Attributes:
        soft_tissue: [H, W], float32, in [0, 1].
        uncertainty: standard deviation of the samples, [H, W], float32, in [0, 1]; None for a single sample.
        retention: how much of a small nodule would survive at each place; None if nothing was probed.
        warnings: limits of plausible results that this one breaks, one sentence each.
    """

    soft_tissue: Image
    uncertainty: Image | None
    retention: Retention | None = None
    warnings: tuple[str, ...] = ()


def prepare(cxr: Image, preprocessing: Preprocessing, *, raw_view: bool = False, probe: bool = False) -> Prepared:
    """Make an X-ray into the model's input. Warn of a picture that looks inverted, turned, or like no chest.

    Uniform borders and burned-in text are hidden from the model, and a faint picture is spread over more grey levels.
    `finish` undoes all three.

    Args:
        cxr: the X-ray, [H, W], float32, in [0, 1], air dark.
        preprocessing: the bundle's.
        raw_view: show borders and burned-in text to the model, too.
        probe: also put virtual nodules into copies of the X-ray, to measure how much of them survives.
    """
    view = find_view(cxr, trim=not raw_view, least_span=preprocessing.least_span)
    shown_cxr = view.crop(cxr)
    cxr_net, placement = to_network(shown_cxr, preprocessing)
    warning = load_guard().check(shown_cxr)
    cxr_net = view.hide_marks(cxr_net, placement)
    inside = cxr[view.top : view.bottom, view.left : view.right]
    nodules = tuple(place_nodules(inside, view.white)) if probe else ()
    warnings = () if warning is None else (warning,)
    return Prepared(cxr, view, cxr_net, placement, preprocessing, warnings, nodules)


def list_passes(prepared: Prepared, samples: int, *, mirror: bool) -> list[tuple[Image, int]]:
    """Return the model's inputs for one X-ray, each with the number of the sample whose noise it gets.

    First come the samples, then as many for each picture of the probe. With `mirror`, every input is followed by its
    mirror image, which gets the same noise.

    Returns:
        [S, S], float32, in [-1, 1], and a number from 0.
    """
    passes = []
    for one in (prepared, *_list_probed(prepared)):
        for sample in range(samples):
            passes.append((one.cxr_net, sample))
            if mirror:
                passes.append((one.cxr_net[:, ::-1], sample))
    return passes


def count_passes(samples: int, *, mirror: bool, probe: bool) -> int:
    """Return how often one X-ray goes through the model: the length of `list_passes`."""
    return samples * (2 if mirror else 1) * (1 + (PICTURES if probe else 0))


def finish(prepared: Prepared, passes: Image, *, mirror: bool, detail: DetailName = "full") -> Finished:
    """Make the model's outputs into a soft-tissue image at the X-ray's matrix.

    Args:
        prepared: the X-ray, from `prepare`.
        passes: the model's outputs in the order of `list_passes`, [P, S, S], float32, in [-1, 1].
        mirror: whether every second pass is that of the mirror image.
        detail: full adds fine detail from the X-ray that is not bone; model keeps the model's picture alone.

    Raises:
        InputFailed: an output is not finite, or shows one grey level only.
    """
    for one in passes:
        _check_output(one)
    samples = without_mirror(passes) if mirror else passes
    count = len(samples) // (1 + len(prepared.probe))
    soft_tissue = _make_picture(prepared, samples[:count], detail)
    retention = None
    if prepared.probe:
        results = [
            _make_picture(one, samples[(1 + number) * count : (2 + number) * count], detail)
            for number, one in enumerate(_list_probed(prepared))
        ]
        corner = prepared.view.top, prepared.view.left
        retention = measure_retention(prepared.probe, soft_tissue, results, corner)
    uncertainty = _measure_uncertainty(prepared, samples[:count]) if count > 1 else None
    seen, result = (
        view_picture(one, prepared.placement) for one in (prepared.cxr_net, samples[:count].mean(0, dtype=np.float32))
    )
    return Finished(soft_tissue, uncertainty, retention, check_result(seen, result))


def _make_picture(prepared: Prepared, samples: Image, detail: DetailName) -> Image:
    """Return the mean of samples, [N, S, S], as a picture at the X-ray's matrix, [H, W], in [0, 1]."""
    soft_tissue_net = samples.mean(0, dtype=np.float64).astype(np.float32)
    view, placement = prepared.view, prepared.placement
    if detail == "full":
        shown_cxr = view.crop(prepared.cxr)
        inside = add_fine_detail(shown_cxr, prepared.cxr_net, soft_tissue_net, placement, prepared.preprocessing)
    else:
        inside = from_network(soft_tissue_net, placement)
    return view.paste_into(prepared.cxr, inside)


def _measure_uncertainty(prepared: Prepared, samples: Image) -> Image:
    """Return the standard deviation of samples, [N, S, S], at the X-ray's matrix, [H, W], in [0, 1]."""
    deviation = samples.std(0, dtype=np.float64).astype(np.float32)  # of values in [-1, 1]: at most 1
    return prepared.view.place_deviation(from_network(deviation - 1, prepared.placement), prepared.cxr.shape)


def _list_probed(prepared: Prepared) -> list[Prepared]:
    """Return the X-ray with the nodules of each of the probe's pictures, prepared like the X-ray itself."""
    view = prepared.view
    probed = []
    for nodules in prepared.probe:
        cxr = prepared.cxr.copy()
        part = cxr[view.top : view.bottom, view.left : view.right]
        part[...] = add_nodules(part, nodules)
        cxr_net, placement = to_network(view.crop(cxr), prepared.preprocessing)
        cxr_net = view.hide_marks(cxr_net, placement)
        probed.append(replace(prepared, cxr=cxr, cxr_net=cxr_net, probe=()))
    return probed


def _check_output(soft_tissue_net: Image) -> None:
    """Refuse an output of the model that is no image.

    Raises:
        InputFailed: NaN, infinity, or (nearly) one grey level everywhere.
    """
    if not np.isfinite(soft_tissue_net).all():
        raise InputFailed("the model returned NaN or infinity for this image; nothing was written")
    if float(np.ptp(soft_tissue_net)) / 2 < CONSTANT:
        raise InputFailed("the model returned one grey level for the whole image; nothing was written")
