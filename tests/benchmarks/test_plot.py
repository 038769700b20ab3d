"""The plots of the checkpoints: what they show, that no text overlaps, and when they are drawn again."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from harness import plot
from harness.entries import EXTRA, TABLES, Layout
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from workbench import BENCHMARKS, Bench

from cnvzoo.checkpoints.index import INDEX, CheckpointInfo

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
    """All tables complete, with accuracies as close together as trained nets have on each dataset."""
    tables = {"mnist": DIGITS, "fashion_mnist": DIGITS[:4], "cifar10": TABLE, "cifar100": TABLE}
    scale = {"mnist": (0.01, 98.7), "fashion_mnist": (0.1, 84.5), "cifar10": (1.0, 0.0), "cifar100": (1.3, -53.0)}
    rows = []
    for dataset, entries in tables.items():
        factor, offset = scale[dataset]
        for model, bits, megabytes, accuracy in entries:
            rows.append(checkpoint(model, bits, megabytes, factor * (accuracy or 94.0) + offset, dataset))
    return sorted(rows, key=lambda row: (list(tables).index(row["dataset"]), row["bytes"]))


def of(dataset: str) -> list[CheckpointInfo]:
    return [point for point in every_entry() if point["dataset"] == dataset]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path)
    bench.recipe("mnist_cnv")
    bench.recipe("mnist_resnet20")
    return bench


def plot_path(bench: Bench) -> Path:
    return bench.home / "accuracy-mnist.svg"


def names_in(axes: Axes) -> dict[str, Annotation]:
    return {text.get_text(): text for text in axes.texts if isinstance(text, Annotation)}


def sizes_in(line: Line2D) -> list[float]:
    return np.asarray(line.get_xdata()).tolist()


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("dataset", [table for table in TABLES if table != EXTRA])
def test_every_checkpoint_is_named_once_and_no_name_covers_another_or_a_point(dataset, published):
    points = list(plot.points(INDEX, dataset)) if published else of(dataset)
    figure = plot.figure(points)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    named = {name: text.xy for name, text in names_in(axes).items()}
    assert named == {p["name"].split(".")[0]: (p["bytes"], p["accuracy"]) for p in points}
    assert len(axes.texts) == len(points)
    boxes = {name: Text.get_window_extent(text) for name, text in names_in(axes).items()}
    for (one, box), (other, other_box) in itertools.combinations(boxes.items(), 2):
        assert not box.overlaps(other_box), (one, other)
    for name, box in boxes.items():
        assert figure.bbox.contains(box.x0, box.y0), name
        assert figure.bbox.contains(box.x1, box.y1), name
        for other, text in names_in(axes).items():
            assert not box.contains(*axes.transData.transform(text.xy)), (name, other)


def test_a_dataset_without_a_table_or_with_one_checkpoint_has_no_plot(tmp_path):
    index = json.loads(INDEX.read_text())["checkpoints"]
    resnet20 = index["resnet20.cifar10"]
    own = {f"resnet20.{name}": resnet20 | {"dataset": name} for name in ("svhn", "mnist")}
    own["vgg.svhn"] = own["resnet20.svhn"] | {"model": {"name": "vgg"}}  # a model that this version does not have
    cifar10 = {name: entry for name, entry in index.items() if entry["dataset"] == "cifar10"}
    (tmp_path / "index.json").write_text(json.dumps({"checkpoints": own | cifar10}))
    assert plot.plotted(tmp_path / "index.json") == {"cifar10"}
    assert [p["name"] for p in plot.points(tmp_path / "index.json", "svhn")] == ["resnet20.svhn", "vgg.svhn"]
    assert len(plot.figure(plot.points(tmp_path / "index.json", "svhn")).axes) == 1


def test_float_and_quantized_look_different():
    (axes,) = plot.figure(of("cifar10")).axes
    looks = {line.get_label(): line for line in axes.lines if line.get_marker() != "None"}
    assert sizes_in(looks["quantized"]) == [430_000, 820_000, 1_600_000]
    assert len(sizes_in(looks["float"])) == 7
    assert looks["float"].get_marker() != looks["quantized"].get_marker()
    assert looks["float"].get_color() != looks["quantized"].get_color()


def test_a_line_joins_only_the_bit_widths_of_one_graph():
    (axes,) = plot.figure(of("cifar10")).axes
    (line,) = (line for line in axes.lines if line.get_marker() == "None")
    assert sizes_in(line) == [430_000, 820_000, 1_600_000, 6_210_000]


def test_the_same_points_give_the_same_bytes(tmp_path, monkeypatch):
    import matplotlib

    plot.draw(of("cifar10"), tmp_path / "one.svg")
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20)  # a setting of the user
    plot.draw(of("cifar10"), tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert plot.shows(tmp_path / "one.svg", of("cifar10"))


@pytest.mark.parametrize(("change", "value"), [("accuracy", 91.23), ("bytes", 6_210_001), ("name", "other.cifar10")])
def test_another_point_gives_another_plot(tmp_path, change, value):
    points = of("cifar10")
    plot.draw(points, tmp_path / "kept.svg")
    (cnv,) = (p for p in points if p["name"] == "cnv.cifar10")
    cnv[change] = value
    assert not plot.shows(tmp_path / "kept.svg", points)
    assert not plot.shows(tmp_path / "kept.svg", points[:-1])


def test_the_plots_of_this_repository_show_the_index_of_the_package():
    layout, remedy = Layout.of(BENCHMARKS), "run: python benchmarks/reproduce.py --table all --time-limit 0"
    for table in plot.plotted(layout.index):
        points = plot.points(layout.index, table)
        assert plot.shows(layout.plot(table), points), remedy
        drawn = layout.plot(table).read_text(encoding="utf-8")
        for point in points:  # matplotlib draws text as outlines, with the text in a comment
            assert drawn.count(f"<!-- {point['name'].split('.')[0]} -->") == 1


def test_plots_are_drawn_again_when_a_run_changes_the_checkpoints(bench):
    assert bench.run("--table", "mnist", "--entry", "mnist_cnv", "--seeds", "0") == 0
    assert not plot_path(bench).exists()
    assert ".svg" not in bench.page
    assert bench.run("--table", "mnist", "--seeds", "0") == 0
    assert "cnv.mnist: 90.00 %, 6," in plot_path(bench).read_text()
    assert "](accuracy-mnist.svg)" in bench.page


def test_a_plot_that_is_up_to_date_is_kept_even_without_matplotlib(bench, monkeypatch, capsys):
    assert bench.run("--table", "mnist", "--seeds", "0") == 0
    before = plot_path(bench).stat().st_mtime_ns
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench.run("--table", "mnist", "--seeds", "0") == 0
    assert plot_path(bench).stat().st_mtime_ns == before
    assert "pip install" not in capsys.readouterr().err


def test_without_matplotlib_an_outdated_plot_stays_and_is_reported(bench, monkeypatch, capsys):
    plot_path(bench).write_text("<svg>an old one</svg>")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert bench.run("--table", "mnist", "--seeds", "0", "1") == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "pip install matplotlib" in line)
    assert "accuracy-mnist.svg stays as it was" in line
    assert plot_path(bench).read_text() == "<svg>an old one</svg>"
    assert bench.run("--table", "mnist", "--seeds", "0") == 0
    assert "resnet20.mnist: 90.00 %" in plot_path(bench).read_text()
