"""What the tests of the command line share: a call of the command, a recipe file, and a hub of two checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cnvzoo.cli import main

RECIPE = """
model: {model}
dataset: mnist
epochs: 2
batch_size: 32
optimizer: {{lr: 0.05}}
"""


@dataclass
class Finished:
    """A command that has run; `said` is its whole output with single spaces."""

    status: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return " ".join((self.out + self.err).split())


@pytest.fixture
def cnvzoo(monkeypatch, capsys, tmp_path) -> Callable[..., Finished]:
    """`cnvzoo(*arguments)`: run the command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # --import adds to it

    def call(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["cnvzoo", *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        return Finished(status, *capsys.readouterr())

    return call


@pytest.fixture
def recipe(tmp_path) -> Callable[..., Path]:
    def write(model: str = "resnet20", *lines: str) -> Path:
        path = tmp_path / f"mnist_{model}.yaml"
        path.write_text(RECIPE.format(model=model) + "\n".join(lines))
        return path

    return write


@pytest.fixture
def hub(tmp_path, monkeypatch, make_checkpoint) -> Path:
    """A folder with two checkpoints, for grey and for colour images."""
    folder = tmp_path / "hub"
    make_checkpoint(folder, "resnet20", "mnist")
    make_checkpoint(folder, "quant_cnv", "cifar10", w_bits=4, a_bits=4)
    monkeypatch.setenv("CNVZOO_HUB", str(folder))
    return folder
