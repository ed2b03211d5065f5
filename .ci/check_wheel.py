"""Install a wheel into an empty virtual environment and infer with it, away from the source tree.

By default the environment borrows the packages the wheel depends on from the Python that runs this script: that takes
seconds and shows that the wheel itself is complete. With `--full` pip installs them as for a user, which takes minutes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "phantom10000001_cxr.png"


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command, echo it, and return its standard output; stop the script if it fails."""
    print("+", *command, flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}: {done.stdout}")
    return done.stdout


def install(wheel: Path, folder: Path, full: bool, extra: str) -> Path:
    """Make an environment in `folder` with the wheel in it; return the folder of its executables."""
    venv = folder / "venv"
    run(sys.executable, "-m", "venv", *([] if full else ["--without-pip"]), venv, cwd=folder)
    executables = venv / ("Scripts" if os.name == "nt" else "bin")
    python = executables / ("python.exe" if os.name == "nt" else "python")
    if full:
        pip = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
        run(*pip, "torch", cwd=folder)
        run(*pip, f"{wheel}[{extra}]", cwd=folder)
    else:
        run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=folder)
        theirs = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
        # A path in a .pth file is searched after the environment's own packages, and its own .pth files are not read:
        # an editable install of this project there cannot be found.
        Path(theirs, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return executables


def check(executables: Path, folder: Path) -> None:
    """Run the installed program on an example X-ray, and make sure that it is the wheel's."""
    where = run(executables / "python", "-c", "import bsdiff_rt; print(bsdiff_rt.__file__)", cwd=folder).strip()
    if not Path(where).is_relative_to(folder):
        raise SystemExit(f"bsdiff_rt was imported from {where}, not from the wheel")
    program = executables / "bsdiff-rt"
    print(run(program, "--version", cwd=folder), end="")
    run(program, "infer", EXAMPLE, "--output", folder / "out", cwd=folder)
    result = folder / "out" / EXAMPLE.name
    if not result.is_file():
        raise SystemExit(f"no result at {result}")
    print(f"{result.name}: {result.stat().st_size} bytes, written by the wheel")


def main() -> None:
    """Read the arguments and run the check in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path, help="the wheel to check")
    parser.add_argument("--full", action="store_true", help="install the dependencies with pip, as a user does")
    parser.add_argument("--extra", default="cpu", help="extra to install with --full (default: cpu)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bsdiff-rt-wheel-") as name:
        folder = Path(name).resolve()
        check(install(asked.wheel.resolve(), folder, asked.full, asked.extra), folder)


if __name__ == "__main__":
    main()
