"""What this installation can do: the command `info`."""

from __future__ import annotations

from bsdiff_rt import __version__
from bsdiff_rt.bundle import open_bundle, shipped_bundles
from bsdiff_rt.config import RUNNERS
from bsdiff_rt.errors import BundleError
from bsdiff_rt.report import package_versions
from bsdiff_rt.runners import resolve_device, unavailable


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
        runners[runner] = f"not usable: {why}" if why else "usable"
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
            f"{manifest.sampler.steps} steps, sha256 {bundle.sha256[:16]}, {manifest.notice}"
        )
    return {
        "versions": versions,
        "devices": devices,
        f"runners on {device}": runners,
        "bundles": bundles,
        "engines": {"cache": "none can be built by this version"},
    }
