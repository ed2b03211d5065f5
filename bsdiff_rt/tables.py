"""Text tables for the command line: rich's on a terminal, plain aligned lines in a file or a pipe."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec

_GAP = 2  # characters between two columns of a plain table
_PADDING = 3  # characters that rich adds to a cell: a space on both sides and a divider


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to stdout.

    No cell is ever cut or broken. On a terminal that is too narrow, the columns are spread over several tables, each
    beginning with the first column.

    Args:
        header: names of the columns.
        rows: one cell for each column. The first column is aligned left, the others right.
    """
    if not sys.stdout.isatty() or find_spec("rich") is None:  # a bare GPU machine may lack rich
        sys.stdout.write("".join(f"{line}\n" for line in format_table(header, rows)))
        return
    terminal = shutil.get_terminal_size().columns
    widths = _measure_columns(header, rows)
    for columns in split_columns(widths, terminal, _PADDING):
        needed = sum(widths[column] + _PADDING for column in columns)
        _print_with_rich(
            [header[column] for column in columns],
            [[row[column] for column in columns] for row in rows],
            max(terminal, needed),
        )


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a plain table: the first column aligned left, the others right.

    Args:
        header: names of the columns.
        rows: one cell for each column.
    """
    first, *rest = _measure_columns(header, rows)
    gap = " " * _GAP
    return [
        gap.join(
            [row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], rest, strict=True))]
        ).rstrip()
        for row in [header, *rows]
    ]


def split_columns(widths: Sequence[int], limit: int, padding: int) -> list[list[int]]:
    """Return groups of columns that fit side by side; each group begins with column 0.

    Args:
        widths: of the columns, in characters.
        limit: characters in a line. A single column may exceed it.
        padding: characters added to each column.
    """
    groups: list[list[int]] = [[0]]
    taken = widths[0] + padding
    for column, width in enumerate(widths[1:], start=1):
        if taken + width + padding > limit and len(groups[-1]) > 1:
            groups.append([0])
            taken = widths[0] + padding
        groups[-1].append(column)
        taken += width + padding
    return groups


def _measure_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]


def _print_with_rich(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> None:
    from rich.box import SIMPLE_HEAD  # here: a quarter of the time that --help may take
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for column, name in enumerate(header):
        table.add_column(name, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=width, markup=False, highlight=False).print(table)
