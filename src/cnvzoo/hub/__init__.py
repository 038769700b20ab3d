"""Checkpoints: their format, where they are, and reading and writing them."""

from .checkpoint import (
    CheckpointConfig,
    CheckpointFacts,
    SeedResult,
    preprocessing_from,
    read_config,
    read_model,
    write_checkpoint,
    write_config,
)
from .errors import CheckpointError
from .index import FileFacts, IndexEntry, read_index

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointFacts",
    "FileFacts",
    "IndexEntry",
    "SeedResult",
    "preprocessing_from",
    "read_config",
    "read_index",
    "read_model",
    "write_checkpoint",
    "write_config",
]
