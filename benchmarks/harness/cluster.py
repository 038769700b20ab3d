"""A runner on a Ray cluster: each run is an actor on some node, and its files are copied back as they are written.

`execute` chooses what to train next, as for local runs; Ray chooses the node. What a node needs goes with the run: the
code, the recipe, the weights that it starts or learns from, its last state, and its dataset unless the node has it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

import cnvzoo
from cnvzoo.data.datasets import load_dataset
from cnvzoo.data.published import default_root
from cnvzoo.errors import CnvzooError, in_a_line
from cnvzoo.files import FileError, replacing, sha256_of
from cnvzoo.training.record import RunRecord, current_commit
from cnvzoo.training.run import run_recipe
from cnvzoo.training.state import RECORD, RUN_WEIGHTS, STATE, TEACHER_LOGITS, RunError, RunInterrupted, alone_in
from harness.cluster_worker import Assignment, Known, RunResult, UnfitNode, Worker, installed_versions, refusal
from harness.entries import HarnessError
from harness.schedule import Run
from harness.workers import AT_ONCE_ON_A_GPU, Stop, Train, Weights, WorkerEnded, usable_cores

_POLL_SECONDS = 0.2
_LINES_SECONDS = 1.0
_NODES_SECONDS = 2.0
_ANSWER_SECONDS = 60.0
_MOST_WORKERS = 10  # of one run: a run that crashes its node would otherwise crash one node after another
_GPU_SHARE = 0.3333  # AT_ONCE_ON_A_GPU of them fit on one, in Ray's steps of 0.0001
# settings of the kernels that decide bits, and whether loops are compiled: those of a local run
_SETTINGS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "TORCHDYNAMO_DISABLE")

assert AT_ONCE_ON_A_GPU * _GPU_SHARE <= 1


def _ray() -> Any:
    """The package, which is imported when it is used. Raises HarnessError if it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default, else it warns
    try:
        import ray
    except ImportError as error:
        raise HarnessError(
            f"--on ray needs the package ray ({error}): python3 dev.py setup, or pip install --group ray"
        ) from None
    return ray


@contextmanager
def joined_cluster() -> Iterator[None]:
    """Inside, this process is connected to the cluster of RAY_ADDRESS, or to a new one on this machine alone.

    Raises HarnessError if there is no such cluster, or a node has other versions of what decides bits.
    """
    ray = _ray()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    address = os.environ.get("RAY_ADDRESS", "")
    new = {"address": "local", "num_cpus": usable_cores(), "include_dashboard": False}
    code = [str(Path(cnvzoo.__file__).parent), str(Path(__file__).parent)]
    settings = {name: os.environ[name] for name in _SETTINGS if name in os.environ}
    environment = {"py_modules": code, "env_vars": settings}
    try:
        ray.init(
            **({"address": address} if address else new),
            runtime_env=environment,
            log_to_driver=False,
            configure_logging=False,
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"the cluster of RAY_ADDRESS={address} cannot be joined" if address else "Ray cannot be started"
        raise HarnessError(f"{where}: {in_a_line(error)}") from None
    try:
        for number, handler in handlers.items():  # Ray has set one of its own
            if handler is not None:  # code outside Python had set it, and Python cannot restore it
                signal.signal(number, handler)
        _check_nodes(ray)
        yield
    finally:
        ray.shutdown()


def _check_nodes(ray: Any) -> None:
    """Raise HarnessError, naming them, if nodes have other versions than this process."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    versions = ray.remote(num_cpus=0, max_retries=0)(installed_versions)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    there = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    answers = [versions.options(scheduling_strategy=strategy).remote() for strategy in there]
    ours, problems = installed_versions(), []
    for node, answer in zip((node["NodeName"] for node in nodes), answers, strict=True):
        try:
            problems.append(refusal(node, ray.get(answer, timeout=_ANSWER_SECONDS), ours))
        except ray.exceptions.RayError as error:
            problems.append(f"node {node} does not run this code: {_first_line(error)}")
    if found := [problem for problem in problems if problem is not None]:
        raise HarnessError("; ".join(found))


def cluster_device(name: str) -> torch.device:
    """The device that `--device` means on the cluster: `auto` is cuda where a node has a GPU.

    Raises HarnessError if no node has a GPU and one is asked for.
    """
    has_gpu = _ray().cluster_resources().get("GPU", 0) > 0
    if name == "cuda" and not has_gpu:
        raise HarnessError("--device cuda: no node of the cluster has a GPU; start nodes with ray start --num-gpus=N")
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


class _Lost(Exception):
    """The worker of a run, or its node, has died: says how, and whether the run had started there."""

    def __init__(self, how: str, started: bool) -> None:
        super().__init__(how)
        self.started = started


@dataclass
class RayRunner:
    """Trains each run on a node of the cluster that this process is connected to (`joined_cluster`).

    Attributes:
        threads: of each run on a CPU; a run takes so many of Ray's CPUs, and with `cuda` a third of a GPU too.
        device: `cpu` or `cuda`.
        deadline: of time.monotonic().
        say: called with each line about a run, from the thread that waits for it.
        train: called as cnvzoo.training.run_recipe by the worker; nodes must be able to import it.
        state_seconds: after how many seconds a run saves its state, which is then copied back.
    """

    threads: int
    device: torch.device
    deadline: float | None
    say: Callable[[str], None]
    train: Train = run_recipe
    state_seconds: float = 30.0
    waits: ClassVar[bool] = True
    _files: _Files = field(init=False, repr=False)
    _commit: str | None = field(init=False, repr=False)
    _counted: tuple[float, int] = field(default=(-_NODES_SECONDS, 1), repr=False)
    _unfit: set[str] = field(default_factory=set, repr=False)  # IDs of nodes that runs are kept away from
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        self._files, self._commit = _Files(_ray()), current_commit()
        if not any(self._room()):
            on_gpu = " beside a GPU" if self.device.type == "cuda" else ""
            raise HarnessError(f"--threads {self.threads}: no node of the cluster has so many CPUs{on_gpu}")

    def _resources(self) -> dict[str, float]:
        """What a run takes of its node, by Ray's names."""
        return {"CPU": self.threads, **({"GPU": _GPU_SHARE} if self.device.type == "cuda" else {})}

    def _room(self) -> list[int]:
        """How many runs each node takes."""
        with self._lock:
            unfit = set(self._unfit)
        nodes = [node for node in self._files.ray.nodes() if node["Alive"] and node["NodeID"] not in unfit]
        needs = self._resources().items()
        return [min(int(node["Resources"].get(name, 0) / need) for name, need in needs) for node in nodes]

    def at_once(self) -> int:
        """How many runs the nodes take now, at least 1; nodes may come and go."""
        now = time.monotonic()
        if now - self._counted[0] >= _NODES_SECONDS:
            self._counted = now, max(1, sum(self._room()))
        return self._counted[1]

    def run(self, run: Run, weights: Weights, stop: Stop) -> RunRecord:
        name, lost_workers = run.name, 0
        with alone_in(run.run_dir):
            while True:
                worker = self.new_worker()
                try:
                    outcome, files = self._train_on(worker, name, run, weights, stop)
                except UnfitNode as unfit:
                    self._keep_away_from(self._node_of(worker), str(unfit))
                    continue
                except _Lost as lost:
                    lost_workers += 1
                    if reason := self._reason(stop):
                        raise WorkerEnded(name, reason, run.run_dir) from None
                    if lost_workers == _MOST_WORKERS:
                        raise RunError(f"its worker died {lost_workers} times; the last time: {lost}") from None
                    if lost.started:  # else Ray chose a node that it did not yet know to be dead
                        then = "resumes from its last state" if run.started else "starts again, as none was saved"
                        self.say(f"{name}: its worker was lost ({lost}); the run {then}")
                    continue
                finally:
                    self._files.ray.kill(worker)
                return self._copied_back(name, run, outcome, files)

    def _reason(self, stop: Stop) -> str | None:
        late = self.deadline is not None and time.monotonic() >= self.deadline
        return stop() or ("time limit" if late else None)

    def new_worker(self) -> Any:
        """An actor on a node that Ray chooses among those that have room and are not unfit."""
        resources = {f"num_{name.lower()}s": need for name, need in self._resources().items()}
        with self._lock:
            unfit = sorted(self._unfit)
        elsewhere = {"ray.io/node-id": f"!in({','.join(unfit)})"} if unfit else None
        remote = self._files.ray.remote(
            **resources, label_selector=elsewhere, max_concurrency=4, scheduling_strategy="SPREAD"
        )
        return remote(Worker).remote(os.nice(0))

    def _node_of(self, worker: Any) -> str | None:
        """The ID of the node that the worker is on, or None if the worker has died meanwhile."""
        ray = self._files.ray
        try:
            return ray.get(worker.__ray_call__.remote(_node_id), timeout=_ANSWER_SECONDS)
        except ray.exceptions.RayError:
            return None

    def _keep_away_from(self, node: str | None, problem: str) -> None:
        """Give no more runs to a node that joined with other versions; says so the first time."""
        with self._lock:
            known = node is None or node in self._unfit
            if node is not None:
                self._unfit.add(node)
        if not known:
            self.say(f"{problem}; no run is given to it")

    def _train_on(self, worker: Any, name: str, run: Run, weights: Weights, stop: Stop) -> RunResult:
        """Wait for what the worker returns; raises _Lost if it dies before."""
        ray, started = self._files.ray, False
        try:
            ready = worker.ready.remote(installed_versions())
            while not ray.wait([ready], timeout=_POLL_SECONDS)[0]:
                if reason := self._reason(stop):  # no node had room for it
                    raise WorkerEnded(name, reason, run.run_dir)
            self.say(f"{name}: on {ray.get(ready)}")
            training = self._start(worker, run, weights)
            started = True
            return self._watch(worker, training, name, run, stop)
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from None
        except (ray.exceptions.RuntimeEnvSetupError, ray.exceptions.ActorUnschedulableError) as error:
            raise RunError(f"no worker could be started: {_first_line(error)}") from None
        except ray.exceptions.RayError as error:
            raise _Lost(type(error).__name__, started) from None

    def _start(self, worker: Any, run: Run, weights: Weights) -> Any:
        """Send the worker what it needs; returns the reference of its outcome."""
        ray, files = self._files.ray, self._files
        dataset = run.entry.recipe.dataset
        path, sha256 = files.dataset(dataset)
        data_root = ray.get(worker.data_root.remote(dataset, sha256))
        if data_root is None:
            data_root = ray.get(worker.receive_dataset.remote(dataset, sha256, files.sent(path, sha256)))
        inputs = [
            (purpose, path)
            for purpose, paths in weights.items()
            for path in (paths if isinstance(paths, list) else [paths])
        ]
        assignment = Assignment(
            run=replace(run, record_path=None, replaces=()),
            train=self.train,
            device=self.device.type,
            threads=self.threads,
            seconds_left=None if self.deadline is None else self.deadline - time.monotonic(),
            save_every=self.state_seconds,
            inputs=tuple(purpose for purpose, _ in inputs),
            several=frozenset(purpose for purpose, paths in weights.items() if isinstance(paths, list)),
            data_root=data_root,
        )
        state = (run.run_dir / STATE).read_bytes() if run.started else None
        return worker.train.remote(assignment, state, *(files.sent(path, sha256_of(path)) for _, path in inputs))

    def _watch(self, worker: Any, training: Any, name: str, run: Run, stop: Stop) -> RunResult:
        """Forward lines, states and the first reason to stop until the worker returns."""
        ray = self._files.ray
        asked = False
        known: Known | None = None
        lines_at = states_at = time.monotonic()
        while not ray.wait([training], timeout=_POLL_SECONDS)[0]:
            now = time.monotonic()
            if not asked and (reason := stop()):
                worker.stop.remote(reason)
                asked = True
            if now - lines_at >= _LINES_SECONDS:
                self._say_lines(worker)
                lines_at = now
            if now - states_at >= self.state_seconds and not asked:
                found = _answer(ray, worker.state.remote(known))
                if found is not None:
                    known, content = found
                    _write(run.run_dir / STATE, content)
                states_at = now
        outcome = ray.get(training)
        self._say_lines(worker)
        return outcome

    def _say_lines(self, worker: Any) -> None:
        for line in _answer(self._files.ray, worker.lines.remote()) or ():
            self.say(line)

    def _copied_back(
        self, name: str, run: Run, outcome: RunRecord | CnvzooError, files: Mapping[str, bytes]
    ) -> RunRecord:
        """Write the files of an outcome to the folder of the run; returns the record or raises the error."""
        unsaved = None
        try:
            for file, content in files.items():
                _write(run.run_dir / file, content)
        except FileError as error:
            if not isinstance(outcome, RunInterrupted):
                raise
            unsaved = str(error)
        if isinstance(outcome, WorkerEnded):
            raise WorkerEnded(name, outcome.reason, run.run_dir)
        if isinstance(outcome, RunInterrupted):
            unsaved = unsaved or outcome.unsaved
            raise RunInterrupted(name, outcome.reason, outcome.step, outcome.total_steps, run.run_dir, unsaved)
        if isinstance(outcome, CnvzooError):
            raise outcome
        if sha256_of(run.run_dir / RUN_WEIGHTS) != outcome.weights_sha256:
            raise RunError("its weights were damaged on their way from the cluster: the same command tries again")
        # the worker has the code of this checkout, but not the checkout
        record = outcome.model_copy(update={"commit": self._commit}) if outcome.commit is None else outcome
        record.write(run.run_dir / RECORD)
        for file in (STATE, TEACHER_LOGITS):
            (run.run_dir / file).unlink(missing_ok=True)
        return record


@dataclass
class _Files:
    """Files in the object store, each once, however many runs need it."""

    ray: Any
    _sent: dict[str, Any] = field(default_factory=dict)
    _datasets: dict[str, tuple[Path, str]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def sent(self, path: Path, sha256: str) -> Any:
        """A reference to the bytes of a file with this sha256."""
        with self._lock:
            if sha256 not in self._sent:
                self._sent[sha256] = self.ray.put(path.read_bytes())
            return self._sent[sha256]

    def dataset(self, name: str) -> tuple[Path, str]:
        """The file of a dataset in the cache of this machine, where it is made if it is missing, and its sha256."""
        with self._lock:
            if name not in self._datasets:
                load_dataset(name)
                path = default_root() / f"{name}.safetensors"
                self._datasets[name] = path, sha256_of(path)
            return self._datasets[name]


def _answer(ray: Any, asked: Any) -> Any:
    """What a worker answers, or None if it takes too long: it is asked again later."""
    try:
        return ray.get(asked, timeout=_ANSWER_SECONDS)
    except ray.exceptions.GetTimeoutError:
        return None


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _node_id(worker: Worker) -> str:
    """The ID of the node of an actor, for `__ray_call__`, which calls it there."""
    return _ray().get_runtime_context().get_node_id()


def _cause(error: Any) -> CnvzooError:
    """The error that a method of a worker raised."""
    return error.cause if isinstance(error.cause, CnvzooError) else RunError(in_a_line(error.cause))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
