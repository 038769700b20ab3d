"""The tables: as numbers, as Markdown for RESULTS.md and README.md, and on the terminal.

The pages have no date, no path and no order of a file system: two machines with the same records and the same index
write the same bytes.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev, variance

from rich.console import Console
from rich.table import Table

from cnvzoo.files import update_text
from cnvzoo.training.numerics import NUMERICS
from cnvzoo.training.recipe import PUBLISHED_SEED
from cnvzoo.training.record import RunRecord
from harness.entries import SEEDS, TABLES, Entry, table_title
from harness.records import RunStatus, Status, Survey
from harness.references import Reference


@dataclass(frozen=True)
class Row:
    """One entry of a table.

    Attributes:
        entry: what was trained.
        runs: test accuracy of each seed in percent, None without a valid record.
        reference: what it is compared with.
        recipes: how many of its recipes were ever scored on the test set.
        older: the seeds whose records are of an older version of the arithmetic, which are due again.
    """

    entry: Entry
    runs: tuple[float | None, ...]
    reference: Reference | None
    recipes: int
    older: frozenset[int] = frozenset()

    @property
    def finished(self) -> list[float]:
        return [accuracy for accuracy in self.runs if accuracy is not None]

    @property
    def mean(self) -> float | None:
        return fmean(self.finished) if self.finished else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1 in the denominator); None below two runs."""
        return stdev(self.finished) if len(self.finished) > 1 else None

    @property
    def difference(self) -> float | None:
        """Our mean minus the reference's, both rounded to two decimals as they are printed."""
        if self.mean is None or self.reference is None:
            return None
        return round(self.mean, 2) - round(self.reference.mean, 2)

    @property
    def error(self) -> float | None:
        """Standard error of the difference, in percentage points; None if either side has fewer than two runs."""
        if self.reference is None or min(len(self.finished), len(self.reference.runs)) < 2:
            return None
        return math.sqrt(sum(variance(runs) / len(runs) for runs in (self.finished, self.reference.runs)))


def rows(
    entries: Iterable[Entry], survey: Survey, references: Mapping[str, Reference], recipes: Mapping[str, int]
) -> list[Row]:
    """A row for every entry, in the order given; `recipes` as from `recipes_scored`."""
    return [
        Row(
            entry=entry,
            runs=tuple(r.accuracy if (r := survey[entry.name, seed].record) else None for seed in SEEDS),
            reference=references.get(entry.name),
            recipes=recipes[entry.name],
            older=frozenset(seed for seed in SEEDS if survey[entry.name, seed].status is Status.OLDER),
        )
        for entry in entries
    ]


_HEADER = (
    "entry",
    "mean",
    "std",
    f"runs (seeds {', '.join(map(str, SEEDS))})",
    "reference",
    "difference",
    "recipes scored",
)
_TRIAL_HEADER = ("entry", "seed", "epochs", "accuracy")
_NONE = "-"
_OLDER = "†"
_ALT = "Test accuracy against the size of the weights file of the published checkpoints"


def page(rows: Sequence[Row], survey: Survey, plotted: Collection[str]) -> str:
    """The text of RESULTS.md: the tables, with plots of those in `plotted`, and the hardware and versions."""
    citations = dict.fromkeys(row.reference.source.citation for row in rows if row.reference is not None)
    parts = [
        "<!-- Generated: edits are lost. See the end of the page. -->\n# Results\n",
        "Accuracy on the test set in percent: mean over the runs, sample standard deviation, and every run. Each entry "
        "links to its recipe. If an entry starts or learns from the weights of another, all of its runs use the "
        f"published ones, of seed {PUBLISHED_SEED}: their variation is not part of its deviation.\n",
        "The difference is our mean minus the reference's, in percentage points, ± its standard error, "
        "√(s₁²/n₁ + s₂²/n₂) with the sample standard deviation s and the number n of runs of each side; a difference "
        "within two standard errors is shown as none. There is no standard error where a side has one run, or only its "
        "mean was published.\n",
        "Each run reads the test set once, at its end. The last column counts the recipes of an entry that were ever "
        "scored on it, replaced ones included ([retired.json](retired.json)): if they are several, the choice of the "
        "recipe has seen the test set. A recipe was chosen on held-out training images "
        "([comparisons.yaml](comparisons.yaml)) or from the literature where its comments say so; they also say where "
        "a choice has seen the test set. Other settings were not compared.\n",
        f"The arithmetic of training has a version, now {NUMERICS} ([numerics](../docs/numerics.md)). Runs marked "
        f"{_OLDER} are of an older one, or start or learn from weights that are, or that a new run or recipe has "
        "replaced: the current recipes and code give other bits, and they are due again.\n",
        f"The weights of seed {PUBLISHED_SEED} are published, and scored again before they are. Those of the other "
        "seeds are not: their numbers rest on their [records](results), which state the sha256 of their weights.\n",
        "A plot shows every published checkpoint of a dataset: the test accuracy of its own weights, not the mean "
        "over the seeds, against the bytes of its `model.safetensors`. A line joins the bit widths of one graph.\n",
    ]
    parts += [f"Reference: {citation}.\n" for citation in citations]
    for table in TABLES:
        members = [row for row in rows if row.entry.table == table]
        text = _table(members, "") if members else "No recipe yet."
        parts.append(f"## {table_title(table)}\n\n{text}\n")
        if table in plotted:
            parts.append(f"{_plot(table, '')}\n")
    records = [record for row in rows for seed in SEEDS if (record := survey[row.entry.name, seed].record)]
    parts.append(f"## Hardware and versions\n\n{_provenance(records)}\n")
    parts.append(
        "This page is generated from the records under [results](results) by "
        "`python benchmarks/reproduce.py --table all`, which also trains what is missing.\n"
    )
    return "\n".join(parts)


def summary(rows: Iterable[Row], plotted: Collection[str]) -> str:
    """The results on README.md: a table of the entries that have been run, and a plot, for each dataset."""
    finished = [row for row in rows if row.finished]
    parts = []
    for table in TABLES:
        if members := [row for row in finished if row.entry.table == table]:
            parts.append(f"### {table_title(table)}\n\n{_table(members, 'benchmarks/')}")
            if table in plotted:
                parts.append(_plot(table, "benchmarks/"))
    if any(row.older for row in finished):
        parts.append(f"{_OLDER} By older [arithmetic](docs/numerics.md), or from replaced weights: due again.")
    return "\n\n".join(parts) or "No run yet."


def _table(rows: Iterable[Row], folder: str) -> str:
    lines = [_cells(row, name=f"[{row.entry.name}]({folder}configs/{row.entry.path.name})") for row in rows]
    return _markdown(_HEADER, lines)


def _plot(table: str, folder: str) -> str:
    return f"![{_ALT} on {table_title(table)}]({folder}accuracy-{table}.svg)"


def print_table(console: Console, title: str, rows: Iterable[Row]) -> None:
    _print(console, title, _HEADER, [_cells(row, name=row.entry.name) for row in rows])


def print_trials(console: Console, trials: Iterable[tuple[Entry, RunRecord]]) -> None:
    """A table of the trials, which enter no other table; nothing if there are none."""
    lines = [
        (
            entry.name,
            str(record.seed),
            f"{record.epochs} of {entry.recipe.epochs}",
            _number(record.accuracy),
        )
        for entry, record in trials
    ]
    if lines:
        _print(console, "trials: fewer epochs than the recipe's, in no table", _TRIAL_HEADER, lines)


def print_listing(console: Console, entries: Sequence[Entry], survey: Survey, seeds: Sequence[int]) -> None:
    """The status of every run: a table on a terminal, else tab-separated lines of entry, seed, status and accuracy."""
    runs = [(entry.name, seed, survey[entry.name, seed]) for entry in entries for seed in seeds]
    counts = Counter(run_status.status for _, _, run_status in runs)
    if not console.is_terminal:
        for name, seed, run_status in runs:
            accuracy = _number(run_status.record.accuracy if run_status.record else None)
            print(f"{name}\t{seed}\t{run_status.status.value}\t{accuracy}", file=console.file)
        return
    lines = [(entry.name, *(_listed(survey[entry.name, seed]) for seed in seeds)) for entry in entries]
    summary = ", ".join(f"{count} {status.value}" for status in Status if (count := counts[status]))
    _print(console, f"{len(runs)} runs: {summary}", ("entry", *(f"seed {seed}" for seed in seeds)), lines)


def _listed(run_status: RunStatus) -> str:
    if run_status.record is None:
        return run_status.status.value
    return f"{run_status.record.accuracy:.2f}" + ("" if run_status.done else f", {run_status.status.value}")


def duration(seconds: float) -> str:
    """A duration in at most two units: `2 h 5 min`, `5 min 10 s`, `10 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _cells(row: Row, *, name: str) -> tuple[str, ...]:
    count, mean = len(row.finished), row.mean
    if mean is None:
        ours = "not run"
    else:
        ours = f"{mean:.2f}" + ("" if count == len(SEEDS) else f" ({count} of {len(SEEDS)} seeds)")
    return (
        name,
        ours,
        _number(row.std),
        ", ".join(_run(row, seed) for seed in SEEDS) if count else _NONE,
        _number(row.reference.mean if row.reference else None),
        _difference(row),
        str(row.recipes or _NONE),
    )


def _run(row: Row, seed: int) -> str:
    return _number(row.runs[SEEDS.index(seed)]) + (_OLDER if seed in row.older else "")


def _difference(row: Row) -> str:
    """`+0.62 ± 0.19`, `none (+0.17 ± 0.10)` within two standard errors, or `+0.30 (no standard error)`."""
    difference = _number(row.difference, sign="+")
    if row.difference is None:
        return difference
    if row.error is None:
        return f"{difference} (no standard error)"
    with_error = f"{difference} ± {row.error:.2f}"
    return f"none ({with_error})" if abs(row.difference) <= 2 * row.error else with_error


def _number(value: float | None, *, sign: str = "-") -> str:
    if value is None:
        return _NONE
    value = round(value, 2)
    return f"{value:{sign}.2f}" if value else "0.00"  # no +0.00, no -0.00


def _provenance(records: Sequence[RunRecord]) -> str:
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in records:
        device = record.device
        threads = device.get("threads")
        threads = threads and f"{threads} thread{'s' if threads > 1 else ''}"
        details = ", ".join(filter(None, (device["kind"], threads, device.get("capability"), device.get("precision"))))
        versions = ", ".join(f"{package} {version}" for package, version in sorted(record.versions.items()))
        seconds[f"{device['name']} ({details})", versions].append(record.seconds)
    if not seconds:
        return "No run yet."
    lines = [(*key, str(len(times)), duration(sum(times))) for key, times in sorted(seconds.items())]
    return _markdown(("hardware", "versions", "runs", "training time"), lines, left=2)


def _markdown(header: Sequence[str], lines: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table whose first `left` columns are aligned left, the others right."""
    ruler = ["---" if column < left else "--:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ruler, *lines))


def _print(console: Console, title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    if not console.is_terminal:
        text = f"\n{title}\n\n{_markdown(header, lines)}"
        console.print(text, soft_wrap=True, highlight=False, markup=False)
        return
    table = Table(title=title, title_justify="left", show_edge=False)
    for column, name in enumerate(header):
        table.add_column(name, justify="right" if column else "left", no_wrap=not column)
    for cells in lines:
        table.add_row(*cells)
    console.print("", table)


START, END = "<!-- results -->", "<!-- /results -->"


def update_section(path: Path, table: str) -> None:
    """Put `table` between the markers of the page at `path`; does nothing if there is no file or no markers."""
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    updated = f"{before}{start}\n\n{table}\n\n{end}{after}"
    if start and end:
        update_text(path, updated)
