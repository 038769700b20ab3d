"""The figures of infer.py as a table, a section of the page, and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import look
from rich.console import Console

from cnvzoo.files import write_text

Result = dict[str, Any]

BASELINE = "PyTorch float32"
OURS = "ours, ONNX Runtime"
_COMPARED = "64"  # images at a time, for ratios


def columns(result: Result) -> tuple[str, ...]:
    batches = result["contenders"][0]["milliseconds"]
    images = [f"images/s, batch {batch}" for batch in batches if batch != "1"]
    ratio = ["/ PyTorch float32"] if _COMPARED in batches else []
    return ("net", "in", "file bytes", "top-1, %", *(["one image, ms"] if "1" in batches else []), *images, *ratio)


def rows(result: Result) -> list[tuple[str, ...]]:
    """One line of text cells for each contender, under `columns(result)`."""
    baseline = next(row for row in result["contenders"] if row["runtime"] == BASELINE)
    lines = []
    for row in result["contenders"]:
        times = row["milliseconds"]
        one = [f"{times['1']:.2f}"] if "1" in times else []
        images = [f"{images_per_second(row, batch):,.0f}" for batch in times if batch != "1"]
        faster = images_per_second(row, _COMPARED) / images_per_second(baseline, _COMPARED) if _COMPARED in times else 0
        ratio = [f"{faster:.2f}"] if faster else []
        accuracy = f"{100 * row['correct'] / row['total']:.2f}"
        lines.append((row["net"], row["runtime"], f"{row['bytes']:,}", accuracy, *one, *images, *ratio))
    return lines


def images_per_second(row: dict[str, Any], batch: str) -> float:
    return 1000 * int(batch) / row["milliseconds"][batch]


def machine(result: Result) -> str:
    facts = result["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    return f"{facts['name']}, {facts['threads']} threads, {facts['capability']}; {versions}"


def print_table(console: Console, result: Result) -> None:
    look.print_table(console, f"Inference: {machine(result)}", columns(result), rows(result), left=2)


def section(result: Result) -> str:
    """The part of the page about inference."""
    return f"""## Inference

A trained CNV on CIFAR-10 images, medians over the runs of contenders that take turns in one process, each with the
same number of threads. `python benchmarks/speed/infer.py --keep` measures again and writes this part.

{look.markdown(columns(result), rows(result), left=2)}

Machine: {machine(result)}.

- *file bytes*: of the ONNX file, or of the published `model.safetensors` where PyTorch runs it.
- *top-1*: of that very file in that runtime, on all {result["contenders"][0]["total"]:,} test images.
- *PyTorch*: in inference mode; *static PTQ int8*: ONNX Runtime's own quantization without training, of the
  float net, per channel, calibrated on 512 training images; *QCDQ*: Brevitas' export for runtimes.
- *ours*: the integer graph, `cnvzoo.export(model, path)`. It takes 8-bit pixels as they are; the time that the others
  need to make float images of these is not counted.

![Images a second and the time of one image, for every net and runtime](infer.svg)
"""


def plot(result: Result, path: Path) -> None:
    """Bars: images a second at the compared batch size, and milliseconds of one image."""
    rows = result["contenders"]
    labels = [f"{row['net']}, {row['runtime']}" for row in rows]
    colours = [look.OURS if row["runtime"] == OURS else _colour(row) for row in rows]
    panels = [
        (f"images a second, batch {_COMPARED}", [images_per_second(row, _COMPARED) for row in rows], "{:,.0f}"),
        ("milliseconds for one image", [row["milliseconds"]["1"] for row in rows], "{:.2f}"),
    ]
    with look.figure(path, (10, 0.24 * len(rows) + 1), columns=len(panels)) as axes:
        for panel, (title, values, form) in zip(axes, panels, strict=True):
            bars = panel.barh(range(len(rows)), values, 0.75, color=colours)
            panel.bar_label(bars, [form.format(value) for value in values], fontsize=7, padding=2)
            panel.set_yticks(range(len(rows)), labels if panel is axes[0] else [""] * len(rows), fontsize=7)
            panel.set_title(title, fontsize=9, loc="left")
            panel.invert_yaxis()
            panel.margins(x=0.12)


def _colour(row: dict[str, Any]) -> str:
    return look.PLAIN if row["net"] == "cnv" else look.OTHER


def keep(result: Result) -> None:
    """Write infer.json and infer.svg of this folder."""
    plot(result, look.HERE / "infer.svg")
    write_text(look.HERE / "infer.json", json.dumps(result, indent=1) + "\n")
