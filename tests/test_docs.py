"""The documentation works: every Python block and every command is run on small data in a temporary folder."""

from __future__ import annotations

import inspect
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import reproduce
from fake_http import GOOD_TOKEN  # pyright: ignore[reportMissingImports]  (in tests/hub, see conftest.py)
from fake_hub import FakeHub  # pyright: ignore[reportMissingImports]
from harness import report as render
from harness.cluster_time import cluster_table
from harness.entries import Layout, load_entries
from harness.plot import plotted
from harness.records import Records, recipes_scored
from harness.references import load_references
from harness.report import END, START, rows
from huggingface_hub import close_session
from PIL import Image
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import cnvzoo
import cnvzoo.cli
import dev
from cnvzoo.data import Augmentation
from cnvzoo.training import Distillation, EarlyCrops, Optimizer, Recipe, Schedule

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, `line` being the number of its first line."""

    page: Path
    line: int
    language: str
    text: str


def blocks(page: Path, *languages: str) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if match[1] in languages:
            yield Block(page, text[: match.start(2)].count("\n") + 1, match[1], match[2])


def commands() -> list[tuple[str, str]]:
    """(page:line, command) for every line of every shell block."""
    found = []
    for page in PAGES:
        for block in blocks(page, "sh", "console"):
            for number, line in enumerate(block.text.splitlines(), start=block.line):
                if line.strip():
                    found.append((f"{page.relative_to(ROOT)}:{number}", line))
    return found


@pytest.fixture
def logged_in(tmp_path, monkeypatch) -> Iterator[FakeHub]:
    """The Hub that hf:// refers to: a local fake, with a token that may write."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # read from the environment at import
    with FakeHub() as hub:
        for name, value in {
            "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": GOOD_TOKEN, "HF_HUB_CACHE": str(tmp_path / "cache"),
            "NO_PROXY": "127.0.0.1",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        yield hub
        close_session()


def with_small_holdout(text: str) -> str:
    """The text with a twentieth of the held-out images, since the datasets of these tests are small too."""
    return re.sub(r"(holdout[ =(]+)(\d+)", lambda match: f"{match[1]}{int(match[2]) // 20}", text)


def with_few_steps(text: str) -> str:
    """The text with an eighth of the training steps of an example; test_examples.py trains it for longer."""
    return re.sub(r"(--steps )(\d+)", lambda match: f"{match[1]}{int(match[2]) // 8}", text)


@pytest.fixture
def docs_folder(tmp_path, monkeypatch, small_datasets, make_checkpoint, logged_in, uncompiled) -> Iterator[Path]:
    """A temporary folder with the files that the pages name: recipes, examples, checkpoints, weights and a photo.

    Models that a page registers are removed afterwards.
    """
    before = cnvzoo.list_models()
    small_datasets(train=600, test=100)
    folder = tmp_path / "docs_folder"
    shutil.copytree(ROOT / "benchmarks" / "configs", folder / "benchmarks" / "configs")
    shutil.copy(ROOT / "hubconf.py", folder)
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    cnv = make_checkpoint(folder / "hub", "cnv", "mnist", scored=True)
    quantized = make_checkpoint(folder / "hub", "quant_cnv", "cifar10", w_bits=4, a_bits=4)
    for checkpoint in (cnv, quantized):
        cnvzoo.write_card(checkpoint)
    (folder / "runs" / "mnist_cnv" / "seed0").mkdir(parents=True)
    shutil.copy(cnv / "model.safetensors", folder / "runs" / "mnist_cnv" / "seed0" / "weights.safetensors")
    pixels = np.arange(48 * 64 * 3, dtype=np.uint32).reshape(48, 64, 3) % 251
    Image.fromarray(pixels.astype(np.uint8)).save(folder / "photo.png")
    for number, name in enumerate(("cat", "dog", "owl")):
        (folder / "photos" / name).mkdir(parents=True)
        for n in range(20):
            Image.new("RGB", (40, 48), (60 * number, 10 * n, 90)).save(folder / "photos" / name / f"{n}.png")
    for page in PAGES:
        for block in blocks(page, "yaml"):  # the first line is the file's name
            (folder / block.text.splitlines()[0].removeprefix("# ")).write_text(block.text)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CNVZOO_HUB", str(folder / "hub"))
    yield folder
    for model in cnvzoo.list_models(exclude=before):
        cnvzoo.unregister_model(model)


@pytest.mark.parametrize("page", [p for p in PAGES if any(blocks(p, "python"))], ids=lambda p: p.name)
def test_python_blocks(page, docs_folder):
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks(page, "python"):
        source = "\n" * (block.line - 1) + with_small_holdout(
            block.text
        )  # so that a traceback names the line of the page
        exec(compile(source, str(page), "exec"), namespace)


@pytest.fixture
def perform(docs_folder, monkeypatch) -> Callable[[str], int]:
    """`perform(command)`: runs a command of the pages in this process; its exit status."""

    def call(command: str) -> int:
        arguments = shlex.split(with_few_steps(with_small_holdout(command)), comments=True)
        monkeypatch.setattr(sys, "argv", arguments)
        match arguments:
            case ["cnvzoo", *_]:
                return _status(cnvzoo.cli.main)
            case ["python3", "dev.py", *rest]:
                return _dev(rest, docs_folder, monkeypatch)
            case ["make", "-C", "examples/microcontroller", _, target]:
                tools = ["make"] + ({"run": ["cc"]}.get(target) or ["arm-none-eabi-gcc", "qemu-system-arm"])
                if missing := [tool for tool in tools if shutil.which(tool) is None]:
                    pytest.skip(f"not installed: {', '.join(missing)}")
                cnvzoo.export("quant_cnv_w4a4.cifar10", "net.c", format="c")
                np.zeros((2, 3, 32, 32), np.uint8).tofile("images.bin")
                return subprocess.run(arguments).returncode
            case ["python", script, *rest] if script.startswith("examples/"):
                monkeypatch.setattr(sys, "argv", [script, *rest])
                return _status(lambda: runpy.run_path(script, run_name="__main__"))
        pytest.fail(f"these tests cannot run {command!r}")

    return call


def _status(function: Callable[[], object]) -> int:
    try:
        function()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _dev(arguments: list[str], docs_folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run dev.py without its environment, which these tests already run in; its commands are checked, not run."""
    became: list[str] = []
    monkeypatch.setattr(dev, "prepare", lambda: 0)
    monkeypatch.setattr(dev, "lint", lambda: 0)
    monkeypatch.setattr(dev, "fill_dataset", lambda *_: None)
    monkeypatch.setattr(dev, "become", lambda *command: became.extend(command) or 0)
    status = dev.main(arguments)
    if arguments[0] == "test":
        assert became[:2] == ["-m", "pytest"]
        assert all((ROOT / word).exists() for word in became[2:] if "/" in word)
    if arguments[0] == "docs":
        assert became == [str(ROOT / "docs" / "site" / "build.py")]
    if arguments[0] == "reproduce":
        assert Path(became[0]) == ROOT / "benchmarks" / "reproduce.py"
        return reproduce.main([*became[1:], "--list"], home=docs_folder / "benchmarks")
    return status


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own upload
@pytest.mark.parametrize(("place", "command"), commands(), ids=[place for place, _ in commands()])
def test_command(place, command, perform):
    assert perform(command) == 0, f"{place}: {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_have_existing_targets(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_output_on_the_publishing_page_is_that_of_the_command(docs_folder, perform, capsys):
    page = (ROOT / "docs" / "publishing.md").read_text(encoding="utf-8")
    shown = re.findall(r"^    (\S+ to published: .*)$", page, re.MULTILINE)
    assert perform("cnvzoo publish cnv.mnist --to published") == 0
    capsys.readouterr()
    assert perform("cnvzoo publish cnv.mnist quant_cnv_w4a4.cifar10 --to published") == 0
    assert capsys.readouterr().out.splitlines() == shown


def test_results_in_the_pages_are_those_of_the_records():
    layout = Layout.of(ROOT / "benchmarks")
    entries = load_entries(layout.configs)
    survey = Records(entries, layout).survey()
    recipes = recipes_scored(entries.values(), layout)
    lines = rows(entries.values(), survey, load_references(layout.references, entries), recipes)
    remedy = "run: python benchmarks/reproduce.py --table all --time-limit 0"
    shows = plotted(layout.index)
    assert layout.page.read_text(encoding="utf-8") == render.page(lines, survey, shows), remedy
    readme = layout.readme.read_text(encoding="utf-8")
    assert readme.split(START)[1].split(END)[0].strip() == render.summary(lines, shows), remedy
    cluster = layout.cluster_page.read_text(encoding="utf-8")
    assert cluster.split(START)[1].split(END)[0].strip() == cluster_table(Records(entries, layout)), remedy


def test_the_ties_on_the_deployment_page_are_those_of_the_published_checkpoint():
    page = " ".join((ROOT / "docs" / "deployment.md").read_text(encoding="utf-8").split())
    found = re.search(
        r"have such a tie in `(\S+)`\. (\d+) of these and (\d+) other images get another class than in PyTorch, where "
        r"the accuracy is ([\d.]+) %; that of the integer graph is ([\d.]+) %",
        page,
    )
    assert found
    config = json.loads((ROOT / "hub" / found[1] / "config.json").read_text())
    integer, total = config["integer"], config["total"]
    assert int(found[2]) + int(found[3]) == total - integer["agreeing"]
    assert [found[4], found[5]] == [
        f"{100 * correct / total:.2f}" for correct in (config["correct"], integer["correct"])
    ]


def test_recipes_page_has_every_key_with_its_default():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    keys = {}
    for line in page.splitlines():
        if line.startswith("| `"):
            names, default, _ = (cell.strip() for cell in line.strip("|").split("|"))
            keys |= {name: default.strip("`") for name in re.findall(r"`(\w+)`", names)}
    fields = dict(
        key
        for section in (Optimizer, Schedule, Augmentation, EarlyCrops, Distillation, Recipe)
        for key in _written(section)
    )
    assert keys.keys() == fields.keys() | {"extends", "name"}
    for name, field in fields.items():
        if field.is_required():
            assert keys[name] == "needed", name
        elif isinstance(field.default, bool):
            assert keys[name] == str(field.default).lower(), name
        elif isinstance(field.default, (int, float)):
            assert float(keys[name]) == field.default, name


def _written(section: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    """The keys that a section may have, without `optimizer.name`, whose default the table gives in words."""
    filled_in = {Recipe: ("name", "float_start_sha256", "teacher_sha256"), Optimizer: ("name",)}
    keys = section.model_fields.items()
    return [(name, field) for name, field in keys if name not in filled_in.get(section, ())]


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("list", "resnet20"),
        ("list --checkpoints", ""),
        ("info", "cnv.mnist"),
        ("eval", "cnv.mnist"),
        ("verify", "cnv.mnist"),
        ("predict", "photo.png --checkpoint cnv.mnist"),
        ("publish", "cnv.mnist --to published --dry-run"),
    ],
)
def test_the_command_line_page_has_every_key_of_json(docs_folder, perform, capsys, command, arguments):
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    (row,) = (line for line in page.splitlines() if line.startswith(f"| `{command}` |"))
    perform(f"cnvzoo {command} {arguments} --json")
    printed = json.loads(capsys.readouterr().out)
    documented = re.findall(r"`(\w+)`", row.split("|")[3].removeprefix(" those of `list`"))
    if command == "info":
        documented += [key for key in printed if key != "checkpoint"]
    assert sorted(set(documented)) == sorted(_keys(printed))


def _keys(value: object) -> set[str]:
    """The keys of JSON objects, and of those in them."""
    if isinstance(value, list):
        return set().union(*map(_keys, value))
    return set(value).union(*map(_keys, value.values())) if isinstance(value, dict) else set()


def test_the_error_on_the_recipes_page_is_that_of_the_command(docs_folder, perform, capsys):
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^    (error: .*)$", page, re.MULTILINE)
    path = docs_folder / "mnist_resnet20.yaml"
    path.write_text(path.read_text().replace("warmup_epochs", "warmup_epoch"))
    assert perform("cnvzoo train mnist_resnet20.yaml") == 1
    assert capsys.readouterr().err == f"{shown}\n"


def test_the_readme_names_only_what_the_library_exports():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in set(re.findall(r"cnvzoo\.(\w+)", readme)):
        assert name in cnvzoo.__all__ or inspect.ismodule(getattr(cnvzoo, name)), name
