"""The speed benchmarks of training and inference: they compare the same networks, and state what they measured."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from workbench import BENCHMARKS

from cnvzoo.checkpoints.format import FileFacts
from cnvzoo.checkpoints.index import IndexEntry, read_index
from cnvzoo.data import Dataset, dataset_info, load_dataset
from cnvzoo.errors import CnvzooError
from cnvzoo.files import sha256_of
from cnvzoo.training import EarlyCrops, Recipe, load_recipe
from cnvzoo_runtime.sessions import sums_products_exactly

SPEED = BENCHMARKS / "speed"
sys.path.insert(0, str(SPEED))

import baseline  # noqa: E402
import contenders  # noqa: E402
import infer  # noqa: E402
import infer_page  # noqa: E402
import memory  # noqa: E402
import shared  # noqa: E402
import train  # noqa: E402

SCRIPTS = {"train": train, "infer": infer}


def images(n: int) -> Dataset:
    info = replace(dataset_info("cifar10"), train_size=n, test_size=10)
    train, test = (torch.randint(256, (k, 32, 32, 3), dtype=torch.uint8) for k in (n, 10))
    return Dataset(info, train, torch.arange(n).to(torch.uint8) % 10, test, torch.arange(10).to(torch.uint8))


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


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("cnv", 1_546_688), ("resnet20", 272_474), ("resnet56", 855_770), ("mobilenet_v1", 3_217_226)],
)
def test_the_baseline_trains_the_nets_of_the_tables(name: str, parameters: int) -> None:
    model = baseline.build(name, None)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_quantized_net_of_the_baseline_has_layers_of_brevitas() -> None:
    from brevitas.nn import QuantConv2d, QuantLinear, QuantReLU

    layers = list(baseline.build("quant_cnv", 4).modules())
    weighted = [m for m in layers if isinstance(m, (QuantConv2d, QuantLinear))]
    assert sum(m.weight.numel() for m in weighted) == 1_542_848
    assert [int(m.weight_quant.bit_width()) for m in weighted] == [8] + 8 * [4]  # type: ignore[operator, union-attr]
    assert sum(isinstance(m, QuantReLU) for m in layers) == 8


def test_ratios_and_shares() -> None:
    columns, rows = train.table(RESULT)
    assert columns == [
        "net", "batch", "baseline", "tuned baseline", "ours", "ours / baseline", "ours / tuned", "of bf16 matmul",
        "/ float", "early crops",
    ]  # fmt: skip
    assert rows == [
        ["cnv", "128", "500", "1,000", "1,500", "3.00", "1.50", "66 %", "", ""],
        ["quant_cnv_w4a4", "128", "250", "625", "1,250", "5.00", "2.00", "55 %", "1.20", ""],
        ["resnet20", "256", "600", "1,200", "1,800", "3.00", "1.50", "47 %", "", "1.65 (24)"],
    ]
    section = train.section(RESULT)
    assert "A CPU, 2 threads, AVX512, torch 2.14.1; bf16 matmul 800 GFLOP/s" in section
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


def test_memory_is_that_of_a_process_which_loads_the_file(tmp_path: Path) -> None:
    """A graph with 32 MiB of weights needs as much more; one with none needs less than that."""
    grown = {}
    for mib in (1, 32):
        weights = np.ones((3 * 8 * 8, (mib << 20) // (4 * 3 * 8 * 8)), np.float32)
        graph = helper.make_graph(
            [helper.make_node("Flatten", ["image"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["y"])], "g",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 8, 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", weights.shape[1]])],
            [numpy_helper.from_array(weights, "w")],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
        grown[mib] = memory.peak_growth("onnxruntime", tmp_path / "m.onnx", 1, 1)
    assert None not in grown.values()
    assert 25 < grown[32] - grown[1] < 150, grown


def test_a_file_that_cannot_be_loaded_is_an_error_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(CnvzooError, match=r"memory of m\.onnx with onnxruntime: its process ended: .*(?i:protobuf)"):
        memory.peak_growth("onnxruntime", tmp_path / "m.onnx", 1, 1)


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


def test_the_figures_of_this_repository_are_of_the_current_recipes_and_checkpoints() -> None:
    outdated = train.outdated_training(shared.kept("train"), train.MODELS)
    outdated += infer.outdated_inference(shared.kept("infer"), infer.REQUIRED, read_index().checkpoints)
    assert not outdated, "\n".join(["the figures in benchmarks/speed are out of date:", *outdated])


RECIPE = """\
model: resnet20
dataset: cifar10
epochs: 3
batch_size: 96
optimizer: {lr: 0.1}
early_crops: {side: 20, epochs: 2}
"""


@pytest.fixture
def measured(tmp_path: Path) -> dict[str, Any]:
    """Figures of the recipe in `tmp_path`."""
    path = tmp_path / "cifar10_resnet20.yaml"
    path.write_text(RECIPE)
    figures = {"recipe": "cifar10_resnet20", "fingerprint": train.measured_recipe(load_recipe(path)).fingerprint()}
    return {"models": {"resnet20": {**figures, "batch_size": 96, "early_crops": 20}}}


def test_figures_of_the_current_recipes_are_not_outdated(measured: dict[str, Any], tmp_path: Path) -> None:
    assert train.outdated_training(measured, ["resnet20"], tmp_path) == []


def test_figures_of_a_changed_recipe_are_outdated(measured: dict[str, Any], tmp_path: Path) -> None:
    before = measured["models"]["resnet20"]["fingerprint"][:12]
    path = tmp_path / "cifar10_resnet20.yaml"
    path.write_text(RECIPE.replace("lr: 0.1", "lr: 0.2"))  # not measured: all programs have one optimizer
    assert train.outdated_training(measured, ["resnet20"], tmp_path) == []
    path.write_text(RECIPE + "schedule: {warmup_epochs: 2}\n")
    now = train.measured_recipe(load_recipe(path)).fingerprint()[:12]
    assert train.outdated_training(measured, ["resnet20"], tmp_path) == [
        f"train.json: resnet20: fingerprint is {now}..., and {before}... was measured: "
        "run python benchmarks/speed/train.py --keep"
    ]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"batch_size": 128}, "batch_size is 96, and 128 was measured"),
        ({"early_crops": None}, "early_crops is 20, and None was measured"),
        ({"recipe": "cifar10_cnv"}, "recipe is cifar10_resnet20, and cifar10_cnv was measured"),
    ],
)
def test_figures_of_another_recipe_are_outdated(
    measured: dict[str, Any], tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    measured["models"]["resnet20"].update(change)
    (found,) = train.outdated_training(measured, ["resnet20"], tmp_path)
    assert found == f"train.json: resnet20: {problem}: run python benchmarks/speed/train.py --keep"


def test_figures_that_do_not_state_their_recipe_are_outdated(measured: dict[str, Any], tmp_path: Path) -> None:
    del measured["models"]["resnet20"]["fingerprint"]
    (found,) = train.outdated_training(measured, ["resnet20"], tmp_path)
    assert "resnet20: fingerprint is not stated: run" in found
    (found,) = train.outdated_training({"models": {}}, ["resnet20"], tmp_path)
    assert "resnet20: was not measured: run" in found


PUBLISHED = {
    "cnv.cifar10": IndexEntry(
        model={"name": "cnv"},
        dataset="cifar10",
        correct=9_000,
        total=10_000,
        parameters=1,
        macs=1,
        files={"config.json": FileFacts("0" * 64, 1), "model.safetensors": FileFacts("a" * 64, 1)},
    )
}


def inferred(correct: int, *, runtime: str = "PyTorch float32", total: int = 10_000, sha: str = "a") -> dict[str, Any]:
    return {
        "checkpoints": {"cnv.cifar10": {"model.safetensors": 64 * sha}},
        "contenders": [
            {"runtime": runtime, "net": "cnv", "correct": correct, "total": total},
            {"runtime": "ONNX Runtime static PTQ int8", "net": "cnv", "correct": 8_000, "total": total},
        ],
    }


@pytest.mark.parametrize("correct", [8_995, 9_000, 9_005])
def test_figures_of_the_published_checkpoints_are_not_outdated(correct: int) -> None:
    names = ["cnv.cifar10", "quant_cnv_w8a8.cifar10"]  # the second is not published
    assert infer.outdated_inference(inferred(correct), names, PUBLISHED) == []


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        (inferred(9_000, sha="b"), "model.safetensors is aaaaaaaaaaaa..., and bbbbbbbbbbbb... was measured"),
        (inferred(9_000) | {"checkpoints": {}}, "model.safetensors is not stated"),
        (inferred(9_006), "PyTorch float32: 9,006 of 10,000 images are correct, published are 9,000 of 10,000"),
        (inferred(8_994), "PyTorch float32: 8,994 of 10,000 images are correct"),
        (inferred(900, total=1_000), "PyTorch float32: 900 of 1,000 images are correct"),
        (inferred(9_000, runtime="another"), "no runtime of PyTorch float32, "),
        ({"contenders": []}, "was not measured"),
    ],
)
def test_figures_of_other_checkpoints_are_outdated(result: dict[str, Any], problem: str) -> None:
    (found,) = infer.outdated_inference(result, ["cnv.cifar10"], PUBLISHED)
    assert found.startswith("infer.json: cnv.cifar10")
    assert problem in found
    assert found.endswith(": run python benchmarks/speed/infer.py --keep")


@pytest.mark.parametrize("name", ["train", "infer"])
def test_figures_page_and_plot_are_replaced_only_with_keep(
    name: str, tmp_path: Path, small_datasets, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_datasets(train=10, test=10)
    figures = shared.kept(name)
    figures["machine"]["name"] = "Another CPU"
    main = SCRIPTS[name].main
    monkeypatch.setattr(SCRIPTS[name], "measure", lambda *_, **__: figures)
    here = tmp_path / "speed"
    shutil.copytree(SPEED, here, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.setattr(shared, "HERE", here)

    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in here.iterdir()}

    before = content()
    assert main(["--json", str(tmp_path / "figures.json")]) == 0
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    assert content() == before
    (here / f"{name}.svg").unlink()
    assert main(["--keep"]) == 0
    after = content()
    assert after.keys() == before.keys()
    assert {file for file in before if after[file] != before[file]} >= {f"{name}.json", "README.md"}
    assert json.loads(after[f"{name}.json"]) == figures
    assert "Machine: Another CPU" in after["README.md"].decode()


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("train", ["--turns", "0"], "argument --turns: 0: must be a whole number above 0"),
        ("train", ["--seconds", "inf"], "argument --seconds: inf: must be a finite number above 0"),
        ("infer", ["--batches", "64", "-1"], "argument --batches: -1: must be a whole number above 0"),
        ("infer", ["--threads", "two"], "argument --threads: invalid int value: 'two'"),
    ],
)
def test_invalid_arguments_are_errors(
    name: str, arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        SCRIPTS[name].main(arguments)
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train", "infer"])
def test_a_path_that_cannot_be_written_is_an_error_before_anything_is_measured(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SCRIPTS[name], "measure", lambda *_, **__: pytest.fail("it was measured"))
    (tmp_path / "file").write_text("kept")
    with pytest.raises(SystemExit, match="2"):
        SCRIPTS[name].main(["--json", str(tmp_path / "file" / "figures.json")])
    assert f"--json {tmp_path / 'file' / 'figures.json'}: cannot be written: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["train", "infer"])
def test_a_failure_to_write_the_figures_is_one_line(
    name: str, tmp_path: Path, small_datasets, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_datasets(train=10, test=10)

    def measure(*_: object, **__: object) -> dict[str, Any]:
        (tmp_path / "figures.json").mkdir()  # meanwhile
        return shared.kept(name)

    monkeypatch.setattr(SCRIPTS[name], "measure", measure)
    assert SCRIPTS[name].main(["--json", str(tmp_path / "figures.json")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}.py: error: {tmp_path / 'figures.json'}: cannot be written: ")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On busy cores, threads of several processes that wait for each other take several times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_contender_trains(uncompiled: None, one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    crops = EarlyCrops(side=12, epochs=5)
    recipe = train.recipe_of("resnet20").model_copy(update={"batch_size": 16, "early_crops": crops})
    monkeypatch.setattr(train, "recipe_of", lambda model: recipe)
    monkeypatch.setattr(shared, "matmul_rate", lambda device: 1e11)
    result = train.measure(["resnet20"], torch.device("cpu"), images(320), turns=1, seconds=0.01)
    figures = result["models"]["resnet20"]
    rates = figures["images_per_second"]
    assert list(rates) == ["baseline", "tuned baseline", "ours", "ours, early crops"]
    # 40,813,184 multiply-accumulates, six operations each
    share = figures["share_of_matmul_peak"]
    assert share == pytest.approx(6 * 40_813_184 * rates["ours"] / result["matmul_peak"], rel=0.02, abs=1e-4)


def test_train_measures_what_the_recipes_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch size and early crops of each recipe, the batch size of its own for the float twin, medians over turns."""
    published = {
        "resnet20": {"batch_size": 96, "early_crops": EarlyCrops(side=20, epochs=2)},
        "quant_cnv_w4a4": {"batch_size": 48},
        "cnv": {"batch_size": 80},
    }
    recipes = {name: train.recipe_of(name).model_copy(update=changes) for name, changes in published.items()}
    monkeypatch.setattr(train, "recipe_of", recipes.__getitem__)
    started = []

    class Process:
        def __init__(self, program: str, recipe: Recipe, device: torch.device, data: Dataset) -> None:
            crops = recipe.early_crops
            started.append((program, recipe.tag, recipe.batch_size, crops.side if crops else None))
            self._rates = iter([len(started) * rate for rate in (10.0, 40.0, 20.0)])

        def __enter__(self) -> Process:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def wait(self) -> None:
            pass

        def take_turn(self, seconds: float) -> float:
            return next(self._rates)

    monkeypatch.setattr(train, "TrainingProcess", Process)
    monkeypatch.setattr(shared, "matmul_rate", lambda device: 1e12)
    result = train.measure(
        ["resnet20", "quant_cnv_w4a4"], torch.device("cpu"), images(10), turns=3, seconds=1.0, rest=0.0
    )
    models = result["models"]
    assert started == [
        ("baseline", "resnet20", 96, None),
        ("tuned baseline", "resnet20", 96, None),
        ("ours", "resnet20", 96, None),
        ("ours", "resnet20", 96, 20),
        ("baseline", "quant_cnv_w4a4", 48, None),
        ("tuned baseline", "quant_cnv_w4a4", 48, None),
        ("ours", "quant_cnv_w4a4", 48, None),
        ("ours", "cnv", 80, None),
    ]
    stated = {name: [found[key] for key in ("recipe", "batch_size", "early_crops")] for name, found in models.items()}
    assert stated == {"resnet20": ["cifar10_resnet20", 96, 20], "quant_cnv_w4a4": ["cifar10_quant_cnv_w4a4", 48, None]}
    assert all(models[name]["fingerprint"] == train.measured_recipe(recipes[name]).fingerprint() for name in models)
    assert models["resnet20"]["images_per_second"] == {
        "baseline": 20.0, "tuned baseline": 40.0, "ours": 60.0, "ours, early crops": 80.0,
    }  # fmt: skip
    assert list(models["quant_cnv_w4a4"]["images_per_second"])[3:] == ["ours, float twin"]
    assert models["resnet20"]["spread"]["ours"] == [30.0, 120.0]


def test_a_process_that_ends_is_an_error() -> None:
    recipe = train.recipe_of("resnet20").model_copy(update={"model": "resnet_of_no_depth"})
    with (
        baseline.TrainingProcess("baseline", recipe, torch.device("cpu"), images(1)) as process,
        pytest.raises(CnvzooError, match="baseline, resnet_of_no_depth: its process ended"),
    ):
        process.wait()


@pytest.mark.own_process
def test_every_runtime_gives_the_logits_of_the_model(
    small_datasets, make_checkpoint, tmp_path, monkeypatch, capsys
) -> None:
    """Files of one model in every runtime give its logits, up to a factor where they are integers."""
    small_datasets(train=128, test=50)
    hub = tmp_path / "hub"
    make_checkpoint(hub, "cnv", "cifar10")
    make_checkpoint(hub, "quant_cnv", "cifar10", w_bits=4, a_bits=4)
    monkeypatch.setenv("CNVZOO_HUB", str(hub))
    data = load_dataset("cifar10")
    # at half brightness on x86 without VNNI, where sums of 8-bit products may saturate
    shown = data.test_images[:8] if sums_products_exactly() else data.test_images[:8] // 2
    batch, calibration = (x.permute(0, 3, 1, 2).numpy() for x in (shown, data.train_images))
    printed: list[str] = []
    floats = list(contenders.float_contenders("cnv.cifar10", calibration, 1, tmp_path, printed.append))
    quantized = list(contenders.quantized_contenders("quant_cnv_w4a4.cifar10", 1, tmp_path))
    nncf = ["OpenVINO NNCF PTQ int8"] if find_spec("nncf") else []
    assert [c.runtime for c in floats] == [
        "PyTorch float32", "PyTorch float32, channels_last", "PyTorch bfloat16, channels_last",
        "torch.compile float32, channels_last", "ONNX Runtime float32", "ONNX Runtime static PTQ int8",
        "OpenVINO float32", *nncf,
    ]  # fmt: skip
    assert printed == ([] if nncf else ["nncf is not installed: OpenVINO NNCF PTQ int8 is left out"])
    assert [c.runtime for c in quantized] == [
        "Brevitas eager", "Brevitas QCDQ, ONNX Runtime", "Brevitas QCDQ, OpenVINO", "ours, ONNX Runtime",
        "ours QDQ, ONNX Runtime", "ours QDQ, OpenVINO", "ours QDQ, auto",
    ]  # fmt: skip
    for group in (floats, quantized):
        expected = group[0].run(group[0].prepare(batch))
        for contender in group:
            found = contender.run(contender.prepare(batch)).astype(np.float64)
            similarity = np.corrcoef(found.reshape(-1), expected.reshape(-1))[0, 1]
            # there ONNX Runtime's default kernels differ in Brevitas' graph at any brightness
            differs = contender.runtime == "Brevitas QCDQ, ONNX Runtime" and not sums_products_exactly()
            assert similarity > (0.95 if differs else 0.99), (contender.runtime, similarity)
            assert contender.bytes > 400_000
            assert (contender.file is None) == contender.runtime.startswith(("PyTorch", "torch", "Brevitas eager"))
    assert {c.file[0].stat().st_size for c in quantized[-3:] if c.file} == {quantized[-1].bytes}
    float_bytes = floats[4].bytes
    assert all(c.bytes < 0.3 * float_bytes for c in floats if "int8" in c.runtime)
    assert sys.modules["openvino_telemetry"] is None
    assert capsys.readouterr().out == ""


def test_a_package_that_is_missing_is_stated(make_checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "hub", "cnv", "cifar10")
    monkeypatch.setenv("CNVZOO_HUB", str(tmp_path / "hub"))
    monkeypatch.setattr(contenders, "quantize_with_onnxruntime", lambda path, to, images: shutil.copy(path, to))
    monkeypatch.setitem(sys.modules, "openvino", None)
    printed: list[str] = []
    images = np.zeros((1, 3, 32, 32), np.uint8)
    *_, found = contenders.float_contenders("cnv.cifar10", images, 1, tmp_path, printed.append)
    assert found.runtime == "ONNX Runtime static PTQ int8"
    assert printed == ["openvino is not installed: its contenders are left out"]


def test_infer_measures_what_is_published(small_datasets, make_checkpoint, tmp_path, monkeypatch, capsys) -> None:
    small_datasets(train=64, test=20)
    hub = tmp_path / "hub"
    folders = [
        make_checkpoint(hub, "cnv", "cifar10"), make_checkpoint(hub, "quant_resnet20", "cifar10", w_bits=4, a_bits=4)
    ]  # fmt: skip
    monkeypatch.setenv("CNVZOO_HUB", str(hub))
    monkeypatch.setattr(infer, "float_contenders", lambda *given: islice(contenders.float_contenders(*given), 3))
    names = [f"{net}.cifar10" for net in ("cnv", "quant_cnv_w4a4", "resnet20", "quant_resnet20_w4a4")]
    result = infer.measure(names, [1, 8], load_dataset("cifar10"), turns=1, seconds=0.001)
    printed = capsys.readouterr()
    for name in ("quant_cnv_w4a4", "resnet20"):
        assert f"{name}.cifar10 is not published yet: left out" in printed.err
    assert result["macs"] == {"cnv": 59_461_376, "quant_resnet20_w4a4": 40_813_184}
    assert printed.out == ""
    assert result["checkpoints"] == {
        folder.name: {"model.safetensors": sha256_of(folder / "model.safetensors")} for folder in folders
    }
    assert [row["net"] for row in result["contenders"]] == ["cnv"] * 3 + ["quant_resnet20_w4a4"] * 4
    for row in result["contenders"]:
        assert row["total"] == 20
        assert row["agreeing"] >= (20 if row["runtime"] == "PyTorch float32" else 19)
        assert f"{row['runtime']}: {row['correct']} of 20 correct, {row['agreeing']} as in PyTorch" in printed.err
        assert list(row["milliseconds"]) == ["1", "8"]
        assert all(least <= row["milliseconds"][b] <= most for b, (least, most) in row["spread"].items())


def test_nets_that_are_not_published_are_an_error(small_datasets, make_checkpoint, tmp_path, monkeypatch) -> None:
    small_datasets(train=64, test=20)
    make_checkpoint(tmp_path, "cnv", "cifar10")
    monkeypatch.setenv("CNVZOO_HUB", str(tmp_path))
    with pytest.raises(CnvzooError, match=r"^none of resnet20\.cifar10 is published$"):
        infer.measure(["resnet20.cifar10"], [1], load_dataset("cifar10"), turns=1, seconds=0.001)


def test_the_figures_of_one_net_are_kept_beside_those_of_the_others(
    tmp_path: Path, small_datasets, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They must be of the same machine, versions and batches, and take the place that the old ones had."""
    small_datasets(train=10, test=10)
    kept = shared.kept("infer")
    name = "quant_cnv_w4a4.cifar10"
    old = [row for row in kept["contenders"] if row["net"] == "quant_cnv_w4a4"]
    rows = [row | {"correct": row["correct"] - 1} for row in old]
    new = kept | {"checkpoints": {name: {"model.safetensors": "0" * 64}}, "contenders": rows}
    measured = []
    monkeypatch.setattr(infer, "measure", lambda names, *_, **__: measured.append(names) or new)
    here = tmp_path / "speed"
    shutil.copytree(SPEED, here, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.setattr(shared, "HERE", here)
    machine = {"kind": "cpu", "name": "Another CPU", "threads": 4, "capability": "AVX2"}
    for facts, problem in (
        ({"machine": machine}, "and this is Another CPU, 4 threads, AVX2: name no net, which measures all again"),
        ({"versions": kept["versions"] | {"torch": "3.0"}}, "are of other versions of torch: name no net"),
    ):
        monkeypatch.setattr(shared, "describe_machine", lambda _, f=kept | facts: f["machine"])
        monkeypatch.setattr(shared, "versions", lambda *_, f=kept | facts: f["versions"])
        with pytest.raises(SystemExit, match="2"):
            infer.main([name, "--keep"])
        assert problem in capsys.readouterr().err
    monkeypatch.setattr(shared, "versions", lambda *_: kept["versions"])
    with pytest.raises(SystemExit, match="2"):
        infer.main([name, "--keep", "--batches", "1"])
    assert "are of batches of 1, 64, 256 images: name no net" in capsys.readouterr().err
    assert shared.kept("infer") == kept
    assert measured == []

    # another build of the same version of torch is not another machine
    monkeypatch.setattr(shared, "describe_machine", lambda _: kept["machine"] | {"torch": "another build"})
    assert infer.main([name, "--keep"]) == 0
    assert measured == [[name]]
    after = shared.kept("infer")
    assert after["checkpoints"] == kept["checkpoints"] | {name: {"model.safetensors": "0" * 64}}
    assert list(after["checkpoints"]) == list(kept["checkpoints"])
    assert [row["correct"] for row in after["contenders"]] == [
        row["correct"] - (row["net"] == "quant_cnv_w4a4") for row in kept["contenders"]
    ]
    with pytest.raises(SystemExit, match="2"):
        infer.main(["quant_cnv_w3a3.cifar10"])
    assert "quant_cnv_w3a3.cifar10 is not among those measured: cnv.cifar10, " in capsys.readouterr().err


def test_a_batch_of_more_images_than_there_are_is_an_error(small_datasets) -> None:
    small_datasets(train=64, test=20)
    with pytest.raises(CnvzooError, match="--batches 21: there are 20 test images"):
        infer.measure(["cnv.cifar10"], [1, 21], load_dataset("cifar10"), turns=1, seconds=0.001)
