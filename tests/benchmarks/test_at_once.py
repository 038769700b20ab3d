"""Parallel runs: when each starts, what the end of one means for the others, and who writes messages and records."""

from __future__ import annotations

import errno
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import harness.execute
import pytest
import torch
from harness import outputs, workers
from harness.entries import Layout
from harness.execute import execute
from harness.records import Records
from harness.schedule import Run, make_plan
from harness.workers import LocalRunner, default_runs_at_once, process_settings
from tiny import publish_tiny, tiny
from workbench import FLOAT, QUANTIZED, Bench, FakeTraining

from cnvzoo.data import DatasetError
from cnvzoo.training import RunInterrupted, RunRecord, run_recipe
from cnvzoo.training.device import deterministic

OTHER = "cifar10_resnet20"
TIMEOUT = 60


class HookedTraining:
    """Replaces run_recipe: FakeTraining with a function called before each run, and a count of simultaneous runs."""

    def __init__(self, before_run: Callable[[tuple[str, int], Callable[[], str | None]], object]) -> None:
        self.before_run, self.fake = before_run, FakeTraining()
        self.running = self.most_running = 0
        self._counting = threading.Lock()

    def __call__(self, recipe: Any, **arguments: Any) -> RunRecord:
        with self._counting:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            if reason := self.before_run((recipe.name, arguments["seed"]), arguments["stop"]):
                self.fake.stop_at[recipe.name, arguments["seed"]] = str(reason)
            return self.fake(recipe, **arguments)
        finally:
            with self._counting:
                self.running -= 1


def until_stopped(stop: Callable[[], str | None]) -> str:
    end = time.monotonic() + TIMEOUT
    while (reason := stop()) is None:
        assert time.monotonic() < end, "no request to stop this run arrived"
        time.sleep(0.01)
    return reason


@pytest.fixture
def three_entries(bench):
    """Two float entries and a quantized one; their order in the table is FLOAT, OTHER, QUANTIZED."""
    bench.recipe(FLOAT)
    bench.recipe(OTHER)
    bench.recipe(QUANTIZED, float_start=FLOAT)
    return bench


def unfinished(message: str) -> list[str]:
    return [line.strip().split(":")[0] for line in message.splitlines() if line.startswith("  ")]


def test_the_requested_number_of_runs_is_trained_in_parallel(bench):
    for name in ("mnist_resnet20", "mnist_cnv"):
        bench.recipe(name)
    meeting = threading.Barrier(3)
    bench.train = training = HookedTraining(lambda key, stop: meeting.wait(TIMEOUT) and None)
    assert bench.run("--table", "mnist", "--at-once", "3") == 0
    assert training.most_running == 3
    assert sorted(training.fake.calls[:3]) == [("mnist_cnv", 0), ("mnist_resnet20", 0), ("mnist_resnet20", 1)]
    for name in ("mnist_resnet20", "mnist_cnv"):
        assert [RunRecord.read(bench.result(name, seed)).accuracy for seed in (0, 1, 2)] == [90, 91, 92]


def test_a_run_waits_for_its_float_start_while_later_runs_start(three_entries):
    order: list[tuple[str, int]] = []
    next_seed = threading.Event()

    def before_run(key: tuple[str, int], _: object) -> None:
        order.append(key)
        if key == (FLOAT, 1):
            next_seed.set()
        if key == (FLOAT, 0):
            assert next_seed.wait(TIMEOUT)
            assert (QUANTIZED, 0) not in order

    three_entries.train = training = HookedTraining(before_run)
    assert three_entries.run("--table", "cifar10", "--seeds", "0", "1", "--at-once", "2") == 0
    assert sorted(order[:2]) == [(FLOAT, 0), (OTHER, 0)]
    assert order[2] == (FLOAT, 1)
    assert set(order[3:]) == {(QUANTIZED, 0), (OTHER, 1), (QUANTIZED, 1)}
    starts = [options["float_start"] for options in training.fake.options if options["float_start"]]
    assert starts == [three_entries.runs / FLOAT / "seed0" / "weights.safetensors"] * 2


def test_when_a_run_fails_only_the_runs_that_start_from_it_fail_too(three_entries, capsys):
    three_entries.training.fail_at.add((FLOAT, 0))
    assert three_entries.run("--table", "cifar10", "--seeds", "0", "1", "--at-once", "3") == 1
    calls = [(FLOAT, 0), (OTHER, 0), (FLOAT, 1), (OTHER, 1)]
    assert sorted(three_entries.training.calls) == sorted(calls)
    message = capsys.readouterr().err
    assert f"{QUANTIZED} seed 0 failed: it needs the weights of {FLOAT} seed 0, which are missing" in message
    assert f"failed, see above: {FLOAT} seed 0, {QUANTIZED} seed 0, {QUANTIZED} seed 1\n" in message


def test_messages_and_files_are_written_in_the_calling_thread(three_entries):
    entries = {name: three_entries.entry(name) for name in (FLOAT, OTHER, QUANTIZED)}
    records = Records(entries, Layout.of(three_entries.home, three_entries.runs))
    runs = make_plan(list(entries.values()), (0, 1, 2), records=records)
    calls_in_main: list[bool] = []
    runs_in_main: list[bool] = []

    def note(*_: object) -> None:
        calls_in_main.append(threading.current_thread() is threading.main_thread())

    training = HookedTraining(
        lambda key, stop: runs_in_main.append(threading.current_thread() is threading.main_thread())
    )
    outcome = execute(
        runs,
        LocalRunner(training, torch.device("cpu"), None),
        at_once=4,
        records=records,
        deadline=None,
        say=note,
        on_finished=note,
    )
    assert (outcome.failed, outcome.left, outcome.stopped) == ([], [], None)
    assert calls_in_main == [True] * 27  # three calls for each of 9 runs: its start, its end and the pages
    assert runs_in_main == [False] * 9


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_all_parallel_runs(three_entries, capsys, number, status):
    meeting = threading.Barrier(3, action=lambda: os.kill(os.getpid(), number))

    def before_run(key: tuple[str, int], stop: Callable[[], str | None]) -> str | None:
        if key == (FLOAT, 0):
            return None
        meeting.wait(TIMEOUT)
        return until_stopped(stop)

    three_entries.train = HookedTraining(before_run)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert three_entries.run("--table", "cifar10", "--seeds", "0", "1", "--at-once", "3") == status
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    message = capsys.readouterr().err
    assert f"stopped ({number.name})" in message
    assert unfinished(message) == [
        f"{OTHER} seed 0",
        f"{QUANTIZED} seed 0",
        f"{FLOAT} seed 1",
        f"{OTHER} seed 1",
        f"{QUANTIZED} seed 1",
    ]
    assert message.count("state in") == 3
    assert message.count("not started") == 2
    assert three_entries.result(FLOAT).exists()


def test_a_run_that_reaches_the_time_limit_stops_the_others(three_entries, capsys):
    three_entries.train = HookedTraining(lambda key, stop: "time limit" if key == (OTHER, 0) else until_stopped(stop))
    assert three_entries.run("--table", "cifar10", "--seeds", "0", "--at-once", "2") == 3
    assert unfinished(capsys.readouterr().err) == [f"{FLOAT} seed 0", f"{OTHER} seed 0", f"{QUANTIZED} seed 0"]


def test_after_the_time_limit_no_run_starts_and_a_run_that_finishes_is_recorded(three_entries, capsys, monkeypatch):
    both_run = threading.Barrier(2)

    def pass_the_limit(key: tuple[str, int], stop: object) -> None:
        both_run.wait(timeout=60)
        monkeypatch.setattr(harness.execute, "time", SimpleNamespace(monotonic=lambda: math.inf))

    three_entries.train = training = HookedTraining(pass_the_limit)
    assert three_entries.run("--table", "cifar10", "--seeds", "0", "--at-once", "2", "--time-limit", "600") == 3
    assert sorted(training.fake.calls) == [(FLOAT, 0), (OTHER, 0)]
    assert three_entries.result(FLOAT).exists()
    assert three_entries.result(OTHER).exists()
    assert unfinished(capsys.readouterr().err) == [f"{QUANTIZED} seed 0"]


@pytest.mark.parametrize("at_once", ["1", "3"])
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (KeyError("a\nbug"), r"KeyError: 'a\\nbug' \(test_at_once\.py, line \d+\)"),
        (RuntimeError("a\n  bug"), r"RuntimeError: a bug \(test_at_once\.py, line \d+\)"),
        (OSError(errno.ENOSPC, "No space left on device", "/a/log"), "/a/log: No space left on device"),
        (DatasetError("no data"), "no data"),
    ],
)
def test_an_exception_in_a_run_is_the_failure_of_that_run_only(three_entries, capsys, at_once, error, says):
    def before_run(key: tuple[str, int], _: object) -> None:
        if key == (FLOAT, 0):
            raise error

    three_entries.train = training = HookedTraining(before_run)
    assert three_entries.run("--table", "cifar10", "--seeds", "0", "1", "--at-once", at_once) == 1
    assert sorted(training.fake.calls) == [(FLOAT, 1), (OTHER, 0), (OTHER, 1)]
    printed = capsys.readouterr()
    assert re.search(f"^{FLOAT} seed 0 failed: {says}$", printed.err, re.MULTILINE)
    assert f"| {OTHER} | 90.50" in printed.out


@pytest.mark.parametrize("at_once", ["1", "3"])
def test_a_keyboard_interrupt_in_a_run_stops_all_runs(three_entries, at_once):
    def before_run(key: tuple[str, int], _: object) -> None:
        raise KeyboardInterrupt

    three_entries.train = training = HookedTraining(before_run)
    assert three_entries.run("--table", "cifar10", "--seeds", "0", "--at-once", at_once) == 130
    assert training.fake.calls == []


def test_an_error_outside_the_runs_stops_them_and_their_state_is_saved(three_entries, monkeypatch):
    asked: list[str] = []

    def before_run(key: tuple[str, int], stop: Callable[[], str | None]) -> str | None:
        if key == (FLOAT, 0):
            return None
        asked.append(until_stopped(stop))
        return asked[0]

    def page(*_: object) -> str:
        raise KeyError("a bug")

    three_entries.train = HookedTraining(before_run)
    monkeypatch.setattr(outputs, "page", page)
    with pytest.raises(KeyError, match="a bug"):
        three_entries.run("--table", "cifar10", "--seeds", "0", "--at-once", "2")
    assert asked == ["an error"]
    assert (three_entries.runs / OTHER / "seed0" / "state.safetensors").exists()


def test_parallel_runs_give_the_same_weights_as_single_runs(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling would take most of the time
    publish_tiny(monkeypatch.setattr)
    bench.recipe("mnist_resnet20", epochs=3, batch_size=16)
    bench.train = partial(run_recipe, dataset=tiny(), quiet=True)
    assert bench.run("--table", "mnist") == 0
    alone = [RunRecord.read(bench.result("mnist_resnet20", seed)).weights_sha256 for seed in (0, 1, 2)]
    assert len(set(alone)) == 3
    again = ("--table", "mnist", "--retrain", "--at-once", "3", "--runs", str(tmp_path / "again"))
    assert bench.run(*again) == 0
    records = [RunRecord.read(bench.result("mnist_resnet20", seed)) for seed in (0, 1, 2)]
    assert [record.weights_sha256 for record in records] == alone
    assert {record.device["threads"] for record in records} == {1}


def test_the_stop_function_interrupts_a_run(tmp_path, bench, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    publish_tiny(monkeypatch.setattr)
    bench.recipe("mnist_resnet20", epochs=3, batch_size=16)
    recipe = bench.entry("mnist_resnet20").recipe
    asked = iter([None] * 5)
    with pytest.raises(RunInterrupted) as caught:
        run_recipe(recipe, run_dir=tmp_path, dataset=tiny(), quiet=True, stop=lambda: next(asked, "SIGTERM"))
    assert (caught.value.reason, caught.value.step, caught.value.total_steps) == ("SIGTERM", 5, 12)
    assert (tmp_path / "state.safetensors").exists()


def test_the_number_of_threads_is_set_for_the_runs_and_restored(bench):
    before = torch.get_num_threads()
    seen: list[int] = []
    bench.recipe("mnist_cnv")
    bench.train = HookedTraining(lambda key, stop: seen.append(torch.get_num_threads()))
    assert bench.run("--table", "mnist", "--seeds", "0", "--threads", str(before + 1)) == 0
    assert bench.run("--table", "mnist", "--seeds", "1") == 0
    assert seen == [before + 1, 1]
    assert torch.get_num_threads() == before


def test_deterministic_kernels_stay_on_when_one_of_several_runs_ends():
    def switches() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32

    gpu, before = torch.device("cuda"), switches()
    with process_settings(gpu, 1):
        first, second = deterministic(gpu), deterministic(gpu)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert switches() == (True, False)
        second.__exit__(None, None, None)
        assert switches() == (True, False)
    assert switches() == before


def test_each_of_several_runs_on_a_gpu_has_its_own_stream(three_entries, monkeypatch):
    made: list[str] = []
    current: list[str] = []

    @contextmanager
    def stream(name: str) -> Iterator[None]:
        current.append(name)
        yield
        current.remove(name)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(f"{device} {len(made)}") or made[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    training = HookedTraining(lambda key, stop: seen.append(list(current)))
    seen: list[list[str]] = []
    runner = LocalRunner(training, torch.device("cuda", 1), None, own_stream=True)
    for seed in (0, 1):
        runner.run(Run(three_entries.entry(FLOAT), seed, three_entries.runs / str(seed)), {}, lambda: None)
    assert seen == [["cuda:1 0"], ["cuda:1 1"]]


@pytest.mark.parametrize(("cores", "threads", "runs"), [(8, 1, 8), (8, 3, 2), (2, 4, 1)])
def test_the_default_number_of_runs_follows_from_the_cores_and_threads(monkeypatch, cores, threads, runs):
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert default_runs_at_once(torch.device("cpu"), threads) == runs
    assert default_runs_at_once(torch.device("cuda"), threads) == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--at-once", "0"], "'0' is not a number of runs: a whole number, 1 or more"),
        (["--threads", "1.5"], "'1.5' is not a number of threads: a whole number, from 1 to 1024"),
        (["--threads", "1025"], "'1025' is not a number of threads: a whole number, from 1 to 1024"),
    ],
)
def test_numbers_of_runs_and_threads_out_of_range_are_refused(
    bench: Bench, wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.run("--table", "mnist", *wrong)
    assert message in capsys.readouterr().err


def test_a_device_that_is_missing_is_an_invalid_request(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_cuda(*_: object, **__: object) -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    bench.recipe("mnist_cnv")
    monkeypatch.setattr(torch, "empty", no_cuda)
    assert bench.run("--table", "mnist", "--device", "cuda") == 2
    error = "error: --device cuda: device 'cuda' cannot be used (Torch not compiled with CUDA enabled)"
    assert error in capsys.readouterr().err
    assert bench.training.calls == []


def test_a_signal_while_states_are_saved_at_the_time_limit_stops_what_follows(three_entries, capsys):
    def interrupt_once_asked_to_stop(key: tuple[str, int], stop: Callable[[], str | None]) -> str:
        if key == (OTHER, 0):
            return "time limit"
        reason = until_stopped(stop)
        os.kill(os.getpid(), signal.SIGINT)
        return reason

    three_entries.train = HookedTraining(interrupt_once_asked_to_stop)
    assert three_entries.run("--table", "cifar10", "--seeds", "0", "--at-once", "2", "--publish", "store") == 130
    assert "stopped (SIGINT); the same command resumes here" in capsys.readouterr().err
    assert three_entries.verified == []


def test_a_failed_run_is_told_by_the_status_after_the_time_limit_too(three_entries, capsys):
    def fail_or_stop(key: tuple[str, int], stop: Callable[[], str | None]) -> str:
        if key == (OTHER, 0):
            return "time limit"
        until_stopped(stop)
        raise RuntimeError("a bug")

    three_entries.train = HookedTraining(fail_or_stop)
    assert three_entries.run("--table", "cifar10", "--seeds", "0", "--at-once", "2") == 1
    assert f"failed, see above: {FLOAT} seed 0" in capsys.readouterr().err
