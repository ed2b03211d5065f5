"""Who may import whom, that only declared packages are needed, and that --help waits for nothing heavy."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT, WORKSHOPS = "bsdiff_rt", ("train", "export", "benchmarks")
TORCH_FREE = [
    "config",
    "errors",
    "urls",
    "files",
    "bundle",
    "cli",
    *(f"imaging.{name}" for name in ("view", "marks", "display", "network_input", "clahe")),
    *(f"imaging.{name}" for name in ("detail", "tone", "metrics", "lungs", "chest_guard")),
    *(f"formats.{name}" for name in ("base", "radiograph", "raster", "dicom", "dicom_in", "dicom_grey", "dicom_out")),
    *(f"sampling.{name}" for name in ("schedule", "noise")),
    *(f"folder.{name}" for name in ("search", "tasks", "reading", "ledger", "report", "preview", "html")),
    *(f"folder.{name}" for name in ("pictures", "watching", "journal", "earlier", "long_ledger", "summary")),
    *(f"folder.{name}" for name in ("progress", "evaluate")),
    *(f"node.{name}" for name in ("settings", "journal", "rules")),
]
# From the bottom up: a package or module imports only what stands before it (docs/design.md).
LAYERS = (
    *("", "errors", "config", "urls", "files", "tables", "imaging", "networks", "formats", "bundle", "runners"),
    *("sampling", "engines", "model", "folder", "node", "bench", "info", "cli"),
)
# What a package must not know, whatever stands below it.
MUST_NOT_IMPORT = {
    "imaging": {"torch", "onnxruntime", "pydicom", "bsdiff_rt.formats", "bsdiff_rt.files"},
    "sampling": {"bsdiff_rt.files", "bsdiff_rt.formats", "bsdiff_rt.folder", "bsdiff_rt.engines", "bsdiff_rt.bundle"},
    "formats": {"torch", "onnxruntime"},
}


def imports(path: Path) -> dict[str, int]:
    """Every module a file imports, at any depth in it, with the line; names imported from packages included."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name: node.lineno for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            found |= {f"{node.module}.{alias.name}": node.lineno for alias in node.names}
    return found


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def package_of(path: Path) -> str:
    """The package under bsdiff_rt/ a file is in, or the module directly under it; "" for bsdiff_rt/__init__.py."""
    return path.relative_to(ROOT / PRODUCT).with_suffix("").parts[0].replace("__init__", "")


@pytest.mark.parametrize("folder", [PRODUCT, *WORKSHOPS])
def test_directions(folder):
    forbidden = {*WORKSHOPS, "tests", "synthetic", "helpers", "conftest"} - {folder}
    assert files(folder)
    for path in files(folder):
        for module, line in imports(path).items():
            assert module.split(".")[0] not in forbidden, f"{path}:{line} imports {module}"


def test_layers_inside_the_product():
    """A package imports only itself and those before it; a new one needs its place in LAYERS.

    bsdiff_rt/__init__.py is left out: it loads the public API when that is first used.
    """
    for path in files(PRODUCT):
        package = package_of(path)
        if package == "":
            continue
        for module, line in imports(path).items():
            if module.startswith(f"{PRODUCT}."):
                other = module.split(".")[1]
                other = "" if other.startswith("__") else other
                place = f"{path}:{line} imports {module}"
                assert LAYERS.index(other) <= LAYERS.index(package), f"{place}, which stands above {package}"


@pytest.mark.parametrize("package", MUST_NOT_IMPORT)
def test_what_a_package_must_not_know(package):
    for path in files(f"{PRODUCT}/{package}"):
        for module, line in imports(path).items():
            for forbidden in MUST_NOT_IMPORT[package]:
                assert not f"{module}.".startswith(f"{forbidden}."), f"{path}:{line} imports {module}"


def test_no_circles_inside_the_product():
    graph = {}
    for path in files(PRODUCT):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = {module for module in imports(path) if module.startswith(f"{PRODUCT}.")}
    known = set(graph)
    edges = {
        name: {module if module in known else module.rpartition(".")[0] for module in found} - {name, PRODUCT}
        for name, found in graph.items()
    }
    done: set[str] = set()

    def visit(name, trail):
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for other in sorted(edges.get(name, ())):
                visit(other, [*trail, name])
            done.add(name)

    for name in sorted(edges):
        visit(name, [])


def test_the_product_needs_only_what_it_declares():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in project["dependencies"]}
    # Extras, each imported by the runner that needs it, and by the registry to find it.
    optional = {
        "onnxruntime": {"bsdiff_rt/runners/onnxruntime.py", "bsdiff_rt/runners/registry.py"},
        "openvino": {"bsdiff_rt/runners/openvino.py"},
        "tensorrt": {"bsdiff_rt/runners/tensorrt.py", "bsdiff_rt/runners/tensorrt_builder.py"},  # for types alone
        "matplotlib": {"bsdiff_rt/bench/plot.py"},
        "triton": {"bsdiff_rt/sampling/tail_kernel.py"},  # comes with torch for CUDA
        "pynetdicom": {f"bsdiff_rt/node/{name}.py" for name in ("receiving", "sending", "commitment")},
        "prometheus_client": {"bsdiff_rt/node/status.py"},
        "pyarrow": {f"bsdiff_rt/folder/{name}.py" for name in ("long_ledger", "summary", "ray_workers")},
        "ray": {"bsdiff_rt/folder/ray_workers.py"},
    }
    distributions = packages_distributions()
    for path in files(PRODUCT):
        for module, line in imports(path).items():
            package = module.split(".")[0]
            if package == PRODUCT or package in sys.stdlib_module_names:
                continue
            place = f"{path.relative_to(ROOT)}:{line} imports {module}"
            if package in optional:
                assert path.relative_to(ROOT).as_posix() in optional[package], place
                continue
            owners = {owner.lower().replace("_", "-") for owner in distributions.get(package, [])}
            assert owners & declared, f"{place}, which no declared dependency provides"


def loaded_by(code: str) -> dict[str, list[str]]:
    """Runs code that prints a JSON document as its last line, in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, cwd=ROOT
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


HEAVY = ("torch", "onnx", "onnxruntime", "numpy", "cv2", "pydicom", "safetensors", "bsdiff_rt.folder.pipeline")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([name, "--help"] for name in ("infer", "serve", "build-engine", "bench", "evaluate", "report")),
    ],
)
def test_answers_wait_for_nothing_heavy(arguments):
    code = f"""
import json, sys
from bsdiff_rt.cli import main
sys.argv = ["bsdiff-rt", *{arguments!r}]
try:
    main()
except SystemExit as end:
    assert not end.code
print()
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
"""
    assert loaded_by(code) == []


def test_torch_free_modules():
    """Reading, writing and measuring need no torch: what brings it in first is named."""
    code = f"""
import importlib, json, sys
found = {{}}
for name in {TORCH_FREE!r}:
    importlib.import_module("bsdiff_rt." + name)
    for heavy in ("torch", "onnxruntime"):
        if heavy in sys.modules and heavy not in found:
            found[heavy] = name
print(json.dumps(found))
"""
    assert loaded_by(code) == {}


def test_training_and_export_packages_stay_out_of_inference():
    """The bare install runs inference: nothing of the extras is imported on the way."""
    code = """
import json, sys
import bsdiff_rt.folder.pipeline, bsdiff_rt.info, bsdiff_rt.runners.onnxruntime
extras = ("monai", "generative", "accelerate", "onnxscript", "skimage", "tensorboard", "diffusers", "tensorrt")
print(json.dumps([name for name in extras if name in sys.modules]))
"""
    assert loaded_by(code) == []
