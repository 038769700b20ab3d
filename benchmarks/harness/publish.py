"""The checkpoints of entries: written from runs, measured as integer graphs, listed in the index, and published."""

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
from cnvzoo.checkpoints.index import Index, PublishedCheckpoint, read_index
from cnvzoo.checkpoints.load import load_checkpoint
from cnvzoo.checkpoints.save import checkpoint_facts, write_card
from cnvzoo.checkpoints.verify import Verification
from cnvzoo.errors import CnvzooError
from cnvzoo.files import update_text
from cnvzoo.models.registry import ModelInfo
from cnvzoo.training.recipe import PUBLISHED_SEED
from cnvzoo.training.record import RunRecord
from cnvzoo.training.state import RUN_WEIGHTS
from cnvzoo_runtime.metadata import DeployError
from harness.entries import SEEDS, Entry, HarnessError, Layout, shown
from harness.records import Records, recipes_scored
from harness.schedule import recorded_weights


def publish_checkpoints(
    entries: Iterable[Entry], layout: Layout, to: str, *, tag: str | None, dry_run: bool, say: Callable[[str], None]
) -> None:
    """Publish the checkpoints of the entries that have one, and print a line for each.

    Raises CheckpointError if one is incomplete, or the store refuses it.
    """
    folders = {entry.name: layout.checkpoint(entry.recipe) for entry in entries}
    complete = checkpoint_folders(layout.hub).values()  # with a config, which is written last
    if missing := [name for name, folder in folders.items() if folder not in complete]:
        say(f"no checkpoint to publish yet: {', '.join(missing)}")
    present = [folder for folder in folders.values() if folder in complete]
    cnvzoo.publish(present, to, tag=tag, dry_run=dry_run, on_published=print)


def keep_missing(entries: Iterable[Entry], records: Records, verify: Callable[..., list[Verification]]) -> list[Path]:
    """Write the missing checkpoints of the finished runs of `entries`; returns the folders written.

    Only weights of the record in the table are published, and only if `verify`, called as cnvzoo.verify, confirms the
    accuracy of the record. If they are published already and only other facts have changed, because another seed has
    finished since, only the config and the model card are written.

    Raises:
        HarnessError: the weights do not have the accuracy of their record; their checkpoint is not written. Or the
            published checkpoint has other weights than the record, and those of the record are not here.
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
        elif is_new := recorded_weights(weights, record) is not None:
            _check(facts, weights, records.layout.record(entry.name, PUBLISHED_SEED), verify)
            write_checkpoint(folder, facts, weights)
        else:
            _check_published(folder, record, records.layout)
            continue
        if write_card(folder) or is_new:
            kept.append(folder)
    return kept


def _check(facts: CheckpointFacts, weights: Path, record: Path, verify: Callable[..., list[Verification]]) -> None:
    """Raise HarnessError if the checkpoint of these weights does not have the accuracy of its record."""
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch) / facts.name
        write_checkpoint(staged, facts, weights)
        (result,) = verify([staged])
    if result.problem:
        why = "it could not be scored again" if result.missing_data else "its weights do not confirm it"
        raise HarnessError(f"{shown(record)}: not published, because {why}: {result.problem}")


def _check_published(folder: Path, record: RunRecord, layout: Layout) -> None:
    """Raise HarnessError if the checkpoint in `folder`, where there is one, has other weights than `record`."""
    try:
        published = read_config(folder).weights_sha256
    except CheckpointError:  # there is none, or `cnvzoo verify` reports it
        return
    if published != record.weights_sha256:
        weights = layout.run_dir(record.entry, record.seed) / RUN_WEIGHTS
        raise HarnessError(
            f"its weights are not those of {shown(layout.record(record.entry, record.seed))}: copy those of that run "
            f"to {shown(weights)}, and its record beside them"
        )


def _published(folder: Path, facts: CheckpointFacts) -> CheckpointConfig | None:
    """The config of the checkpoint in `folder` if its weights are those of the facts, else None."""
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
    """Measure the integer graph of every quantized checkpoint that has not been measured; returns the folders written.

    A checkpoint that cannot be measured is reported and skipped. `measure` takes a model and the name of its dataset.
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
            result = measure(model, entry.recipe.dataset)
        except (CheckpointError, DeployError) as error:
            say(f"{folder.name}: not measured as an integer graph: {error}")
            continue
        write_config(folder, config.model_copy(update={"integer": result}))
        write_card(folder)
        say(
            f"{folder.name}: as an integer graph {result.correct:,} of {config.total:,} correct, the class of PyTorch "
            f"for {result.agreeing:,}, {result.bytes:,} bytes"
        )
        written.append(folder)
    return written


def render_index(hub: Path, before: Mapping[str, PublishedCheckpoint] | None = None) -> tuple[str, list[str]]:
    """The text of index.json for the checkpoints in `hub`, and a line for each problem.

    Args:
        hub: the directory of the checkpoints.
        before: the checkpoints in the previous index. Damaged checkpoints keep their values from it; those whose
            folders were removed are dropped.
    """
    before = before or {}
    folders = checkpoint_folders(hub) | {name: hub / name for name in before if (hub / name).is_dir()}
    checkpoints, problems = {}, []
    for name, folder in folders.items():
        try:
            checkpoints[name] = _described(folder)
        except CnvzooError as error:
            if name in before:
                checkpoints[name] = before[name]
            effect = "its entry in the index stays as it was" if name in before else "left out of the index"
            problems.append(f"{name}: {effect}: {error}")
    problems += [f"{name}: no longer in the index: {hub / name} is gone" for name in sorted(before.keys() - folders)]
    index = Index(checkpoints=dict(sorted(checkpoints.items())))
    return json.dumps(index.model_dump(mode="json"), indent=1) + "\n", problems


def update_index(path: Path, hub: Path) -> list[str]:
    """Write the index at `path` for the checkpoints in `hub`; returns a line for each problem.

    Raises:
        HarnessError: a checkpoint is damaged, and the index that holds its entry cannot be read; or `hub` is missing.
            The index stays as it was.
    """
    damage, before = None, {}
    try:
        before = read_index(path).checkpoints if path.is_file() else {}
    except CheckpointError as error:
        damage = error
    if before and not hub.is_dir():
        raise HarnessError(f"{shown(hub)} is missing, and the index lists {len(before)} checkpoints in it: restore it")
    text, problems = render_index(hub, before)
    if damage and problems:
        raise HarnessError(f"{'; '.join(problems)}; and the index is damaged too: restore one or the other: {damage}")
    update_text(path, text)
    return problems


def _described(folder: Path) -> PublishedCheckpoint:
    files = checkpoint_files(folder, needed=(WEIGHTS, CONFIG))
    facts = {name: FileFacts.of(content) for name, content in sorted(files.items())}
    config = read_config(folder, facts[CONFIG])
    if config.dataset is None or config.correct is None or config.total is None:
        raise CheckpointError(f"{folder}: the index takes checkpoints with a result on the test set of a dataset only")
    cost = _cost(json.dumps(config.model | {"input_size": config.preprocessing["size"]}))
    return PublishedCheckpoint(
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
    """Parameters and operations of the model with these arguments, given as JSON; counting runs the model once."""
    return cnvzoo.model_info(**json.loads(arguments))
