"""Write docs/api.md from the docstrings of the public names. `python .ci/write_api_page.py` after changing one."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"

HEAD = """# Python API

This page lists the public names of the package `bsdiff_rt`. Everything else may change without notice.

```python
import bsdiff_rt

with bsdiff_rt.open_model("demo", runner="auto") as model:  # keeps the model loaded
    result = model.suppress(cxr)  # array [H, W], or a list of arrays
    result.soft_tissue, result.bone, result.uncertainty  # float32 in [0, 1], same matrix
    model.suppress_file("in.dcm", "out.dcm")  # any file that `bsdiff-rt infer` reads
```

The pixels are those of `bsdiff-rt infer` with the same options. Options are keyword arguments with the names and
defaults of the command line: `bsdiff_rt.open_model("demo", sampler="ddim", steps=2, seed=1, mirror=False)`.
`--steps 50:3` is `steps=50, cache_every=3`, and `--batch auto` is `batch=None`.
A list of X-rays is faster than a loop, because the model takes several at once.

`import bsdiff_rt` loads no torch. The first use of `open_model` does, which takes a few seconds.
A model serves one thread at a time. Threads that work at the same time need a model each.

[examples/suppress_array.py](../examples/suppress_array.py) and [examples/bsdiff_rt.ipynb](../examples/bsdiff_rt.ipynb)
are complete programs. The notebook also needs matplotlib.
"""

TAIL = """## Errors

Every error that the package raises on purpose is a `bsdiff_rt.errors.BsdiffError`. Its text says what happened and what
to do. It holds no patient data.

| class | meaning | exit code of the program |
|---|---|---|
"""


def write_page() -> str:
    """Return the text of docs/api.md."""
    import bsdiff_rt
    from bsdiff_rt import errors
    from bsdiff_rt.imaging.probe import Retention

    parts = [HEAD, describe("bsdiff_rt.open_model", bsdiff_rt.open_model, "##")]
    parts.append(describe("bsdiff_rt.Model", bsdiff_rt.Model, "##", signature=False))
    parts += [
        describe(f"Model.{name}", getattr(bsdiff_rt.Model, name), "###") for name in ("suppress", "suppress_file")
    ]
    parts.append(describe("Model.close", bsdiff_rt.Model.close, "###"))
    parts.append(describe("bsdiff_rt.Result", bsdiff_rt.Result, "##", signature=False))
    parts.append(describe("Result.retention", Retention, "###", signature=False))
    rows = [
        f"| `{name}` | {first_line(kind)} | {kind.exit_code} |"
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, errors.BsdiffError) and kind is not errors.BsdiffError
    ]
    return "\n".join(parts) + "\n" + TAIL + "\n".join(rows) + "\n"


def describe(name: str, thing: object, level: str, signature: bool = True) -> str:
    """Return a section with the signature and the docstring of a public name."""
    call = f"{name}{inspect.signature(thing)}" if signature and callable(thing) else ""
    call = re.sub(r"(: |-> )'([^']+)'", r"\1\2", call)  # types are strings here
    call = re.sub(r"\((self)?(, )?", "(", call, count=1)
    return f"{level} {name}\n\n```text\n{call}{bool(call) * 2 * chr(10)}{inspect.getdoc(thing)}\n```\n"


def first_line(thing: object) -> str:
    """Return the first line of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(write_page(), encoding="utf-8")
