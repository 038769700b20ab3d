"""Models small enough that a checkpoint of one is written and read in a millisecond or two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cnvzoo.checkpoints.folder import write_checkpoint
from cnvzoo.checkpoints.format import CheckpointConfig, CheckpointFacts, SeedResult
from cnvzoo.files import sha256_of
from cnvzoo.models import build_model, model_names, register_model, unregister_model
from cnvzoo.models.quant_layers import QuantLayers


class Tiny(nn.Module):
    """A quantized convolution, a norm, an activation and a quantized linear layer."""

    def __init__(self, num_classes: int, in_chans: int, w_bits: int, a_bits: int) -> None:
        super().__init__()
        layers = QuantLayers(w_bits, a_bits, first_w_bits=w_bits)
        self.conv = layers.conv(in_chans, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.relu = layers.relu()
        self.fc = layers.linear(5, num_classes, last=True)
        layers.finish(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.norm(self.conv(x))).mean((2, 3)))


TINY = {"name": "tiny", "num_classes": 3, "in_chans": 1, "w_bits": 3, "a_bits": 4}


@contextmanager
def registered_tiny() -> Iterator[dict[str, Any]]:
    """Register `Tiny` for the block, which gets its arguments; all models registered in it are removed at the end."""
    before = model_names()
    register_model("tiny", summary="of tests", quantized=True)(Tiny)
    try:
        yield dict(TINY)
    finally:
        for name in set(model_names()).difference(before):
            unregister_model(name)


def facts_of(arguments: dict[str, Any], weights_sha256: str, **changes: Any) -> CheckpointFacts:
    channels = arguments["in_chans"]
    values: dict[str, Any] = {
        "name": f"{arguments['name']}.shapes",
        "model": arguments,
        "dataset": "shapes",
        "classes": [f"shape {i}" for i in range(arguments["num_classes"])],
        "preprocessing": {"size": 32, "mean": [0.5] * channels, "std": [0.25] * channels, "image_size": 28},
        "seed": 1,
        "correct": 9123,
        "total": 10_000,
        "results": [
            SeedResult(seed=0, correct=9000, total=10_000, weights_sha256="0" * 64),
            SeedResult(seed=1, correct=9123, total=10_000, weights_sha256=weights_sha256),
        ],
        "weights_sha256": weights_sha256,
        "recipe": {"name": "shapes_recipe", "epochs": 3},
        "versions": {"torch": "2.11.0"},
        "device": {"kind": "cpu", "threads": 2},
        "commit": None,
    }
    return CheckpointFacts(**values | changes)


def publish(folder: Path, model: nn.Module, arguments: dict[str, Any]) -> CheckpointConfig:
    """Write the checkpoint of a model, from a temporary weights file like that of a run."""
    run = folder.parent / f"{folder.name}.run.safetensors"
    run.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, run)
    try:
        return write_checkpoint(folder, facts_of(arguments, sha256_of(run)), run)
    finally:
        run.unlink()


def trained(arguments: dict[str, Any], change: Callable[[nn.Module], None] = lambda model: None) -> nn.Module:
    """A model in eval mode, whose norms and scales have other values than at initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(**arguments)
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
                assert module.running_mean is not None
                assert module.num_batches_tracked is not None
                nn.init.normal_(module.running_mean, std=0.3)
                module.num_batches_tracked.fill_(77)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("scale"):
                    parameter.mul_(0.7 + 0.5 * torch.rand(parameter.shape))
            change(model)
    return model.eval()


def content_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
