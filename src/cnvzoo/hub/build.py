"""The model that a config asks for, before it has weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cnvzoo.errors import ModelError
from cnvzoo.models import build_model
from cnvzoo.models.initialization import without_initialization

from .errors import CheckpointError


def build_empty(arguments: Mapping[str, Any]) -> nn.Module:
    """A model on the CPU with any values; the random numbers of the caller stay as they are.

    Raises:
        CheckpointError: there is no such model.
    """
    try:
        return _build(arguments)
    except (TypeError, RuntimeError, ModelError) as error:
        raise CheckpointError(f"its model cannot be built: {error}") from None


def build_skeleton(arguments: Mapping[str, Any]) -> nn.Module:
    """The names, shapes and types of a model's tensors, for which no memory is taken, whatever the config asks for.

    Raises:
        CheckpointError: there is no such model.
    """
    try:
        with torch.device("meta"):
            return _build(arguments)
    except (TypeError, ModelError) as error:
        raise CheckpointError(f"its model cannot be built: {error}") from None
    except RuntimeError:  # its builder computes with values, which a skeleton does not have
        return build_empty(arguments)


def _build(arguments: Mapping[str, Any]) -> nn.Module:
    with without_initialization():
        return build_model(**arguments)
