"""The plots of the published checkpoints: accuracy against bytes, an SVG file for each dataset.

A plot is a function of the index alone. Its metadata lists what it shows, which decides whether it has to be drawn
again: matplotlib takes a second to import, and may be missing.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnvzoo.checkpoints.index import CheckpointInfo, read_index, row
from cnvzoo.data.published import dataset_info, list_datasets
from cnvzoo.files import replacing
from cnvzoo.models.registry import model_names, model_spec
from harness.entries import TABLES, Layout, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

_FLOAT, _QUANTIZED, _INK, _GRID = "#3d5a80", "#d1495b", "#2b2d42", "#e6e9ef"
_WIDTH, _HEIGHT = 9.0, 3.6  # inches
_FEWEST = 2  # checkpoints in a plot
_LEAST_SPAN = 0.1  # percentage points that the accuracy axis shows


def points(index: Path, dataset: str) -> list[CheckpointInfo]:
    """The checkpoints of a dataset, smallest file first."""
    found = [row(name, entry) for name, entry in read_index(index).checkpoints.items() if entry.dataset == dataset]
    return sorted(found, key=lambda point: (point["bytes"], point["name"]))


def plotted(index: Path) -> frozenset[str]:
    """The datasets with enough checkpoints for a plot."""
    return frozenset(table for table in TABLES if len(points(index, table)) >= _FEWEST)


def update_plots(layout: Layout) -> list[str]:
    """Draw the plots that do not show the checkpoints of the index; returns a line for each that cannot be drawn."""
    problems = []
    for table in TABLES:
        now, path = points(layout.index, table), layout.plot(table)
        if len(now) < _FEWEST or shows(path, now):
            continue
        try:
            draw(now, path)
        except ImportError as error:
            remedy = "pip install matplotlib, then the same command draws it"
            problems.append(f"{shown(path)} stays as it was ({error}): {remedy}")
    return problems


def shows(path: Path, points: Iterable[CheckpointInfo]) -> bool:
    """Whether the plot at `path` is of these checkpoints."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return f">{html.escape(description(points), quote=False)}</" in text


def description(points: Iterable[CheckpointInfo]) -> str:
    """What a plot shows, as text."""
    return "; ".join(f"{p['name']}: {p['accuracy']:.2f} %, {p['bytes']:,} bytes" for p in points)


def draw(points: Sequence[CheckpointInfo], path: Path) -> None:
    """Write the plot as SVG: the same bytes for the same points and the same matplotlib."""
    from matplotlib import style

    metadata = {"Date": None, "Title": "Accuracy and bytes of checkpoints", "Description": description(points)}
    # after_reset: settings of the user have no effect
    with style.context({"svg.hashsalt": "cnvzoo", "font.size": 9}, after_reset=True), replacing(path) as temporary:
        figure(points).savefig(temporary, format="svg", metadata=metadata)


def figure(points: Sequence[CheckpointInfo]) -> Figure:
    """Accuracy against bytes for the checkpoints of one dataset, smallest file first, each with its name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT))
    figure.subplots_adjust(left=0.7 / _WIDTH, right=1 - 0.15 / _WIDTH, bottom=0.5 / _HEIGHT, top=1 - 0.35 / _HEIGHT)
    axes = figure.add_subplot()
    for widths in _widths_of_graphs(points):
        axes.plot([p["bytes"] for p in widths], [p["accuracy"] for p in widths], color=_QUANTIZED, lw=0.8, alpha=0.45)
    for label, marker, size, colour, quantized in (
        ("float", "o", 6.5, _FLOAT, False),
        ("quantized", "D", 5.5, _QUANTIZED, True),
    ):
        group = [p for p in points if (p["w_bits"] is not None) is quantized]
        axes.plot(
            [p["bytes"] for p in group], [p["accuracy"] for p in group], marker, markersize=size, color=colour,
            markeredgecolor="white", markeredgewidth=0.8, zorder=4, label=label,
        )  # fmt: skip
    _set_axes(axes, points)
    _label(axes, points)
    figure.legend(
        loc="upper right", ncols=2, frameon=False, labelcolor=_INK, handletextpad=0.1, borderaxespad=0,
        bbox_to_anchor=(1 - 0.05 / _WIDTH, 1 - 0.03 / _HEIGHT),
    )  # fmt: skip
    return figure


def _set_axes(axes: Axes, points: Sequence[CheckpointInfo]) -> None:
    """Accuracy on a linear axis, bytes on a logarithmic one with ticks at 1, 2 and 5 of every power of ten."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    accuracies, sizes = [p["accuracy"] for p in points], [p["bytes"] for p in points]
    span = max(max(accuracies) - min(accuracies), _LEAST_SPAN)
    middle = (max(accuracies) + min(accuracies)) / 2
    axes.set_ylim(middle - 0.65 * span, min(middle + 0.65 * span, 100))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set_ylabel("test accuracy, %", color=_INK)
    low, high = min(sizes) / 1.5, max(sizes) * 1.5
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = [tick for power in range(12) for digit in (1, 2, 5) if low <= (tick := digit * 10**power) <= high]
    axes.set_xticks(ticks, [f"{tick / 1e6:g} MB" if tick >= 1e6 else f"{tick / 1e3:g} kB" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("size of model.safetensors", color=_INK)
    dataset = points[0]["dataset"]
    title = dataset_info(dataset).title if dataset in list_datasets() else dataset
    axes.set_title(title, loc="left", fontweight="bold", color=_INK)
    axes.grid(axis="y", color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#9aa5b5")
    axes.tick_params(length=0, labelcolor=_INK, labelsize=8)


def _label(axes: Axes, points: Sequence[CheckpointInfo]) -> None:
    """The name of each point above or below it, where it covers the fewest other names and points."""
    positions = [axes.transData.transform((point["bytes"], point["accuracy"])) for point in points]
    placed: list[Any] = []
    for rank, point in enumerate(points):
        choices = []
        for above in (rank % 2 == 0, rank % 2 == 1):
            name = _annotate(axes, point, above=above)
            box = name.get_window_extent()
            name.remove()
            covered = sum(box.overlaps(other) for other in placed) + sum(box.contains(*xy) for xy in positions)
            choices.append((covered, len(choices), above, box))
        _, _, above, box = min(choices, key=lambda choice: choice[:2])
        _annotate(axes, point, above=above)
        placed.append(box)


def _annotate(axes: Axes, point: CheckpointInfo, *, above: bool) -> Annotation:
    return axes.annotate(
        point["name"].partition(".")[0], (point["bytes"], point["accuracy"]), (0, 7 if above else -7),
        textcoords="offset points", ha="center", va="bottom" if above else "top", fontsize=8, color=_INK,
    )  # fmt: skip


def _widths_of_graphs(points: Sequence[CheckpointInfo]) -> list[list[CheckpointInfo]]:
    """The checkpoints of each graph that has several bit widths, float included."""
    graphs: dict[str, list[CheckpointInfo]] = {}
    for point in points:
        model = point["model"]  # one that this version does not have is a graph by itself
        twin = model_spec(model).float_twin if model in model_names() else None
        graphs.setdefault(twin or model, []).append(point)
    return [graph for graph in graphs.values() if len(graph) > 1]
