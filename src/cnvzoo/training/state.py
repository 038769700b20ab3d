"""What can keep a run from its record.

The saved state of a run under way: one safetensors file, replaced whole, that says which run it is of and has a
checksum of all that is in it. One changed bit of a weight would else lead to other weights with a valid record.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, uint8

from cnvzoo.errors import CnvzooError
from cnvzoo.files import replacing
from cnvzoo.training.record import RunRecord


class RunError(CnvzooError):
    """A run that cannot start or go on: says which folder, why, and what to do."""


class RunUnderWay(RunError):
    """A run that another process is training in the same folder."""


class RunInterrupted(CnvzooError):
    """A run that stopped before its end, with its state saved.

    Attributes:
        reason: `time limit`, `SIGINT` or `SIGTERM`.
        step, total_steps: how far it came.
        run_dir: where its state is.
        unsaved: why the state of that step could not be saved, if so: that of an earlier one is what there is.
    """

    def __init__(
        self, run: str, reason: str, step: int, total_steps: int, run_dir: Path, unsaved: str | None = None
    ) -> None:
        self.reason, self.step, self.total_steps, self.run_dir = reason, step, total_steps, run_dir
        self.unsaved = unsaved
        self._arguments = (run, reason, step, total_steps, run_dir, unsaved)
        start = "there" if unsaved is None else f"the last state saved, if there is one: {unsaved}"
        super().__init__(
            f"{run}: stopped ({reason}) after step {step} of {total_steps}; the same command goes on from {start}"
        )

    def __reduce__(self) -> tuple[type[RunInterrupted], tuple[Any, ...]]:
        """Pickle by the arguments: worker processes send this error to the process that started them."""
        return type(self), self._arguments


class Resumable(Protocol):
    """What can be saved and restored at any step: a `Trainer`."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next steps depend on: tensors by name, and the rest as JSON values."""
        ...

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any], /) -> None:
        """Restore a `state()`."""
        ...


_CHECKSUM = "sha256"


@dataclass(frozen=True)
class RunIdentity:
    """Which run a state or a record is of: two with the same identity have the same weights in the end.

    Attributes:
        recipe: fingerprint of the recipe.
        seed, epochs, holdout, numerics: as in the record.
        data: the record's data_sha256.
        float_start, teacher: entry, seed and weights_sha256 of the float models that the run starts from and is taught
            by, as in the record.
    """

    recipe: str
    seed: int
    epochs: int
    holdout: int
    numerics: int
    data: str
    float_start: dict[str, Any] | None
    teacher: dict[str, Any] | list[dict[str, Any]] | None = None

    @classmethod
    def of(cls, record: RunRecord) -> RunIdentity:
        return cls(
            record.recipe_sha256, record.seed, record.epochs, record.holdout, record.numerics, record.data_sha256,
            record.float_start, record.teacher,
        )  # fmt: skip


def save_state(trainer: Resumable, path: Path, identity: RunIdentity, conditions: dict[str, Any]) -> None:
    """Save all that the trainer's next steps depend on; `conditions`: what their bits depend on beside it."""
    tensors, values = trainer.state()
    # safetensors holds each tensor contiguous; loading copies into the layout in use
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_checked(plain, path, {"values": values, "identity": asdict(identity), "conditions": conditions})


def resume(trainer: Resumable, path: Path, identity: RunIdentity, conditions: dict[str, Any]) -> Path | None:
    """Load the state at `path`, if there is one, into the trainer.

    Returns:
        Where the state of another run was set aside to, if it was one.

    Raises:
        RunError: the file is damaged, or was saved under other conditions.
    """
    if not path.exists():
        return None
    try:
        tensors, facts = load_checked(path)
        found = RunIdentity(**facts["identity"])
        if found == identity and facts["conditions"] == conditions:
            trainer.load_state(tensors, facts["values"])
            return None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"{path}: not a state that this run can go on from ({error}): delete it to start over") from None
    if found == identity:
        saved = facts["conditions"]
        keys = [key for key in sorted({*saved, *conditions}) if saved.get(key) != conditions.get(key)]
        differences = ", ".join(f"{key} {saved.get(key)}, here {conditions.get(key)}" for key in keys)
        raise RunError(
            f"{path}: saved with {differences}: weights trained with both could be reproduced with neither. Resume it "
            "with those settings, or delete the file to start over"
        )
    names = (f"state-{found.recipe[:8]}-seed{found.seed}-{number}.safetensors" for number in itertools.count(1))
    return path.rename(next(aside for aside in map(path.with_name, names) if not aside.exists()))


def save_checked(tensors: Mapping[str, Tensor], path: Path, facts: Mapping[str, Any]) -> None:
    """Save contiguous tensors on the CPU, and JSON values by name, as one safetensors file with a checksum of both."""
    metadata = {key: json.dumps(fact) for key, fact in facts.items()}
    metadata[_CHECKSUM] = _checksum(tensors, metadata)
    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, metadata)


def load_checked(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and values of a file of `save_checked`, if they are exactly what was saved.

    Raises:
        SafetensorError, OSError, ValueError: they are not, or the file cannot be read.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    expected = metadata.pop(_CHECKSUM, None)
    if expected is None:
        raise ValueError("it has no checksum, as older versions of cnvzoo saved it")
    tensors = load_file(path)
    if _checksum(tensors, metadata) != expected:
        raise ValueError("it is damaged: its checksum is not that of its content")
    return tensors, {key: json.loads(text) for key, text in metadata.items()}


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """sha256 of the metadata, then of each tensor, by name: its name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()
