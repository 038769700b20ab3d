"""The published checkpoint of an entry: that of its first seed, whatever came of the others."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cnvzoo.hub import CheckpointError, read_config
from cnvzoo.train import RunRecord
from cnvzoo.train.run import WEIGHTS
from cnvzoo.zoo import checkpoint_config, keep_checkpoint

from .entries import SEEDS, Entry
from .float_start import proven
from .layout import Layout
from .records import standing

PUBLISHED_SEED = SEEDS[0]


def keep_missing(entries: Iterable[Entry], layout: Layout) -> list[Path]:
    """Write the checkpoint of every finished run that should have one and has not; returns the folders written.

    Only weights that are those of the record in the table are kept.
    """
    kept = []
    for entry in entries:
        record = standing(entry, PUBLISHED_SEED, layout.record(entry.name, PUBLISHED_SEED)).record
        run_dir = layout.run_dir(entry.name, PUBLISHED_SEED)
        if record and not _is_kept(record, layout) and proven(run_dir / WEIGHTS, record):
            kept.append(keep_checkpoint(record, run_dir, layout.hub))
    return kept


def _is_kept(record: RunRecord, layout: Layout) -> bool:
    config = checkpoint_config(record)
    try:
        return read_config(layout.hub / config.name) == config
    except CheckpointError:
        return False
