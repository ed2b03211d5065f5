"""What the networks made of a file, brought to its matrix and depth and written: results, deviation maps, the preview.

Torch-free.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bsdiff_rt import __version__
from bsdiff_rt.bundle import Bundle
from bsdiff_rt.config import InferSettings, step_count
from bsdiff_rt.errors import BsdiffError, InputFailed
from bsdiff_rt.files import file_sha256
from bsdiff_rt.folder.evaluate import read_result
from bsdiff_rt.folder.preview import FILE_NAME as PREVIEW
from bsdiff_rt.folder.preview import ROWS, Preview
from bsdiff_rt.folder.reading import Ready, not_done, read_radiograph, reason_of
from bsdiff_rt.folder.report import FileEntry, Report, path_digest
from bsdiff_rt.folder.tasks import uncertainty_path
from bsdiff_rt.formats.dicom_out import Derivation, write_derived
from bsdiff_rt.formats.raster import write_png
from bsdiff_rt.imaging.detail import add_source_detail, subtract_local_bone
from bsdiff_rt.imaging.network_input import Placement, from_network, to_network, without_mirror
from bsdiff_rt.imaging.tone import ToneChange, tone_change
from bsdiff_rt.imaging.view import whole

logger = logging.getLogger(__name__)

CONSTANT = 1e-4  # a result whose grey levels, in [0, 1], span less than this shows nothing


class Writer:
    """Writes the results of one run.

    Args:
        settings: of the run, resolved.
        bundle: whose networks made them.
        steps: of the sampler, as many as were done.
        report: of the run; says with which runner.
    """

    def __init__(self, settings: InferSettings, bundle: Bundle, steps: int, report: Report) -> None:
        self._settings, self._bundle, self._steps, self._report = settings, bundle, steps, report

    def write(self, ready: Ready, passes: NDArray[np.float32], seconds: float) -> FileEntry:
        """Bring one file's result to its output matrix and write it; what is no image fails its file.

        Args:
            ready: the file as it was read.
            passes: [P, S, S] float32, what the networks made of it (`Inference`): its samples, each followed by that of
                the mirror image where there is one.
            seconds: the networks' for it.
        """
        started, spent = time.monotonic(), ready.seconds + seconds
        path = self._settings.output / ready.output
        deviation = None
        try:
            for one in passes:
                _check_result(one)
            samples = without_mirror(passes) if self._settings.mirror else passes
            soft_tissue_net = samples.mean(0, dtype=np.float64).astype(np.float32)
            change = self._tone_change(ready, soft_tissue_net)
            soft_tissue = self._to_output(ready, change.apply(soft_tissue_net, ready.cxr_net))
            if self._settings.samples > 1:
                deviation = self._write_deviation(ready, samples)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".dcm":
                write_derived(path, ready.radiograph, soft_tissue, self._derivation(ready, change), self._settings.sop)
            else:
                write_png(path, soft_tissue, ready.radiograph.bits_stored)
            digest = file_sha256(path)
        except Exception as error:
            return not_done(ready.task, "failed", reason_of(error, "written"), started - spent, ready.input_sha256)
        return FileEntry(
            str(ready.task.input),
            str(ready.output),
            "ok",
            seconds=round(spent + time.monotonic() - started, 4),
            sha256=digest,
            input_sha256=ready.input_sha256,
            path_sha256=path_digest(ready.task.input),
            tone_power=change.power,
            tone_offset=change.offset,
            deviation_sha256=deviation,
            view=ready.view.told(ready.radiograph.cxr.shape),
        )

    def _write_deviation(self, ready: Ready, samples: NDArray[np.float32]) -> str:
        """The samples' standard deviation at the output matrix: 16 bits, 65535 is the whole range of grey levels.

        Returns: the file's SHA-256.
        """
        deviation = samples.std(0, dtype=np.float64).astype(np.float32)  # of values in [-1, 1]: at most 1
        path = uncertainty_path(self._settings.output, ready.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        shown = from_network(deviation - 1, self._placement(ready))
        shape = ready.radiograph.cxr.shape if self._settings.size == "source" else shown.shape
        write_png(path, ready.view.deviation_back(shown, shape), 16)
        return file_sha256(path)

    def write_preview(self, files: Iterable[FileEntry]) -> None:
        """preview.png from the files as they lie there, so that those of an earlier run are in it, too."""
        shown = [entry for entry in files if entry.output is not None]
        preview = Preview()
        for entry in shown[:ROWS]:
            try:
                radiograph = read_radiograph(Path(entry.input), force_view=True)
                result = read_result(self._settings.output / str(entry.output), radiograph.bits_stored)
                path = uncertainty_path(self._settings.output, str(entry.output))
                deviation = read_result(path, 16) if self._settings.samples > 1 else None
            except BsdiffError as error:  # changed since it was done
                logger.warning("%s is not in the preview: %s", entry.input, error)
                continue
            preview.add(radiograph.cxr, result, deviation)
        try:
            written = preview.write(self._settings.output)
        except OSError as error:
            logger.warning("%s cannot be written (%s); no result depends on it", PREVIEW, error.strerror)
            return
        logger.info("preview: %s; %d left out", written or "nothing was written", max(0, len(shown) - ROWS))

    def _placement(self, ready: Ready) -> Placement:
        if self._settings.size == "source":
            return ready.placement
        # The picture without its padding, at the network's resolution.
        return replace(ready.placement, rows=ready.placement.height, columns=ready.placement.width)

    def _tone_change(self, ready: Ready, soft_tissue_net: NDArray[np.float32]) -> ToneChange:
        if not self._settings.scanner_tone:
            return ToneChange()
        foreign = ready.view.gain != 1  # it looks like the scanner's only since it was spread
        return tone_change(ready.cxr_net, soft_tissue_net, ready.placement, self._bundle.manifest.tone, foreign=foreign)

    def _to_output(self, ready: Ready, soft_tissue_net: NDArray[np.float32]) -> NDArray[np.float32]:
        """[H, W] in [0, 1] at the output matrix, with the detail asked for; what the networks were not shown stays."""
        made = self._made(ready, soft_tissue_net)
        around = ready.radiograph.cxr if self._settings.size == "source" else made
        return ready.view.back(made, around)

    def _made(self, ready: Ready, soft_tissue_net: NDArray[np.float32]) -> NDArray[np.float32]:
        """The same of what the networks were shown, in their grey levels."""
        cxr, placement = ready.view.of(ready.radiograph.cxr), self._placement(ready)
        if self._settings.size == "model":
            own_tone = replace(self._bundle.manifest.preprocessing, clahe_clip_limit=0.0)
            cxr = from_network(to_network(cxr, own_tone)[0], placement)
        made = (cxr, ready.cxr_net, soft_tissue_net, placement, self._bundle.manifest.preprocessing)
        if self._settings.detail == "source":
            return subtract_local_bone(*made)
        if self._settings.detail == "both":
            return add_source_detail(*made)
        return from_network(soft_tissue_net, placement)

    def _derivation(self, ready: Ready, change: ToneChange) -> Derivation:
        settings, how = self._settings, self._report.settings
        view = ready.view
        part = replace(view, gain=1.0, offset=0.0) != whole(ready.radiograph.cxr.shape)
        size = self._bundle.manifest.preprocessing.size
        return Derivation(
            description=(
                f"Bone suppression by conditional diffusion (BS-Diff): sampler {settings.sampler}, "
                f"{step_count(self._steps)}, {_seeds(settings.seed, settings.samples)}, "
                f"stage 2 {'on' if settings.enhance else 'off'}, "
                f"{'averaged with the mirrored image, ' if settings.mirror else ''}"
                f"{f'rows {view.top + 1}-{view.bottom} and columns {view.left + 1}-{view.right}, ' if part else ''}"
                f"{f'{view.mark_pixels} pixels of marks kept, ' if view.mark_pixels else ''}"
                f"{f'grey levels spread {view.gain:.3f} times for the networks, ' if view.gain != 1 else ''}"
                f"{f'grey levels to the power {change.power:.4f}, ' if change.power is not None else ''}"
                f"{f'{change.offset:+.4f} of the range added to grey levels, ' if change.offset is not None else ''}"
                f"network matrix {size} x {size}, "
                f"detail from {'network and source' if settings.detail == 'both' else settings.detail}, "
                f"runner {how['runner']} {how['precision']}. Not for diagnostic use."
            ),
            bundle_name=self._bundle.manifest.name,
            bundle_sha256=self._bundle.sha256,
            settings_digest=self._report.settings_digest(),
            software_version=__version__,
        )


def _seeds(first: int, samples: int) -> str:
    return f"seed {first}" if samples == 1 else f"mean of {samples} samples, seeds {first} to {first + samples - 1}"


def _check_result(soft_tissue_net: NDArray[np.float32]) -> None:
    """Refuse to write a result that is no image.

    Raises:
        InputFailed: NaN, infinity, or (nearly) one grey level everywhere.
    """
    if not np.isfinite(soft_tissue_net).all():
        raise InputFailed("the networks returned NaN or infinity for this image; nothing was written")
    if float(np.ptp(soft_tissue_net)) / 2 < CONSTANT:
        raise InputFailed("the networks returned one grey level for the whole image; nothing was written")
