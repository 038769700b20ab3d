"""The figures of the C source on a microcontroller: the page shows those that were measured, of today's checkpoints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cnvzoo.files import sha256_of

SPEED = Path(__file__).resolve().parents[2] / "benchmarks" / "speed"
sys.path.insert(0, str(SPEED))

import microcontroller  # noqa: E402  # pyright: ignore[reportMissingImports]


@pytest.fixture
def kept() -> dict[str, Any]:
    return json.loads((SPEED / microcontroller.KEPT).read_text())


def test_the_page_shows_the_figures(kept):
    page = microcontroller.PAGE.read_text()
    shown = page.partition(microcontroller.START)[2].partition(microcontroller.END)[0].strip()
    assert shown == microcontroller.table(kept).strip()


def test_the_figures_are_of_the_published_checkpoints(kept):
    remedy = "run python benchmarks/speed/microcontroller.py --keep"
    assert [network["name"] for network in kept["networks"]] == microcontroller.published(), remedy
    for network in kept["networks"]:
        weights = microcontroller.ROOT / "hub" / network["name"] / "model.safetensors"
        assert network["sha256"] == sha256_of(weights), remedy


def test_every_network_has_the_scores_of_onnxruntime_and_fits(kept):
    """A CNV of 2 bits in 380,000 bytes of flash and 70,000 of RAM, and half as fast as ONNX Runtime or faster.

    ResNet-20 has layers of 16 to 64 channels, which fill fewer of the compiler's vectors: a sixth of the speed.
    """
    for network in kept["networks"]:
        assert (network["compared"], network["differing"]) == (1000, 0)
        assert network["ram"] + network["stack"] < 70_000
        if network["name"].startswith("quant_cnv"):
            assert network["milliseconds"] <= 2 * network["onnxruntime_milliseconds"]
    assert all(n["flash"] < 380_000 for n in kept["networks"] if "w2a2" in n["name"])
