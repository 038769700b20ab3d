"""What a training step costs: this library and PyTorch as in its tutorials, which take turns.

    python benchmarks/speed/train.py                                  all nets, about 14 minutes on 2 cores
    python benchmarks/speed/train.py --models cnv quant_cnv_w4a4      some
    python benchmarks/speed/train.py --keep                           and replace the figures, page and plot here

Three programs train a net on CIFAR-10 images, crop and flip included, with Nesterov SGD at the batch size of the
net's recipe:

baseline        torchvision transforms on PIL images in a DataLoader with workers, float32, contiguous tensors, plain
                layers of torch.nn and Brevitas
tuned baseline  the same with bfloat16 autocast and channels_last
ours            the trainer of this library, as reproduce.py runs it

Each program is a process of its own. The processes take turns of a few seconds, and with them the float twin of a
quantized net, the parts of images that a recipe's early epochs show, and a large bfloat16 matrix product, so that
changes of the machine's speed reach all alike; a figure is the median over the turns. The operations of a step are
counted as six for each multiply-accumulate of its forward pass, and compared with those of the matrix product.
About a quarter of the time goes into starting the processes, where the trainer compiles its loops.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import ExitStack
from typing import Any

import options
import page
import torch
import train_report
from machine import describe, matmul_rate
from rich.console import Console
from train_report import EARLY_CROPS, FLOAT_TWIN
from training_process import OURS, PROGRAMS, TrainingProcess

import cnvzoo
from cnvzoo.data import Dataset, load_dataset
from cnvzoo.errors import CnvzooError
from cnvzoo.models import model_spec
from cnvzoo.training import Recipe, resolve_device

MODELS = ("resnet20", "resnet56", "cnv", "quant_cnv_w8a8", "quant_cnv_w4a4", "quant_cnv_w2a2", "mobilenet_v1")
_MATMUL = "matmul"
_REST_SECONDS = 0.7  # in which loaders that have had their turn fill their queues


def main(argv: list[str] | None = None) -> int:
    arguments = options.parse(_parser(), argv)
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
    options.deliver(arguments, "train", train_report, result)
    return 0


def measure(models: list[str], device: torch.device, data: Dataset, *, turns: int, seconds: float) -> dict[str, Any]:
    """Images a second of every program with every net, and the recipes that these are of.

    Args:
        models: of `MODELS`.
        device: to train on.
        data: CIFAR-10.
        turns: of each process.
        seconds: of a turn, without its first steps, which are not counted.

    Returns:
        {"machine", "matmul_peak": operations a second, "models": {model: {"recipe", "fingerprint", "batch_size",
        "early_crops": side of the parts in pixels or None, "images_per_second": {process: median}, "spread": {process:
        [least, most]}, "share_of_matmul_peak"}}}.

    Raises:
        CnvzooError: a process ended with an error.
    """
    progress = Console(stderr=True, highlight=False)
    figures, peaks, began = {}, [], time.monotonic()
    for number, name in enumerate(models):
        published = page.recipe_of(name)
        recipe = _measured(published)
        with ExitStack() as stack:

            def start(program: str, recipe: Recipe, stack: ExitStack = stack) -> TrainingProcess:
                return stack.enter_context(TrainingProcess(program, recipe, device, data))

            processes = {program: start(program, recipe) for program in PROGRAMS}
            if twin := model_spec(recipe.model).float_twin:
                processes[FLOAT_TWIN] = start(OURS, _measured(page.recipe_of(twin)))
            if crops := published.early_crops:
                processes[EARLY_CROPS] = start(OURS, _measured(published, crops.side))
            rates = _take_turns(processes, device, turns, seconds)
        peaks += (matmul := rates.pop(_MATMUL))
        info = cnvzoo.model_info(recipe.model, w_bits=recipe.w_bits, a_bits=recipe.a_bits)
        share = 6 * info.macs * statistics.median(rates[OURS]) / statistics.median(matmul)
        figures[name] = {
            "recipe": published.name,
            "fingerprint": published.fingerprint(),
            "batch_size": recipe.batch_size,
            "early_crops": crops.side if crops else None,
            "images_per_second": {process: round(statistics.median(r), 1) for process, r in rates.items()},
            "spread": {process: [round(min(r), 1), round(max(r), 1)] for process, r in rates.items()},
            "share_of_matmul_peak": round(share, 4),
        }
        left = (time.monotonic() - began) / (number + 1) * (len(models) - number - 1)
        progress.print(f"{name}: {figures[name]['images_per_second']}, {left / 60:.1f} min left", soft_wrap=True)
    return {"machine": describe(device), "matmul_peak": round(statistics.median(peaks)), "models": figures}


def _measured(published: Recipe, crop_side: int | None = None) -> Recipe:
    """A recipe with the optimizer and augmentation of all programs, without what only some can do; without end, and all
    its epochs but the last with parts of images of `crop_side` pixels, if given."""
    epochs = 10**6
    changes = {"optimizer": {"lr": 0.01}, "augmentation": {"crop_padding": 4, "flip": True}, "epochs": epochs}
    alone = dict.fromkeys(("float_start", "float_start_sha256", "teacher", "teacher_sha256"))
    plain = {"label_smoothing": 0.0, "distillation": {}, **alone}
    crops = {"side": crop_side, "epochs": epochs - 1} if crop_side else None
    return Recipe.model_validate(published.model_dump() | changes | plain | {"early_crops": crops})


def _take_turns(
    processes: dict[str, TrainingProcess], device: torch.device, turns: int, seconds: float
) -> dict[str, list[float]]:
    """The rate of each process in each turn, in images a second, and of a matrix product, in operations a second."""
    for process in processes.values():
        process.wait()
    rates: dict[str, list[float]] = {name: [] for name in (*processes, _MATMUL)}
    for _ in range(turns):
        for name, process in processes.items():
            time.sleep(_REST_SECONDS)
            rates[name].append(process.take_turn(seconds))
        rates[_MATMUL].append(matmul_rate(device))
    return rates


def _parser() -> argparse.ArgumentParser:
    parser = options.parser("train.py", __doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=f"of {', '.join(MODELS)}")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is cuda where there is one")
    options.add_shared(parser, turns=5, seconds=1.0, of="each process")
    return parser


if __name__ == "__main__":
    sys.exit(main())
