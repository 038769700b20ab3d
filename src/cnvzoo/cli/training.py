"""The command that trains a recipe."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import cnvzoo
from cnvzoo.cli.app import app
from cnvzoo.cli.imports import Import
from cnvzoo.cli.options import DataRoot, Device, Hub, Threads, checkpoint_names, recipe_names

if TYPE_CHECKING:
    from cnvzoo.training.recipe import Recipe

_EXIT_STATUS = {"SIGINT": 130, "SIGTERM": 143}  # as shells report these signals
_INTERRUPTED = 3


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="Name of a recipe of cnvzoo, or the path of a YAML file.", autocompletion=recipe_names)
    ],
    run_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for state, weights and record; default runs/RECIPE/seedN, for a trial "
            "runs/trials/RECIPE/seedN-MODE."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Replaces the recipe's; 0 or more.")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Replaces the recipe's; any other number makes the run a trial.")
    ] = None,
    holdout: Annotated[
        int,
        typer.Option(min=0, help="Hold out this many training images and score on them instead of the test set."),
    ] = 0,
    float_start: Annotated[
        str | None,
        typer.Option(
            help="The float model that the recipe starts from: its weights.safetensors, or a checkpoint.",
            autocompletion=checkpoint_names,
        ),
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            help="A teacher of the recipe: its weights.safetensors, or a checkpoint; repeat it for several, in order.",
            autocompletion=checkpoint_names,
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Replaces the recipe's: the name of a dataset, or the path of own images, a folder for each class."
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint to fine-tune, by name or folder; replaces the recipe's.", autocompletion=checkpoint_names
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Write the trained model as a checkpoint to this folder too.")
    ] = None,
    hub: Hub = None,
    device: Device = "auto",
    validate: Annotated[
        int, typer.Option(min=0, help="Score so many of the held-out images after each epoch; needs --holdout.")
    ] = 0,
    log: Annotated[
        Path | None, typer.Option(help="CSV file with a line for each epoch; resuming continues it.")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Folder for TensorBoard, which has to be installed: cnvzoo[tensorboard].")
    ] = None,
    threads: Threads = None,
    time_limit: Annotated[float | None, typer.Option(min=0, help="Stop after this many seconds; resumable.")] = None,
    data_root: DataRoot = None,
    imported: Import = None,
) -> None:
    """Train a recipe and score it on the test set, or on a held-out part of the training set.

    An interrupted run resumes when the same command is run again, and ends with the same weights.

    Example: `cnvzoo train mnist_cnv --epochs 2 --holdout 5000`, or, on own images,
    `cnvzoo train cifar10_quant_cnv_w2a2 --start quant_cnv_w2a2.cifar10 --dataset photos/ --checkpoint my_model`
    """
    from cnvzoo.checkpoints.folder import check_replaceable
    from cnvzoo.checkpoints.format import checked_name
    from cnvzoo.files import expanded
    from cnvzoo.training.state import RunInterrupted

    if checkpoint is not None:  # before the run, which may take hours
        try:
            checked_name(expanded(checkpoint).name)
        except ValueError as error:
            raise typer.BadParameter(f"--checkpoint {checkpoint}: {error}") from None
        check_replaceable(expanded(checkpoint))
    loaded = cnvzoo.load_recipe(recipe)
    folder = _run_dir(loaded, seed, epochs, holdout, dataset, start) if run_dir is None else expanded(run_dir)
    deadline = None if time_limit is None else time.monotonic() + time_limit
    from cnvzoo.training.device import using_threads

    try:
        with using_threads(threads):
            result = cnvzoo.train(
                loaded, run_dir=folder, seed=seed, epochs=epochs, holdout=holdout, float_start=float_start,
                teacher=teacher, device=device, deadline=deadline, data_root=data_root,
                validate=validate, log=log, tensorboard=tensorboard, dataset=dataset, start=start, hub=hub,
            )  # fmt: skip
    except RunInterrupted as interruption:
        typer.echo(str(interruption), err=True)
        raise typer.Exit(_EXIT_STATUS.get(interruption.reason, _INTERRUPTED)) from None
    record = result.record
    name = record.parsed_recipe().dataset_name
    scored_on = f"{holdout:,} held-out training images" if holdout else f"the test set of {name}"
    trial = ", a trial" if record.trial else ""
    typer.echo(f"{record.entry}, seed {record.seed}: {record.accuracy:.2f} % on {scored_on}{trial}")
    typer.echo(f"record and weights: {folder}")
    if checkpoint is not None:
        cnvzoo.save_checkpoint(result, checkpoint)
        typer.echo(f"checkpoint: {checkpoint}")


def _run_dir(
    recipe: Recipe, seed: int | None, epochs: int | None, holdout: int, dataset: str | None, start: str | None
) -> Path:
    """The default folder of a run. Trials, and runs with another dataset or start, have folders of their own.

    So none of them replaces a full run of the recipe, which reproduce.py keeps there too.
    """
    from cnvzoo.data.datasets import dataset_path_name, is_dataset_path
    from cnvzoo.files import expanded

    entry, name = recipe.name, f"seed{recipe.seed if seed is None else seed}"
    if dataset is not None and dataset != recipe.dataset:
        entry += f"-on-{dataset_path_name(dataset) if is_dataset_path(dataset) else dataset}"
    if start is not None and start != recipe.start:
        entry += f"-from-{expanded(start).absolute().name}"
    is_short = epochs is not None and epochs != recipe.epochs
    if not is_short and not holdout:
        return Path("runs") / entry / name
    mode = (f"-{epochs}epochs" if is_short else "") + (f"-holdout{holdout}" if holdout else "")
    return Path("runs") / "trials" / entry / f"{name}{mode}"
