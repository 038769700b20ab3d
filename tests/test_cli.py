"""The command line: its output, exit statuses and error messages."""

from __future__ import annotations

import errno
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points, version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cnvzoo.checkpoints.index import list_checkpoints
from cnvzoo.checkpoints.publish import write_card
from cnvzoo.checkpoints.verify import verify
from cnvzoo.cli import main
from cnvzoo.cli.options import LARGEST
from cnvzoo.cli.output import print_json
from cnvzoo.data import Preprocessing, published
from cnvzoo.data.published import list_datasets
from cnvzoo.errors import CnvzooError, DatasetError, ModelError, in_a_line
from cnvzoo.files import sha256_of
from cnvzoo.models import classifier
from cnvzoo.models.registry import unregister_model
from cnvzoo.train_and_save import save_checkpoint
from cnvzoo.training import Recipe, RunRecord
from cnvzoo.zoo import create_model, list_models

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


class TestHelp:
    @pytest.mark.parametrize("command", ["list", "info", "train", "eval", "verify", "publish", "predict"])
    def test_the_help_of_every_command_has_an_example(self, cnvzoo, command, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        result = cnvzoo(command, "--help")
        assert result.status == 0
        assert f"Example: cnvzoo {command}" in result.said

    def test_version(self, cnvzoo):
        result = cnvzoo("--version")
        assert (result.status, result.out) == (0, f"cnvzoo {version('cnvzoo')}\n")

    @pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("list", "--checkpoints")])
    def test_commands_that_list_do_not_import_torch(self, arguments):
        code = f"""
import sys
from cnvzoo.checkpoints.index import list_checkpoints
from cnvzoo.cli import main
from cnvzoo.cli.options import MODELS
sys.argv = {["cnvzoo", *arguments]!r}
try:
    main()
except SystemExit as end:
    assert not end.code
assert not {{"torch", "numpy"}} & sys.modules.keys()
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "cnvzoo" in done.stdout or "quant_cnv" in done.stdout

    def test_no_command_shows_the_help(self, cnvzoo):
        said = cnvzoo().said
        assert all(command in said for command in ("list", "info", "train", "eval", "verify", "publish", "predict"))

    def test_an_unknown_command_is_a_usage_error(self, cnvzoo):
        result = cnvzoo("trian")
        assert result.status == 2
        assert "trian" in result.err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["trian"], "error: No such command 'trian'"),
            (["verify"], "error: Invalid value: give names of checkpoints, or --all: cnvzoo verify --help"),
            (["info"], "error: Missing argument"),
            (["list", "--bits", "4/4"], "error: Invalid value: --bits selects checkpoints: give --checkpoints too"),
            (["info", "quant_cnv", "--w-bits", "9", "--a-bits", "4"], "error: Invalid value for '--w-bits'"),
        ],
    )
    def test_usage_errors_are_one_line(self, cnvzoo, arguments, message):
        result = cnvzoo(*arguments)
        assert (result.status, result.out) == (2, "")
        (line,) = result.err.splitlines()
        assert line.startswith(message)
        assert line.endswith("--help shows the usage")


class TestList:
    def test_piped_output_has_every_model_and_number(self, cnvzoo):
        result = cnvzoo("list")
        assert result.status == 0
        lines = result.out.splitlines()
        for name in list_models():
            assert any(name in line for line in lines), name
        # from the table of topologies
        assert "466,906" in next(line for line in lines if "resnet32" in line)
        assert "3,217,226" in next(line for line in lines if "mobilenet_v1" in line)

    def test_a_narrow_terminal_does_not_cut_numbers(self, cnvzoo, monkeypatch):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", "80")
        said = cnvzoo("list", "mobilenet*").said
        assert "mobilenet_v1" in said
        assert "3,217,226" in said

    @pytest.mark.parametrize("arguments", [(), ("--checkpoints",)])
    def test_piped_output_is_plain_columns(self, cnvzoo, arguments, monkeypatch):
        monkeypatch.setenv("FORCE_COLOR", "1")  # as many CI services do
        monkeypatch.setenv("COLUMNS", "40")
        out = cnvzoo("list", *arguments).out
        assert out.isascii()
        assert all(line == line.rstrip() for line in out.splitlines())
        first, *rows = (line.split() for line in out.splitlines())
        assert first[0] in ("model", "checkpoint")
        listed = [found["name"] for found in list_checkpoints()] if arguments else list_models()
        assert [row[0] for row in rows] == listed

    @pytest.mark.parametrize("columns", [80, 40])
    def test_no_name_is_cut_in_a_narrow_terminal(self, cnvzoo, monkeypatch, columns):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(columns))
        words = cnvzoo("list", "--checkpoints").out.split()
        for found in list_checkpoints():
            assert found["name"] in words
            assert f"{found['bytes']:,}" in words

    def test_json(self, cnvzoo):
        (found,) = json.loads(cnvzoo("list", "resnet20", "--json").out)
        assert found == {
            "name": "resnet20", "summary": "CIFAR ResNet of 20 layers (He et al. 2015, section 4.2)",
            "input_shape": [3, 32, 32], "parameters": 272_474, "macs": 40_813_184, "weight_bytes": 1_083_584,
            "w_bits": None, "a_bits": None,
        }  # fmt: skip
        assert json.loads(cnvzoo("list", "--checkpoints", "--json").out) == list_checkpoints()

    def test_pattern(self, cnvzoo):
        out = cnvzoo("list", "resnet?0").out
        assert "resnet20" in out
        assert "resnet110" not in out
        assert "cnv" not in out

    def test_no_match(self, cnvzoo):
        result = cnvzoo("list", "vgg*")
        assert (result.status, result.out) == (1, "")
        assert result.err.startswith("error: no model matches 'vgg*'")


class TestImport:
    """--import of files and modules that register models."""

    OWN = """
import cnvzoo
from neighbour import layers

@cnvzoo.register_model("own_net", summary="of the test")
def build(num_classes, in_chans, width=4):
    return layers(in_chans * 64, num_classes)
"""
    NEIGHBOUR = """
from torch import nn

def layers(inputs, outputs):
    return nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(inputs, outputs))
"""

    @pytest.fixture
    def own(self, tmp_path) -> Iterator[Path]:
        (folder := tmp_path / "own").mkdir()
        (folder / "neighbour.py").write_text(self.NEIGHBOUR)
        (folder / "own_models.py").write_text(self.OWN)
        before = set(sys.modules)
        yield folder / "own_models.py"
        for name in set(sys.modules) - before:
            if getattr(sys.modules[name], "__file__", "").startswith(str(tmp_path)):
                del sys.modules[name]
        if list_models("own_net"):
            unregister_model("own_net")

    def test_a_file(self, cnvzoo, own, small_datasets, recipe, tmp_path):
        (found,) = json.loads(cnvzoo("list", "own_*", "--json", "--import", own).out)
        assert (found["name"], found["parameters"]) == ("own_net", 3 * 64 * 10 + 10)
        unregister_model("own_net")
        assert "parameters 650" in cnvzoo("info", "own_net.mnist", "--import", "own/own_models.py").said
        small_datasets(train=64, test=10)
        result = cnvzoo("train", recipe("own_net"), "--import", own, "--device", "cpu", "--run-dir", "run")
        assert result.status == 0, result.err
        assert RunRecord.read(tmp_path / "run" / "record.json").total == 10

    def test_a_module_of_this_folder(self, cnvzoo, own, monkeypatch):
        monkeypatch.chdir(own.parent)
        assert "own_net" in cnvzoo("list", "own_*", "--import", "own_models").out

    @pytest.mark.parametrize("source", ["own_models.py", "own_models"])
    def test_a_neighbour_that_is_imported_when_the_model_is_built(self, cnvzoo, own, monkeypatch, source):
        monkeypatch.chdir(own.parent)
        imports = "from neighbour import layers"
        text = self.OWN.replace(f"{imports}\n", "").replace("    return", f"    {imports}\n    return")
        own.write_text(text)
        before = list(sys.path)
        result = cnvzoo("info", "own_net", "--import", source)
        assert (result.status, result.err) == (0, "")
        assert sys.path == [*before, str(own.parent)]

    @pytest.mark.parametrize("source", ["own_models.py", "own_models"])
    def test_an_entry_of_the_path_that_was_there_before_stays(self, cnvzoo, own, monkeypatch, source):
        monkeypatch.chdir(own.parent)
        sys.path.insert(1, str(own.parent))
        before = list(sys.path)
        assert cnvzoo("list", "own_*", "--import", source).status == 0
        assert sys.path == before

    @pytest.mark.parametrize(
        ("lines", "says"),
        [
            (["import cnvzoo", "x = y"], "2: NameError: name 'y' is not defined"),
            (["def f(:"], "1: SyntaxError: invalid syntax"),
            (["", "import no_such_module"], "2: ModuleNotFoundError: No module named 'no_such_module'"),
            (["import sys", "sys.exit(3)"], "2: SystemExit: 3"),
            (
                ["import cnvzoo", "cnvzoo.register_model('cnv', summary='')(lambda: None)"],
                "2: ValueError: model 'cnv' is registered already: choose another name, "
                "or call unregister_model('cnv') first",
            ),
        ],
    )
    @pytest.mark.parametrize("name", ["broken.py", "broken"])
    def test_a_mistake_is_named_with_file_and_line(self, cnvzoo, lines, says, name):
        Path("broken.py").write_text("\n".join(lines) + "\n")
        result = cnvzoo("list", "--import", name)
        assert (result.status, result.out, result.err) == (1, "", f"error: --import broken.py:{says}\n")
        assert "broken" not in sys.modules

    @pytest.mark.parametrize(
        ("lines", "says"),
        [
            (["", "raise RuntimeError('no GPU')"], "2: RuntimeError: no GPU"),
            (["import sys", "sys.exit(3)"], "2: SystemExit: 3"),
            (["def f(:"], "1: SyntaxError: invalid syntax"),
            (["import no_such_module"], "1: ModuleNotFoundError: No module named 'no_such_module'"),
        ],
    )
    def test_a_mistake_in_the_package_of_a_module(self, cnvzoo, lines, says):
        Path("package").mkdir()
        Path("package", "__init__.py").write_text("\n".join(lines) + "\n")
        result = cnvzoo("list", "--import", "package.module")
        assert (result.status, result.out, result.err) == (1, "", f"error: --import package/__init__.py:{says}\n")

    def test_a_mistake_that_shows_when_the_model_is_built(self, cnvzoo, own):
        own.write_text(self.OWN.replace("in_chans * 64", "undefined"))
        result = cnvzoo("info", "own_net", "--import", own)
        assert (result.status, result.out) == (1, "")
        assert result.err == "error: own/own_models.py:7: NameError: name 'undefined' is not defined\n"

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("no/file.py", "no such file: give a Python file, or the name of a module"),
            ("nothing", "no such module: give its name as in an import, or a Python file"),
            ("nothing.inside", "ModuleNotFoundError: No module named 'nothing'"),
        ],
    )
    def test_what_is_not_there(self, cnvzoo, name, says):
        path = list(sys.path)
        result = cnvzoo("list", "--import", name)
        assert (result.status, result.err) == (1, f"error: --import {name}: {says}\n")
        assert sys.path == path


class TestCompletion:
    @pytest.mark.parametrize(
        ("typed", "completed"),
        [
            ("info quant_cnv_w4", {f"quant_cnv_w4a4.{name}" for name in list_datasets()}),
            ("info resnet11", {"resnet110", "resnet110.cifar10", "resnet110.cifar100"}),
            ("eval cnv.m", {"cnv.mnist"}),
            ("predict photo.png --checkpoint cnv.m", {"cnv.mnist"}),
            ("train mnist_quant_cnv_w4", {"mnist_quant_cnv_w4a4"}),
            ("list --checkpoints --dataset mn", {"mnist"}),
        ],
    )
    def test_names(self, cnvzoo, monkeypatch, typed, completed):
        monkeypatch.setenv("_CNVZOO_COMPLETE", "complete_fish")
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", f"cnvzoo {typed}")
        published = {found["name"] for found in list_checkpoints()}
        assert set(cnvzoo().out.split()) == {n for n in completed if "." not in n or n in published}

    def test_completing_does_not_import_torch_and_knows_every_model(self):
        code = """
import sys
from cnvzoo.cli.options import MODELS, checkpoint_names, dataset_names, model_names, recipe_names
assert model_names("resnet1") and checkpoint_names("cnv") and recipe_names("mnist") and dataset_names("mnist")
assert not {"torch", "numpy"} & sys.modules.keys()
import cnvzoo
assert list(MODELS) == cnvzoo.list_models()
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def test_the_script_for_a_shell(self, cnvzoo, monkeypatch):
        monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # the shell that runs the tests varies
        result = cnvzoo("--show-completion", "bash")
        assert result.status == 0, result.err
        assert "complete -o default -F _cnvzoo_completion cnvzoo" in result.out


class TestInfo:
    def test_float(self, cnvzoo):
        said = cnvzoo("info", "resnet20", "--num-classes", 10).said
        assert "parameters 272,474" in said
        assert "input 3 x 32 x 32" in said

    @pytest.mark.parametrize(
        "command",
        [
            ("info", "cnv", "--num-classes", 10**18),
            ("info", "cnv", "--in-chans", 10**18),
            ("info", "cnv", "--input-size", 10**10),
            ("eval", "cnv.mnist", "--threads", 5 * 10**9),
        ],
    )
    def test_numbers_beyond_any_memory_are_refused(self, cnvzoo, command):
        option = command[2]
        most = 4096 if option == "--threads" else LARGEST[option.removeprefix("--").replace("-", "_")]
        result = cnvzoo(*command)
        assert result.status == 2
        said = " ".join(result.said.replace("│", " ").split())
        assert f"Invalid value for '{option}': Input should be less than or equal to {most}" in said
        assert classifier.LARGEST == LARGEST

    def test_weight_bytes_follow_the_bit_width(self, cnvzoo):
        def weight_bytes(bits: int) -> int:
            result = cnvzoo("info", "quant_cnv", "--w-bits", bits, "--a-bits", 4)
            assert result.status == 0
            return int(result.said.split("weight bytes")[1].split()[0].replace(",", ""))

        # all weights but the first layer's 3 * 3 * 3 * 64, which have 8 bits
        rest = sum(p.numel() for p in create_model("cnv").parameters() if p.dim() > 1) - 1728
        assert weight_bytes(8) == 1728 + rest
        assert weight_bytes(2) == 1728 + rest // 4

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("quant_cnv_w4a2", ("quant_cnv", "--w-bits", 4, "--a-bits", 2)),
            ("quant_cnv_w4a2.cifar100", ("quant_cnv", "--w-bits", 4, "--a-bits", 2, "--num-classes", 100)),
            ("resnet32.mnist", ("resnet32", "--in-chans", 1)),
        ],
    )
    def test_names_with_bit_widths_and_datasets(self, cnvzoo, name, options):
        result = cnvzoo("info", name)
        assert result.status == 0
        assert result.out == cnvzoo("info", *options).out

    @pytest.mark.parametrize("name", ["resnet20.mnist", "hub/resnet20.mnist"])
    def test_a_checkpoint(self, cnvzoo, make_checkpoint, tmp_path, name):
        folder = make_checkpoint(tmp_path / "hub", "resnet20", "mnist")
        size = (folder / "model.safetensors").stat().st_size
        assert cnvzoo("info", name).said.endswith(
            f"checkpoint resnet20.mnist accuracy 10.00 % (5 of 50 test images) bytes of the file {size:,}"
        )
        found = json.loads(cnvzoo("info", name, "--json").out)
        assert (found["name"], found["input_shape"], found["w_bits"]) == ("resnet20", [1, 28, 28], None)
        other = json.loads(cnvzoo("info", name, "--num-classes", "7", "--json").out)
        assert other["checkpoint"] is None  # its accuracy and bytes are of another network
        (listed,) = json.loads(cnvzoo("list", "--checkpoints", "--json").out)
        assert {key: found[key] for key in ("parameters", "macs")} == {
            key: listed[key] for key in ("parameters", "macs")
        }
        assert json.loads(cnvzoo("info", name, "--input-size", 32, "--json").out)["input_shape"] == [1, 32, 32]
        assert found["checkpoint"] == {
            "name": "resnet20.mnist", "dataset": "mnist", "accuracy": 10.0, "correct": 5, "total": 50, "bytes": size,
        }  # fmt: skip

    def test_a_checkpoint_of_ones_own_of_any_name(self, cnvzoo, tmp_path):
        model, preprocessing = create_model("resnet20", in_chans=1), Preprocessing(20, (0.5,), (0.25,))
        save_checkpoint(model, tmp_path / "hub" / "mine", preprocessing=preprocessing)
        result = cnvzoo("info", "mine", "--hub", "hub")
        assert (result.status, result.err) == (0, "")
        assert "input 1 x 20 x 20" in result.said
        assert "checkpoint mine" in result.said

    def test_a_folder_without_a_separator_is_named(self, cnvzoo, tmp_path):
        save_checkpoint(
            create_model("cnv"), tmp_path / "my_model", preprocessing=Preprocessing(32, (0.0,) * 3, (1.0,) * 3)
        )
        hint = "there is a folder of that name: write './my_model'"
        assert cnvzoo("info", "my_model").err == f"error: unknown model 'my_model': {hint}\n"
        with pytest.raises(ModelError, match=f"^unknown model 'my_model': {hint}$"):
            create_model("my_model", pretrained=True)
        missing = f"error: no checkpoint 'my_model', neither published nor in {tmp_path}/hub: {hint}\n"
        for command in (("eval", "my_model"), ("verify", "my_model")):
            assert cnvzoo(*command, "--hub", tmp_path / "hub").err == missing
        result = cnvzoo("publish", "my_model", "--to", "store", "--hub", tmp_path / "hub")
        assert result.err == f"error: no checkpoint 'my_model' in {tmp_path}/hub: {hint}\n"
        assert cnvzoo("info", "./my_model").status == 0

    def test_a_checkpoint_of_ones_own_with_a_damaged_config(self, cnvzoo, tmp_path):
        (config := tmp_path / "hub" / "resnet20.own" / "config.json").parent.mkdir(parents=True)
        config.write_text("{}")
        result = cnvzoo("info", "resnet20.own", "--hub", "hub")
        assert result.status == 1
        assert result.err.startswith("error: hub/resnet20.own/config.json: not a valid checkpoint config")

    def test_unknown_model(self, cnvzoo):
        result = cnvzoo("info", "qant_cnv", "--w-bits", 2, "--a-bits", 2)
        assert result.status == 1
        assert "did you mean 'quant_cnv'" in result.err
        assert "Traceback" not in result.err

    @pytest.mark.parametrize(
        ("arguments", "status", "words"),
        [
            (("quant_cnv",), 1, "needs w_bits"),
            (("cnv", "--w-bits", 4, "--a-bits", 4), 1, "use 'quant_cnv'"),
            (("quant_cnv", "--w-bits", 9, "--a-bits", 4), 2, "--w-bits"),
            (("cnv", "--input-size", 28), 1, "32x32"),
            (("quant_cnv_w4a4", "--w-bits", 2), 1, "leave --w-bits out, or the bits in the name"),
            (("cnv.mnits",), 1, "did you mean 'mnist'"),
            (("no/such/folder",), 1, "no/such/folder/config.json"),
        ],
    )
    def test_invalid_arguments(self, cnvzoo, arguments, status, words):
        result = cnvzoo("info", *arguments)
        assert result.status == status
        assert words in result.said
        assert "Traceback" not in result.err


@pytest.mark.usefixtures("uncompiled")
class TestTrain:
    @pytest.mark.parametrize(
        ("arguments", "folder"),
        [
            ((), "runs/mnist_resnet20/seed0"),
            (("--seed", 3), "runs/mnist_resnet20/seed3"),
            (("--epochs", 2), "runs/mnist_resnet20/seed0"),
            (("--epochs", 1), "runs/trials/mnist_resnet20/seed0-1epochs"),
            (("--epochs", 5, "--seed", 1), "runs/trials/mnist_resnet20/seed1-5epochs"),
            (("--holdout", 20), "runs/trials/mnist_resnet20/seed0-holdout20"),
            (("--epochs", 1, "--holdout", 20), "runs/trials/mnist_resnet20/seed0-1epochs-holdout20"),
            (("--dataset", "mnist"), "runs/mnist_resnet20/seed0"),
            (("--dataset", "fashion_mnist"), "runs/mnist_resnet20-on-fashion_mnist/seed0"),
            (("--dataset", "./my photos/", "--epochs", 1), "runs/trials/mnist_resnet20-on-my_photos/seed0-1epochs"),
            (("--start", "resnet20.mnist"), "runs/mnist_resnet20-from-resnet20.mnist/seed0"),
        ],
    )
    def test_trials_and_other_images_or_starts_have_own_folders(self, cnvzoo, recipe, monkeypatch, arguments, folder):
        asked: list[Path] = []

        def train(*_: object, run_dir: Path, **__: object) -> None:
            asked.append(run_dir)
            raise CnvzooError("stopped by the test")

        monkeypatch.setattr(sys.modules["cnvzoo"], "train", train)
        assert "stopped by the test" in cnvzoo("train", recipe(), *arguments).said
        assert asked == [Path(folder)]

    @pytest.mark.filterwarnings("default")
    def test_a_teacher_of_another_dataset_is_left_out_with_a_line(self, cnvzoo, recipe, monkeypatch):
        def run_recipe(wanted: Recipe, **_: object) -> None:
            raise CnvzooError(f"teachers {wanted.teacher}, float start {wanted.float_start}")

        monkeypatch.setattr("cnvzoo.train_and_save.run_recipe", run_recipe)
        result = cnvzoo("train", "cifar10_quant_cnv_w4a4", "--dataset", "cifar100")
        assert result.err.splitlines() == [
            "warning: cifar10_quant_cnv_w4a4: trains on cifar100 without float_start cifar10_cnv and teacher "
            "cifar10_cnv, of cifar10",
            "error: teachers (), float start None",
        ]

    def test_a_run_writes_its_record(self, cnvzoo, recipe, small_datasets, tmp_path):
        small_datasets()
        result = cnvzoo("train", recipe(), "--device", "cpu")
        assert result.status == 0
        record = RunRecord.read(tmp_path / "runs" / "mnist_resnet20" / "seed0" / "record.json")
        assert (record.trial, record.total) == (False, 50)
        assert result.out.startswith(f"mnist_resnet20, seed 0: {record.accuracy:.2f} % on the test set of mnist")
        assert "runs/mnist_resnet20/seed0" in result.out

    def test_a_run_stopped_at_the_time_limit_resumes(self, cnvzoo, recipe, small_datasets, tmp_path):
        small_datasets()
        path = recipe()
        train = ("train", path, "--device", "cpu", "--run-dir")
        assert cnvzoo(*train, "whole").status == 0

        stopped = cnvzoo(*train, "parts", "--time-limit", 0)
        assert stopped.status == 3
        assert "resumes there" in stopped.err
        assert not (tmp_path / "parts" / "record.json").exists()
        assert cnvzoo(*train, "parts").status == 0
        weights = "weights.safetensors"
        assert sha256_of(tmp_path / "parts" / weights) == sha256_of(tmp_path / "whole" / weights)

    def test_holdout_scores_on_training_images(self, cnvzoo, recipe, small_datasets, tmp_path):
        small_datasets()
        options = ("--epochs", 1, "--holdout", 40, "--seed", 7, "--device", "cpu")
        result = cnvzoo("train", recipe(), *options)
        assert result.status == 0
        assert "on 40 held-out training images, a trial" in result.out
        record = RunRecord.read(
            tmp_path / "runs" / "trials" / "mnist_resnet20" / "seed7-1epochs-holdout40" / "record.json"
        )
        assert (record.seed, record.holdout, record.total, record.trial) == (7, 40, 40, True)

    def test_watching(self, cnvzoo, recipe, small_datasets, tmp_path):
        small_datasets(train=64, test=10)
        before = torch.get_num_threads()
        watched = ("--holdout", 20, "--validate", 10, "--log", "log.csv", "--threads", before + 1, "--run-dir", "run")
        result = cnvzoo("train", recipe(), "--device", "cpu", *watched)
        assert result.status == 0, result.err
        record = RunRecord.read(tmp_path / "run" / "record.json")
        assert record.device["threads"] == before + 1
        assert torch.get_num_threads() == before
        accuracies = [epoch["validation_accuracy"] for epoch in record.history]
        lines = (tmp_path / "log.csv").read_text().splitlines()
        assert [float(line.split(",")[-1]) for line in lines[1:]] == accuracies
        assert f"validation {accuracies[-1]:.2f} %" in result.err

    def test_validation_without_held_out_images(self, cnvzoo, recipe):
        result = cnvzoo("train", recipe(), "--validate", 10)
        assert result.status == 1
        assert "validate=10 needs held-out images" in result.err
        assert "give holdout=10 too" in result.err

    @pytest.mark.parametrize("seed", [-1, 2**63])
    def test_a_seed_out_of_range(self, cnvzoo, recipe, seed, tmp_path):
        result = cnvzoo("train", recipe(), "--seed", seed)
        assert result.status == 1
        said = f"seed={seed}: a seed is a whole number from 0 to 9223372036854775807 (2**63 - 1)"
        assert result.err == f"error: mnist_resnet20: {said}\n"
        assert not (tmp_path / "runs").exists()

    def test_a_recipe_that_does_not_fit_the_images(self, cnvzoo, recipe):
        result = cnvzoo("train", recipe("cnv", "augmentation: {cutout: 33}"))
        assert result.status == 1
        assert "augmentation.cutout: 33: must be at most 32, the side of the images" in result.err
        assert "Traceback" not in result.err

    def test_a_holdout_of_all_images(self, cnvzoo, recipe, small_datasets):
        small_datasets()
        result = cnvzoo("train", recipe(), "--holdout", 300)
        assert result.status == 1
        assert "holdout(300): mnist has 300 training images" in result.err
        assert "expected a whole number from 1 to 299" in result.err
        assert "Traceback" not in result.err

    @pytest.mark.parametrize(("purpose", "says"), [("float_start", "starts from"), ("teacher", "learns from")])
    def test_weights_that_a_recipe_needs(self, cnvzoo, recipe, small_datasets, purpose, says):
        small_datasets(train=64, test=10)
        one_epoch = ("--epochs", 1, "--device", "cpu", "--run-dir")
        assert cnvzoo("train", recipe("cnv", "schedule: {warmup_epochs: 0}"), *one_epoch, "cnv").status == 0
        quant = recipe("quant_cnv", "w_bits: 4", "a_bits: 4", f"{purpose}: mnist_cnv")

        refused = cnvzoo("train", quant, *one_epoch, "quant")
        assert refused.status == 1
        assert f"{says} the weights of mnist_cnv" in refused.err
        weights = Path("cnv") / "weights.safetensors"
        option = "--" + purpose.replace("_", "-")
        assert cnvzoo("train", quant, *one_epoch, "quant", option, weights).status == 0
        facts = getattr(RunRecord.read(Path("quant") / "record.json"), purpose)
        assert facts["weights_sha256"] == sha256_of(weights)

    @pytest.mark.parametrize("purpose", ["float_start", "teacher"])
    def test_a_checkpoint_as_float_start_or_teacher(
        self, cnvzoo, recipe, small_datasets, make_checkpoint, monkeypatch, tmp_path, purpose
    ):
        small_datasets(train=64, test=10)
        folder = make_checkpoint(tmp_path / "hub", "cnv", "mnist")
        recipe("cnv")
        path = recipe("quant_cnv", "w_bits: 4", "a_bits: 4", f"{purpose}: mnist_cnv")
        asked: list[dict[str, object]] = []

        def run_recipe(*_: object, **arguments: object) -> None:
            asked.append(arguments)
            raise CnvzooError("stopped by the test")

        monkeypatch.setattr("cnvzoo.train_and_save.run_recipe", run_recipe)
        option = "--" + purpose.replace("_", "-")
        for source in ("cnv.mnist", "hub/cnv.mnist", folder / "model.safetensors"):
            assert cnvzoo("train", path, option, source, "--hub", "hub").err == "error: stopped by the test\n"
            given = asked.pop()[purpose]
            (file,) = given if isinstance(given, list) else [given]
            assert sha256_of(Path(str(file))) == sha256_of(folder / "model.safetensors")

        make_checkpoint(tmp_path / "hub", "quant_cnv", "mnist", w_bits=4, a_bits=4)
        make_checkpoint(tmp_path / "hub", "cnv", "cifar10")
        for other, is_a in (
            ("quant_cnv_w4a4.mnist", "quant_cnv trained on mnist"),
            ("hub/cnv.cifar10", "cnv trained on cifar10"),
        ):
            refused = cnvzoo("train", path, option, other, "--hub", "hub")
            assert refused.err == (
                f"error: mnist_quant_cnv: {purpose}: {other} is a {is_a} with seed 0: "
                "give the checkpoint of a cnv trained on mnist with seed 0\n"
            )
        (folder / "model.safetensors").write_bytes(b"damaged")
        assert "expected" in cnvzoo("train", path, option, "cnv.mnist", "--hub", "hub").err
        assert not asked

    def test_the_record_names_the_checkpoint_that_a_run_started_from(
        self, cnvzoo, recipe, small_datasets, make_checkpoint, tmp_path
    ):
        small_datasets(train=64, test=10)
        folder = make_checkpoint(tmp_path / "hub", "cnv", "mnist")
        recipe("cnv")
        path = recipe("quant_cnv", "w_bits: 4", "a_bits: 4", "float_start: mnist_cnv", "schedule: {warmup_epochs: 0}")
        options = ("--epochs", 1, "--device", "cpu", "--run-dir", "run", "--hub", "hub")
        result = cnvzoo("train", path, "--float-start", "cnv.mnist", *options)
        assert result.status == 0, result.err
        assert RunRecord.read(Path("run") / "record.json").float_start == {
            "entry": "mnist_cnv", "seed": 0, "weights_sha256": sha256_of(folder / "model.safetensors"),
        }  # fmt: skip

    def test_a_full_disk_keeps_the_saved_state(self, cnvzoo, recipe, small_datasets, tmp_path, full_disk):
        small_datasets(train=64, test=10)
        train = ("train", recipe(), "--device", "cpu", "--run-dir", "run")
        assert cnvzoo(*train, "--time-limit", 0).status == 3
        before = sha256_of(state := tmp_path / "run" / "state.safetensors")
        with full_disk(100_000):
            result = cnvzoo(*train)
        assert result.status == 1
        last = result.err.splitlines()[-1]
        assert last.startswith("error: run/state.safetensors: cannot be written: File too large: raise the limit")
        assert "Traceback" not in result.err
        assert sha256_of(state) == before
        assert sorted(path.name for path in state.parent.iterdir()) == [".lock", state.name]

    @pytest.mark.parametrize(
        ("folder", "says"),
        [
            ("file", "file: cannot be written: file is a file, not a folder: choose another folder"),
            ("file/x/y", "file/x/y: cannot be written: file is a file, not a folder: choose another folder"),
            ("/proc", "/proc: cannot be written: No such file or directory: choose another folder"),
            ("/proc/x", "/proc/x: cannot be written: No such file or directory: choose another folder"),
            ("~no-such-user/x", "~no-such-user/x: ~no-such-user is not a known home folder: write the path without ~"),
        ],
    )
    def test_an_invalid_run_folder(self, cnvzoo, recipe, folder, says):
        if folder.startswith("/proc") and not Path("/proc/self").is_dir():
            pytest.skip("needs /proc")
        Path("file").write_text("kept")
        result = cnvzoo("train", recipe(), "--device", "cpu", "--run-dir", folder)
        assert (result.status, result.err) == (1, f"error: {says}\n")
        assert Path("file").read_text() == "kept"
        assert not Path("~no-such-user").exists()

    @pytest.mark.parametrize("where", [(os, "mkdir"), (os, "open")])
    def test_a_run_folder_on_a_read_only_disk(self, cnvzoo, recipe, monkeypatch, where):
        command = ("train", recipe(), "--device", "cpu", "--run-dir", "disk/run")
        real = getattr(*where)

        def fail(path, *arguments, **options):
            if "disk" in str(path):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return real(path, *arguments, **options)

        monkeypatch.setattr(*where, fail)
        result = cnvzoo(*command)
        says = "disk/run: cannot be written: Read-only file system: mount it for writing, or choose another folder"
        assert (result.status, result.err) == (1, f"error: {says}\n")

    def test_home_is_expanded_in_the_run_folder(self, cnvzoo, recipe, small_datasets, tmp_path, monkeypatch):
        small_datasets(train=64, test=10)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert cnvzoo("train", recipe(), "--device", "cpu", "--time-limit", 0, "--run-dir", "~/run").status == 3
        assert (tmp_path / "home" / "run" / "state.safetensors").exists()

    def test_a_file_that_cannot_be_read(self, cnvzoo, recipe, monkeypatch):
        def fail(*_):
            raise PermissionError(errno.EACCES, "Permission denied", "weights.safetensors")

        monkeypatch.setattr(importlib.import_module("cnvzoo.training.run"), "current_commit", fail)
        result = cnvzoo("train", recipe(), "--device", "cpu")
        assert (result.status, result.err) == (1, "error: weights.safetensors: Permission denied\n")

    def test_a_missing_recipe(self, cnvzoo):
        result = cnvzoo("train", "nothing.yaml")
        assert (result.status, result.err) == (1, "error: nothing.yaml: no such recipe\n")

    def test_a_mistake_in_a_recipe_is_named_with_its_line(self, cnvzoo, recipe):
        path = recipe("resnet20", "lable_smoothing: 0.1")
        line = path.read_text().splitlines().index("lable_smoothing: 0.1") + 1
        result = cnvzoo("train", path)
        assert result.status == 1
        assert f"{path}:{line}: lable_smoothing: unknown key: did you mean 'label_smoothing'" in result.err

    def test_the_name_of_a_checkpoint_is_checked_before_the_run(self, cnvzoo, recipe, monkeypatch):
        monkeypatch.setattr(sys.modules["cnvzoo"], "train", lambda *_, **__: pytest.fail("it was trained"))
        result = cnvzoo("train", recipe(), "--checkpoint", "mein Modell")
        assert result.status == 2
        assert "'mein Modell' is not the name of a checkpoint" in " ".join(result.said.replace("│", " ").split())

    def test_a_folder_of_something_else_is_refused_before_the_run(self, cnvzoo, recipe, monkeypatch, tmp_path):
        monkeypatch.setattr(sys.modules["cnvzoo"], "train", lambda *_, **__: pytest.fail("it was trained"))
        (tmp_path / "project").mkdir()
        (tmp_path / "project" / "README.md").write_text("precious")
        result = cnvzoo("train", recipe(), "--checkpoint", tmp_path / "project")
        says = "README.md would be replaced, and this is not the folder of a checkpoint that this cnvzoo reads"
        assert (result.status, result.err) == (1, f"error: {tmp_path / 'project'}: {says}: choose another folder\n")

    def test_an_unknown_device(self, cnvzoo, recipe, small_datasets):
        small_datasets()
        result = cnvzoo("train", recipe(), "--device", "gpu")
        assert result.status == 1
        assert "use auto, cpu or cuda" in result.err


@pytest.fixture
def hub(tmp_path, monkeypatch, make_checkpoint) -> Path:
    """A folder with two checkpoints, for grey and for colour images."""
    folder = tmp_path / "hub"
    make_checkpoint(folder, "resnet20", "mnist")
    make_checkpoint(folder, "quant_cnv", "cifar10", w_bits=4, a_bits=4)
    monkeypatch.setenv("CNVZOO_HUB", str(folder))
    return folder


class TestEval:
    def test_by_name_with_the_published_number(self, cnvzoo, hub, small_datasets):
        small_datasets()
        result = cnvzoo("eval", "quant_cnv_w4a4.cifar10", "--device", "cpu")
        assert result.status == 0
        assert result.out.startswith("quant_cnv_w4a4.cifar10: ")
        assert "of 50); published 10.00 % (5 of 50)" in result.out

    def test_json(self, cnvzoo, hub, small_datasets):
        small_datasets()
        said = cnvzoo("eval", "resnet20.mnist", "--device", "cpu").out
        found = json.loads(cnvzoo("eval", "resnet20.mnist", "--device", "cpu", "--json").out)
        assert list(found) == ["name", "dataset", "accuracy", "correct", "total", "published"]
        assert said.startswith(f"{found['name']}: {found['accuracy']:.2f} % ({found['correct']} of {found['total']})")
        assert found["dataset"] == "mnist"
        assert found["published"] == {"accuracy": 10.0, "correct": 5, "total": 50}

    def test_by_folder(self, cnvzoo, hub, small_datasets, monkeypatch):
        small_datasets()
        named = cnvzoo("eval", "resnet20.mnist", "--device", "cpu")
        monkeypatch.delenv("CNVZOO_HUB")
        assert cnvzoo("eval", hub / "resnet20.mnist", "--device", "cpu").out == named.out

    @pytest.fixture
    def mine(self, tmp_path) -> Path:
        """A checkpoint for images of 48x48 pixels of cats and dogs; folders of such images, and of other classes."""
        preprocessing = Preprocessing(48, (0.5,) * 3, (0.25,) * 3)
        model = create_model("resnet20", num_classes=2)
        save_checkpoint(model, tmp_path / "mine", classes=["cat", "dog"], preprocessing=preprocessing)
        for folder, names in (("pets", "cat dog"), ("letters", "a b")):
            for name in names.split():
                (tmp_path / folder / name).mkdir(parents=True)
                for n in range(5):
                    Image.new("L", (60, 50 + n), 40 * n).save(tmp_path / folder / name / f"{n}.png")
        return tmp_path / "mine"

    def test_own_images_are_prepared_as_the_checkpoint_takes_them(self, cnvzoo, mine, monkeypatch):
        seen = []
        monkeypatch.setattr(
            "cnvzoo.training.evaluation._check_classes", lambda outputs, info: seen.append((info, outputs))
        )
        result = cnvzoo("eval", "./mine", "--dataset", "./pets", "--device", "cpu")
        assert (result.status, result.err) == (0, "")
        assert [(info.image_size, info.in_chans) for info, _ in seen] == [(48, 3)] * 2
        (verified,) = verify(mine, dataset=mine.parent / "pets", device="cpu")
        assert (verified.problem, verified.total) == (None, 2)

    def test_images_of_other_classes_or_another_size_are_refused(self, cnvzoo, mine):
        for command in (("eval", "./mine", "--dataset"), ("verify", "./mine", "--dataset")):
            result = cnvzoo(*command, "./letters", "--device", "cpu")
            assert result.status == 1
            assert "is for the classes cat, dog, and letters has a, b: evaluate it on its own" in result.err
        result = cnvzoo("eval", "./mine", "--dataset", "cifar10")
        says = "mine is for images of 48x48 pixels, 3 channel(s) and 2 classes, and cifar10 has images of 32x32"
        assert result.err.startswith(f"error: {says}")

    def test_unknown_checkpoint(self, cnvzoo, hub):
        result = cnvzoo("eval", "quant_cnv_w4a4.cifar100")
        assert result.status == 1
        assert "did you mean 'quant_cnv_w4a4.cifar10'" in result.err
        assert str(hub) in result.err

    def test_a_hub_folder_without_checkpoints(self, cnvzoo, monkeypatch, tmp_path):
        monkeypatch.setenv("CNVZOO_HUB", str(tmp_path / "empty"))
        assert f"{tmp_path / 'empty'}: no such folder: give a directory" in cnvzoo("eval", "cnv.mnist").err
        (tmp_path / "empty").mkdir()
        result = cnvzoo("eval", "cnv.mnist")
        assert result.status == 1
        assert str(tmp_path / "empty") in result.err
        assert "cnv.mnist" in result.err

    @pytest.mark.parametrize("option", ["--data-root", "--hub", "CNVZOO_DATA", "CNVZOO_HUB"])
    def test_an_unknown_home_folder(self, cnvzoo, hub, monkeypatch, option):
        if option.startswith("--"):
            arguments: tuple[str, ...] = (option, "~no-such-user/x")
        else:
            monkeypatch.setenv(option, "~no-such-user/x")
            arguments = ()
        result = cnvzoo("eval", "resnet20.mnist", *arguments)
        says = "~no-such-user/x: ~no-such-user is not a known home folder: write the path without ~"
        assert (result.status, result.err) == (1, f"error: {says}\n")

    def test_damaged_weights(self, cnvzoo, hub):
        weights = hub / "resnet20.mnist" / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        result = cnvzoo("eval", "resnet20.mnist")
        assert result.status == 1
        assert "sha256" in result.err
        assert str(weights) in result.err


class TestListCheckpoints:
    def test_every_number(self, cnvzoo, hub):
        lines = cnvzoo("list", "--checkpoints").out.splitlines()
        quantized = next(line for line in lines if "quant_cnv_w4a4.cifar10" in line)
        size = (hub / "quant_cnv_w4a4.cifar10" / "model.safetensors").stat().st_size
        assert all(text in quantized for text in ("10.00", "4/4", "59,461,376", f"{size:,}"))
        float_ = next(line for line in lines if "resnet20.mnist" in line)
        assert all(text in float_ for text in ("float", "272,186"))  # 3 * 3 * 2 * 16 fewer than with 3 channels

    @pytest.mark.parametrize(
        ("conditions", "names"),
        [
            (("--dataset", "mnist"), ["resnet20.mnist"]),
            (("--bits", "4/4"), ["quant_cnv_w4a4.cifar10"]),
            (("--bits", "float"), ["resnet20.mnist"]),
            (("--min-accuracy", 10), ["quant_cnv_w4a4.cifar10", "resnet20.mnist"]),
            (("--max-bytes", 1_000_000), ["quant_cnv_w4a4.cifar10"]),
            (("--bits", "4/4", "--dataset", "cifar10", "--max-bytes", 1_000_000), ["quant_cnv_w4a4.cifar10"]),
        ],
    )
    def test_conditions(self, cnvzoo, hub, conditions, names):
        result = cnvzoo("list", "--checkpoints", *conditions)
        assert [line.split()[0] for line in result.out.splitlines()[1:]] == names

    def test_conditions_that_none_fulfils(self, cnvzoo, hub):
        result = cnvzoo("list", "--checkpoints", "--min-accuracy", 50, "--bits", "2/2")
        says = "no published checkpoint matches '*' with --bits 2/2, --min-accuracy 50.0"
        assert (result.status, result.out) == (1, "")
        assert result.err == f"error: {says}: cnvzoo list --checkpoints shows all of them\n"

    @pytest.mark.parametrize(
        ("arguments", "status", "says"),
        [
            (("--max-bytes", 5), 2, "--max-bytes selects checkpoints: give --checkpoints too"),
            (("--checkpoints", "--bits", "4"), 2, "--bits 4: W/A, each 1 to 8, such as 4/4; or float"),
            (("--checkpoints", "--bits", "9/4"), 2, "--bits 9/4: W/A, each 1 to 8, such as 4/4; or float"),
            (("--checkpoints", "--dataset", "mnits"), 1, "did you mean 'mnist'"),
        ],
    )
    def test_invalid_conditions(self, cnvzoo, hub, monkeypatch, arguments, status, says):
        monkeypatch.setenv("COLUMNS", "200")
        result = cnvzoo("list", *arguments)
        assert result.status == status
        assert says in result.said

    def test_pattern(self, cnvzoo, hub):
        assert "cifar10" not in cnvzoo("list", "--checkpoints", "*.mnist").out
        result = cnvzoo("list", "--checkpoints", "*.cifar100")
        assert (result.status, result.out) == (1, "")
        assert "no published checkpoint matches '*.cifar100'" in result.err


@pytest.mark.parametrize(("message", "line"), [("a  b: c", "a  b: c"), ("a\n", "a"), ("\na:\r\n  b\n\nc", "a: b c")])
def test_the_lines_of_an_error_are_joined(message, line):
    assert in_a_line(CnvzooError(message)) == line


class TestVerify:
    def test_a_checkpoint_as_published(self, cnvzoo, hub, small_datasets):
        small_datasets()
        table = cnvzoo("eval", "resnet20.mnist", "--device", "cpu").out
        found = int(table.split("(")[1].split()[0])
        result = cnvzoo("verify", "resnet20.mnist", "--device", "cpu")
        assert f"resnet20.mnist 5 {found} 50 5 " in result.said
        assert result.status == int(abs(found - 5) > 5)
        assert "another kind of machine" in result.out

        result = cnvzoo("verify", "resnet20.mnist", "--device", "cpu", "--json")
        (verified,) = json.loads(result.out)
        assert (result.status == 0) == (verified.pop("problem") is None)
        assert verified == {
            "name": "resnet20.mnist", "published": 5, "found": found, "total": 50, "allowed": 5, "missing_data": False,
        }  # fmt: skip

    def test_all_and_a_difference(self, cnvzoo, hub, small_datasets):
        small_datasets()
        (hub / "resnet20.mnist" / "config.json").unlink()
        result = cnvzoo("verify", "--all", "--hub", hub, "--device", "cpu")
        assert result.status == 1
        assert all(name in result.out for name in ("quant_cnv_w4a4.cifar10", "resnet20.mnist"))
        assert f"resnet20.mnist: {hub / 'resnet20.mnist' / 'config.json'}: " in result.err
        assert "Traceback" not in result.err

    def test_a_missing_test_set_is_tried_once_and_no_difference(self, cnvzoo, hub, make_checkpoint, monkeypatch):
        tried = []

        def unreachable(name, root):
            tried.append(name)
            raise DatasetError(f"{name}: no network\n connect to one")

        make_checkpoint(hub, "cnv", "mnist")
        monkeypatch.setattr(published, "load_arrays", unreachable)
        names = ("resnet20.mnist", "cnv.mnist", "quant_cnv_w4a4.cifar10")
        (hub / "quant_cnv_w4a4.cifar10" / "config.json").unlink()
        result = cnvzoo("verify", *names, "--device", "cpu")
        rows = [" ".join(line.split()) for line in result.out.splitlines()]
        assert rows[-3:] == [
            "resnet20.mnist 5 - 50 0 not verified",
            "cnv.mnist 5 - 50 0 not verified",
            "quant_cnv_w4a4.cifar10 - - - 0 differs",
        ]
        assert result.status == 1
        assert result.err.startswith(
            "error: not verified: resnet20.mnist, cnv.mnist: mnist: no network connect to one; "
            f"not as recorded: quant_cnv_w4a4.cifar10: {hub / 'quant_cnv_w4a4.cifar10' / 'config.json'}: "
        )
        assert len(result.err.splitlines()) == 1
        assert tried == ["mnist"]

    def test_a_typo_is_an_unknown_name_not_a_difference(self, cnvzoo, hub):
        result = cnvzoo("verify", "resnet20.mnits")
        assert (result.status, result.out) == (1, "")
        assert "error: no checkpoint 'resnet20.mnits'" in result.err
        assert "did you mean 'resnet20.mnist'" in result.err

    def test_checkpoints_without_a_number_or_images_to_compare(self, cnvzoo, tmp_path):
        for name in ("unknown", "damaged"):
            model, preprocessing = create_model("resnet20", in_chans=1), Preprocessing(28, (0.5,), (0.25,))
            save_checkpoint(model, tmp_path / name, preprocessing=preprocessing)
        result = cnvzoo("verify", "./unknown")
        assert (result.status, result.out.splitlines()[-1].split(maxsplit=5)[5]) == (0, "nothing published to compare")
        config = json.loads((tmp_path / "unknown" / "config.json").read_text())
        config |= {"correct": 3, "total": 5, "dataset": "photos"}
        (tmp_path / "unknown" / "config.json").write_text(json.dumps(config))
        assert "not scored: give --dataset" in cnvzoo("verify", "./unknown").out
        for name in ("unknown", "damaged"):
            (tmp_path / name / "model.safetensors").write_bytes(b"")
        result = cnvzoo("verify", "./unknown", "./damaged")
        assert result.status == 1
        assert len(result.err.splitlines()) == 1
        assert "unknown/model.safetensors" in result.err
        assert "damaged/model.safetensors" in result.err

    @pytest.mark.parametrize("arguments", [(), ("resnet20.mnist", "--all")])
    def test_either_names_or_all(self, cnvzoo, hub, arguments):
        result = cnvzoo("verify", *arguments)
        assert result.status == 2
        assert "give names of checkpoints, or --all" in result.said


class TestPredict:
    @pytest.fixture
    def photo(self, tmp_path) -> Path:
        pixels = np.arange(60 * 80 * 3, dtype=np.uint32).reshape(60, 80, 3) % 251
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photo.png")
        return tmp_path / "photo.png"

    @pytest.mark.parametrize("checkpoint", ["quant_cnv_w4a4.cifar10", "resnet20.mnist"])
    def test_any_size_and_colour(self, cnvzoo, hub, photo, checkpoint):
        Image.open(photo).convert("L").save(grey := photo.with_name("grey.gif"))
        result = cnvzoo("predict", photo, grey, "--checkpoint", checkpoint, "--top", 10)
        assert result.status == 0
        for path, line in zip((photo, grey), result.out.splitlines(), strict=True):
            assert line.startswith(f"{path}: ")
            shares = [float(guess.split()[-1].rstrip("%")) for guess in line.removeprefix(f"{path}: ").split(", ")]
            assert len(shares) == 10
            assert shares == sorted(shares, reverse=True)
            assert sum(shares) == pytest.approx(100, abs=0.5)  # each is rounded to 0.1

    def test_top(self, cnvzoo, hub, photo):
        assert cnvzoo("predict", photo, "--checkpoint", "resnet20.mnist", "--top", 2).out.count("%") == 2

    def test_json(self, cnvzoo, hub, photo):
        result = cnvzoo("predict", photo, photo, "--checkpoint", "resnet20.mnist", "--top", 2, "--json")
        first, second = json.loads(result.out)
        assert first == second
        assert first["image"] == str(photo)
        assert [list(guess) for guess in first["predictions"]] == [["label", "index", "probability"]] * 2
        said = cnvzoo("predict", photo, "--checkpoint", "resnet20.mnist", "--top", 1).out
        best = first["predictions"][0]
        assert said == f"{photo}: {best['label']} {best['probability']:.1%}\n"

    def test_a_file_name_that_is_not_utf8(self, cnvzoo, hub, photo):
        other = photo.rename(os.fsdecode(os.fsencode(photo.parent) + b"/\xff.png"))
        result = cnvzoo("predict", other, "--checkpoint", "resnet20.mnist", "--top", 1)
        assert (result.status, result.err) == (0, "")
        assert result.out.startswith(f"{photo.parent}/\\udcff.png: ")
        (found,) = json.loads(cnvzoo("predict", other, "--checkpoint", "resnet20.mnist", "--json").out)
        assert found["image"] == str(other)

    @pytest.mark.parametrize("content", [None, b"not an image", b"\x89PNG\r\n\x1a\n"])
    def test_a_file_that_is_not_an_image(self, cnvzoo, hub, tmp_path, content):
        path = tmp_path / "broken.png"
        if content is not None:
            path.write_bytes(content)
        result = cnvzoo("predict", path, "--checkpoint", "resnet20.mnist")
        assert result.status == 1
        assert f"error: {path}: cannot be read as an image" in result.err
        assert "Traceback" not in result.err

    def test_an_image_of_more_than_8_bits(self, cnvzoo, hub, tmp_path):
        Image.fromarray(np.zeros((8, 8), dtype=np.int32)).save(path := tmp_path / "deep.tiff")
        result = cnvzoo("predict", path, "--checkpoint", "resnet20.mnist")
        assert result.status == 1
        assert str(path) in result.err
        assert "8-bit" in result.err


class TestPublish:
    def test_json(self, cnvzoo, hub, tmp_path):
        write_card(hub / "resnet20.mnist")
        (found,) = json.loads(cnvzoo("publish", "resnet20.mnist", "--to", "store", "--dry-run", "--json").out)
        files = sorted(found.pop("new"))
        assert files == ["README.md", "config.json", "model.safetensors"]
        assert found == {
            "name": "resnet20.mnist", "location": "store", "changed": [], "unchanged": [], "commit": None, "tag": None,
            "dry_run": True,
        }  # fmt: skip
        assert not (tmp_path / "store").exists()

    def test_json_of_those_before_an_error(self, cnvzoo, hub, tmp_path):
        write_card(hub / "resnet20.mnist")
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "quant_cnv_w4a4.cifar10").symlink_to(tmp_path)
        write_card(hub / "quant_cnv_w4a4.cifar10")
        result = cnvzoo("publish", "resnet20.mnist", "quant_cnv_w4a4.cifar10", "--to", "store", "--json")
        assert result.status == 1
        assert [done["name"] for done in json.loads(result.out)] == ["resnet20.mnist"]


def test_no_file_is_imported_for_a_shell_that_completes(tmp_path):
    (tmp_path / "mine.py").write_text("print('imported')")
    words = "cnvzoo list --import mine.py --da"
    done = subprocess.run(
        [sys.executable, "-c", "from cnvzoo.cli import main; main()"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "_CNVZOO_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "4"},
    )  # fmt: skip
    assert "imported" not in done.stdout


def test_json_is_ascii_whatever_the_encoding_of_the_output(capsys):
    print_json({"label": "café \U0001f600"})
    out = capsys.readouterr().out
    assert out.isascii()
    assert json.loads(out) == {"label": "café \U0001f600"}


def test_the_installed_command_calls_main():
    (command,) = entry_points(group="console_scripts", name="cnvzoo")
    assert command.load() is main
