"""The published checkpoint of an entry: that of PUBLISHED_SEED, whatever came of the others."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cnvzoo import write_card
from cnvzoo.hub import (
    CheckpointConfig,
    CheckpointError,
    CheckpointFacts,
    check_weights,
    read_config,
    write_checkpoint,
    write_config,
)
from cnvzoo.train import PUBLISHED_SEED, RunRecord
from cnvzoo.train.run import WEIGHTS
from cnvzoo.zoo import checkpoint_facts

from .entries import SEEDS, Entry
from .layout import Layout
from .needs import proven
from .records import standing


def keep_missing(entries: Iterable[Entry], layout: Layout) -> list[Path]:
    """Write the checkpoint of every finished run that should have one and has not; returns the folders written.

    Only weights that are those of the record in the table are kept. Where they are there already and only the facts
    are others, because another seed has finished since, the config alone is written, and the model card made of it.
    """
    kept = []
    for entry in entries:
        record = _record(entry, PUBLISHED_SEED, layout)
        if record is None:
            continue
        facts = checkpoint_facts(record, _other_records(entry, layout))
        folder, weights = layout.checkpoint(entry.recipe), layout.run_dir(entry.name, PUBLISHED_SEED) / WEIGHTS
        published = _published(folder, facts)
        if published is not None:
            config = published.model_copy(update=dict(facts))
            is_new = config != published
            if is_new:
                write_config(folder, config)
        elif is_new := proven(weights, record) is not None:
            write_checkpoint(folder, facts, weights)
        else:
            continue
        if write_card(folder) or is_new:
            kept.append(folder)
    return kept


def _published(folder: Path, facts: CheckpointFacts) -> CheckpointConfig | None:
    """The config of the checkpoint in `folder`, if its weights are there and those of the facts."""
    try:
        config = read_config(folder)
        check_weights(folder, config)
    except CheckpointError:
        return None
    return config if (config.name, config.weights_sha256) == (facts.name, facts.weights_sha256) else None


def _record(entry: Entry, seed: int, layout: Layout) -> RunRecord | None:
    return standing(entry, seed, layout.record(entry.name, seed)).record


def _other_records(entry: Entry, layout: Layout) -> list[RunRecord]:
    others = (_record(entry, seed, layout) for seed in SEEDS if seed != PUBLISHED_SEED)
    return [record for record in others if record is not None]
