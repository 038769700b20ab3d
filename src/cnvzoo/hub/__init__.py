"""Checkpoints: their format, and reading and writing them."""

from .checkpoint import (
    CheckpointConfig,
    CheckpointError,
    load_checkpoint,
    preprocessing_from,
    read_config,
    write_checkpoint,
)
from .locate import checkpoint_names, find_checkpoint, hub_folder

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "checkpoint_names",
    "find_checkpoint",
    "hub_folder",
    "load_checkpoint",
    "preprocessing_from",
    "read_config",
    "write_checkpoint",
]
