"""The package's metadata, the release files and the Dockerfile agree with each other and with the code."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import bsdiff_rt

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read_names(lines: list[str]) -> set[str]:
    """Return the names of the packages that requirement lines ask for."""
    return {Requirement(line).name for line in lines}


def read_dockerfile() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions and their arguments: lines joined, default build arguments filled in."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found, arguments = [], {}
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if line.strip():
            instruction, _, rest = line.strip().partition(" ")
            if instruction == "ARG":
                name, _, default = rest.partition("=")
                arguments[name] = default
            found.append((instruction, re.sub(r"\$\{(\w+)\}", lambda name: arguments[name[1]], rest)))
    return found


def find_pip_commands() -> list[list[str]]:
    """Return the arguments of each `python -m pip` in the Dockerfile."""
    commands = [part for kind, rest in read_dockerfile() if kind == "RUN" for part in rest.split("&&")]
    words = [shlex.split(command) for command in commands]
    return [line[3:] for line in words if line[:3] == ["python", "-m", "pip"]]


def test_the_plain_package_brings_no_onnxruntime():
    """`onnxruntime` and `onnxruntime-gpu` write into one folder: the user chooses one by an extra."""
    plain = read_names(PROJECT["dependencies"])
    assert not plain & {"onnxruntime", "onnxruntime-gpu"}
    extras = {name: read_names(lines) for name, lines in PROJECT["optional-dependencies"].items()}
    assert extras["cpu"] == {"onnxruntime"}
    assert extras["cuda"] == {"onnxruntime-gpu"}
    for name in extras.keys() - {"cpu", "cuda"}:
        assert not extras[name] & {"onnxruntime", "onnxruntime-gpu"}, name


def test_every_requirement_is_pinned():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    pinned = {canonicalize_name(pin.name): pin.specifier for pin in map(Requirement, lines)}
    extras = PROJECT["optional-dependencies"].values()
    for wanted in map(Requirement, [*PROJECT["dependencies"], *(line for lines in extras for line in lines)]):
        if wanted.name in ("bsdiff-rt", "tensorrt"):  # tensorrt comes from NVIDIA's own index
            continue
        (pin,) = pinned[canonicalize_name(wanted.name)]
        assert pin.operator == "=="
        assert wanted.specifier.contains(pin.version), wanted.name


def test_metadata_is_complete():
    assert PROJECT["authors"] == [{"name": "bsdiff-rt developers"}]
    for field in ("description", "keywords", "classifiers", "urls", "license", "requires-python", "readme"):
        assert PROJECT[field], field
    assert "Not for diagnostic use." in PROJECT["description"]


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == bsdiff_rt.__version__
    assert citation["preferred-citation"]["url"] == PROJECT["urls"]["Paper"]
    assert len(citation["preferred-citation"]["authors"]) == 11


def test_workflow_and_makefile_run_the_same_tools():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    assert set(workflow["jobs"]) == {"linux", "macos", "windows"}
    for job in workflow["jobs"].values():
        assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    windows = " ".join(step.get("run", "") for step in workflow["jobs"]["windows"]["steps"])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for tool in ("ruff check .", "ruff format --check .", "mypy", "--cov-fail-under=90", ".ci/check_wheel.py"):
        assert tool in windows, tool
        assert tool in makefile, tool


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what the Dockerfile copies into the image, but for the weights, which take long to pack."""
    folder = tmp_path_factory.mktemp("image")
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for name in [name for kind, rest in read_dockerfile() if kind == "COPY" for name in shlex.split(rest)[:-1]]:
        assert name not in ignored
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def run(*command: str | Path, folder: Path) -> str:
    """Run a command in `folder` and return its output; it does not see the packages on this run's PYTHONPATH."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_pip(command: list[str], folder: Path, *options: str | Path) -> None:
    """Run a pip command of the Dockerfile in `folder`, without a network."""
    offline = [*command, "--no-index", "--no-build-isolation"]
    run(sys.executable, "-m", "pip", *options, *offline, folder=folder)


def test_the_dockerfile_starts_the_program():
    instructions = dict(read_dockerfile())
    assert instructions["ENTRYPOINT"] == '["bsdiff-rt"]'
    assert instructions["USER"] != "root"


@pytest.mark.slow
def test_the_dockerfile_installs_what_the_constraints_allow(image_folder):
    """Each pip command is resolved against the packages of this environment; nothing is installed.

    A full installation takes minutes: `.ci/check_wheel.py --full` does one.
    """
    commands = find_pip_commands()
    assert len(commands) == 2
    for command in commands:
        assert command[command.index("--constraint") + 1] == "constraints.txt"
        run_pip([*command, "--dry-run"], image_folder)


@pytest.mark.slow
def test_the_dockerfile_installs_into_an_empty_environment(image_folder, tmp_path):
    """Its last pip command, run without dependencies: the files copied so far are enough to build the package."""
    *words, package = find_pip_commands()[-1]
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", folder=tmp_path)
    (executables,) = (path for path in (tmp_path / "venv").iterdir() if path.name in ("bin", "Scripts"))
    run_pip(["wheel", "--no-deps", "--wheel-dir", str(tmp_path), "."], image_folder)
    (wheel,) = tmp_path.glob("*.whl")
    assert package.startswith(".[")
    run_pip([*words, f"{wheel}{package[1:]}", "--no-deps"], image_folder, "--python", executables / "python")
    where = run(executables / "python", "-c", "import bsdiff_rt; print(bsdiff_rt.__file__)", folder=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path)
    assert (executables / "bsdiff-rt").exists() or (executables / "bsdiff-rt.exe").exists()


def test_git_leaves_the_bundles_as_they_are():
    """Line ends of Windows in manifest.json would change its hash."""
    named = "bsdiff_rt/bundles/demo/manifest.json"
    said = subprocess.run(["git", "check-attr", "text", "--", named], cwd=ROOT, capture_output=True, text=True)
    if said.returncode:
        pytest.skip("not in a git repository")
    assert said.stdout.strip() == f"{named}: text: unset"
