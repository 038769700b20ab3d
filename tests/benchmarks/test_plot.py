"""The picture of the checkpoints: what it shows, that it can be read, and when it is drawn again."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from harness import plot
from harness.entries import Layout
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from workbench import BENCHMARKS, Bench

from cnvzoo.checkpoints.index import CheckpointInfo

MB = 1_000_000
# model, bits, bytes, and roughly what each reaches on cifar10
TABLE = [
    ("cnv", None, 6.21, 91.22), ("mobilenet_v1", None, 12.96, 90.91), ("resnet20", None, 1.11, 92.96),
    ("resnet32", None, 1.89, 93.71), ("resnet44", None, 2.68, 94.05), ("resnet56", None, 3.47, 94.33),
    ("resnet110", None, 7.01, 94.36), ("quant_cnv", 8, 1.6, 91.43), ("quant_cnv", 4, 0.82, 91.41),
    ("quant_cnv", 2, 0.43, 90.48),
]  # fmt: skip
DIGITS = [*TABLE[:3], ("resnet18", None, 44.8, 0.0), *TABLE[-3:]]


def checkpoint(model: str, bits: int | None, megabytes: float, accuracy: float, dataset: str) -> CheckpointInfo:
    tag = f"{model}_w{bits}a{bits}" if bits else model
    return CheckpointInfo(
        name=f"{tag}.{dataset}", model=model, dataset=dataset, w_bits=bits, a_bits=bits, accuracy=accuracy,
        correct=round(100 * accuracy), total=10000, parameters=1, macs=1, bytes=round(megabytes * MB),
    )  # fmt: skip


def every_entry() -> list[CheckpointInfo]:
    """All tables complete; on the digits within the few hundredths of a percent that they end up in."""
    tables = {"mnist": DIGITS, "fashion_mnist": DIGITS[:4], "cifar10": TABLE, "cifar100": TABLE}
    scale = {"mnist": (0.01, 98.7), "fashion_mnist": (0.1, 84.5), "cifar10": (1.0, 0.0), "cifar100": (1.3, -53.0)}
    rows = []
    for dataset, entries in tables.items():
        factor, offset = scale[dataset]
        for model, bits, megabytes, accuracy in entries:
            rows.append(checkpoint(model, bits, megabytes, factor * (accuracy or 94.0) + offset, dataset))
    return sorted(rows, key=lambda row: (list(tables).index(row["dataset"]), row["bytes"]))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path)
    bench.recipe("mnist_cnv")
    return bench


def picture(bench: Bench) -> Path:
    return bench.home / "accuracy.svg"


def names_in(axes: Axes) -> dict[str, Annotation]:
    return {text.get_text(): text for text in axes.texts if isinstance(text, Annotation)}


def sizes_in(line: Line2D) -> list[float]:
    return np.asarray(line.get_xdata()).tolist()


def test_every_checkpoint_is_named_once_in_the_panel_of_its_dataset():
    points = every_entry()
    panels = plot.figure(points).axes
    assert [axes.get_title(loc="left") for axes in panels] == ["mnist", "fashion_mnist", "cifar10", "cifar100"]
    for axes in panels:
        own = [p for p in points if p["dataset"] == axes.get_title(loc="left")]
        named = {name: text.xy for name, text in names_in(axes).items()}
        assert named == {p["name"].split(".")[0]: (p["bytes"], p["accuracy"]) for p in own}
        assert len(axes.texts) == len(own)


@pytest.mark.parametrize("datasets", [["mnist", "cifar10"], ["mnist", "fashion_mnist", "cifar10", "cifar100"]])
def test_no_name_covers_another_or_a_point_or_leaves_its_panel(datasets):
    figure = plot.figure([point for point in every_entry() if point["dataset"] in datasets])
    figure.draw_without_rendering()  # which puts the names where they are to be
    for axes in figure.axes:
        inside = axes.get_window_extent()
        names = {name: Text.get_window_extent(text) for name, text in names_in(axes).items()}  # without its line
        for (one, box), (other, box_of_other) in itertools.combinations(names.items(), 2):
            assert not box.overlaps(box_of_other), (axes.get_title(loc="left"), one, other)
        for name, box in names.items():
            assert inside.contains(box.x0, box.y0), name
            assert inside.contains(box.x1, box.y1), name
            for other, text in names_in(axes).items():
                assert not box.contains(*axes.transData.transform(text.xy)), (name, other)


def test_a_dataset_that_no_table_has_comes_last_under_its_own_name(tmp_path):
    # As it happens with a checkpoint of one's own in hub/: the index has whatever is there.
    index = json.loads((BENCHMARKS.parent / "src" / "cnvzoo" / "hub" / "index.json").read_text())
    own = index["checkpoints"]["resnet20.cifar10"]
    names = {"resnet20.svhn": "svhn", "resnet20.cinic": "cinic"}
    own = {name: own | {"dataset": dataset} for name, dataset in names.items()}
    own["vgg.svhn"] = own["resnet20.svhn"] | {"model": {"name": "vgg"}}  # nor has this version such a model
    (tmp_path / "index.json").write_text(json.dumps({"checkpoints": own | index["checkpoints"]}))
    points = plot.points(tmp_path / "index.json")
    assert [p["name"] for p in points[-3:]] == ["resnet20.cinic", "resnet20.svhn", "vgg.svhn"]
    assert list(dict.fromkeys(p["dataset"] for p in points)) == ["mnist", "cifar10", "cinic", "svhn"]
    titles = [axes.get_title(loc="left") for axes in plot.figure(points).axes]
    assert titles == ["mnist", "cifar10", "cinic", "svhn"]


def test_float_and_quantized_look_different():
    figure = plot.figure(every_entry())
    (axes,) = (axes for axes in figure.axes if axes.get_title(loc="left") == "cifar10")
    looks = {}
    for line in axes.lines:
        if line.get_marker() != "None" and len(sizes_in(line)) == 1:
            looks[sizes_in(line)[0]] = (line.get_marker(), line.get_color())
    quantized = {looks[round(megabytes * MB)] for _, bits, megabytes, _ in TABLE if bits}
    floats = {looks[round(megabytes * MB)] for _, bits, megabytes, _ in TABLE if not bits}
    assert (len(looks), len(quantized), len(floats)) == (len(TABLE), 1, 1)
    assert all(a != b for a, b in zip(*quantized, *floats, strict=True))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["float", "quantized"]


def test_a_line_joins_the_widths_of_one_graph_and_nothing_else():
    (axes,) = plot.figure([p for p in every_entry() if p["dataset"] == "cifar10"]).axes
    (line,) = (line for line in axes.lines if len(sizes_in(line)) > 1)
    assert sizes_in(line) == [430_000, 820_000, 1_600_000, 6_210_000]


def test_the_same_points_give_the_same_bytes(tmp_path, monkeypatch):
    import matplotlib

    plot.draw(every_entry(), tmp_path / "one.svg")
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20)  # what somebody likes better
    plot.draw(every_entry(), tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert plot.shows(tmp_path / "one.svg", every_entry())


@pytest.mark.parametrize(("change", "value"), [("accuracy", 91.23), ("bytes", 6_210_001), ("name", "other.cifar10")])
def test_another_point_is_another_picture(tmp_path, change, value):
    points = every_entry()
    plot.draw(points, tmp_path / "kept.svg")
    (cnv,) = (p for p in points if p["name"] == "cnv.cifar10")
    cnv[change] = value
    assert not plot.shows(tmp_path / "kept.svg", points)
    assert not plot.shows(tmp_path / "kept.svg", points[:-1])


def test_the_picture_that_is_kept_shows_the_index_of_the_package():
    layout = Layout.of(BENCHMARKS)
    points = plot.points(layout.index)
    assert plot.shows(layout.plot, points), "run: python benchmarks/reproduce.py --table all --time-limit 0"
    drawn = layout.plot.read_text(encoding="utf-8")
    for point in points:  # matplotlib notes the text of what it draws as outlines
        tag = point["name"].split(".")[0]
        assert drawn.count(f"<!-- {tag} -->") == sum(p["name"].startswith(f"{tag}.") for p in points)
    assert {path.name for path in layout.hub.iterdir()} == {point["name"] for point in points}


def test_a_run_that_changes_the_checkpoints_draws_them(bench):
    assert bench.run("--table", "mnist", "--seeds", "1") == 0
    assert not picture(bench).exists()
    assert "accuracy.svg" not in bench.page
    assert bench.run("--table", "mnist", "--seeds", "0") == 0
    assert "cnv.mnist: 90.00 %, 6," in picture(bench).read_text()
    assert "![" in bench.page
    assert "](accuracy.svg)" in bench.page


def test_what_is_drawn_already_is_left_alone_without_matplotlib_even(bench, monkeypatch, capsys):
    assert bench.run("--table", "mnist", "--seeds", "0") == 0
    before = picture(bench).stat().st_mtime_ns
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench.run("--table", "mnist") == 0
    assert picture(bench).stat().st_mtime_ns == before
    assert "pip install" not in capsys.readouterr().err


def test_without_matplotlib_the_picture_stays_and_a_line_says_so(bench, monkeypatch, capsys):
    bench.recipe("mnist_resnet20")
    picture(bench).write_text("<svg>an old one</svg>")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert bench.run("--table", "mnist") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "pip install matplotlib" in line]
    # once for all runs of the command
    assert len(said) == 1
    assert "accuracy.svg stays as it was" in said[0]
    assert said[0].endswith("pip install matplotlib, and the same command draws it")
    assert picture(bench).read_text() == "<svg>an old one</svg>"
    shutil.rmtree(bench.runs)
    assert bench.run("--table", "mnist") == 0
    assert "resnet20.mnist: 90.00 %" in picture(bench).read_text()
