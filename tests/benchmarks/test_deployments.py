"""The integer graph of each quantized checkpoint is measured once, and its results are published with it."""

from __future__ import annotations

import pytest
from workbench import Bench

from cnvzoo.checkpoints.folder import read_config
from cnvzoo.checkpoints.format import FileFacts
from cnvzoo.checkpoints.index import read_index

QUANTIZED = "mnist_quant_cnv_w2a2"


@pytest.fixture
def bench_of_two(bench: Bench) -> Bench:
    bench.recipe("mnist_cnv")
    bench.recipe(QUANTIZED)
    return bench


def run(bench: Bench) -> int:
    return bench.run("--table", "mnist", "--seeds", "0")


def test_quantized_checkpoints_are_measured_once(bench_of_two):
    assert run(bench_of_two) == 0
    assert bench_of_two.measured == [("quant_cnv_w2a2.mnist", "mnist")]
    folder = bench_of_two.hub / "quant_cnv_w2a2.mnist"
    result = read_config(folder).integer
    assert result is not None
    assert (result.correct, result.agreeing, result.bytes) == (8990, 9991, 500)
    assert "| 89.90 | 8,990 of 10,000 | 9,991 | 2 of 1,000 |" in (folder / "README.md").read_text()
    assert read_config(bench_of_two.hub / "cnv.mnist").integer is None
    assert run(bench_of_two) == 0
    assert len(bench_of_two.measured) == 1


def test_the_index_has_the_config_with_the_result(bench_of_two):
    run(bench_of_two)
    index = read_index(bench_of_two.home.parent / "src" / "cnvzoo" / "checkpoints" / "index.json")
    for name in ("config.json", "README.md"):
        content = (bench_of_two.hub / "quant_cnv_w2a2.mnist" / name).read_bytes()
        assert index.checkpoints["quant_cnv_w2a2.mnist"].files[name] == FileFacts.of(content)


def test_the_result_is_kept_with_another_seed_and_measured_again_with_new_weights(bench_of_two):
    run(bench_of_two)
    bench_of_two.run("--table", "mnist", "--seeds", "0", "1")
    assert len(bench_of_two.measured) == 1
    config = read_config(bench_of_two.hub / "quant_cnv_w2a2.mnist")
    assert len(config.results) == 2
    assert config.integer is not None
    bench_of_two.training.variant = "new "
    bench_of_two.run("--table", "mnist", "--entry", QUANTIZED, "--seeds", "0", "--retrain")
    assert len(bench_of_two.measured) == 2


def test_a_checkpoint_that_cannot_be_measured_is_reported_and_stays_as_it_was(bench_of_two, capsys):
    bench_of_two.unmeasurable = "ONNX Runtime and the reference differ"
    assert run(bench_of_two) == 0
    assert "quant_cnv_w2a2.mnist: not measured as an integer graph: ONNX Runtime and" in capsys.readouterr().err
    assert read_config(bench_of_two.hub / "quant_cnv_w2a2.mnist").integer is None


def test_nothing_is_measured_after_the_time_limit(bench_of_two):
    run(bench_of_two)
    folder = bench_of_two.hub / "quant_cnv_w2a2.mnist"
    (folder / "config.json").unlink()
    bench_of_two.run("--table", "mnist", "--seeds", "0", "--time-limit", "0")
    assert len(bench_of_two.measured) == 1
