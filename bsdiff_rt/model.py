"""The public API: a loaded model that takes the bones out of X-rays, in memory or file to file.

    model = bsdiff_rt.open_model("demo")
    result = model.suppress(cxr)
    model.suppress_file("in.dcm", "out.dcm")

`bsdiff-rt infer` runs the same model on folders (folder/pipeline.py), so both make the same pictures.
"""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, get_args, overload

import numpy as np
from numpy.typing import NDArray

from bsdiff_rt import __version__, formats
from bsdiff_rt.bundle import Bundle, Manifest, open_bundle
from bsdiff_rt.config import (
    FEW_STEP_SAMPLERS,
    NO_ENHANCER,
    SAMPLERS,
    DetailName,
    FormatName,
    ModelSettings,
    Precision,
    step_count,
)
from bsdiff_rt.engines.select import AUTO, Choice, RunnerRequest, load_first
from bsdiff_rt.errors import InputRefused, SettingsError
from bsdiff_rt.files import digest_json
from bsdiff_rt.formats.base import Derivation
from bsdiff_rt.formats.radiograph import Radiograph, check_picture, from_pixels, hash_grey
from bsdiff_rt.imaging.one_image import Finished, Prepared, count_passes, finish, list_passes, prepare
from bsdiff_rt.imaging.probe import Retention
from bsdiff_rt.imaging.view import make_whole_view
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.devices import resolve_device, set_threads
from bsdiff_rt.sampling.batching import Suppressor, Taken, choose_batch
from bsdiff_rt.sampling.deep_cache import check_cache, list_denoisers
from bsdiff_rt.sampling.noise import ImageNoise
from bsdiff_rt.sampling.schedule import Table, sampler_table

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", *get_args(Precision))
S = TypeVar("S", bound=ModelSettings)
Pixels = NDArray[Any]

# What decides the pixels of a result, besides the bundle, the runner and its precision. Batch, device and threads do
# not: noise belongs to the image.
DECISIVE = ("sampler", "steps", "seed", "samples", "enhance", "mirror", "detail", "raw_view")


@dataclass(frozen=True)
class Result:
    """What the model made of one X-ray.

    Attributes:
        soft_tissue: the X-ray without its bones, [H, W], float32, in [0, 1], the matrix of the X-ray.
        bone: what was taken away, [H, W], float32, in [0, 1]; 0 where nothing was.
        uncertainty: standard deviation of the samples, [H, W], float32, in [0, 1]; None unless samples > 1.
        retention: how much of a small nodule would survive at each place; None unless probe=True.
        warnings: what the reader had to assume, and what is wrong with picture or result, one sentence each.
    """

    soft_tissue: NDArray[np.float32] = field(repr=False)
    bone: NDArray[np.float32] = field(repr=False)
    uncertainty: NDArray[np.float32] | None = field(repr=False)
    retention: Retention | None = None
    warnings: tuple[str, ...] = ()


def open_model(
    bundle: str | Path = "demo", *, runner: str | Path = "auto", device: str = "auto", **options: Any
) -> Model:
    """Load a model.

    Args:
        bundle: name of a shipped bundle, or a bundle's folder.
        runner: auto, eager, onnxruntime, openvino, aoti, tensorrt, tensorrt-rtx, or the folder of a built engine.
        device: auto, cpu, cuda or cuda:N.
        **options: further fields of `bsdiff_rt.config.ModelSettings`, which are the options of `bsdiff-rt infer`:
            precision, batch, threads, sampler, steps, cache_every, seed, samples, enhance, mirror, detail, raw_view,
            probe.

    Returns:
        The model, ready to run. Use it as a context manager, or close it.

    Raises:
        SettingsError: an option is unknown or cannot be used.
        BundleError: the bundle is incomplete or altered.
        EngineError: the runner cannot be used here.
    """
    known = ModelSettings.__dataclass_fields__
    if unknown := set(options) - set(known):
        raise SettingsError(f"unknown option {min(unknown)!r}; use one of {', '.join(known)}")
    _check_options(options)
    settings = ModelSettings(bundle=str(bundle), runner=str(runner), device=device, **options)
    opened = open_bundle(settings.bundle)
    settings = resolve_settings(settings, opened.manifest)
    choice, loaded = load_runner_for(opened, settings)
    try:
        return Model(opened, loaded, settings, choice)
    except BaseException:
        loaded.close()
        raise


def _check_options(options: dict[str, Any]) -> None:
    """Raise SettingsError if an option has another type or value than the command line would let through."""
    for name in ("batch", "threads", "steps", "cache_every", "seed", "samples"):
        value = options.get(name, 1)
        if value is None and name in ("batch", "threads", "steps"):
            continue
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise SettingsError(f"{value!r} is not a whole number", setting=name)
        if value < 1 and name != "seed":
            raise SettingsError(f"{value} is out of range. Give 1 or more.", setting=name)
    for name, allowed in (("sampler", SAMPLERS), ("detail", get_args(DetailName)), ("precision", PRECISIONS)):
        value = options.get(name)
        if value is not None and value not in allowed:
            raise SettingsError(f"{value!r} is not one of {', '.join(allowed)}", setting=name)


class Model:
    """A bundle loaded into a runner; a context manager. One thread at a time may use it.

    Args:
        bundle: an opened bundle.
        runner: both networks of that bundle. It is closed with the model.
        settings: the model's settings. What is None is taken from the bundle.
        choice: how the runner was chosen; None if the caller made it.

    Attributes:
        bundle: the bundle.
        settings: the resolved settings.
        table: the sampler's coefficients.
        batch: passes that the runner is given at once.

    Raises:
        SettingsError: steps, seed or batch are out of range.
        EngineError: the runner cannot reuse deep features, as the settings ask for.
    """

    def __init__(self, bundle: Bundle, runner: Runner, settings: ModelSettings, choice: Choice | None = None) -> None:
        self.bundle = bundle
        self.settings = resolve_settings(settings, bundle.manifest)
        self.table = make_table(self.settings, bundle.manifest)
        self.engine_sha256 = choice.engine.sha256 if choice is not None and choice.engine else None
        self.batch = resolve_batch(self.settings.batch, runner)
        self._runner = runner
        self._closed = False
        list_denoisers(runner, 1, self.settings.cache_every)  # refuses a runner that cannot reuse deep features
        self._suppressor = Suppressor(
            runner,
            self.table,
            enhance=bool(self.settings.enhance),
            batch=self.batch,
            cache_every=self.settings.cache_every,
            step_down=settings.runner == AUTO,  # a runner that was named is used as it is, or the run stops
        )

    def __enter__(self) -> Self:
        self._suppressor.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._closed = True
        self._suppressor.__exit__(kind, error, _)
        self._runner.close()

    def close(self) -> None:
        """Release the runner, its memory and its threads. The model cannot be used afterwards."""
        self.__exit__(None, None, None)

    @property
    def passes_per_image(self) -> int:
        """Return how often one X-ray goes through the model."""
        return count_passes(self.settings.samples, mirror=bool(self.settings.mirror), probe=self.settings.probe)

    @property
    def smallest_batch(self) -> int:
        """Return the smallest number of passes that the runner takes. Fewer are filled up."""
        return self._suppressor.smallest

    @property
    def busy_s(self) -> float:
        """Return the seconds that the model worked for the results taken so far."""
        return self._suppressor.busy_s

    @overload
    def suppress(self, cxr: Sequence[Pixels]) -> list[Result]: ...
    @overload
    def suppress(self, cxr: Pixels) -> Result: ...
    def suppress(self, cxr: Pixels | Sequence[Pixels]) -> Result | list[Result]:
        """Remove the bones from one X-ray or from several.

        Args:
            cxr: an array [H, W] or a list of such arrays, of any sizes. Air is dark. uint8 and uint16 are pixel values,
                scaled as in image files: 16-bit values by the smallest depth that holds them. Floats are grey levels
                in [0, 1].

        Returns:
            One result, or a list of them in the order given.

        Raises:
            InputRefused: an array that cannot be an X-ray: its dtype, shape, range or content.
            InputFailed: the model returned no image.
            RuntimeError: the model was closed, or the backend failed: out of memory, say.
        """
        if isinstance(cxr, Sequence) and not isinstance(cxr, str | bytes):
            return self._suppress([from_array(one) for one in cxr])
        return self._suppress([from_array(cxr)])[0]

    def suppress_file(
        self, source: str | Path, target: str | Path, *, format: FormatName = "auto", any_view: bool = False
    ) -> Result:
        """Remove the bones from an X-ray in a file, and write the result as `bsdiff-rt infer` does.

        Args:
            source: an X-ray in any format that `infer` reads.
            target: the file to write. Its folder must exist. An existing file is replaced.
            format: as in `infer`; auto writes DICOM for DICOM and PNG for other files.
            any_view: accept lateral views and other body parts, too.

        Raises:
            InputRefused: the file is not a frontal chest X-ray, or cannot have a result of this format.
            InputFailed: the file is damaged, or the model returned no image.
            SettingsError: source and target are the same file, or the target is named as a file of another format.
            OSError: the target cannot be written.
        """
        source, target = Path(source), Path(target)
        if target.exists() and target.samefile(source):
            raise SettingsError(f"{target}: the result would replace the X-ray; choose another file")
        if not target.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "no such folder", str(target.parent))
        (radiograph,) = formats.read_together([source], any_view=any_view)
        formats.check_name(target, format, radiograph)
        formats.check_kind(format, radiograph)
        prepared = self.prepare(radiograph.cxr)
        finished = self._finish_all([(prepared, radiograph.pixel_digest)])[0]
        result = make_result(radiograph, prepared, finished)
        derivation = self.describe(prepared, result.warnings)
        formats.write(target, finished.soft_tissue, like=radiograph, kind=format, derivation=derivation)
        return result

    def prepare(self, cxr: NDArray[np.float32]) -> Prepared:
        """Make an X-ray, [H, W], float32, in [0, 1], into the model's input."""
        settings = self.settings
        return prepare(cxr, self.bundle.manifest.preprocessing, raw_view=settings.raw_view, probe=settings.probe)

    def order(self, images: Sequence[tuple[Prepared, bytes]]) -> Iterator[Callable[[], Taken]]:
        """Give every pass of some X-rays to the model, `batch` at a time.

        Args:
            images: each prepared X-ray with the digest of its pixels, which keys its noise.

        Yields:
            For each pass, in order, a function that waits for its output. Every function must be called once. At most
            a few batches may be waiting (`batching.BATCHES_IN_FLIGHT`).

        Raises:
            RuntimeError: the backend failed: out of memory, say.
        """
        passes = [
            (cxr_net, ImageNoise(self.settings.seed + sample, digest))
            for prepared, digest in images
            for cxr_net, sample in list_passes(prepared, self.settings.samples, mirror=bool(self.settings.mirror))
        ]
        for first in range(0, len(passes), self.batch):
            part = passes[first : first + self.batch]
            host = self._suppressor.submit([cxr_net for cxr_net, _ in part], [noise for _, noise in part])
            for place in range(len(part)):  # before anything waits for them: they free the memory for the next part
                yield partial(host.take, place)

    def finish(self, prepared: Prepared, passes: NDArray[np.float32]) -> Finished:
        """Make the model's outputs for one X-ray, [P, S, S], float32, in [-1, 1], into its soft-tissue image."""
        return finish(prepared, passes, mirror=bool(self.settings.mirror), detail=self.settings.detail)

    def describe(self, prepared: Prepared, warnings: tuple[str, ...] = ()) -> Derivation:
        """Describe how a result was made, for the header of a derived DICOM object; `warnings` go with it."""
        decisive = list_decisive(self.settings, self._runner.name, self._runner.precision)
        return describe_derivation(self.bundle, self.settings, decisive, prepared, warnings)

    def _suppress(self, radiographs: Sequence[Radiograph]) -> list[Result]:
        if self._closed:
            raise RuntimeError("the model was closed. Open it again.")
        prepared = [self.prepare(radiograph.cxr) for radiograph in radiographs]
        images = [(one, radiograph.pixel_digest) for one, radiograph in zip(prepared, radiographs, strict=True)]
        return list(map(make_result, radiographs, prepared, self._finish_all(images)))

    def _finish_all(self, images: Sequence[tuple[Prepared, bytes]]) -> list[Finished]:
        outputs = np.array([take()[0] for take in self.order(images)])
        count = self.passes_per_image
        return [
            self.finish(prepared, outputs[index * count : (index + 1) * count])
            for index, (prepared, _) in enumerate(images)
        ]


def from_array(pixels: Pixels) -> Radiograph:
    """Return an array as an X-ray; see `Model.suppress`.

    Raises:
        InputRefused: its dtype, shape, range or content cannot be an X-ray's.
    """
    kind = type(pixels).__name__
    pixels = np.asarray(pixels)
    if pixels.ndim == 0:
        raise InputRefused(f"an X-ray is an array [H, W], not {kind}. For a file, use suppress_file.")
    if pixels.ndim != 2:
        raise InputRefused(f"an X-ray is an array [H, W]; this one has shape {pixels.shape}")
    if pixels.dtype in (np.uint8, np.uint16):
        return from_pixels(pixels)
    if not np.issubdtype(pixels.dtype, np.floating):
        raise InputRefused(f"an X-ray is uint8, uint16 or float, not {pixels.dtype}; convert it")
    cxr = np.ascontiguousarray(pixels, dtype=np.float32)
    low, high = (float(cxr.min()), float(cxr.max())) if cxr.size else (0.0, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputRefused("a float X-ray holds NaN or infinity. Replace them.")
    if not (low >= 0 and high <= 1):
        raise InputRefused(f"grey levels of a float X-ray lie in [0, 1]; these lie in [{low:g}, {high:g}]. Scale them")
    check_picture(cxr)
    return Radiograph(cxr, 16, hash_grey(cxr))


def make_result(radiograph: Radiograph, prepared: Prepared, finished: Finished) -> Result:
    """Return what the public API returns for one X-ray."""
    bone = np.clip(radiograph.cxr - finished.soft_tissue, 0, 1, dtype=np.float32)
    warnings = (*radiograph.warnings, *prepared.warnings, *finished.warnings)
    return Result(finished.soft_tissue, bone, finished.uncertainty, finished.retention, warnings)


def resolve_settings(settings: S, manifest: Manifest) -> S:
    """Return settings in which the bundle's choice stands for everything that was None.

    Raises:
        SettingsError: stage 2 is asked for, and the bundle has none.
    """
    if settings.enhance and manifest.enhancer == NO_ENHANCER:
        raise SettingsError(f"bundle {manifest.name} has no stage 2", setting="enhance")
    sampler = settings.sampler or manifest.sampler.name
    own_steps = manifest.sampler.steps
    if sampler != manifest.sampler.name and not {sampler, manifest.sampler.name} <= FEW_STEP_SAMPLERS:
        own_steps = manifest.schedule.train_steps  # the bundle's number was chosen for another kind of sampler
        if settings.steps is None:
            logger.warning("sampler %s runs all %d steps. Set steps for fewer.", sampler, own_steps)
    return replace(
        settings,
        sampler=sampler,
        steps=own_steps if settings.steps is None else settings.steps,
        enhance=manifest.enhance if settings.enhance is None else settings.enhance,
        mirror=manifest.mirror if settings.mirror is None else settings.mirror,
    )


def make_table(settings: ModelSettings, manifest: Manifest) -> Table:
    """Return the sampler's coefficients of resolved settings, and refuse seeds out of range before any work is done.

    Raises:
        SettingsError: the number of steps or the seed is out of range, or the steps are too few to reuse deep features.
    """
    if settings.sampler is None or settings.steps is None:
        raise SettingsError("the settings are not resolved: sampler and steps are missing")
    check_cache(settings.cache_every, settings.steps)
    for seed in (settings.seed, settings.seed + settings.samples - 1):
        ImageNoise(seed, b"")
    return sampler_table(manifest.schedule, settings.sampler, settings.steps)


def request_runner(bundle: Bundle, settings: ModelSettings) -> RunnerRequest:
    """Return which runner the settings request for a bundle. Among those of `auto`, only eager reuses deep features."""
    device = resolve_device(settings.device)
    runner = "eager" if settings.runner == AUTO and settings.cache_every > 1 else settings.runner
    return RunnerRequest(bundle, runner, device, settings.precision, settings.batch)


def load_runner_for(bundle: Bundle, settings: ModelSettings) -> tuple[Choice, Runner]:
    """Choose and load the runner that settings ask for. `threads` then holds for the whole process.

    Raises:
        EngineError: it cannot be used here.
        SettingsError: the number of threads is out of range.
    """
    if settings.threads is not None:
        set_threads(settings.threads)
    return load_first(request_runner(bundle, settings))


def resolve_batch(asked: int | None, runner: Runner) -> int:
    """Return the number of passes per batch: what was asked for, else what suits the device.

    Raises:
        SettingsError: the runner takes fewer.
    """
    _, most = runner.batch_range
    if asked is not None and most is not None and asked > most:
        raise SettingsError(
            f"{asked} is more than the {runner.name} runner's {most}. Use {most}, or build an engine for more.",
            setting="batch",
        )
    return asked or choose_batch(runner)


def list_decisive(settings: ModelSettings, runner: str, precision: Precision) -> dict[str, Any]:
    """Return what decides the pixels of a result besides the bundle, for reports and the UIDs of DICOM objects."""
    cached = {"cache_every": settings.cache_every} if settings.cache_every > 1 else {}
    return {name: getattr(settings, name) for name in DECISIVE} | cached | {"runner": runner, "precision": precision}


def describe_derivation(
    bundle: Bundle,
    settings: ModelSettings,
    decisive: Mapping[str, Any],
    prepared: Prepared,
    warnings: tuple[str, ...] = (),
) -> Derivation:
    """Describe how a result was made.

    Args:
        bundle: the model.
        settings: the resolved settings.
        decisive: `list_decisive`, perhaps with the format of the result. Its digest becomes part of new UIDs. The
            format does not, because the object's class does.
        prepared: the X-ray.
        warnings: of X-ray and result.
    """
    view, size = prepared.view, bundle.manifest.preprocessing.size
    part = replace(view, gain=1.0, offset=0.0) != make_whole_view(prepared.cxr.shape)
    last = settings.seed + settings.samples - 1
    seeds = f"seed {settings.seed}"
    if settings.samples > 1:
        seeds = f"mean of {settings.samples} samples, seeds {settings.seed} to {last}"
    words = [
        f"Bone suppression by conditional diffusion (BS-Diff): sampler {settings.sampler}",
        step_count(settings.steps or 0),
        f"deep features every {settings.cache_every} steps" if settings.cache_every > 1 else "",
        seeds,
        f"stage 2 {'on' if settings.enhance else 'off'}",
        "averaged with the mirrored image" if settings.mirror else "",
        f"rows {view.top + 1}-{view.bottom} and columns {view.left + 1}-{view.right}" if part else "",
        f"{view.mark_pixels} pixels of marks kept" if view.mark_pixels else "",
        f"grey levels spread {view.gain:.3f} times for the model" if view.gain != 1 else "",
        f"model input {size} x {size} px",
        f"detail {settings.detail}",
        f"runner {decisive['runner']} {decisive['precision']}",
    ]
    return Derivation(
        description=f"{', '.join(word for word in words if word)}. Not for diagnostic use.",
        bundle_name=bundle.manifest.name,
        bundle_sha256=bundle.sha256,
        settings_digest=digest_json([bundle.identity, {key: decisive[key] for key in decisive if key != "format"}]),
        software_version=__version__,
        warnings=warnings,
    )
