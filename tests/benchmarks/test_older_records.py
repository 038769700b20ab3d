"""Records of an older arithmetic version, and of weights that were replaced or are unknown."""

from __future__ import annotations

import pytest
from harness.records import load_retired
from workbench import FLOAT, QUANTIZED

from cnvzoo.training import NUMERICS

pytestmark = pytest.mark.usefixtures("no_checkpoints")


def test_a_record_of_older_arithmetic_is_marked_and_trained_again_after_all_missing_runs(bench, capsys):
    for name in ("mnist_cnv", "mnist_resnet20"):
        bench.recipe(name)
    bench.put("mnist_resnet20", 0, accuracy=99.11, numerics=NUMERICS - 1)
    assert bench.run("--table", "mnist", "--seeds", "0", "1", "--time-limit", "0") == 3
    assert "| 99.11†, -, - |" in bench.page
    assert "in no table" not in capsys.readouterr().err
    assert bench.run("--table", "mnist", "--seeds", "0", "1") == 0
    assert bench.training.calls == [
        ("mnist_cnv", 0), ("mnist_resnet20", 1), ("mnist_cnv", 1), ("mnist_resnet20", 0),
    ]  # fmt: skip
    assert "†," not in bench.page
    (retired,) = load_retired(bench.home / "retired.json")
    assert (retired.entry, retired.seed, retired.accuracy, retired.numerics) == ("mnist_resnet20", 0, 99.11, 1)


def test_a_run_that_started_from_weights_of_older_arithmetic_is_trained_again_after_them(bench):
    bench.recipe("cifar10_cnv")
    bench.recipe("cifar10_quant_cnv_w4a4", float_start="cifar10_cnv")
    bench.put("cifar10_cnv", 0, numerics=NUMERICS - 1)
    bench.put("cifar10_quant_cnv_w4a4", 0, accuracy=90.12)
    assert bench.run("--table", "cifar10", "--seeds", "0", "--time-limit", "0") == 3
    assert "| 90.12†, -, - |" in bench.page
    assert bench.run("--table", "cifar10", "--entry", "cifar10_quant_cnv_w4a4", "--seeds", "0") == 0
    assert bench.training.calls == [("cifar10_cnv", 0), ("cifar10_quant_cnv_w4a4", 0)]
    assert "†," not in bench.page


def test_a_run_that_started_from_replaced_weights_is_trained_again(bench):
    bench.recipe("cifar10_cnv")
    bench.recipe("cifar10_quant_cnv_w4a4", float_start="cifar10_cnv")
    for name in ("cifar10_cnv", "cifar10_quant_cnv_w4a4"):
        bench.put(name, 0)
    assert bench.run("--table", "cifar10", "--entry", "cifar10_cnv", "--seeds", "0", "--retrain") == 0
    assert bench.training.calls == [("cifar10_cnv", 0)]
    assert "| 90.00†, -, - |" in bench.page
    assert bench.run("--table", "cifar10", "--seeds", "0") == 0
    assert bench.training.calls[1:] == [("cifar10_quant_cnv_w4a4", 0)]


def test_a_new_recipe_of_the_start_leaves_a_record_in_the_table_and_a_new_one_of_its_own_does_not(bench):
    bench.recipe("cifar10_cnv")
    quantized = {"float_start": "cifar10_cnv", "teacher": "cifar10_cnv"}
    bench.recipe("cifar10_quant_cnv_w4a4", **quantized)
    for name in ("cifar10_cnv", "cifar10_quant_cnv_w4a4"):
        bench.put(name, 0)
    bench.recipe("cifar10_cnv", epochs=12)
    assert bench.run("--table", "cifar10", "--seeds", "0", "--time-limit", "0") == 3
    assert [line.count("| 90.00†, -, - |") for line in bench.page.splitlines() if "configs/" in line] == [0, 1]
    assert bench.run("--table", "cifar10", "--entry", "cifar10_cnv", "--seeds", "0") == 0
    assert bench.training.calls == [("cifar10_cnv", 0)]
    assert "| 90.00†, -, - |" in bench.page
    bench.recipe("cifar10_quant_cnv_w4a4", epochs=12, **quantized)
    assert bench.run("--table", "cifar10", "--seeds", "0", "--time-limit", "0") == 3
    assert "†," not in bench.page
    assert bench.run("--table", "cifar10", "--seeds", "0") == 0
    assert bench.training.calls[1:] == [("cifar10_quant_cnv_w4a4", 0)]


@pytest.mark.parametrize("recorded", [True, False])
def test_start_weights_without_a_record_are_reported(bench, capsys, recorded):
    bench.recipe("cifar10_cnv")
    bench.recipe("cifar10_quant_cnv_w4a4", float_start="cifar10_cnv")
    if recorded:
        bench.put("cifar10_cnv", 0)
    start = {"entry": "cifar10_cnv", "seed": 0, "weights_sha256": "e" * 64}
    bench.put("cifar10_quant_cnv_w4a4", 0, accuracy=12.34, float_start=start)
    bench.run("--table", "cifar10", "--time-limit", "0")
    assert "uses weights of cifar10_cnv seed 0 (eeeeeeee) that have no record" in capsys.readouterr().err
    assert "12.34" not in bench.page


def test_two_seeds_with_the_same_weights_are_one_run_and_its_copy(bench, capsys):
    bench.recipe("mnist_cnv")
    for seed in (0, 1):
        bench.put("mnist_cnv", seed, weights_sha256="a" * 64)
    assert bench.run("--table", "mnist", "--time-limit", "0") == 3
    assert "seed1.json: the weights are those of seed 0; delete it and run again" in capsys.readouterr().err
    assert bench.run("--table", "mnist", "--seeds", "1") == 0
    assert bench.training.calls == [("mnist_cnv", 1)]


def test_a_record_of_an_unknown_float_start_is_refused_where_the_teacher_is_the_same_entry(bench, capsys):
    bench.recipe(FLOAT)
    bench.recipe(QUANTIZED, float_start=FLOAT, teacher=FLOAT)
    bench.put(FLOAT)
    known = {"entry": FLOAT, "seed": 0, "weights_sha256": "0" * 64}
    for start, teacher in (
        (known | {"weights_sha256": "f" * 64}, known),
        (known, known | {"weights_sha256": "f" * 64}),
    ):
        bench.put(QUANTIZED, float_start=start, teacher=[teacher])
        assert bench.run("--table", "cifar10", "--seeds", "0", "--time-limit", "0") == 3
        assert f"uses weights of {FLOAT} seed 0 (ffffffff) that have no record" in capsys.readouterr().err
