"""Checkpoints: their format, where they are, and reading and writing them."""

from .checkpoint import (
    CheckpointConfig,
    CheckpointFacts,
    IntegerResult,
    SeedResult,
    check_weights,
    preprocessing_from,
    read_config,
    read_model,
    write_checkpoint,
    write_config,
)
from .errors import CheckpointError
from .facts import FileFacts
from .index import CheckpointInfo, Index, IndexEntry, read_index
from .load import load_checkpoint
from .locate import Located, choose_checkpoint, find_checkpoint, hub_location, is_path, list_checkpoints
from .names import ModelName, parse_name
from .publication import Publication, StoreError
from .store import Store, open_store

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointFacts",
    "CheckpointInfo",
    "FileFacts",
    "Index",
    "IndexEntry",
    "IntegerResult",
    "Located",
    "ModelName",
    "Publication",
    "SeedResult",
    "Store",
    "StoreError",
    "check_weights",
    "choose_checkpoint",
    "find_checkpoint",
    "hub_location",
    "is_path",
    "list_checkpoints",
    "load_checkpoint",
    "open_store",
    "parse_name",
    "preprocessing_from",
    "read_config",
    "read_index",
    "read_model",
    "write_checkpoint",
    "write_config",
]
