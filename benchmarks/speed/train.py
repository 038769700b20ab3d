"""What a training step costs: this library beside what tutorials do, taking turns.

    python benchmarks/speed/train.py                                  all nets on this machine, about ten minutes
    python benchmarks/speed/train.py --models cnv quant_cnv_w4a4      some
    python benchmarks/speed/train.py --keep                           and replace the figures and plot of this folder

Three ways to train a net on CIFAR-10 images, crop and flip included, with Nesterov SGD at the batch size of its recipe:

textbook        torchvision transforms on PIL images in a DataLoader with workers, float32, contiguous tensors, plain
                layers of torch.nn and Brevitas
tuned textbook  the same with bfloat16 autocast and channels_last
ours            the trainer of this library, as reproduce.py runs it

Each way is a process of its own and takes turns of a few seconds with the others, and so do a quantized net's float
twin, the parts of images that a recipe's early epochs show, and a large bfloat16 matrix product, so that all see the
same machine; a figure is the median over the turns. The operations of a step are counted as six for each
multiply-accumulate of its forward pass, and put beside those of the matrix product.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import page
import torch
import train_report
from machine import describe, matmul_rate
from rich.console import Console
from train_report import EARLY_CROPS, FLOAT_TWIN
from ways import WAYS, Way

import cnvzoo
from cnvzoo.data import Dataset, load_dataset
from cnvzoo.errors import CnvzooError
from cnvzoo.files import write_text
from cnvzoo.models import model_spec
from cnvzoo.train import Recipe, load_recipe, resolve_device

_CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MODELS = ("resnet20", "resnet56", "cnv", "quant_cnv_w8a8", "quant_cnv_w4a4", "quant_cnv_w2a2", "mobilenet_v1")
_MATMUL = "matmul"
_REST_SECONDS = 0.7  # in which loaders that have had their turn fill their queues


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        result = measure(
            arguments.models,
            resolve_device(arguments.device),
            load_dataset("cifar10", root=arguments.data_root),
            turns=arguments.turns,
            seconds=arguments.seconds,
        )
    except CnvzooError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    train_report.print_table(Console(), result)
    if arguments.json:
        write_text(arguments.json, json.dumps(result, indent=1) + "\n")
    if arguments.keep:
        train_report.keep(result)
        page.update()
    return 0


def measure(models: list[str], device: torch.device, data: Dataset, *, turns: int, seconds: float) -> dict[str, Any]:
    """Images a second of every way to train every net: {"machine", "matmul_peak", "models": {name: {...}}}."""
    progress = Console(stderr=True, highlight=False)
    figures, peaks, began = {}, [], time.monotonic()
    for number, name in enumerate(models):
        recipe = _recipe(name)
        with ExitStack() as stack:
            ways = {way: stack.enter_context(Way(way, recipe, device, data)) for way in WAYS}
            if twin := model_spec(recipe.model).float_twin:
                ways[FLOAT_TWIN] = stack.enter_context(Way("ours", _recipe(twin), device, data))
            if (cropped := _recipe(name, whole=False)).early_crops:
                ways[EARLY_CROPS] = stack.enter_context(Way("ours", cropped, device, data))
            rates = _take_turns(ways, device, turns, seconds)
        peaks += (matmul := rates.pop(_MATMUL))
        info = cnvzoo.model_info(recipe.model, w_bits=recipe.w_bits, a_bits=recipe.a_bits)
        share = 6 * info.macs * statistics.median(rates["ours"]) / statistics.median(matmul)
        figures[name] = {
            "batch_size": recipe.batch_size,
            "images_per_second": {way: round(statistics.median(r), 1) for way, r in rates.items()},
            "spread": {way: [round(min(r), 1), round(max(r), 1)] for way, r in rates.items()},
            "share_of_matmul_peak": round(share, 4),
        }
        left = (time.monotonic() - began) / (number + 1) * (len(models) - number - 1)
        progress.print(f"{name}: {figures[name]['images_per_second']}, {left / 60:.1f} min left", soft_wrap=True)
    return {"machine": describe(device), "matmul_peak": round(statistics.median(peaks)), "models": figures}


def _recipe(name: str, *, whole: bool = True) -> Recipe:
    """The recipe of the CIFAR-10 table, with the optimizer and augmentation of all ways, and whole images or, if it has
    early crops, these for as long as it lasts."""
    recipe = load_recipe(_CONFIGS / f"cifar10_{name}.yaml")
    changes = {"optimizer": {"lr": 0.01}, "augmentation": {"crop_padding": 4, "flip": True}, "epochs": 10**6}
    alone = dict.fromkeys(("float_start", "float_start_sha256", "teacher", "teacher_sha256"))
    plain = {"ema": None, "label_smoothing": 0.0, "distillation": {}, **alone}
    crops = None
    if recipe.early_crops and not whole:
        crops = {"side": recipe.early_crops.side, "epochs": changes["epochs"] - 1}
    return Recipe.model_validate(recipe.model_dump() | changes | plain | {"early_crops": crops})


def _take_turns(ways: dict[str, Way], device: torch.device, turns: int, seconds: float) -> dict[str, list[float]]:
    """What each way came to in each turn, in images a second, and a matrix product, in operations a second."""
    for way in ways.values():
        way.wait()
    rates: dict[str, list[float]] = {name: [] for name in (*ways, _MATMUL)}
    for _ in range(turns):
        for name, way in ways.items():
            time.sleep(_REST_SECONDS)
            rates[name].append(way.take_turn(seconds))
        rates[_MATMUL].append(matmul_rate(device))
    return rates


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=f"of {', '.join(MODELS)}")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is cuda where there is one")
    add("--turns", type=int, default=5, help="turns of each way (default: 5)")
    add("--seconds", type=float, default=2.0, help="length of a turn (default: 2)")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    add("--keep", action="store_true", help="write them, a page and a plot beside this file")
    add("--data-root", type=Path, metavar="DIR", help="where datasets are cached")
    return parser


if __name__ == "__main__":
    sys.exit(main())
