"""The index inside the package: it is what is under hub/, and names in it lead nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import harness.index
import pytest

import cnvzoo
from cnvzoo.files import sha256_of
from cnvzoo.hub import CheckpointError, read_index
from cnvzoo.hub.index import INDEX, checked_name

ROOT = Path(__file__).resolve().parents[2]


def test_it_is_what_is_published() -> None:
    remedy = "run: python benchmarks/reproduce.py --table all --time-limit 0"
    assert INDEX.read_text() == harness.index.render_index(ROOT / "hub"), remedy


def test_it_names_every_file() -> None:
    """Counted in another way: a file under hub/ that the index does not know could change unnoticed."""
    entries = read_index().checkpoints
    published = {(path.parent.name, path.name) for path in (ROOT / "hub").glob("*/*")}
    assert {(name, file) for name, entry in entries.items() for file in entry.files} == published
    for name, entry in entries.items():
        for file, facts in entry.files.items():
            path = ROOT / "hub" / name / file
            assert (facts.size, facts.sha256) == (path.stat().st_size, sha256_of(path))


def test_list_checkpoints() -> None:
    rows = {row["name"]: row for row in cnvzoo.list_checkpoints()}
    assert list(rows) == sorted(path.name for path in (ROOT / "hub").iterdir())
    row = rows["cnv.cifar10"]
    config = json.loads((ROOT / "hub" / "cnv.cifar10" / "config.json").read_text())
    assert (row["correct"], row["total"]) == (config["correct"], config["total"])
    assert row["accuracy"] == pytest.approx(100 * config["correct"] / config["total"])
    assert (row["model"], row["dataset"], row["w_bits"], row["a_bits"]) == ("cnv", "cifar10", None, None)
    assert (row["parameters"], row["macs"]) == (1_546_688, 59_461_376)
    assert row["bytes"] == (ROOT / "hub" / "cnv.cifar10" / "model.safetensors").stat().st_size
    assert {row["name"] for row in cnvzoo.list_checkpoints("*.mnist")} == {n for n in rows if n.endswith(".mnist")}
    assert cnvzoo.list_checkpoints("vgg*") == []


@pytest.mark.parametrize("name", ["cnv.mnist", "quant_cnv_w4a4.cifar10", "config.json", "a", "_x-1.y"])
def test_names(name: str) -> None:
    assert checked_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a\\b", "/etc", "a.", ".hidden", "-x", "C:x", "a b", "a\n", "a\x00", "é", "x" * 200],
)  # fmt: skip
def test_names_that_lead_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not the name of"):
        checked_name(name)
    index = json.loads(INDEX.read_text())
    checkpoints: dict[str, Any] = index["checkpoints"]
    entry = checkpoints["cnv.mnist"]
    files = entry["files"] | {name: entry["files"]["config.json"]}
    for where in (checkpoints | {name: entry}, {"cnv.mnist": entry | {"files": files}}):
        (tmp_path / "index.json").write_text(json.dumps({"checkpoints": where}))
        with pytest.raises(CheckpointError, match=r"index\.json: not a valid index"):
            read_index(tmp_path / "index.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"files": {}}, "config.json and model.safetensors missing"),
        ({"total": 0}, "total"),
        ({"correct": "9"}, "correct"),
        ({"files": {"config.json": {"sha256": "x", "size": 1}}}, "sha256"),
        ({"files": {"config.json": {"sha256": "0" * 64, "size": -1}}}, "size"),
        ({"url": "x"}, "url"),
    ],
)
def test_a_damaged_index(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    index = json.loads(INDEX.read_text())
    index["checkpoints"]["cnv.mnist"] |= change
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=said) as caught:
        read_index(tmp_path / "index.json")
    assert str(tmp_path / "index.json") in str(caught.value)


def test_no_index(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.json: cannot be read .*install cnvzoo again"):
        read_index(tmp_path / "none.json")
