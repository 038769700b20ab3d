"""The folder of a run: its lock, the saved state, and the errors and signals that stop a run before its end.

A state is one safetensors file, which is replaced as a whole. It names its run, and has a checksum of all its content:
a flipped bit of a weight would otherwise lead to other weights with a valid record.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, contiguous_format, uint8

from cnvzoo.errors import CnvzooError
from cnvzoo.files import check_readable, remove_leftovers, replacing, writing

STATE, TEACHER_LOGITS = "state.safetensors", "teacher_logits.safetensors"
RECORD, RUN_WEIGHTS = "record.json", "weights.safetensors"


class RunError(CnvzooError):
    """A run that cannot start or resume: says which folder, why, and what to do."""


class RunUnderWay(RunError):
    """A run whose folder is in use: another process is training in it."""


class UnfitState(RunError):
    """A state of this run that was saved on another kind of machine, or with other versions or settings.

    Attributes:
        path: the file.
        differences: in words.
    """

    def __init__(self, path: Path, differences: str) -> None:
        self.path, self.differences = path, differences
        super().__init__(
            f"{path}: saved with {differences}: weights trained with both could be reproduced with neither. Resume it "
            "with those settings, or delete the file to start over"
        )

    def __reduce__(self) -> tuple[type[UnfitState], tuple[Any, ...]]:
        return type(self), (self.path, self.differences)


class RunInterrupted(CnvzooError):
    """A run that stopped before its end. Its state is saved, unless `unsaved` says why not.

    Attributes:
        reason: `time limit`, `SIGINT`, `SIGTERM`, or what the run's `stop` returned.
        step: number of steps taken, of `total_steps`.
        total_steps: number of steps of the whole run.
        run_dir: folder of the state; None for a run of which nothing is kept.
        unsaved: why the state of this step could not be saved; None if it is saved.
    """

    def __init__(
        self, run: str, reason: str, step: int, total_steps: int, run_dir: Path | None, unsaved: str | None = None
    ) -> None:
        self.reason, self.step, self.total_steps, self.run_dir = reason, step, total_steps, run_dir
        self.unsaved = unsaved
        self._arguments = (run, reason, step, total_steps, run_dir, unsaved)
        if run_dir is None:
            then = "nothing of it is kept, for lack of a run_dir"
        elif unsaved is None:
            then = "the same command resumes there"
        else:
            then = f"the same command resumes from the last state saved, if there is one: {unsaved}"
        super().__init__(f"{run}: stopped ({reason}) after step {step} of {total_steps}; {then}")

    def without_folder(self) -> RunInterrupted:
        """The same of a run whose folder was a temporary one."""
        run, reason, step, total_steps, _, _ = self._arguments
        return RunInterrupted(run, reason, step, total_steps, None)

    def __reduce__(self) -> tuple[type[RunInterrupted], tuple[Any, ...]]:
        """Pickle by the arguments: worker processes send this error to the process that started them."""
        return type(self), self._arguments


@contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """Make the folder, lock it against other processes, and remove temporary files of killed ones.

    The system releases the lock when the process ends, however it ends.

    Raises:
        RunUnderWay: another process holds the lock.
        FileError: the folder cannot be made, or takes no files.
    """
    lock = FileLock(run_dir / ".lock", timeout=0)
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            if not (run_dir / ".lock").exists():  # not held by anyone: a folder that takes no files, such as /proc
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
            raise RunUnderWay(
                f"{run_dir}: another process is training this run: wait for it, or give another folder"
            ) from None
    try:
        for name in (STATE, TEACHER_LOGITS, RECORD, RUN_WEIGHTS):
            remove_leftovers(run_dir / name)
        yield
    finally:
        lock.release()


@contextmanager
def caught_signals(second: Any = None) -> Iterator[list[str]]:
    """Collect the names of SIGINT and SIGTERM instead of raising in the middle of a step.

    A second signal of the same kind is handled by `second`, by default as before this context. In other threads than
    the main one, where Python handles no signals, the list stays empty. A signal that code outside Python handles is
    left to it: Python can neither call nor restore its handler.
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
        if signal.getsignal(number) is not None:
            before[number] = signal.signal(number, handler)
    try:
        yield caught
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class Resumable(Protocol):
    """The part of a `Trainer` that saves and restores its state."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next steps depend on: tensors by name, and JSON values."""
        ...

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any], /) -> None:
        """Restore a `state()`."""
        ...


_CHECKSUM = "sha256"


@dataclass(frozen=True)
class RunIdentity:
    """What tells runs apart. Runs with the same identity, machine and versions end with the same weights.

    Attributes:
        recipe: fingerprint of the recipe.
        seed, epochs, holdout, numerics, float_start, teacher, start: as in the record.
        data: the record's data_sha256.
    """

    recipe: str
    seed: int
    epochs: int
    holdout: int
    numerics: int
    data: str
    float_start: dict[str, Any] | None
    teacher: dict[str, Any] | list[dict[str, Any]] | None = None
    start: dict[str, Any] | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> RunIdentity:
        """The identity of a run by the keys of its record, with None for those that it lacks."""
        recorded = {"recipe": "recipe_sha256", "data": "data_sha256"}
        found: dict[str, Any] = {f.name: record.get(recorded.get(f.name, f.name)) for f in fields(cls)}
        return cls(**found)


def save_state(trainer: Resumable, path: Path, identity: RunIdentity, conditions: dict[str, Any]) -> None:
    """Save the trainer's state.

    Args:
        trainer: whose state is saved.
        path: file to write.
        identity: which run it is.
        conditions: machine and versions, which the bits of the next steps depend on.
    """
    tensors, values = trainer.state()
    facts = {"values": values, "identity": asdict(identity), "conditions": conditions}
    save_checked(plain_copies(tensors), path, facts)


def plain_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU as safetensors takes them: contiguous, and sharing no memory, as tied weights do."""
    return {name: tensor.detach().cpu().clone(memory_format=contiguous_format) for name, tensor in tensors.items()}


def resume(trainer: Resumable, path: Path, identity: RunIdentity, conditions: dict[str, Any]) -> Path | None:
    """Load the state at `path` into the trainer, if the file exists. The state of another run is renamed.

    Returns:
        The new path of another run's state; None if the state was loaded or there was none.

    Raises:
        RunError: the file is damaged, or was saved under other conditions (`UnfitState`).
    """
    if not path.exists():
        return None
    try:
        tensors, facts = load_checked(path)
        found = RunIdentity(**facts["identity"])
        if found == identity and facts["conditions"] == conditions:
            trainer.load_state(tensors, facts["values"])
            return None
    except OSError as error:
        raise RunError(
            f"{path}: cannot be read: {error.strerror}: change its permissions, or give another run_dir"
        ) from None
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise RunError(
            f"{path}: not a state that this run can resume from ({reason}): delete it to start over"
        ) from None
    if found == identity:
        saved = facts["conditions"]
        keys = [key for key in sorted({*saved, *conditions}) if saved.get(key) != conditions.get(key)]
        differences = ", ".join(f"{key} {saved.get(key)}, here {conditions.get(key)}" for key in keys)
        raise UnfitState(path, differences)
    names = (f"state-{found.recipe[:8]}-seed{found.seed}-{number}.safetensors" for number in itertools.count(1))
    return path.rename(next(aside for aside in map(path.with_name, names) if not aside.exists()))


def save_checked(tensors: Mapping[str, Tensor], path: Path, facts: Mapping[str, Any]) -> None:
    """Save contiguous CPU tensors and JSON values by name as one safetensors file with a checksum of both."""
    metadata = {key: json.dumps(fact) for key, fact in facts.items()}
    metadata[_CHECKSUM] = _checksum(tensors, metadata)
    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, metadata)


def load_checked(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and values that `save_checked` saved.

    Raises:
        SafetensorError, OSError, ValueError: the file cannot be read, or is not what was saved.
    """
    check_readable(path)
    with safe_open(path, framework="pt") as file:  # opened once, as a run may replace it meanwhile
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = metadata.pop(_CHECKSUM, None)
    if expected is None:
        raise ValueError("it has no checksum, as older versions of cnvzoo saved it")
    if _checksum(tensors, metadata) != expected:
        raise ValueError("it is damaged: its checksum is not that of its content")
    return tensors, {key: json.loads(text) for key, text in metadata.items()}


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """sha256 of the metadata, then of the name, dtype, shape and bytes of each tensor, in the order of names."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()
