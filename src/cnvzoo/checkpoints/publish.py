"""From checkpoint folders to a store: their model cards, and sending them.

The library's front: models by name, what they cost, and training and evaluating them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from cnvzoo.checkpoints.card import render_card
from cnvzoo.checkpoints.folder import checkpoint_folders, read_config, read_model
from cnvzoo.checkpoints.format import CARD, CheckpointError, CheckpointFacts, SeedResult
from cnvzoo.checkpoints.locations import hub_location, is_path, open_store, printed
from cnvzoo.checkpoints.store import Publication, Store
from cnvzoo.data.datasets import dataset_info
from cnvzoo.errors import nearest
from cnvzoo.files import expanded, update_text
from cnvzoo.models.registry import model_info
from cnvzoo.training.evaluation import preprocessing_of
from cnvzoo.training.recipe import Recipe
from cnvzoo.training.record import RunRecord


def publish(
    checkpoints: str | Path | Iterable[str | Path],
    to: str | Path | Store,
    *,
    hub: str | Path | None = None,
    message: str | None = None,
    tag: str | None = None,
    dry_run: bool = False,
    on_published: Callable[[Publication], object] = lambda publication: None,
) -> list[Publication]:
    """Send checkpoints to a store: weights, config and model card, in one commit each; nothing where nothing changed.

    Args:
        checkpoints: names in `hub`, or paths of folders; one or several.
        to: a directory, or `hf://ORG` for the model repositories `ORG/<name>`, which are made where they are missing.
            Log in with `hf auth login` first; no token is taken in any other way. Or a store that is open.
        hub: the directory that has the names; default `CNVZOO_HUB`, else the checkout's own `hub/`.
        message: of the commits; default: name and accuracy.
        tag: to set at each, once and for all, such as a release of yours.
        dry_run: only compare.
        on_published: called with each publication as soon as it is done.

    Returns:
        For each checkpoint, which files are new, changed and unchanged, and the commit.

    Raises:
        CheckpointError: a folder is not a whole checkpoint with its card: nothing was sent.
        StoreError: the store does not take one; those before it are published.
    """
    if isinstance(checkpoints, (str, Path)):
        checkpoints = [checkpoints]
    folders = [_folder(checkpoint, hub) for checkpoint in checkpoints]
    messages = {folder: message or _message(folder) for folder in folders}  # looks at all before the first is sent
    store = open_store(to) if isinstance(to, (str, Path)) else to
    publications = []
    for folder in folders:
        publications.append(store.publish(folder, message=messages[folder], tag=tag, dry_run=dry_run))
        on_published(publications[-1])
    return publications


def write_card(folder: str | Path) -> bool:
    """Write the model card of a checkpoint, README.md, from its config; returns whether it was another before.

    Raises:
        CheckpointError: the folder has no valid config.
        ModelError: there is no model with its arguments, or none that takes images of its size.
    """
    folder = Path(folder)
    config = read_config(folder)
    info = model_info(**config.model | {"input_size": config.preprocessing["size"]})
    card = render_card(config, info.summary, info.parameters, info.macs)
    return update_text(folder / CARD, card)


def _folder(checkpoint: str | Path, hub: str | Path | None) -> Path:
    if is_path(checkpoint):
        return expanded(checkpoint)
    location = hub_location(hub)
    if "://" in str(location):
        raise CheckpointError(
            f"{checkpoint} is to be read from {printed(location)}: give a directory with hub= or CNVZOO_HUB"
        )
    root = expanded(location)
    known = checkpoint_folders(root)
    if str(checkpoint) not in known:
        choices = nearest(str(checkpoint), known) if known else "it has none at all"
        raise CheckpointError(f"no checkpoint {str(checkpoint)!r} in {root}: {choices}")
    return root / checkpoint


def _message(folder: Path) -> str:
    """What the commit says; a checkpoint that could not be loaded afterwards is refused here."""
    _, config = read_model(folder)
    return f"{config.name}: {config.accuracy:.2f} % top-1 ({config.correct} of {config.total})"


def checkpoint_facts(
    record: RunRecord, others: Iterable[RunRecord] = (), *, recipes_scored: int | None = None
) -> CheckpointFacts:
    """What a checkpoint of a finished run says of itself.

    Args:
        record: of the run.
        others: the records of the recipe's other seeds.
        recipes_scored: how many recipes of the entry were ever scored on the test set, where that is known.
    """
    recipe = Recipe.model_validate(record.recipe)
    info = dataset_info(recipe.dataset)
    bits = {} if recipe.w_bits is None else {"w_bits": recipe.w_bits, "a_bits": recipe.a_bits}
    return CheckpointFacts(
        name=f"{recipe.tag}.{recipe.dataset}",
        model={"name": recipe.model, "num_classes": info.num_classes, "in_chans": info.in_chans, **bits},
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
            for r in sorted((record, *others), key=lambda r: r.seed)
        ],
        weights_sha256=record.weights_sha256,
        recipe=record.recipe,
        versions=record.versions,
        device=record.device,
        commit=record.commit,
        numerics=record.numerics,
        recipes_scored=recipes_scored,
    )
