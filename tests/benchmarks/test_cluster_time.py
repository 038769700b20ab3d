"""The simulation of all runs on many cores: costs of runs, the schedule, and the longest chain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from harness.cluster_time import Cost, cluster_table, critical_path, list_schedule, run_costs, work
from harness.entries import EXTRA, Layout, load_entries
from harness.records import Records
from harness.schedule import Run
from workbench import CPU, Bench

ONE_THREAD = CPU | {"threads": 1}
# name: seconds, and what it needs; in the order of the queue
GRAPH = {"a": (4, ()), "b": (2, ("a",)), "c": (3, ()), "d": (1, ("b", "c")), "e": (2, ())}


@pytest.fixture
def graph(bench: Bench) -> tuple[list[Run], Callable[[Run], float], Callable[[Run], list[Run]]]:
    bench.recipe("mnist_cnv")
    entry = bench.entry("mnist_cnv")
    runs = {name: Run(entry, 0, Path(name)) for name in GRAPH}
    return (
        list(runs.values()),
        lambda run: GRAPH[run.run_dir.name][0],
        lambda run: [runs[name] for name in GRAPH[run.run_dir.name][1]],
    )


@pytest.mark.parametrize(
    ("cores", "end"),
    [
        (1, 12),
        (2, 7),  # a from 0 to 4 beside c to 3, then e to 5; b from 4 to 6; d to 7
        (3, 7),
        (9, 7),
    ],
)
def test_a_free_core_takes_the_first_run_that_can_start(graph, cores, end):
    runs, seconds, needs = graph
    assert list_schedule(runs, seconds, needs, cores) == end


def test_the_longest_chain_bounds_the_time(graph):
    assert [run.run_dir.name for run in critical_path(*graph)] == ["a", "b", "d"]


def records_of(bench: Bench) -> Records:
    return Records(load_entries(bench.home / "configs"), Layout.of(bench.home, bench.runs))


def test_a_run_without_a_measurement_is_estimated_from_the_closest_one(bench):
    for dataset in ("mnist", "fashion_mnist"):
        bench.recipe(f"{dataset}_resnet20", epochs=10)
    bench.recipe("fashion_mnist_mobilenet_v1", epochs=10)
    bench.recipe("mnist_resnet18", epochs=5)
    bench.put("mnist_resnet20", 0, device=ONE_THREAD, seconds=100.0)
    bench.put("mnist_resnet20", 1, device=ONE_THREAD, seconds=300.0)
    bench.put("mnist_resnet20", 2, device={"kind": "cuda", "name": "a GPU"}, seconds=7.0)
    records = records_of(bench)
    costs = run_costs(records.entries.values(), records.survey())
    assert costs["mnist_resnet20", 0] == Cost(100, "measured")
    assert costs["mnist_resnet20", 1] == Cost(300, "measured")
    assert costs["mnist_resnet20", 2] == Cost(200, "another seed")
    # the same graph on as many images of the same size
    assert costs["fashion_mnist_resnet20", 0] == Cost(200, "another dataset")
    assert costs["mnist_resnet18", 0].source == "another net of the same family"
    assert costs["fashion_mnist_mobilenet_v1", 2].source == "nets of other families"


def test_work_counts_the_steps_and_what_teachers_compute(bench):
    """ResNet-20 has 40.55 million multiply-accumulates for an image of 32 x 32 pixels and 3 channels."""
    bench.recipe("cifar10_resnet20", epochs=10)
    bench.recipe("cifar10_resnet56", epochs=10, teacher="cifar10_resnet20")
    bench.recipe("cifar10_resnet110", epochs=10, teacher="cifar10_resnet20", distillation={"views": 2})
    bench.recipe("cifar10_resnet32", epochs=10, early_crops={"side": 16, "epochs": 8})
    alone = work(bench.entry("cifar10_resnet20").recipe)
    assert alone == pytest.approx(50_000 * 10 * 3 * 40.55e6, rel=0.02)

    def compared(name: str, **changes: object) -> float:
        recipe = bench.entry(name).recipe
        return (work(recipe) - work(recipe.model_copy(update=changes))) / alone

    assert compared("cifar10_resnet56", teacher=()) == pytest.approx(1 / 3)
    assert compared("cifar10_resnet110", teacher=()) == pytest.approx(2 / 10 / 3)
    crops = bench.entry("cifar10_resnet32").recipe
    assert work(crops) / work(crops.model_copy(update={"early_crops": None})) == pytest.approx((2 + 8 / 4) / 10)


def test_the_page_has_the_hours_of_all_runs(bench):
    bench.recipe("mnist_cnv")
    bench.recipe("mnist_quant_cnv_w4a4", float_start="mnist_cnv")
    assert cluster_table(records_of(bench)) == "No run has been measured on a CPU yet."
    for seed in (0, 1, 2):
        bench.put("mnist_cnv", seed, device=ONE_THREAD, seconds=7200.0)
        bench.put("mnist_quant_cnv_w4a4", seed, device=ONE_THREAD, seconds=3600.0)
    assert cluster_table(records_of(bench)).splitlines() == [
        "| cores | hours | cores busy |",
        "| --: | --: | --: |",
        "| 1 | 9.0 | 100 % |",
        "| 8 | 3.0 | 38 % |",
        "| 64 | 3.0 | 5 % |",
        "| 512 | 3.0 | 1 % |",
        "",
        "The 6 runs take 9.0 core hours. The longest chain of runs, each of which needs the weights of the "
        "one before, takes 3.0 hours, which no number of cores shortens: mnist_cnv seed 0 (2.0), then "
        "mnist_quant_cnv_w4a4 seed 0 (1.0). 6 runs are measured, on one core of the machines named in the records.",
    ]


def test_an_entry_of_the_table_extra_may_be_a_teacher(bench):
    bench.recipe("cifar10_resnet18")
    bench.recipe("cifar10_resnet20", teacher="cifar10_resnet18")
    assert bench.entry("cifar10_resnet18").table == EXTRA
    bench.put("cifar10_resnet18", 0, device=ONE_THREAD, seconds=3600.0)
    entries = {name: bench.entry(name) for name in ("cifar10_resnet18", "cifar10_resnet20")}
    table = cluster_table(Records(entries, Layout.of(bench.home, bench.runs)))
    assert table.splitlines()[4].startswith("| ")
    assert "The 4 runs take" in table
    assert "cifar10_resnet18 seed 0 (1.0), then cifar10_resnet20 seed 0" in table
