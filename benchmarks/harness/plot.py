"""The picture of the published checkpoints: accuracy against bytes, a panel for each dataset.

A pure function of the index. What it shows stands in the file as a line of text too, which tells whether it is to be
drawn again: matplotlib takes a second to load, and is not on every machine.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cnvzoo.checkpoints.index import CheckpointInfo, read_index, row
from cnvzoo.files import replacing
from cnvzoo.models.registry import model_names, model_spec
from harness.entries import TABLES, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


XY = tuple[float, float]
Box = tuple[float, float, float, float]  # left, bottom, right, top

# best first; of names that are not in each other's way, all are above their points
_SIDES = (
    (0, 1),
    (0, -1),
    (1, 0),
    (-1, 0),
    (0.5, 1),
    (-0.5, 1),
    (0.5, -1),
    (-0.5, -1),
    (1, 1),
    (-1, 1),
    (1, -1),
    (-1, -1),
)
_GAPS = (0.0, 8.0, 16.0, 26.0)
_PASSES = 20

# what is worse than what, for each square point that is covered; and for each place down the list
_OF_A_NAME, _OF_A_LEADER, _OF_A_MARKER, _OF_THE_OUTSIDE, _OF_A_LINE, _OF_RANK = 4.0, 4.0, 6.0, 10.0, 0.5, 1.0


def place(points: Sequence[XY], sizes: Sequence[XY], inside: Box, radius: float, lines: Sequence[Box] = ()) -> list[XY]:
    """The centre of every name's box.

    Args:
        points: where the markers are, of `radius`.
        sizes: width and height of each name's box.
        inside: what the boxes are to stay in.
        lines: boxes that names had better not cover.
    """
    markers = [_box(point, (2 * radius, 2 * radius)) for point in points]
    candidates = [list(_around(point, size, radius)) for point, size in zip(points, sizes, strict=True)]
    chosen: dict[int, Box] = {}
    leaders: dict[int, list[Box]] = {}
    centres = list(points)

    def cost(centre: XY, rank: int, own: int) -> float:
        box = _box(centre, sizes[own])
        names = [other for number, other in chosen.items() if number != own]
        others = [dot for number, leader in leaders.items() if number != own for dot in leader]
        leader = dots((points[own], centre))
        return (
            _OF_A_NAME * _covered(box, names)
            + _OF_A_LEADER * (_covered(box, others) + sum(_covered(dot, names) for dot in leader))
            + _OF_A_MARKER * _covered(box, markers)
            + _OF_A_LINE * _covered(box, lines)
            + _OF_THE_OUTSIDE * (_area(box) - _covered(box, [inside]))
            + _OF_RANK * rank
        )

    for _ in range(_PASSES):
        before = dict(chosen)
        for number, around in enumerate(candidates):
            best = min(range(len(around)), key=lambda rank: (cost(around[rank], rank, number), rank))
            centres[number] = around[best]
            chosen[number] = _box(around[best], sizes[number])
            leaders[number] = list(dots((points[number], around[best])))
        if chosen == before:
            break
    return centres


def dots(line: Sequence[XY], *, every: float = 3.0) -> Iterable[Box]:
    """Small boxes along a line, in the place of it."""
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        count = int(math.hypot(x1 - x0, y1 - y0) / every) + 1
        for part in range(1, count):
            yield _box((x0 + (x1 - x0) * part / count, y0 + (y1 - y0) * part / count), (every, every))


def _around(point: XY, size: XY, radius: float) -> Iterable[XY]:
    """Centres of a name's box beside its point, then further out."""
    for gap in _GAPS:
        for x, y in _SIDES:
            reach = radius + gap
            yield point[0] + x * (reach + size[0] / 2), point[1] + y * (reach + size[1] / 2)


def _box(centre: XY, size: XY) -> Box:
    (x, y), (width, height) = centre, size
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _covered(box: Box, others: Iterable[Box]) -> float:
    """How much of `box` lies over others."""
    return sum(
        _area((max(box[0], o[0]), max(box[1], o[1]), min(box[2], o[2]), min(box[3], o[3])))
        for o in others
        if box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3]
    )


_FLOAT, _QUANTIZED, _INK, _FAINT = "#5b7299", "#d1495b", "#333f50", "#e6e9ee"
_PANEL = (4.6, 3.3)  # inches
_RADIUS = 4.5  # of a marker with some air around it, in points
_LABEL_SIZE = 7
_LEAST_SPAN = 0.5  # of the accuracy axis: the luck of 10,000 images is not to look like a difference


def points(index: Path) -> list[CheckpointInfo]:
    """The checkpoints of an index, by dataset in the order of the tables, then by size.

    Datasets that no table has come last, by name.
    """
    rows = (row(name, entry) for name, entry in read_index(index).checkpoints.items())
    return sorted(rows, key=lambda row: (*_place(row["dataset"]), row["bytes"], row["name"]))


def _place(dataset: str) -> tuple[int, str]:
    return (TABLES.index(dataset) if dataset in TABLES else len(TABLES), dataset)


def description(points: Iterable[CheckpointInfo]) -> str:
    """What the picture shows, as a line of text that is part of it."""
    return "; ".join(f"{p['name']}: {p['accuracy']:.2f} %, {p['bytes']:,} bytes" for p in points)


def update_plot(path: Path, index: Path) -> str | None:
    """Draw the checkpoints of `index`, unless the picture at `path` shows them already.

    Returns why it could not be drawn, in words, if so.
    """
    now = points(index)
    if not now or shows(path, now):
        return None
    try:
        draw(now, path)
    except ImportError as error:
        return f"{shown(path)} stays as it was ({error}): pip install matplotlib, and the same command draws it"
    return None


def shows(path: Path, points: Iterable[CheckpointInfo]) -> bool:
    """Whether the picture at `path` is of these checkpoints."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return f">{html.escape(description(points), quote=False)}</" in text


def draw(points: Sequence[CheckpointInfo], path: Path) -> None:
    """Write the picture as SVG: the same bytes for the same points and the same matplotlib."""
    from matplotlib import style

    metadata = {"Date": None, "Title": "Accuracy and bytes of checkpoints", "Description": description(points)}
    # nothing of what a user has set
    with style.context({"svg.hashsalt": "cnvzoo", "font.size": 9}, after_reset=True), replacing(path) as temporary:
        figure(points).savefig(temporary, format="svg", metadata=metadata)


def figure(points: Sequence[CheckpointInfo]) -> Figure:
    """A panel for each dataset, two in a row, with one scale of bytes."""
    from matplotlib.figure import Figure

    datasets = list(dict.fromkeys(point["dataset"] for point in points))
    columns = min(2, len(datasets))
    lines = -(-len(datasets) // columns)
    width, height = _PANEL[0] * columns, _PANEL[1] * lines + 0.2
    figure = Figure(figsize=(width, height), dpi=72)  # a pixel is a point, and so labels are placed in points
    figure.subplots_adjust(
        left=0.7 / width, right=1 - 0.15 / width, bottom=0.5 / height, top=1 - 0.4 / height,
        wspace=0.16, hspace=0.3,
    )  # fmt: skip
    sizes = [point["bytes"] for point in points]
    for number, dataset in enumerate(datasets):
        axes = figure.add_subplot(lines, columns, number + 1)
        _panel(axes, dataset, [point for point in points if point["dataset"] == dataset])
        _bytes_axis(axes, min(sizes) / 1.7, max(sizes) * 1.7, named=number + columns >= len(datasets))
        if number % columns == 0:
            axes.set_ylabel("test accuracy, %", color=_INK)
    for axes, dataset in zip(figure.axes, datasets, strict=True):
        _name(axes, [point for point in points if point["dataset"] == dataset])
    handles = [
        figure.axes[0].plot([], [], marker, color=colour, markersize=6, label=label)[0]
        for marker, colour, label in (("o", _FLOAT, "float"), ("D", _QUANTIZED, "quantized"))
    ]
    figure.legend(
        handles=handles, loc="upper right", ncols=2, frameon=False, labelcolor=_INK, handletextpad=0.1,
        bbox_to_anchor=(1 - 0.05 / width, 1 - 0.05 / height), borderaxespad=0,
    )  # fmt: skip
    return figure


def _panel(axes: Axes, dataset: str, points: Sequence[CheckpointInfo]) -> None:
    from matplotlib.ticker import MaxNLocator

    for line in _lines(points):
        axes.plot([p["bytes"] for p in line], [p["accuracy"] for p in line], color=_QUANTIZED, lw=0.8, alpha=0.45)
    for point in points:
        quantized = point["w_bits"] is not None
        axes.plot(
            point["bytes"], point["accuracy"], "D" if quantized else "o", markersize=5.5 if quantized else 6.5,
            color=_QUANTIZED if quantized else _FLOAT, markeredgecolor="white", markeredgewidth=0.8, zorder=4,
        )  # fmt: skip
    accuracies = [point["accuracy"] for point in points]
    span = max(max(accuracies) - min(accuracies), _LEAST_SPAN)
    middle = (max(accuracies) + min(accuracies)) / 2
    axes.set_ylim(middle - 0.72 * span, min(middle + 0.72 * span, 100))
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.set_title(dataset, loc="left", fontweight="bold", color=_INK)
    axes.grid(axis="y", color=_FAINT, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#9aa5b5")
    axes.tick_params(length=0, labelcolor=_INK, labelsize=8)


def _bytes_axis(axes: Axes, low: float, high: float, *, named: bool) -> None:
    """Bytes on a logarithmic scale, with ticks at 1, 2 and 5 of every power of ten."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = [tick for power in range(12) for digit in (1, 2, 5) if low <= (tick := digit * 10**power) <= high]
    axes.set_xticks(ticks, [f"{tick / 1e6:g} MB" if tick >= 1e6 else f"{tick / 1e3:g} kB" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    if named:
        axes.set_xlabel("size of model.safetensors", color=_INK)


def _lines(points: Sequence[CheckpointInfo]) -> list[list[CheckpointInfo]]:
    """The checkpoints of one graph at several bit widths, float included."""
    graphs: dict[str, list[CheckpointInfo]] = {}
    for point in points:
        model = point["model"]  # one that this version does not have is a graph of its own
        twin = model_spec(model).float_twin if model in model_names() else None
        graphs.setdefault(twin or model, []).append(point)
    return [line for line in graphs.values() if len(line) > 1]


def _name(axes: Axes, points: Sequence[CheckpointInfo]) -> None:
    """The name of every point, beside it."""
    from matplotlib.textpath import TextPath

    names = [point["name"].partition(".")[0] for point in points]
    at = [_in_points(axes, point) for point in points]
    sizes = [(TextPath((0, 0), name, size=_LABEL_SIZE).get_extents().width + 3, _LABEL_SIZE + 1.0) for name in names]
    inside = axes.get_window_extent()
    traces = [dot for line in _lines(points) for dot in dots([_in_points(axes, point) for point in line])]
    centres = place(at, sizes, (inside.x0, inside.y0, inside.x1, inside.y1), _RADIUS, traces)
    for name, point, (x, y), centre, (width, height) in zip(names, points, at, centres, sizes, strict=True):
        away = (centre[0] - x, centre[1] - y)
        near = abs(away[0]) <= width / 2 + _RADIUS + 1 and abs(away[1]) <= height / 2 + _RADIUS + 1
        axes.annotate(
            name, (point["bytes"], point["accuracy"]), away, textcoords="offset points", ha="center", va="center",
            fontsize=_LABEL_SIZE, color=_INK, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},
            arrowprops=None if near else {"arrowstyle": "-", "lw": 0.6, "color": "#9aa5b5", "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip


def _in_points(axes: Axes, point: CheckpointInfo) -> tuple[float, float]:
    x, y = axes.transData.transform((point["bytes"], point["accuracy"]))
    return float(x), float(y)
