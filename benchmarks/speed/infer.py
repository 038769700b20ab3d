"""Inference speed of trained nets: the files of this library and other runtimes, measured in turns.

    python benchmarks/speed/infer.py                                    all of it, about ten minutes on 2 cores
    python benchmarks/speed/infer.py cnv.cifar10 --batches 1 64         some
    python benchmarks/speed/infer.py --keep                             and replace the figures, page and plot here
    python benchmarks/speed/infer.py quant_cnv_w4a4.cifar10 --keep      those of this net, if the others' are of the
                                                                        same machine and versions

The published float CNV in PyTorch (contiguous; channels_last in float32, bfloat16 and compiled), in ONNX Runtime and in
OpenVINO (float32, and int8 after the quantization without training that comes with each), and the published quantized
ones as Brevitas' layers, as Brevitas' QCDQ export in ONNX Runtime and in OpenVINO, and as this library's files: the
integer graph in ONNX Runtime and the QDQ graph in both. Of other nets, the files alone. All are in one process, with
the same number of threads, and take turns; a figure is the median over the runs of all turns. Figures of nets that were
measured at another time are not divided by one another. Half of the time goes
into turns, the rest into building every contender, scoring it on the whole test set and measuring its memory. Making
float images of 8-bit ones, which all but this library's files need, is left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import shared
import torch
from contenders import (
    BREVITAS,
    CALIBRATION_IMAGES,
    COMPILED,
    ONNXRUNTIME_FLOAT,
    OPENVINO_FLOAT,
    OURS,
    PYTORCH,
    PYTORCH_CHANNELS_LAST,
    QDQ,
    Contender,
    Images,
    eager,
    float_contenders,
    float_files,
    our_files,
    quantized_contenders,
)
from infer_page import REPORT
from memory import MEMORY_BATCHES, peak_growth
from numpy.typing import NDArray
from rich.console import Console

import cnvzoo
from cnvzoo.checkpoints.format import WEIGHTS
from cnvzoo.checkpoints.index import PublishedCheckpoint
from cnvzoo.checkpoints.locations import find_checkpoint
from cnvzoo.data import Dataset, load_dataset
from cnvzoo.errors import CnvzooError, in_a_line
from cnvzoo.files import sha256_of
from cnvzoo.progress import progress_console

FLOAT = "cnv.cifar10"
_BITS = (8, 4, 2)
QUANTIZED = tuple(f"quant_cnv_w{bits}a{bits}.cifar10" for bits in _BITS)
# of these the files alone are measured, not the nets in PyTorch or Brevitas
FILES_ALONE = tuple(
    f"{name}.cifar10"
    for net in ("resnet20", "mobilenet_v1")
    for name in (net, *(f"quant_{net}_w{bits}a{bits}" for bits in _BITS))
)
CHECKPOINTS = (FLOAT, *QUANTIZED, *FILES_ALONE)
REQUIRED = (FLOAT, *QUANTIZED)  # their figures must be those of the published checkpoints
BATCHES = (1, 64, 256)
_REST_SECONDS = 0.05  # for the threads of the previous runtime to stop polling for work
_WARM_UP_SECONDS = 0.1
_SCORED_AT_ONCE = 250  # images
PACKAGES = ("torch", "brevitas", "onnxruntime", "openvino", "nncf")
TOLERATED_IMAGES = 5  # float32 sums in another order move a few images of 10,000 to another class
# These compute the same as the published file, in float32 or in exact integers: their accuracy is the published one.
SAME_AS_PUBLISHED = (
    PYTORCH, PYTORCH_CHANNELS_LAST, COMPILED, BREVITAS, OURS, *QDQ.values(), ONNXRUNTIME_FLOAT, OPENVINO_FLOAT
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = shared.parse(parser, argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if unknown := [name for name in arguments.checkpoints if name not in CHECKPOINTS]:
        parser.error(f"{unknown[0]} is not among those measured: {', '.join(CHECKPOINTS)}")
    try:
        others = shared.kept("infer") if arguments.checkpoints and arguments.keep else None
        if others is not None and (problem := _not_comparable(others, arguments.batches)):
            parser.error(f"the figures of the other nets {problem}: name no net, which measures all again")
        data = load_dataset("cifar10", root=arguments.data_root)
        names = arguments.checkpoints or CHECKPOINTS
        result = measure(names, arguments.batches, data, turns=arguments.turns, seconds=arguments.seconds)
        shared.deliver(arguments, "infer", REPORT, result if others is None else merged(others, result))
    except (CnvzooError, OSError) as error:
        print(f"infer.py: error: {in_a_line(error)}", file=sys.stderr)
        return 1
    return 0


def measure(
    names: Sequence[str], batches: Sequence[int], data: Dataset, *, turns: int, seconds: float
) -> dict[str, Any]:
    """Milliseconds of every contender at every batch size, with its bytes, memory and accuracy.

    Args:
        names: checkpoints, of CHECKPOINTS; one that is not published is left out, with a line on stderr.
        batches: images at a time.
        data: CIFAR-10; calibration images are of its training set.
        turns: of each contender at each batch size.
        seconds: of a turn, which is one run at least.

    Returns:
        {"machine", "versions", "checkpoints": {name: {"model.safetensors": sha256}}, "macs": {net: of one image},
        "contenders": [{"runtime", "net", "bytes", "correct", "agreeing", "total", "memory": {batch: MiB} or None,
        "measured": time in UTC, "milliseconds": {batch: median}, "spread": {batch: [least, most]}}]}; "agreeing" is the
        number of test images with the class that the net has in PyTorch, and figures of one time may be compared.

    Raises:
        CnvzooError: none of the nets is published, a checkpoint is damaged, or a batch is larger than the test set.
    """
    if max(batches) > len(data.test_images):
        raise CnvzooError(f"--batches {max(batches)}: there are {len(data.test_images):,} test images: give fewer")
    progress = progress_console()
    images = np.ascontiguousarray(data.test_images.permute(0, 3, 1, 2).numpy())
    measured_at = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory() as folder:
        contenders = list(_contenders(names, data, Path(folder), progress))
        if not contenders:
            raise CnvzooError(f"none of {', '.join(names)} is published")
        measured = dict.fromkeys(f"{contender.net}.cifar10" for contender in contenders)
        sha256 = {name: {WEIGHTS: sha256_of(find_checkpoint(name).folder / WEIGHTS)} for name in measured}
        rows, in_pytorch = [], {}
        for contender in contenders:
            net, classes = contender.net, _classes(contender, images)
            if net not in in_pytorch:
                first = contender.runtime in (PYTORCH, BREVITAS)
                in_pytorch[net] = classes if first else _classes(eager(f"{net}.cifar10"), images)
            correct = int((classes == data.test_labels.numpy()).sum())
            agreeing = int((classes == in_pytorch[net]).sum())
            found = {"runtime": contender.runtime, "net": net, "bytes": contender.bytes, "correct": correct}
            found |= {"agreeing": agreeing, "total": len(images), "memory": _memory(contender), "measured": measured_at}
            rows.append({**found, "milliseconds": {}, "spread": {}})
            line = f"{net}, {contender.runtime}: {correct:,} of {len(images):,} correct, {agreeing:,} as in PyTorch"
            progress.print(line, soft_wrap=True)
        for number, batch in enumerate(batches):
            left = turns * (_REST_SECONDS + _WARM_UP_SECONDS + seconds) * len(contenders) * (len(batches) - number)
            progress.print(f"batch {batch}: {left / 60:.1f} min left or more", soft_wrap=True)
            for row, times in zip(rows, _take_turns(contenders, images[:batch], turns, seconds), strict=True):
                row["milliseconds"][str(batch)] = round(statistics.median(times), 4)
                row["spread"][str(batch)] = [round(min(times), 4), round(max(times), 4)]
    return {
        "machine": shared.describe_machine(torch.device("cpu")),
        "versions": shared.versions(*PACKAGES),
        "checkpoints": sha256,
        "macs": {row["name"].split(".")[0]: row["macs"] for row in cnvzoo.list_checkpoints() if row["name"] in sha256},
        "contenders": rows,
    }


def _contenders(names: Sequence[str], data: Dataset, folder: Path, progress: Console) -> Iterator[Contender]:
    def say(line: str) -> None:
        progress.print(line, soft_wrap=True)

    calibration = np.ascontiguousarray(data.train_images[:CALIBRATION_IMAGES].permute(0, 3, 1, 2).numpy())
    threads = torch.get_num_threads()
    published = {row["name"] for row in cnvzoo.list_checkpoints()}
    for name in names:
        if name not in published:
            say(f"{name} is not published yet: left out")
        elif name == FLOAT:
            yield from float_contenders(name, calibration, threads, folder, say)
        elif name in QUANTIZED:
            yield from quantized_contenders(name, threads, folder)
        elif name.startswith("quant_"):
            yield from our_files(name, threads, folder)
        else:
            yield from float_files(name, calibration, threads, folder, say)


def _not_comparable(kept: Mapping[str, Any], batches: Sequence[int]) -> str | None:
    """Why figures measured now cannot stand beside those that are kept; None if they can."""
    machine, versions = shared.describe_machine(torch.device("cpu")), shared.versions(*PACKAGES)
    if any(kept["machine"].get(key) != value for key, value in machine.items() if key != "torch"):  # a package, below
        return f"are of {shared.machine_in_words(kept['machine'])}, and this is {shared.machine_in_words(machine)}"
    if kept["versions"] != versions:
        return "are of other versions of " + ", ".join(
            p for p in PACKAGES if kept["versions"].get(p) != versions.get(p)
        )
    measured = list(kept["contenders"][0]["milliseconds"])
    if measured != [str(batch) for batch in batches]:
        return f"are of batches of {', '.join(measured)} images"
    return None


def merged(kept: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that are kept, with those of `result` in the place of the same nets', in the order of CHECKPOINTS."""
    rows = [row for row in kept["contenders"] if f"{row['net']}.cifar10" not in result["checkpoints"]]
    rows += result["contenders"]
    checkpoints = {**kept["checkpoints"], **result["checkpoints"]}
    return {
        **result,
        "checkpoints": {name: checkpoints[name] for name in CHECKPOINTS if name in checkpoints},
        "macs": dict(sorted({**kept["macs"], **result["macs"]}.items())),
        "contenders": sorted(rows, key=lambda row: CHECKPOINTS.index(f"{row['net']}.cifar10")),
    }


def _memory(contender: Contender) -> dict[str, float] | None:
    """MiB by batch size; None for a contender without a file, or where the system does not tell."""
    if contender.file is None:
        return None
    path, loader = contender.file
    grown = {str(n): peak_growth(loader, path, n, torch.get_num_threads()) for n in MEMORY_BATCHES}
    return {n: round(mib, 1) for n, mib in grown.items() if mib is not None} or None


def _classes(contender: Contender, images: Images) -> NDArray[np.intp]:
    """The class that a contender gives each image."""
    parts = np.split(images, range(_SCORED_AT_ONCE, len(images), _SCORED_AT_ONCE))
    return np.concatenate([contender.run(contender.prepare(part)).argmax(1) for part in parts])


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
    parser = shared.make_parser("infer.py", __doc__)
    add, positive = parser.add_argument, shared.positive
    add("checkpoints", nargs="*", metavar="CHECKPOINT", help="names such as cnv.cifar10 (default: all)")
    batches = " ".join(map(str, BATCHES))
    add("--batches", nargs="+", type=positive(int), default=list(BATCHES), metavar="N", help=f"images ({batches})")
    add("--threads", type=positive(int), metavar="N", help="of every runtime (default: one for each core)")
    shared.add_shared(parser, turns=5, seconds=0.3, of="each runtime and net at each batch size")
    return parser


def outdated_inference(
    infer: Mapping[str, Any], checkpoints: Sequence[str], index: Mapping[str, PublishedCheckpoint]
) -> list[str]:
    """A line for each figure in infer.json that is not of the published checkpoints.

    Args:
        infer: the figures.
        checkpoints: names that must be among them if they are published, such as `cnv.cifar10`; all that were
            measured are checked.
        index: the published checkpoints, by name.
    """
    problems = []
    for name in dict.fromkeys([*checkpoints, *infer.get("checkpoints", {})]):
        if name not in index:
            continue
        entry, rows = index[name], [row for row in infer["contenders"] if f"{row['net']}.cifar10" == name]
        if not rows:
            problems.append(f"{name}: was not measured")
            continue
        measured = infer.get("checkpoints", {}).get(name, {})
        if measured.get(WEIGHTS) != (sha256 := entry.files[WEIGHTS].sha256):
            problems.append(f"{name}: {shared.difference(WEIGHTS, measured, sha256)}")
        runs = [row for row in rows if row["runtime"] in SAME_AS_PUBLISHED]
        if not runs:
            problems.append(f"{name}: no runtime of {', '.join(SAME_AS_PUBLISHED)} was measured")
        for row in runs:
            if row["total"] != entry.total or abs(row["correct"] - entry.correct) > TOLERATED_IMAGES:
                problems.append(
                    f"{name}, {row['runtime']}: {row['correct']:,} of {row['total']:,} images are correct, published "
                    f"are {entry.correct:,} of {entry.total:,} (at most {TOLERATED_IMAGES} images may differ)"
                )
    return [f"infer.json: {problem}: run python benchmarks/speed/infer.py --keep" for problem in problems]


if __name__ == "__main__":
    sys.exit(main())
