"""The caller's random numbers: only a model with new weights draws from the global generators."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cnvzoo
from cnvzoo.models import build_model
from cnvzoo.models.initialization import initialized_from, without_initialization
from cnvzoo.training import Optimizer

ROOT = Path(__file__).resolve().parents[1]
HUB = ROOT / "hub"

# Run in a new process, because imports at first use can draw too. Prints which calls changed which generator.
CALLS = """
import importlib, json, random, sys
from pathlib import Path
import numpy, torch
import cnvzoo
from synthetic import noise, recipe

hub, folder = Path(sys.argv[1]), Path(sys.argv[2])
importlib.import_module("cnvzoo.checkpoints.test_set").load_dataset = lambda name, root: noise(name)

def state():
    name, keys, *others = numpy.random.get_state()
    numbers = [name, keys.tolist(), *others]
    return {"torch": torch.get_rng_state().tolist(), "random": random.getstate(), "numpy": numbers}

changed = []
def call(name, function):
    before = state()
    result = function()
    after = state()
    changed.extend(f"{name}: {which}" for which in before if before[which] != after[which])
    return result

random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
for name in ("cnv", "resnet18", "resnet20", "mobilenet_v1", "quant_cnv", "quant_resnet20", "quant_mobilenet_v1"):
    bits = {"w_bits": 2, "a_bits": 3} if name.startswith("quant_") else {}
    call(f"model_info {name}", lambda: cnvzoo.model_info(name, **bits))
model, config = call("load_checkpoint", lambda: cnvzoo.load_checkpoint(hub / "cnv.mnist"))
quantized, _ = call("load_checkpoint, quantized", lambda: cnvzoo.load_checkpoint(hub / "quant_cnv_w2a2.mnist"))
call("create_model, pretrained", lambda: cnvzoo.create_model("cnv.mnist", pretrained=True, hub=hub))
call("create_model, other channels", lambda: cnvzoo.create_model("cnv.mnist", pretrained=True, hub=hub, in_chans=3))
call("create_model, no head", lambda: cnvzoo.create_model("cnv.mnist", pretrained=True, hub=hub, num_classes=0))
call("lists", lambda: (cnvzoo.list_models(pretrained=True), cnvzoo.list_recipes(), cnvzoo.list_datasets()))
call("quantize", lambda: cnvzoo.quantize(hub / "resnet20.mnist", w_bits=2, a_bits=2))
call("transforms", lambda: cnvzoo.transforms("mnist")(noise().test_images[0].permute(2, 0, 1)))
call("predict", lambda: cnvzoo.predict(model, noise().test_images[0].permute(2, 0, 1)))
call("evaluate", lambda: cnvzoo.evaluate(model, noise(), device="cpu"))
teacher = recipe(name="mnist_resnet20", model="resnet20")
call("train", lambda: cnvzoo.train(teacher, dataset=noise(), run_dir=folder, epochs=1, device="cpu"))
weights = folder / "weights.safetensors"
student = recipe(name="mnist_resnet32", model="resnet32", teacher="mnist_resnet20")
call("train, teacher", lambda: cnvzoo.train(student, dataset=noise(), teacher=weights, epochs=1, device="cpu"))
call("verify", lambda: cnvzoo.verify([hub / "cnv.mnist"], device="cpu"))
call("export", lambda: cnvzoo.export(quantized, folder / "m.onnx"))
call("export, float", lambda: cnvzoo.export(model, folder / "f.onnx", format="onnx"))
call("training step", lambda: quantized.train()(torch.zeros(2, 1, 32, 32)).sum().backward())
print(json.dumps(changed))
"""


def test_no_call_changes_a_global_generator(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT / "tests" / "training"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", CALLS, str(HUB), str(tmp_path)],
        capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(value, expected) for (a, value), (b, expected) in pairs)


@pytest.fixture
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        yield


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("cnv", {}),
        ("resnet20", {}),
        ("mobilenet_v1", {}),
        *((name, {"w_bits": 2, "a_bits": 3}) for name in ("quant_cnv", "quant_resnet20")),
    ],
)
def test_initialized_from_gives_the_weights_of_manual_seed(name: str, bits: dict[str, int], seeded: None) -> None:
    expected = build_model(name, **bits)
    before = torch.get_rng_state()
    with initialized_from(5):
        assert same(build_model(name, **bits), expected)
    with initialized_from(6):
        assert not same(build_model(name, **bits), expected)
    with without_initialization():
        build_model(name, **bits)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.randn(4),
        lambda: torch.rand(2, 2),
        lambda: torch.randint(9, (4,)),
        lambda: torch.randperm(4),
        lambda: torch.normal(0.0, 1.0, (4,)),
        lambda: torch.bernoulli(torch.full((9,), 0.5)),
        lambda: torch.multinomial(torch.ones(9), 4),
        lambda: torch.full((9,), 0.5).bernoulli(),
        lambda: torch.ones(9).multinomial(4),
        lambda: torch.rand_like(torch.ones(4)),
        lambda: torch.randn_like(torch.ones(4)),
        lambda: torch.randint_like(torch.ones(4), 9),
        lambda: torch.poisson(torch.ones(9)),
        lambda: torch.binomial(torch.full((9,), 4.0), torch.full((9,), 0.5)),
        lambda: torch.empty(4).exponential_(),
        lambda: torch.empty(4).cauchy_(),
        lambda: torch.empty(4).log_normal_(),
        lambda: torch.empty(4).geometric_(0.5),
        lambda: nn.init.orthogonal_(torch.empty(4, 4)),
        lambda: nn.init.trunc_normal_(torch.empty(4)),
    ],
)
def test_other_random_numbers_of_registered_models_have_the_seed_too(
    draw: Callable[[], torch.Tensor], seeded: None
) -> None:
    before = torch.get_rng_state()
    expected = draw()
    torch.set_rng_state(before)
    with initialized_from(5):
        assert torch.equal(draw(), expected)
    with without_initialization():
        assert draw().shape == expected.shape
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "draw",
    [
        lambda generator: torch.randn(4, generator=generator),
        lambda generator: torch.empty(4).normal_(generator=generator),
        lambda generator: nn.init.normal_(torch.empty(4), generator=generator),
        lambda generator: nn.init.kaiming_uniform_(torch.empty(4, 4), generator=generator),
    ],
)
def test_a_generator_of_the_builder_is_used_and_none_is_none(
    draw: Callable[[torch.Generator | None], torch.Tensor], seeded: None
) -> None:
    before = torch.get_rng_state()
    with initialized_from(5):
        own = draw(torch.Generator().manual_seed(7))
    assert torch.equal(own, draw(torch.Generator().manual_seed(7)))
    expected = draw(None)
    torch.set_rng_state(before)
    with initialized_from(5):
        assert torch.equal(draw(None), expected)
        positional = torch.poisson(torch.ones(9), torch.Generator().manual_seed(7))
    assert torch.equal(positional, torch.poisson(torch.ones(9), torch.Generator().manual_seed(7)))
    assert torch.equal(torch.get_rng_state(), before)


def test_model_info_before_create_model_does_not_change_the_weights(seeded: None) -> None:
    expected = cnvzoo.create_model("resnet20")
    torch.manual_seed(5)
    cnvzoo.model_info("resnet20")
    assert same(cnvzoo.create_model("resnet20"), expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda: cnvzoo.load_checkpoint(HUB / "cnv.mnist"),
        lambda: cnvzoo.create_model("quant_cnv_w2a2.mnist", pretrained=True, hub=HUB),
        lambda: cnvzoo.model_info("resnet110"),
        lambda: cnvzoo.quantize(HUB / "cnv.mnist", w_bits=2, a_bits=2),
    ],
    ids=["load_checkpoint", "create_model", "model_info", "quantize"],
)
def test_a_call_in_a_thread_does_not_change_the_numbers_that_another_thread_draws(
    call: Callable[[], object], seeded: None
) -> None:
    drawn = []
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(call)
        while not running.done():
            drawn.append(torch.rand(1 << 16)[-1])
            wait([running], timeout=0.01)
        running.result()
    drawn.append(torch.rand(1 << 16)[-1])
    torch.manual_seed(5)
    assert all(torch.equal(number, torch.rand(1 << 16)[-1]) for number in drawn)


@pytest.mark.filterwarnings("ignore:cnv.mnist with")
def test_loading_an_adapted_checkpoint_draws_only_for_a_new_head(seeded: None) -> None:
    before = torch.get_rng_state()
    cnvzoo.load_checkpoint(HUB / "cnv.mnist", in_chans=3)
    assert torch.equal(torch.get_rng_state(), before)
    heads = [cnvzoo.load_checkpoint(HUB / "cnv.mnist", num_classes=4)[0].get_parameter("classifier.6.weight")]
    assert not torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    heads.append(cnvzoo.load_checkpoint(HUB / "cnv.mnist", num_classes=4)[0].get_parameter("classifier.6.weight"))
    assert torch.equal(*heads)


@pytest.mark.parametrize("module", ["cnvzoo.training.inputs", "cnvzoo.checkpoints.weights"])
def test_the_global_generator_is_not_changed_even_for_a_moment(
    module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_datasets: Callable[..., None], seeded: None,
    uncompiled: None,
) -> None:  # fmt: skip
    """Other threads may draw from it while a model is built, so saving and restoring its state is not enough."""
    before, unchanged = torch.get_rng_state(), []

    def build(*args: Any, **arguments: Any) -> nn.Module:
        model = build_model(*args, **arguments)
        unchanged.append(torch.equal(torch.get_rng_state(), before))
        return model

    def seed(*_: Any) -> None:
        raise AssertionError("a global generator was seeded")

    monkeypatch.setattr(importlib.import_module(module), "build_model", build)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seed)
    monkeypatch.setattr(torch, "manual_seed", seed)
    small_datasets(train=32, test=8)
    recipe = cnvzoo.Recipe(
        name="mnist_resnet20", model="resnet20", dataset="mnist", epochs=2, batch_size=16, optimizer=Optimizer(lr=0.1)
    )
    cnvzoo.load_checkpoint(HUB / "cnv.mnist")
    cnvzoo.train(recipe, run_dir=tmp_path, epochs=1, device="cpu", quiet=True)
    assert unchanged
    assert all(unchanged)
