"""Arguments and options that several commands take."""

from __future__ import annotations

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
    typer.Option(help="Store of checkpoints: a directory or hf://ORG; default CNVZOO_HUB, else the checkout's hub/."),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads of a CPU; default as torch chooses. The bits depend on them.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]
