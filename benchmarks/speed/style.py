"""The form of the tables and plots of this folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cnvzoo.files import replacing

HERE = Path(__file__).resolve().parent
PLAIN, OTHER, OURS = "#b8c0cc", "#7a8ba6", "#d1495b"  # colours


def without_empty(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The columns that have a text in any row, and the rows with these alone."""
    kept = [number for number in range(len(columns)) if any(cells[number] for cells in rows)]
    return [columns[number] for number in kept], [[cells[number] for number in kept] for cells in rows]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A table whose first `left` columns are aligned left, the others right."""
    ruler = ["---" if number < left else "--:" for number in range(len(columns))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ruler, *rows))


def print_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1
) -> None:
    """The same table on a terminal."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", no_wrap=number < left)
    for cells in rows:
        table.add_row(*cells)
    console.print(table)


@contextmanager
def figure(path: Path, size: tuple[float, float], *, columns: int = 1) -> Iterator[list[Any]]:
    """Axes side by side to draw on, written to `path` as SVG: the same bytes for the same drawing."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": "cnvzoo", "font.size": 9}):
        drawn, axes = plt.subplots(1, columns, figsize=size, squeeze=False)
        yield list(axes[0])
        for axis in axes[0]:
            axis.spines[["top", "right"]].set_visible(False)
        drawn.tight_layout()
        with replacing(path) as temporary:
            drawn.savefig(temporary, format="svg", metadata={"Date": None})
        plt.close(drawn)
