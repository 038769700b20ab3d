"""Runs on a GPU: captured steps, and bits that do not depend on the rest of the program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import CNV_BITS, StepHook, interrupted, recipe, run

from cnvzoo.training import Recipe, RunRecord

pytestmark = pytest.mark.cuda

RECIPES: dict[str, dict[str, Any]] = {
    "float": {},
    "quantized": CNV_BITS | {"optimizer": {"name": "muon", "lr": 0.02, "sgd_lr": 0.05}},
}


@pytest.fixture(scope="module", params=RECIPES)
def wanted(request: pytest.FixtureRequest) -> Recipe:
    return recipe(**RECIPES[request.param])


@pytest.fixture(scope="module")
def whole(wanted: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return run(wanted, tmp_path_factory.mktemp("whole"), device="cuda")


def test_an_interrupted_run_ends_with_the_same_bits(
    wanted: Recipe, whole: RunRecord, tmp_path: Path, each_step: StepHook
) -> None:
    interrupted(wanted, tmp_path, each_step, device="cuda")
    assert run(wanted, tmp_path, device="cuda").weights_sha256 == whole.weights_sha256


def test_tf32_of_the_program_changes_no_bit_and_stays_on(wanted: Recipe, whole: RunRecord, tmp_path: Path) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert run(wanted, tmp_path, device="cuda").weights_sha256 == whole.weights_sha256
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_random_state_of_the_program_on_the_gpu_is_not_changed(wanted: Recipe, tmp_path: Path) -> None:
    torch.cuda.manual_seed_all(7)
    before = torch.cuda.get_rng_state_all()
    run(wanted, tmp_path, device="cuda", epochs=1)
    assert all(map(torch.equal, torch.cuda.get_rng_state_all(), before))
