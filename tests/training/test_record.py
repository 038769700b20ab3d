"""Run records: read back unchanged, and refused with their path if they are incomplete or contradictory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cnvzoo.data import published_sha256
from cnvzoo.training import NUMERICS, RecordError, RunRecord, recipe_from_dict

RECIPE = recipe_from_dict(
    {
        "name": "cifar10_quant_cnv_w4a4",
        "model": "quant_cnv",
        "dataset": "cifar10",
        "w_bits": 4,
        "a_bits": 4,
        "epochs": 2,
        "batch_size": 128,
        "optimizer": {"lr": 0.1},
        "float_start": "cifar10_cnv",
        "teacher": "cifar10_resnet56",
        "seed": 2,
    },
    "this test",
)


def values(**changes: Any) -> dict[str, Any]:
    return {
        "entry": "cifar10_quant_cnv_w4a4",
        "seed": 2,
        "numerics": 2,
        "epochs": 2,
        "trial": False,
        "holdout": 0,
        "accuracy": 91.28,
        "correct": 9128,
        "total": 10000,
        "recipe": RECIPE.model_dump(mode="json"),
        "recipe_sha256": RECIPE.fingerprint(),
        "data_sha256": "d" * 64,
        "weights_sha256": "0123456789abcdef" * 4,
        "seconds": 12.5,
        "device": {"kind": "cpu", "name": "Some CPU", "threads": 2},
        "versions": {"python": "3.11.1", "torch": "2.14.1"},
        "commit": None,
        "float_start": {"entry": "cifar10_cnv", "seed": 0, "weights_sha256": "b" * 64},
        "teacher": {"entry": "cifar10_resnet56", "seed": 0, "weights_sha256": "c" * 64},
        "start": None,
        "finished": "2026-01-02T03:04:05+00:00",
        "history": [{"epoch": n, "loss": 2.25, "lr": 0.1, "seconds": 6.25} for n in (1, 2)],
    } | changes


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "results" / "entry" / "seed2.json"
    record = RunRecord.model_validate(values())
    record.write(path)
    assert RunRecord.read(path) == record
    assert json.loads(path.read_text()) == values()
    assert path.read_text().endswith("}\n")
    assert [p.name for p in path.parent.iterdir()] == ["seed2.json"]


def test_writing_replaces_an_older_record(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text("half a rec")
    RunRecord.model_validate(values(seconds=1)).write(path)
    assert RunRecord.read(path).seconds == 1


@pytest.mark.parametrize(("correct", "total", "accuracy"), [(1, 3, 33.3333), (2, 3, 66.6667), (0, 7, 0), (7, 7, 100)])
def test_a_rounded_accuracy_adds_up(correct: int, total: int, accuracy: float) -> None:
    assert RunRecord.model_validate(values(correct=correct, total=total, accuracy=accuracy)).correct == correct


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in values().items() if k != key}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "EOF"),
        (json.dumps(values())[:-20], "EOF"),
        ("[1, 2]", "object"),
        (json.dumps(without("correct")), "correct"),
        (json.dumps(without("weights_sha256")), "weights_sha256"),
        (json.dumps(values(notes="nice run")), "notes"),
        (json.dumps(values(accuracy=91.29)), "accuracy 91.29 is not 9128 of 10000"),
        (json.dumps(values(correct=10001, accuracy=100)), "accuracy 100.0 is not 10001 of 10000"),
        (json.dumps(values(accuracy=float("nan"))), "accuracy"),
        (json.dumps(values(correct=-1)), "correct"),
        (json.dumps(values(total=0)), "total"),
        (json.dumps(values(weights_sha256="abc")), "weights_sha256"),
        (json.dumps(values(seed="two")), "seed"),
        (json.dumps(values(history=[{"epoch": "one"}])), "history"),
        (
            json.dumps(values(history=values()["history"][:1])),
            "history is 1, and by the rest",
        ),
        (json.dumps(values(history=[{"epoch": 1, "loss": float("nan"), "lr": 0, "seconds": 0}] * 2)), "history"),
        (json.dumps(values(seed=-3)), "seed"),
        (json.dumps(values(seed=2**63)), "seed"),
        (json.dumps(values(seed=1)), "recipe.seed is 2, and by the rest of the record it has to be 1"),
        (json.dumps(values(entry="cifar10_cnv")), "recipe.name is 'cifar10_quant_cnv_w4a4'"),
        (json.dumps(values(numerics=0)), "numerics"),
        (json.dumps(values(epochs=5, history=values()["history"] * 3)), "trial is False"),
        (json.dumps(values(trial=True)), "trial is True, and by the rest of the record it has to be False"),
        (json.dumps(values(holdout=10)), "trial is False"),
        (json.dumps(values(device={})), "kind"),
        (json.dumps(values(device={"kind": "cpu", "name": "A CPU", "threads": "x"})), "threads"),
        (json.dumps(values(device={"kind": "cpu", "name": "A CPU", "kernels": "abc"})), "kernels"),
        (json.dumps(values(seconds=float("nan"))), "seconds"),
        (json.dumps(values(seconds=-1)), "seconds"),
        (json.dumps(values(recipe={})), "name"),
        (json.dumps(values(recipe=RECIPE.model_copy(update={"epochs": 3}).model_dump(mode="json"))), "was edited"),
        (json.dumps(values(recipe_sha256="a" * 64)), "the recipe or its fingerprint was edited"),
        (json.dumps(values(data_sha256=published_sha256("cifar10"), correct=1, total=1, accuracy=100)), "total is 1"),
        (json.dumps(values(commit="$(rm -r /)")), "commit"),
        (json.dumps(values(finished="yesterday")), "finished"),
        (json.dumps(values(float_start=None)), "float_start is []"),
        (json.dumps(values(float_start=values()["float_start"] | {"entry": "cifar10_resnet20"})), "float_start is"),
        (json.dumps(values(teacher=[values()["teacher"]] * 2)), "teacher is"),
        (json.dumps(values(teacher={"entry": "cifar10_resnet56"})), "teacher"),
        ("[" * 100_000, "JSON"),
    ],
)
def test_an_invalid_record_is_refused_with_its_path_and_the_mistake(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "seed0.json"
    path.write_text(text)
    with pytest.raises(RecordError) as caught:
        RunRecord.read(path)
    assert str(caught.value).startswith(f"{path}: not a valid run record")
    assert says in str(caught.value)


@pytest.mark.parametrize("epochs", [1, 5])
def test_any_other_number_of_epochs_makes_a_trial(epochs: int) -> None:
    history = values()["history"][:1] * epochs
    assert RunRecord.model_validate(values(trial=True, epochs=epochs, history=history)).trial


def test_every_kept_record_is_valid() -> None:
    kept = sorted((Path(__file__).parents[2] / "benchmarks" / "results").rglob("*.json"))
    assert len(kept) >= 32
    for path in kept:
        record = RunRecord.read(path)
        assert record.data_sha256 == published_sha256(record.recipe["dataset"])
        assert 1 <= record.numerics <= NUMERICS


def test_a_record_that_is_missing_or_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "seed0.json"
    with pytest.raises(RecordError, match="cannot be read: No such file"):
        RunRecord.read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match=r"seed0\.json: not a valid run record"):
        RunRecord.read(path)
