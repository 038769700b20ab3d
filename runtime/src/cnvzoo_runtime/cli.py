"""The command `cnvzoo-run`: classify images with an exported file, or show the metadata in it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import cnvzoo_runtime
from cnvzoo_runtime.errors import CnvzooError, in_a_line, show_every_character


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (default: those of the process); returns the exit status.

    Errors of this package and of the operating system are printed in one line, and the status is 1. A pipe that nothing
    reads any more, as after `| head`, ends the command in silence, with status 1 too.
    """
    show_every_character()
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes the rest at its end, and would print the error that this gives
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CnvzooError, OSError) as error:
        print(f"error: {in_a_line(error)}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cnvzoo-run", description="Run models that cnvzoo exported to ONNX files.")
    parser.add_argument("--version", action="version", version=f"cnvzoo-runtime {cnvzoo_runtime.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    predict = commands.add_parser("predict", help="classify image files", description="Classify image files.")
    predict.add_argument("file", type=Path, metavar="FILE.onnx", help="file that cnvzoo exported")
    predict.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image that Pillow reads, of any size")
    predict.add_argument("--top", type=_count, default=3, metavar="N", help="number of classes to show; default 3")
    predict.add_argument("--json", action="store_true", help="print the predictions of all images as JSON")
    predict.set_defaults(run=_predict)
    info = commands.add_parser("info", help="show the metadata of a file", description="Show the metadata of a file.")
    info.add_argument("file", type=Path, metavar="FILE.onnx", help="file that cnvzoo exported")
    info.add_argument("--json", action="store_true", help="print the metadata as JSON")
    info.set_defaults(run=_info)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of classes, 1 or more")
    return int(text)


def _predict(options: argparse.Namespace) -> None:
    model = cnvzoo_runtime.load(options.file)
    rows = []
    try:
        for path in options.images:
            image = cnvzoo_runtime.read_image(path)
            try:
                predictions = model.predict(image, options.top)
            except cnvzoo_runtime.ImageError as error:
                raise CnvzooError(f"{path}: {error}") from None
            if options.json:
                rows.append({"image": str(path), "predictions": [asdict(p) for p in predictions]})
            else:
                print(f"{path}: " + ", ".join(f"{p.label} {p.probability:.1%}" for p in predictions), flush=True)
    finally:
        if options.json:  # those before an image that cannot be classified, too
            print(json.dumps(rows, indent=1))


def _info(options: argparse.Namespace) -> None:
    metadata = cnvzoo_runtime.read_metadata(options.file)
    if options.json:
        print(metadata.to_json())
        return
    bits = "float" if metadata.w_bits is None else f"{metadata.w_bits} of weights, {metadata.a_bits} of activations"
    channels = {1: "grey", 3: "colour"}[metadata.in_chans]
    for label, value in (
        ("name", metadata.name),
        ("format", metadata.format),
        ("dataset", metadata.dataset or "unknown"),
        ("bits", bits),
        ("input", f"{metadata.size}x{metadata.size} {channels}, images of {metadata.image_size}x{metadata.image_size}"),
        ("classes", f"{len(metadata.classes)}: {', '.join(metadata.classes)}"),
        ("bytes", f"{options.file.expanduser().stat().st_size:,}"),
    ):
        print(f"{label:8} {value}")
