"""A process that trains and kills itself at a given step: `python worker.py '<jobs as JSON>'`.

A job is {"recipe": changes to the recipe of `synthetic.recipe`, "run_dir": ..., "die": null or a moment}. For each
finished job the sha256 of its weights is printed. Moments to die at, by SIGKILL, with the state saved every step:

    ["step", k]   after step k was taken, before its state is saved
    ["save", k]   with half of the state of step k written
    ["record"]    with the final weights written, and no record
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from synthetic import noise, recipe, small_resnets

from cnvzoo.progress import TrainingStatus
from cnvzoo.training import RunRecord, run, run_recipe, state


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DyingProgress(run.TrainingProgress):
    """Also records the step, and kills the process at step `at`."""

    at: int | None = None
    step = 0

    def __call__(self, trainer: TrainingStatus) -> None:
        super().__call__(trainer)
        DyingProgress.step = trainer.step
        if trainer.step == self.at:
            die()


def arrange_death(moment: str, step: int | None = None) -> None:
    if moment == "step":
        DyingProgress.at = step
    elif moment == "save":
        save = state.save_file

        def save_half(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
            save(tensors, path, metadata)
            if DyingProgress.step == step:
                os.truncate(path, path.stat().st_size // 2)
                die()

        state.save_file = save_half
    else:
        RunRecord.write = lambda self, path: die()


def main(jobs: list[dict[str, Any]]) -> None:
    run.TrainingProgress = DyingProgress
    for job in jobs:
        if job.get("die"):
            arrange_death(*job["die"])
        wanted = recipe(**job["recipe"])
        record = run_recipe(wanted, run_dir=job["run_dir"], dataset=noise(wanted.dataset), quiet=True, save_every=0)
        print(record.weights_sha256, flush=True)


if __name__ == "__main__":
    with small_resnets():
        main(json.loads(sys.argv[1]))
