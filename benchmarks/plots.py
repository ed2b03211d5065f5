"""Pictures of recorded benchmarks: latency by runner, images per second by batch size, roofline.

    python -m benchmarks.plots benchmarks/results/bench-paper.json -o bench.png

Reads what `bsdiff-rt bench --json-file`, `python -m benchmarks.peers --json` and `python -m benchmarks.gpu_suite`
write.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bsdiff_rt.bench.plot import draw
from bsdiff_rt.errors import SettingsError, run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def picture(
    source: Annotated[Path, typer.Argument(help="JSON file of a benchmark.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture: .png, .pdf or .svg.")],
    part: Annotated[str, typer.Option(help="Of a gpu_suite file: steps or peers.")] = "steps",
) -> None:
    """Draw the rows of a recorded benchmark."""
    draw(read(source, part), output)


def read(source: Path, part: str) -> dict[str, Any]:
    """A benchmark's document; of a gpu_suite's, whose parts measure some runners twice, the rows of one part.

    Raises:
        SettingsError: not a benchmark's JSON file.
    """
    try:
        found = json.loads(source.read_text())
        rows = [row for row in found["rows"] if row.get("part", part) == part]
        return {"matmul_tflops": found["matmul_tflops"]} | found | {"rows": rows}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"{source}: not the JSON file of a benchmark ({type(error).__name__})") from error


def main() -> None:
    """Entry point: our errors become one line and their exit code."""
    run_command(app)


if __name__ == "__main__":
    main()
