"""The index of the package, rendered from the published checkpoints under `hub/`.

One that is damaged, or that this version cannot read, keeps the entry that it had: what was published under its name
stays the only thing that is accepted there. It is named, and the others are brought up to date.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import cnvzoo
from cnvzoo.errors import CnvzooError
from cnvzoo.files import update_text
from cnvzoo.hub import CheckpointError, FileFacts, Index, IndexEntry, read_config, read_index
from cnvzoo.hub.index import CONFIG, WEIGHTS
from cnvzoo.hub.publication import checkpoint_files, checkpoint_folders
from cnvzoo.zoo import ModelInfo

from .errors import HarnessError


def render_index(hub: Path, before: Mapping[str, IndexEntry] | None = None) -> tuple[str, list[str]]:
    """The text of index.json for the checkpoints in `hub`, and a line for each that is not in it as it is there.

    Args:
        hub: the directory of the checkpoints.
        before: the entries of the index as it was. Those of checkpoints that are damaged are kept; those of folders
            that are gone are not.
    """
    before = before or {}
    folders = checkpoint_folders(hub) | {name: hub / name for name in before if (hub / name).is_dir()}
    entries, problems = {}, []
    for name, folder in folders.items():
        try:
            entries[name] = _entry(folder)
        except CnvzooError as error:
            if name in before:
                entries[name] = before[name]
            done = "its entry in the index stays as it was" if name in before else "left out of the index"
            problems.append(f"{name}: {done}: {error}")
    problems += [f"{name}: no longer in the index: {hub / name} is gone" for name in sorted(before.keys() - folders)]
    index = Index(checkpoints=dict(sorted(entries.items())))
    return json.dumps(index.model_dump(mode="json"), indent=1) + "\n", problems


def update(path: Path, hub: Path) -> list[str]:
    """Bring the index at `path` up to date with `hub`; returns a line for each checkpoint that is a problem.

    Raises:
        HarnessError: the index cannot be read, and has entries that would have to be kept. It stays as it was.
    """
    damage, before = None, {}
    try:
        before = read_index(path).checkpoints if path.is_file() else {}
    except CheckpointError as error:
        damage = error
    text, problems = render_index(hub, before)
    if damage and problems:
        raise HarnessError(f"{'; '.join(problems)}; and the index is damaged too: restore one or the other: {damage}")
    update_text(path, text)
    return problems


def _entry(folder: Path) -> IndexEntry:
    files = checkpoint_files(folder, needed=(WEIGHTS, CONFIG))
    facts = {name: FileFacts.of(content) for name, content in sorted(files.items())}
    config = read_config(folder, facts[CONFIG])
    cost = _cost(json.dumps(config.model | {"input_size": config.preprocessing["size"]}))
    return IndexEntry(
        model=config.model,
        dataset=config.dataset,
        correct=config.correct,
        total=config.total,
        parameters=cost.parameters,
        macs=cost.macs,
        files=facts,
    )


@functools.cache
def _cost(arguments: str) -> ModelInfo:
    """What the model costs that is built with these arguments, as JSON; counting runs the model once."""
    return cnvzoo.model_info(**json.loads(arguments))
