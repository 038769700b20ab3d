"""The list of replaced records (retired.json), and how many recipes of an entry were scored on the test set."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness.entries import HarnessError, Layout, load_entries
from harness.records import Records, load_retired, recipes_scored, retire
from workbench import BENCHMARKS, make_record

from cnvzoo.training import NUMERICS, RunRecord


def scored(bench) -> dict[str, int]:
    entries = load_entries(bench.home / "configs")
    return recipes_scored(entries.values(), Layout.of(bench.home))


def last_cell(page: str, name: str) -> str:
    (line,) = (line for line in page.splitlines() if line.startswith(f"| [{name}]"))
    return line.strip("| ").split("|")[-1].strip()


@pytest.fixture
def cnv(bench):
    bench.recipe("mnist_cnv")
    return bench


def test_a_replaced_record_is_one_line_of_json(cnv, tmp_path: Path) -> None:
    recipe = cnv.entry("mnist_cnv").recipe
    record = make_record(recipe, 1, accuracy=98.76, weights_sha256="a" * 64, commit="c0ffee" * 6 + "c0ff+")
    path = tmp_path / "retired.json"
    assert retire(path, record)
    opening, line, closing = path.read_text().splitlines()
    assert (opening, closing) == ("[", "]")
    assert json.loads(line) == {
        "entry": "mnist_cnv",
        "seed": 1,
        "recipe_sha256": recipe.fingerprint(),
        "numerics": NUMERICS,
        "epochs": 10,
        "accuracy": 98.76,
        "correct": 9876,
        "total": 10000,
        "weights_sha256": "a" * 64,
        "commit": "c0ffee" * 6 + "c0ff+",
        "finished": "2025-01-01T00:00:00+00:00",
    }


def test_lines_are_sorted_and_not_repeated(cnv, tmp_path: Path) -> None:
    path, recipe = tmp_path / "retired.json", cnv.entry("mnist_cnv").recipe
    later = "2025-01-02T00:00:00+00:00"
    records = [
        make_record(recipe, 2, weights_sha256="a" * 64),
        make_record(recipe, 0, weights_sha256="b" * 64, finished=later),
        make_record(recipe, 0, weights_sha256="c" * 64),
        make_record(recipe, 0, weights_sha256="b" * 64, finished=later, seconds=1.0),
        make_record(recipe, 0, weights_sha256="c" * 64, trial=True, epochs=3),
    ]
    assert [retire(path, record) for record in records] == [True, True, True, False, False]
    assert [(old.seed, old.weights_sha256[0]) for old in load_retired(path)] == [(0, "c"), (0, "b"), (2, "a")]
    before = path.stat().st_mtime_ns
    assert not retire(path, records[0])
    assert path.stat().st_mtime_ns == before
    assert not list(tmp_path.glob(".*"))


def test_without_a_file_the_list_is_empty(tmp_path: Path) -> None:
    assert load_retired(tmp_path / "retired.json") == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("[\n", "\n"), "Invalid JSON"),
        (("9000", "8000"), "0: Value error, accuracy 90.0 is not 8000 of 10000"),
        (('"seed":0,', ""), "0: seed: Field required"),
        (('"seed":0', '"seed":"0"'), "0: seed: Input should be a valid integer"),
        (('"seed":0', '"sead":0,"seed":0'), "0: sead: Extra inputs are not permitted"),
    ],
)
def test_a_damaged_file_is_an_error_and_stays_as_it_is(cnv, change, complaint, capsys) -> None:
    path = cnv.home / "retired.json"
    record = make_record(cnv.entry("mnist_cnv").recipe)
    retire(path, record)
    path.write_text(broken := path.read_text().replace(*change))
    with pytest.raises(HarnessError) as caught:
        retire(path, record)
    assert f"retired.json: not a list of retired records: {complaint}" in str(caught.value)
    assert str(caught.value).endswith("; restore it from version control")
    assert cnv.run("--table", "mnist") == 2
    assert str(caught.value) in capsys.readouterr().err
    assert cnv.training.calls == []
    assert path.read_text() == broken


def test_each_recipe_of_current_and_retired_records_is_counted_once(cnv) -> None:
    retired = cnv.home / "retired.json"
    assert scored(cnv) == {"mnist_cnv": 0}
    for seed in (0, 1):
        cnv.put("mnist_cnv", seed)
    assert scored(cnv) == {"mnist_cnv": 1}
    for seed in (0, 1):  # another run of the same recipe
        retire(retired, make_record(cnv.entry("mnist_cnv").recipe, seed, weights_sha256="a" * 64))
    assert scored(cnv) == {"mnist_cnv": 1}
    for epochs in (11, 12):
        cnv.recipe("mnist_cnv", epochs=epochs)
        retire(retired, make_record(cnv.entry("mnist_cnv").recipe))
    cnv.recipe("cifar10_cnv")
    assert scored(cnv) == {"mnist_cnv": 3, "cifar10_cnv": 0}


def test_the_recipe_of_an_outdated_record_is_counted(cnv) -> None:
    cnv.put("mnist_cnv", 0)
    cnv.recipe("mnist_cnv", epochs=11)
    cnv.put("mnist_cnv", 1)
    assert scored(cnv) == {"mnist_cnv": 2}


def test_trials_damaged_records_and_records_of_other_entries_are_not_counted(cnv) -> None:
    cnv.recipe("mnist_resnet20")
    cnv.put("mnist_cnv", 0, trial=True, epochs=3)
    make_record(cnv.entry("mnist_resnet20").recipe, 1).write(cnv.result("mnist_cnv", 1))
    cnv.result("mnist_cnv", 2).write_text("{")
    assert scored(cnv) == {"mnist_cnv": 0, "mnist_resnet20": 0}


def test_page_readme_and_terminal_show_the_number_of_scored_recipes(cnv, capsys) -> None:
    cnv.put("mnist_cnv")
    cnv.recipe("mnist_resnet20")
    other = cnv.entry("mnist_cnv").recipe.model_copy(update={"label_smoothing": 0.25})
    retire(cnv.home / "retired.json", make_record(other))
    (readme := cnv.home.parent / "README.md").write_text("<!-- results -->\n<!-- /results -->\n")
    cnv.run("--table", "all", "--time-limit", "0")
    assert cnv.page.count("| recipes scored |") == 1  # one table has entries
    assert (last_cell(cnv.page, "mnist_cnv"), last_cell(cnv.page, "mnist_resnet20")) == ("2", "-")
    assert last_cell(readme.read_text(), "mnist_cnv") == "2"
    assert last_cell(capsys.readouterr().out.replace("| mnist_cnv ", "| [mnist_cnv] "), "mnist_cnv") == "2"


# By hand from the git log of benchmarks/results up to 2026-11-26: entry, start of the fingerprint, correct images.
HISTORY = {
    ("cifar10_quant_cnv_w2a2", "b261ca2b", 8938),
    ("cifar10_quant_cnv_w2a2", "2c66685a", 9016),
    ("cifar10_quant_cnv_w2a2", "bc0ac7ec", 9028),
    ("cifar10_quant_cnv_w4a4", "b27cf085", 9136),
    ("cifar10_quant_cnv_w4a4", "b27cf085", 9141),
    ("cifar10_quant_cnv_w4a4", "b27cf085", 9118),
    ("cifar10_quant_cnv_w8a8", "99edd2f0", 9176),
    ("cifar10_quant_cnv_w8a8", "99edd2f0", 9160),
    ("cifar10_resnet20", "e4174b8b", 9191),
    ("cifar10_resnet32", "0da7a4ab", 9338),
    ("cifar10_resnet44", "96da4ed1", 9396),
    ("cifar10_resnet56", "85bc026e", 9423),
    ("cifar10_resnet56", "85bc026e", 9440),
    ("cifar10_resnet56", "85bc026e", 9417),
    ("mnist_quant_cnv_w2a2", "8d0311ee", 9968),
}


def test_the_list_of_this_repository_has_the_records_that_were_replaced() -> None:
    layout = Layout.of(BENCHMARKS)
    entries = load_entries(layout.configs)
    retired = load_retired(layout.retired)
    assert {(old.entry, old.recipe_sha256[:8], old.correct) for old in retired} >= HISTORY
    assert {old.entry for old in retired} <= entries.keys()
    current = {RunRecord.read(path).weights_sha256 for path in layout.results.rglob("*.json")}
    assert not current & {old.weights_sha256 for old in retired}
    assert recipes_scored(entries.values(), layout)["cifar10_quant_cnv_w2a2"] >= 4


def test_two_commands_at_once_retire_all_records(cnv) -> None:
    """Each reads the file, adds its line and writes it, while the other does the same."""
    entry, layout = cnv.entry("mnist_cnv"), Layout.of(cnv.home, cnv.runs)

    def replace(seed: int) -> None:
        records = Records({entry.name: entry}, layout)
        for number in range(10):
            records.keep(make_record(entry.recipe, seed, weights_sha256=f"{seed}{number:063x}"))

    with ThreadPoolExecutor() as pool:
        list(pool.map(replace, (0, 1, 2)))
    assert len(load_retired(layout.retired)) == 3 * 9
