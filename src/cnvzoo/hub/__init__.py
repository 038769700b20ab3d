"""Checkpoints: their format, and reading and writing them."""

from .checkpoint import (
    CheckpointConfig,
    CheckpointError,
    load_checkpoint,
    preprocessing_from,
    read_config,
    write_checkpoint,
)

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "load_checkpoint",
    "preprocessing_from",
    "read_config",
    "write_checkpoint",
]
