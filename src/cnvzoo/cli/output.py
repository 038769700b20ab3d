"""What commands print: aligned columns for people, JSON for other programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

_NARROWEST = 24  # characters of a column of sentences


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: its heading.
        is_number: whether its cells are aligned to the right.
        is_prose: whether its cells may be broken between words where the terminal is narrow; all others stay whole.
    """

    title: str
    is_number: bool = False
    is_prose: bool = False


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[str]], *, header: bool = True) -> None:
    """Print aligned columns, without lines between them.

    No name and no number is ever cut: a terminal that is too narrow for the columns wraps the lines itself. Piped
    output has one line for each row.
    """
    rows = list(rows)
    table = Table(box=None, pad_edge=False, show_header=header)
    for number, column in enumerate(columns):
        cells = [row[number] for row in rows] + ([column.title] if header else [])
        width = max(map(cell_len, cells), default=0)
        least = min(width, _NARROWEST) if column.is_prose else width
        justify = "right" if column.is_number else "left"
        table.add_column(column.title, no_wrap=not column.is_prose, min_width=least, justify=justify)
    for row in rows:
        table.add_row(*row)
    # not by the environment: FORCE_COLOR would make lines of a pipe as narrow as a terminal
    is_terminal = sys.stdout is not None and sys.stdout.isatty()  # None: closed
    console = Console(highlight=False, markup=False, emoji=False, force_terminal=is_terminal)
    whole = console.measure(table, options=console.options.update(max_width=1 << 20))
    if console.is_terminal:
        table.collapse_padding = whole.maximum > console.width
        least = console.measure(table, options=console.options.update(max_width=1 << 20)).minimum
        console.width = max(console.width, least)
        console.print(table)
        return
    console.width = whole.maximum
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        typer.echo(line.rstrip())


def print_json(value: Any) -> None:
    """Print a value as indented JSON; its keys are on the page docs/command-line.md and stay."""
    typer.echo(json.dumps(value, indent=2))  # in ASCII, which every encoding of the output has
