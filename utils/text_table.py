"""Tables for people: aligned text and Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

FIGURE = re.compile(r"[-+]?\.?\d|-$|[-+]?(nan|inf)")  # how a cell begins that reads as a number, or is none


def text_table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned columns under a ruled header; a column of figures to the right, one of text to the left.

    Args:
        header: names of the columns.
        rows: values, as many in each row; floats get four significant digits and None becomes "-".

    Returns:
        The lines, without a newline at the end.
    """
    cells = [[_cell(value) for value in row] for row in [header, *rows]]
    lines = []
    columns = [(max(map(len, column)), _is_figures(column[1:])) for column in zip(*cells, strict=True)]
    for row in cells:
        aligned = (f"{cell:{'>' if right else '<'}{width}}" for cell, (width, right) in zip(row, columns, strict=True))
        lines.append("  ".join(aligned).rstrip())
    return "\n".join([lines[0], "  ".join("-" * width for width, _ in columns), *lines[1:]])


def markdown_table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """The same cells as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_figures(cells: Sequence[str]) -> bool:
    return bool(cells) and all(FIGURE.match(cell) for cell in cells)
