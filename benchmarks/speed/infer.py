"""What running a trained CNV costs: the integer graph of this library and other runtimes, which take turns.

    python benchmarks/speed/infer.py                                  all of it, about six minutes on 2 cores
    python benchmarks/speed/infer.py --bits 4 --batches 1 64          some
    python benchmarks/speed/infer.py --keep                           and replace the figures, page and plot here

The published float CNV in PyTorch (contiguous; channels_last in float32, bfloat16 and compiled), in ONNX Runtime and in
OpenVINO (float32, and int8 after the quantization without training that comes with each), and the published quantized
ones as Brevitas' layers, as Brevitas' QCDQ export in ONNX Runtime and in OpenVINO, and as the integer graph in ONNX
Runtime. All are in one process, with the same number of threads, and take turns; a figure is the median over the runs
of all turns. Half of the time goes into turns, the rest into building every contender and scoring it on the whole
test set. Making float images of 8-bit ones, which all but the integer graph need, is left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import infer_report
import numpy as np
import options
import page
import torch
from contenders import CALIBRATION_IMAGES, Contender, Images, float_contenders, quantized_contenders
from machine import describe, versions
from rich.console import Console

import cnvzoo
from cnvzoo.checkpoints.locations import find_checkpoint
from cnvzoo.data import Dataset, load_dataset
from cnvzoo.errors import CnvzooError
from cnvzoo.files import sha256_of

FLOAT = "cnv.cifar10"
QUANTIZED = {bits: f"quant_cnv_w{bits}a{bits}.cifar10" for bits in (8, 4, 2)}
CHECKPOINTS = (FLOAT, *QUANTIZED.values())
BATCHES = (1, 64, 256)
_REST_SECONDS = 0.05  # in which the threads of the runtime that had its turn stop waiting for work
_WARM_UP_SECONDS = 0.1
_SCORED_AT_ONCE = 250  # images


def main(argv: list[str] | None = None) -> int:
    arguments = options.parse(_parser(), argv)
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
    options.deliver(arguments, "infer", infer_report, result)
    return 0


def measure(
    bits: Sequence[int], batches: Sequence[int], data: Dataset, *, turns: int, seconds: float
) -> dict[str, Any]:
    """Milliseconds of every contender at every batch size, with its bytes and accuracy.

    Args:
        bits: widths of the quantized nets; one that is not published is left out, with a line on stderr.
        batches: images at a time.
        data: CIFAR-10; calibration images are of its training set.
        turns: of each contender at each batch size.
        seconds: of a turn, which is one run at least.

    Returns:
        {"machine", "versions", "checkpoints": {name: {"model.safetensors": sha256}}, "contenders": [{"runtime", "net",
        "bytes", "correct", "total", "milliseconds": {batch: median}, "spread": {batch: [least, most]}}]}.

    Raises:
        CnvzooError: the float net is not published, a checkpoint is damaged, or a batch is larger than the test set.
    """
    if max(batches) > len(data.test_images):
        raise CnvzooError(f"--batches {max(batches)}: there are {len(data.test_images):,} test images: give fewer")
    progress = Console(stderr=True, highlight=False)
    images = np.ascontiguousarray(data.test_images.permute(0, 3, 1, 2).numpy())
    with tempfile.TemporaryDirectory() as folder:
        contenders = list(_contenders(bits, data, Path(folder), progress))
        names = dict.fromkeys(f"{contender.net}.cifar10" for contender in contenders)
        sha256 = {name: {page.WEIGHTS: sha256_of(find_checkpoint(name).folder / page.WEIGHTS)} for name in names}
        rows = []
        for contender in contenders:
            found = {"runtime": contender.runtime, "net": contender.net, "bytes": contender.bytes}
            correct = _count_correct(contender, images, data.test_labels.numpy())
            rows.append({**found, "correct": correct, "total": len(images), "milliseconds": {}, "spread": {}})
            progress.print(f"{contender.net}, {contender.runtime}: {correct:,} of {len(images):,}", soft_wrap=True)
        for number, batch in enumerate(batches):
            left = turns * (_REST_SECONDS + _WARM_UP_SECONDS + seconds) * len(contenders) * (len(batches) - number)
            progress.print(f"batch {batch}: {left / 60:.1f} min left or more", soft_wrap=True)
            for row, times in zip(rows, _take_turns(contenders, images[:batch], turns, seconds), strict=True):
                row["milliseconds"][str(batch)] = round(statistics.median(times), 4)
                row["spread"][str(batch)] = [round(min(times), 4), round(max(times), 4)]
    return {
        "machine": describe(torch.device("cpu")),
        "versions": versions("torch", "brevitas", "onnxruntime", "openvino", "nncf"),
        "checkpoints": sha256,
        "contenders": rows,
    }


def _contenders(bits: Sequence[int], data: Dataset, folder: Path, progress: Console) -> Iterator[Contender]:
    def say(line: str) -> None:
        progress.print(line, soft_wrap=True)

    calibration = np.ascontiguousarray(data.train_images[:CALIBRATION_IMAGES].permute(0, 3, 1, 2).numpy())
    threads = torch.get_num_threads()
    yield from float_contenders(FLOAT, calibration, threads, folder, say)
    published = {row["name"] for row in cnvzoo.list_checkpoints()}
    for width in bits:
        if (name := QUANTIZED[width]) in published:
            yield from quantized_contenders(name, threads, folder)
        else:
            say(f"{name} is not published yet: left out")


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
            _run_for(contender, inputs, min(seconds, _WARM_UP_SECONDS))
            taken += _run_for(contender, inputs, seconds)
    return times


def _run_for(contender: Contender, inputs: Any, seconds: float) -> list[float]:
    """Milliseconds of each run in so many seconds, of one run at least."""
    times, began = [], time.perf_counter()
    while not times or time.perf_counter() - began < seconds:
        started = time.perf_counter()
        contender.run(inputs)
        times.append(1000 * (time.perf_counter() - started))
    return times


def _parser() -> argparse.ArgumentParser:
    parser = options.parser("infer.py", __doc__)
    add, positive = parser.add_argument, options.positive
    add("--bits", nargs="+", type=int, choices=QUANTIZED, default=list(QUANTIZED), metavar="N", help="of 8, 4, 2")
    batches = " ".join(map(str, BATCHES))
    add("--batches", nargs="+", type=positive(int), default=list(BATCHES), metavar="N", help=f"images ({batches})")
    add("--threads", type=positive(int), metavar="N", help="of every runtime (default: one for each core)")
    options.add_shared(parser, turns=5, seconds=0.3, of="each runtime and net at each batch size")
    return parser


if __name__ == "__main__":
    sys.exit(main())
