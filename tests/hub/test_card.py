"""The model card: what the Hub indexes, what people read, and that what it tells them to type works."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import reproduce
import yaml
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

import cnvzoo
from cnvzoo.hub import CheckpointConfig, IntegerResult, SeedResult, read_config, write_config
from cnvzoo.hub.card import render_card

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


def test_it_says_what_every_seed_came_to(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "91.20 % top-1 on the test set of CIFAR-10: 9,120 of 10,000 images" in card
    for row in ("| 0 | 91.20 | 9,120 of", "| 1 | 91.40 | 9,140 of", "| 2 | 91.90 | 9,190 of"):
        assert row in card
    assert "Mean over 3 seeds: 91.50 %, standard deviation 0.36" in card  # by hand: sqrt((.09 + .01 + .16) / 2)


def test_it_has_preprocessing_recipe_size_and_limits(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "Images of 32x32 pixels, RGB, scaled to [0, 1]." in card
    assert "airplane, automobile, bird, cat" in card
    assert yaml.safe_load(block(card, "yaml")) == RECIPE
    # multiply-accumulates by hand: six convolutions at 30, 28, 12, 10, 3 and 1 pixels a side, three linear layers
    convolutions = 3 * 64 * 900 + 64 * 64 * 784 + 64 * 128 * 144 + 128 * 128 * 100 + 128 * 256 * 9 + 256 * 256
    assert f"| {9 * convolutions + 256 * 512 + 512 * 512 + 512 * 10:,} | w4a4 |" in card
    assert f"{(folder / 'model.safetensors').stat().st_size:,} bytes" in card
    assert "weights of 4 bits (first layer 8) and activations of 4 bits" in card
    assert "at commit `abc123`" in card
    assert "- kind cpu, threads 2\n- torch 2.15.0" in card
    assert "A graph in integers on other hardware rounds in its own way" in card


def test_it_says_what_the_integer_graph_came_to(folder: Path) -> None:
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
    assert "Mean over one seed: 10.00 %. The test set" in card
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


def test_the_command_to_reproduce_is_one(folder: Path, capsys: pytest.CaptureFixture) -> None:
    program, script, *arguments = block((folder / "README.md").read_text(), "sh").split()
    assert (program, script) == ("python", "benchmarks/reproduce.py")
    assert arguments[arguments.index("--threads") + 1] == "2"  # as the run had, or its bits are others
    assert reproduce.main([*arguments, "--list"]) == 0
    assert "cifar10_quant_cnv_w4a4" in capsys.readouterr().out


def test_the_command_leaves_out_one_thread(folder: Path) -> None:
    # The default, and the commits of the first runs know no such option.
    changes = {"device": {"kind": "cpu", "threads": 1}}
    write_config(folder, read_config(folder).model_copy(update=changes))
    cnvzoo.write_card(folder)
    assert "--threads" not in block((folder / "README.md").read_text(), "sh")


@pytest.mark.parametrize("published", sorted(HUB.glob("*/config.json")), ids=lambda path: path.parent.name)
def test_the_published_cards_are_those_of_their_configs(published: Path) -> None:
    config = read_config(published.parent)
    info = cnvzoo.model_info(**config.model, input_size=config.preprocessing["size"])
    card = render_card(config, info.summary, info.parameters, info.macs)
    remedy = "run: python benchmarks/reproduce.py --table all --time-limit 0"
    assert (published.parent / "README.md").read_text(encoding="utf-8") == card, remedy
