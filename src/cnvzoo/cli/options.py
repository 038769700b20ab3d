"""Arguments and options that several commands take, and the names that the shell completes.

Completing imports no PyTorch, which takes a second.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

Bits = Annotated[int | None, typer.Option(min=1, max=8, help="Bit width, 1 to 8. Quantized models need both widths.")]
Device = Annotated[str, typer.Option(help="auto (CUDA if available), cpu, cuda or cuda:N.")]
DataRoot = Annotated[
    Path | None,
    typer.Option(help="Folder of cached datasets; default CNVZOO_DATA, else ~/.cache/cnvzoo/datasets."),
]
Hub = Annotated[
    str | None,
    typer.Option(
        help="Store of checkpoints: a directory or hf://ORG; default CNVZOO_HUB, else the checkout's hub/, else the "
        "Hugging Face Hub."
    ),
]
LARGEST = {"num_classes": 1_000_000, "in_chans": 10_000, "input_size": 4096}  # as of the models; a test compares
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=4096, help="Threads of a CPU; default as torch chooses. The bits depend on them."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]

# The registry of models imports PyTorch; a test compares.
MODELS = (
    "cnv",
    "quant_cnv",
    "mobilenet_v1",
    "quant_mobilenet_v1",
    "resnet20",
    "quant_resnet20",
    "resnet32",
    "quant_resnet32",
    "resnet44",
    "quant_resnet44",
    "resnet56",
    "quant_resnet56",
    "resnet110",
    "quant_resnet110",
    "resnet18",
    "quant_resnet18",
)


def checkpoint_names(incomplete: str) -> list[str]:
    """The published checkpoints that start with `incomplete`."""
    from cnvzoo.checkpoints.index import list_checkpoints

    return _starting_with(incomplete, [found["name"] for found in list_checkpoints()])


def dataset_names(incomplete: str) -> list[str]:
    """The datasets of published checkpoints that start with `incomplete`."""
    from cnvzoo.checkpoints.index import list_checkpoints

    return _starting_with(incomplete, sorted({found["dataset"] for found in list_checkpoints()}))


def model_names(incomplete: str) -> list[str]:
    """The models of this library, then the published checkpoints, that start with `incomplete`."""
    return [*_starting_with(incomplete, MODELS), *checkpoint_names(incomplete)]


def recipe_names(incomplete: str) -> list[str]:
    """The recipes that come with cnvzoo and start with `incomplete`."""
    from cnvzoo.recipe_folder import list_recipes

    return _starting_with(incomplete, list_recipes())


def _starting_with(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
