"""What this installation can do: the command `info`."""

from __future__ import annotations

from bsdiff_rt import __version__
from bsdiff_rt.bundle import open_bundle, shipped_bundles
from bsdiff_rt.config import RUNNERS, step_count
from bsdiff_rt.engines.manifest import check_files, check_machine, read_engine
from bsdiff_rt.engines.select import ENGINE_RUNNERS, cache_folder, engines_in_cache
from bsdiff_rt.errors import BundleError, EngineError
from bsdiff_rt.folder.report import package_versions
from bsdiff_rt.runners.registry import resolve_device, unavailable


def describe() -> dict[str, dict[str, str]]:
    """Sections of name: value lines, ready to print or to dump as JSON."""
    import torch

    versions = {"bsdiff-rt": __version__} | package_versions()
    devices = {"cpu": f"{torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    device = resolve_device("auto")
    runners: dict[str, str] = {}
    for runner in RUNNERS:
        why = unavailable(runner, device)
        needs = ", with an engine built for it" if runner in ENGINE_RUNNERS else ""
        runners[runner] = f"not usable: {why}" if why else f"usable{needs}"
    bundles = {}
    for name in shipped_bundles():
        try:
            bundle = open_bundle(name)
        except BundleError as error:
            bundles[name] = f"refused: {error}"
            continue
        manifest = bundle.manifest
        bundles[name] = (
            f"{manifest.preprocessing.size} px, {manifest.schedule.objective}, default {manifest.sampler.name} "
            f"{step_count(manifest.sampler.steps)}, sha256 {bundle.sha256[:16]}, {manifest.notice}"
        )
    return {
        "versions": versions,
        "devices": devices,
        f"runners on {device}": runners,
        "bundles": bundles,
        "engines": engines(),
    }


def engines() -> dict[str, str]:
    """Every engine in the cache, newest first: what it is, and whether it can be used here or the reason why not."""
    import torch

    found = {"cache": str(cache_folder())}
    for folder in engines_in_cache():
        try:
            engine = read_engine(folder)
            # An engine for a processor can be used beside any GPU; of several GPUs of one kind any will do.
            on_cpu = engine.manifest.multiprocessors == 0
            check_machine(engine, torch.device("cpu") if on_cpu else resolve_device("auto"))
            check_files(engine)
        except EngineError as error:
            found[folder.name] = f"not usable: {error}"
            continue
        manifest, parity = engine.manifest, engine.manifest.parity
        found[folder.name] = (
            f"usable: {manifest.runner} {manifest.precision}, batch {manifest.batch_min} to {manifest.batch_max}, "
            f"bundle {manifest.bundle['name']} {manifest.bundle['sha256'][:16]}, on {manifest.device}, "
            f"{parity.psnr_db:.1f} dB against {parity.reference}, {manifest.speed}, built {manifest.built}"
        )
    return found
