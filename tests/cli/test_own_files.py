"""Models of the caller's own Python files (`--import`), and completion of arguments in a shell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cnvzoo.checkpoints.index import list_checkpoints
from cnvzoo.data.published import list_datasets
from cnvzoo.models.registry import unregister_model
from cnvzoo.training import RunRecord
from cnvzoo.zoo import list_models


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

    def test_a_file_in_the_home_folder(self, cnvzoo, own, monkeypatch):
        monkeypatch.setenv("HOME", str(own.parent))
        assert cnvzoo("list", "own_*", "--import=~/own_models.py").status == 0

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


def test_no_file_is_imported_for_a_shell_that_completes(tmp_path):
    (tmp_path / "mine.py").write_text("print('imported')")
    words = "cnvzoo list --import mine.py --da"
    done = subprocess.run(
        [sys.executable, "-c", "from cnvzoo.cli import main; main()"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "_CNVZOO_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "4"},
    )  # fmt: skip
    assert "imported" not in done.stdout
