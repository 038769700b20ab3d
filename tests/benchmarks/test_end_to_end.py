"""The harness with real training, on a few random images: the seam between the two, and a real signal."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from workbench import Bench

from cnvzoo.data import Dataset, dataset_info
from cnvzoo.files import sha256_of
from cnvzoo.train import RunRecord, run_recipe, trainer
from cnvzoo.train.schedule import lr_factor


@pytest.fixture
def real(bench: Bench) -> Bench:
    generator = torch.Generator().manual_seed(0)

    def noise(below: int, *shape: int) -> torch.Tensor:
        return torch.randint(below, shape, generator=generator, dtype=torch.uint8)

    tiny = Dataset(
        info=replace(dataset_info("mnist"), train_size=64, test_size=20),
        train_images=noise(256, 64, 28, 28, 1),
        train_labels=noise(10, 64),
        test_images=noise(256, 20, 28, 28, 1),
        test_labels=noise(10, 20),
    )
    bench.recipe("mnist_resnet20", epochs=3, batch_size=16, precision="fp32")
    bench.train = partial(run_recipe, dataset=tiny, quiet=True)
    return bench


def test_a_run_that_sigterm_stops_goes_on_to_the_same_weights(real, monkeypatch, tmp_path):
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
