"""One run: from a recipe to a record and weights, through any number of interruptions.

A run has a folder. While it is under way, the folder holds `state.safetensors` and, for a teacher with views,
`teacher_logits.safetensors`; when it is done, `record.json` and `weights.safetensors`. The state is saved every minute,
at a signal and at a deadline, and each file is replaced in one step. So a run that is killed at any time resumes from a
complete state, and ends with the bits of a run that was never interrupted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cnvzoo.data.batches import TrainBatches
from cnvzoo.data.datasets import Dataset, is_dataset_path, load_dataset
from cnvzoo.data.published import published_sha256
from cnvzoo.errors import in_a_line
from cnvzoo.files import FileError, expanded, replacing, sha256_of
from cnvzoo.models.registry import model_spec
from cnvzoo.progress import TrainingProgress, print_line
from cnvzoo.training.device import deterministic, keep_freed_memory, resolve_device
from cnvzoo.training.distillation import precompute_logits
from cnvzoo.training.evaluation import count_correct, preprocessing_for
from cnvzoo.training.inputs import StartingModel, describe_inputs, initial_model, load_teacher
from cnvzoo.training.numerics import NUMERICS, describe_machine, describe_versions, warn_of_slow_loops
from cnvzoo.training.recipe import LARGEST_SEED, Recipe
from cnvzoo.training.record import RecordError, RunRecord, current_commit
from cnvzoo.training.state import (
    RECORD,
    RUN_WEIGHTS,
    STATE,
    TEACHER_LOGITS,
    RunError,
    RunIdentity,
    RunInterrupted,
    alone_in,
    caught_signals,
    plain_copies,
    resume,
    save_state,
)
from cnvzoo.training.trainer import Trainer
from cnvzoo.training.watch import EpochReport, Watch, check_validation
from cnvzoo_runtime.metadata import whole_number


@keep_freed_memory()
def run_recipe(
    recipe: Recipe,
    *,
    run_dir: str | Path,
    seed: int | None = None,
    device: str | torch.device = "auto",
    epochs: int | None = None,
    holdout: int = 0,
    deadline: float | None = None,
    stop: Callable[[], str | None] | None = None,
    dataset: Dataset | None = None,
    data_root: str | Path | None = None,
    float_start: str | Path | None = None,
    teacher: str | Path | Sequence[str | Path] | None = None,
    start: StartingModel | None = None,
    validate: int = 0,
    on_epoch: Callable[[EpochReport], object] | None = None,
    log: str | Path | None = None,
    tensorboard: str | Path | None = None,
    quiet: bool = False,
    save_every: float = 60.0,
) -> RunRecord:
    """Train by a recipe and score the result, resuming from the state of the same run in `run_dir`.

    Args:
        recipe: what to train.
        run_dir: folder of this run alone; here and in other paths, a leading `~` is the home folder.
        seed: replaces the recipe's; 0 to 2**63 - 1.
        device: `auto`, or anything torch.device takes.
        epochs: replaces the recipe's; another number makes the run a trial.
        holdout: number of training images that are held out of training and scored instead of the test set.
        deadline: `time.monotonic()` at which to stop.
        stop: called before every step; a text that it returns is the reason to stop. It can stop a run in a thread
            other than the main one, where Python handles no signals.
        dataset: replaces loading the recipe's dataset from `data_root`; needed for own images, which `cnvzoo.train`
            loads.
        data_root: folder of the dataset cache.
        float_start: safetensors file with the weights of the recipe's float_start; needed if it has one.
        teacher: safetensors file with the teacher's weights, or one for each of the recipe's teachers, in its order.
            With a holdout, use teachers that held out the same images: others were trained on their labels. This is not
            checked.
        start: the checkpoint of the recipe's `start`; `cnvzoo.train` loads it.
        validate: number of held-out images, at most `holdout`, that are scored after each epoch. They are spread
            evenly, since own images are in the order of their classes. The record's history has the accuracies. The
            weights are those of a run without validation.
        on_epoch: called with an `EpochReport` after each epoch that ends in this call. An exception that it raises,
            SystemExit and KeyboardInterrupt too, stops the run, saves the state, and is raised.
        log: CSV file with a line for each epoch of the run.
        tensorboard: folder of event files for TensorBoard, with values for each epoch of the run.
        quiet: no progress.
        save_every: seconds between saved states.

    Returns:
        The record, which is also written to `run_dir`, beside the weights.

    Raises:
        RunInterrupted: at the deadline, on SIGINT or SIGTERM, or where `stop` says so; the state is saved.
        RunError: an argument or a key of the recipe is impossible with this dataset, the float start or a teacher is
            missing or does not fit, the saved state cannot be read, `run_dir` holds another finished run, `log` another
            file, or TensorBoard is not installed.
        RecipeError: a key of the recipe is impossible with the images of `dataset`.
        DatasetError: the dataset cannot be loaded, or `holdout` is not below its number of training images.
        RunUnderWay: another process is training in `run_dir`.
        FileError: a file of the run cannot be written; the state that was saved before is kept.
        TrainingDiverged: the loss or a weight is not finite, or a weight is beyond a million. No record is written, and
            the saved state is kept.
        CnvzooError: the device is unknown or not available.
    """
    run_dir = expanded(run_dir)
    recipe = recipe.model_copy(update={"seed": _checked_seed(recipe, recipe.seed if seed is None else seed)})
    epochs = _whole(recipe, "epochs", recipe.epochs if epochs is None else epochs, "a run has at least 1", least=1)
    holdout = _whole(recipe, "holdout", holdout, "a number of training images, 0 for none")
    validate = _whole(recipe, "validate", validate, "a number of held-out images, 0 for no validation")
    check_validation(recipe, validate, holdout)
    watch = Watch.of(recipe, epochs, on_epoch, log, tensorboard)
    target = resolve_device(device)
    float_start = None if float_start is None else expanded(float_start)
    teachers = [expanded(path) for path in ([teacher] if isinstance(teacher, (str, Path)) else teacher or [])]
    started_from = describe_inputs(recipe, "float_start", [] if float_start is None else [float_start])
    taught_by = describe_inputs(recipe, "teacher", teachers)
    if recipe.start != (start.checkpoint if start else None):
        raise RunError(f"{recipe.name}: starts from {recipe.start}, and was given {start and start.checkpoint}")
    if dataset is not None:
        recipe.check_fits(dataset.info)
    elif is_dataset_path(recipe.dataset):
        raise RunError(f"{recipe.name}: trains on own images: give them, dataset=load_dataset({recipe.dataset!r})")
    data_sha256 = published_sha256(recipe.dataset) if dataset is None else dataset.sha256
    identity = RunIdentity(
        recipe=recipe.fingerprint(data_sha256),
        seed=recipe.seed,
        epochs=epochs,
        holdout=holdout,
        numerics=NUMERICS,
        data=data_sha256,
        float_start=started_from[0] if started_from else None,
        teacher=taught_by[0] if len(taught_by) == 1 else taught_by or None,
        start={"checkpoint": start.checkpoint, "weights_sha256": start.weights_sha256} if start else None,
    )
    commit = current_commit()  # read now: the checkout may have moved on by the end of the run

    # gradients are computed whatever the caller has set
    with alone_in(run_dir), deterministic(target), torch.inference_mode(False), torch.enable_grad():
        if finished := _finished_record(run_dir, identity):
            with watch.started(finished.history):
                return finished
        machine, versions = describe_machine(target), describe_versions(recipe.model, target)
        if not quiet:
            warn_of_slow_loops(machine)
        data = dataset or load_dataset(recipe.dataset, root=data_root)
        data = data.holdout(holdout) if holdout else data
        trainer = Trainer(
            initial_model(recipe, data, float_start, start).to(target),
            _train_batches(recipe, data, target),
            recipe,
            epochs,
            load_teacher(recipe, data, teachers, target),
        )
        conditions = machine | {name: text for name, text in versions.items() if name not in ("python", "cnvzoo")}
        if (set_aside := resume(trainer, run_dir / STATE, identity, conditions)) and not quiet:
            print_line(f"{recipe.run_name}: the state of another run was moved to {set_aside}")
        preprocessing = preprocessing_for(model_spec(recipe.model), data.info)

        def epoch_ended(trainer: Trainer) -> None:
            if validate:
                chosen = torch.arange(validate, device="cpu") * len(data.test_labels) // validate
                images, labels = data.test_images[chosen], data.test_labels[chosen]
                right = count_correct(trainer.model, images, labels, preprocessing, quiet=True)
                trainer.history[-1]["validation_accuracy"] = round(100 * right / validate, 4)
            watch.epoch_ended(trainer.history[-1])

        with watch.started(trainer.history):
            reason = _train(trainer, run_dir, identity, conditions, deadline, stop, quiet, save_every, epoch_ended)
        if reason:
            raise RunInterrupted(recipe.run_name, reason, trainer.step, trainer.total_steps, run_dir)

        if recipe.quantize_bias:
            from cnvzoo.models.integers import quantize_bias  # importing Brevitas takes a second

            quantize_bias(trainer.model)
        trainer.check_weights("at the end")
        correct = count_correct(trainer.model, data.test_images, data.test_labels, preprocessing, quiet=quiet)
        total = len(data.test_labels)

        with replacing(run_dir / RUN_WEIGHTS) as temporary:
            save_file(plain_copies(trainer.model.state_dict()), temporary)
        record = RunRecord(
            entry=recipe.name,
            seed=recipe.seed,
            numerics=NUMERICS,
            epochs=epochs,
            trial=epochs != recipe.epochs or holdout > 0,
            holdout=holdout,
            accuracy=round(100 * correct / total, 4),
            correct=correct,
            total=total,
            recipe=recipe.model_dump(mode="json"),
            recipe_sha256=identity.recipe,
            data_sha256=identity.data,
            weights_sha256=sha256_of(run_dir / RUN_WEIGHTS),
            seconds=round(trainer.seconds, 1),
            device=machine,
            versions=versions,
            commit=commit,
            float_start=identity.float_start,
            teacher=identity.teacher,
            start=identity.start,
            finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            history=trainer.history,
        )
        record.write(run_dir / RECORD)
        for name in (STATE, TEACHER_LOGITS):
            (run_dir / name).unlink(missing_ok=True)
        return record


def _whole(recipe: Recipe, argument: str, value: Any, meaning: str, least: int = 0) -> int:
    """The value as an int, which JSON takes; RunError unless it is a whole number of any type, numpy's too."""
    number = whole_number(value)
    if number is None or number < least:
        raise RunError(f"{recipe.name}: {argument}={value!r}: {meaning}")
    return number


def _checked_seed(recipe: Recipe, seed: Any) -> int:
    meaning = f"a seed is a whole number from 0 to {LARGEST_SEED} (2**63 - 1)"
    number = _whole(recipe, "seed", seed, meaning)
    if number > LARGEST_SEED:
        raise RunError(f"{recipe.name}: seed={number}: {meaning}")
    return number


def _finished_record(run_dir: Path, identity: RunIdentity) -> RunRecord | None:
    """The record of this run, if the folder holds it with its weights; raises RunError for another finished run.

    So is one whose record only another program can read, with a model that is not registered here or a later key:
    training would replace it. A record that was cut off counts as none.
    """
    remedy = "give another folder, or move that one away"
    try:
        record, problem = RunRecord.read(run_dir / RECORD), ""
        values = record.model_dump()
    except RecordError as error:
        record, problem, values = None, in_a_line(error), _json_object(run_dir / RECORD)
    try:
        if values is None or sha256_of(run_dir / RUN_WEIGHTS) != values.get("weights_sha256"):
            return None
    except OSError:
        return None
    if (found := RunIdentity.of(values)) != identity:
        differences = [f"{key} {value!r}" for key, value in asdict(found).items() if value != getattr(identity, key)]
        raise RunError(
            f"{run_dir}: holds the finished run of {values.get('entry')}, seed {found.seed}, which differs in "
            f"{', '.join(differences)}: {remedy}"
        )
    if record is None:
        raise RunError(f"{problem}: {remedy}")
    return record


def _json_object(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _train_batches(recipe: Recipe, data: Dataset, device: torch.device) -> TrainBatches:
    try:
        return TrainBatches(
            data.train_images,
            data.train_labels,
            num_classes=data.info.num_classes,
            preprocessing=preprocessing_for(model_spec(recipe.model), data.info),
            augmentation=recipe.augmentation,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            device=device,
            views=recipe.distillation.views,
        )
    except ValueError as error:  # the recipe was checked against the whole dataset, and images may be held out
        raise RunError(f"{recipe.run_name}: {error}") from None


def _train(
    trainer: Trainer,
    run_dir: Path,
    identity: RunIdentity,
    conditions: dict[str, Any],
    deadline: float | None,
    stop: Callable[[], str | None] | None,
    quiet: bool,
    save_every: float,
    epoch_ended: Callable[[Trainer], None],
) -> str | None:
    """Train to the end or to a reason to stop, save the state, and return the reason.

    An exception of `epoch_ended` stops the training too, and is raised when the state is saved; that of a second SIGINT
    is raised at once.
    """
    saved = time.monotonic()
    failures: list[BaseException] = []
    with caught_signals() as reasons:

        def should_stop() -> bool:
            if stop is not None and (reason := stop()):
                reasons.append(reason)
            return bool(reasons or failures) or (deadline is not None and time.monotonic() >= deadline)

        def save() -> None:
            nonlocal saved
            save_state(trainer, run_dir / STATE, identity, conditions)
            saved = time.monotonic()

        def after_step(trainer: Trainer) -> None:
            if trainer.step % trainer.steps_per_epoch == 0:
                try:
                    epoch_ended(trainer)
                except BaseException as error:  # of the caller's function, or of writing a log
                    if isinstance(error, KeyboardInterrupt) and reasons:
                        raise
                    failures.append(error)
            progress(trainer)
            if time.monotonic() - saved >= save_every:
                save()

        try:
            facts = {"identity": asdict(identity), "conditions": conditions}
            if trainer.batches.views is None or _precompute(trainer, run_dir, facts, quiet, should_stop):
                with TrainingProgress(trainer.recipe.run_name, trainer, quiet, trainer.compiles) as progress:
                    trainer.train(should_stop, after_step)
            save()
        except FileError as error:
            if failures:
                raise failures[0] from error
            if not reasons:
                raise
            # a run that was told to stop stops, even where its state cannot be saved
            raise RunInterrupted(
                trainer.recipe.run_name, reasons[0], trainer.step, trainer.total_steps, error.path.parent, str(error)
            ) from error
        except RuntimeError as error:
            if not reasons:
                raise
            # a signal to the process group also ends a compiler that a step waits for: the step failed halfway, so its
            # state is not saved, and the one saved before is kept
            raise RunInterrupted(
                trainer.recipe.run_name, reasons[0], trainer.step, trainer.total_steps, run_dir,
                f"a step failed: {in_a_line(error)}",
            ) from error  # fmt: skip
    if failures:
        raise failures[0]
    if reasons:
        return reasons[0]
    return "time limit" if trainer.step < trainer.total_steps else None


def _precompute(
    trainer: Trainer, run_dir: Path, facts: dict[str, Any], quiet: bool, should_stop: Callable[[], bool]
) -> bool:
    """Precompute the teacher's logits for all views that training will use; False if `should_stop()` came first."""
    batches, teacher = trainer.batches, trainer.teacher
    assert teacher is not None
    sides = [trainer.crop_side(epoch) for epoch in range(trainer.total_steps // trainer.steps_per_epoch)]
    views = {batches.view_of(epoch, side): side for epoch, side in enumerate(sides)}
    label = f"{trainer.recipe.run_name}: teacher logits of all views"
    return precompute_logits(
        teacher, batches, run_dir / TEACHER_LOGITS, facts, views=views, autocast=trainer.autocast,
        should_stop=should_stop, label=label, quiet=quiet,
    )  # fmt: skip
