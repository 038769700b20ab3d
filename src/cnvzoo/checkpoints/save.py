"""Saving a model as a checkpoint folder: facts from the record of its run, weights, and the model card."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from cnvzoo.checkpoints.card import render_card
from cnvzoo.checkpoints.folder import check_replaceable, encoded, read_config, read_plain_file, write_encoded
from cnvzoo.checkpoints.format import (
    CARD,
    CheckpointConfig,
    CheckpointError,
    CheckpointFacts,
    FileFacts,
    SeedResult,
    Trial,
    checked_classes,
    checked_name,
)
from cnvzoo.checkpoints.locations import is_path
from cnvzoo.checkpoints.weights import builder_errors, tensors_file
from cnvzoo.data.datasets import is_dataset_path
from cnvzoo.data.preprocessing import Preprocessing
from cnvzoo.data.published import dataset_info, published_sha256
from cnvzoo.errors import ModelError, explain
from cnvzoo.files import expanded, update_text
from cnvzoo.models.classifier import class_names
from cnvzoo.models.registry import model_info
from cnvzoo.training.evaluation import preprocessing_of
from cnvzoo.training.recipe import Recipe
from cnvzoo.training.record import RunRecord


def checkpoint_facts(
    record: RunRecord, others: Iterable[RunRecord] = (), *, recipes_scored: int | None = None
) -> CheckpointFacts:
    """The facts of the checkpoint of a finished run.

    Args:
        record: the record of the run.
        others: the records of the recipe's other seeds.
        recipes_scored: how many recipes of the entry were ever scored on the test set, where that is known.

    Raises:
        CheckpointError: the record has a value that a config cannot have.
    """
    try:
        return _facts(record, sorted((record, *others), key=lambda r: r.seed), recipes_scored)
    except ValidationError as error:
        run = f"the record of {record.recipe.get('name')}, seed {record.seed}"
        raise CheckpointError(f"{run}: a checkpoint config cannot have its values: {explain(error)}") from None


def _facts(record: RunRecord, records: Iterable[RunRecord], recipes_scored: int | None) -> CheckpointFacts:
    recipe = Recipe.model_validate(record.recipe)
    info = dataset_info(recipe.dataset)
    return CheckpointFacts(
        name=f"{recipe.tag}.{recipe.dataset}",
        model={"name": recipe.model, "num_classes": info.num_classes, "in_chans": info.in_chans, **recipe.bit_widths},
        dataset=recipe.dataset,
        classes=list(info.classes),
        preprocessing=preprocessing_of(recipe.model, recipe.dataset).to_dict(),
        seed=record.seed,
        correct=record.correct,
        total=record.total,
        results=[
            SeedResult(
                seed=r.seed, correct=r.correct, total=r.total, weights_sha256=r.weights_sha256, numerics=r.numerics
            )
            for r in records
        ],
        weights_sha256=record.weights_sha256,
        recipe=record.recipe,
        versions=record.versions,
        device=record.device,
        commit=record.commit,
        numerics=record.numerics,
        recipes_scored=recipes_scored,
    )


def write_card(folder: str | Path) -> bool:
    """Write the model card README.md of a checkpoint from its config; returns whether the card changed.

    Raises:
        CheckpointError: the folder has no valid config, or its model cannot be built.
        ModelError: no model has its arguments, or takes images of its size.
    """
    folder = expanded(folder)
    card = _card(read_config(folder))
    if (folder / CARD).is_symlink():
        read_plain_file(folder / CARD)  # refuses it
    return update_text(folder / CARD, card)


def _card(config: CheckpointConfig) -> str:
    with builder_errors(f"{config.name}: its model"):
        info = model_info(**config.model | {"input_size": config.preprocessing["size"]})
    return render_card(config, info.summary, info.parameters, info.macs)


def write_model(
    model: nn.Module,
    folder: str | Path,
    *,
    preprocessing: Preprocessing,
    classes: Sequence[str] | None = None,
    record: RunRecord | None = None,
) -> CheckpointConfig:
    """Write a checkpoint folder with a model's weights, config and card; see `cnvzoo.save_checkpoint`.

    Args:
        record: the record of the run that the model comes from. Without one, or where held-out images were scored, the
            checkpoint has no accuracy. Where the run had other images than the dataset that its recipe names has, the
            checkpoint has no dataset and no accuracy either.
    """
    folder = expanded(folder)
    check_replaceable(folder)
    arguments, outputs = getattr(model, "arguments", None), getattr(model, "num_classes", 0)
    if not isinstance(arguments, dict):
        raise ModelError(f"{type(model).__name__} is not a model of cnvzoo: only those can be saved")
    if not outputs:
        raise ModelError(
            f"{type(model).__name__} has no last layer, and a checkpoint needs one: give it one "
            "(model.reset_classifier) and train it"
        )
    names = list(class_names(model, outputs) if classes is None else checked_classes(classes))
    if len(names) != outputs:
        raise ModelError(f"{len(names)} classes were given, and the model has {outputs}")
    content = _content(model)
    if record is not None and FileFacts.of(content).sha256 != record.weights_sha256:
        raise CheckpointError(
            f"{folder}: the model no longer has the weights that its record scored: save it without the record "
            "(the model of the result alone), which gives a checkpoint without accuracy, or train it again"
        )
    known = {} if record is None else _known_of(record)
    try:
        facts = CheckpointFacts(
            name=checked_name(folder.resolve().name),  # as `publish` and loading name it, also through a link
            model={**arguments, "num_classes": outputs, "in_chans": preprocessing.in_chans},
            classes=names,
            preprocessing=preprocessing.to_dict(),
            **known,
        )
    except ValidationError as error:
        raise CheckpointError(f"{folder}: a checkpoint config cannot have these values: {explain(error)}") from None
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    config, content = encoded(facts, content, type(model).__name__)
    write_encoded(folder, config, content, _card(config))
    return config


def _content(model: nn.Module) -> bytes:
    """A safetensors file of the whole state, in float32."""
    state = model.state_dict()
    if other := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(f"{type(model).__name__}: {', '.join(other)} is in its state and not a tensor")
    tensors = {name: tensor.detach().cpu() for name, tensor in state.items()}
    return tensors_file({name: t.float() if t.is_floating_point() else t for name, t in tensors.items()})


def _known_of(record: RunRecord) -> dict[str, Any]:
    """The facts that a record has about the checkpoint of a user's own run.

    Of a path in the recipe only the last part is kept: the others are of the machine and not of the run.
    """
    recipe, values = record.parsed_recipe(), record.recipe
    trial = Trial(epochs=record.epochs, holdout=record.holdout) if record.trial else None
    known: dict[str, Any] = {
        "seed": record.seed, "versions": record.versions, "device": record.device, "commit": record.commit,
        "numerics": record.numerics, "trial": trial,
    }  # fmt: skip
    if is_dataset_path(recipe.dataset) or record.data_sha256 == published_sha256(recipe.dataset):
        known["dataset"] = recipe.dataset_name
        if not record.holdout:
            known |= {"correct": record.correct, "total": record.total}
    else:  # images were given in place of those that the recipe names
        values = {key: value for key, value in values.items() if key != "dataset"}
    for key in ("dataset", "start"):
        if isinstance(source := values.get(key), str) and is_path(source):
            values = values | {key: f"./{expanded(source).absolute().name}"}
    return known | {"recipe": values}
