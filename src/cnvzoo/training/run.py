"""SIGINT and SIGTERM as a request to stop at the next step, in place of a traceback in the middle of one.

One run: from a recipe to a record and weights, through any number of interruptions.

A run lives in a folder: `state.safetensors` while it is under way, `record.json` and `weights.safetensors` when
it is done. State is saved every minute, and at a signal or deadline, by replacing the file in one step; so
whatever kills the process, the run goes on from a whole state and ends with the bits it would have had.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from cnvzoo.data.batches import TrainBatches
from cnvzoo.data.datasets import Dataset, load_dataset, published_sha256
from cnvzoo.files import FileError, expanded, remove_leftovers, replacing, sha256_of, writing
from cnvzoo.models.layers import initialized_from, without_initialization
from cnvzoo.models.registry import build_model, model_spec
from cnvzoo.training.device import deterministic, keep_freed_memory, resolve_device
from cnvzoo.training.distillation import Teacher, precompute_logits
from cnvzoo.training.evaluation import count_correct, preprocessing_of
from cnvzoo.training.numerics import NUMERICS, describe_machine, warn_of_slow_loops
from cnvzoo.training.progress import TrainingProgress
from cnvzoo.training.recipe import LARGEST_SEED, PUBLISHED_SEED, Recipe
from cnvzoo.training.record import RecordError, RunRecord, current_commit
from cnvzoo.training.state import RunError, RunIdentity, RunInterrupted, RunUnderWay, resume, save_state
from cnvzoo.training.trainer import Trainer


@contextmanager
def caught_signals(second: Any = None) -> Iterator[list[str]]:
    """Collect the names of SIGINT and SIGTERM as they come; a second one of a kind acts as ever, or by `second`.

    Outside the main thread, where Python handles no signals, the list stays empty.
    """
    caught: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before: dict[int, Any] = {}

    def handler(number: int, _frame: object) -> None:
        caught.append(signal.Signals(number).name)
        signal.signal(number, before[number] if second is None else second)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handler)
    try:
        yield caught
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


SAVE_EVERY_SECONDS = 60.0
STATE, TEACHER_LOGITS = "state.safetensors", "teacher_logits.safetensors"
RECORD, WEIGHTS = "record.json", "weights.safetensors"
_PURPOSES = {"float_start": "starts from", "teacher": "learns from"}


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
    quiet: bool = False,
    save_every: float = SAVE_EVERY_SECONDS,
) -> RunRecord:
    """Train a recipe to its end and score it, going on from what `run_dir` holds of the same run.

    Args:
        recipe: what to train.
        run_dir: folder of this run alone; a leading `~` is the home folder.
        seed: instead of the recipe's; 0 to 2**63 - 1.
        device: `auto`, or anything torch.device takes.
        epochs: instead of the recipe's; another number makes the run a trial.
        holdout: score on this many training images, which are not trained on, and leave the test set alone.
        deadline: `time.monotonic()` at which to stop.
        stop: asked before every step; a text is the reason to stop for. A thread that is not the main one, where
            Python handles no signals, is stopped by it.
        dataset: instead of loading the recipe's from `data_root`.
        float_start: safetensors file of the float twin's weights; needed if the recipe has a float_start.
        teacher: safetensors file of the teacher's weights, or one for each of the recipe's teachers, in its order. For
            a run with a holdout, of runs that held out the same images, or they would know their labels.
        quiet: no progress.
        save_every: seconds between saved states.

    Returns:
        The record, also written to `run_dir` beside the weights.

    Raises:
        RunInterrupted: at the deadline, on SIGINT or SIGTERM, or where `stop` says so; the state is saved.
        RunError: an argument, or a key of the recipe, is not possible with this dataset; the float start or teacher is
            missing or does not fit, or the saved state cannot be read.
        RunUnderWay: another process is training in `run_dir`.
        FileError: a file of the run cannot be written; the state that was saved before is still there.
        TrainingDiverged: the loss or a weight is not finite, or a weight is beyond a million. No record is written,
            and the saved state stays as it is.
    """
    run_dir = expanded(run_dir)
    recipe = recipe if seed is None else recipe.model_copy(update={"seed": seed})
    epochs = recipe.epochs if epochs is None else epochs
    if epochs < 1:
        raise RunError(f"{recipe.name}: epochs={epochs}: a run has at least 1")
    _check_seed(recipe)
    target = resolve_device(device)
    teachers = [teacher] if isinstance(teacher, (str, Path)) else teacher or []
    start = next(iter(_facts_of(recipe, "float_start", [] if float_start is None else [float_start])), None)
    taught = _facts_of(recipe, "teacher", teachers)
    taught_by = taught[0] if len(taught) == 1 else taught or None
    pixels = published_sha256(recipe.dataset) if dataset is None else dataset.sha256
    identity = RunIdentity(recipe.fingerprint(), recipe.seed, epochs, holdout, NUMERICS, pixels, start, taught_by)
    commit = current_commit()  # of the code that trains: the checkout may have moved by the end
    with alone_in(run_dir), deterministic(target):
        if finished := _finished(run_dir, identity):
            return finished
        machine = describe_machine(target)
        if not quiet:
            warn_of_slow_loops(machine)
        data = dataset or load_dataset(recipe.dataset, root=data_root)
        data = data.holdout(holdout) if holdout else data
        preprocessing = preprocessing_of(recipe.model, recipe.dataset)
        model = _fresh_model(recipe, data, float_start).to(target)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with _refusing(recipe):
            batches = TrainBatches(
                data.train_images,
                data.train_labels,
                num_classes=data.info.num_classes,
                preprocessing=preprocessing,
                augmentation=recipe.augmentation,
                batch_size=recipe.batch_size,
                seed=recipe.seed,
                device=target,
                views=recipe.distillation.views,
            )
        trainer = Trainer(model, batches, recipe, epochs, _teacher(recipe, data, teachers, target))
        versions = _versions(recipe, target)
        deciding = {name: text for name, text in versions.items() if name not in ("python", "cnvzoo")}
        conditions = {**machine, **deciding}
        if (aside := resume(trainer, run_dir / STATE, identity, conditions)) and not quiet:
            print(f"{recipe.run_name}: the state of another run is kept as {aside}", file=sys.stderr)
        save = functools.partial(save_state, trainer, run_dir / STATE, identity, conditions)
        facts = {"identity": asdict(identity), "conditions": conditions}
        prepare = functools.partial(_precompute, trainer, run_dir / TEACHER_LOGITS, facts, quiet)
        if reason := _train(trainer, save, prepare, deadline, stop, quiet, save_every):
            raise RunInterrupted(recipe.run_name, reason, trainer.step, trainer.total_steps, run_dir)
        if recipe.quantize_bias:
            from cnvzoo.models.quant import quantize_bias  # Brevitas takes a second to import

            quantize_bias(model)
        trainer.check_weights("at the end")
        correct = count_correct(model, data.test_images, data.test_labels, preprocessing, quiet=quiet)
        total = len(data.test_labels)

        with replacing(run_dir / WEIGHTS) as temporary:
            save_file({name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}, temporary)
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
            weights_sha256=sha256_of(run_dir / WEIGHTS),
            seconds=round(_seconds(trainer), 1),
            device=machine,
            versions=versions,
            commit=commit,
            float_start=start,
            teacher=taught_by,
            finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            history=trainer.history,
        )
        record.write(run_dir / RECORD)
        for leftover in (STATE, TEACHER_LOGITS):
            (run_dir / leftover).unlink(missing_ok=True)
        return record


@contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """Hold the folder against other processes; the lock goes with the process, however it ends.

    Raises:
        RunUnderWay: another process holds it.
        FileError: the folder cannot be made, or takes no files.
    """
    lock = FileLock(run_dir / ".lock", timeout=0)
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            if not (run_dir / ".lock").exists():  # nobody has it: a folder such as /proc, which takes no files
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
            raise RunUnderWay(
                f"{run_dir}: another process is training this run: wait for it, or give another folder"
            ) from None
    try:
        for name in (STATE, TEACHER_LOGITS, RECORD, WEIGHTS):
            remove_leftovers(run_dir / name)
        yield
    finally:
        lock.release()


def _fresh_model(recipe: Recipe, data: Dataset, float_start: str | Path | None) -> nn.Module:
    with initialized_from(recipe.seed):
        model = build_model(
            recipe.model, num_classes=data.info.num_classes, in_chans=data.info.in_chans,
            w_bits=recipe.w_bits, a_bits=recipe.a_bits,
        )  # fmt: skip
    if recipe.float_start and float_start:
        from cnvzoo.models.quant import start_from_float

        twin = model_spec(recipe.model).float_twin
        assert twin is not None
        normalisation = preprocessing_of(twin, recipe.dataset)
        with _naming(recipe, float_start):
            start_from_float(model, load_file(float_start), normalisation.mean, normalisation.std)
    return model


def _teacher(recipe: Recipe, data: Dataset, files: Sequence[str | Path], device: torch.device) -> Teacher | None:
    nets = []
    for name, weights in zip(recipe.teacher_models, files, strict=True):
        with without_initialization():
            model = build_model(name, num_classes=data.info.num_classes, in_chans=data.info.in_chans)
        with _naming(recipe, weights):
            model.load_state_dict(load_file(weights), strict=True)
        nets.append((model.to(device), preprocessing_of(name, recipe.dataset)))
    return Teacher(nets, preprocessing_of(recipe.model, recipe.dataset), recipe.distillation) if nets else None


def _check_seed(recipe: Recipe) -> None:
    """Raise RunError for a seed that did not go through a recipe's validation, and would not have."""
    seed: Any = recipe.seed
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
        raise RunError(f"{recipe.name}: seed={seed!r}: a seed is a whole number from 0 to {LARGEST_SEED} (2**63 - 1)")


@contextmanager
def _refusing(recipe: Recipe) -> Iterator[None]:
    """Name the run where its recipe turns out to be impossible with the dataset."""
    try:
        yield
    except ValueError as error:
        raise RunError(f"{recipe.run_name}: {error}") from None


@contextmanager
def _naming(recipe: Recipe, weights: str | Path) -> Iterator[None]:
    """Name the run and the file where its weights turn out not to be what they should."""
    try:
        yield
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise RunError(f"{recipe.name}: {weights}: {error}") from None


def _facts_of(recipe: Recipe, purpose: str, files: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Which weights a run has been given as its float start or teacher."""
    entries = recipe.needs.get(purpose, ())
    facts = []
    for entry, weights in itertools.zip_longest(entries, files):
        if entry is None:
            named = f"learns from {', '.join(entries)}" if entries else f"has no {purpose}"
            raise RunError(f"{recipe.name} {named}: {weights} is one file too many for {purpose}: leave it out")
        if weights is None or not Path(weights).is_file():
            raise RunError(
                f"{recipe.name} {_PURPOSES[purpose]} the weights of {entry}, seed {PUBLISHED_SEED}, and "
                f"{weights or 'no file'} was given: train that entry first and give its weights.safetensors"
            )
        facts.append({"entry": entry, "seed": PUBLISHED_SEED, "weights_sha256": sha256_of(weights)})
    return facts


def _finished(run_dir: Path, identity: RunIdentity) -> RunRecord | None:
    """The record of this very run, if the folder holds it with its weights.

    Raises:
        RunError: it holds those of another finished run, which are not to be overwritten.
    """
    try:
        record = RunRecord.read(run_dir / RECORD)
        if sha256_of(run_dir / WEIGHTS) != record.weights_sha256:
            return None
    except (RecordError, OSError):
        return None
    if (found := RunIdentity.of(record)) == identity:
        return record
    others = [f"{key} {theirs!r}" for key, theirs in asdict(found).items() if theirs != getattr(identity, key)]
    raise RunError(
        f"{run_dir}: holds the finished run of {record.entry}, seed {record.seed}, which differs in "
        f"{', '.join(others)}: give another folder, or move that one away"
    )


def _seconds(trainer: Trainer) -> float:
    """What the training took, and what its teachers took beforehand."""
    precomputed = trainer.teacher.precomputed if trainer.teacher else None
    return sum(epoch["seconds"] for epoch in trainer.history) + (precomputed.seconds if precomputed else 0.0)


def _train(
    trainer: Trainer,
    save: Callable[[], None],
    prepare: Callable[[Callable[[], bool]], bool],
    deadline: float | None,
    stop: Callable[[], str | None] | None,
    quiet: bool,
    save_every: float,
) -> str | None:
    """Train to the end, or to a reason to stop, which is returned; the state is saved at either."""
    saved = time.monotonic()
    with caught_signals() as caught:

        def should_stop() -> bool:
            if stop is not None and (reason := stop()):
                caught.append(reason)
            return bool(caught) or (deadline is not None and time.monotonic() >= deadline)

        def after_step(trainer: Trainer) -> None:
            nonlocal saved
            progress(trainer)
            if time.monotonic() - saved >= save_every:
                save()
                saved = time.monotonic()

        try:
            if trainer.batches.views is None or prepare(should_stop):
                with TrainingProgress(trainer.recipe.run_name, trainer, quiet) as progress:
                    trainer.train(should_stop, after_step)
            save()
        except FileError as error:
            if not caught:
                raise
            # told to stop, which is not to be lost for the lack of space
            raise RunInterrupted(
                trainer.recipe.run_name, caught[0], trainer.step, trainer.total_steps, error.path.parent, str(error)
            ) from error
        except RuntimeError:
            if not caught:
                raise
            # a signal to a whole group of processes ends the compiler too that a step may wait for; half a step is not
            # to be saved, and what was saved before it stays
            return caught[0]
    if caught:
        return caught[0]
    return "time limit" if trainer.step < trainer.total_steps else None


def _precompute(
    trainer: Trainer, path: Path, facts: dict[str, Any], quiet: bool, should_stop: Callable[[], bool]
) -> bool:
    """Precompute the teacher's logits for all views that the epochs will show."""
    batches, teacher = trainer.batches, trainer.teacher
    assert teacher is not None
    assert batches.views is not None
    views = min(batches.views, trainer.total_steps // trainer.steps_per_epoch)
    label = f"{trainer.recipe.run_name}: views seen by its teachers"
    return precompute_logits(
        teacher, batches, path, facts, views=views, precision=trainer.precision, should_stop=should_stop,
        label=label, quiet=quiet,
    )  # fmt: skip


def _versions(recipe: Recipe, device: torch.device) -> dict[str, str]:
    versions: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {package: version(package) for package in ("cnvzoo", "numpy")}
    if model_spec(recipe.model).quantized:
        versions["brevitas"] = version("brevitas")
    if device.type == "cuda":
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {name: str(value) for name, value in versions.items()}
