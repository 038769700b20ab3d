"""Where the harness keeps things: every path is made here, so that a test or a second machine can move them all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cnvzoo.files import FileError, expanded
from cnvzoo.train import Recipe

from .errors import HarnessError


@dataclass(frozen=True)
class Layout:
    """The folders of one checkout.

    home: the `benchmarks` folder (recipes, references, records, the page)
    runs: state and weights of runs, large and never committed
    hub:  published checkpoints
    """

    home: Path
    runs: Path
    hub: Path

    @classmethod
    def of(cls, home: Path, runs: Path | None = None) -> Layout:
        """The folders of the checkout whose `benchmarks` folder is `home`, with `runs` where the user wants them.

        Raises HarnessError if `runs` can be no folder.
        """
        try:
            runs = home.parent / "runs" if runs is None else expanded(runs)
        except FileError as error:
            raise HarnessError(f"--runs {error}") from None
        there = next(path for path in (runs, *runs.absolute().parents) if path.exists())
        if not there.is_dir():
            raise HarnessError(f"--runs {runs}: {there} is a file, not a folder: choose another folder")
        return cls(home=home, runs=runs, hub=home.parent / "hub")

    @property
    def configs(self) -> Path:
        return self.home / "configs"

    @property
    def results(self) -> Path:
        return self.home / "results"

    @property
    def references(self) -> Path:
        return self.home / "references.yaml"

    @property
    def retired(self) -> Path:
        """What is kept of the records that others have replaced."""
        return self.home / "retired.json"

    @property
    def page(self) -> Path:
        return self.home / "RESULTS.md"

    @property
    def plot(self) -> Path:
        """Accuracy against bytes, on the page and on the README."""
        return self.home / "accuracy.svg"

    @property
    def readme(self) -> Path:
        return self.home.parent / "README.md"

    @property
    def index(self) -> Path:
        """The index of published checkpoints, which ships inside the package."""
        return self.home.parent / "src" / "cnvzoo" / "hub" / "index.json"

    def checkpoint(self, recipe: Recipe) -> Path:
        """The published checkpoint of an entry, if it has one."""
        return self.hub / f"{recipe.tag}.{recipe.dataset}"

    def record(self, entry: str, seed: int) -> Path:
        """The committed record of a run."""
        return self.results / entry / f"seed{seed}.json"

    def run_dir(self, entry: str, seed: int, trial_epochs: int | None = None) -> Path:
        """State and weights of a run; trials live apart, where nothing looks for the weights of a table."""
        if trial_epochs is None:
            return self.runs / entry / f"seed{seed}"
        return self.runs / "trials" / entry / f"seed{seed}-{trial_epochs}epochs"
