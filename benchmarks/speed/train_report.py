"""The figures of train.py as a table, a section of the page, and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import look
from rich.console import Console

from cnvzoo.files import write_text

FLOAT_TWIN, EARLY_CROPS = "ours, float twin", "ours, early crops"  # beside the ways that every net is trained in

_COLUMNS = (
    "net", "textbook", "tuned textbook", "ours", "ours / textbook", "ours / tuned", "of bf16 matmul", "/ float",
    "early crops",
)  # fmt: skip

Result = dict[str, Any]


def rows(result: Result) -> list[tuple[str, ...]]:
    """One line of text cells for each net, under `_COLUMNS`: images a second, ratios, share, quantized over float,
    early crops over whole images."""
    lines = []
    for name, figures in result["models"].items():
        rate = figures["images_per_second"]
        ours = rate["ours"]
        twin, crops = rate.get(FLOAT_TWIN), rate.get(EARLY_CROPS)
        lines.append(
            (
                name,
                *(f"{rate[way]:,.0f}" for way in ("textbook", "tuned textbook", "ours")),
                f"{ours / rate['textbook']:.2f}",
                f"{ours / rate['tuned textbook']:.2f}",
                f"{100 * figures['share_of_matmul_peak']:.0f} %",
                f"{twin / ours:.2f}" if twin else "",
                f"{crops / ours:.2f}" if crops else "",
            )
        )
    return lines


def machine(result: Result) -> str:
    """The machine in words, with its measured bf16 peak."""
    facts = result["machine"]
    cpu = f", {facts['threads']} threads, {facts['capability']}" if facts["kind"] == "cpu" else ""
    return f"{facts['name']}{cpu}, torch {facts['torch']}; bf16 matmul {result['matmul_peak'] / 1e9:,.0f} GFLOP/s"


def print_table(console: Console, result: Result) -> None:
    look.print_table(console, f"Training, images a second: {machine(result)}", _COLUMNS, rows(result))


def section(result: Result) -> str:
    """The part of the page about training."""
    return f"""## Training

Images a second of a full training step on CIFAR-10 images, augmentation included, at each recipe's batch size; medians
of turns that processes take, one for each way. `python benchmarks/speed/train.py --keep` measures again and writes this
part.

{look.markdown(_COLUMNS, rows(result))}

Machine: {machine(result)}.

- *textbook*: torchvision transforms on PIL images in a DataLoader with two workers, float32, contiguous tensors, plain
  layers of torch.nn and Brevitas, memory as the C library hands it out.
- *tuned textbook*: the same with bfloat16 autocast and channels_last.
- *ours*: the trainer of this library.
- *of bf16 matmul*: operations of the step, six for each multiply-accumulate of the forward pass, beside those of
  a large bfloat16 matrix product on the same machine.
- */ float*: time of a quantized step in steps of its float twin, which takes turns with it.
- *early crops*: how many times as fast the recipe's early epochs are, if they show parts of the images.

![Images a second of each net, three ways](train.svg)
"""


def plot(result: Result, path: Path) -> None:
    """Bars of images a second, three for each net."""
    names, ways = list(result["models"]), ("textbook", "tuned textbook", "ours")
    with look.figure(path, (9, 3.6)) as (axes,):
        for number, (way, colour) in enumerate(zip(ways, (look.PLAIN, look.OTHER, look.OURS), strict=True)):
            heights = [result["models"][name]["images_per_second"][way] for name in names]
            at = [x + 0.27 * (number - 1) for x in range(len(names))]
            bars = axes.bar(at, heights, 0.25, label=way, color=colour)
            axes.bar_label(bars, [f"{h:,.0f}" for h in heights], fontsize=6, padding=1)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel("training, images a second")
        axes.legend(frameon=False)


def keep(result: Result) -> None:
    """Write train.json and train.svg of this folder."""
    plot(result, look.HERE / "train.svg")
    write_text(look.HERE / "train.json", json.dumps(result, indent=1) + "\n")
