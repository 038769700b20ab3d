"""Published weights by name: which checkpoint is chosen, from which store, and the preprocessing of its model."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import cnvzoo
import cnvzoo.checkpoints.index
from cnvzoo.checkpoints.format import CheckpointConfig, CheckpointError
from cnvzoo.checkpoints.locations import store_location
from cnvzoo.data import Preprocessing
from cnvzoo.errors import ModelError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def hub(tmp_path: Path, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in CNVZOO_HUB: a quantized model published for two datasets, and a float model for a third."""
    make_checkpoint(tmp_path / "hub", "quant_cnv", "cifar10", w_bits=4, a_bits=4)
    make_checkpoint(tmp_path / "hub", "quant_cnv", "cifar100", w_bits=4, a_bits=4)
    make_checkpoint(tmp_path / "hub", "resnet20", "mnist")
    monkeypatch.setenv("CNVZOO_HUB", str(tmp_path / "hub"))
    return tmp_path / "hub"


def name_of(model: nn.Module) -> str:
    config = model.pretrained_cfg
    assert isinstance(config, CheckpointConfig)
    return config.name


class TestChoice:
    @pytest.mark.parametrize(
        ("name", "arguments", "expected"),
        [
            ("quant_cnv_w4a4.cifar10", {"pretrained": True}, "quant_cnv_w4a4.cifar10"),
            ("quant_cnv_w4a4", {"pretrained": "cifar100"}, "quant_cnv_w4a4.cifar100"),
            ("quant_cnv.cifar100", {"pretrained": True}, "quant_cnv_w4a4.cifar100"),
            ("quant_cnv", {"pretrained": True, "w_bits": 4, "num_classes": 100}, "quant_cnv_w4a4.cifar100"),
            ("quant_cnv", {"pretrained": True, "num_classes": 10, "first_w_bits": 8}, "quant_cnv_w4a4.cifar10"),
            ("resnet20", {"pretrained": True}, "resnet20.mnist"),
            ("resnet20.mnist", {"pretrained": "mnist"}, "resnet20.mnist"),
        ],
    )  # fmt: skip
    def test_the_only_checkpoint_that_fits_is_chosen(
        self, hub: Path, name: str, arguments: dict[str, Any], expected: str
    ) -> None:
        model = cnvzoo.create_model(name, **arguments)
        assert name_of(model) == expected
        assert not model.training
        own, _ = cnvzoo.load_checkpoint(hub / expected)
        assert all(torch.equal(tensor, own.state_dict()[n]) for n, tensor in model.state_dict().items())

    def test_a_full_name_selects_the_published_one_beside_an_own_one(self, hub: Path) -> None:
        model = cnvzoo.create_model("quant_cnv_w4a4.cifar10", pretrained=True)
        cnvzoo.save_checkpoint(model, hub / "tuned.cifar10")
        assert name_of(cnvzoo.create_model("quant_cnv_w4a4.cifar10", pretrained=True)) == "quant_cnv_w4a4.cifar10"
        assert name_of(cnvzoo.create_model("tuned.cifar10", pretrained=True)) == "tuned.cifar10"

    def test_the_calls_of_the_page_choose_among_all_published_ones(self) -> None:
        page = (ROOT / "docs" / "checkpoints.md").read_text()
        calls = re.findall(r"^\w+ = (cnvzoo\.create_model\(.*\))$", page.split("```")[1], re.MULTILINE)
        assert len(calls) == 3
        assert {name_of(eval(call)) for call in calls} == {"quant_cnv_w4a4.cifar10"}

    @pytest.mark.parametrize(
        ("name", "arguments", "words"),
        [
            ("quant_cnv_w4a4", {}, "more than one.*quant_cnv_w4a4.cifar10, quant_cnv_w4a4.cifar100"),
            ("quant_cnv", {"num_classes": 7}, "no checkpoint of quant_cnv, num_classes=7: give one.*cifar10, "),
            ("quant_cnv_w2a2.cifar10", {}, "no checkpoint of quant_cnv, w_bits=2, a_bits=2, cifar10.*w4a4.cifar10"),
            ("quant_cnv.cifar10", {"first_w_bits": 4}, "first_w_bits=4"),
            ("resnet110", {}, "no checkpoint of resnet110 is published: pretrained=False"),
            ("resnet20.cifar10", {}, "no checkpoint of resnet20, cifar10.*resnet20.mnist"),
            ("resnet20.mnist", {"pretrained": "cifar10"}, "name one dataset"),
            ("resnet20", {"pretrained": Path("hub/resnet20.mnist")}, "load_checkpoint takes folders"),
            ("resnet21.mnist", {}, "unknown model 'resnet21': did you mean"),
            ("quant_cnv_w4a4.cifar10", {"w_bits": 2}, "w_bits=2: leave w_bits out"),
        ],
    )
    def test_an_ambiguous_choice_is_an_error_that_lists_the_checkpoints(
        self, hub: Path, name: str, arguments: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(ModelError, match=words):
            cnvzoo.create_model(name, **{"pretrained": True, **arguments})

    def test_a_named_checkpoint_is_adapted(self, hub: Path) -> None:
        with pytest.warns(UserWarning, match="num_classes=7: fc is new"):
            model = cnvzoo.create_model("resnet20", pretrained="mnist", num_classes=7)
        assert model(torch.zeros(1, 1, 28, 28)).shape == (1, 7)

    def test_a_checkpoint_name_without_pretrained_gives_new_weights(self, hub: Path) -> None:
        """As in timm, the result is the model of the checkpoint with initial weights."""
        model = cnvzoo.create_model("quant_cnv_w2a3.cifar100")
        assert model.training
        assert model.pretrained_cfg is None
        assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 100)
        assert cnvzoo.create_model("resnet20.mnist", num_classes=4).eval()(torch.zeros(1, 1, 28, 28)).shape == (1, 4)
        with pytest.raises(cnvzoo.CnvzooError, match="unknown dataset 'imagenet'"):
            cnvzoo.create_model("resnet20.imagenet")

    def test_an_own_checkpoint_has_any_name_and_its_models_defaults(self, hub: Path) -> None:
        model, _ = cnvzoo.load_checkpoint("quant_cnv_w4a4.cifar10")
        cnvzoo.save_checkpoint(model, hub / "mine")
        options = {"w_bits": 4, "first_w_bits": 8, "bits": {}}
        for name in ("mine", hub / "mine", hub / "quant_cnv_w4a4.cifar10"):
            loaded = cnvzoo.create_model(name, pretrained=True, hub=hub, **options)
            assert name_of(loaded) == Path(name).name
            with pytest.raises(ModelError, match="its first_w_bits is 8, not 4: leave first_w_bits out"):
                cnvzoo.create_model(name, pretrained=True, hub=hub, first_w_bits=4)
        with pytest.warns(UserWarning, match=r"num_classes=7: .* is new"):
            assert cnvzoo.create_model("mine", pretrained=True, num_classes=7).num_classes == 7
        with pytest.raises(ModelError, match="unknown model 'mine'"):
            cnvzoo.create_model("mine")


class TestStore:
    def test_the_argument_is_used_before_the_variable_and_the_checkout(
        self, hub: Path, tmp_path: Path, monkeypatch
    ) -> None:
        assert store_location() == str(hub)
        assert store_location("hf://somebody") == "hf://somebody"
        monkeypatch.delenv("CNVZOO_HUB")
        assert store_location() == ROOT / "hub"
        assert store_location(checkout=tmp_path) == "hf://cnvzoo"

    def test_hub_argument(self, hub: Path, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setenv("CNVZOO_HUB", str(tmp_path / "nothing"))
        assert name_of(cnvzoo.create_model("resnet20.mnist", pretrained=True, hub=hub)) == "resnet20.mnist"
        with pytest.raises(CheckpointError, match="nothing"):
            cnvzoo.create_model("resnet20.mnist", pretrained=True)

    def test_published_checkpoints_match_the_index(self, hub: Path) -> None:
        """A changed but valid folder is refused under a published name, and loaded by its path."""
        shutil.copytree(hub / "quant_cnv_w4a4.cifar100", hub / "other")
        path = hub / "resnet20.mnist" / "config.json"
        path.write_text(path.read_text().replace('"correct": 5', '"correct": 6'))
        with pytest.raises(CheckpointError, match=str(path)):
            cnvzoo.load_checkpoint("resnet20.mnist")
        assert cnvzoo.load_checkpoint(hub / "resnet20.mnist")[1].correct == 6

    def test_an_unpublished_checkpoint(self, hub: Path, tmp_path: Path) -> None:
        """It is loaded by name or path, and its weights are compared with its own config."""
        own = hub / "resnet20.own"
        shutil.copytree(hub / "resnet20.mnist", own)
        for model in (
            cnvzoo.load_checkpoint("resnet20.own")[0],
            cnvzoo.load_checkpoint(str(own))[0],
            cnvzoo.create_model("resnet20", pretrained="own"),
        ):
            assert name_of(model) == "resnet20.mnist"
        with pytest.raises(ModelError, match=r"more than one.*resnet20\.mnist, resnet20\.own"):
            cnvzoo.create_model("resnet20", pretrained=True)
        weights = own / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[::-1])
        with pytest.raises(CheckpointError, match="sha256"):
            cnvzoo.load_checkpoint("resnet20.own")

    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            (lambda text: text.replace('"format_version": 1', '"format_version": 2'), "2, and this cnvzoo reads 1"),
            (lambda text: text[:-3], "not a valid checkpoint config"),
            (lambda text: "[]", "not a valid checkpoint config"),
        ],
    )  # fmt: skip
    def test_a_damaged_checkpoint_is_reported_and_left_out(
        self, hub: Path, damage: Callable[[str], str], said: str
    ) -> None:
        listed = cnvzoo.list_checkpoints()
        own = hub / "resnet20.own"
        shutil.copytree(hub / "resnet20.mnist", own)
        path = own / "config.json"
        path.write_text(damage(path.read_text()))
        for name, classes in (("resnet20.mnist", None), ("resnet20", None), ("quant_cnv", 100)):
            with pytest.warns(UserWarning, match=f"^resnet20.own is left out: {path}: .*{said}"):
                assert not cnvzoo.create_model(name, pretrained=True, num_classes=classes).training
        assert cnvzoo.load_checkpoint("resnet20.mnist")[1].name == "resnet20.mnist"
        assert cnvzoo.list_checkpoints() == listed
        with pytest.raises(CheckpointError, match=said):
            cnvzoo.load_checkpoint("resnet20.own")
        with pytest.raises(CheckpointError, match=f"{path}: .*{said}"):
            cnvzoo.create_model("resnet20.own", pretrained=True)
        with pytest.raises(ModelError, match=f"no checkpoint of resnet110 is.*resnet20.own is left out: .*{said}"):
            cnvzoo.create_model("resnet110", pretrained=True)

    @pytest.mark.parametrize("name", ["..", "nothing", "resnet20.mnist\x00", "", "resnet20.minst"])
    def test_unknown_names(self, hub: Path, name: str) -> None:
        with pytest.raises(CheckpointError, match=r"Choices: quant_cnv_w4a4\.cifar10"):
            cnvzoo.load_checkpoint(name)

    @pytest.mark.parametrize("path", ["../hub", "/nothing/at/all", "./resnet20.mnist"])
    def test_paths_without_a_checkpoint(self, hub: Path, path: str) -> None:
        with pytest.raises(CheckpointError, match=r"config\.json: cannot be read .*is .* a checkpoint folder\?"):
            cnvzoo.load_checkpoint(path)


class TestPreprocessing:
    def test_comes_with_the_model(self, hub: Path) -> None:
        model = cnvzoo.create_model("resnet20.mnist", pretrained=True)
        digit = torch.randint(256, (1, 28, 28), dtype=torch.uint8)
        expected = cnvzoo.transforms("mnist")(digit)
        assert torch.equal(cnvzoo.transforms(model)(digit), expected)
        quantized = cnvzoo.create_model("quant_cnv_w4a4.cifar10", pretrained=True)
        image = Image.fromarray(np.full((32, 32, 3), 51, np.uint8))
        torch.testing.assert_close(cnvzoo.transforms(quantized)(image), torch.full((3, 32, 32), 0.2))

    def test_fits_an_adapted_model(self, hub: Path) -> None:
        with pytest.warns(UserWarning, match="in_chans=3"):
            model = cnvzoo.create_model("resnet20.mnist", pretrained=True, in_chans=3)
        x = cnvzoo.transforms(model)(torch.full((3, 28, 28), 255, dtype=torch.uint8))
        torch.testing.assert_close(x, torch.full((3, 28, 28), (1 - 0.1307) / 0.3081))
        with pytest.warns(UserWarning, match="in_chans=1"):
            model = cnvzoo.create_model("quant_cnv_w4a4.cifar10", pretrained=True, in_chans=1)
        assert model(cnvzoo.transforms(model)(torch.zeros(3, 40, 40, dtype=torch.uint8))[None]).shape == (1, 10)
        with pytest.warns(UserWarning, match="in_chans=2"):
            model, config = cnvzoo.load_checkpoint("resnet20.mnist", in_chans=2)
        for source in (model, config):
            with pytest.raises(ModelError, match="takes 2 channels"):
                cnvzoo.transforms(source)

    def test_a_fresh_model_has_none(self) -> None:
        with pytest.raises(ModelError, match="the dataset"):
            cnvzoo.transforms(cnvzoo.create_model("cnv"))

    def test_is_the_one_of_evaluation(self, hub: Path) -> None:
        model = cnvzoo.create_model("quant_cnv_w4a4.cifar10", pretrained=True)
        images = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
        expected = Preprocessing(32, (0.0,) * 3, (1.0,) * 3)(images)
        found = torch.stack([cnvzoo.transforms(model)(image.permute(2, 0, 1)) for image in images])
        assert torch.equal(found, expected)


def test_loading_is_fast(hub: Path) -> None:
    """At most 0.3 s of CPU time without the imports of torch and Brevitas, or 25 % of their time on a busy machine."""
    code = (
        "import sys, time, pathlib; clock = time.process_time; begin = clock();"
        "import torch, brevitas.nn; start = clock();"
        "import cnvzoo, cnvzoo.checkpoints.index; cnvzoo.checkpoints.index.INDEX = pathlib.Path(sys.argv[1]);"
        "model = cnvzoo.create_model('quant_cnv_w4a4.cifar10', pretrained=True);"
        "print(start - begin, clock() - start)"
    )
    command = [sys.executable, "-c", code, str(cnvzoo.checkpoints.index.INDEX)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    imports, loading = 0.0, math.inf
    for _ in range(3):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        imports, loading = map(float, done.stdout.split())
        if loading < max(0.3, 0.25 * imports):
            return
    pytest.fail(f"importing cnvzoo and loading took {loading:.2f} s, beyond {imports:.2f} s for torch and Brevitas")


def test_list_checkpoints_has_the_bits(hub: Path) -> None:
    found = {row["name"]: (row["model"], row["w_bits"], row["a_bits"]) for row in cnvzoo.list_checkpoints("quant*")}
    assert found == {
        "quant_cnv_w4a4.cifar10": ("quant_cnv", 4, 4),
        "quant_cnv_w4a4.cifar100": ("quant_cnv", 4, 4),
    }


@pytest.mark.parametrize("path", sorted((ROOT / "hub").glob("*/config.json")), ids=lambda path: path.parent.name)
def test_configs_agree_with_their_records(path: Path) -> None:
    config = json.loads(path.read_text())
    record = ROOT / "benchmarks" / "results" / config["recipe"]["name"] / f"seed{config['seed']}.json"
    values = json.loads(record.read_text())
    for key in ("correct", "total", "weights_sha256", "recipe", "versions", "device", "commit", "seed"):
        assert config[key] == values[key], key
