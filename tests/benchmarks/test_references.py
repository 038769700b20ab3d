"""The reference figures: those of this repository are right, and contradictory or incomplete ones are refused."""

from __future__ import annotations

import pytest
from harness.entries import HarnessError, load_entries
from harness.references import load_references
from workbench import BENCHMARKS

# The means that the tables have had since they were first rendered, of the runs where the source has none.
MEANS = {
    "cifar10": [90.91, 91.09, 92.96, 93.71, 94.05, 94.33, 94.36, 91.43, 91.29, 90.48],
    "cifar100": [69.05, 63.80, 69.48, 70.87, None, None, None, 66.03, 65.54, 65.04],
    "extra": [None, None, None, 91.53, 92.45, 90.96, 93.93, 93.05, None, None, None, None, None],
}


@pytest.fixture(scope="module")
def references():
    return load_references(BENCHMARKS / "references.yaml", load_entries(BENCHMARKS / "configs"))


@pytest.mark.parametrize("table", ["mnist", "fashion_mnist", "cifar10", "cifar100", "extra"])
def test_means_in_the_order_of_the_table(references, table):
    entries = [entry for entry in load_entries(BENCHMARKS / "configs").values() if entry.table == table]
    means = [round(references[e.name].mean, 2) if e.name in references else None for e in entries]
    assert means == MEANS.get(table, [None] * len(entries))


def test_every_figure_has_three_runs_and_its_source(references):
    within = {name: reference for name, reference in references.items() if reference.source.project.endswith("/fat")}
    assert {len(reference.runs) for reference in within.values()} == {3}
    (source,) = {id(reference.source): reference.source for reference in within.values()}.values()
    assert (source.project, source.seeds) == ("giovannipollo/fat", [0, 1, 2])
    assert source.citation.startswith("[giovannipollo/fat](https://github.com/giovannipollo/fat), the tables of docs/")
    assert source.citation.endswith("; seeds 0, 1, 2; CUDA 12.8, driver 570.195.03, PyTorch 2.9.1")


SOURCE = "  us: {project: us/ours, url: https://example.org/us, document: R.md, version: v1, seeds: [0], setting: GPU}"


@pytest.mark.parametrize(
    ("figures", "complaint"),
    [
        ("{runs: [99.5]}", "4: entries.mnist_cnv.source: missing: add it"),
        ("{source: us}", "4: entries.mnist_cnv: give runs, or the mean if only that was published"),
        ("{source: us, mean: 995}", "4: entries.mnist_cnv.mean: 995: input should be less than or equal to 100"),
        (
            "{source: us, runs: [99, 995]}",
            "4: entries.mnist_cnv.runs.1: 995: input should be less than",
        ),
        ("{source: us, runs: []}", "4: entries.mnist_cnv.runs: []: list should have at least 1 item"),
        ("{source: us, mean: '99'}", "4: entries.mnist_cnv.mean: '99': input should be a valid number"),
        (
            "{source: us, mean: 99, sdt: 1}",
            "4: entries.mnist_cnv.sdt: unknown key: did you mean 'std'? Choices: ",
        ),
        ("{source: su, mean: 99}", "4: entries.mnist_cnv.source: 'su' is no source: did you mean 'us'?"),
        ("{source: us, mean: 99, mean: 98}", "4: entries.mnist_cnv.mean: repeated key, first at "),
        (
            "{source: us, mean: 99}\n  mnist_cnv: {source: us, mean: 98}",
            "5: entries.mnist_cnv: repeated key, first at ",
        ),
        ("&a {source: us, mean: 99}", "4: entries.mnist_cnv: an anchor (&a): write the value out"),
        ("{source: us, mean: 099}", "4: entries.mnist_cnv.mean: 099: a leading zero"),
        ("{source: us, mean", "5: not valid YAML"),
        # by hand: a mean of 99.4, squared deviations 0.01, 0 and 0.01, over 2 and the root 0.1
        (
            "{source: us, runs: [99.3, 99.4, 99.5], mean: 99.42}",
            "4: entries.mnist_cnv.mean: 99.42: not that of the runs, theirs is 99.4000: correct one or the other",
        ),
        (
            "{source: us, runs: [99.3, 99.4, 99.5], std: 0.12}",
            "4: entries.mnist_cnv.std: 0.12: not that of the runs, theirs is 0.1000: correct one or the other",
        ),
        ("{source: us, runs: [99.3], std: 0.12}", "4: entries.mnist_cnv.std: 0.12: not that of the runs, one has none"),
        (
            "{source: us, mean: 99}\n  mnist_cvn: {source: us, mean: 9}",
            "5: no recipe is named 'mnist_cvn': did you mean",
        ),
        ("", "4: entries.mnist_cnv: None: input should be a valid dictionary"),
    ],
)
def test_a_wrong_reference_is_refused_by_line_and_key(bench, figures, complaint, capsys):
    bench.recipe("mnist_cnv")
    bench.write_references(f"sources:\n{SOURCE}\nentries:\n  mnist_cnv: {figures}\n")
    assert bench.run("--table", "mnist", "--time-limit", "0") == 2
    printed = capsys.readouterr().err
    assert f"{bench.home / 'references.yaml'}:{complaint}" in printed
    assert bench.training.calls == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("url: https://example.org/us, ", ""), "2: sources.us.url: missing: add it"),
        (("https", "ftp"), "2: sources.us.url: 'ftp://example.org/us': string should match pattern"),
        (("version", "versoin"), "2: sources.us.versoin: unknown key: did you mean 'version'? Choices: project, url,"),
        (("seeds: [0]", "seeds: [a]"), "2: sources.us.seeds.0: 'a': input should be a valid integer"),
    ],
)
def test_a_source_is_checked_as_well(bench, change, complaint):
    bench.write_references(f"sources:\n{SOURCE.replace(*change)}\n")
    with pytest.raises(HarnessError) as caught:
        load_references(bench.home / "references.yaml", {})
    assert f"{bench.home / 'references.yaml'}:{complaint}" in str(caught.value)


def test_a_published_figure_may_be_rounded_or_cut(bench):
    """By hand: 90.0, 90.0 and 90.02 have a mean of 90.0067 and a deviation of 0.0115."""
    bench.recipe("mnist_cnv")
    figures = "{source: us, runs: [90.0, 90.0, 90.02], mean: 90.0, std: 0.01}"
    bench.write_references(f"sources:\n{SOURCE}\nentries:\n  mnist_cnv: {figures}\n")
    (reference,) = load_references(bench.home / "references.yaml", load_entries(bench.home / "configs")).values()
    assert (reference.mean, reference.runs) == (90.0, (90.0, 90.0, 90.02))


@pytest.mark.parametrize(
    ("text", "says"),
    [("- 1\n", ":1: references are a mapping of sources and entries, not list"), ("x: 1\n", ":1: x: unknown key")],
)
def test_a_file_of_another_shape_is_refused(bench, text, says):
    bench.write_references(text)
    with pytest.raises(HarnessError, match=says):
        load_references(bench.home / "references.yaml", {})


def test_an_entry_may_have_no_reference(bench):
    bench.recipe("mnist_cnv")
    for text in ("", f"sources:\n{SOURCE}\n"):
        bench.write_references(text)
        assert load_references(bench.home / "references.yaml", load_entries(bench.home / "configs")) == {}


def test_a_missing_file_is_one_line_of_error(bench):
    with pytest.raises(HarnessError, match="restore"):
        load_references(bench.home / "nothing.yaml", {})
