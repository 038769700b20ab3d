"""The benchmarks of training and inference: that they compare the same nets, and say what they measured."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from workbench import BENCHMARKS

from cnvzoo.data import Dataset, dataset_info, load_dataset
from cnvzoo.train import EarlyCrops, load_recipe

SPEED = BENCHMARKS / "speed"
sys.path.insert(0, str(SPEED))

import contenders  # noqa: E402
import infer_report  # noqa: E402
import page  # noqa: E402
import textbook  # noqa: E402
import train_report  # noqa: E402
import ways  # noqa: E402


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
        "resnet20": {
            "images_per_second": {
                "textbook": 600.0,
                "tuned textbook": 1200.0,
                "ours": 1800.0,
                "ours, early crops": 2970.0,
            },
            "share_of_matmul_peak": 0.471,
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
    assert train_report.rows(RESULT) == [
        ("cnv", "500", "1,000", "1,500", "3.00", "1.50", "66 %", "", ""),
        ("quant_cnv_w4a4", "250", "625", "1,250", "5.00", "2.00", "55 %", "1.20", ""),
        ("resnet20", "600", "1,200", "1,800", "3.00", "1.50", "47 %", "", "1.65"),
    ]
    assert "A CPU, 2 threads, AVX512, torch 2.14.1; bf16 matmul 800 GFLOP/s" in train_report.section(RESULT)


def test_inference_ratios() -> None:
    def row(net: str, runtime: str, one: float, many: float) -> dict[str, object]:
        times = {"1": one, "64": many}
        return {"runtime": runtime, "net": net, "bytes": 1000, "correct": 9_141, "total": 10_000, "milliseconds": times}

    result = {
        "machine": RESULT["machine"],
        "versions": {"onnxruntime": "1.32.0"},
        "contenders": [
            row("cnv", infer_report.BASELINE, 2.0, 40.0),
            row("quant_cnv_w4a4", infer_report.OURS, 0.5, 8.0),
        ],
    }
    assert infer_report.columns(result)[-3:] == ("one image, ms", "images/s, batch 64", "/ PyTorch float32")
    assert infer_report.rows(result) == [
        ("cnv", "PyTorch float32", "1,000", "91.41", "2.00", "1,600", "1.00"),
        ("quant_cnv_w4a4", "ours, ONNX Runtime", "1,000", "91.41", "0.50", "8,000", "5.00"),
    ]
    assert "A CPU, 2 threads, AVX512; onnxruntime 1.32.0" in infer_report.section(result)


def test_the_page_is_that_of_the_figures(tmp_path: Path) -> None:
    train, infer = (json.loads((SPEED / f"{name}.json").read_text()) for name in ("train", "infer"))
    assert (SPEED / "README.md").read_text() == page.render(train, infer)
    train_report.plot(train, tmp_path / "train.svg")
    infer_report.plot(infer, tmp_path / "infer.svg")
    assert all(name in (tmp_path / "train.svg").read_text() for name in train["models"])
    drawn = (tmp_path / "infer.svg").read_text()
    assert all(f"{row['net']}, {row['runtime']}" in drawn for row in infer["contenders"])


@pytest.mark.parametrize(
    ("crops", "more"), [(None, []), (EarlyCrops(side=12, epochs=5), ["ours, early crops"])], ids=["whole", "crops"]
)
def test_all_ways_train(crops: EarlyCrops | None, more: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    measure = runpy.run_path(str(SPEED / "train.py"))["measure"]
    monkeypatch.setitem(
        measure.__globals__, "load_recipe", lambda path: load_recipe(path).model_copy(update={"early_crops": crops})
    )
    result = measure(["resnet20"], torch.device("cpu"), images(320), turns=1, seconds=0.01)
    rates = result["models"]["resnet20"]["images_per_second"]
    assert list(rates) == ["textbook", "tuned textbook", "ours", *more]
    # 40,813,184 multiply-accumulates, six operations each
    share = result["models"]["resnet20"]["share_of_matmul_peak"]
    assert share == pytest.approx(6 * 40_813_184 * rates["ours"] / result["matmul_peak"], rel=0.02)


def test_a_way_whose_process_ends_is_an_error() -> None:
    recipe = runpy.run_path(str(SPEED / "train.py"))["_recipe"]("resnet20")
    with (
        ways.Way(
            "textbook", recipe.model_copy(update={"model": "resnet_of_no_depth"}), torch.device("cpu"), images(1)
        ) as way,
        pytest.raises(RuntimeError, match="textbook of resnet_of_no_depth: its process ended"),
    ):
        way.wait()


def test_every_runtime_says_what_the_model_says(small_datasets, make_checkpoint, tmp_path, monkeypatch) -> None:
    """Files of one model in every runtime give its logits, up to a factor where they are integers."""
    small_datasets(train=128, test=50)
    hub = tmp_path / "hub"
    make_checkpoint(hub, "cnv", "cifar10")
    make_checkpoint(hub, "quant_cnv", "cifar10", w_bits=4, a_bits=4)
    monkeypatch.setenv("CNVZOO_HUB", str(hub))
    data = load_dataset("cifar10")
    batch, calibration = (x.permute(0, 3, 1, 2).numpy() for x in (data.test_images[:8], data.train_images))
    floats = list(contenders.float_contenders("cnv.cifar10", calibration, 1, tmp_path))
    quantized = list(contenders.quantized_contenders("quant_cnv_w4a4.cifar10", 1, tmp_path))
    assert [c.runtime for c in floats] == [
        "PyTorch float32", "PyTorch float32, channels_last", "PyTorch bfloat16, channels_last",
        "torch.compile float32, channels_last", "ONNX Runtime float32", "ONNX Runtime static PTQ int8",
    ]  # fmt: skip
    assert [c.runtime for c in quantized] == [
        "Brevitas eager", "Brevitas QCDQ, ONNX Runtime", "Brevitas QCDQ, OpenVINO", "ours, ONNX Runtime",
    ]  # fmt: skip
    for group in (floats, quantized):
        expected = group[0].run(group[0].prepare(batch))
        for contender in group:
            found = contender.run(contender.prepare(batch)).astype(np.float64)
            similarity = np.corrcoef(found.reshape(-1), expected.reshape(-1))[0, 1]
            assert similarity > 0.99, (contender.runtime, similarity)
            assert contender.bytes > 400_000


def test_infer_measures_what_is_published(small_datasets, make_checkpoint, tmp_path, monkeypatch, capsys) -> None:
    small_datasets(train=64, test=20)
    make_checkpoint(tmp_path / "hub", "cnv", "cifar10")
    monkeypatch.setenv("CNVZOO_HUB", str(tmp_path / "hub"))
    measure = runpy.run_path(str(SPEED / "infer.py"))["measure"]
    result = measure([4], [1, 8], load_dataset("cifar10"), turns=1, seconds=0.001)
    assert "quant_cnv_w4a4.cifar10 is not published yet: left out" in capsys.readouterr().err
    assert {row["net"] for row in result["contenders"]} == {"cnv"}
    for row in result["contenders"]:
        assert row["total"] == 20
        assert list(row["milliseconds"]) == ["1", "8"]
        assert all(least <= row["milliseconds"][b] <= most for b, (least, most) in row["spread"].items())
