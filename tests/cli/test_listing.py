"""`cnvzoo --help`, `list` and `info`."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points, version

import pytest

from cnvzoo.checkpoints.index import list_checkpoints
from cnvzoo.cli import main
from cnvzoo.cli.options import LARGEST
from cnvzoo.cli.output import Column, print_json, print_table
from cnvzoo.data import Preprocessing
from cnvzoo.errors import ModelError
from cnvzoo.models import classifier
from cnvzoo.train_and_save import save_checkpoint
from cnvzoo.zoo import create_model, list_models


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


def test_json_is_ascii_whatever_the_encoding_of_the_output(capsys):
    print_json({"label": "café \U0001f600"})
    out = capsys.readouterr().out
    assert out.isascii()
    assert json.loads(out) == {"label": "café \U0001f600"}


def test_a_table_for_a_closed_output_is_printed_nowhere(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as after >&-
    print_table([Column("model")], [["cnv"]])


def test_the_installed_command_calls_main():
    (command,) = entry_points(group="console_scripts", name="cnvzoo")
    assert command.load() is main


def test_python_runs_the_package_as_the_command():
    done = subprocess.run([sys.executable, "-m", "cnvzoo", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"cnvzoo {version('cnvzoo')}\n", "")
