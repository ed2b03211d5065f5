"""Report what this installation can do: the command `info`."""

from __future__ import annotations

from bsdiff_rt import __version__
from bsdiff_rt.bundle import Manifest, list_bundles, open_bundle
from bsdiff_rt.config import step_count
from bsdiff_rt.engines.cache import list_engines, locate_cache
from bsdiff_rt.engines.manifest import Engine, check_files, check_machine, read_engine
from bsdiff_rt.errors import BundleError, EngineError
from bsdiff_rt.folder.report import list_package_versions
from bsdiff_rt.runners.devices import count_threads, resolve_device
from bsdiff_rt.runners.registry import RUNNERS


def describe() -> dict[str, dict[str, str]]:
    """Return sections of names with values, ready to be printed or written as JSON."""
    device = resolve_device("auto")
    return {
        "versions": {"bsdiff-rt": __version__} | list_package_versions(),
        "devices": describe_devices(),
        f"runners on {device}": describe_runners(),
        "bundles": describe_bundles(),
        "engines": describe_engines(),
    }


def describe_devices() -> dict[str, str]:
    """Return every device with its size."""
    import torch

    threads = count_threads()
    found = {"cpu": f"{threads} thread{'s' if threads > 1 else ''}"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return found


def describe_runners() -> dict[str, str]:
    """Return every runner, and whether it can be used on the default device or the reason why not."""
    device = resolve_device("auto")
    found = {}
    for name, entry in RUNNERS.items():
        problem = entry.find_problem(device)
        usable = "usable, with an engine built for it" if entry.needs_engine else "usable"
        found[name] = f"not usable: {problem}" if problem else usable
        if problem and entry.capabilities and entry.find_missing_package() is None:
            found[name] += f". It can build engines for compute capability {', '.join(entry.capabilities)}"
    return found


def describe_bundles() -> dict[str, str]:
    """Return every bundle of the package: its model, its licence and its training data."""
    found = {}
    for name in list_bundles():
        try:
            bundle = open_bundle(name)
        except BundleError as error:
            found[name] = f"refused: {error}"
            continue
        manifest = bundle.manifest
        sampler = f"{manifest.sampler.name} {step_count(manifest.sampler.steps)}"
        found[name] = (
            f"{manifest.preprocessing.size} px, predicts {manifest.schedule.objective}, sampler {sampler}, "
            f"licence {manifest.licence}, training data: {describe_training_data(manifest)}, "
            f"sha256 {bundle.sha256[:16]}. {manifest.notice}"
        )
    return found


def describe_training_data(manifest: Manifest) -> str:
    """Return what a bundle says of its training data."""
    data = manifest.training.get("data")
    return data if isinstance(data, str) and data else "unstated"


def describe_engines() -> dict[str, str]:
    """Return every engine in the cache, newest first, and whether it can be used here or the reason why not."""
    import torch

    found = {"cache": str(locate_cache())}
    for folder in list_engines():
        try:
            engine = read_engine(folder)
            # An engine for a processor can be used beside any GPU. Of several equal GPUs any will do.
            on_cpu = engine.manifest.multiprocessors == 0 and engine.manifest.parity is not None
            check_machine(engine, torch.device("cpu") if on_cpu else resolve_device("auto"))
            check_files(engine)
            _check_bundle(engine)
        except EngineError as error:
            found[folder.name] = f"not usable: {error}"
            continue
        found[folder.name] = f"usable: {_describe_engine(engine)}"
    return found


def _check_bundle(engine: Engine) -> None:
    """Raise EngineError if an engine was built for a shipped bundle that has changed since."""
    built_for = engine.manifest.bundle
    if built_for["name"] in list_bundles() and open_bundle(built_for["name"]).sha256 != built_for["sha256"]:
        raise EngineError(f"built for an earlier bundle {built_for['name']} ({built_for['sha256'][:16]})")


def _describe_engine(engine: Engine) -> str:
    manifest, parity = engine.manifest, engine.manifest.parity
    if parity is None or manifest.speed is None:
        return (
            f"{manifest.runner} {manifest.precision}, batch {manifest.batch_min} to {manifest.batch_max}, "
            f"bundle {manifest.bundle['name']} {manifest.bundle['sha256'][:16]}, for compute capability "
            f"{manifest.compute_capability}, not compared with eager yet, built {manifest.built}"
        )
    return (
        f"{manifest.runner} {manifest.precision}, batch {manifest.batch_min} to {manifest.batch_max}, "
        f"bundle {manifest.bundle['name']} {manifest.bundle['sha256'][:16]}, on {manifest.device}, "
        f"{parity.psnr_db:.1f} dB against {parity.reference}, {manifest.speed}, built {manifest.built}"
    )
