"""The commands that list models and published checkpoints, and show one model."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import cnvzoo
from cnvzoo.cli.app import app
from cnvzoo.cli.imports import Import
from cnvzoo.cli.options import LARGEST, Bits, Hub, Json, dataset_names, model_names
from cnvzoo.cli.output import Column, print_json, print_table
from cnvzoo.errors import CnvzooError

if TYPE_CHECKING:
    from cnvzoo.checkpoints.index import CheckpointInfo
    from cnvzoo.checkpoints.load import ModelName

BitWidth = int | Literal["float"]
_LISTED_BITS = 4  # bit widths at which `list` counts quantized models
_CHECKPOINT = ("name", "dataset", "accuracy", "correct", "total", "bytes")  # what `info` shows of a checkpoint


@app.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help="Shell pattern, such as 'resnet*'.")] = "*",
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="List published checkpoints instead.")] = False,
    dataset: Annotated[
        str | None, typer.Option(help="Checkpoints trained on this dataset.", autocompletion=dataset_names)
    ] = None,
    bits: Annotated[
        str | None, typer.Option(metavar="W/A", help="Checkpoints of these bit widths, such as 4/4, or 'float'.")
    ] = None,
    min_accuracy: Annotated[
        float | None, typer.Option(min=0, max=100, help="Checkpoints of at least this accuracy, in percent.")
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(min=0, help="Checkpoints whose weights file is not larger than this.")
    ] = None,
    imported: Import = None,
    as_json: Json = False,
) -> None:
    """List models: parameters, multiply-accumulates and weight bytes for 32x32 images, 3 channels and 10 classes.

    Quantized models are counted at 4 bits; `cnvzoo info` counts any model at any setting. `--checkpoints` lists
    published checkpoints: test accuracy in percent, bit widths of weights and activations, and size of the weights. The
    options that select checkpoints may be combined.

    Example: `cnvzoo list 'resnet*'`, or `cnvzoo list --checkpoints --dataset cifar10 --max-bytes 1000000`
    """
    conditions = {"--dataset": dataset, "--bits": bits, "--min-accuracy": min_accuracy, "--max-bytes": max_bytes}
    given = [option for option, value in conditions.items() if value is not None]
    if checkpoints:
        w_bits, a_bits = (None, None) if bits is None else _bit_widths(bits)
        found = cnvzoo.list_checkpoints(
            pattern, dataset=dataset, w_bits=w_bits, a_bits=a_bits, min_accuracy=min_accuracy, max_bytes=max_bytes
        )
        if not found:
            which = f" with {', '.join(f'{option} {conditions[option]}' for option in given)}" if given else ""
            raise CnvzooError(
                f"no published checkpoint matches {pattern!r}{which}: cnvzoo list --checkpoints shows all of them"
            )
        _print_checkpoints(found, as_json)
        return
    if given:
        raise typer.BadParameter(f"{given[0]} selects checkpoints: give --checkpoints too")
    from cnvzoo.models.registry import model_spec

    facts = []
    for name in cnvzoo.list_models(pattern):
        counted_at = _LISTED_BITS if model_spec(name).quantized else None
        counted = cnvzoo.model_info(name, w_bits=counted_at, a_bits=counted_at)
        facts.append({**asdict(counted), "w_bits": counted_at, "a_bits": counted_at})
    if not facts:
        raise CnvzooError(f"no model matches {pattern!r}: cnvzoo list shows all models")
    if as_json:
        print_json(facts)
        return
    numbers = ("parameters", "macs", "weight_bytes")
    print_table(
        [
            Column("model"),
            *(Column(title, is_number=True) for title in ("parameters", "MACs", "weight bytes")),
            Column("description", is_prose=True),
        ],
        [(found["name"], *(f"{found[key]:,}" for key in numbers), found["summary"]) for found in facts],
    )


def _bit_widths(text: str) -> tuple[BitWidth, BitWidth]:
    """Bit widths of weights and activations from `4/4` or `float`."""
    if text == "float":
        return "float", "float"
    widths = text.split("/")
    if len(widths) != 2 or not all(len(width) == 1 and width in "12345678" for width in widths):
        raise typer.BadParameter(f"--bits {text}: W/A, each 1 to 8, such as 4/4; or float")
    return int(widths[0]), int(widths[1])


def _print_checkpoints(found: list[CheckpointInfo], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    titles = ("accuracy", "W/A bits", "parameters", "MACs", "bytes")
    print_table(
        [Column("checkpoint"), *(Column(title, is_number=True) for title in titles)],
        [
            (
                row["name"],
                f"{row['accuracy']:.2f}",
                f"{row['w_bits']}/{row['a_bits']}" if row["w_bits"] else "float",
                *(f"{number:,}" for number in (row["parameters"], row["macs"], row["bytes"])),
            )
            for row in found
        ],
    )


@app.command()
def info(
    model: Annotated[
        str,
        typer.Argument(
            help="Name of a model, with bit widths or dataset if any, or the path of a checkpoint.",
            autocompletion=model_names,
        ),
    ],
    w_bits: Bits = None,
    a_bits: Bits = None,
    num_classes: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=LARGEST["num_classes"],
            help="Number of classes; default that of the dataset in the name, else 10.",
        ),
    ] = None,
    in_chans: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=LARGEST["in_chans"],
            help="Image channels: 3 for colour, 1 for grey; default that of the dataset, else 3.",
        ),
    ] = None,
    input_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=LARGEST["input_size"],
            help="Height and width at which MACs are counted; default the checkpoint's, else 32.",
        ),
    ] = None,
    hub: Hub = None,
    imported: Import = None,
    as_json: Json = False,
) -> None:
    """Show the size and cost of a model at given bit widths, classes and image size; of a checkpoint, its accuracy too.

    Example: `cnvzoo info quant_cnv --w-bits 2 --a-bits 2 --num-classes 100`, or `cnvzoo info quant_cnv_w4a4.cifar10`
    """
    given = {"w_bits": w_bits, "a_bits": a_bits, "num_classes": num_classes, "in_chans": in_chans}
    named, size, checkpoint = _described(model, hub)
    for key, value in given.items():
        if value is not None and key in ("w_bits", "a_bits") and named.get(key, value) != value:
            option = f"--{key.replace('_', '-')}"
            raise CnvzooError(f"{model} and {option} {value}: leave {option} out, or the bits in the name")
    arguments: dict[str, Any] = named | {key: value for key, value in given.items() if value is not None}
    if any(arguments.get(key) != named.get(key) for key in ("num_classes", "in_chans") if given[key] is not None):
        checkpoint = None  # the network is another than that of the checkpoint
    facts = cnvzoo.model_info(**arguments, input_size=input_size or size)
    if as_json:
        bits = {key: arguments.get(key) for key in ("w_bits", "a_bits")}
        print_json({**asdict(facts), **bits, "checkpoint": checkpoint})
        return
    channels, height, width = facts.input_shape
    rows = [
        ("model", facts.name),
        ("description", facts.summary),
        ("input", f"{channels} x {height} x {width}"),
        ("parameters", f"{facts.parameters:,}"),
        ("multiply-accumulates", f"{facts.macs:,}"),
        ("weight bytes", f"{facts.weight_bytes:,}"),
    ]
    if checkpoint is not None:
        rows.append(("checkpoint", checkpoint["name"]))
        if checkpoint["accuracy"] is not None:
            correct, total = checkpoint["correct"], checkpoint["total"]
            rows.append(("accuracy", f"{checkpoint['accuracy']:.2f} % ({correct:,} of {total:,} test images)"))
        rows.append(("bytes of the file", f"{checkpoint['bytes']:,}"))
    print_table([Column(""), Column("", is_prose=True)], rows, header=False)


def _described(name: str, hub: str | None) -> tuple[dict[str, Any], int | None, dict[str, Any] | None]:
    """The arguments of `model_info` for a model or checkpoint, and, without fetching it, a checkpoint's size and facts.

    The size is the side of the network's input in pixels.
    """
    from cnvzoo.checkpoints.folder import read_config
    from cnvzoo.checkpoints.index import read_index, row
    from cnvzoo.checkpoints.load import parse_name
    from cnvzoo.checkpoints.locations import is_path, own_checkpoint
    from cnvzoo.files import expanded
    from cnvzoo.training.evaluation import preprocessing_of

    published = read_index().checkpoints.get(name)
    if published is not None:
        found = row(name, published)
        size = preprocessing_of(found["model"], found["dataset"]).size
        return dict(published.model), size, {key: found[key] for key in _CHECKPOINT}
    folder = expanded(name) if is_path(name) else own_checkpoint(name, hub)
    if folder is None:
        parsed = parse_name(name)
        return ({"name": parsed.model, **parsed.bits} if parsed.dataset is None else _on_dataset(parsed)), None, None
    config = read_config(folder)
    return dict(config.model), config.preprocessing["size"], {
        "name": config.name, "dataset": config.dataset, "accuracy": config.accuracy,
        "correct": config.correct, "total": config.total, "bytes": config.file.size,
    }  # fmt: skip


def _on_dataset(parsed: ModelName) -> dict[str, Any]:
    """The arguments of a model for a dataset without a checkpoint."""
    from cnvzoo.data.published import dataset_info

    assert parsed.dataset is not None
    data = dataset_info(parsed.dataset)
    return {"name": parsed.model, **parsed.bits, "num_classes": data.num_classes, "in_chans": data.in_chans}
