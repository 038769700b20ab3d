"""dev.py: when it makes, updates or keeps the environment, what it prints, and the arguments that it passes on."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

import dev


class Machine:
    """Records the commands that dev.py runs; each succeeds, or has the status that `failing` gives for a word of it."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.failing: dict[str, int] = {}
        self.python_runs = False  # the environment's own interpreter

    def run(self, command, **_: object) -> SimpleNamespace:
        if command[1:] == ["-c", ""]:
            return SimpleNamespace(returncode=0 if self.python_runs else 1)
        self.commands.append(list(command))
        if "venv" in command:
            self.python_runs = True
            dev.VENV.mkdir(exist_ok=True)
        return SimpleNamespace(returncode=next((s for w, s in self.failing.items() if w in command), 0))


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Machine:
    """A checkout without an environment, in which commands are recorded and not run."""
    machine = Machine()
    for folder in (tmp_path, tmp_path / "runtime"):
        folder.mkdir(exist_ok=True)
        (folder / "pyproject.toml").write_text("[project]\n")
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    (tmp_path / "constraints.txt").write_text("torch==2.14.1\n")
    monkeypatch.setattr(dev, "CONSTRAINTS", tmp_path / "constraints.txt")
    monkeypatch.setattr(dev, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(dev, "STAMP", tmp_path / ".venv" / "installed.sha256")
    monkeypatch.setattr(dev, "LOCK", tmp_path / ".venv.lock")
    monkeypatch.setattr(dev.subprocess, "run", machine.run)
    monkeypatch.setattr(dev.os, "execv", lambda path, command: machine.commands.append(list(command)))
    monkeypatch.chdir(tmp_path)
    return machine


def test_the_environment_is_made_once(machine):
    assert dev.main(["setup"]) == 0
    make, upgrade, install, compile_all = machine.commands
    assert make[:3] == [sys.executable, "-m", "venv"]
    assert upgrade[0] == install[0] == dev.python()
    assert upgrade[-2:] == ["--upgrade", "pip"]
    constraints = ["--constraint", str(dev.CONSTRAINTS)]
    packages = ["--editable", "./runtime", "--editable", "."]
    assert install[-8:] == [*constraints, *packages, "--group", "dev"]  # at once: torch and torchvision fit
    # instead of pip, which uses one core
    assert "--no-compile" in install
    assert compile_all[1:] == ["-m", "compileall", "-qq", "-j", "0", str(dev.VENV / "lib")]
    assert dev.main(["setup"]) == 0
    assert len(machine.commands) == 4


@pytest.mark.parametrize("name", ["pyproject.toml", "runtime/pyproject.toml", "constraints.txt"])
def test_a_changed_file_is_installed_again_in_the_same_environment(machine, name):
    dev.main(["setup"])
    machine.commands.clear()
    (dev.ROOT / name).write_text("# changed\n")
    assert dev.main(["setup"]) == 0
    assert "--clear" not in machine.commands[0]
    assert machine.commands[-2][-4:] == ["--editable", ".", "--group", "dev"]


def test_an_environment_that_moved_with_its_checkout_is_installed_again(machine, monkeypatch, tmp_path):
    dev.main(["setup"])
    machine.commands.clear()
    monkeypatch.setattr(dev, "ROOT", tmp_path / "moved")
    shutil.copytree(tmp_path / "runtime", tmp_path / "moved" / "runtime")
    shutil.copy(tmp_path / "pyproject.toml", tmp_path / "moved")
    assert not dev.is_ready()


def test_an_environment_without_its_python_is_made_again(machine):
    dev.main(["setup"])
    machine.commands.clear()
    machine.python_runs = False
    assert dev.main(["setup"]) == 0
    assert "--clear" in machine.commands[0]
    assert len(machine.commands) == 4


@pytest.mark.parametrize("step", ["venv", "pip", "--editable"])
def test_after_a_failure_the_same_command_tries_again(machine, capsys, step):
    machine.failing = {step: 7}
    assert dev.main(["test"]) == 7
    assert "see above" in capsys.readouterr().err
    assert not dev.is_ready()
    machine.failing = {}
    assert dev.main(["test"]) == 0
    assert dev.is_ready()
    assert machine.commands[-1] == [dev.python(), "-m", "pytest", *dev.EVERY_TEST]


def test_python_without_venv(machine, monkeypatch, capsys):
    monkeypatch.setattr(dev.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else object())
    assert dev.main(["test"]) == 1
    assert "apt install python3-venv" in capsys.readouterr().err
    assert machine.commands == []


def test_an_old_python(machine, monkeypatch, capsys):
    monkeypatch.setattr(dev.sys, "version_info", (3, 9, 18, "final", 0))
    assert dev.main(["test"]) == 1
    assert "Python 3.10 or newer is needed" in capsys.readouterr().err
    assert machine.commands == []


@pytest.mark.parametrize("arguments", [[], ["tets"], ["lint", "src"], ["setup", "now"]])
def test_an_unknown_command_prints_the_help(machine, capsys, arguments):
    assert dev.main(arguments) == 2
    assert "python3 dev.py reproduce" in capsys.readouterr().out
    assert machine.commands == []


def test_arguments_are_passed_on(machine):
    dev.main(["setup"])
    dev.main(["test", "tests/models", "-k", "a b"])
    assert machine.commands[-1] == [dev.python(), "-m", "pytest", "tests/models", "-k", "a b"]
    dev.main(["docs", "--to", "elsewhere"])
    assert machine.commands[-1] == [dev.python(), str(dev.ROOT / "docs" / "site" / "build.py"), "--to", "elsewhere"]
    dev.main(["reproduce", "--table", "mnist", "--list"])
    script = str(dev.ROOT / "benchmarks" / "reproduce.py")
    assert machine.commands[-1] == [dev.python(), script, "--table", "mnist", "--list"]


def test_lint_runs_every_check_and_fails_if_one_does(machine, capsys):
    dev.main(["setup"])
    machine.commands.clear()
    machine.failing = {"check": 1}
    assert dev.main(["lint"]) == 1
    assert [command[2] for command in machine.commands] == ["ruff", "ruff", "pyright", "pyright"]
    assert capsys.readouterr().err == "dev.py: error: failed: ruff check\n"
    machine.failing = {}
    assert dev.main(["lint"]) == 0


def test_the_python_of_a_page_is_one_file_with_the_lines_of_the_page(machine, tmp_path):
    (tmp_path / "README.md").write_text("# Title\n\n```python\nx = 1\n```\n\n```sh\ny\n```\n\n```python\nx += 1\n```\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "data.md").write_text("```sh\nls\n```\n")
    (tmp_path / "docs" / "own.md").write_text("```python\nimport cnvzoo\n```\n")
    (folder := tmp_path / "snippets").mkdir()
    dev.write_snippets(folder)
    assert {path.name: path.read_text().splitlines() for path in folder.iterdir()} == {
        "README.py": ["", "", "", "x = 1", "", "", "", "", "", "", "", "x += 1"],
        "docs_own.py": ["", "import cnvzoo"],
    }


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--table", "mnist", "--entry", "mnist_cnv"], ["mnist"]),
        (["--table=cifar10"], ["cifar10"]),
        (["--table", "all"], ["mnist", "fashion_mnist", "cifar10", "cifar100"]),
        (["--table", "extra"], ["mnist", "fashion_mnist", "cifar10", "cifar100"]),
        (["--table", "all", "--entry", "cifar100_cnv", "fashion_mnist_cnv"], ["fashion_mnist", "cifar100"]),
        (["--table", "all", "--entry", "mnist_cnv", "--seeds", "0", "--entry", "cifar10_cnv"], ["mnist", "cifar10"]),
        (["--table=extra", "--entry=cifar10_quant_resnet20_w4a4"], ["cifar10"]),
        (["--table", "all", "--entry", "svhn_cnv"], []),
        (["--table", "mnist", "--entry"], []),
        (["--table", "mnist", "--publish", "published", "--dry-run"], []),
        (["--table", "all", "--list"], []),
        (["--table", "svhn"], []),
        (["--table"], []),
        (["--help"], []),
    ],
)
def test_the_datasets_that_a_reproduction_needs(arguments, names):
    assert dev.datasets_of(arguments) == names


class TestFillDataset:
    @pytest.fixture
    def cache(self, machine, monkeypatch, tmp_path) -> Path:
        """An empty cache, and a checkout with shared/datasets beside it."""
        (tmp_path / "checkout").mkdir()
        (tmp_path / "shared" / "datasets").mkdir(parents=True)
        (tmp_path / "shared" / "datasets" / "datasets.py").touch()
        monkeypatch.setattr(dev, "ROOT", tmp_path / "checkout")
        monkeypatch.setenv("CNVZOO_DATA", str(tmp_path / "cache"))
        return tmp_path / "cache"

    def test_copies_from_the_folder_next_to_the_checkout(self, machine, cache, tmp_path):
        assert dev.fill_dataset("mnist", "python") is None
        script = str(tmp_path / "shared" / "datasets" / "datasets.py")
        assert machine.commands == [["python", script, "get", "mnist", "--root", str(cache)]]

    def test_does_not_replace_existing_files(self, machine, cache):
        cache.mkdir()
        (cache / "mnist.safetensors").touch()
        assert dev.fill_dataset("mnist", "python") is None
        assert machine.commands == []

    def test_reports_a_failure(self, machine, cache):
        machine.failing = {"get": 1}
        problem = dev.fill_dataset("cifar10", "python")
        assert problem is not None
        assert f"cifar10 is not in the dataset cache {cache}" in problem
        assert "datasets.py get cifar10 failed" in problem

    def test_no_such_folder(self, machine, cache, tmp_path):
        (tmp_path / "shared" / "datasets" / "datasets.py").unlink()
        problem = dev.fill_dataset("mnist", "python")
        assert problem is not None
        assert "cnvzoo.load_dataset('mnist') downloads it" in problem
        assert machine.commands == []


def test_dev_py_has_the_dataset_names_of_the_library():
    from cnvzoo.data import list_datasets

    assert list(dev.DATASETS) == list_datasets()


def test_dev_py_imports_only_the_standard_library():
    command = [sys.executable, "-I", "-S", str(Path(dev.__file__)), "--help"]  # -S: no installed packages
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "python3 dev.py test" in done.stdout


def test_an_environment_is_ready_only_with_its_stamp_and_its_interpreter(monkeypatch, tmp_path):
    """`is_ready` with a real interpreter and the right stamp, with another stamp, and without an interpreter."""
    monkeypatch.setattr(dev, "STAMP", tmp_path / "stamp")
    monkeypatch.setattr(dev, "python", lambda: sys.executable)
    assert not dev.is_ready()
    dev.STAMP.write_text(dev.fingerprint())
    assert dev.is_ready()
    monkeypatch.setattr(dev, "python", lambda: str(tmp_path / "gone"))
    assert not dev.is_ready()


def test_the_pinned_versions_are_those_of_the_newest_record():
    """They are also those of this environment and of the golden bits."""
    root = Path(__file__).parents[1]
    lines = (root / "constraints.txt").read_text().splitlines()
    pinned = dict(line.partition(";")[0].strip().split("==") for line in lines if not line.startswith("#"))
    deciding = {"torch", "numpy", "brevitas"}
    for package in deciding | {"torchvision", "safetensors", "onnxruntime"}:
        assert version(package).partition("+")[0] == pinned[package], package
    records = [json.loads(path.read_text()) for path in (root / "benchmarks" / "results").rglob("*.json")]
    newest = max((record for record in records if record["device"]["kind"] == "cpu"), key=lambda r: r["finished"])
    found = {package: text.partition("+")[0] for package, text in newest["versions"].items() if package in deciding}
    assert found.items() <= pinned.items()
    golden = json.loads((root / "tests" / "training" / "golden.json").read_text())
    assert any(
        machine["kind"].items() >= {package: pinned[package] for package in deciding}.items()
        for machine in golden["machines"]
    )


def test_the_constraints_are_only_names_and_versions():
    lines = (Path(__file__).parents[1] / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins == sorted(pins)
    for line in pins:
        assert re.fullmatch(r'[a-z0-9.-]+==[0-9][0-9a-z.]*(; python_version >= "3\.11")?', line), line


def test_two_commands_at_once_make_one_environment(monkeypatch, tmp_path):
    made = []

    def make():
        time.sleep(0.2)
        made.append(1)
        return 0

    monkeypatch.setattr(dev, "LOCK", tmp_path / ".venv.lock")
    monkeypatch.setattr(dev, "is_ready", lambda: bool(made))
    monkeypatch.setattr(dev, "make_environment", make)
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(lambda _: dev.prepare(), range(3))) == [0, 0, 0]
    assert made == [1]
