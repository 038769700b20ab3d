"""The page of results: its tables, which are made from the records only."""

from __future__ import annotations

import shutil

import pytest
from harness.entries import SEEDS

SOURCES = """\
sources:
  us: {project: us/ours, url: https://example.org/us, document: R.md, version: v1, seeds: [0, 1, 2], setting: a GPU}
entries:
"""


def row(page: str, name: str) -> list[str]:
    """The cells of an entry's row on the page or on the screen, after its name."""
    lines = [line for line in page.splitlines() if line.startswith((f"| {name} |", f"| [{name}]"))]
    assert len(lines) == 1, f"{name} is in {len(lines)} rows"
    return [cell.strip() for cell in lines[0].strip("|").split("|")][1:]


@pytest.fixture
def cnv(bench):
    bench.recipe("cifar10_cnv")
    bench.write_references(f"{SOURCES}  cifar10_cnv: {{source: us, runs: [91.19, 91.16, 90.91]}}\n")
    return bench


def show(bench) -> str:
    bench.run("--table", "all", "--time-limit", "0")
    return bench.page


# The reference's runs, by hand: mean 91.0867, squared deviations 0.01068, 0.00538, 0.03121, their sum 0.04727, over
# n - 1 = 2 a variance of 0.02363, over n = 3 a squared standard error of 0.00788.


def test_mean_deviation_runs_and_difference(cnv):
    for seed, accuracy in enumerate((91.5, 91.3, 91.7)):
        cnv.put("cifar10_cnv", seed, accuracy=accuracy)
    # by hand: mean 91.5, squared deviations 0, 0.04, 0.04, over n - 1 = 2 a variance of 0.04, root 0.2
    # the error of the difference: root of 0.04 / 3 + 0.00788 = 0.02121
    assert row(show(cnv), "cifar10_cnv") == ["91.50", "0.20", "91.50, 91.30, 91.70", "91.09", "+0.41 ± 0.15", "1"]


def test_two_of_three_seeds(cnv):
    cnv.put("cifar10_cnv", 0, accuracy=91.0)
    cnv.put("cifar10_cnv", 2, accuracy=90.0)
    # variance 0.5, so the error is the root of 0.5 / 2 + 0.00788 = 0.25788, 0.51, and 0.59 is less than twice that
    assert row(show(cnv), "cifar10_cnv") == [
        "90.50 (2 of 3 seeds)", "0.71", "91.00, -, 90.00", "91.09", "none (-0.59 ± 0.51)", "1",
    ]  # fmt: skip


def test_one_run_has_no_deviation_and_its_difference_no_error(cnv):
    cnv.put("cifar10_cnv", 1, accuracy=91.0)
    assert row(show(cnv), "cifar10_cnv") == [
        "91.00 (1 of 3 seeds)", "-", "-, 91.00, -", "91.09", "-0.09 (no standard error)", "1",
    ]  # fmt: skip


def test_an_entry_that_has_not_run(cnv):
    assert row(show(cnv), "cifar10_cnv") == ["not run", "-", "-", "91.09", "-", "-"]


def test_an_entry_without_a_reference(bench):
    bench.recipe("mnist_cnv")
    bench.put("mnist_cnv", accuracy=99.5)
    assert row(show(bench), "mnist_cnv")[-3:-1] == ["-", "-"]


@pytest.mark.parametrize("figures", ["mean: 91.0", "runs: [91.0]"])
def test_a_reference_without_several_runs_gives_no_error(cnv, figures):
    cnv.write_references(f"{SOURCES}  cifar10_cnv: {{source: us, {figures}}}\n")
    for seed, accuracy in enumerate((91.5, 91.3, 91.7)):
        cnv.put("cifar10_cnv", seed, accuracy=accuracy)
    assert row(show(cnv), "cifar10_cnv")[3:5] == ["91.00", "+0.50 (no standard error)"]


@pytest.mark.parametrize(
    ("accuracies", "says"), [((91.0, 91.2, 91.6), "none (+0.27 ± 0.18)"), ((91.2, 91.4, 91.8), "+0.47 ± 0.18")]
)
def test_a_difference_within_two_standard_errors_is_marked_as_such(cnv, accuracies, says):
    """By hand: deviations of -0.2667, -0.0667 and 0.3333, variance 0.0933, error 0.1764, twice that 0.3528."""
    cnv.write_references(f"{SOURCES}  cifar10_cnv: {{source: us, runs: [91.0, 91.0, 91.0]}}\n")
    for seed, accuracy in enumerate(accuracies):
        cnv.put("cifar10_cnv", seed, accuracy=accuracy)
    assert row(show(cnv), "cifar10_cnv")[4] == says


def test_the_difference_is_between_the_printed_means(cnv):
    for seed, accuracy in enumerate((91.09, 91.09, 91.08)):  # a mean of 91.0867, printed as 91.09
        cnv.put("cifar10_cnv", seed, accuracy=accuracy)
    assert row(show(cnv), "cifar10_cnv")[4] == "none (0.00 ± 0.09)"


def test_the_page_cites_every_source_once(cnv):
    cnv.recipe("cifar10_resnet20")
    cnv.write_references(
        f"{SOURCES}  cifar10_cnv: {{source: us, mean: 91}}\n  cifar10_resnet20: {{source: us, mean: 92}}\n"
    )
    line = "Reference: [us/ours](https://example.org/us), the tables of R.md (v1); seeds 0, 1, 2; a GPU."
    assert show(cnv).splitlines().count(line) == 1


def test_a_row_links_to_its_recipe(cnv):
    assert "[cifar10_cnv](configs/cifar10_cnv.yaml)" in show(cnv)


def test_the_page_has_every_table_with_any_choice_of_table(bench, capsys):
    bench.recipe("mnist_cnv")
    bench.recipe("cifar10_cnv")
    bench.put("cifar10_cnv", accuracy=91.2)
    bench.run("--table", "mnist", "--time-limit", "0")
    assert [line for line in bench.page.splitlines() if line.startswith("## ")] == [
        "## MNIST", "## Fashion-MNIST", "## CIFAR-10", "## CIFAR-100", "## Other entries (`--table extra`)",
        "## Hardware and versions",
    ]  # fmt: skip
    assert "91.20" in bench.page
    assert "91.20" not in capsys.readouterr().out


def test_the_printed_table_has_the_same_rows(cnv, capsys):
    cnv.put("cifar10_cnv", 0, accuracy=91.0)
    page = show(cnv)
    assert row(capsys.readouterr().out, "cifar10_cnv") == row(page, "cifar10_cnv")


def test_records_copied_from_another_machine_are_in_the_table(bench, tmp_path):
    for name in ("mnist_cnv", "mnist_resnet20"):
        bench.recipe(name)
        for seed in SEEDS:
            bench.put(name, seed, accuracy=98 + seed / 4)
    whole = show(bench)
    everything = sorted((bench.home / "results").rglob("*.json"))
    shutil.move(bench.home / "results", tmp_path / "elsewhere")
    assert show(bench) != whole
    for path in reversed(everything):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "elsewhere" / path.relative_to(bench.home / "results"), path)
    assert show(bench).encode() == whole.encode()


def test_hardware_and_versions_are_those_of_the_runs_in_the_tables(bench):
    bench.recipe("mnist_cnv")
    gpu = {"kind": "cuda", "name": "A GPU"}
    bench.put("mnist_cnv", 0, seconds=3600, device=gpu, versions={"torch": "2.14.1", "cuda": "12.8"})
    bench.put("mnist_cnv", 1, seconds=600)
    old = {"kind": "cpu", "name": "An old CPU", "threads": 1, "capability": "AVX2", "precision": "float32"}
    bench.put("mnist_cnv", 2, seconds=60, device=old)
    end = show(bench).split("## Hardware and versions")[1]
    assert "| A CPU (cpu, 2 threads) | python 3.11.9, torch 2.14.1 | 1 | 10 min 0 s |" in end
    assert "| An old CPU (cpu, 1 thread, AVX2, float32) | python 3.11.9, torch 2.14.1 | 1 | 1 min 0 s |" in end
    assert "| A GPU (cuda) | cuda 12.8, torch 2.14.1 | 1 | 1 h 0 min |" in end
    assert "python benchmarks/reproduce.py --table all" in end


def test_an_outdated_run_adds_nothing_to_the_page(bench):
    bench.recipe("mnist_cnv", epochs=10)
    bench.put("mnist_cnv", device={"kind": "cuda", "name": "A GPU"})
    bench.recipe("mnist_cnv", epochs=11)
    page = show(bench)
    assert "A GPU" not in page
    assert "No run yet" in page


def test_the_page_is_up_to_date_after_every_run(bench):
    for name in ("mnist_resnet20", "mnist_cnv"):
        bench.recipe(name)
    pages = []

    def accuracy(name: str, seed: int) -> float:
        pages.append(bench.page if (bench.home / "RESULTS.md").exists() else "")
        return 98.76

    bench.training.accuracy = accuracy
    bench.run("--table", "mnist", "--seeds", "0")
    assert "98.76" not in pages[0]
    assert row(pages[1], "mnist_resnet20")[0].startswith("98.76")


def test_the_list_without_a_terminal_is_a_line_for_each_run_and_writes_nothing(bench, capsys):
    for name in ("mnist_cnv", "mnist_resnet20", "cifar10_cnv"):
        bench.recipe(name)
    assert bench.run("--table", "mnist", "--list") == 0
    bench.put("mnist_cnv", 0, accuracy=99.5)
    bench.put("mnist_cnv", 1, accuracy=99.25, numerics=1)
    bench.put("mnist_resnet20", 2)
    bench.recipe("mnist_resnet20", epochs=11)
    capsys.readouterr()
    assert bench.run("--table", "mnist", "--list") == 0
    assert capsys.readouterr().out == (
        "mnist_resnet20\t0\tmissing\t-\nmnist_resnet20\t1\tmissing\t-\nmnist_resnet20\t2\tout of date\t-\n"
        "mnist_cnv\t0\tdone\t99.50\nmnist_cnv\t1\tdone by older arithmetic\t99.25\nmnist_cnv\t2\tmissing\t-\n"
    )
    assert bench.run("--table", "mnist", "--entry", "mnist_cnv", "--seeds", "1", "--list") == 0
    assert capsys.readouterr().out == "mnist_cnv\t1\tdone by older arithmetic\t99.25\n"
    assert not (bench.home / "RESULTS.md").exists()


def test_the_list_on_a_terminal_has_the_status_of_every_run(bench, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    bench.recipe("mnist_cnv")
    bench.put("mnist_cnv", 0, accuracy=99.5)
    bench.training.stop_at["mnist_cnv", 1] = "SIGINT"
    bench.run("--table", "mnist", "--seeds", "1")
    capsys.readouterr()
    bench.run("--table", "mnist", "--list")
    line = next(line for line in capsys.readouterr().out.splitlines() if "mnist_cnv" in line)
    assert [word.strip() for word in line.split("│")][1:] == ["99.50", "started", "missing"]
