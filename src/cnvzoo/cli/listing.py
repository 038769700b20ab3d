"""The commands that list models and published checkpoints, and show one model."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

import cnvzoo
from cnvzoo.cli.app import app
from cnvzoo.cli.options import Bits
from cnvzoo.cli.output import print_table
from cnvzoo.errors import CnvzooError

_LISTED_BITS = 4  # bit widths at which `list` counts quantized models


@app.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help="Shell pattern, such as 'resnet*'.")] = "*",
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="List published checkpoints instead.")] = False,
) -> None:
    """List models: parameters, multiply-accumulates and weight bytes for 32x32 images, 3 channels and 10 classes.

    Quantized models are counted at 4 bits; `cnvzoo info` counts any model at any setting. `--checkpoints` lists
    published checkpoints: test accuracy in percent, bit widths of weights and activations, and size of the weights.

    Example: `cnvzoo list 'resnet*'`, or `cnvzoo list --checkpoints '*.cifar10'`
    """
    if checkpoints:
        _list_checkpoints(pattern)
        return
    from cnvzoo.models.registry import model_spec

    table = Table()
    for column in ("model", "parameters", "MACs", "weight bytes"):
        table.add_column(column, no_wrap=True)
    table.add_column("description")
    for name in cnvzoo.list_models(pattern):
        bits = _LISTED_BITS if model_spec(name).quantized else None
        info = cnvzoo.model_info(name, w_bits=bits, a_bits=bits)
        table.add_row(info.name, f"{info.parameters:,}", f"{info.macs:,}", f"{info.weight_bytes:,}", info.summary)
    if not table.rows:
        raise CnvzooError(f"no model matches {pattern!r}: cnvzoo list shows all models")
    print_table(table)


def _list_checkpoints(pattern: str) -> None:
    table = Table()
    for column in ("checkpoint", "accuracy", "W/A bits", "parameters", "MACs", "bytes"):
        table.add_column(column, no_wrap=True, justify="left" if column == "checkpoint" else "right")
    for found in cnvzoo.list_checkpoints(pattern):
        bits = f"{found['w_bits']}/{found['a_bits']}" if found["w_bits"] else "float"
        numbers = (f"{found[key]:,}" for key in ("parameters", "macs", "bytes"))
        table.add_row(found["name"], f"{found['accuracy']:.2f}", bits, *numbers)
    if not table.rows:
        raise CnvzooError(f"no published checkpoint matches {pattern!r}: cnvzoo list --checkpoints shows all of them")
    print_table(table)


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="Name of a model, as in `cnvzoo list`.")],
    w_bits: Bits = None,
    a_bits: Bits = None,
    num_classes: Annotated[int, typer.Option(min=1, help="Number of classes.")] = 10,
    in_chans: Annotated[int, typer.Option(min=1, help="Image channels: 3 for colour, 1 for grey.")] = 3,
    input_size: Annotated[int | None, typer.Option(min=1, help="Height and width at which MACs are counted.")] = None,
) -> None:
    """Show the size and cost of a model at given bit widths, classes and image size.

    Example: `cnvzoo info quant_cnv --w-bits 2 --a-bits 2 --num-classes 100`
    """
    facts = cnvzoo.model_info(
        model, w_bits=w_bits, a_bits=a_bits, num_classes=num_classes, in_chans=in_chans, input_size=input_size
    )
    channels, height, width = facts.input_shape
    table = Table(show_header=False, box=None)
    for label, value in (
        ("model", facts.name),
        ("description", facts.summary),
        ("input", f"{channels} x {height} x {width}"),
        ("parameters", f"{facts.parameters:,}"),
        ("multiply-accumulates", f"{facts.macs:,}"),
        ("weight bytes", f"{facts.weight_bytes:,}"),
    ):
        table.add_row(label, value)
    print_table(table)
