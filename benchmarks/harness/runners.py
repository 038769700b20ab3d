"""Runs in this process, and how many of them go at once where nobody says: the machine decides that, not the bits.

On a CPU, several runs are several processes instead (processes.py): a process has one number of threads for all that
it does, and one run at a time that the interpreter works for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from cnvzoo.train import RunRecord
from cnvzoo.train.device import deterministic

from .runner import Run

_AT_ONCE_ON_A_GPU = 3


@dataclass(frozen=True)
class LocalRunner:
    """In this process. `train` is cnvzoo.train.run_recipe, or what a test puts in its place.

    own_stream: on a GPU, each run on a CUDA stream of its own, so that those of several threads overlap.
    """

    train: Callable[..., RunRecord]
    device: torch.device
    deadline: float | None
    own_stream: bool = False

    def run(self, run: Run, stop: Callable[[], str | None]) -> RunRecord:
        stream = torch.cuda.stream(torch.cuda.Stream(self.device)) if self.own_stream else nullcontext()
        with stream:
            return self.train(
                run.recipe,
                run_dir=run.run_dir,
                seed=run.seed,
                device=self.device,
                epochs=run.epochs,
                deadline=self.deadline,
                stop=stop,
                **run.weights,
            )


def at_once_by_default(device: torch.device, threads: int) -> int:
    """How many runs keep the device busy: a GPU by three, a CPU by one for every `threads` usable cores."""
    if device.type == "cuda":
        return _AT_ONCE_ON_A_GPU
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // threads)


@contextmanager
def settings(device: torch.device, threads: int) -> Iterator[None]:
    """What holds for a whole process, set around all of its runs and put back after the last: on a CPU the threads,
    on a GPU deterministic kernels, which a run that ends would else put back while another is under way.
    """
    if device.type != "cpu":
        with deterministic(device):
            yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
