"""Where a run finds the float weights that it starts or learns from: the published ones, those of a record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cnvzoo.files import sha256_of
from cnvzoo.train import PUBLISHED_SEED, RunRecord
from cnvzoo.train.run import RECORD, WEIGHTS

from .entries import Entry
from .records import Records


def needed_entries(entry: Entry, entries: Mapping[str, Entry]) -> list[Entry]:
    """The entries whose weights a run of `entry` needs, whatever for; one of them may be there twice."""
    return [entries[name] for names in entry.recipe.needs.values() for name in names]


def resolve_weights(entry: Entry, records: Records, *, trial_epochs: int | None = None) -> Path | None:
    """The safetensors file of the finished run of float `entry` with PUBLISHED_SEED, or None if it is to be trained.

    Looked for among the runs first, then among the published checkpoints. `trial_epochs` lets a trial of that
    length serve if neither has it. Weights count only if their sha256 is the one in their record, and if that is of
    today's arithmetic.
    """
    found = _from_run(entry, records) or _from_hub(entry, records)
    if found is None and trial_epochs is not None:
        found = _from_run(entry, records, trial_epochs)
    return found


def _from_run(entry: Entry, records: Records, trial_epochs: int | None = None) -> Path | None:
    folder = records.layout.run_dir(entry.name, PUBLISHED_SEED, trial_epochs)
    record = records.status(entry, PUBLISHED_SEED, folder / RECORD, trial=trial_epochs is not None).done
    return proven(folder / WEIGHTS, record)


def _from_hub(entry: Entry, records: Records) -> Path | None:
    record = records.status(entry, PUBLISHED_SEED).done
    folder = records.layout.checkpoint(entry.recipe)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # nothing published here that could say whose it is
    if record is None or not isinstance(config, dict) or config.get("weights_sha256") != record.weights_sha256:
        return None
    return proven(folder / "model.safetensors", record)


def proven(weights: Path, record: RunRecord | None) -> Path | None:
    """`weights` if they are those of `record`, else None."""
    known = record is not None and weights.is_file() and sha256_of(weights) == record.weights_sha256
    return weights if known else None
