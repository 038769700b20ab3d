"""The saved state of a run under way: one safetensors file, replaced whole, that says which run it is of."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from cnvzoo.files import replacing

from .errors import RunError
from .record import RunRecord
from .trainer import Trainer


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


def save_state(trainer: Trainer, path: Path, identity: RunIdentity, conditions: dict[str, Any]) -> None:
    """Save all that the trainer's next steps depend on; `conditions`: what their bits depend on beside it."""
    tensors, values = trainer.state()
    # safetensors holds each tensor contiguous; loading copies into the layout in use
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    facts = {"values": values, "identity": asdict(identity), "conditions": conditions}
    with replacing(path) as temporary:
        save_file(plain, temporary, metadata={key: json.dumps(fact) for key, fact in facts.items()})


def resume(trainer: Trainer, path: Path, identity: RunIdentity, conditions: dict[str, Any]) -> None:
    """Load the state at `path`, if there is one, into the trainer; one of another run is set aside, not lost.

    Raises:
        RunError: the file is damaged, or was saved under other conditions.
    """
    if not path.exists():
        return
    try:
        with safe_open(path, framework="pt") as file:
            facts = {key: json.loads(text) for key, text in (file.metadata() or {}).items()}
        found = RunIdentity(**facts["identity"])
        if found == identity and facts["conditions"] == conditions:
            trainer.load_state(load_file(path), facts["values"])
            return
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"{path}: not a state that this run can go on from ({error}): delete it to start over") from None
    if found == identity:
        raise RunError(
            f"{path}: saved under {facts['conditions']}, this is {conditions}: weights trained on both could "
            "be reproduced on neither. Go on with those settings, or delete the file to start over"
        )
    names = (f"state-{found.recipe[:8]}-seed{found.seed}-{number}.safetensors" for number in itertools.count(1))
    path.rename(next(aside for aside in map(path.with_name, names) if not aside.exists()))
