"""What can keep a run from its record."""

from __future__ import annotations

from pathlib import Path

from cnvzoo.errors import CnvzooError


class RunError(CnvzooError):
    """A run that cannot start or go on: says which folder, why, and what to do."""


class RunUnderWay(RunError):
    """A run that another process is training in the same folder."""


class RunInterrupted(CnvzooError):
    """A run that stopped before its end, with its state saved.

    Attributes:
        reason: `time limit`, `SIGINT` or `SIGTERM`.
        step, total_steps: how far it came.
        run_dir: where its state is.
        unsaved: why the state of that step could not be saved, if so: that of an earlier one is what there is.
    """

    def __init__(
        self, run: str, reason: str, step: int, total_steps: int, run_dir: Path, unsaved: str | None = None
    ) -> None:
        self.reason, self.step, self.total_steps, self.run_dir = reason, step, total_steps, run_dir
        self.unsaved = unsaved
        start = "there" if unsaved is None else f"the last state saved, if there is one: {unsaved}"
        super().__init__(
            f"{run}: stopped ({reason}) after step {step} of {total_steps}; the same command goes on from {start}"
        )
