"""What can keep a run from its record."""

from __future__ import annotations

from pathlib import Path

from cnvzoo.errors import CnvzooError


class RunError(CnvzooError):
    """A run that cannot start or go on: says which folder, why, and what to do."""


class RunInterrupted(CnvzooError):
    """A run that stopped before its end, with its state saved.

    Attributes:
        reason: `time limit`, `SIGINT` or `SIGTERM`.
        step, total_steps: how far it came.
        run_dir: where its state is.
    """

    def __init__(self, run: str, reason: str, step: int, total_steps: int, run_dir: Path) -> None:
        self.reason, self.step, self.total_steps, self.run_dir = reason, step, total_steps, run_dir
        super().__init__(
            f"{run}: stopped ({reason}) after step {step} of {total_steps}; the same command goes on from there"
        )
