"""Full and read-only disks, and files where folders should be: one line each, and everything else is done."""

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
    """`unwritable(path, ...)`: neither the paths nor anything below them can be written, even by root."""
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
    """A benchmarks folder with a README, a fast replacement for the plot, and one entry with records."""

    def draw(points: Any, path: Path) -> None:
        write_text(path, f"<svg><desc>{plot.description(points)}</desc></svg>")

    monkeypatch.setattr(plot, "draw", draw)
    write_text(bench.home.parent / "README.md", f"# x\n{readme.START}\n{readme.END}\n")
    bench.recipe(NAME)
    for seed in (0, 1, 2):
        bench.put(NAME, seed, accuracy=90.5)
    return bench


class TestReadOnlyCheckout:
    def test_is_no_error_when_all_files_are_up_to_date(self, checkout, unwritable, capsys):
        assert checkout.run("--table", "mnist") == 0
        unwritable(checkout.home.parent)
        assert checkout.run("--table", "mnist", "--time-limit", "0") == 0
        capsys.readouterr()
        assert checkout.run("--table", "mnist") == 0
        printed = capsys.readouterr()
        assert f"| {NAME} | 90.50 | 0.00 |" in printed.out
        assert "written" not in printed.err

    @pytest.mark.parametrize("more", [(), ("--time-limit", "0")])
    def test_prints_the_tables_and_the_files_that_cannot_be_written(self, checkout, unwritable, capsys, more):
        unwritable(checkout.home.parent)
        assert checkout.run("--table", "mnist", *more) == 1
        printed = capsys.readouterr()
        assert f"| {NAME} | 90.50 | 0.00 |" in printed.out
        page, front = checkout.home / "RESULTS.md", checkout.home.parent / "README.md"
        for path in (page, front):
            assert printed.err.count(f"{path}: cannot be written: Read-only file system: mount it for writing") == 1
        assert (
            "not written, see above: the README, the index of published checkpoints, the page of results" in printed.err
        )

    def test_with_unfinished_runs_returns_the_status_of_an_error(self, checkout, unwritable):
        checkout.recipe(OTHER)
        unwritable(checkout.home.parent)
        assert checkout.run("--table", "mnist", "--time-limit", "0") == 1


def test_tables_that_nothing_reads_do_not_end_the_command(checkout, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert checkout.run("--table", "mnist") == 1
    said = capsys.readouterr().err
    assert "the tables are not printed: nothing reads the output\n" in said
    assert "not written, see above: the printed tables\n" in said


FILES = {
    "the page of results": "benchmarks/RESULTS.md",
    "the README": "README.md",
    "the index of published checkpoints": "src/cnvzoo/checkpoints/index.json",
    "the plots": "benchmarks/accuracy-mnist.svg",
    "the checkpoint of mnist_resnet20": "hub/resnet20.mnist/config.json",
}
MADE_FROM = {  # files that are missing too, because they are made from the first
    "the index of published checkpoints": {"the plots"},
    "the checkpoint of mnist_resnet20": {"the index of published checkpoints", "the plots"},
}


@pytest.mark.parametrize("what", FILES)
def test_when_one_file_cannot_be_written_the_others_are(checkout, unwritable, capsys, what):
    root = checkout.home.parent
    checkout.recipe(OTHER)
    checkout.recipe("mnist_mobilenet_v1")  # a plot has two checkpoints at least
    unwritable(root / FILES[what], code=errno.ENOSPC)
    assert checkout.run("--table", "mnist", "--seeds", "0") == 1
    printed = capsys.readouterr()
    assert f"| {OTHER} | 90.00 (1 of 3 seeds)" in printed.out
    problem = f"{what} stays as it was: {root / FILES[what]}: cannot be written: No space left on device: free some"
    assert problem in printed.err
    assert f"not written, see above: {what}\n" in printed.err
    texts = {name: (root / path).read_text() if (root / path).exists() else "" for name, path in FILES.items()}
    without = {name for name, text in texts.items() if OTHER not in text and "resnet20.mnist" not in text}
    assert without == {what} | MADE_FROM.get(what, set())


@pytest.mark.parametrize("at_once", ["1", "2"])
def test_a_run_whose_files_cannot_be_written_fails_and_the_others_finish(bench, unwritable, capsys, at_once):
    bench.recipe(NAME)
    bench.recipe(OTHER)
    unwritable(bench.runs / NAME / "seed0", code=errno.ENOSPC)
    assert bench.run("--table", "mnist", "--seeds", "0", "1", "--at-once", at_once) == 1
    record = bench.runs / NAME / "seed0" / "record.json"
    printed = capsys.readouterr()
    line = f"{NAME} seed 0 failed: {record}: cannot be written: No space left on device: free some space there"
    assert line in printed.err
    assert f"failed, see above: {NAME} seed 0\n" in printed.err
    assert f"| {OTHER} | 90.50 (2 of 3 seeds)" in printed.out
    assert bench.result(NAME, 1).exists()


def test_a_record_that_could_not_be_copied_is_copied_by_the_next_command(bench, unwritable, capsys):
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
def test_a_file_as_the_folder_of_runs_is_refused(bench, tmp_path, capsys, below):
    bench.recipe(NAME)
    (tmp_path / "file").write_text("kept")
    runs = tmp_path / "file" / below
    assert bench.run("--table", "mnist", "--runs", str(runs)) == 2
    says = f"--runs {runs}: {tmp_path / 'file'} is a file, not a folder: choose another folder"
    assert capsys.readouterr().err == f"reproduce.py: error: {says}\n"
    assert (tmp_path / "file").read_text() == "kept"


def test_the_folder_of_runs_may_start_with_a_tilde(bench, tmp_path, capsys, monkeypatch):
    bench.recipe(NAME)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert bench.run("--table", "mnist", "--seeds", "0", "--runs", "~/runs") == 0
    assert (tmp_path / "home" / "runs" / NAME / "seed0" / "record.json").exists()
    capsys.readouterr()
    assert bench.run("--table", "mnist", "--runs", "~no-such-user/runs") == 2
    says = "--runs ~no-such-user/runs: ~no-such-user is not a known home folder: write the path without ~"
    assert capsys.readouterr().err == f"reproduce.py: error: {says}\n"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EPIPE])
def test_a_run_finishes_when_its_log_cannot_be_written(bench, monkeypatch, code):
    class Unwritable(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(code, os.strerror(code))

    bench.recipe(NAME)
    monkeypatch.setattr(sys, "stderr", Unwritable())
    assert bench.run("--table", "mnist", "--seeds", "0") == 0
    assert bench.result(NAME).exists()


def test_tables_are_printed_when_an_integer_graph_cannot_be_measured(bench, capsys, monkeypatch):
    def measure(model: object, dataset: str) -> Any:
        raise DatasetError("no images of mnist")

    monkeypatch.setattr(bench, "measure", measure)
    bench.recipe("mnist_quant_cnv_w4a4")
    assert bench.run("--table", "mnist", "--seeds", "0") == 1
    printed = capsys.readouterr()
    assert "| mnist_quant_cnv_w4a4 | 90.00 (1 of 3 seeds)" in printed.out
    assert "the config of quant_cnv_w4a4.mnist stays as it was: no images of mnist" in printed.err
