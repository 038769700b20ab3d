"""README.md of this folder, made of the figures that were kept."""

from __future__ import annotations

import json
from typing import Any

import infer_report
import train_report
from look import HERE

from cnvzoo.files import write_text


def update() -> None:
    """Write README.md from train.json and infer.json."""
    write_text(HERE / "README.md", render(_kept("train"), _kept("infer")))


def render(train: dict[str, Any], infer: dict[str, Any]) -> str:
    """The text of README.md for two sets of figures."""
    return f"# What training and inference cost\n\n{train_report.section(train)}\n{infer_report.section(infer)}"


def _kept(name: str) -> dict[str, Any]:
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
