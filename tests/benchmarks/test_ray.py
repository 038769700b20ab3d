"""Runs on a real Ray cluster of two nodes on this machine: one is killed, and the weights are those of local runs."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.cluster import RayRunner, cluster_device, joined_cluster
from harness.entries import HarnessError, Layout
from harness.execute import Outcome, execute
from harness.records import Records
from harness.schedule import make_plan
from harness.workers import LocalRunner, Runner, process_settings
from tiny import publish_tiny
from tiny_cluster import TrainTiny, visible_gpus, write_tiny
from workbench import Bench

from cnvzoo.training import RunRecord, run_recipe
from cnvzoo.training.state import load_checked

ray = pytest.importorskip("ray", reason="the package ray is not installed")

TEACHER, STUDENT = "mnist_resnet20", "mnist_resnet32"
SEEDS = {TEACHER: (0, 1, 2), STUDENT: (0,)}
TIMEOUT = 120
# with these the cluster declares a killed node dead after about 5 seconds, and with Ray's defaults after more than 15
HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 4
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A cluster of two nodes, of two CPUs and of one; neither has a dataset, and this process does."""
    from ray.cluster_utils import Cluster

    here = tmp_path_factory.mktemp("here")
    write_tiny(here)
    folders = [str(ROOT / "tests" / "benchmarks"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))
        patch.setenv("CNVZOO_DATA", str(tmp_path_factory.mktemp("nowhere")))
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = Cluster()
        made.add_node(
            num_cpus=2, include_dashboard=False, env_vars={"TINY_NODE": "first"}, _system_config=HEALTH_CHECKS
        )
        made.add_node(num_cpus=1, env_vars={"TINY_NODE": "second"})
        patch.setenv("CNVZOO_DATA", str(here))
        patch.setenv("RAY_ADDRESS", str(made.address))
        publish_tiny(patch.setattr)
        yield made
        made.shutdown()


def with_entries(bench: Bench) -> Bench:
    bench.recipe(TEACHER, epochs=3, batch_size=32)
    bench.recipe(STUDENT, epochs=3, batch_size=32, teacher=TEACHER)
    return bench


def train(
    bench: Bench,
    runner: Runner,
    at_once: int | Callable[[], int],
    say: Callable[[str], None] = print,
    entries: tuple[str, ...] = (TEACHER, STUDENT),
) -> Outcome:
    found = {name: bench.entry(name) for name in entries}
    records = Records(found, Layout.of(bench.home, bench.runs))
    runs = [
        run
        for run in make_plan(list(found.values()), SEEDS[TEACHER], records=records)
        if run.seed in SEEDS[run.entry.name]
    ]
    return execute(runs, runner, at_once=at_once, records=records, deadline=None, say=say, on_finished=lambda: None)


def on_cluster(say: Callable[[str], None], training: TrainTiny, **options: Any) -> RayRunner:
    """A runner that copies every state back at once."""
    defaults = {"threads": 1, "device": torch.device("cpu"), "deadline": None, "state_seconds": 0.1}
    return RayRunner(say=say, train=training, **{**defaults, **options})


def weights(bench: Bench) -> dict[tuple[str, int], str]:
    return {
        (name, seed): RunRecord.read(path).weights_sha256
        for name, seeds in SEEDS.items()
        for seed in seeds
        if (path := bench.result(name, seed)).exists()
    }


@pytest.fixture(scope="module")
def local(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], str]:
    """The weights of all runs, trained in this process."""
    bench = with_entries(Bench(tmp_path_factory.mktemp("local")))
    runner = LocalRunner(partial(run_recipe, quiet=True), torch.device("cpu"), None)
    with process_settings(torch.device("cpu"), 1):
        assert train(bench, runner, 1).failed == []
    return weights(bench)


def test_runs_on_two_nodes_one_of_which_is_killed_have_the_weights_of_local_runs(bench, cluster, local):
    with_entries(bench)
    lines: list[str] = []
    killed: list[str] = []

    def note(line: str) -> None:
        """Have the second node killed when a run there has sent the state and the line of its first epoch."""
        lines.append(line)
        name, _, rest = line.partition(": ")
        if rest == "node second" and not killed:
            killed.append(name)
            entry, _, seed = name.partition(", seed ")
            state = bench.runs / entry / f"seed{seed}" / "state.safetensors"
            threading.Thread(target=kill_second_node, args=(state, f"{name}: epoch 1")).start()

    def kill_second_node(state: Path, shown: str) -> None:
        steps = 64 // 32  # of an epoch
        while not state.exists() or load_checked(state)[1]["values"]["step"] < steps:
            time.sleep(0.02)
        while not any(line.startswith(shown) for line in lines):
            time.sleep(0.02)
        (node,) = cluster.worker_nodes
        cluster.remove_node(node, allow_graceful=False)

    with joined_cluster():
        runner = on_cluster(note, TrainTiny(TIMEOUT, nodes=("second",)))
        assert runner.at_once() == 3
        outcome = train(bench, runner, runner.at_once, note)
        assert runner.at_once() == 2
    assert (outcome.failed, outcome.left, outcome.stopped) == ([], [], None)
    assert weights(bench) == local
    assert len(local) == 4
    (lost,) = (line for line in lines if "its worker was lost" in line)
    assert lost.startswith(f"{killed[0]}: ")
    assert lost.endswith("; the run resumes from its last state")
    assert [line for line in lines if line.startswith(f"{killed[0]}: node")] == [
        f"{killed[0]}: node second", f"{killed[0]}: node first",
    ]  # fmt: skip
    assert len([line for line in lines if line.startswith(f"{killed[0]}: epoch 1")]) == 1


@contextmanager
def node_with_old_numpy(cluster: Any, folder: Path, **resources: int) -> Iterator[None]:
    """Inside, the cluster has a node whose packages say that numpy is 0.1."""
    other = folder / "numpy-0.1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.1\n")
    path = os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])
    node = cluster.add_node(**resources, env_vars={"PYTHONPATH": path})
    try:
        yield
    finally:
        cluster.remove_node(node)


def test_a_node_that_joins_with_other_versions_gets_no_run_and_three_workers_share_its_gpu(
    bench, cluster, local, tmp_path
):
    with_entries(bench)
    lines: list[str] = []
    with joined_cluster():
        runner = on_cluster(lines.append, TrainTiny())
        there = runner.at_once()
        with pytest.raises(HarnessError, match="--device cuda: no node of the cluster has a GPU"):
            cluster_device("cuda")
        with node_with_old_numpy(cluster, tmp_path, num_cpus=4, num_gpus=1):
            assert cluster_device("auto") == torch.device("cuda")
            on_gpus = partial(on_cluster, print, TrainTiny(), device=torch.device("cuda"))
            assert on_gpus(threads=2).at_once() == 2
            with pytest.raises(HarnessError, match="--threads 5: no node of the cluster has so many CPUs beside a GPU"):
                on_gpus(threads=5)
            assert on_gpus().at_once() == 3
            workers = [on_gpus().new_worker() for _ in range(3)]
            shares = [worker.__ray_call__.remote(visible_gpus) for worker in workers]
            assert ray.get(shares, timeout=TIMEOUT) == ["0"] * 3
            for worker in workers:
                ray.kill(worker)
            outcome = train(bench, runner, there + 1, lines.append, entries=(TEACHER,))
    assert (outcome.failed, outcome.left, outcome.stopped) == ([], [], None)
    assert weights(bench) == {key: sha256 for key, sha256 in local.items() if key[0] == TEACHER}
    (refused,) = (line for line in lines if "numpy 0.1" in line)
    assert refused.endswith("or take it off the cluster; no run is given to it")


def test_ctrl_c_copies_the_states_back_and_this_machine_resumes_from_them(bench, cluster, local, tmp_path, capsys):
    """Before that, a node with another version of numpy joins, and is refused."""
    with_entries(bench)
    command = ("--table", "mnist", "--entry", TEACHER, "--seeds", "0", "1")
    with node_with_old_numpy(cluster, tmp_path, num_cpus=0):
        assert bench.run(*command, "--on", "ray") == 2
    assert re.search(rf"error: node \S+ has numpy 0\.1, here {np.__version__}: install the", capsys.readouterr().err)

    states = [bench.runs / TEACHER / f"seed{seed}" / "state.safetensors" for seed in (0, 1)]
    bench.train = TrainTiny(2, nodes=("first", "second"))

    def interrupt_when_both_train() -> None:
        printed = ""
        while not all(f"{TEACHER}, seed {seed}: epoch 1/3" in printed for seed in (0, 1)):
            time.sleep(0.1)
            printed += capsys.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt_when_both_train)
    thread.start()
    assert bench.run(*command, "--on", "ray", "--at-once", "2") == 130
    thread.join()
    assert "stopped (SIGINT); the same command resumes here. Left, 2 in all:" in capsys.readouterr().err
    assert [state.exists() for state in states] == [True, True]

    bench.train = partial(run_recipe, quiet=True)
    assert bench.run(*command, "--at-once", "1") == 0  # in this process: others would import torch again
    assert capsys.readouterr().err.count("resuming from the state") == 2
    assert weights(bench) == {key: sha256 for key, sha256 in local.items() if key in ((TEACHER, 0), (TEACHER, 1))}
