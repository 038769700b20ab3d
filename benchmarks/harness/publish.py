"""Sending the checkpoints of entries to where people find them."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import nn

import cnvzoo
from cnvzoo.checkpoints.folder import (
    check_weights,
    checkpoint_files,
    checkpoint_folders,
    read_config,
    write_checkpoint,
    write_config,
)
from cnvzoo.checkpoints.format import (
    CONFIG,
    WEIGHTS,
    CheckpointConfig,
    CheckpointError,
    CheckpointFacts,
    FileFacts,
    IntegerResult,
)
from cnvzoo.checkpoints.index import Index, IndexEntry, read_index
from cnvzoo.checkpoints.load import load_checkpoint
from cnvzoo.checkpoints.publish import checkpoint_facts, write_card
from cnvzoo.checkpoints.verify import Verification
from cnvzoo.deploy.metadata import DeployError
from cnvzoo.errors import CnvzooError
from cnvzoo.files import update_text
from cnvzoo.models.registry import ModelInfo
from cnvzoo.training.recipe import PUBLISHED_SEED
from cnvzoo.training.record import RunRecord
from cnvzoo.training.run import WEIGHTS as RUN_WEIGHTS
from harness.entries import SEEDS, Entry, HarnessError, Layout, shown
from harness.records import Records, recipes_scored
from harness.schedule import proven


def publish_checkpoints(
    entries: Iterable[Entry], layout: Layout, to: str, *, tag: str | None, dry_run: bool, say: Callable[[str], None]
) -> None:
    """Publish the checkpoints that the entries have, and print a line for each.

    Raises CheckpointError where one is not whole, or the store does not take it.
    """
    folders = {entry.name: layout.checkpoint(entry.recipe) for entry in entries}
    whole = checkpoint_folders(layout.hub).values()  # the config is written last: without it a folder is none yet
    if missing := [name for name, folder in folders.items() if folder not in whole]:
        say(f"no checkpoint to publish yet: {', '.join(missing)}")
    present = [folder for folder in folders.values() if folder in whole]
    cnvzoo.publish(present, to, tag=tag, dry_run=dry_run, on_published=print)


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
        weights = records.layout.run_dir(entry.name, PUBLISHED_SEED) / RUN_WEIGHTS
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


def measure_missing(
    entries: Iterable[Entry],
    layout: Layout,
    measure: Callable[[nn.Module, str], IntegerResult],
    say: Callable[[str], None],
) -> list[Path]:
    """Measure every quantized checkpoint of the entries that has not been; returns the folders written.

    What cannot be measured is said, and left for another time. `measure` takes a model and the name of its dataset.
    """
    written = []
    for entry in entries:
        folder = layout.checkpoint(entry.recipe)
        if entry.recipe.w_bits is None or not folder.is_dir():
            continue
        try:
            if read_config(folder).integer is not None:
                continue
            model, config = load_checkpoint(folder)
            result = measure(model, config.dataset)
        except (CheckpointError, DeployError) as error:
            say(f"{folder.name}: not measured as an integer graph: {error}")
            continue
        write_config(folder, config.model_copy(update={"integer": result}))
        write_card(folder)
        say(
            f"{folder.name}: as an integer graph {result.correct:,} of {config.total:,} right, on {result.agreeing:,} "
            f"the class that PyTorch gives, {result.bytes:,} bytes"
        )
        written.append(folder)
    return written


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


def update_index(path: Path, hub: Path) -> list[str]:
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
