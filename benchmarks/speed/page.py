"""README.md of this folder, written from train.json and infer.json, and whether these are still up to date.

Timings cannot be compared with a new measurement in a test. So each file names what was measured, by the fingerprint of
the recipe and the sha256 of the checkpoint, and is out of date as soon as the repository has another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import infer_report
import style
import train_report

from cnvzoo.checkpoints.index import IndexEntry
from cnvzoo.files import write_text
from cnvzoo.training import Recipe, load_recipe

CONFIGS = style.HERE.parent / "configs"
WEIGHTS = "model.safetensors"
TOLERATED_IMAGES = 5  # float32 sums in another order move a few images of 10,000 to another class

_TRAIN_COMMAND = "python benchmarks/speed/train.py --keep"
_INFER_COMMAND = "python benchmarks/speed/infer.py --keep"


def update() -> None:
    """Write README.md from train.json and infer.json."""
    write_text(style.HERE / "README.md", render(kept("train"), kept("infer")))


def render(train: dict[str, Any], infer: dict[str, Any]) -> str:
    """The text of README.md for two sets of figures."""
    return f"# What training and inference cost\n\n{train_report.section(train)}\n{infer_report.section(infer)}"


def kept(name: str) -> dict[str, Any]:
    """The figures in `<name>.json` of this folder."""
    return json.loads((style.HERE / f"{name}.json").read_text(encoding="utf-8"))


def recipe_of(model: str, configs: Path = CONFIGS) -> Recipe:
    """The recipe of the CIFAR-10 table for a model, such as `quant_cnv_w4a4`."""
    return load_recipe(configs / f"cifar10_{model}.yaml")


def outdated_training(train: Mapping[str, Any], models: Sequence[str], configs: Path = CONFIGS) -> list[str]:
    """What of train.json does not fit the recipes as they are now, one line for each model; empty if all does.

    Args:
        train: the figures.
        models: that have to be among them.
        configs: the folder of the recipes.
    """
    problems = {}
    for model in models:
        if (figures := train["models"].get(model)) is None:
            problems[model] = "was not measured"
            continue
        recipe = recipe_of(model, configs)
        now = {"recipe": recipe.name, "fingerprint": recipe.fingerprint(), "batch_size": recipe.batch_size}
        now["early_crops"] = recipe.early_crops.side if recipe.early_crops else None
        if different := [key for key in now if key not in figures or figures[key] != now[key]]:
            problems[model] = "; ".join(_difference(key, figures, now[key]) for key in different)
    return [f"train.json: {model}: {problem}: run {_TRAIN_COMMAND}" for model, problem in problems.items()]


def outdated_inference(
    infer: Mapping[str, Any], checkpoints: Sequence[str], index: Mapping[str, IndexEntry]
) -> list[str]:
    """What of infer.json does not fit the published checkpoints, one line for each problem; empty if all does.

    Args:
        infer: the figures.
        checkpoints: that have to be among them if they are published, such as `cnv.cifar10`.
        index: what is published, by name.
    """
    problems = []
    for name in checkpoints:
        if name not in index:
            continue
        entry, rows = index[name], [row for row in infer["contenders"] if f"{row['net']}.cifar10" == name]
        if not rows:
            problems.append(f"{name}: was not measured")
            continue
        measured = infer.get("checkpoints", {}).get(name, {})
        if measured.get(WEIGHTS) != (sha256 := entry.files[WEIGHTS].sha256):
            problems.append(f"{name}: {_difference(WEIGHTS, measured, sha256)}")
        runs = [row for row in rows if row["runtime"] in infer_report.OF_THE_PUBLISHED_FILE]
        if not runs:
            problems.append(f"{name}: no runtime of {', '.join(infer_report.OF_THE_PUBLISHED_FILE)} was measured")
        for row in runs:
            if row["total"] != entry.total or abs(row["correct"] - entry.correct) > TOLERATED_IMAGES:
                problems.append(
                    f"{name}, {row['runtime']}: {row['correct']:,} of {row['total']:,} images are right, published "
                    f"are {entry.correct:,} of {entry.total:,} (at most {TOLERATED_IMAGES} images may differ)"
                )
    return [f"infer.json: {problem}: run {_INFER_COMMAND}" for problem in problems]


def _difference(key: str, measured: Mapping[str, Any], now: Any) -> str:
    if key not in measured:
        return f"{key} is not stated"
    return f"{key} is {_short(now)}, and {_short(measured[key])} was measured"


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text
