"""What infer.py shows of its figures: the tables, the part of README.md, and the plot."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import shared
from contenders import (
    CALIBRATION_IMAGES,
    FASTEST,
    ONNXRUNTIME_FLOAT,
    ONNXRUNTIME_INT8,
    OPENVINO_FLOAT,
    OPENVINO_INT8,
    OURS,
    PYTORCH,
    QDQ,
)
from memory import MEMORY_BATCHES
from rich.console import Console

# in the table that users choose from
CHOICES = (ONNXRUNTIME_FLOAT, ONNXRUNTIME_INT8, OPENVINO_FLOAT, OPENVINO_INT8, OURS, FASTEST)
AGREEING = "same class"
_COMPARED = "64"  # images at a time, for ratios
_RATIO = f"/ {PYTORCH}, batch {_COMPARED}"

Result = dict[str, Any]


def columns(result: Result) -> tuple[str, ...]:
    """The names of the columns for the batch sizes that were measured."""
    batches = result["contenders"][0]["milliseconds"]
    images = [f"images/s, batch {batch}" for batch in batches if batch != "1"]
    ratio = [_RATIO] if _COMPARED in batches else []
    return (
        "net",
        "runtime",
        "file bytes",
        "top-1, %",
        AGREEING,
        *(["one image, ms"] if "1" in batches else []),
        *images,
        *ratio,
    )


def rows(result: Result) -> list[tuple[str, ...]]:
    """One line of texts under `columns(result)` for each contender of a net that was measured in PyTorch too."""
    baselines = {row["net"]: row for row in result["contenders"] if row["runtime"] == PYTORCH}
    lines = []
    for row in result["contenders"]:
        if (baseline := baselines.get(float_twin(row["net"]))) is None:
            continue
        times = row["milliseconds"]
        one = [f"{times['1']:.2f}"] if "1" in times else []
        images = [f"{images_per_second(row, batch):,.0f}" for batch in times if batch != "1"]
        comparable = _COMPARED in times and row.get("measured") == baseline.get("measured")
        faster = images_per_second(row, _COMPARED) / images_per_second(baseline, _COMPARED) if comparable else 0
        ratio = [f"{faster:.2f}" if faster else ""] if _COMPARED in times else []
        accuracy = f"{100 * row['correct'] / row['total']:.2f}"
        counts = f"{row['bytes']:,}", accuracy, f"{row['agreeing']:,}"
        lines.append((row["net"], row["runtime"], *counts, *one, *images, *ratio))
    return lines


def choice_columns(result: Result) -> tuple[str, ...]:
    """The names of the columns of the table that users choose from."""
    batches = list(result["contenders"][0]["milliseconds"])
    times = [*(["one image, ms"] if "1" in batches else []), *(f"images/s, batch {n}" for n in batches if n != "1")]
    memory = [f"RAM, MiB, batch {n}" for n in MEMORY_BATCHES]
    ratio = f"speed / {OPENVINO_INT8}, batch {', '.join(batches)}"
    return ("net", "runtime", "top-1, %", "file bytes", "MMACs", *times, *memory, ratio)


def choice_rows(result: Result) -> list[tuple[str, ...]]:
    """One line of texts under `choice_columns(result)` for each net and each of the runtimes `CHOICES`."""
    contenders, lines = result["contenders"], []
    rivals = {row["net"]: row for row in contenders if row["runtime"] == OPENVINO_INT8}
    for row in contenders:
        if row["runtime"] not in CHOICES:
            continue
        net, times, memory = row["net"], row["milliseconds"], row.get("memory") or {}
        twin = rivals.get(float_twin(net))
        rival = twin["milliseconds"] if twin and twin.get("measured") == row.get("measured") else None
        one = [f"{times['1']:.2f}"] if "1" in times else []
        images = [f"{images_per_second(row, batch):,.0f}" for batch in times if batch != "1"]
        used = [f"{memory[str(n)]:.0f}" if str(n) in memory else "" for n in MEMORY_BATCHES]
        ratio = "" if rival is None else ", ".join(f"{rival[batch] / times[batch]:.2f}" for batch in times)
        accuracy, macs = f"{100 * row['correct'] / row['total']:.2f}", result["macs"][net] / 1e6
        lines.append((net, row["runtime"], accuracy, f"{row['bytes']:,}", f"{macs:.1f}", *one, *images, *used, ratio))
    return lines


def float_twin(net: str) -> str:
    """The float net of the same graph: `cnv` of `quant_cnv_w4a4`; a float net itself."""
    return re.sub(r"^quant_(.+)_w\da\d$", r"\1", net)


def images_per_second(row: dict[str, Any], batch: str) -> float:
    return 1000 * int(batch) / row["milliseconds"][batch]


def machine_text(result: Result) -> str:
    """The machine and the versions of the packages."""
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    return f"{shared.machine_in_words(result['machine'])}; {versions}"


def print_table(console: Console, result: Result) -> None:
    shared.print_table(console, f"Inference: {machine_text(result)}", columns(result), rows(result), left=2)


def section(result: Result) -> str:
    """The part of the page about inference."""
    runtimes = {row["runtime"] for row in result["contenders"]}
    total = result["contenders"][0]["total"]
    choices = shared.without_empty(choice_columns(result), choice_rows(result))
    ratio = f"""
- *{_RATIO}*: images a second at this batch size, divided by those of the float net of the same
  graph in PyTorch, in float32 and without channels_last."""
    fastest = f"""
- *{FASTEST}*: the QDQ graph as `cnvzoo.deploy.load(path)` runs it: one image in ONNX Runtime, 16 or more in OpenVINO
  where it is installed and the CPU has VNNI or is not x86."""
    memory = """
- *RAM*: how much the resident memory of a process grows at its peak (VmHWM of Linux) while it loads the file and runs
  so many images at a time, above what it was with the runtime imported."""
    nncf = f"""
- *{OPENVINO_INT8}*: OpenVINO's own quantization of the float net without training (`nncf.quantize`), calibrated on the
  same images, with the options that its documentation recommends for nets with ReLU: the preset PERFORMANCE, which is
  symmetric, and fast bias correction; its bytes are those of the two files of OpenVINO's own format."""
    return f"""## Inference

Trained nets on CIFAR-10 images. The runtimes of one measurement share a process and take turns with the same number of
threads; a figure is the median over the runs of all turns. There is no ratio between nets that were measured at
different times. `python benchmarks/speed/infer.py --keep` measures again and writes this part;
[infer.json](infer.json) has the times, and the sha256 of the checkpoints that were measured.

### Accuracy, size and speed

{shared.markdown(*choices, left=2)}

- *{ONNXRUNTIME_INT8}* and *{OPENVINO_INT8}* are the runtimes' own quantization of the float net; *{OURS}* is
  the integer graph.{fastest if FASTEST in runtimes else ""}
- *top-1*: of that very file in that runtime, on all {total:,} test images.
- *MMACs*: million multiply-accumulates for one image, as in `cnvzoo.model_info`.{
        memory if any(row.get("memory") for row in result["contenders"]) else ""
    }
- *speed / {OPENVINO_INT8}*: how many times as fast as the float net of the same graph after OpenVINO's quantization.

### Other ways to run them

{shared.markdown(columns(result), rows(result), left=2)}

Machine: {machine_text(result)}.

- *file bytes*: of the ONNX file, or of the published `model.safetensors` where PyTorch runs it.
- *{AGREEING}*: how many of the {total:,} test images get the class that they have in PyTorch.{
        ratio if _RATIO in columns(result) else ""
    }
- *PyTorch*: in inference mode; *static PTQ int8*: ONNX Runtime's own quantization of the float net without training,
  per channel, calibrated on {CALIBRATION_IMAGES} training images; *QCDQ*: Brevitas' export for runtimes.{
        nncf if OPENVINO_INT8 in runtimes else ""
    }
- *ours*: the integer graph, `cnvzoo.export(model, path)`, and the QDQ graph, with `format="qdq"`. They take 8-bit
  pixels as they are; the time that the others need to make float images of these is not counted. OpenVINO 2026.4.1 does
  not read the integer graph: it takes the scales of a QLinearConv, one for each output channel, for those of the input
  channels. Its `read_model` raises an error for the 8-bit graph and ends the process with a segmentation fault for the
  4-bit and the 2-bit one.

![Images a second and the time of one image, for every net and runtime](infer.svg)
"""


def plot(result: Result, path: Path) -> None:
    """Bars: images a second at the compared batch size, or else the last, and milliseconds of one image if measured."""
    rows = result["contenders"]
    labels = [f"{row['net']}, {row['runtime']}" for row in rows]
    colours = [shared.RED if row["runtime"] in (OURS, *QDQ.values()) else _colour(row) for row in rows]
    batches = [batch for batch in rows[0]["milliseconds"] if batch != "1"]
    panels = []
    if batches:
        batch = _COMPARED if _COMPARED in batches else batches[-1]
        panels.append((f"images a second, batch {batch}", [images_per_second(row, batch) for row in rows], "{:,.0f}"))
    if "1" in rows[0]["milliseconds"]:
        panels.append(("milliseconds for one image", [row["milliseconds"]["1"] for row in rows], "{:.2f}"))
    with shared.figure(path, (10, 0.24 * len(rows) + 1), columns=len(panels)) as axes:
        for panel, (title, values, form) in zip(axes, panels, strict=True):
            bars = panel.barh(range(len(rows)), values, 0.75, color=colours)
            panel.bar_label(bars, [form.format(value) for value in values], fontsize=7, padding=2)
            panel.set_yticks(range(len(rows)), labels if panel is axes[0] else [""] * len(rows), fontsize=7)
            panel.set_title(title, fontsize=9, loc="left")
            panel.invert_yaxis()
            panel.margins(x=0.12)


def _colour(row: dict[str, Any]) -> str:
    return shared.BLUE if row["net"].startswith("quant_") else shared.GREY


REPORT = shared.Report(print_table, section, plot)
