"""The tables as numbers: a pure function of the entries, the records and the references."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev, variance

from .entries import SEEDS, Entry
from .records import Status, Survey
from .references import Reference


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
