"""The reference figures: transcribed without a slip, and refused where they say something impossible."""

from __future__ import annotations

from statistics import fmean, stdev

import pytest
from harness.entries import load_entries
from harness.errors import HarnessError
from harness.references import load_references
from workbench import BENCHMARKS

# As the two rows of the design's table have them.
MEANS = {
    "cifar10": [90.91, 91.09, 92.96, 93.71, 94.05, 94.33, 94.36, 91.43, 91.29, 90.48],
    "cifar100": [69.05, 63.80, 69.48, 70.87, None, None, None, 66.03, 65.54, 65.04],
}


@pytest.fixture(scope="module")
def references():
    return load_references(BENCHMARKS / "references.yaml", load_entries(BENCHMARKS / "configs"))


@pytest.mark.parametrize("table", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_means_in_the_order_of_the_table(references, table):
    entries = [entry for entry in load_entries(BENCHMARKS / "configs").values() if entry.table == table]
    means = [references[e.name].mean if e.name in references else None for e in entries]
    assert means == MEANS.get(table, [None] * len(entries))


def test_means_and_deviations_are_those_of_the_runs(references):
    for name, reference in references.items():
        assert len(reference.runs) == 3, name
        assert reference.mean == pytest.approx(fmean(reference.runs), abs=0.0051), name
        if reference.std is not None:
            assert reference.std == pytest.approx(stdev(reference.runs), abs=0.01), name


def test_every_figure_has_its_source(references):
    sources = {reference.source for reference in references.values()}
    assert sources == {"reference implementation, seeds 0, 1, 2; CUDA 12.8, driver 570.195.03, PyTorch 2.9.1"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("mnist_cnv: {mean: 99.5}", "mnist_cnv.source"),
        ("mnist_cnv: {mean: 995, source: x}", "mnist_cnv.mean"),
        ("mnist_cnv: {mean: 99.5, source: x, sdt: 1}", "mnist_cnv.sdt"),
        ("mnist_cvn: {mean: 99.5, source: x}", "did you mean 'mnist_cnv'"),
        ("mnist_cnv: {mean", "not valid YAML"),
    ],
)
def test_a_wrong_reference_is_refused_by_name(bench, text, complaint, capsys):
    bench.recipe("mnist_cnv")
    bench.write_references(text)
    assert bench.run("--table", "mnist", "--time-limit", "0") == 2
    assert complaint in capsys.readouterr().err
    assert bench.training.calls == []


def test_an_entry_may_have_no_reference(bench):
    bench.recipe("mnist_cnv")
    bench.write_references("mnist_cnv:\n")
    assert load_references(bench.home / "references.yaml", load_entries(bench.home / "configs")) == {}


def test_a_lost_file_is_an_error_for_people(bench):
    with pytest.raises(HarnessError, match="restore"):
        load_references(bench.home / "nothing.yaml", {})
