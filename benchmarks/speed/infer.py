"""What running a trained CNV costs: the integer graph of this library beside what else there is, in turns.

    python benchmarks/speed/infer.py                                  on this machine, about five minutes
    python benchmarks/speed/infer.py --bits 4 --batches 1 64          some
    python benchmarks/speed/infer.py --keep                           and replace the figures and plot of this folder

The published float CNV in PyTorch (as it comes; channels_last in float32, bfloat16 and compiled) and in ONNX Runtime
(float32, and int8 by its static quantization without training), and the published quantized ones as Brevitas' layers,
as Brevitas' QCDQ export in ONNX Runtime and in OpenVINO, and as the integer graph in ONNX Runtime. All are in one
process, with the same number of threads, and take turns; a figure is the median over the runs of all turns. Making
float images of 8-bit ones, which all but the integer graph need, is left out. Accuracy is that of each on the whole
test set.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import infer_report
import numpy as np
import page
import torch
from contenders import Contender, Images, float_contenders, quantized_contenders
from machine import describe
from rich.console import Console

import cnvzoo
from cnvzoo.data import Dataset, load_dataset
from cnvzoo.errors import CnvzooError
from cnvzoo.files import write_text

FLOAT = "cnv.cifar10"
BITS = (8, 4, 2)
BATCHES = (1, 64, 256)
_REST_SECONDS = 0.05  # in which the runtime that had its turn stops spinning
_WARM_UP_RUNS = 3
_SCORED_AT_ONCE = 250


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        result = measure(
            arguments.bits,
            arguments.batches,
            load_dataset("cifar10", root=arguments.data_root),
            turns=arguments.turns,
            seconds=arguments.seconds,
        )
    except CnvzooError as error:
        print(f"infer.py: error: {error}", file=sys.stderr)
        return 1
    infer_report.print_table(Console(), result)
    if arguments.json:
        write_text(arguments.json, json.dumps(result, indent=1) + "\n")
    if arguments.keep:
        infer_report.keep(result)
        page.update()
    return 0


def measure(
    bits: Sequence[int], batches: Sequence[int], data: Dataset, *, turns: int, seconds: float
) -> dict[str, Any]:
    """Milliseconds of every contender at every batch size, with its bytes and accuracy.

    Args:
        bits: widths of the quantized nets, which have to be published; others are said and left out.
        batches: images at a time.
        data: CIFAR-10; calibration images are of its training set.
        turns: of each contender at each batch size.
        seconds: of a turn, which is three runs at least.

    Returns:
        {"machine", "versions", "contenders": [{"runtime", "net", "bytes", "correct", "total", "milliseconds": {batch:
        median}, "spread": {batch: [least, most]}}]}.
    """
    progress = Console(stderr=True, highlight=False)
    images = np.ascontiguousarray(data.test_images.permute(0, 3, 1, 2).numpy())
    with tempfile.TemporaryDirectory() as folder:
        contenders = list(_contenders(bits, data, Path(folder), progress))
        rows = []
        for contender in contenders:
            found = {"runtime": contender.runtime, "net": contender.net, "bytes": contender.bytes}
            correct = _count_correct(contender, images, data.test_labels.numpy())
            rows.append({**found, "correct": correct, "total": len(images), "milliseconds": {}, "spread": {}})
            progress.print(f"{contender.net}, {contender.runtime}: {correct:,} of {len(images):,}", soft_wrap=True)
        for number, batch in enumerate(batches):
            left = turns * seconds * len(contenders) * (len(batches) - number)
            progress.print(f"batch {batch}: about {left / 60:.1f} min left", soft_wrap=True)
            for row, times in zip(rows, _take_turns(contenders, images[:batch], turns, seconds), strict=True):
                row["milliseconds"][str(batch)] = round(statistics.median(times), 4)
                row["spread"][str(batch)] = [round(min(times), 4), round(max(times), 4)]
    return {"machine": describe(torch.device("cpu")), "versions": _versions(), "contenders": rows}


def _contenders(bits: Sequence[int], data: Dataset, folder: Path, progress: Console) -> Iterator[Contender]:
    calibration = np.ascontiguousarray(data.train_images.permute(0, 3, 1, 2).numpy())
    threads = torch.get_num_threads()
    yield from float_contenders(FLOAT, calibration, threads, folder)
    published = {row["name"] for row in cnvzoo.list_checkpoints()}
    for width in bits:
        if (name := f"quant_cnv_w{width}a{width}.cifar10") in published:
            yield from quantized_contenders(name, threads, folder)
        else:
            progress.print(f"{name} is not published yet: left out", soft_wrap=True)


def _count_correct(contender: Contender, images: Images, labels: Any) -> int:
    correct = 0
    for start in range(0, len(images), _SCORED_AT_ONCE):
        found = contender.run(contender.prepare(images[start : start + _SCORED_AT_ONCE]))
        correct += int((found.argmax(1) == labels[start : start + _SCORED_AT_ONCE]).sum())
    return correct


def _take_turns(contenders: Sequence[Contender], images: Images, turns: int, seconds: float) -> list[list[float]]:
    """Milliseconds of each run of each contender."""
    prepared = [contender.prepare(images) for contender in contenders]
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(turns):
        for contender, inputs, taken in zip(contenders, prepared, times, strict=True):
            time.sleep(_REST_SECONDS)
            for _ in range(_WARM_UP_RUNS):
                contender.run(inputs)
            began, runs = time.perf_counter(), 0
            while runs < _WARM_UP_RUNS or time.perf_counter() - began < seconds:
                started = time.perf_counter()
                contender.run(inputs)
                taken.append(1000 * (time.perf_counter() - started))
                runs += 1
    return times


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("torch", "brevitas", "onnxruntime", "openvino"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="infer.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--bits", nargs="+", type=int, choices=BITS, default=list(BITS), metavar="N", help="of 8, 4, 2")
    add("--batches", nargs="+", type=int, default=list(BATCHES), metavar="N", help="images at a time (1 64 256)")
    add("--threads", type=int, metavar="N", help="of every runtime (default: one for each core)")
    add("--turns", type=int, default=7, help="turns of each contender at each batch size (default: 7)")
    add("--seconds", type=float, default=0.4, help="length of a turn (default: 0.4)")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    add("--keep", action="store_true", help="write them, the page and a plot beside this file")
    add("--data-root", type=Path, metavar="DIR", help="where datasets are cached")
    return parser


if __name__ == "__main__":
    sys.exit(main())
