"""Columns of text."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[object]], indent: str = "") -> str:
    """Rows, the first of them the heading, in columns as wide as their widest cell; None is a dash."""
    cells = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join((indent + line).rstrip() for line in lines)
