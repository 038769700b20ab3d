"""Disks that are full or read-only, and folders that are none: a line each, all else goes on, tables are shown."""

from __future__ import annotations

import errno
import io
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import plot
from harness import report as readme
from workbench import Bench

from cnvzoo.data import DatasetError
from cnvzoo.files import write_text
from cnvzoo.training import RunRecord

NAME, OTHER = "mnist_cnv", "mnist_resnet20"


@pytest.fixture
def unwritable(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`unwritable(path, ...)`: neither the paths nor what is below them can be written, for whatever user."""
    real = tempfile.mkstemp

    def use(*paths: Path, code: int = errno.EROFS) -> None:
        def mkstemp(*, dir: Path, prefix: str, suffix: str) -> tuple[int, str]:
            target = dir / prefix.strip(".")
            if {target, *target.parents} & set(paths):
                raise OSError(code, os.strerror(code), str(dir / f"{prefix}abc{suffix}"))
            return real(dir=dir, prefix=prefix, suffix=suffix)

        monkeypatch.setattr(tempfile, "mkstemp", mkstemp)

    return use


@pytest.fixture
def checkout(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """With a README, a picture that is drawn fast, and one entry that has run."""

    def draw(points: Any, path: Path) -> None:
        write_text(path, f"<svg><desc>{plot.description(points)}</desc></svg>")

    monkeypatch.setattr(plot, "draw", draw)
    write_text(bench.home.parent / "README.md", f"# x\n{readme.START}\n{readme.END}\n")
    bench.recipe(NAME)
    for seed in (0, 1, 2):
        bench.put(NAME, seed, accuracy=90.5)
    return bench


class TestReadOnlyCheckout:
    def test_that_is_up_to_date_is_no_error(self, checkout, unwritable, capsys):
        assert checkout.run("--table", "mnist") == 0
        unwritable(checkout.home.parent)
        assert checkout.run("--table", "mnist", "--time-limit", "0") == 0
        capsys.readouterr()
        assert checkout.run("--table", "mnist") == 0
        said = capsys.readouterr()
        assert f"| {NAME} | 90.50 | 0.00 |" in said.out
        assert "written" not in said.err

    @pytest.mark.parametrize("more", [(), ("--time-limit", "0")])
    def test_that_is_out_of_date_shows_its_tables(self, checkout, unwritable, capsys, more):
        unwritable(checkout.home.parent)
        assert checkout.run("--table", "mnist", *more) == 1
        said = capsys.readouterr()
        assert f"| {NAME} | 90.50 | 0.00 |" in said.out
        page, front = checkout.home / "RESULTS.md", checkout.home.parent / "README.md"
        for path in (page, front):
            assert said.err.count(f"{path}: cannot be written: Read-only file system: mount it for writing") == 1
        assert "not written, see above: the README, the index of published checkpoints, the page of results" in said.err

    def test_with_runs_left_is_not_stopped_alone(self, checkout, unwritable):
        checkout.recipe(OTHER)
        unwritable(checkout.home.parent)
        assert checkout.run("--table", "mnist", "--time-limit", "0") == 1


FILES = {
    "the page of results": "benchmarks/RESULTS.md",
    "the README": "README.md",
    "the index of published checkpoints": "src/cnvzoo/checkpoints/index.json",
    "the pictures": "benchmarks/accuracy-mnist.svg",
    "the checkpoint of mnist_resnet20": "hub/resnet20.mnist/config.json",
}
MADE_OF = {  # what is not there either, because it is made of another
    "the index of published checkpoints": {"the pictures"},
    "the checkpoint of mnist_resnet20": {"the index of published checkpoints", "the pictures"},
}


@pytest.mark.parametrize("what", FILES)
def test_one_file_that_cannot_be_written_keeps_no_other_from_it(checkout, unwritable, capsys, what):
    root = checkout.home.parent
    checkout.recipe(OTHER)
    checkout.recipe("mnist_mobilenet_v1")  # a picture has two checkpoints at least
    unwritable(root / FILES[what], code=errno.ENOSPC)
    assert checkout.run("--table", "mnist", "--seeds", "0") == 1
    said = capsys.readouterr()
    assert f"| {OTHER} | 90.00 (1 of 3 seeds)" in said.out
    problem = f"{what} stays as it was: {root / FILES[what]}: cannot be written: No space left on device: free some"
    assert problem in said.err
    assert f"not written, see above: {what}\n" in said.err
    texts = {name: (root / path).read_text() if (root / path).exists() else "" for name, path in FILES.items()}
    without = {name for name, text in texts.items() if OTHER not in text and "resnet20.mnist" not in text}
    assert without == {what} | MADE_OF.get(what, set())


@pytest.mark.parametrize("at_once", ["1", "2"])
def test_a_run_that_cannot_be_written_fails_alone(bench, unwritable, capsys, at_once):
    bench.recipe(NAME)
    bench.recipe(OTHER)
    unwritable(bench.runs / NAME / "seed0", code=errno.ENOSPC)
    assert bench.run("--table", "mnist", "--seeds", "0", "1", "--at-once", at_once) == 1
    record = bench.runs / NAME / "seed0" / "record.json"
    said = capsys.readouterr()
    line = f"{NAME} seed 0 failed: {record}: cannot be written: No space left on device: free some space there"
    assert line in said.err
    assert f"failed, see above: {NAME} seed 0\n" in said.err
    assert f"| {OTHER} | 90.50 (2 of 3 seeds)" in said.out
    assert bench.result(NAME, 1).exists()


def test_a_record_that_cannot_be_brought_home_is_brought_by_the_next(bench, unwritable, capsys):
    bench.recipe(NAME)
    bench.recipe(OTHER)
    unwritable(bench.result(NAME))
    for _ in range(2):
        assert bench.run("--table", "mnist", "--seeds", "0") == 1
        says = f"{NAME} seed 0 failed: {bench.result(NAME)}: cannot be written: Read-only file system"
        assert says in capsys.readouterr().err
    assert sorted(bench.training.calls) == [(NAME, 0), (OTHER, 0)]
    unwritable()
    assert bench.run("--table", "mnist", "--seeds", "0") == 0
    assert len(bench.training.calls) == 2
    assert RunRecord.read(bench.result(NAME)).accuracy == 90


@pytest.mark.parametrize("below", ["", "x", "x/y"])
def test_a_file_is_no_folder_for_runs(bench, tmp_path, capsys, below):
    bench.recipe(NAME)
    (tmp_path / "file").write_text("kept")
    runs = tmp_path / "file" / below
    assert bench.run("--table", "mnist", "--runs", str(runs)) == 2
    says = f"--runs {runs}: {tmp_path / 'file'} is a file, not a folder: choose another folder"
    assert capsys.readouterr().err == f"reproduce.py: error: {says}\n"
    assert (tmp_path / "file").read_text() == "kept"


def test_a_home_folder_for_runs(bench, tmp_path, capsys, monkeypatch):
    bench.recipe(NAME)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert bench.run("--table", "mnist", "--seeds", "0", "--runs", "~/runs") == 0
    assert (tmp_path / "home" / "runs" / NAME / "seed0" / "record.json").exists()
    capsys.readouterr()
    assert bench.run("--table", "mnist", "--runs", "~no-such-user/runs") == 2
    says = "--runs ~no-such-user/runs: ~no-such-user is not a known home folder: write the path without ~"
    assert capsys.readouterr().err == f"reproduce.py: error: {says}\n"


def test_a_log_on_a_full_disk_ends_no_run(bench, monkeypatch):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    bench.recipe(NAME)
    monkeypatch.setattr(sys, "stderr", Full())
    assert bench.run("--table", "mnist", "--seeds", "0") == 0
    assert bench.result(NAME).exists()


def test_an_integer_graph_that_cannot_be_measured_for_want_of_data_hides_no_table(bench, capsys, monkeypatch):
    def measure(model: object, dataset: str) -> Any:
        raise DatasetError("mnist cannot be had")

    monkeypatch.setattr(bench, "measure", measure)
    bench.recipe("mnist_quant_cnv_w4a4")
    assert bench.run("--table", "mnist", "--seeds", "0") == 1
    said = capsys.readouterr()
    assert "| mnist_quant_cnv_w4a4 | 90.00 (1 of 3 seeds)" in said.out
    assert "the config of quant_cnv_w4a4.mnist stays as it was: mnist cannot be had" in said.err
