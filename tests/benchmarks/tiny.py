"""reproduce.py and its worker processes, on a small dataset of random images.

    python tiny.py HOME ARGUMENT ...    the command line of reproduce.py, with HOME instead of benchmarks/

Environment variables let a test stop a run at the end of an epoch:
- TINY_PAUSE: seconds to wait there for the request to stop, which ends the pause;
- TINY_DEAF: the pause does not end before its time;
- TINY_LATE: the time limit has passed.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from cnvzoo.data import Dataset, dataset_info, published
from cnvzoo.data.published import sha256_of_array
from cnvzoo.progress import TrainingStatus
from cnvzoo.training import RunRecord, run

TINY = Path(__file__).resolve()


def tiny() -> Dataset:
    """A dataset like MNIST with 64 random training images: four steps of 16 images an epoch."""
    generator = torch.Generator().manual_seed(0)

    def noise(below: int, *shape: int) -> torch.Tensor:
        return torch.randint(below, shape, generator=generator, dtype=torch.uint8)

    return Dataset(
        info=replace(dataset_info("mnist"), train_size=64, test_size=20),
        train_images=noise(256, 64, 28, 28, 1),
        train_labels=noise(10, 64),
        test_images=noise(256, 20, 28, 28, 1),
        test_labels=noise(10, 20),
    )


def publish_tiny(set_attribute: Callable[[object, str, object], object] = setattr) -> None:
    """Replace the facts and checksums of MNIST by those of `tiny()`; a test passes `monkeypatch.setattr` to undo it."""
    data = tiny()
    arrays = ("train_images", "train_labels", "test_images", "test_labels")
    checksums = {
        key: {"sha256": sha256_of_array(array := getattr(data, key)), "shape": list(array.shape)} for key in arrays
    }
    set_attribute(published, "DATASETS", {**published.DATASETS, "mnist": data.info})
    set_attribute(published, "CHECKSUMS", {**published.CHECKSUMS, "mnist": checksums})


def train_tiny(recipe: Any, **arguments: Any) -> RunRecord:
    """Like run_recipe, on `tiny()` and with the pauses; for worker processes only, as it changes the library."""

    class PausingProgress(run.TrainingProgress):
        def __call__(self, trainer: TrainingStatus) -> None:
            super().__call__(trainer)
            if trainer.step % trainer.steps_per_epoch:
                return
            end = time.monotonic() + float(os.environ.get("TINY_PAUSE", "0"))
            while time.monotonic() < end and ("TINY_DEAF" in os.environ or not arguments["stop"]()):
                time.sleep(0.02)
            if "TINY_LATE" in os.environ:
                run.time = SimpleNamespace(**vars(time) | {"monotonic": lambda: math.inf})

    publish_tiny()
    run.TrainingProgress = PausingProgress
    return run.run_recipe(recipe, dataset=tiny(), **arguments)


@dataclass(frozen=True)
class Script:
    """Python code that replaces run_recipe; `recipe` and `options` are its arguments, `record` its result."""

    code: str

    def __call__(self, recipe: Any, **options: Any) -> Any:
        names: dict[str, Any] = {"recipe": recipe, "options": options, "record": None}
        exec(self.code, names)
        return names["record"]


def main(arguments: list[str]) -> int:
    sys.path[0] = str(TINY.parents[2] / "benchmarks")
    import reproduce

    publish_tiny()
    reproduce.run_recipe = train_tiny
    return reproduce.main(arguments[1:], home=Path(arguments[0]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
