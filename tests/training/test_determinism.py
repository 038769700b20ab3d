"""A recipe and a seed give the same bits, in another process and after any number of kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from synthetic import EVERY_AUGMENTATION

from cnvzoo.files import sha256_of

WORKER = Path(__file__).with_name("worker.py")
STEPS = 12  # of two epochs, six each
RECIPES: dict[str, dict[str, Any]] = {
    "float": {
        "name": "cifar10_resnet8",
        "dataset": "cifar10",
        "augmentation": EVERY_AUGMENTATION,
        "early_crops": {"side": 20, "epochs": 1},
    },
    "quantized": {
        "name": "mnist_quant_resnet4_w2a2",
        "model": "quant_resnet4",
        "w_bits": 2,
        "a_bits": 2,
        "optimizer": {"name": "muon", "lr": 0.02, "sgd_lr": 0.05, "momentum": 0.95},
        "augmentation": EVERY_AUGMENTATION,
        "label_smoothing": 0.1,
    },
}

Job = dict[str, Any]


def work(*jobs: Job) -> subprocess.CompletedProcess[str]:
    """Run jobs, one after the other, in one fresh process."""
    # compiled float loops are covered by the golden bits; without them a process starts in a fraction of the time
    uncompiled = {} if any("w_bits" in job["recipe"] for job in jobs) else {"TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, str(WORKER), json.dumps(jobs)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | uncompiled)


def finish(*jobs: Job) -> list[str]:
    """The sha256 of the weights of each job, run in one fresh process to its end."""
    done = work(*jobs)
    assert done.returncode == 0, done.stderr
    hashes = done.stdout.split()
    assert hashes == [sha256_of(Path(job["run_dir"]) / "weights.safetensors") for job in jobs]
    return hashes


# within the first epoch; while it saves at the end of that epoch; when all but the record is written
DEATHS = {"float": [["step", 3], ["save", 6], ["record"]], "quantized": [["save", 8]]}


@pytest.mark.parametrize("kind", RECIPES)
def test_a_run_killed_again_and_again_ends_with_the_same_bits_in_a_process_that_trained_others_before(
    kind: str, tmp_path: Path
) -> None:
    """The harness trains entry after entry in one process, and resumes an interrupted one in another.

    The first job of the last process is the run without a stop: nothing else was trained there before it.
    """
    recipe, killed_in = RECIPES[kind], tmp_path / "killed"
    job: Job = {"recipe": recipe, "run_dir": str(killed_in)}
    state = killed_in / "state.safetensors"
    for moment in DEATHS[kind]:
        killed = work(job | {"die": moment})
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        with safe_open(state, framework="pt") as file:
            step = json.loads(file.metadata()["values"])["step"]
        assert step == (STEPS if moment == ["record"] else moment[1] - 1)
        assert not (killed_in / "record.json").exists()
        leftovers = [path.name.split(".")[1] for path in killed_in.glob(".*.tmp")]
        assert leftovers == {"step": [], "save": ["state"], "record": []}[moment[0]]

    earlier = [recipe, recipe | {"seed": 1}]
    if kind == "quantized":  # kernels are compiled for what comes first, and may serve what comes later
        changes = {"batch_size": 16, "epochs": 1, "schedule": {"warmup_epochs": 0}}
        earlier.append(recipe | changes | {"dataset": "cifar10"})
    jobs: list[Job] = [{"recipe": r, "run_dir": str(tmp_path / f"run{number}")} for number, r in enumerate(earlier)]
    uninterrupted, *rest, resumed = finish(*jobs, job)
    assert resumed == uninterrupted
    assert uninterrupted not in rest  # another seed gives other weights
    assert sorted(path.name for path in killed_in.iterdir()) == [".lock", "record.json", "weights.safetensors"]
