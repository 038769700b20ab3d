"""What the machine of a run on a cluster does: train it in a process as a local run, and hand its files over.

Nothing here depends on Ray: cluster.py makes a `Worker` an actor, whose methods are called at the same time in
threads of one process.
"""

from __future__ import annotations

import collections
import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cnvzoo.data.published import default_root
from cnvzoo.errors import CnvzooError
from cnvzoo.files import replacing, sha256_of
from cnvzoo.training.record import RunRecord
from cnvzoo.training.state import RUN_WEIGHTS, STATE, RunError, UnfitState
from harness.schedule import Run
from harness.workers import ProcessRunner, Train, picklable

RunResult = tuple["RunRecord | CnvzooError", dict[str, bytes]]  # with the files of the run folder, by name
Known = tuple[int, ...]  # tells versions of a file apart

_DECIDE_BITS = ("torch", "numpy", "brevitas")  # those of describe_versions that the code sent along does not decide


def installed_versions() -> dict[str, str]:
    """Versions of the packages that the bits of a run depend on."""
    found = {}
    for package in _DECIDE_BITS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def refusal(node: str, theirs: Mapping[str, str], ours: Mapping[str, str]) -> str | None:
    """Why `node` may not train, by the versions there and here, or None."""
    keys = [name for name in ours if theirs.get(name) != ours[name]]
    if not keys:
        return None
    differences = ", ".join(f"{name} {theirs.get(name)}, here {ours[name]}" for name in keys)
    return f"node {node} has {differences}: install the versions of constraints.txt on both, or take it off the cluster"


class UnfitNode(RunError):
    """A node has other versions of what decides bits than the command."""


@dataclass(frozen=True)
class Assignment:
    """One run as a worker gets it, without the files that go with it.

    Attributes:
        run: whose folder is that of the command; the worker has its own.
        train: called as cnvzoo.training.run_recipe, in a process of its own.
        device: `cpu` or `cuda`.
        threads: of the run on a CPU.
        seconds_left: until the deadline.
        save_every: seconds between saved states.
        inputs: arguments of `train` that take the weights sent along, in their order: `float_start` and `teacher`.
        several: those of them that take a list.
        data_root: folder of the dataset cache.
    """

    run: Run
    train: Train
    device: str
    threads: int
    seconds_left: float | None
    save_every: float
    inputs: tuple[str, ...]
    several: frozenset[str]
    data_root: Path


class Worker:
    """Trains one run on its node; every method but `train` returns at once.

    Args:
        nice: niceness of the training process, at least.
    """

    def __init__(self, nice: int = 0) -> None:
        os.nice(max(0, nice - os.nice(0)))
        self._lines: collections.deque[str] = collections.deque()
        self._reasons: list[str] = []
        self._folder: Path | None = None

    def ready(self, versions: Mapping[str, str]) -> str:
        """The name of this node. Raises UnfitNode if other versions than `versions` are installed here."""
        node = socket.gethostname()
        if problem := refusal(node, installed_versions(), versions):
            raise UnfitNode(problem)
        return node

    def data_root(self, dataset: str, sha256: str) -> Path | None:
        """The folder here that holds the file of a dataset with this sha256, or None."""
        name = f"{dataset}.safetensors"
        roots = (default_root(), _received(sha256))
        return next((root for root in roots if (root / name).is_file() and sha256_of(root / name) == sha256), None)

    def receive_dataset(self, dataset: str, sha256: str, content: bytes) -> Path:
        """Keep the file of a dataset for all runs on this machine, and return its folder.

        Raises RunError if it was damaged on its way, and FileError if it cannot be written.
        """
        if hashlib.sha256(content).hexdigest() != sha256:
            raise RunError(f"{dataset} was damaged on its way to {socket.gethostname()}: try again")
        with replacing(_received(sha256) / f"{dataset}.safetensors") as temporary:
            temporary.write_bytes(content)
        return _received(sha256)

    def train(self, assignment: Assignment, state: bytes | None, *weights: bytes) -> RunResult:
        """Train or resume the run; returns its record with the weights, or its error with the state, if there is one.

        A state that does not fit this machine is not used: the run starts anew.
        """
        folder = Path(tempfile.mkdtemp(prefix="cnvzoo-run-"))
        try:
            run = replace(assignment.run, run_dir=folder / "run")
            run.run_dir.mkdir()
            if state is not None:
                (run.run_dir / STATE).write_bytes(state)
            inputs: dict[str, Path | list[Path]] = {}
            for number, (purpose, content) in enumerate(zip(assignment.inputs, weights, strict=True)):
                path = folder / f"input{number}.safetensors"
                path.write_bytes(content)
                if purpose in assignment.several:
                    inputs[purpose] = [*_as_list(inputs.get(purpose)), path]
                else:
                    inputs[purpose] = path
            self._folder = run.run_dir
            outcome = self._train(assignment, run, inputs)
            name = RUN_WEIGHTS if isinstance(outcome, RunRecord) else STATE
            path = run.run_dir / name
            return outcome, {name: path.read_bytes()} if path.exists() else {}
        finally:
            self._folder = None
            shutil.rmtree(folder, ignore_errors=True)

    def _train(
        self, assignment: Assignment, run: Run, inputs: Mapping[str, Path | list[Path]]
    ) -> RunRecord | CnvzooError:
        left = assignment.seconds_left
        runner = ProcessRunner(
            threads=assignment.threads,
            deadline=None if left is None else time.monotonic() + left,
            say=self._lines.append,
            train=partial(assignment.train, save_every=assignment.save_every, data_root=assignment.data_root),
            device=assignment.device,
        )

        def stop() -> str | None:
            return next(iter(self._reasons), None)

        try:
            try:
                return runner.run(run, inputs, stop)
            except UnfitState as error:
                self._lines.append(f"{run.name}: starts anew, as its state was saved with {error.differences}")
                error.path.unlink()
                return runner.run(run, inputs, stop)
        except Exception as error:
            return picklable(error)

    def stop(self, reason: str) -> None:
        """Ask the run to save its state and stop."""
        self._reasons.append(reason)

    def lines(self) -> list[str]:
        """What the run has printed since the last call."""
        return [self._lines.popleft() for _ in range(len(self._lines))]

    def state(self, known: Known | None) -> tuple[Known, bytes] | None:
        """The saved state, unless there is none or it is the one that is `known`."""
        folder = self._folder
        try:
            if folder is None:
                return None
            with (folder / STATE).open("rb") as file:  # whole, even if it is replaced while it is read
                facts = os.fstat(file.fileno())
                found = (facts.st_ino, facts.st_mtime_ns, facts.st_size)
                return None if found == known else (found, file.read())
        except FileNotFoundError:
            return None


def _received(sha256: str) -> Path:
    """The folder of a dataset that was sent to this machine; load_dataset checks what is in it, as in any cache."""
    return Path(tempfile.gettempdir()) / f"cnvzoo-datasets-{os.getuid()}" / sha256[:16]


def _as_list(paths: Path | list[Path] | None) -> list[Path]:
    return paths if isinstance(paths, list) else [] if paths is None else [paths]
