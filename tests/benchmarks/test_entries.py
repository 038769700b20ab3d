"""Which entries the recipes in configs/ give, and their order in the tables."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from harness.entries import HarnessError, load_entries, select_entries
from workbench import BENCHMARKS

GREY = ["resnet18", "resnet20", "mobilenet_v1", "cnv"]
COLOUR = ["mobilenet_v1", "cnv", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]
QUANTIZED = ["quant_cnv_w8a8", "quant_cnv_w4a4", "quant_cnv_w2a2"]
TABLES = {
    "mnist": GREY + QUANTIZED,
    "fashion_mnist": GREY,
    "cifar10": COLOUR + QUANTIZED,
    "cifar100": COLOUR + QUANTIZED,
}
EXTRA = [
    "quant_mobilenet_v1_w4a4",
    "quant_resnet20_w4a4", "quant_resnet20_w2a2", "quant_resnet56_w4a4", "quant_resnet56_w2a2",
]  # fmt: skip
NAMES = [f"{dataset}_{model}" for dataset, models in TABLES.items() for model in models]
BEYOND = [f"fashion_mnist_{model}" for model in QUANTIZED]
BEYOND += [f"{dataset}_{model}" for dataset in ("cifar10", "cifar100") for model in EXTRA]


def test_entries_have_the_order_of_the_tables(bench):
    names = NAMES + BEYOND
    for name in random.Random(0).sample(names, len(names)):
        bench.recipe(name)
    entries = load_entries(bench.home / "configs")
    assert list(entries) == names
    assert [name for name, entry in entries.items() if entry.table == "extra"] == BEYOND


def test_a_file_with_a_leading_underscore_is_a_base_recipe_and_not_an_entry(bench):
    (bench.home / "configs" / "_base.yaml").write_text("epochs: 7\nbatch_size: 50\noptimizer: {lr: 0.1}\n")
    (bench.home / "configs" / "mnist_cnv.yaml").write_text("extends: _base.yaml\nmodel: cnv\ndataset: mnist\n")
    entries = load_entries(bench.home / "configs")
    assert list(entries) == ["mnist_cnv"]
    assert entries["mnist_cnv"].recipe.epochs == 7


@pytest.mark.parametrize("wrong", ["mnist_cnv", "cifar10_resnet20", "cifar10_quant_cnv_w4a2", "cifar10_quant_cnv"])
def test_a_file_whose_name_does_not_match_its_recipe_is_refused(bench, wrong):
    bench.recipe("cifar10_quant_cnv_w4a4", file=wrong)
    with pytest.raises(HarnessError, match=rf"{wrong}.*cifar10_quant_cnv_w4a4"):
        load_entries(bench.home / "configs")


def test_a_float_start_that_is_no_entry_is_refused(bench):
    bench.recipe("mnist_cnv", file="_own_cnv")
    path = bench.recipe("mnist_quant_cnv_w4a4", float_start="_own_cnv")
    with pytest.raises(HarnessError) as error:
        load_entries(bench.home / "configs")
    assert str(error.value).startswith(f"{path}: float_start: _own_cnv is no entry of a table: ")


def test_selected_entries_have_the_order_of_the_tables(bench):
    for name in NAMES:
        bench.recipe(name)
    entries = load_entries(bench.home / "configs")
    chosen = select_entries(entries, "all", ["cifar10_cnv", "mnist_cnv", "cifar10_cnv"])
    assert [entry.name for entry in chosen] == ["mnist_cnv", "cifar10_cnv"]


def test_the_recipes_of_this_repository_are_those_of_the_tables():
    entries = load_entries(BENCHMARKS / "configs")
    assert list(entries) == NAMES + BEYOND
    for entry in entries.values():
        assert "mnist" not in entry.table or entry.recipe.epochs <= 50, f"{entry.name}: the reference's setting is 50"


def test_the_list_has_a_line_for_every_run():
    command = [sys.executable, str(BENCHMARKS / "reproduce.py"), "--table", "all", "--list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    runs = [(name, str(seed)) for name in NAMES + BEYOND for seed in (0, 1, 2)]
    assert [tuple(line.split("\t")[:2]) for line in listing] == runs
    assert len(listing) == 3 * 44
