"""The published checkpoint of an entry: that of PUBLISHED_SEED, whatever came of the others."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
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
from cnvzoo.verify import Verification
from cnvzoo.zoo import checkpoint_facts

from .entries import SEEDS, Entry
from .errors import HarnessError
from .files import shown
from .needs import proven
from .records import Records
from .retired import recipes_scored


def keep_missing(entries: Iterable[Entry], records: Records, verify: Callable[..., list[Verification]]) -> list[Path]:
    """Write the checkpoint of every finished run that should have one and has not; returns the folders written.

    Only weights that are those of the record in the table are kept, and only if `verify`, which is called as
    cnvzoo.verify, finds them to be as good as the record says. Where they are there already and only the facts are
    others, because another seed has finished since, the config alone is written, and the model card made of it.

    Raises:
        HarnessError: weights are not as good as their record says; their checkpoint is not written.
    """
    kept = []
    for entry in entries:
        record = records.status(entry, PUBLISHED_SEED).record
        if record is None:
            continue
        scored = recipes_scored([entry], records.layout)[entry.name]
        facts = checkpoint_facts(record, _other_records(entry, records), recipes_scored=scored)
        folder = records.layout.checkpoint(entry.recipe)
        weights = records.layout.run_dir(entry.name, PUBLISHED_SEED) / WEIGHTS
        published = _published(folder, facts)
        if published is not None:
            config = published.model_copy(update=dict(facts))
            is_new = config != published
            if is_new:
                write_config(folder, config)
        elif is_new := proven(weights, record) is not None:
            _check(facts, weights, records.layout.record(entry.name, PUBLISHED_SEED), verify)
            write_checkpoint(folder, facts, weights)
        else:
            continue
        if write_card(folder) or is_new:
            kept.append(folder)
    return kept


def _check(facts: CheckpointFacts, weights: Path, record: Path, verify: Callable[..., list[Verification]]) -> None:
    """Raise HarnessError where the checkpoint that these would make does not classify what its record says."""
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch) / facts.name
        write_checkpoint(staged, facts, weights)
        (result,) = verify([staged])
    if result.problem:
        raise HarnessError(f"{shown(record)}: not published, because its weights do not bear it out: {result.problem}")


def _published(folder: Path, facts: CheckpointFacts) -> CheckpointConfig | None:
    """The config of the checkpoint in `folder`, if its weights are there and those of the facts."""
    try:
        config = read_config(folder)
        check_weights(folder, config)
    except CheckpointError:
        return None
    return config if (config.name, config.weights_sha256) == (facts.name, facts.weights_sha256) else None


def _other_records(entry: Entry, records: Records) -> list[RunRecord]:
    others = (records.status(entry, seed).record for seed in SEEDS if seed != PUBLISHED_SEED)
    return [record for record in others if record is not None]
