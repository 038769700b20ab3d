"""The figures of train.py as a table, a section of the page, and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import machine
import style
from rich.console import Console
from training_process import BASELINE, OURS, PROGRAMS, TUNED_BASELINE

FLOAT_TWIN, EARLY_CROPS = "ours, float twin", "ours, early crops"  # beside the programs that train every net

_EXPLANATIONS = {
    "baseline": "torchvision transforms on PIL images in a DataLoader with two workers, float32, contiguous tensors, "
    "plain\n  layers of torch.nn and Brevitas, the memory allocator of the C library with its default settings.",
    "tuned baseline": "the same with bfloat16 autocast and channels_last.",
    "ours": "the trainer of this library.",
    "of bf16 matmul": "operations of the step, six for each multiply-accumulate of the forward pass, in percent of "
    "those\n  of a large bfloat16 matrix product in the same time on the same machine.",
    "/ float": "time of a quantized step, divided by that of its float twin, which takes turns with it.",
    "early crops": "how many times as fast a step of the recipe's early epochs is, which show square parts of the "
    "images, of\n  so many pixels.",
}
_COLUMNS = ("net", "batch", BASELINE, TUNED_BASELINE, OURS, "ours / baseline", "ours / tuned", *list(_EXPLANATIONS)[3:])

Result = dict[str, Any]


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Column names, and a line of texts for each net: batch size, images a second, their ratios, share of the matrix
    product, quantized over float, and early crops over whole images. A column that no net has a value for is left out.
    """
    lines = []
    for name, figures in result["models"].items():
        rate = figures["images_per_second"]
        ours = rate[OURS]
        twin, crops = rate.get(FLOAT_TWIN), rate.get(EARLY_CROPS)
        lines.append(
            (
                name,
                str(figures["batch_size"]),
                *(f"{rate[program]:,.0f}" for program in PROGRAMS),
                f"{ours / rate[BASELINE]:.2f}",
                f"{ours / rate[TUNED_BASELINE]:.2f}",
                f"{100 * figures['share_of_matmul_peak']:.0f} %",
                f"{twin / ours:.2f}" if twin else "",
                f"{crops / ours:.2f} ({figures['early_crops']})" if crops else "",
            )
        )
    return style.without_empty(_COLUMNS, lines)


def machine_text(result: Result) -> str:
    """The machine and the version of torch, with the measured rate of the bf16 matrix product."""
    facts, rate = result["machine"], result["matmul_peak"] / 1e9
    return f"{machine.in_words(facts)}, torch {facts['torch']}; bf16 matmul {rate:,.0f} GFLOP/s"


def print_table(console: Console, result: Result) -> None:
    style.print_table(console, f"Training, images a second: {machine_text(result)}", *table(result))


def section(result: Result) -> str:
    """The part of the page about training."""
    columns, rows = table(result)
    explanations = "\n".join(f"- *{name}*: {text}" for name, text in _EXPLANATIONS.items() if name in columns)
    return f"""## Training

Images a second of a full training step on CIFAR-10 images with SGD, augmentation (crop and flip) included, at the batch
size of each net's recipe. Each program trains in a process of its own, and the processes take turns; a figure is the
median over the turns. `python benchmarks/speed/train.py --keep` measures again and writes this part;
[train.json](train.json) has the fingerprints of the recipes that were measured.

{style.markdown(columns, rows)}

Machine: {machine_text(result)}.

{explanations}

![Images a second of each net with the baseline, the tuned baseline and this library](train.svg)
"""


def plot(result: Result, path: Path) -> None:
    """Bars of images a second, three for each net."""
    names = list(result["models"])
    with style.figure(path, (9, 3.6)) as (axes,):
        for number, (program, colour) in enumerate(zip(PROGRAMS, (style.PLAIN, style.OTHER, style.OURS), strict=True)):
            heights = [result["models"][name]["images_per_second"][program] for name in names]
            at = [x + 0.27 * (number - 1) for x in range(len(names))]
            bars = axes.bar(at, heights, 0.25, label=program, color=colour)
            axes.bar_label(bars, [f"{h:,.0f}" for h in heights], fontsize=6, padding=1)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel("training, images a second")
        axes.legend(frameon=False)
