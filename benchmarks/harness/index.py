"""The index of the package, rendered from the published checkpoints: a pure function of the files under `hub/`."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import cnvzoo
from cnvzoo.files import update_text
from cnvzoo.hub import FileFacts, Index, IndexEntry, read_config
from cnvzoo.zoo import ModelInfo

from .errors import HarnessError

_FILES = ("README.md", "config.json", "model.safetensors")


def render_index(hub: Path) -> str:
    """The text of index.json for the checkpoints in `hub`.

    Raises:
        HarnessError: a folder has a file that no checkpoint has, or another name than its config.
        CheckpointError: a config is not valid.
    """
    folders = sorted(config.parent for config in hub.glob("*/config.json"))
    index = Index(checkpoints={folder.name: _entry(folder) for folder in folders})
    return json.dumps(index.model_dump(mode="json"), indent=1) + "\n"


def update(path: Path, hub: Path) -> None:
    """Bring the index at `path` up to date with `hub`."""
    update_text(path, render_index(hub))


def _entry(folder: Path) -> IndexEntry:
    config = read_config(folder)
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if strange := [path for path in files if path.name not in _FILES]:
        raise HarnessError(f"{strange[0]}: a checkpoint has {', '.join(_FILES)} and nothing else: move it elsewhere")
    if config.name != folder.name:
        raise HarnessError(f"{folder}: its config is that of {config.name}: name the folder so")
    cost = _cost(json.dumps(config.model | {"input_size": config.preprocessing["size"]}))
    return IndexEntry(
        model=config.model,
        dataset=config.dataset,
        correct=config.correct,
        total=config.total,
        parameters=cost.parameters,
        macs=cost.macs,
        files={path.name: FileFacts.of(path.read_bytes()) for path in files},
    )


@functools.cache
def _cost(arguments: str) -> ModelInfo:
    """What the model costs that is built with these arguments, as JSON; counting runs the model once."""
    return cnvzoo.model_info(**json.loads(arguments))
