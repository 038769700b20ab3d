"""The results in the README: the text between the markers, and that nothing else is changed."""

from __future__ import annotations

from harness.report import update_section

PAGE = "# A project\n\n<!-- results -->\n\nold\n\n<!-- /results -->\n\nAnd more.\n"


def test_it_shows_the_entries_that_have_run(bench):
    for name in ("mnist_cnv", "cifar10_cnv", "cifar10_resnet20"):
        bench.recipe(name)
    bench.put("cifar10_cnv", 0, accuracy=91.25)
    (readme := bench.home.parent / "README.md").write_text(PAGE)
    bench.run("--table", "mnist", "--time-limit", "0")
    before, table, after = readme.read_text().replace("<!-- /results -->", "<!-- results -->").split("<!-- results -->")
    assert (before, after) == ("# A project\n\n", "\n\nAnd more.\n")
    title, _, _, _, *rows = table.strip().splitlines()
    assert title == "### CIFAR-10"
    link = "[cifar10_cnv](benchmarks/configs/cifar10_cnv.yaml)"
    assert rows == [f"| {link} | 91.25 (1 of 3 seeds) | - | 91.25, -, - | - | - | 1 |"]


def test_without_records_it_says_that_nothing_has_run(bench):
    bench.recipe("mnist_cnv")
    (readme := bench.home.parent / "README.md").write_text(PAGE)
    bench.run("--table", "all", "--time-limit", "0")
    assert readme.read_text() == PAGE.replace("old", "No run yet.")


def test_it_is_updated_after_every_run(bench):
    bench.recipe("mnist_cnv")
    (readme := bench.home.parent / "README.md").write_text(PAGE)
    bench.training.accuracy = lambda name, seed: 99.0 + seed / 8
    bench.run("--table", "mnist")
    assert "| 99.12 | 0.12 | 99.00, 99.12, 99.25 |" in readme.read_text()


def test_a_page_without_markers_and_a_missing_page_stay_as_they_are(tmp_path):
    update_section(tmp_path / "README.md", "table")
    assert not (tmp_path / "README.md").exists()
    for text in ("", "# A project\n", "<!-- results -->\n", "<!-- /results --> <!-- results -->\n"):
        (tmp_path / "README.md").write_text(text)
        update_section(tmp_path / "README.md", "table")
        assert (tmp_path / "README.md").read_text() == text


def test_a_second_update_changes_nothing(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(PAGE)
    update_section(readme, "| a |")
    once = readme.stat().st_mtime_ns, readme.read_text()
    update_section(readme, "| a |")
    assert (readme.stat().st_mtime_ns, readme.read_text()) == once
