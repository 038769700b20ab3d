"""reproduce.py with real training on a few random images, stopped by a real signal."""

from __future__ import annotations

import os
import signal
from functools import partial

import pytest
from tiny import publish_tiny, tiny
from workbench import Bench

from cnvzoo.files import sha256_of
from cnvzoo.training import RunRecord, run_recipe, trainer
from cnvzoo.training.optimizers import lr_factor


@pytest.fixture
def real(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    publish_tiny(monkeypatch.setattr)
    bench.recipe("mnist_resnet20", epochs=3, batch_size=16)
    bench.train = partial(run_recipe, dataset=tiny(), quiet=True)
    return bench


def test_a_run_stopped_by_sigterm_resumes_to_the_same_weights(real, monkeypatch, tmp_path):
    one_run = ("--table", "mnist", "--seeds", "1")
    assert real.run(*one_run) == 0
    record = RunRecord.read(real.result("mnist_resnet20", 1))
    assert (record.seed, record.trial, record.total) == (1, False, 20)

    def terminate_at_step_5(schedule, step, *args):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return lr_factor(schedule, step, *args)

    again = (*one_run, "--retrain", "--runs", str(tmp_path / "elsewhere"))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "lr_factor", terminate_at_step_5)
        assert real.run(*again) == 143
    folder = tmp_path / "elsewhere" / "mnist_resnet20" / "seed1"
    assert (folder / "state.safetensors").exists()
    assert not (folder / "weights.safetensors").exists()
    assert real.run(*again) == 0
    assert sha256_of(folder / "weights.safetensors") == record.weights_sha256
