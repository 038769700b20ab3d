"""The files that follow from the records: checkpoints with cards and index, plots, RESULTS.md and README.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from torch import nn

from cnvzoo.checkpoints.format import CheckpointError, IntegerResult
from cnvzoo.checkpoints.verify import Verification
from cnvzoo.errors import CnvzooError, in_a_line
from cnvzoo.files import FileError, update_text
from harness.cluster_time import cluster_table
from harness.entries import Entry, shown
from harness.plot import plotted, update_plots
from harness.publish import keep_missing, measure_missing, update_index
from harness.records import Records, recipes_scored
from harness.references import Reference
from harness.report import page, rows, summary, update_section

_T = TypeVar("_T")


@dataclass
class Outputs:
    """Writes what follows from the records. A file that cannot be written does not keep others from being written.

    Attributes:
        entries: those whose checkpoints are written and measured: the selected ones, and with `add_entries` those that
            are trained for them.
        records: of all entries.
        references: what the tables compare with.
        verify: called as cnvzoo.verify.
        say: called with each line for people.
        out_of_date: what could not be written when it was last tried.
    """

    entries: list[Entry]
    records: Records
    references: Mapping[str, Reference]
    verify: Callable[..., list[Verification]]
    say: Callable[[str], None]
    out_of_date: set[str] = field(default_factory=set)
    _reported: set[str] = field(default_factory=set)

    def collect_records(self, seeds: Sequence[int]) -> None:
        """Copy records of finished runs that are not yet among the results."""
        for entry in self.entries:
            for seed in seeds:
                collect = partial(self.records.collect, entry, seed)
                if path := self._attempt(f"the record of {entry.name} seed {seed}", collect, None):
                    self.say(f"{shown(path)}: copied from the finished run")

    def add_entries(self, entries: Iterable[Entry]) -> None:
        """Write the checkpoints of these entries too."""
        for entry in entries:
            if entry not in self.entries:
                self.entries.append(entry)

    def has_checkpoint_of_record(self, entry: Entry) -> bool:
        """False if the checkpoint of an entry could not be made that of its record when it was last tried."""
        return _checkpoint_of(entry) not in self.out_of_date

    def update(self) -> None:
        """Write everything that is missing or out of date."""
        for entry in self.entries:
            write = partial(keep_missing, [entry], self.records, self.verify)
            for folder in self._attempt(_checkpoint_of(entry), write, []):
                self.say(f"{shown(folder)}: checkpoint written")
        with self.records.locked():
            self._update_shared()

    def _update_shared(self) -> None:
        """Write the files that belong to all entries, so that other commands write them too."""
        layout = self.records.layout
        if self._attempt("the index of published checkpoints", self._update_index, False):
            for problem in self._attempt("the plots", partial(update_plots, layout), []):
                self._say_once(problem)
        if (texts := self._attempt("what the tables show", self._tables, None)) is not None:
            results, readme = texts
            self._attempt("the page of results", partial(update_text, layout.page, results), False)
            self._attempt("the README", partial(update_section, layout.readme, readme), None)
        if layout.cluster_page.is_file():
            self._attempt(
                "the page about clusters",
                lambda: update_section(layout.cluster_page, cluster_table(self.records)),
                None,
            )

    def _tables(self) -> tuple[str, str]:
        """The page of results, and the part of the README that has them."""
        layout, survey, entries = self.records.layout, self.records.survey(), self.records.entries.values()
        lines = rows(entries, survey, self.references, recipes_scored(entries, layout))
        try:
            shows = plotted(layout.index)
        except CheckpointError:  # reported by _update_index
            shows = frozenset()
        return page(lines, survey, shows), summary(lines, shows)

    def measure(self, measure: Callable[[nn.Module, str], IntegerResult]) -> None:
        """Measure the integer graphs of the quantized checkpoints that have not been measured."""
        layout = self.records.layout
        for entry in self.entries:
            write = partial(measure_missing, [entry], layout, measure, self.say)
            if self._attempt(f"the config of {layout.checkpoint(entry.recipe).name}", write, []):
                self.update()

    def _update_index(self) -> bool:
        layout = self.records.layout
        try:
            for problem in update_index(layout.index, layout.hub):
                self._say_once(problem)
        except FileError:
            raise
        except CnvzooError as error:  # a damaged checkpoint or index is no reason to exit with an error after training
            self._say_once(f"the index of published checkpoints stays as it was: {error}")
            return False
        return True

    def _attempt(self, what: str, write: Callable[[], _T], otherwise: _T) -> _T:
        """What `write` returns, or `otherwise` if it fails, reporting the reason once."""
        try:
            result = write()
        except (CnvzooError, OSError, UnicodeDecodeError) as error:
            self.out_of_date.add(what)
            self._say_once(f"{what} stays as it was: {in_a_line(error)}")
            return otherwise
        self.out_of_date.discard(what)
        return result

    def _say_once(self, text: str) -> None:
        if text not in self._reported:
            self._reported.add(text)
            self.say(text)


def _checkpoint_of(entry: Entry) -> str:
    return f"the checkpoint of {entry.name}"
