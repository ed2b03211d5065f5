"""Plot a recorded benchmark: time of a step, images per second by batch size, roofline.

    python -m benchmarks.plots benchmarks/results/bench-paper.json -o bench.png

It reads the JSON files of `bsdiff-rt bench`, `python -m benchmarks.peers` and `python -m benchmarks.gpu_suite`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bsdiff_rt.bench.plot import draw_plot
from bsdiff_rt.errors import SettingsError, run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def plot(
    source: Annotated[Path, typer.Argument(help="JSON file of a benchmark.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The plot: .png, .pdf or .svg.")],
    part: Annotated[str, typer.Option(help="Part of a gpu_suite file: steps or peers.")] = "steps",
) -> None:
    """Draw the rows of a recorded benchmark."""
    draw_plot(read_document(source, part), output)


def read_document(source: Path, part: str) -> dict[str, Any]:
    """Return a benchmark's document. The parts of gpu_suite measure some runners twice: keep the rows of one part.

    Raises:
        SettingsError: the file is not a benchmark's JSON file.
    """
    try:
        found = json.loads(source.read_text())
        rows = [row for row in found["rows"] if row.get("part", part) == part]
        return {"matmul_tflops": found["matmul_tflops"]} | found | {"rows": rows}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"{source}: not the JSON file of a benchmark ({type(error).__name__})") from error


def main() -> None:
    """Run the command; an error of this project becomes one line and its exit code."""
    run_command(app)


if __name__ == "__main__":
    main()
