"""The figures of infer.py as a table, a section of the page, and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import machine
import style
from contenders import BREVITAS, CALIBRATION_IMAGES, COMPILED, OPENVINO_INT8, OURS, PYTORCH, PYTORCH_CHANNELS_LAST
from rich.console import Console

Result = dict[str, Any]

# these compute what the published file does, in float32 or in exact integers, so their right answers are the published
OF_THE_PUBLISHED_FILE = (PYTORCH, PYTORCH_CHANNELS_LAST, COMPILED, BREVITAS, OURS)
_COMPARED = "64"  # images at a time, for ratios


def columns(result: Result) -> tuple[str, ...]:
    """The names of the columns for the batch sizes that were measured."""
    batches = result["contenders"][0]["milliseconds"]
    images = [f"images/s, batch {batch}" for batch in batches if batch != "1"]
    ratio = [f"/ {PYTORCH}"] if _COMPARED in batches else []
    return ("net", "in", "file bytes", "top-1, %", *(["one image, ms"] if "1" in batches else []), *images, *ratio)


def rows(result: Result) -> list[tuple[str, ...]]:
    """One line of texts for each contender, under `columns(result)`."""
    baseline = next(row for row in result["contenders"] if row["runtime"] == PYTORCH)
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


def machine_text(result: Result) -> str:
    """The machine and the versions of the packages."""
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    return f"{machine.in_words(result['machine'])}; {versions}"


def print_table(console: Console, result: Result) -> None:
    style.print_table(console, f"Inference: {machine_text(result)}", columns(result), rows(result), left=2)


def section(result: Result) -> str:
    """The part of the page about inference."""
    runtimes = {row["runtime"] for row in result["contenders"]}
    nncf = f"""
- *{OPENVINO_INT8}*: OpenVINO's own quantization of the float net without training (`nncf.quantize`), calibrated on the
  same images, with the options that its documentation recommends for nets with ReLU: the preset PERFORMANCE, which is
  symmetric, and fast bias correction; its bytes are those of the two files of OpenVINO's own format."""
    return f"""## Inference

A trained CNV on CIFAR-10 images, in one process, where all runtimes take turns with the same number of threads; a
figure is the median over the runs of all turns. `python benchmarks/speed/infer.py --keep` measures again and writes
this part; [infer.json](infer.json) has the sha256 of the checkpoints that were measured.

{style.markdown(columns(result), rows(result), left=2)}

Machine: {machine_text(result)}.

- *file bytes*: of the ONNX file, or of the published `model.safetensors` where PyTorch runs it.
- *top-1*: of that very file in that runtime, on all {result["contenders"][0]["total"]:,} test images.
- *PyTorch*: in inference mode; *static PTQ int8*: ONNX Runtime's own quantization of the float net without training,
  per channel, calibrated on {CALIBRATION_IMAGES} training images; *QCDQ*: Brevitas' export for runtimes.{
        nncf if OPENVINO_INT8 in runtimes else ""
    }
- *ours*: the integer graph, `cnvzoo.export(model, path)`. It takes 8-bit pixels as they are; the time that the others
  need to make float images of these is not counted. OpenVINO 2026.4.1 does not read it: it takes the scales of a
  QLinearConv, one for each output channel, for those of the input channels. Its `read_model` raises an error for the
  8-bit graph and ends the process with a segmentation fault for the 4-bit and the 2-bit one.

![Images a second and the time of one image, for every net and runtime](infer.svg)
"""


def plot(result: Result, path: Path) -> None:
    """Bars: images a second at the compared batch size, or else the last, and milliseconds of one image if measured."""
    rows = result["contenders"]
    labels = [f"{row['net']}, {row['runtime']}" for row in rows]
    colours = [style.OURS if row["runtime"] == OURS else _colour(row) for row in rows]
    batches = [batch for batch in rows[0]["milliseconds"] if batch != "1"]
    panels = []
    if batches:
        batch = _COMPARED if _COMPARED in batches else batches[-1]
        panels.append((f"images a second, batch {batch}", [images_per_second(row, batch) for row in rows], "{:,.0f}"))
    if "1" in rows[0]["milliseconds"]:
        panels.append(("milliseconds for one image", [row["milliseconds"]["1"] for row in rows], "{:.2f}"))
    with style.figure(path, (10, 0.24 * len(rows) + 1), columns=len(panels)) as axes:
        for panel, (title, values, form) in zip(axes, panels, strict=True):
            bars = panel.barh(range(len(rows)), values, 0.75, color=colours)
            panel.bar_label(bars, [form.format(value) for value in values], fontsize=7, padding=2)
            panel.set_yticks(range(len(rows)), labels if panel is axes[0] else [""] * len(rows), fontsize=7)
            panel.set_title(title, fontsize=9, loc="left")
            panel.invert_yaxis()
            panel.margins(x=0.12)


def _colour(row: dict[str, Any]) -> str:
    return style.PLAIN if row["net"] == "cnv" else style.OTHER
