"""Training speed of this library and of PyTorch as in its tutorials, measured in turns.

    python benchmarks/speed/train.py                                  all nets, 15 to 20 minutes on 2 cores
    python benchmarks/speed/train.py --models cnv quant_cnv_w4a4      some
    python benchmarks/speed/train.py --keep                           and replace the figures, page and plot here

Three programs train a net on CIFAR-10 images, crop and flip included, with Nesterov SGD at the batch size of the
net's recipe:

baseline        torchvision transforms on PIL images in a DataLoader with workers, float32, contiguous tensors, plain
                layers of torch.nn and Brevitas
tuned baseline  the same with channels_last, and with bfloat16 autocast except on CPUs without kernels for bfloat16
ours            the trainer of this library

Each program is a process of its own, with PyTorch's default number of threads. The processes take turns of one second
(--seconds), together with the float twin of a quantized net, the early crops of a recipe, and a large matrix product in
the dtype of training, so that changes of the machine's speed affect all of them; a figure is the median over the turns.
The operations of a step are counted as six for each multiply-accumulate of its forward pass, and compared with those of
the matrix product. About a quarter of the time goes into starting the processes, where the trainer compiles its loops.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import shared
import torch
from baseline import BASELINE, OURS, PROGRAMS, TUNED_BASELINE, TrainingProcess
from rich.console import Console

import cnvzoo
from cnvzoo.data import Dataset, load_dataset
from cnvzoo.errors import CnvzooError
from cnvzoo.models import model_spec
from cnvzoo.progress import progress_console
from cnvzoo.training import Recipe, load_recipe, resolve_device

MODELS = ("resnet20", "resnet56", "cnv", "quant_cnv_w8a8", "quant_cnv_w4a4", "quant_cnv_w2a2", "mobilenet_v1")
CONFIGS = shared.HERE.parent / "configs"
FLOAT_TWIN, EARLY_CROPS = "ours, float twin", "ours, early crops"  # measured for some nets only
_MATMUL = "matmul"
_EXPLANATIONS = {
    "baseline": "torchvision transforms on PIL images in a DataLoader with two workers, float32, contiguous tensors, "
    "plain\n  layers of torch.nn and Brevitas, the memory allocator of the C library with its default settings.",
    "tuned baseline": "the same with channels_last, and with bfloat16 autocast except on CPUs without kernels for "
    "bfloat16.",
    "ours": "the trainer of this library.",
    "of matmul": "operations of the step, six for each multiply-accumulate of the forward pass, in percent of those\n  "
    "of a large matrix product in the dtype of training, in the same time on the same machine.",
    "/ float": "time of a quantized step, divided by that of its float twin, which takes turns with it.",
    "early crops": "images a second on the crops of the recipe's early epochs, divided by those on whole images; in "
    "parentheses,\n  the side of the crops in pixels.",
}
_COLUMNS = ("net", "batch", BASELINE, TUNED_BASELINE, OURS, "ours / baseline", "ours / tuned", *list(_EXPLANATIONS)[3:])

Result = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = shared.parse(parser, argv)
    if arguments.keep and {*arguments.models} != {*MODELS}:
        parser.error("--keep replaces the figures of all nets: leave --models out")
    try:
        result = measure(
            arguments.models,
            resolve_device(arguments.device),
            load_dataset("cifar10", root=arguments.data_root),
            turns=arguments.turns,
            seconds=arguments.seconds,
        )
        shared.deliver(arguments, "train", REPORT, result)
    except CnvzooError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    return 0


def measure(
    models: list[str], device: torch.device, data: Dataset, *, turns: int, seconds: float, rest: float = 0.7
) -> dict[str, Any]:
    """Images a second of every program with every net, and the recipes that these are of.

    The fingerprint is of the recipe as it is measured: without its own optimizer, augmentation, start and teachers.

    Args:
        models: of `MODELS`.
        device: to train on.
        data: CIFAR-10.
        turns: of each process.
        seconds: of a turn, without its first steps, which are not counted.
        rest: seconds before each turn, in which the loader of the previous process fills its queue.

    Returns:
        {"machine", "matmul_peak": operations a second, "models": {model: {"recipe", "fingerprint", "batch_size",
        "early_crops": side of the early crops in pixels, or None, "images_per_second": {process: median}, "spread":
        {process: [least, most]}, "share_of_matmul_peak"}}}.

    Raises:
        CnvzooError: a process ended with an error.
    """
    progress = progress_console()
    figures, peaks, began = {}, [], time.monotonic()
    for number, name in enumerate(models):
        published = recipe_of(name)
        recipe = measured_recipe(published)
        with ExitStack() as stack:

            def start(program: str, recipe: Recipe, stack: ExitStack = stack) -> TrainingProcess:
                return stack.enter_context(TrainingProcess(program, recipe, device, data))

            processes = {program: start(program, recipe) for program in PROGRAMS}
            if twin := model_spec(recipe.model).float_twin:
                processes[FLOAT_TWIN] = start(OURS, measured_recipe(recipe_of(twin)))
            if crops := published.early_crops:
                processes[EARLY_CROPS] = start(OURS, measured_recipe(published, crops.side))
            rates = _take_turns(processes, device, turns, seconds, rest)
        peaks += (matmul := rates.pop(_MATMUL))
        info = cnvzoo.model_info(recipe.model, w_bits=recipe.w_bits, a_bits=recipe.a_bits)
        share = 6 * info.macs * statistics.median(rates[OURS]) / statistics.median(matmul)
        figures[name] = {
            "recipe": published.name,
            "fingerprint": recipe.fingerprint(),
            "batch_size": recipe.batch_size,
            "early_crops": crops.side if crops else None,
            "images_per_second": {process: round(statistics.median(r), 1) for process, r in rates.items()},
            "spread": {process: [round(min(r), 1), round(max(r), 1)] for process, r in rates.items()},
            "share_of_matmul_peak": round(share, 4),
        }
        left = (time.monotonic() - began) / (number + 1) * (len(models) - number - 1)
        progress.print(f"{name}: {figures[name]['images_per_second']}, {left / 60:.1f} min left", soft_wrap=True)
    return {
        "machine": shared.describe_machine(device),
        "matmul_peak": round(statistics.median(peaks)),
        "models": figures,
    }


def recipe_of(model: str, configs: Path = CONFIGS) -> Recipe:
    """The recipe of the CIFAR-10 table for a model, such as `quant_cnv_w4a4`."""
    return load_recipe(configs / f"cifar10_{model}.yaml")


def measured_recipe(published: Recipe, crop_side: int | None = None) -> Recipe:
    """The recipe with the optimizer and augmentation of all programs, without what the baseline cannot do, and endless.

    With `crop_side`, all epochs but the last train on square parts of the images with so many pixels a side.
    """
    epochs = 10**6
    changes = {"optimizer": {"lr": 0.01}, "augmentation": {"crop_padding": 4, "flip": True}, "epochs": epochs}
    alone = dict.fromkeys(("float_start", "float_start_sha256", "teacher", "teacher_sha256"))
    plain = {"label_smoothing": 0.0, "distillation": {}, **alone}
    crops = {"side": crop_side, "epochs": epochs - 1} if crop_side else None
    return Recipe.model_validate(published.model_dump() | changes | plain | {"early_crops": crops})


def _take_turns(
    processes: dict[str, TrainingProcess], device: torch.device, turns: int, seconds: float, rest: float
) -> dict[str, list[float]]:
    """The rate of each process in each turn, in images a second, and of a matrix product, in operations a second."""
    for process in processes.values():
        process.wait()
    rates: dict[str, list[float]] = {name: [] for name in (*processes, _MATMUL)}
    for _ in range(turns):
        for name, process in processes.items():
            time.sleep(rest)
            rates[name].append(process.take_turn(seconds))
        rates[_MATMUL].append(shared.matmul_rate(device))
    return rates


def _parser() -> argparse.ArgumentParser:
    parser = shared.make_parser("train.py", __doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=f"of {', '.join(MODELS)}")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is cuda where there is one")
    shared.add_shared(parser, turns=5, seconds=1.0, of="each process")
    return parser


def outdated_training(train: Mapping[str, Any], models: Sequence[str], configs: Path = CONFIGS) -> list[str]:
    """A line for each model whose figures in train.json are not of its recipe as it is now.

    Args:
        train: the figures.
        models: models that must be among them.
        configs: folder of the recipes.
    """
    problems = {}
    for model in models:
        if (figures := train["models"].get(model)) is None:
            problems[model] = "was not measured"
            continue
        recipe = recipe_of(model, configs)
        now = {
            "recipe": recipe.name,
            "fingerprint": measured_recipe(recipe).fingerprint(),
            "batch_size": recipe.batch_size,
        }
        now["early_crops"] = recipe.early_crops.side if recipe.early_crops else None
        if different := [key for key in now if key not in figures or figures[key] != now[key]]:
            problems[model] = "; ".join(shared.difference(key, figures, now[key]) for key in different)
    return [
        f"train.json: {model}: {problem}: run python benchmarks/speed/train.py --keep"
        for model, problem in problems.items()
    ]


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Column names, and a line of texts for each net: batch size, images a second, their ratios, share of the matrix
    product, quantized over float, and early crops over whole images. A column that no net has a value for is left out.
    """
    lines = []
    for name, figures in result["models"].items():
        rate = figures["images_per_second"]
        ours = rate[OURS]
        twin, crops = rate.get(FLOAT_TWIN), rate.get(EARLY_CROPS)
        lines.append(
            (
                name,
                str(figures["batch_size"]),
                *(f"{rate[program]:,.0f}" for program in PROGRAMS),
                f"{ours / rate[BASELINE]:.2f}",
                f"{ours / rate[TUNED_BASELINE]:.2f}",
                f"{100 * figures['share_of_matmul_peak']:.0f} %",
                f"{twin / ours:.2f}" if twin else "",
                f"{crops / ours:.2f} ({figures['early_crops']})" if crops else "",
            )
        )
    return shared.without_empty(_COLUMNS, lines)


def machine_text(result: Result) -> str:
    """The machine and the version of torch, with the measured rate of the matrix product."""
    facts, rate = result["machine"], result["matmul_peak"] / 1e9
    return f"{shared.machine_in_words(facts)}, torch {facts['torch']}; matmul {rate:,.0f} GFLOP/s"


def print_table(console: Console, result: Result) -> None:
    shared.print_table(console, f"Training, images a second: {machine_text(result)}", *table(result))


def section(result: Result) -> str:
    """The part of the page about training."""
    columns, rows = table(result)
    explanations = "\n".join(f"- *{name}*: {text}" for name, text in _EXPLANATIONS.items() if name in columns)
    return f"""## Training

Images a second of a full training step on CIFAR-10 images with SGD, augmentation (crop and flip) included, at the batch
size of each net's recipe. Each program trains in a process of its own, and the processes take turns; a figure is the
median over the turns. `python benchmarks/speed/train.py --keep` measures again and writes this part;
[train.json](train.json) has the fingerprints of the recipes as they were measured.

{shared.markdown(columns, rows)}

Machine: {machine_text(result)}.

{explanations}

![Images a second of each net with the baseline, the tuned baseline and this library](train.svg)
"""


def plot(result: Result, path: Path) -> None:
    """Bars of images a second, three for each net."""
    names = list(result["models"])
    with shared.figure(path, (9, 3.6)) as (axes,):
        for number, (program, colour) in enumerate(zip(PROGRAMS, (shared.GREY, shared.BLUE, shared.RED), strict=True)):
            heights = [result["models"][name]["images_per_second"][program] for name in names]
            at = [x + 0.27 * (number - 1) for x in range(len(names))]
            bars = axes.bar(at, heights, 0.25, label=program, color=colour)
            axes.bar_label(bars, [f"{h:,.0f}" for h in heights], fontsize=6, padding=1)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel("training, images a second")
        axes.legend(frameon=False)


REPORT = shared.Report(print_table, section, plot)

if __name__ == "__main__":
    sys.exit(main())
