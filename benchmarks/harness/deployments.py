"""What the integer graphs of published checkpoints come to, measured once and kept in their configs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from torch import nn

from cnvzoo import write_card
from cnvzoo.deploy import DeployError
from cnvzoo.hub import CheckpointError, IntegerResult, load_checkpoint, read_config, write_config

from .entries import Entry
from .layout import Layout


def measure_missing(
    entries: Iterable[Entry],
    layout: Layout,
    measure: Callable[[nn.Module, str], IntegerResult],
    say: Callable[[str], None],
) -> list[Path]:
    """Measure every quantized checkpoint of the entries that has not been; returns the folders written.

    What cannot be measured is said, and left for another time. `measure` takes a model and the name of its dataset.
    """
    written = []
    for entry in entries:
        folder = layout.checkpoint(entry.recipe)
        if entry.recipe.w_bits is None or not folder.is_dir():
            continue
        try:
            if read_config(folder).integer is not None:
                continue
            model, config = load_checkpoint(folder)
            result = measure(model, config.dataset)
        except (CheckpointError, DeployError) as error:
            say(f"{folder.name}: not measured as an integer graph: {error}")
            continue
        write_config(folder, config.model_copy(update={"integer": result}))
        write_card(folder)
        say(
            f"{folder.name}: as an integer graph {result.correct:,} of {config.total:,} right, on {result.agreeing:,} "
            f"the class that PyTorch gives, {result.bytes:,} bytes"
        )
        written.append(folder)
    return written
