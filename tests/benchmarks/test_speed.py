"""The benchmark of the training step: that it compares the same nets, and says what it measured."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from workbench import BENCHMARKS

from cnvzoo.data import Dataset, dataset_info

SPEED = BENCHMARKS / "speed"
sys.path.insert(0, str(SPEED))

import report  # noqa: E402
import textbook  # noqa: E402


def images(n: int) -> Dataset:
    info = replace(dataset_info("cifar10"), train_size=n, test_size=10)
    train, test = (torch.randint(256, (k, 32, 32, 3), dtype=torch.uint8) for k in (n, 10))
    return Dataset(info, train, torch.arange(n).to(torch.uint8) % 10, test, torch.arange(10).to(torch.uint8))


RESULT = {
    "machine": {"kind": "cpu", "name": "A CPU", "threads": 2, "capability": "AVX512", "torch": "2.14.1"},
    "matmul_peak": 800e9,
    "models": {
        "cnv": {
            "images_per_second": {"textbook": 500.0, "tuned textbook": 1000.0, "ours": 1500.0},
            "share_of_matmul_peak": 0.655,
        },
        "quant_cnv_w4a4": {
            "images_per_second": {
                "textbook": 250.0,
                "tuned textbook": 625.0,
                "ours": 1250.0,
                "ours, float twin": 1500.0,
            },
            "share_of_matmul_peak": 0.546,
        },
    },
}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("cnv", 1_546_688), ("resnet20", 272_474), ("resnet56", 855_770), ("mobilenet_v1", 3_217_226)],
)
def test_the_textbook_trains_the_nets_of_the_tables(name: str, parameters: int) -> None:
    model = textbook.build(name, None)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_textbooks_quantized_net_is_brevitas_as_it_comes() -> None:
    from brevitas.nn import QuantConv2d, QuantLinear, QuantReLU

    layers = list(textbook.build("quant_cnv", 4).modules())
    weighted = [m for m in layers if isinstance(m, (QuantConv2d, QuantLinear))]
    assert sum(m.weight.numel() for m in weighted) == 1_542_848
    assert [int(m.weight_quant.bit_width()) for m in weighted] == [8] + 8 * [4]  # type: ignore[operator, union-attr]
    assert sum(isinstance(m, QuantReLU) for m in layers) == 8


def test_ratios_and_shares() -> None:
    assert report.rows(RESULT) == [
        ("cnv", "500", "1,000", "1,500", "3.00", "1.50", "66 %", ""),
        ("quant_cnv_w4a4", "250", "625", "1,250", "5.00", "2.00", "55 %", "1.20"),
    ]
    assert "A CPU, 2 threads, AVX512, torch 2.14.1; bf16 matmul 800 GFLOP/s" in report.page(RESULT)


def test_the_page_is_that_of_the_figures(tmp_path: Path) -> None:
    kept = json.loads((SPEED / "train.json").read_text())
    assert (SPEED / "README.md").read_text() == report.page(kept)
    report.plot(kept, tmp_path / "train.svg")
    drawn = (tmp_path / "train.svg").read_text()
    assert all(name in drawn for name in kept["models"])


@pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_all_ways_train() -> None:
    result = runpy.run_path(str(SPEED / "train.py"))["measure"](
        ["resnet20"], torch.device("cpu"), images(320), turns=1, seconds=0.01
    )
    rates = result["models"]["resnet20"]["images_per_second"]
    assert list(rates) == ["textbook", "tuned textbook", "ours"]
    # 40,813,184 multiply-accumulates, six operations each
    share = result["models"]["resnet20"]["share_of_matmul_peak"]
    assert share == pytest.approx(6 * 40_813_184 * rates["ours"] / result["matmul_peak"], rel=0.02)
