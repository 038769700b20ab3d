"""What the nodes of the clusters in test_ray.py train: workers import it by name."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tiny import publish_tiny, tiny

from cnvzoo.progress import TrainingStatus
from cnvzoo.training import RunRecord, run


def write_tiny(root: Path) -> None:
    """Write the file of `tiny()` to the cache of datasets in `root`."""
    data = tiny()
    root.mkdir(parents=True, exist_ok=True)
    names = ("train_images", "train_labels", "test_images", "test_labels")
    save_file({name: getattr(data, name) for name in names}, root / "mnist.safetensors")


def visible_gpus(worker: object) -> str | None:
    """The GPUs that Ray gives to an actor."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class TrainTiny:
    """Like run_recipe, with the checksums of `tiny()`, and a pause after the first epoch on some nodes.

    On those it saves its state after every step.

    Prints a line `node NAME`, with the name that the test gave to the node. For worker processes only, as it changes
    the library.

    Attributes:
        seconds: of the pause.
        nodes: where it is made.
    """

    seconds: float = 0.0
    nodes: tuple[str, ...] = ()

    def __call__(self, recipe: Any, **arguments: Any) -> RunRecord:
        publish_tiny()
        node, shown = os.environ.get("TINY_NODE", ""), run.TrainingProgress
        seconds = self.seconds if node in self.nodes else 0

        class SlowProgress(shown):
            def __call__(self, trainer: TrainingStatus) -> None:
                super().__call__(trainer)
                if trainer.step == trainer.steps_per_epoch + 1:  # the state of the first epoch is saved
                    time.sleep(seconds)

        run.TrainingProgress = SlowProgress
        if seconds:
            arguments["save_every"] = 0.0
        print(f"node {node}", flush=True)
        return run.run_recipe(recipe, **arguments)
