"""Worker processes: their arguments and results, the ways they end, and that their weights are those of single runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from textwrap import dedent
from typing import Any

import pytest
from filelock import FileLock
from harness.entries import Layout
from harness.execute import Outcome, execute
from harness.records import Records
from harness.schedule import Run, make_plan
from harness.workers import ProcessRunner
from tiny import TINY, Script, publish_tiny, tiny, train_tiny
from workbench import Bench, make_record

from cnvzoo.errors import CnvzooError
from cnvzoo.training import RunError, RunInterrupted, RunRecord, RunUnderWay, run_recipe
from cnvzoo.training.state import load_checked

ENTRY = "mnist_resnet20"
TIMEOUT = 120


def prepared(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Add an entry of 5 epochs of 2 steps, which trains uncompiled: compiling would take most of the time."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    publish_tiny(monkeypatch.setattr)
    bench.recipe(ENTRY, epochs=5, batch_size=32)
    bench.train = partial(run_recipe, dataset=tiny(), quiet=True)
    return bench


@pytest.fixture
def entry(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return prepared(bench, monkeypatch)


# --- workers that run a few lines of code instead of training


def run(
    bench: Bench, code: str, seed: int = 0, *, stop: Callable[[], str | None] = lambda: None, **options: Any
) -> RunRecord:
    defaults = {"threads": 1, "deadline": None, "say": lambda line: None, "train": Script(dedent(code))}
    folder = bench.runs / ENTRY / f"seed{seed}"
    return ProcessRunner(**{**defaults, **options}).run(Run(bench.entry(ENTRY), seed, folder), {}, stop)


def test_a_worker_gets_its_arguments_and_its_record_is_returned(entry, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    record = make_record(entry.entry(ENTRY).recipe, 2, total=20, correct=18)
    record.write(entry.runs / "record.json")
    code = f"""
        import os, signal, time, torch
        from cnvzoo.training import RunRecord
        assert recipe.name == "{ENTRY}" and options["seed"] == 2 and options["epochs"] is None
        assert str(options["run_dir"]) == {str(entry.runs / ENTRY / "seed2")!r}
        assert 900 < options["deadline"] - time.monotonic() <= 1000
        assert options["stop"]() is None
        assert os.environ["OMP_NUM_THREADS"] == "3" and torch.get_num_threads() == 3
        assert "FORCE_COLOR" not in os.environ
        os.kill(os.getpid(), signal.SIGINT)  # is ignored
        record = RunRecord.read({str(entry.runs / "record.json")!r})
    """
    before = os.environ.get("OMP_NUM_THREADS")
    assert run(entry, code, 2, threads=3, deadline=time.monotonic() + 1000) == record
    assert os.environ.get("OMP_NUM_THREADS") == before


@pytest.mark.parametrize(
    ("code", "error", "says"),
    [
        ("from cnvzoo.training import RunUnderWay as E; raise E('another process')", RunUnderWay, "^another process$"),
        ("raise KeyError('a bug')", CnvzooError, r"^KeyError: 'a bug' \(<string>, line 1\)$"),
        (
            "from cnvzoo.training import RunInterrupted as E; raise E('a, seed 0', 'SIGINT', 3, 9, '', 'no space')",
            RunInterrupted,
            r"\(SIGINT\) after step 3 of 9; .*: no space$",
        ),
    ],
)
def test_the_error_of_a_worker_is_raised(entry, code, error, says):
    with pytest.raises(error, match=says) as caught:
        run(entry, code)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("end", "says"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", r"was killed by signal 9 \(Killed\), as the kernel does when memory"),
        ("sys.exit(7)", r"ended with status 7\. Its last lines"),
    ],
)
def test_a_worker_that_dies_is_a_failed_run_with_its_last_lines(entry, end, says):
    """The worker prints its lines in pieces; lines that do not name the run get its name in front."""
    code = f"""
        import os, signal, sys
        for number in range(9):
            end = "\\n" if number < 8 else ""
            for piece in ("line ", f"{{number}}\\n", "{ENTRY}, seed 0: and ", "its name" + end):
                os.write(2, piece.encode())
        {end}
    """
    lines: list[str] = []
    with pytest.raises(RunError, match=says) as caught:
        run(entry, code, say=lines.append)
    name = f"{ENTRY}, seed 0"
    assert lines == [text for n in range(9) for text in (f"{name}: line {n}", f"{name}: and its name")]
    assert str(caught.value).endswith(f"\n  line 7\n  {name}: and its name\n  line 8\n  {name}: and its name")
    assert "line 6" not in str(caught.value)


def test_a_worker_terminated_outside_training_is_a_stopped_run(entry):
    with pytest.raises(RunInterrupted, match=r"stopped \(SIGTERM\); the same command") as caught:
        run(entry, "import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    assert caught.value.reason == "SIGTERM"


def test_a_worker_that_cannot_be_started_is_a_failed_run(entry):
    from multiprocessing import spawn

    executable = spawn.get_executable()
    spawn.set_executable("/nowhere/python")
    try:
        with pytest.raises(RunError, match=r"its worker process ended with status 255"):
            run(entry, "")
    finally:
        spawn.set_executable(executable)


def test_a_worker_is_asked_to_stop_once(entry):
    code = """
        import sys, time
        from cnvzoo.training import RunInterrupted
        print("ready", file=sys.stderr, flush=True)
        while not (reason := options["stop"]()):
            time.sleep(0.05)
        time.sleep(0.5)  # a second request would end the process when the first is followed by the end of the parent
        raise RunInterrupted("a, seed 0", reason, 1, 2, options["run_dir"])
    """
    ready = threading.Event()
    asked: list[str] = []

    def stop() -> str | None:
        if ready.is_set():
            asked.append("SIGINT")
            return "SIGINT"
        return None

    with pytest.raises(RunInterrupted, match="after step 1 of 2") as caught:
        run(entry, code, stop=stop, say=lambda line: ready.set())
    assert caught.value.reason == "SIGINT"
    assert len(asked) == 1


# --- workers that train


def test_an_error_of_run_recipe_is_the_same_in_a_worker(bench):
    bench.recipe("mnist_cnv")
    bench.recipe("mnist_quant_cnv_w4a4", float_start="mnist_cnv")
    runner = ProcessRunner(threads=1, deadline=None, say=print)
    with pytest.raises(RunError, match="starts from the weights of mnist_cnv, seed 0, and no file was given"):
        runner.run(Run(bench.entry("mnist_quant_cnv_w4a4"), 1, bench.runs / "run"), {}, lambda: None)


def train_two_seeds(bench: Bench, say: Callable[[str], None], deadline: float | None = None) -> Outcome:
    """Train two seeds in parallel, each in a worker."""
    records = Records({ENTRY: bench.entry(ENTRY)}, Layout.of(bench.home, bench.runs))
    runs = make_plan(list(records.entries.values()), (0, 1), records=records)
    return execute(
        runs,
        ProcessRunner(threads=1, deadline=deadline, say=say, train=train_tiny),
        at_once=2,
        records=records,
        deadline=deadline,
        say=say,
        on_finished=lambda: None,
    )


def weights(bench: Bench) -> list[str]:
    return [RunRecord.read(bench.result(ENTRY, seed)).weights_sha256 for seed in (0, 1)]


@pytest.fixture(scope="module")
def weights_of_single_runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The weights of the same runs, one after the other in this process."""
    with pytest.MonkeyPatch.context() as patch:
        bench = prepared(Bench(tmp_path_factory.mktemp("alone")), patch)
        assert bench.run("--table", "mnist", "--seeds", "0", "1") == 0
    return weights(bench)


def has_state(bench: Bench) -> list[bool]:
    return [(bench.runs / ENTRY / f"seed{seed}" / "state.safetensors").exists() for seed in (0, 1)]


def test_workers_stopped_by_the_time_limit_resume_to_the_weights_of_single_runs(
    entry, monkeypatch, weights_of_single_runs
):
    monkeypatch.setenv("TINY_LATE", "1")
    outcome = train_two_seeds(entry, lambda line: None, deadline=time.monotonic() + 1000)
    assert (outcome.stopped, [run.seed for run in outcome.left]) == ("time limit", [0, 1])
    states = [entry.runs / ENTRY / f"seed{seed}" / "state.safetensors" for seed in (0, 1)]
    steps = [load_checked(state)[1]["values"]["step"] for state in states]
    assert 2 <= max(steps) < 10

    monkeypatch.delenv("TINY_LATE")
    outcome = train_two_seeds(entry, lambda line: None)
    assert (outcome.failed, outcome.left, outcome.stopped) == ([], [], None)
    assert has_state(entry) == [False, False]
    assert weights(entry) == weights_of_single_runs


@pytest.fixture
def command(entry: Bench) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`command(**environment)`: reproduce.py with two workers that pause after their first epoch.

    It has its own process group, as in a terminal, because Ctrl-C is sent to the whole group.
    """
    options = f"--table mnist --seeds 0 1 --device cpu --at-once 2 --runs {entry.runs}"
    started: list[subprocess.Popen[str]] = []

    def start(**environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(TINY), str(entry.home), *options.split()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"TINY_PAUSE": "1000"} | environment,
        )
        started.append(process)
        read_until(process, *(f"{ENTRY}, seed {seed}: epoch 1/5" for seed in (0, 1)))
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def read_until(process: subprocess.Popen[str], *wanted: str) -> list[str]:
    assert process.stderr is not None
    missing, lines = set(wanted), []
    while missing:
        line = process.stderr.readline()
        assert line, f"ended without {missing}: {lines}"
        lines.append(line)
        missing -= {start for start in missing if line.startswith(start)}
    return lines


def test_ctrl_c_stops_all_workers_and_the_same_command_resumes(entry, command, weights_of_single_runs):
    process = command()
    os.killpg(process.pid, signal.SIGINT)
    printed = process.communicate(timeout=TIMEOUT)[1]
    assert process.returncode == 130
    assert "stopped (SIGINT); the same command resumes here. Left, 2 in all:" in printed
    assert printed.count("state in") == 2
    assert "Traceback" not in printed
    assert has_state(entry) == [True, True]
    assert entry.run("--table", "mnist", "--seeds", "0", "1") == 0  # in this process, from the states of the workers
    assert weights(entry) == weights_of_single_runs


def test_a_second_ctrl_c_kills_the_workers_too(entry, command):
    process = command(TINY_DEAF="1")
    os.killpg(process.pid, signal.SIGINT)
    read_until(process, "stopping (SIGINT): 2 under way")
    time.sleep(1)  # the threads that tell the workers poll ten times a second
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=TIMEOUT) == -signal.SIGINT
    for seed in (0, 1):
        with FileLock(entry.runs / ENTRY / f"seed{seed}" / ".lock", timeout=TIMEOUT):
            pass  # a worker holds it for as long as it lives


def test_workers_whose_parent_is_killed_save_their_state_and_end(entry, command):
    process = command()
    os.kill(process.pid, signal.SIGKILL)
    for seed in (0, 1):
        with FileLock(entry.runs / ENTRY / f"seed{seed}" / ".lock", timeout=TIMEOUT):
            assert not (entry.runs / ENTRY / f"seed{seed}" / "record.json").exists()
    assert has_state(entry) == [True, True]
