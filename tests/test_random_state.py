"""The program's random numbers are its own: nothing but a fresh model draws from them, in no thread, at no moment."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cnvzoo
from cnvzoo.models import build_model
from cnvzoo.models.layers import initialized_from, without_initialization

ROOT = Path(__file__).resolve().parents[1]
HUB = ROOT / "hub"

# In a process of its own, because much is imported, and so can draw, at the first use alone. It prints after which
# calls which generator had moved.
CALLS = """
import importlib, json, random, sys
from pathlib import Path
import numpy, torch
import cnvzoo
from cnvzoo.models.registry import model_names
from synthetic import noise, recipe

hub, folder = Path(sys.argv[1]), Path(sys.argv[2])
importlib.import_module("cnvzoo.verify").load_dataset = lambda name, root: noise(name)

def state():
    name, keys, *others = numpy.random.get_state()
    numbers = [name, keys.tolist(), *others]
    return {"torch": torch.get_rng_state().tolist(), "random": random.getstate(), "numpy": numbers}

moved = []
def call(name, function):
    before = state()
    result = function()
    after = state()
    moved.extend(f"{name}: {which}" for which in before if before[which] != after[which])
    return result

random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
for name in model_names():
    bits = {"w_bits": 2, "a_bits": 3} if name == "quant_cnv" else {}
    call(f"model_info {name}", lambda: cnvzoo.model_info(name, **bits))
model, config = call("load_checkpoint", lambda: cnvzoo.load_checkpoint(hub / "cnv.mnist"))
quantized, _ = call("load_checkpoint, quantized", lambda: cnvzoo.load_checkpoint(hub / "quant_cnv_w2a2.mnist"))
call("create_model, pretrained", lambda: cnvzoo.create_model("cnv.mnist", pretrained=True, hub=hub))
call("quantize", lambda: cnvzoo.quantize(hub / "cnv.mnist", w_bits=2, a_bits=2))
call("transforms", lambda: cnvzoo.transforms("mnist")(noise().test_images[0].permute(2, 0, 1)))
call("predict", lambda: cnvzoo.predict(model, config, noise().test_images[0].permute(2, 0, 1)))
call("evaluate", lambda: cnvzoo.evaluate(model, noise(), device="cpu"))
call("train", lambda: cnvzoo.train(recipe(), dataset=noise(), run_dir=folder, epochs=1, device="cpu"))
weights = folder / "weights.safetensors"
taught = recipe(name="mnist_resnet32", model="resnet32", teacher="mnist_resnet20")
call("train, taught", lambda: cnvzoo.train(taught, dataset=noise(), teacher=weights, epochs=1, device="cpu"))
call("verify", lambda: cnvzoo.verify([hub / "cnv.mnist"], device="cpu"))
call("export", lambda: cnvzoo.export(quantized, folder / "m.onnx"))
print(json.dumps(moved))
"""


def test_no_call_but_a_fresh_model_moves_a_generator_of_the_program(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT / "tests" / "train"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", CALLS, str(HUB), str(tmp_path)],
        capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def all_models() -> Iterator[tuple[str, dict[str, int]]]:
    for name in cnvzoo.list_models():
        yield name, {"w_bits": 2, "a_bits": 3} if name == "quant_cnv" else {}


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(value, expected) for (a, value), (b, expected) in pairs)


@pytest.fixture
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        yield


@pytest.mark.parametrize(("name", "bits"), list(all_models()))
def test_a_seed_gives_a_model_the_values_that_torchs_own_seed_gives_it(
    name: str, bits: dict[str, int], seeded: None
) -> None:
    expected = build_model(name, **bits)
    before = torch.get_rng_state()
    with initialized_from(5):
        assert same(build_model(name, **bits), expected)
    with initialized_from(6):
        assert not same(build_model(name, **bits), expected)
    with without_initialization():
        build_model(name, **bits)
    assert torch.equal(torch.get_rng_state(), before)


def test_counting_a_model_before_it_is_made_leaves_its_weights_alone(seeded: None) -> None:
    expected = cnvzoo.create_model("resnet20")
    torch.manual_seed(5)
    cnvzoo.model_info("resnet20")
    assert same(cnvzoo.create_model("resnet20"), expected)


@pytest.mark.filterwarnings("ignore:cnv.mnist with")
def test_only_a_new_head_draws(seeded: None) -> None:
    before = torch.get_rng_state()
    cnvzoo.load_checkpoint(HUB / "cnv.mnist", in_chans=3)
    assert torch.equal(torch.get_rng_state(), before)
    heads = [cnvzoo.load_checkpoint(HUB / "cnv.mnist", num_classes=4)[0].get_parameter("classifier.6.weight")]
    assert not torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    heads.append(cnvzoo.load_checkpoint(HUB / "cnv.mnist", num_classes=4)[0].get_parameter("classifier.6.weight"))
    assert torch.equal(*heads)


@pytest.mark.parametrize("module", ["cnvzoo.training.run", "cnvzoo.checkpoints.weights", "cnvzoo.zoo"])
def test_a_generator_that_other_threads_draw_from_is_not_even_moved_for_a_moment(
    module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_run: Callable[[Path], Any], seeded: None
) -> None:
    before, built = torch.get_rng_state(), []
    owner = importlib.import_module(module)

    def build(*args: Any, **arguments: Any) -> nn.Module:
        model = build_model(*args, **arguments)
        built.append(torch.equal(torch.get_rng_state(), before))
        return model

    def seed_of_devices(*_: Any) -> None:
        raise AssertionError("the generators of devices are the program's too")

    monkeypatch.setattr(owner, "build_model", build)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seed_of_devices)
    monkeypatch.setattr(torch, "manual_seed", seed_of_devices)
    cnvzoo.load_checkpoint(HUB / "cnv.mnist")
    cnvzoo.model_info("resnet20")
    small_run(tmp_path)
    assert built
    assert all(built)


@pytest.fixture
def small_run(small_datasets: Callable[..., None]) -> Callable[[Path], Any]:
    small_datasets(train=32, test=8)
    wanted = cnvzoo.Recipe(
        name="mnist_resnet20", model="resnet20", dataset="mnist", epochs=2, batch_size=16,
        optimizer=importlib.import_module("cnvzoo.train").Optimizer(lr=0.1),
    )  # fmt: skip
    return lambda folder: cnvzoo.train(wanted, run_dir=folder, epochs=1, device="cpu", quiet=True)
