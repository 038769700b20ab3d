"""PyTorch Hub with this checkout: what it lists and loads, also when the package is not installed."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cnvzoo

ROOT = Path(__file__).resolve().parents[1]


def load(name: str, **arguments: object) -> torch.nn.Module:
    return torch.hub.load(str(ROOT), name, source="local", **arguments)  # type: ignore[return-value]


def test_every_model_is_an_entry_point_and_nothing_else() -> None:
    """Looks for them as torch.hub.list does, which itself accepts only repositories on GitHub."""
    found = runpy.run_path(str(ROOT / "hubconf.py"))
    entry_points = {name for name, value in found.items() if callable(value) and not name.startswith("_")}
    quantized = {f"{name}_w{b}a{b}" for name in cnvzoo.list_models("quant_*") for b in (8, 4, 2)}
    assert len(quantized) == 24
    assert entry_points == {*cnvzoo.list_models(), *quantized}
    assert all("pretrained" in found[name].__doc__ for name in entry_points)


def test_registered_models_of_any_name_are_entry_points() -> None:
    cnvzoo.register_model("net_wide", summary="Of tests")(cnvzoo.models.model_spec("cnv").build)
    try:
        assert runpy.run_path(str(ROOT / "hubconf.py"))["net_wide"].__doc__.startswith("Of tests.")
    finally:
        cnvzoo.unregister_model("net_wide")


def test_published_weights(tmp_path, make_checkpoint) -> None:
    make_checkpoint(tmp_path / "hub", "quant_cnv", "cifar10", w_bits=4, a_bits=4)
    expected = cnvzoo.create_model("quant_cnv_w4a4.cifar10", pretrained=True, hub=tmp_path / "hub").state_dict()
    model = load("quant_cnv_w4a4", dataset="cifar10", pretrained=True, hub=tmp_path / "hub")
    assert not model.training
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "arguments", "classes"),
    [
        ("resnet20", {}, 10),
        ("cnv", {"dataset": "cifar100"}, 100),
        ("quant_cnv", {"w_bits": 3, "a_bits": 5, "num_classes": 7}, 7),
        ("quant_cnv_w2a2", {"dataset": "cifar100"}, 100),
    ],
)
def test_fresh(name: str, arguments: dict[str, object], classes: int) -> None:
    model = load(name, **arguments)
    assert model.training
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, classes)


def test_a_checkout_that_is_not_installed(tmp_path) -> None:
    """In a process that can import the installed packages, but not cnvzoo."""
    code = (
        "import sys, torch; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)];"
        "sys.path[:] = [p for p in sys.path if not p.endswith('src')];"
        f"model = torch.hub.load({str(ROOT)!r}, 'cnv', dataset='mnist', pretrained=True, source='local');"
        "print(model.pretrained_cfg.name)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "cnv.mnist"
