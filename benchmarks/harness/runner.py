"""What a runner is: one run in, its record out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cnvzoo.train import Recipe, RunRecord


@dataclass(frozen=True)
class Run:
    """One run to be trained, or to be gone on with.

    epochs:  its length where that is less than the recipe's, else None
    weights: files that the recipe needs, by what run_recipe calls them: one as float_start, any number as teacher
    """

    recipe: Recipe
    seed: int
    run_dir: Path
    epochs: int | None = None
    weights: Mapping[str, Path | list[Path]] = field(default_factory=dict)


class Runner(Protocol):
    """Trains one run, or goes on with it."""

    def run(self, run: Run, stop: Callable[[], str | None]) -> RunRecord:
        """Return the record, with `record.json` and `weights.safetensors` in `run.run_dir`.

        Called in several threads at once where several runs go at once. `stop()` is to be asked often; once it gives
        a reason, the run is to stop with its state saved.

        Raises RunInterrupted where it stops before the end, its state in `run_dir`; RunUnderWay where another process
        is training it; any other exception where this run cannot be had, which says nothing about others.
        """
        ...
