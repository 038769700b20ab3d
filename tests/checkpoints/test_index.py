"""The index inside the package: it lists the checkpoints under hub/, and its names cannot be paths to other folders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness.publish
import numpy as np
import pytest
from harness.entries import HarnessError

import cnvzoo
import cnvzoo.checkpoints.index
from cnvzoo.checkpoints.format import CheckpointError, checked_name
from cnvzoo.checkpoints.index import INDEX, read_index
from cnvzoo.files import sha256_of

ROOT = Path(__file__).resolve().parents[2]


def test_importing_the_index_does_not_import_torch() -> None:
    """So the command line lists checkpoints in a fraction of a second."""
    code = "import sys, cnvzoo.checkpoints.index as index; index.list_checkpoints(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_index_is_that_of_the_published_checkpoints() -> None:
    remedy = "run: python benchmarks/reproduce.py --table all --time-limit 0"
    assert (INDEX.read_text(), []) == harness.publish.render_index(ROOT / "hub"), remedy


def test_the_index_has_every_published_file() -> None:
    """A file under hub/ that is not in the index could change unnoticed."""
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


@pytest.mark.parametrize(
    ("conditions", "fits"),
    [
        ({"pattern": ["cnv.*", "resnet2?.*"]}, lambda row: row["model"] == "cnv" or row["name"].startswith("resnet2")),
        ({"exclude": "*.mnist"}, lambda row: row["dataset"] != "mnist"),
        ({"dataset": "mnist"}, lambda row: row["dataset"] == "mnist"),
        ({"w_bits": 2}, lambda row: row["w_bits"] == 2),
        ({"w_bits": np.int64(4), "a_bits": 4}, lambda row: (row["w_bits"], row["a_bits"]) == (4, 4)),
        ({"a_bits": "float"}, lambda row: row["a_bits"] is None),
        ({"min_accuracy": 94, "max_bytes": 3_000_000}, lambda row: row["accuracy"] >= 94 and row["bytes"] <= 3e6),
        ({"pattern": "*cnv*", "dataset": "cifar10", "min_accuracy": 91.5},
         lambda row: "cnv" in row["name"] and row["dataset"] == "cifar10" and row["accuracy"] >= 91.5),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_conditions_of_list_checkpoints(conditions: dict[str, Any], fits: Callable[[Any], bool]) -> None:
    every = cnvzoo.list_checkpoints()
    expected = [row for row in every if fits(row)]
    assert 0 < len(expected) < len(every)
    assert cnvzoo.list_checkpoints(**conditions) == expected


def test_the_limits_of_list_checkpoints_are_included() -> None:
    (row,) = cnvzoo.list_checkpoints("cnv.mnist")
    limits: dict[str, Any] = {"min_accuracy": row["accuracy"], "max_bytes": row["bytes"]}
    assert cnvzoo.list_checkpoints("cnv.mnist", **limits) == [row]
    assert cnvzoo.list_checkpoints("cnv.mnist", max_bytes=row["bytes"] - 1) == []


def test_conditions_that_nothing_can_fit() -> None:
    with pytest.raises(cnvzoo.DatasetError, match="trained on 'cifar': did you mean 'cifar10'"):
        cnvzoo.list_checkpoints(dataset="cifar")
    for bits in (0, 9, True, "4"):
        with pytest.raises(cnvzoo.ModelError, match=r"w_bits=.*from 1 to 8, or 'float'"):
            cnvzoo.list_checkpoints(w_bits=bits)  # type: ignore[arg-type]


class TestDamagedCheckpoint:
    """A damaged checkpoint is reported, keeps its entry, and does not affect the others."""

    @pytest.fixture
    def hub(self, tmp_path: Path, make_checkpoint: Callable[..., Path]) -> Path:
        for model in ("cnv", "resnet20"):
            make_checkpoint(tmp_path / "hub", model, "mnist")
        return tmp_path / "hub"

    @pytest.fixture
    def index(self, hub: Path) -> Path:
        return cnvzoo.checkpoints.index.INDEX

    @staticmethod
    def damage(path: Path, how: str) -> None:
        content = path.read_bytes()
        if how == "newer":
            path.write_text(json.dumps(json.loads(content) | {"format_version": 2}))
        elif how == "gone":
            path.unlink()
        else:
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    @pytest.mark.parametrize(
        ("file", "how", "said"),
        [
            ("config.json", "newer", "this cnvzoo reads 1: install a matching version"),
            ("config.json", "changed", "not a valid checkpoint config"),
            ("config.json", "gone", "config.json missing"),
            ("model.safetensors", "changed", "not the file that config.json describes"),
            ("model.safetensors", "gone", "model.safetensors missing"),
        ],
    )
    def test_keeps_its_entry_when_it_is_published(self, hub: Path, index: Path, file: str, how: str, said: str) -> None:
        before = read_index(index).checkpoints
        self.damage(hub / "cnv.mnist" / file, how)
        cnvzoo.write_card(hub / "resnet20.mnist")
        (problem,) = harness.publish.update_index(index, hub)
        assert problem.startswith("cnv.mnist: its entry in the index stays as it was: ")
        assert said in problem
        after = read_index(index).checkpoints
        assert after["cnv.mnist"] == before["cnv.mnist"]
        assert after.keys() == before.keys()
        assert after["resnet20.mnist"].files.keys() - before["resnet20.mnist"].files.keys() == {"README.md"}

    def test_gets_no_entry_when_it_is_new(self, hub: Path, index: Path) -> None:
        before = index.read_text()
        for name, content in (("cnv.own", b"{"), ("cnv.x y", b"{}"), (".hidden", b"{")):
            (hub / name).mkdir()
            (hub / name / "config.json").write_bytes(content)
        problems = harness.publish.update_index(index, hub)
        assert [problem.partition(": ")[0] for problem in problems] == ["cnv.own", "cnv.x y"]
        assert all(": left out of the index: " in problem for problem in problems)
        assert index.read_text() == before

    def test_is_reported_when_its_folder_was_removed(self, hub: Path, index: Path) -> None:
        shutil.rmtree(hub / "cnv.mnist")
        (problem,) = harness.publish.update_index(index, hub)
        assert problem == f"cnv.mnist: no longer in the index: {hub / 'cnv.mnist'} is gone"
        assert read_index(index).checkpoints.keys() == {"resnet20.mnist"}

    def test_temporary_files_of_a_killed_writer_are_ignored(self, hub: Path, index: Path) -> None:
        before = index.read_text()
        (hub / "cnv.mnist" / ".model.safetensors.0a1b2c3d.tmp").write_bytes(b"half")
        assert harness.publish.update_index(index, hub) == []
        assert index.read_text() == before

    def test_with_a_damaged_index_nothing_is_written(self, hub: Path, index: Path) -> None:
        good = index.read_text()
        index.write_text("{")
        self.damage(hub / "cnv.mnist" / "config.json", "newer")
        with pytest.raises(
            HarnessError, match=r"cnv\.mnist: left out.*and the index is damaged too.*index\.json: not a"
        ):
            harness.publish.update_index(index, hub)
        assert index.read_text() == "{"
        path = hub / "cnv.mnist" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 1}, indent=1) + "\n")
        assert harness.publish.update_index(index, hub) == []
        assert index.read_text() == good


@pytest.mark.parametrize("name", ["cnv.mnist", "quant_cnv_w4a4.cifar10", "config.json", "a", "_x-1.y"])
def test_valid_names(name: str) -> None:
    assert checked_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a\\b", "/etc", "a.", ".hidden", "-x", "C:x", "a b", "a\n", "a\x00", "é", "x" * 200],
)  # fmt: skip
def test_names_that_could_be_paths_to_other_folders_are_refused(name: str, tmp_path: Path) -> None:
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
def test_a_damaged_index_is_an_error(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    index = json.loads(INDEX.read_text())
    index["checkpoints"]["cnv.mnist"] |= change
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=said) as caught:
        read_index(tmp_path / "index.json")
    assert str(tmp_path / "index.json") in str(caught.value)


def test_a_missing_index_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.json: cannot be read .*install cnvzoo again"):
        read_index(tmp_path / "none.json")
