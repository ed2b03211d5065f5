"""Write the results of a folder run: soft-tissue images, their maps and the preview. Torch-free."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsdiff_rt import formats
from bsdiff_rt.bundle import Bundle
from bsdiff_rt.config import InferSettings
from bsdiff_rt.errors import BsdiffError
from bsdiff_rt.files import file_sha256, flush_to_disk, write_atomically
from bsdiff_rt.folder.pictures import DEVIATION_BITS, read_pictures
from bsdiff_rt.folder.preview import ROWS, Preview
from bsdiff_rt.folder.reading import Ready, describe_error, make_not_done
from bsdiff_rt.folder.report import PREVIEW, RETENTION, UNCERTAINTY, FileEntry, digest_path, locate_map
from bsdiff_rt.folder.retention_map import draw_retention
from bsdiff_rt.formats.raster import write_png
from bsdiff_rt.imaging.one_image import Finished, finish
from bsdiff_rt.model import describe_derivation
from bsdiff_rt.urls import staged

logger = logging.getLogger(__name__)


class Writer:
    """Writes the results of one run.

    Args:
        settings: the run's settings, resolved.
        bundle: the model that made the results.
        decisive: what decides the pixels, for the headers of DICOM objects (`model.list_decisive` and the format).
    """

    def __init__(self, settings: InferSettings, bundle: Bundle, decisive: Mapping[str, Any]) -> None:
        self._settings, self._bundle, self._decisive = settings, bundle, decisive

    def write(self, ready: Ready, passes: NDArray[np.float32], seconds: float) -> FileEntry:
        """Finish one file's result and write it. An output that is no image fails its file.

        Args:
            ready: the file as it was read.
            passes: the model's outputs for it, [P, S, S], float32, in [-1, 1].
            seconds: time that the model took for it.

        Returns:
            The file's entry in the report.
        """
        started, spent = time.monotonic(), ready.seconds + seconds
        settings, path = self._settings, self._settings.output / ready.output
        try:
            finished = finish(ready.prepared, passes, mirror=bool(settings.mirror), detail=settings.detail)
            maps = self._write_maps(ready, finished)
            path.parent.mkdir(parents=True, exist_ok=True)
            warnings = (*ready.warnings, *finished.warnings)
            derivation = describe_derivation(self._bundle, settings, self._decisive, ready.prepared, warnings)
            picture, kind = finished.soft_tissue, settings.format
            with staged(path) as place:
                formats.write(place, picture, like=ready.radiograph, kind=kind, derivation=derivation)
                digest = file_sha256(place)
            self._flush(path, maps, ready)
            for warning in finished.warnings:
                logger.warning("%s: %s", ready.task.input, warning)
        except Exception as error:
            reason = describe_error(error, "written")
            return make_not_done(ready.task, "failed", reason, started - spent, ready.input_sha256)
        return FileEntry(
            str(ready.task.input),
            str(ready.output),
            "ok",
            seconds=round(spent + time.monotonic() - started, 4),
            sha256=digest,
            input_sha256=ready.input_sha256,
            path_sha256=digest_path(ready.task.input),
            maps=maps,
            retention=finished.retention.to_report() if finished.retention else None,
            view=ready.prepared.view.to_report(ready.radiograph.cxr.shape),
            warnings=list(warnings),
        )

    def _flush(self, path: Path, maps: Iterable[str], ready: Ready) -> None:
        """Wait until a result and its maps are on the disk. The report names them after that.

        Raises:
            OSError: the disk has an error.
        """
        written = [path, *(locate_map(self._settings.output, kind, ready.output) for kind in maps)]
        for one in (*written, *{file.parent for file in written}):
            flush_to_disk(one)

    def _write_maps(self, ready: Ready, finished: Finished) -> dict[str, str]:
        """Write the samples' standard deviation and the probe's picture. Return the SHA-256 of each by its folder."""
        written = {}
        if finished.uncertainty is not None:
            path = self._make_map_path(UNCERTAINTY, ready)
            with staged(path) as place:
                write_png(place, finished.uncertainty, DEVIATION_BITS)
                written[UNCERTAINTY] = file_sha256(place)
        if self._settings.probe:
            path = self._make_map_path(RETENTION, ready)
            with staged(path) as place:
                write_atomically(place, draw_retention(ready.radiograph.cxr, finished.retention))
                written[RETENTION] = file_sha256(place)
        return written

    def _make_map_path(self, kind: str, ready: Ready) -> Path:
        path = locate_map(self._settings.output, kind, ready.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_preview(self, files: Iterable[FileEntry]) -> None:
        """Write preview.png from the files in the output folder, results of an earlier run included."""
        shown = [entry for entry in files if entry.output is not None]
        preview = Preview()
        for entry in shown[:ROWS]:
            try:
                pictures = read_pictures(self._settings.output, entry)
            except BsdiffError as error:  # changed since it was done
                logger.warning("%s is not in the preview: %s", entry.input, error)
                continue
            preview.add(str(entry.output), pictures.cxr, pictures.soft_tissue, pictures.deviation)
        try:
            written = preview.write(self._settings.output)
        except OSError as error:
            logger.warning("%s cannot be written (%s). The results are complete.", PREVIEW, error.strerror)
            return
        if written is not None:
            logger.info("wrote %s with %d of %d images", written, min(len(shown), ROWS), len(shown))
