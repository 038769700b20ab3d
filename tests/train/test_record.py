"""Run records: read as they were written, and refused by name when they are not whole or do not add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cnvzoo.train import RecordError, RunRecord


def values(**changes: Any) -> dict[str, Any]:
    return {
        "entry": "cifar10_quant_cnv_w4a4",
        "seed": 2,
        "trial": False,
        "holdout": 0,
        "accuracy": 91.28,
        "correct": 9128,
        "total": 10000,
        "weights": "ema",
        "recipe": {"model": "quant_cnv", "optimizer": {"lr": 0.1}, "ema": None, "augmentation": {"flip": True}},
        "recipe_sha256": "a" * 64,
        "weights_sha256": "0123456789abcdef" * 4,
        "seconds": 12.5,
        "device": {"kind": "cpu", "name": "Some CPU", "threads": 2},
        "versions": {"python": "3.11.1", "torch": "2.14.1"},
        "commit": None,
        "float_start": {"entry": "cifar10_cnv", "seed": 2, "weights_sha256": "b" * 64},
        "teacher": {"entry": "cifar10_resnet56", "seed": 2, "weights_sha256": "c" * 64},
        "finished": "2026-01-02T03:04:05+00:00",
        "history": [{"epoch": 1, "loss": 2.25, "lr": 0.1, "seconds": 6.25}],
    } | changes


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "results" / "entry" / "seed2.json"
    record = RunRecord.model_validate(values())
    record.write(path)
    assert RunRecord.read(path) == record
    assert json.loads(path.read_text()) == values()
    assert path.read_text().endswith("}\n")
    assert [p.name for p in path.parent.iterdir()] == ["seed2.json"]


def test_a_record_from_before_there_were_teachers_is_one_without(tmp_path: Path) -> None:
    older = {key: value for key, value in values().items() if key != "teacher"}
    (tmp_path / "seed2.json").write_text(json.dumps(older))
    assert RunRecord.read(tmp_path / "seed2.json").teacher is None


def test_writing_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text("half a rec")
    RunRecord.model_validate(values(seed=1)).write(path)
    assert RunRecord.read(path).seed == 1


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
        (json.dumps(values(weights="best")), "weights"),
        (json.dumps(values(weights_sha256="abc")), "weights_sha256"),
        (json.dumps(values(seed="two")), "seed"),
        (json.dumps(values(history=[{"epoch": "one"}])), "history"),
    ],
)
def test_what_is_no_record_is_refused_with_its_path_and_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "seed0.json"
    path.write_text(text)
    with pytest.raises(RecordError) as caught:
        RunRecord.read(path)
    assert str(caught.value).startswith(f"{path}: not a valid run record")
    assert says in str(caught.value)


def test_a_record_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "seed0.json"
    with pytest.raises(RecordError, match="cannot be read: No such file"):
        RunRecord.read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match=r"seed0\.json: not a valid run record"):
        RunRecord.read(path)
