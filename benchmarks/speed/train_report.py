"""The figures of train.py as a table, a page and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cnvzoo.files import replacing, write_text

_HERE = Path(__file__).resolve().parent
_COLUMNS = ("net", "textbook", "tuned textbook", "ours", "ours / textbook", "ours / tuned", "of bf16 matmul", "/ float")

Result = dict[str, Any]


def rows(result: Result) -> list[tuple[str, ...]]:
    """One line of text cells for each net, under `_COLUMNS`: images a second, ratios, share, quantized over float."""
    lines = []
    for name, figures in result["models"].items():
        rate = figures["images_per_second"]
        ours = rate["ours"]
        twin = rate.get("ours, float twin")
        lines.append(
            (
                name,
                *(f"{rate[way]:,.0f}" for way in ("textbook", "tuned textbook", "ours")),
                f"{ours / rate['textbook']:.2f}",
                f"{ours / rate['tuned textbook']:.2f}",
                f"{100 * figures['share_of_matmul_peak']:.0f} %",
                f"{twin / ours:.2f}" if twin else "",
            )
        )
    return lines


def machine(result: Result) -> str:
    """The machine in words, with its measured bf16 peak."""
    facts = result["machine"]
    cpu = f", {facts['threads']} threads, {facts['capability']}" if facts["kind"] == "cpu" else ""
    return f"{facts['name']}{cpu}, torch {facts['torch']}; bf16 matmul {result['matmul_peak'] / 1e9:,.0f} GFLOP/s"


def print_table(console: Console, result: Result) -> None:
    table = Table(title=f"Training, images a second: {machine(result)}")
    for number, column in enumerate(_COLUMNS):
        table.add_column(column, justify="right" if number else "left", no_wrap=number == 0)
    for line in rows(result):
        table.add_row(*line)
    console.print(table)


def page(result: Result) -> str:
    """README.md of this folder."""
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|---{'|---:' * (len(_COLUMNS) - 1)}|"]
    lines += [f"| {' | '.join(line)} |" for line in rows(result)]
    return f"""# What a training step costs

Images a second of a full training step on CIFAR-10 images, augmentation included, at each recipe's batch size; medians
of turns taken in one process. `python benchmarks/speed/train.py --keep` measures again and writes this page.

{chr(10).join(lines)}

Machine: {machine(result)}.

- *textbook*: torchvision transforms on PIL images in a DataLoader with two workers, float32, contiguous tensors, plain
  layers of torch.nn and Brevitas.
- *tuned textbook*: the same with bfloat16 autocast and channels_last.
- *ours*: the trainer of this library.
- *of bf16 matmul*: operations of the step, six for each multiply-accumulate of the forward pass, beside those of
  a large bfloat16 matrix product on the same machine.
- */ float*: time of a quantized step in steps of its float twin, which takes turns with it.

![Images a second of each net, three ways](train.svg)
"""


def plot(result: Result, path: Path) -> None:
    """Bars of images a second, three for each net."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    names, ways = list(result["models"]), ("textbook", "tuned textbook", "ours")
    with plt.rc_context({"svg.hashsalt": "cnvzoo", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(9, 3.6))
        for number, (way, colour) in enumerate(zip(ways, ("#b8c0cc", "#7a8ba6", "#d1495b"), strict=True)):
            heights = [result["models"][name]["images_per_second"][way] for name in names]
            bars = axes.bar(
                [x + 0.27 * (number - 1) for x in range(len(names))], heights, 0.25, label=way, color=colour
            )
            axes.bar_label(bars, [f"{h:,.0f}" for h in heights], fontsize=6, padding=1)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel("training, images a second")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.tight_layout()
        with replacing(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
        plt.close(figure)


def keep(result: Result) -> None:
    """Write train.json, train.svg and README.md of this folder."""
    plot(result, _HERE / "train.svg")
    write_text(_HERE / "train.json", json.dumps(result, indent=1) + "\n")
    write_text(_HERE / "README.md", page(result))
