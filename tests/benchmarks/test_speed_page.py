"""The page of the speed benchmarks: ratios, tables and plots of the figures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import infer_page
import pytest
import shared
import train
from workbench import SPEED

from cnvzoo.errors import CnvzooError

CPU = {"kind": "cpu", "name": "A CPU", "threads": 2, "capability": "AVX512", "torch": "2.14.1"}


def trained(*rates: float, share: float, batch_size: int = 128, **more: float) -> dict[str, Any]:
    """The figures of a net: of the baseline, the tuned baseline and this library, and of `twin` or `crops`."""
    names = {"twin": "ours, float twin", "crops": "ours, early crops"}
    others = {names[key]: rate for key, rate in more.items()}
    return {
        "batch_size": batch_size,
        "early_crops": 24 if "crops" in more else None,
        "images_per_second": dict(zip(("baseline", "tuned baseline", "ours"), rates, strict=True)) | others,
        "share_of_matmul_peak": share,
    }


RESULT = {
    "machine": CPU,
    "matmul_peak": 800e9,
    "models": {
        "cnv": trained(500, 1000, 1500, share=0.655),
        "quant_cnv_w4a4": trained(250, 625, 1250, share=0.546, twin=1500),
        "resnet20": trained(600, 1200, 1800, share=0.471, batch_size=256, crops=2970),
    },
}


def test_ratios_and_shares() -> None:
    columns, rows = train.table(RESULT)
    assert columns == [
        "net", "batch", "baseline", "tuned baseline", "ours", "ours / baseline", "ours / tuned", "of matmul",
        "/ float", "early crops",
    ]  # fmt: skip
    assert rows == [
        ["cnv", "128", "500", "1,000", "1,500", "3.00", "1.50", "66 %", "", ""],
        ["quant_cnv_w4a4", "128", "250", "625", "1,250", "5.00", "2.00", "55 %", "1.20", ""],
        ["resnet20", "256", "600", "1,200", "1,800", "3.00", "1.50", "47 %", "", "1.65 (24)"],
    ]
    section = train.section(RESULT)
    assert "A CPU, 2 threads, AVX512, torch 2.14.1; matmul 800 GFLOP/s" in section
    assert "*early crops*" in section


@pytest.mark.parametrize(
    ("net", "left"),
    [("cnv", []), ("quant_cnv_w4a4", ["/ float"]), ("resnet20", ["early crops"])],
)
def test_a_column_that_is_empty_for_all_nets_is_left_out(net: str, left: list[str]) -> None:
    result = {**RESULT, "models": {net: RESULT["models"][net]}}
    columns, (row,) = train.table(result)
    assert columns[8:] == left
    assert len(row) == 8 + len(left)
    section = train.section(result)
    assert [name for name in ("/ float", "early crops") if name in section] == left


def test_inference_ratios() -> None:
    def row(net: str, runtime: str, one: float, many: float) -> dict[str, Any]:
        times = {"1": one, "64": many}
        found = {"runtime": runtime, "net": net, "bytes": 1000, "correct": 9_141, "agreeing": 9_998, "total": 10_000}
        return found | {"milliseconds": times}

    result = {
        "machine": CPU,
        "versions": {"onnxruntime": "1.32.0"},
        "macs": {"cnv": 59_461_376, "quant_cnv_w4a4": 59_461_376},
        "contenders": [
            row("cnv", "PyTorch float32", 2.0, 40.0),
            row("quant_cnv_w4a4", "ours, ONNX Runtime", 0.5, 8.0),
        ],
    }
    assert infer_page.columns(result)[3:] == (
        "top-1, %", "same class", "one image, ms", "images/s, batch 64", "/ PyTorch float32, batch 64"
    )  # fmt: skip
    assert infer_page.rows(result) == [
        ("cnv", "PyTorch float32", "1,000", "91.41", "9,998", "2.00", "1,600", "1.00"),
        ("quant_cnv_w4a4", "ours, ONNX Runtime", "1,000", "91.41", "9,998", "0.50", "8,000", "5.00"),
    ]
    assert "A CPU, 2 threads, AVX512; onnxruntime 1.32.0" in infer_page.section(result)


def test_the_table_to_choose_from() -> None:
    """Bytes, multiply-accumulates, memory and times of each net, and its speed beside OpenVINO's int8 of its twin."""

    def row(net: str, runtime: str, *times: float, memory: dict[str, float] | None = None) -> dict[str, Any]:
        found = {"runtime": runtime, "net": net, "bytes": 1000, "correct": 9_141, "agreeing": 9_998, "total": 10_000}
        found |= {"memory": memory}
        return found | {"milliseconds": dict(zip(("1", "64"), times, strict=True))}

    result = {
        "machine": CPU,
        "versions": {},
        "macs": {"cnv": 59_461_376, "quant_cnv_w4a4": 59_461_376, "quant_resnet20_w4a4": 40_813_184},
        "contenders": [
            row("cnv", "PyTorch float32", 2.0, 40.0),
            row("cnv", "OpenVINO NNCF PTQ int8", 0.3, 10.0, memory={"1": 10.4, "64": 20.6}),
            row("quant_cnv_w4a4", "Brevitas eager", 4.0, 80.0),
            row("quant_cnv_w4a4", "ours QDQ, auto", 0.2, 8.0, memory={"1": 9.5}),
            row("quant_resnet20_w4a4", "ours, ONNX Runtime", 0.5, 8.0),
        ],
    }
    assert infer_page.choice_columns(result) == (
        "net", "runtime", "top-1, %", "file bytes", "MMACs", "one image, ms", "images/s, batch 64", "RAM, MiB, batch 1",
        "RAM, MiB, batch 64", "speed / OpenVINO NNCF PTQ int8, batch 1, 64",
    )  # fmt: skip
    assert infer_page.choice_rows(result) == [
        ("cnv", "OpenVINO NNCF PTQ int8", "91.41", "1,000", "59.5", "0.30", "6,400", "10", "21", "1.00, 1.00"),
        ("quant_cnv_w4a4", "ours QDQ, auto", "91.41", "1,000", "59.5", "0.20", "8,000", "10", "", "1.50, 1.25"),
        ("quant_resnet20_w4a4", "ours, ONNX Runtime", "91.41", "1,000", "40.8", "0.50", "8,000", "", "", ""),
    ]
    assert [line[0] for line in infer_page.rows(result)] == ["cnv", "cnv", "quant_cnv_w4a4", "quant_cnv_w4a4"]
    assert "Inference" in infer_page.section(result)


def test_the_page_and_the_plots_of_this_repository_show_the_figures(tmp_path: Path) -> None:
    training, inference = shared.kept("train"), shared.kept("infer")
    title = "# What training and inference cost\n\n"
    assert (SPEED / "README.md").read_text() == f"{title}{train.section(training)}\n{infer_page.section(inference)}"
    train.plot(training, tmp_path / "train.svg")
    infer_page.plot(inference, tmp_path / "infer.svg")
    assert all(name in (tmp_path / "train.svg").read_text() for name in training["models"])
    drawn = (tmp_path / "infer.svg").read_text()
    assert all(f"{row['net']}, {row['runtime']}" in drawn for row in inference["contenders"])


def test_a_section_is_replaced_and_the_others_are_kept(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("# Title\n\n## Training\n\nold\n\n## Inference\n\nold\n")
    shared.replace_section(page, "## Training\n\nnew\n")
    assert page.read_text() == "# Title\n\n## Training\n\nnew\n\n## Inference\n\nold\n"
    shared.replace_section(page, "## Inference\n\nnew\n")
    assert page.read_text() == "# Title\n\n## Training\n\nnew\n\n## Inference\n\nnew\n"
    before = page.read_text()
    with pytest.raises(CnvzooError, match=r"README\.md: no heading '## Memory': restore it from version control"):
        shared.replace_section(page, "## Memory\n\nnew\n")
    assert page.read_text() == before


def test_figures_are_written_before_they_are_printed(tmp_path: Path) -> None:
    """Measuring takes minutes, and the output may be a pipe that nobody reads any more."""

    def fail(*_: Any) -> None:
        raise BrokenPipeError

    arguments = argparse.Namespace(json=tmp_path / "figures.json", keep=False)
    with pytest.raises(BrokenPipeError):
        shared.deliver(arguments, "infer", shared.Report(fail, str, fail), {"a": 1})
    assert json.loads((tmp_path / "figures.json").read_text()) == {"a": 1}


def test_figures_of_some_nets_do_not_replace_those_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train.main(["--models", "cnv", "--keep"])
    assert "--keep replaces the figures of all nets: leave --models out" in capsys.readouterr().err


def test_nets_that_were_measured_at_different_times_have_no_ratio() -> None:
    figures = shared.kept("infer")
    for row in figures["contenders"]:
        row["measured"] = "2026-01-01T00:00:00+00:00"

    def ratios() -> dict[tuple[str, ...], str]:
        return {row[:2]: row[-1] for row in (*infer_page.rows(figures), *infer_page.choice_rows(figures))}

    before = ratios()
    assert all(ratio for (net, _), ratio in before.items() if net.endswith("cnv") or "_cnv_" in net)
    for row in figures["contenders"]:
        if row["net"] == "quant_cnv_w4a4":
            row["measured"] = "2026-01-02T00:00:00+00:00"
    assert ratios() == {key: "" if key[0] == "quant_cnv_w4a4" else ratio for key, ratio in before.items()}
