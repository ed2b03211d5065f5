"""What NVIDIA's Python bindings of TensorRT declare, read from the bindings themselves where TensorRT is not.

The bindings are a small wheel without the libraries that do the work. Importing them takes nine C functions from those
libraries; here they come from empty ones, compiled in a moment, whose functions answer null. That is enough to read
every class, method, keyword and enum, and enough for nothing else: no network is built and none is run.

    python tests/tensorrt_contract/bindings.py FOLDER    # writes declarations-VERSION.txt for the bindings in FOLDER
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
# What the runner may use; everything else the bindings have is cut from the declarations.
CLASSES = (
    "Builder",
    "BuilderFlag",
    "DataType",
    "ExecutionContextAllocationStrategy",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProgressMonitor",
    "ITensor",
    "ITimingCache",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "ParserError",
    "Runtime",
)


def environment(folder: Path, major: int, bindings: Path | None = None) -> dict[str, str]:
    """Environment variables with which `import tensorrt_bindings` works; compiles the empty libraries into `folder`.

    `bindings` is where an unpacked wheel lies, if it is not installed.
    """
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for library in LIBRARIES:
        name = f"lib{library}.so.{major}"
        subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, source], check=True)
    more = {"PYTHONPATH": str(bindings)} if bindings else {}
    return {**os.environ, "LD_LIBRARY_PATH": str(folder), **more}


def declarations(env: dict[str, str], folder: Path) -> str:
    """The bindings' declarations as the text of a stub file, cut to CLASSES."""
    command = [sys.executable, "-c", "from mypy.stubgen import main; main()", "--inspect-mode"]
    subprocess.run(
        [*command, "-m", "tensorrt_bindings.tensorrt", "-o", folder], check=True, env=env, capture_output=True
    )
    lines = (folder / "tensorrt_bindings/tensorrt.pyi").read_text().splitlines()
    # Some signatures of the bindings are not Python (a parameter without default after one with): left out, so that a
    # use of them is an error.
    module = ast.parse("\n".join(line for line in lines if not re.match(r" +def ", line) or _parses(line)))
    kept = [node for node in module.body if isinstance(node, ast.ClassDef) and node.name in CLASSES]
    for node in kept:
        if node.name == "INetworkDefinition":  # made by the parser, never layer by layer
            node.body = [item for item in node.body if not getattr(item, "name", "").startswith("add_")]
    text = "\n\n".join(ast.unparse(node) for node in kept)
    others = {node.name for node in module.body if isinstance(node, ast.ClassDef)} - set(CLASSES)
    named = sorted(name for name in others if re.search(rf"\b{name}\b", text))
    head = ["import collections.abc", "import types", "import typing", "from collections.abc import Callable"]
    head += ["from typing import Any, ClassVar, overload", "", "import typing_extensions", ""]
    head += ["from _typeshed import Incomplete", "", "__version__: str"]
    return "\n".join([*head, *(f"{name} = Any" for name in named), "", text, ""])


def _parses(line: str) -> bool:
    try:
        ast.parse(line.strip())
    except SyntaxError:
        return False
    return True


def version(env: dict[str, str]) -> str:
    """Of the bindings."""
    code = "import tensorrt_bindings; print(tensorrt_bindings.__version__)"
    return subprocess.run(
        [sys.executable, "-c", code], check=True, env=env, capture_output=True, text=True
    ).stdout.strip()


if __name__ == "__main__":
    found = Path(sys.argv[1]).resolve()
    (library,) = found.glob("tensorrt_bindings/tensorrt*.so")
    (major,) = {int(number) for number in re.findall(rb"libnvinfer\.so\.(\d+)", library.read_bytes())}
    with tempfile.TemporaryDirectory() as temporary:
        variables = environment(Path(temporary), major, found)
        text = declarations(variables, Path(temporary))
        Path(__file__).with_name(f"declarations-{version(variables)}.txt").write_text(text)
