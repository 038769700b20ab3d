"""What teachers say of every view of every image: asked once, before training, and kept in a file beside the state."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from .progress import counted
from .state import load_checked, save_checked
from .teacher import Memory
from .trainer import Trainer

_BATCH = 500
_DTYPE = torch.float16  # finer than the bfloat16 in which teachers compute, and half of what float32 takes


def memorise(
    trainer: Trainer, path: Path, facts: Mapping[str, Any], should_stop: Callable[[], bool], *, quiet: bool = False
) -> bool:
    """Give the trainer's teacher a memory of all views that the epochs will show.

    Every view is saved when it is done, and those that are in the file need not be seen again. A file that is damaged
    or of another run is replaced.

    Args:
        trainer: with a teacher, and batches that have views.
        path: of the file.
        facts: JSON values that tell which run this is, and what the bits of a memory depend on beside it.
        should_stop: asked before every batch.
        quiet: no progress.

    Returns:
        Whether all is memorised; if not, it was told to stop.
    """
    batches, teacher = trainer.batches, trainer.teacher
    assert teacher is not None
    assert batches.views is not None
    views = min(batches.views, trainer.total_steps // trainer.steps_per_epoch)
    said, seconds = _load(path, facts)
    label = f"{trainer.recipe.run_name}: views seen by its teachers"
    for view in counted(range(len(said), views), label, quiet=quiet):
        began, parts = time.monotonic(), []
        for images in batches.show(view, _BATCH):
            if should_stop():
                return False
            with torch.no_grad(), trainer.precision():
                parts.append(teacher.logits(images).to(_DTYPE))
        said.append(torch.cat(parts).cpu())
        seconds += time.monotonic() - began
        save_checked({str(n): logits for n, logits in enumerate(said)}, path, {"facts": facts, "seconds": seconds})
    teacher.memory = Memory(torch.cat(said).to(trainer.device), seconds)
    return True


def _load(path: Path, facts: Mapping[str, Any]) -> tuple[list[Tensor], float]:
    """The views that the file has for this run, and the seconds that they took."""
    try:
        said, saved = load_checked(path)
        if saved["facts"] != facts:
            return [], 0.0
        return [said[str(view)] for view in range(len(said))], saved["seconds"]
    except (SafetensorError, OSError, KeyError, ValueError):
        return [], 0.0
