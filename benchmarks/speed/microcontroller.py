"""What the C source of the published quantized networks takes: flash, RAM and instructions on a Cortex-M4, and time.

    python benchmarks/speed/microcontroller.py                all of them, some minutes
    python benchmarks/speed/microcontroller.py --keep         and replace the figures here and the table in docs/
    python benchmarks/speed/microcontroller.py NAME --keep    those of one checkpoint, measured with the same compilers

Each network is exported, compiled and run with the Makefile of examples/microcontroller: for a Cortex-M4 in QEMU, which
counts the instructions of an image, and on this computer, where it takes turns with ONNX Runtime on one thread. The
scores of 1,000 test images on this computer, and of the images on the Cortex-M4, are compared with ONNX Runtime's.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import shared
import torch
from numpy.typing import NDArray

import cnvzoo
import cnvzoo.deploy
from cnvzoo.checkpoints.format import WEIGHTS
from cnvzoo.errors import CnvzooError, in_a_line
from cnvzoo.files import sha256_of, write_text
from cnvzoo.training.device import describe_device

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EXAMPLE, PAGE = ROOT / "examples" / "microcontroller", ROOT / "docs" / "microcontrollers.md"
START, END = "<!-- begin: benchmarks/speed/microcontroller.py -->", "<!-- end -->"
TOOLS = ("gcc", "make", "arm-none-eabi-gcc", "qemu-system-arm")
COMPARED, EMULATED = 1000, 2  # images
SECONDS = 4.0  # of turns, for each network


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", help="names of published checkpoints (default: all quantized ones)")
    parser.add_argument("--keep", action="store_true", help="write the figures here, and the table to the page")
    arguments = parser.parse_args(argv)
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        parser.error(f"not installed: {', '.join(missing)}")
    compilers = [_output(compiler, "--version").splitlines()[0] for compiler in ("gcc", "arm-none-eabi-gcc")]
    others: list[dict[str, Any]] = []
    result = {"compilers": compilers, "networks": []}
    try:
        if arguments.checkpoints and arguments.keep:
            kept = shared.kept("microcontroller")
            if kept["compilers"] != compilers:
                parser.error(f"the figures of the others were measured with {', '.join(kept['compilers'])}: name none")
            others = kept["networks"]
        names = arguments.checkpoints or published()
        if not names:
            raise CnvzooError(f"{ROOT / 'hub'}: no quantized checkpoints in it: restore it from version control")
        for name in names:
            result["networks"].append(measured(name))
            print(json.dumps(result["networks"][-1]), flush=True)
        if arguments.keep:
            keep(result, others)
        print(table(result))
    except (CnvzooError, OSError) as error:
        print(f"microcontroller.py: error: {in_a_line(error)}", file=sys.stderr)
        return 1
    return 0


def keep(result: dict[str, Any], others: list[dict[str, Any]]) -> None:
    """Write the figures, with those of the other networks that are still published, and the table of the page.

    Raises:
        CnvzooError: the page has no place for the table; nothing was written.
    """
    page = PAGE.read_text(encoding="utf-8")
    before, start, rest = page.partition(START)
    if not start or END not in rest:
        raise CnvzooError(f"{PAGE}: no {START} with {END} after it: restore it from version control")
    networks = {network["name"]: network for network in (*others, *result["networks"])}
    whole = result | {"networks": [networks[name] for name in published() if name in networks]}
    write_text(HERE / "microcontroller.json", json.dumps(whole, indent=1) + "\n")
    write_text(PAGE, f"{before}{START}\n\n{table(whole)}\n{END}{rest.partition(END)[2]}")


def published() -> list[str]:
    """The names of all quantized checkpoints."""
    return sorted(path.name for path in (ROOT / "hub").glob("quant_*"))


def _output(*command: str, folder: Path | None = None) -> str:
    """What a program prints; CnvzooError, with its last line, if it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        last = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), "it printed nothing")
        remedy = "; apt install libnewlib-arm-none-eabi has the C library of arm-none-eabi-gcc"
        raise CnvzooError(f"{' '.join(command)} failed: {last}{remedy if '.h: No such file' in done.stderr else ''}")
    return done.stdout


def measured(name: str) -> dict[str, Any]:
    """The figures of one network."""
    checkpoint = ROOT / "hub" / name
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        facts = cnvzoo.export(checkpoint, here / "net.c", format="c")
        cnvzoo.export(checkpoint, here / "net.onnx")
        images = test_images(str(facts.dataset))
        runner = cnvzoo.deploy.load(here / "net.onnx", threads=1)
        expected = runner.accumulators(images)
        images[:EMULATED].tofile(here / "images.bin")
        run = library(here, facts.in_chans * facts.size**2, len(facts.classes))
        differing = sum(not np.array_equal(run(image), scores) for image, scores in zip(images, expected, strict=True))
        times = in_turns(runner, run, images)
        target = ("-mcpu=cortex-m4", "-mthumb", "-O3")
        _output("arm-none-eabi-gcc", *target, "-fstack-usage", "-Werror", "-c", "net.c", "-o", "stack.o", folder=here)
        usage = sum(int(line.split()[1]) for line in (here / "stack.su").read_text().splitlines())
        make = ("make", "-s", "-C", str(EXAMPLE), f"DIR={here}")
        text, data, bss = map(int, _output(*make, "size").splitlines()[1].split()[:3])
        lines = re.findall(r"^.*: (.*); (\d+) instructions$", _output(*make, "emulate"), re.MULTILINE)
        if [list(map(int, scores.split())) for scores, _ in lines] != expected[:EMULATED].tolist():
            raise CnvzooError(f"{name}: the emulated processor gives other scores than ONNX Runtime")
        return {
            "name": name, "sha256": sha256_of(checkpoint / WEIGHTS),
            "flash": text + data, "ram": data + bss, "stack": usage,
            "instructions": max(int(count) for _, count in lines), "compared": len(images), "differing": differing,
            "processor": describe_device(torch.device("cpu"))["name"],
            "milliseconds": round(times[1], 3), "onnxruntime_milliseconds": round(times[0], 3),
        }  # fmt: skip


def test_images(dataset: str) -> NDArray[np.uint8]:
    """The first test images, [N, C, 32, 32]."""
    found = cnvzoo.load_dataset(dataset).test_images[:COMPARED].numpy()
    margin = (32 - found.shape[1]) // 2
    padded = np.pad(found, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    return np.ascontiguousarray(padded.transpose(0, 3, 1, 2))


def library(folder: Path, size: int, classes: int) -> Any:
    """A function from an image to its scores, compiled for this computer."""
    flags = ("-std=c99", "-O3", "-march=native", "-shared", "-fPIC")
    _output("gcc", *flags, "-o", "net.so", "net.c", folder=folder)
    function = ctypes.CDLL(str(folder / "net.so")).net_run
    scores = np.zeros(classes, np.int32)

    def run(image: NDArray[np.uint8]) -> NDArray[np.int32]:
        assert image.nbytes == size
        function(ctypes.c_void_p(image.ctypes.data), ctypes.c_void_p(scores.ctypes.data))
        return scores

    return run


def in_turns(runner: cnvzoo.deploy.DeployedModel, run: Any, images: NDArray[np.uint8]) -> list[float]:
    """Milliseconds of one image in ONNX Runtime and in C: the smallest of turns that alternate."""
    best, end = [float("inf")] * 2, time.perf_counter() + SECONDS
    image = images[:1]
    contenders = (lambda: runner.accumulators(image), lambda: run(image))
    while time.perf_counter() < end:
        for i, contender in enumerate(contenders):
            for _ in range(20):
                start = time.perf_counter()
                contender()
                best[i] = min(best[i], (time.perf_counter() - start) * 1000)
    return best


def table(result: dict[str, Any]) -> str:
    """The section of the page."""
    lines = [
        "| checkpoint | flash, bytes | RAM, bytes | stack, at most | instructions of an image | one image on a PC, ms "
        "| ONNX Runtime, ms | the PC's processor |",
        "| --- | --: | --: | --: | --: | --: | --: | --- |",
    ]
    for n in result["networks"]:
        figures = (f"{n[key]:,}" for key in ("flash", "ram", "stack", "instructions"))
        times = f"{n['milliseconds']:.2f} | {n['onnxruntime_milliseconds']:.2f}"
        lines.append(f"| {n['name']} | {' | '.join(figures)} | {times} | {n.get('processor', 'not recorded')} |")
    compared = {n["compared"] for n in result["networks"]}
    differing = sum(n["differing"] for n in result["networks"])
    lines += ["", f"Of {min(compared):,} test images of each, {differing} have other scores than in ONNX Runtime."]
    lines.append(f"Compilers: {', '.join(result['compilers'])}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
