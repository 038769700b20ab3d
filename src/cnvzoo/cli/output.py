"""What commands print: tables for people, and lines for other programs."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def print_table(table: Table) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:  # other programs read piped output: wide enough that no line is wrapped
        console = Console(highlight=False, width=160)
    console.print(table)
