"""The tables as numbers: a pure function of the entries, the records and the references.

The tables as text: the Markdown page, the same on a terminal, and the listing.

The page is a pure function of the records: no date, no path, no order of a file system, so that two machines with the
same records write the same bytes.


The results on the README: a table between two markers, which follows the records as the page of results does."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev, variance

from rich.console import Console
from rich.table import Table

from cnvzoo.files import update_text
from cnvzoo.training.numerics import NUMERICS
from cnvzoo.training.recipe import PUBLISHED_SEED
from cnvzoo.training.record import RunRecord
from harness.entries import SEEDS, TABLES, Entry
from harness.records import RunStatus, Status, Survey
from harness.references import Reference


@dataclass(frozen=True)
class Row:
    """One entry.

    runs: its test accuracies in percent by seed, None for a run that is not there.
    older: the seeds of those of an older version of the arithmetic, which are due again.
    recipes: how many recipes of it were ever scored on the test set.
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
        """Ours minus the reference's, both to two decimals as they are printed: a reader can redo it."""
        if self.mean is None or self.reference is None:
            return None
        return round(self.mean, 2) - round(self.reference.mean, 2)

    @property
    def error(self) -> float | None:
        """Standard error of the difference, in points; None if ours or the reference's are fewer than two runs."""
        if self.reference is None or min(len(self.finished), len(self.reference.runs)) < 2:
            return None
        return math.sqrt(sum(variance(runs) / len(runs) for runs in (self.finished, self.reference.runs)))


def rows(
    entries: Iterable[Entry], survey: Survey, references: Mapping[str, Reference], recipes: Mapping[str, int]
) -> list[Row]:
    """A row for every entry, in the order given; `recipes`: as from harness.retired.recipes_scored."""
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
_PICTURE = (
    "![Test accuracy against the size of the weights file of every published checkpoint, by dataset](accuracy.svg)\n\n"
    "Every published checkpoint: the test accuracy of its own weights, which are those of seed 0 and not the mean over "
    "the seeds, against the bytes of its `model.safetensors`. A line joins the bit widths of one graph.\n"
)


def page(rows: Sequence[Row], survey: Survey) -> str:
    """The whole of RESULTS.md: every table, then the hardware and versions behind it."""
    citations = dict.fromkeys(row.reference.source.citation for row in rows if row.reference is not None)
    parts = [
        "<!-- Generated: edits are lost. See the end of the page. -->\n# Results\n",
        "Accuracy on the test set in percent: the mean over the runs, their sample standard deviation, and every run. "
        "The entry's name leads to its recipe. Where an entry starts or learns from another's weights, all of its runs "
        f"have the published ones, of seed {PUBLISHED_SEED}: how those vary is not part of its deviation.\n",
        "The difference is our mean minus the reference's, in points, ± its standard error, √(s₁²/n₁ + s₂²/n₂) with "
        "the sample standard deviation s and number n of the runs of each side, at least two; a difference within two "
        "standard errors is shown as none.\n",
        "Each run reads the test set once, at its end. The last column counts the recipes of a row that were ever "
        "scored on it, with those that were replaced since ([retired.json](retired.json)): where they are more than "
        "one, the choice of the recipe has seen the test set. Recipes are chosen on held-out training images now.\n",
        f"The arithmetic of training has a version, {NUMERICS} now ([numerics](../docs/numerics.md)). Runs marked "
        f"{_OLDER} are of an older one, or start or learn from weights that are: today's code gives other bits, and "
        "they are due again.\n",
        f"The weights of seed {PUBLISHED_SEED} are published, and scored again before they are. Those of the other "
        "seeds are not: their numbers rest on their [records](results), which have the sha256 of their weights.\n",
    ]
    parts += [f"Reference: {citation}.\n" for citation in citations]
    if any(row.runs[0] is not None for row in rows):  # then there are checkpoints to show
        parts.append(_PICTURE)
    for table in TABLES:
        members = [row for row in rows if row.entry.table == table]
        lines = [_cells(row, name=f"[{row.entry.name}](configs/{row.entry.path.name})") for row in members]
        parts.append(f"## {table}\n\n{_markdown(_HEADER, lines) if lines else 'No recipe yet.'}\n")
    records = [record for row in rows for seed in SEEDS if (record := survey[row.entry.name, seed].record)]
    parts.append(f"## Hardware and versions\n\n{_provenance(records)}\n")
    parts.append(
        "This page is generated from the records under [results](results) by "
        "`python benchmarks/reproduce.py --table all`, which also trains what is missing.\n"
    )
    return "\n".join(parts)


def summary(rows: Iterable[Row]) -> str:
    """The table of the README: the entries that have been run, of every dataset."""
    finished = [row for row in rows if row.finished]
    lines = [_cells(row, name=f"[{row.entry.name}](benchmarks/configs/{row.entry.path.name})") for row in finished]
    if not lines:
        return "No run yet."
    note = f"\n\n{_OLDER} By older [arithmetic](docs/numerics.md): due again."
    return _markdown(_HEADER, lines) + (note if any(row.older for row in finished) else "")


def print_table(console: Console, title: str, rows: Iterable[Row]) -> None:
    _print(console, title, _HEADER, [_cells(row, name=row.entry.name) for row in rows])


def print_trials(console: Console, trials: Iterable[tuple[Entry, RunRecord]]) -> None:
    """Trials, apart from the tables that they do not enter; nothing if there are none."""
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


def print_listing(console: Console, entries: Sequence[Entry], survey: Survey) -> None:
    """The status of every run: a table on a terminal, else lines of entry, seed, status and accuracy, with tabs."""
    runs = [(entry.name, seed, survey[entry.name, seed]) for entry in entries for seed in SEEDS]
    counts = Counter(now.status for _, _, now in runs)
    if not console.is_terminal:
        for name, seed, now in runs:
            line = f"{name}\t{seed}\t{now.status.value}\t{_number(now.record.accuracy if now.record else None)}"
            print(line, file=console.file)
        return
    lines = [(entry.name, *(_listed(survey[entry.name, seed]) for seed in SEEDS)) for entry in entries]
    summary = ", ".join(f"{count} {status.value}" for status in Status if (count := counts[status]))
    _print(console, f"{len(runs)} runs: {summary}", ("entry", *(f"seed {seed}" for seed in SEEDS)), lines)


def _listed(now: RunStatus) -> str:
    if now.record is None:
        return now.status.value
    return f"{now.record.accuracy:.2f}" + ("" if now.done else f", {now.status.value}")


def duration(seconds: float) -> str:
    """Two units at most: `2 h 5 min`, `5 min 10 s`, `10 s`."""
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
    """`+0.62 ± 0.19`, `none (+0.17 ± 0.10)` within two standard errors, or `+0.30 (no error)`."""
    difference = _number(row.difference, sign="+")
    if row.difference is None:
        return difference
    if row.error is None:
        return f"{difference} (no error)"
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
        details = ", ".join(filter(None, (device["kind"], threads, device.get("capability"))))
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


def update_readme(path: Path, table: str) -> None:
    """Put `table` between the markers of the README at `path`; one that is not there, or has no markers, is left be."""
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    updated = f"{before}{start}\n\n{table}\n\n{end}{after}"
    if start and end:
        update_text(path, updated)
