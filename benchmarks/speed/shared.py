"""What train.py and infer.py share: options, the machine, tables and plots, and the sections of README.md."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cnvzoo.errors import CnvzooError, in_a_line
from cnvzoo.files import FileError, replacing, write_text
from cnvzoo.training.device import describe_device, training_dtype

HERE = Path(__file__).resolve().parent
GREY, BLUE, RED = "#b8c0cc", "#7a8ba6", "#d1495b"
_SIZES = {"cpu": 2048, "cuda": 8192}  # rows and columns of the matrices
_WIDTH = 160  # characters, of a table that goes to a file or another program


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser that prints the description as it is."""
    return argparse.ArgumentParser(
        prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_shared(parser: argparse.ArgumentParser, *, turns: int, seconds: float, of: str) -> None:
    """Add --turns and --seconds with these defaults, --json, --keep and --data-root; `of`: what takes turns."""
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
            raise argparse.ArgumentTypeError(f"{text}: must be a {'whole' if kind is int else 'finite'} number above 0")
        return value

    convert.__name__ = kind.__name__  # what argparse calls the type in its messages
    return convert


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments; exits before anything is measured if what --json or --keep ask for could not be written."""
    arguments = parser.parse_args(argv)
    if arguments.keep and importlib.util.find_spec("matplotlib") is None:
        parser.error("--keep draws with matplotlib, which is not installed: install it, or give --json instead")
    for option, path in (("--json", arguments.json), ("--keep", HERE / "README.md" if arguments.keep else None)):
        try:
            if path is not None:
                _check_writable(path)
        except FileError as error:
            parser.error(f"{option} {error}")
    return arguments


def _check_writable(path: Path) -> None:
    """Raise FileError if a file cannot be written; the one that is there is left as it is."""

    class _Enough(Exception):
        pass

    with suppress(_Enough), replacing(path):
        raise _Enough


@dataclass(frozen=True)
class Report:
    """How figures are shown: on the terminal, as a section of README.md, and as a plot written to a path."""

    print_table: Callable[[Console, dict[str, Any]], None]
    section: Callable[[dict[str, Any]], str]
    plot: Callable[[dict[str, Any], Path], None]


def deliver(arguments: argparse.Namespace, name: str, report: Report, result: dict[str, Any]) -> None:
    """Write the files that --json and --keep ask for, and print the figures.

    Args:
        arguments: with `json` and `keep`.
        name: name of the files of this folder, "train" or "infer".
        report: how the figures are printed, written and plotted.
        result: the figures.
    """
    text = json.dumps(result, indent=1) + "\n"
    if arguments.json:
        write_text(arguments.json, text)
    if arguments.keep:
        write_text(HERE / f"{name}.json", text)
        replace_section(HERE / "README.md", report.section(result))
        report.plot(result, HERE / f"{name}.svg")
    report.print_table(Console(width=None if sys.stdout.isatty() else _WIDTH), result)


def kept(name: str) -> dict[str, Any]:
    """The figures in `<name>.json` of this folder. Raises CnvzooError if it is missing or damaged."""
    path = HERE / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CnvzooError(
            f"{path}: {in_a_line(error)}: restore it from version control, or measure all again"
        ) from None


def replace_section(path: Path, section: str) -> None:
    """Replace the section of a Markdown file that has the same heading (`## ...`) as `section`.

    Raises:
        CnvzooError: there is no such section, and nothing was written.
    """
    parts = re.split(r"^(?=## )", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    heading = section.partition("\n")[0]
    if heading not in (part.partition("\n")[0] for part in parts):
        raise CnvzooError(f"{path}: no heading {heading!r}: restore it from version control")
    parts = [section + "\n" if part.partition("\n")[0] == heading else part for part in parts]
    write_text(path, "".join(parts).rstrip("\n") + "\n")


def difference(key: str, measured: Mapping[str, Any], now: Any) -> str:
    """How a fact that was noted with the figures differs from today's."""
    if key not in measured:
        return f"{key} is not stated"
    return f"{key} is {_short(now)}, and {_short(measured[key])} was measured"


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Kind, name, threads and instruction set of the device as in a run record, and the version of torch."""
    return {**describe_device(device), "torch": torch.__version__}


def machine_in_words(facts: dict[str, Any]) -> str:
    """The result of `describe_machine` as text, without the version of torch: "AMD EPYC, 2 threads, AVX512"."""
    cpu = f", {facts['threads']} threads, {facts['capability']}" if facts["kind"] == "cpu" else ""
    return f"{facts['name']}{cpu}"


def versions(*packages: str) -> dict[str, str]:
    """The versions of those of the packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def matmul_rate(device: torch.device, repeats: int = 15) -> float:
    """Operations a second of the product of two large square matrices in the dtype of training, median of `repeats`."""
    size, dtype = _SIZES[device.type], training_dtype(device)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats + 3):
        began = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds[3:])


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
