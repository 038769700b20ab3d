"""Worker processes: how they are told and heard, how they may end, and that their bits are those of runs alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from harness import workers as processes
from harness.entries import Layout
from harness.execute import Outcome, execute
from harness.records import Records
from harness.schedule import make_plan
from harness.workers import ProcessRunner, Run
from tiny import TINY, tiny
from workbench import Bench, make_record

from cnvzoo.errors import CnvzooError
from cnvzoo.training import RunError, RunInterrupted, RunRecord, RunUnderWay, TrainingDiverged, run_recipe

ENTRY = "mnist_resnet20"
TIMEOUT = 120


def prepared(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """With a run of 5 epochs of 2 steps, uncompiled: compiling would take most of the time."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    bench.recipe(ENTRY, epochs=5, batch_size=32)
    bench.train = partial(run_recipe, dataset=tiny(), quiet=True)
    return bench


@pytest.fixture
def entry(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return prepared(bench, monkeypatch)


# --- workers of a few lines in the place of those that train: what they may say and how they may end


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`worker(code)`: what runs as a worker; `order` is what it was told."""

    def use(code: str) -> None:
        path = tmp_path / "worker.py"
        path.write_text("import json, os, signal, sys, time\norder = json.loads(sys.argv[1])\n" + textwrap.dedent(code))
        monkeypatch.setattr(processes, "WORKER", path)

    return use


def run(bench: Bench, seed: int = 0, *, stop: Callable[[], str | None] = lambda: None, **options: Any) -> RunRecord:
    runner = ProcessRunner(**{"threads": 1, "deadline": None, "say": lambda line: None} | options)
    folder = bench.runs / ENTRY / f"seed{seed}"
    return runner.run(Run(bench.entry(ENTRY).recipe, seed, folder), stop)


def test_a_worker_is_told_which_run_and_its_record_is_read(entry, worker):
    worker("""
        order["OMP_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
        with open(order["run_dir"] + "/order.json", "w") as file:
            json.dump(order, file)
        print(json.dumps({"finished": "0" * 64}))
    """)
    folder = entry.runs / ENTRY / "seed2"
    record = make_record(entry.entry(ENTRY).recipe, 2)
    record.write(folder / "record.json")
    assert run(entry, 2, threads=3, deadline=time.monotonic() + 1000) == record
    order = json.loads((folder / "order.json").read_text())
    assert 990 < order.pop("seconds_left") <= 1000
    assert order == {
        "recipe": entry.entry(ENTRY).recipe.model_dump(mode="json"),
        "seed": 2,
        "run_dir": str(folder),
        "epochs": None,
        "weights": {},
        "device": "cpu",
        "threads": 3,
        "OMP_NUM_THREADS": "3",
    }


@pytest.mark.parametrize(
    ("report", "error", "says"),
    [
        ({"failed": "RunError", "message": "no such start"}, RunError, "^no such start$"),
        ({"failed": "TrainingDiverged", "message": "the loss is nan"}, TrainingDiverged, "^the loss is nan$"),
        ({"failed": "RunUnderWay", "message": "another process"}, RunUnderWay, "^another process$"),
        ({"failed": "DatasetError", "message": "no data"}, CnvzooError, "^no data$"),
        ({"failed": "KeyError", "message": "KeyError: 'a bug'"}, CnvzooError, "^KeyError: 'a bug'$"),
        (
            {"stopped": "time limit", "step": 3, "total_steps": 9, "unsaved": None},
            RunInterrupted,
            r"\(time limit\) after step 3 of 9; the same command goes on from there$",
        ),
        (
            {"stopped": "SIGINT", "step": 3, "total_steps": 9, "unsaved": "no space"},
            RunInterrupted,
            r"\(SIGINT\) after step 3 of 9; the same command goes on from the last state saved.*: no space$",
        ),
    ],
)
def test_what_a_worker_reports_is_raised(entry, worker, report, error, says):
    worker(f"print({json.dumps(report)!r})")
    with pytest.raises(error, match=says) as caught:
        run(entry)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", r"was killed by signal 9 \(Killed\), as the kernel does where memory"),
        ("os.abort()", r"was killed by signal 6 \(Aborted\)\. Its last lines"),
        ("sys.exit(7)", r"ended with status 7\. Its last lines"),
        ("raise ValueError('a bug')", r"ended with status 1\. (?s:.*)\n  ValueError: a bug$"),
    ],
)
def test_a_worker_that_dies_is_a_run_that_failed_with_its_last_words(entry, worker, code, says):
    worker(f"for number in range(9):\n    print('line', number, file=sys.stderr, flush=True)\n{code}")
    with pytest.raises(RunError, match=says) as caught:
        run(entry)
    assert "\n  line 8" in str(caught.value)
    assert "line 3\n" not in str(caught.value)


@pytest.mark.parametrize(
    "printed", [b"Killed\n", b"\xff\xfe\n", b"[]\n", b"3\n", b"{}\n", b'{"stopped": "SIGINT"}\n', b"\n"]
)
def test_a_worker_whose_report_is_none_is_a_run_that_failed(entry, worker, printed):
    worker(f"os.write(1, {printed!r})")
    with pytest.raises(RunError, match=r"its worker process printed '.*' in the place of a report"):
        run(entry)


def test_what_is_printed_as_a_worker_starts_is_no_part_of_its_report(entry, worker):
    worker("""print('from a sitecustomize.py'); print(json.dumps({"failed": "RunError", "message": "no start"}))""")
    with pytest.raises(RunError, match=r"^no start$"):
        run(entry)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_that_was_told_to_end_outside_training_is_a_run_that_stopped(entry, worker, number):
    worker(f"signal.signal({int(number)}, signal.SIG_DFL); os.kill(os.getpid(), {int(number)})")
    with pytest.raises(RunInterrupted, match=rf"stopped \({number.name}\); the same command") as caught:
        run(entry)
    assert caught.value.reason == number.name


def test_a_worker_that_cannot_be_started_is_a_run_that_failed(entry, monkeypatch):
    monkeypatch.setattr(processes.sys, "executable", "/nowhere/python")
    with pytest.raises(RunError, match=r"cannot be started: .*/nowhere/python"):
        run(entry)


def test_a_worker_is_asked_to_stop_once(entry, worker):
    worker("""
        print("ready", file=sys.stderr, flush=True)
        asked = os.read(0, 100).decode()
        time.sleep(0.5)
        os.set_blocking(0, False)
        try:
            asked += os.read(0, 100).decode()
        except BlockingIOError:
            pass
        print(json.dumps({"stopped": asked, "step": 1, "total_steps": 2, "unsaved": None}))
    """)
    ready = threading.Event()
    with pytest.raises(RunInterrupted) as caught:
        run(entry, stop=lambda: "SIGINT" if ready.is_set() else None, say=lambda line: ready.set())
    assert caught.value.reason == "SIGINT\n"


def test_lines_are_whole_and_name_their_run(entry, worker):
    """Two workers that write in pieces, over each other; the last piece has no end."""
    worker(f"""
        name = f"{ENTRY}, seed {{order['seed']}}"
        for number in range(50):
            for piece in (name, ": line ", f"{{number}}\\n", "a warn", "ing\\n" if number < 49 else "ing"):
                os.write(2, piece.encode())
        print(json.dumps({{"failed": "RunError", "message": "enough"}}))
    """)
    lines: list[str] = []
    threads = [threading.Thread(target=_expect_failure, args=(entry, seed, lines.append)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (0, 1):
        name = f"{ENTRY}, seed {seed}"
        own = [line for line in lines if line.startswith(name)]
        assert own == [line for number in range(50) for line in (f"{name}: line {number}", f"{name}: a warning")]
    assert len(lines) == 200


def _expect_failure(bench: Bench, seed: int, say: Callable[[str], None]) -> None:
    with pytest.raises(RunError, match="enough"):
        run(bench, seed, say=say)


# --- workers that train


def test_the_worker_finds_the_library_and_says_what_is_missing(bench):
    bench.recipe("mnist_cnv")
    bench.recipe("mnist_quant_cnv_w4a4", float_start="mnist_cnv")
    recipe, folder = bench.entry("mnist_quant_cnv_w4a4").recipe, bench.runs / "run"
    runner = ProcessRunner(threads=1, deadline=None, say=print)
    with pytest.raises(RunError, match="starts from the weights of mnist_cnv, seed 0, and no file was given"):
        runner.run(Run(recipe, 1, folder), lambda: None)


def test_the_worker_says_of_a_folder_that_cannot_be_made_what_this_process_would(bench):
    bench.recipe("mnist_cnv")
    bench.runs.write_text("a file")
    runner = ProcessRunner(threads=1, deadline=None, say=print)
    says = f"{bench.runs}/run: cannot be written: {bench.runs} is a file, not a folder: choose another folder"
    with pytest.raises(CnvzooError) as caught:
        runner.run(Run(bench.entry("mnist_cnv").recipe, 0, bench.runs / "run"), lambda: None)
    assert str(caught.value) == says


def all_of_it(bench: Bench, say: Callable[[str], None], deadline: float | None = None) -> Outcome:
    """Two seeds at once, each in a worker."""
    records = Records({ENTRY: bench.entry(ENTRY)}, Layout.of(bench.home, bench.runs))
    jobs = make_plan(list(records.entries.values()), (0, 1), records=records)
    return execute(
        jobs,
        ProcessRunner(threads=1, deadline=deadline, say=say),
        at_once=2,
        records=records,
        deadline=deadline,
        say=say,
        on_finished=lambda: None,
    )


def weights(bench: Bench) -> list[str]:
    return [RunRecord.read(bench.result(ENTRY, seed)).weights_sha256 for seed in (0, 1)]


@pytest.fixture(scope="module")
def weights_alone(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Those of the same runs, one after the other in this process."""
    with pytest.MonkeyPatch.context() as patch:
        bench = prepared(Bench(tmp_path_factory.mktemp("alone")), patch)
        assert bench.run("--table", "mnist", "--seeds", "0", "1") == 0
    return weights(bench)


def has_state(bench: Bench) -> list[bool]:
    return [(bench.runs / ENTRY / f"seed{seed}" / "state.safetensors").exists() for seed in (0, 1)]


def test_workers_stopped_by_time_limit_and_signal_end_with_the_weights_of_runs_alone(entry, monkeypatch, weights_alone):
    monkeypatch.setattr(processes, "WORKER", TINY)
    monkeypatch.setenv("TINY_EPOCH_SECONDS", "1.5")
    outcome = all_of_it(entry, lambda line: None, deadline=time.monotonic() + 2)
    assert (outcome.stopped, [job.seed for job in outcome.left]) == ("time limit", [0, 1])
    assert has_state(entry) == [True, True]

    under_way: set[str] = set()

    def terminate_when_both_train(line: str) -> None:
        name, _, rest = line.partition(": ")
        if rest.startswith("epoch") and name not in under_way:
            under_way.add(name)
            if len(under_way) == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    outcome = all_of_it(entry, terminate_when_both_train)
    assert (outcome.stopped, [job.seed for job in outcome.left]) == ("SIGTERM", [0, 1])
    assert under_way == {f"{ENTRY}, seed 0", f"{ENTRY}, seed 1"}
    assert has_state(entry) == [True, True]

    monkeypatch.setenv("TINY_EPOCH_SECONDS", "0")
    outcome = all_of_it(entry, lambda line: None)
    assert (outcome.failed, outcome.left, outcome.stopped) == ([], [], None)
    assert has_state(entry) == [False, False]
    assert weights(entry) == weights_alone


@pytest.fixture
def command(entry: Bench) -> Iterator[Callable[[float], subprocess.Popen[str]]]:
    """`command(seconds)`: reproduce.py with two workers, whose epochs take so much longer, both in the first.

    As a terminal runs it: in a process group of its own, to all of which it sends Ctrl-C.
    """
    options = f"--table mnist --seeds 0 1 --device cpu --at-once 2 --runs {entry.runs}"
    started: list[subprocess.Popen[str]] = []

    def start(seconds: float) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(TINY), str(entry.home), *options.split()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"TINY_EPOCH_SECONDS": str(seconds)},
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


def test_ctrl_c_stops_all_workers_and_the_same_command_goes_on(entry, command, weights_alone):
    process = command(1.5)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=TIMEOUT)[1]
    assert process.returncode == 130
    assert "stopped (SIGINT); the same command goes on from here. Left, 2 in all:" in said
    assert said.count("state in") == 2
    assert "Traceback" not in said
    assert has_state(entry) == [True, True]
    assert entry.run("--table", "mnist", "--seeds", "0", "1") == 0  # in this process, from the states of the workers
    assert weights(entry) == weights_alone


def test_a_second_ctrl_c_kills_the_workers_too(entry, command):
    process = command(1000)
    os.killpg(process.pid, signal.SIGINT)
    read_until(process, "stopping (SIGINT): 2 under way")
    time.sleep(2)  # the threads that tell the workers look ten times a second
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=TIMEOUT) == -signal.SIGINT
    for seed in (0, 1):
        with FileLock(entry.runs / ENTRY / f"seed{seed}" / ".lock", timeout=TIMEOUT):
            pass  # a worker holds it for as long as it lives


def test_workers_whose_parent_is_killed_save_their_state_and_end(entry, command):
    process = command(1.5)
    os.kill(process.pid, signal.SIGKILL)
    for seed in (0, 1):
        with FileLock(entry.runs / ENTRY / f"seed{seed}" / ".lock", timeout=TIMEOUT):
            assert not (entry.runs / ENTRY / f"seed{seed}" / "record.json").exists()
    assert has_state(entry) == [True, True]
