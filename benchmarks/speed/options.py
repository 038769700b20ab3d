"""The options that train.py and infer.py share, and what both do with their figures."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import page
import style
from rich.console import Console

from cnvzoo.files import write_text

_WIDTH = 160  # characters, of a table that goes to a file or another program


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the description as it is written."""
    return argparse.ArgumentParser(
        prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_shared(parser: argparse.ArgumentParser, *, turns: int, seconds: float, of: str) -> None:
    """Add --turns and --seconds with these defaults, --json, --keep and --data-root; `of`: who takes turns."""
    add = parser.add_argument
    add("--turns", type=positive(int), default=turns, metavar="N", help=f"turns of {of} (default: {turns})")
    add("--seconds", type=positive(float), default=seconds, metavar="S", help=f"of a turn (default: {seconds:g})")
    add("--json", type=Path, metavar="FILE", help="write the figures to this file")
    add("--keep", action="store_true", help="write the figures, the page and a plot beside this script")
    add("--data-root", type=Path, metavar="DIR", help="where datasets are cached")


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """The type of an option: int or float, above 0 and finite."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: must be above 0")
        return value

    convert.__name__ = kind.__name__  # what argparse calls the type in its messages
    return convert


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments; ends the program, before anything is measured, where --keep could not draw its plot."""
    arguments = parser.parse_args(argv)
    if arguments.keep and importlib.util.find_spec("matplotlib") is None:
        parser.error("--keep draws with matplotlib, which is not installed: install it, or give --json instead")
    return arguments


def deliver(arguments: argparse.Namespace, name: str, report: ModuleType, result: dict[str, Any]) -> None:
    """Print the figures, and write what --json and --keep ask for; the figures before page and plot.

    Args:
        arguments: with `json` and `keep`.
        name: of the files of this folder: "train" or "infer".
        report: the module with the table and the plot.
        result: the figures.
    """
    report.print_table(Console(width=None if sys.stdout.isatty() else _WIDTH), result)
    text = json.dumps(result, indent=1) + "\n"
    if arguments.json:
        write_text(arguments.json, text)
    if arguments.keep:
        write_text(style.HERE / f"{name}.json", text)
        page.update()
        report.plot(result, style.HERE / f"{name}.svg")
