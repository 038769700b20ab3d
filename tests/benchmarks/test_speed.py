"""The speed benchmarks of training and inference: they compare the same networks, and refuse what is wrong."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import baseline
import contenders
import infer
import memory
import numpy as np
import pytest
import shared
import torch
import train
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from workbench import SPEED

from cnvzoo.data import Dataset, dataset_info, load_dataset
from cnvzoo.errors import CnvzooError
from cnvzoo.files import sha256_of
from cnvzoo.training import EarlyCrops, Recipe
from cnvzoo_runtime.graphs import sums_products_exactly

SCRIPTS = {"train": train, "infer": infer}


def images(n: int) -> Dataset:
    info = replace(dataset_info("cifar10"), train_size=n, test_size=10)
    train, test = (torch.randint(256, (k, 32, 32, 3), dtype=torch.uint8) for k in (n, 10))
    return Dataset(info, train, torch.arange(n).to(torch.uint8) % 10, test, torch.arange(10).to(torch.uint8))


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_tuned_baseline_and_the_matrix_product_have_the_dtype_of_training(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 takes ten times as long as float32 on a CPU without kernels for it."""
    seen: list[torch.dtype] = []
    for module in (baseline, shared):
        monkeypatch.setattr(module, "training_dtype", lambda device: dtype)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    net.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    batches: Any = [(torch.rand(4, 3, 2, 2), torch.arange(4))]
    for tuned in (True, False):
        next(baseline.training(net, batches, torch.device("cpu"), tuned=tuned))
    assert seen == [dtype, torch.float32]
    product = torch.mm
    monkeypatch.setattr(shared, "_SIZES", {"cpu": 8})
    monkeypatch.setattr(torch, "mm", lambda a, b: (seen.extend((a.dtype, b.dtype)), product(a, b))[1])
    assert shared.matmul_rate(torch.device("cpu"), repeats=1) > 0
    assert set(seen[2:]) == {dtype}


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
@pytest.mark.filterwarnings("ignore:.*can saturate in OpenVINO:UserWarning")  # x86 without VNNI, see below
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


@pytest.mark.filterwarnings("ignore:.*can saturate in OpenVINO:UserWarning")
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
