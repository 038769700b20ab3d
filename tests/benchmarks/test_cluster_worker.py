"""What a node of a cluster does for a run, without a cluster: states, datasets, versions and errors."""

from __future__ import annotations

import hashlib
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from harness.cluster_worker import Assignment, RunResult, Worker, installed_versions, refusal
from harness.schedule import Run
from tiny import Script
from workbench import Bench, make_record

from cnvzoo.errors import CnvzooError
from cnvzoo.training import RunError, RunInterrupted

ENTRY = "mnist_resnet20"


def train(
    bench: Bench, code: str, *weights: bytes, state: bytes | None = None, **changes: Any
) -> tuple[Worker, RunResult]:
    bench.recipe(ENTRY)
    values: dict[str, Any] = {
        "run": Run(bench.entry(ENTRY), 2, bench.runs / "at-home"), "train": Script(dedent(code)), "device": "cpu",
        "threads": 1, "seconds_left": None, "save_every": 5.0, "inputs": (), "several": frozenset(),
        "data_root": Path("/data"),
    }  # fmt: skip
    worker = Worker()
    return worker, worker.train(Assignment(**values | changes), state, *weights)


def test_a_worker_trains_with_what_was_sent_and_returns_record_and_weights(bench):
    bench.recipe(ENTRY)
    record = make_record(bench.entry(ENTRY).recipe, 2)
    record.write(bench.runs / "record.json")
    code = f"""
        import time
        from pathlib import Path
        from cnvzoo.training import RunRecord
        folder = options["run_dir"]
        assert options["seed"] == 2 and folder != Path({str(bench.runs / "at-home")!r})
        assert (folder / "state.safetensors").read_bytes() == b"the state"
        assert options["float_start"].read_bytes() == b"one"
        assert [path.read_bytes() for path in options["teacher"]] == [b"two", b"three"]
        assert (options["save_every"], str(options["data_root"])) == (5.0, "/data")
        assert 900 < options["deadline"] - time.monotonic() <= 1000
        (folder / "weights.safetensors").write_bytes(b"new weights")
        record = RunRecord.read({str(bench.runs / "record.json")!r})
    """
    _, outcome = train(
        bench, code, b"one", b"two", b"three", state=b"the state", seconds_left=1000.0,
        inputs=("float_start", "teacher", "teacher"), several=frozenset({"teacher"}),
    )  # fmt: skip
    assert outcome == (record, {"weights.safetensors": b"new weights"})


def test_a_run_whose_state_does_not_fit_the_node_starts_anew(bench):
    code = """
        from cnvzoo.training import RunInterrupted
        from cnvzoo.training.state import UnfitState
        state = options["run_dir"] / "state.safetensors"
        if state.exists():
            raise UnfitState(state, "capability AVX512, here AVX2")
        state.write_bytes(b"new")
        raise RunInterrupted("a, seed 2", "time limit", 3, 9, options["run_dir"])
    """
    worker, (error, files) = train(bench, code, state=b"old")
    assert isinstance(error, RunInterrupted)
    assert (error.reason, error.step, error.total_steps) == ("time limit", 3, 9)
    assert files == {"state.safetensors": b"new"}
    assert worker.lines() == [f"{ENTRY}, seed 2: starts anew, as its state was saved with capability AVX512, here AVX2"]
    assert worker.lines() == []


def test_the_error_of_a_run_is_returned_in_a_line(bench):
    _, (error, files) = train(bench, "raise KeyError('a bug')")
    assert type(error) is CnvzooError
    assert str(error) == "KeyError: 'a bug' (<string>, line 1)"
    assert files == {}


def test_a_dataset_is_kept_by_its_sha256(tmp_path, monkeypatch):
    monkeypatch.setenv("CNVZOO_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    worker, content = Worker(), b"images"
    sha256 = hashlib.sha256(content).hexdigest()
    assert worker.data_root("mnist", sha256) is None
    with pytest.raises(RunError, match="mnist was damaged on its way to"):
        worker.receive_dataset("mnist", sha256, b"damaged")
    assert worker.data_root("mnist", sha256) is None
    root = worker.receive_dataset("mnist", sha256, content)
    assert (root / "mnist.safetensors").read_bytes() == content
    assert root.parent.parent == tmp_path / "scratch"
    assert worker.data_root("mnist", sha256) == root
    assert worker.data_root("mnist", "0" * 64) is None
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "mnist.safetensors").write_bytes(content)
    assert worker.data_root("mnist", sha256) == tmp_path / "cache"  # the cache of the node comes first


def test_a_node_with_other_versions_is_refused():
    ours = {"torch": "2.14.1", "numpy": "2.4.6", "brevitas": "0.13.4"}
    assert refusal("n", ours, ours) is None
    assert refusal("n", ours | {"torch": "2.13.0"}, ours) == (
        "node n has torch 2.13.0, here 2.14.1: install the versions of constraints.txt on both, or take it off the "
        "cluster"
    )
    with pytest.raises(RunError, match=r"has numpy \S+, here 0\.1: install"):
        Worker().ready(installed_versions() | {"numpy": "0.1"})
